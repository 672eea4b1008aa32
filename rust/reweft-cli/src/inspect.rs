//! `inspect`: what is in a file.

use std::collections::{HashMap, HashSet};
use std::io::Write;

use reweft::artifact::manifest::{Manifest, RefitRule};
use reweft::artifact::{self, Slot, Unrefittable};
use reweft::checkpoint::Value;
use reweft::keymap::Mapped;
use reweft::source::{self, Access};
use reweft::tensor::Layout;
use reweft::{Artifact, Checkpoint, Limits, Recipe};
use serde::Serialize;

use crate::args::{Explain, Inspect};
use crate::output;

pub fn run(command: &Inspect, out: &mut dyn Write) -> anyhow::Result<bool> {
    // A file that is half rewritten need not look like what it is.
    reweft::write::recover(&command.file)?;
    let source = source::open(&command.file, Access::Read)?;
    if artifact::detect(&source) {
        let artifact = Artifact::open(&command.file, Access::Read, &Limits::default())?;
        show_artifact(&artifact, command.json, out)?;
    } else {
        let checkpoint = command.keys.open(&command.file)?;
        show_checkpoint(&checkpoint, command.json, out)?;
    }
    Ok(true)
}

/// A checkpoint as JSON.
#[derive(Serialize)]
struct CheckpointView<'a> {
    kind: &'static str,
    file: String,
    format: &'static str,
    tensors: Vec<TensorView<'a>>,
    /// Bytes of the storages that the listed tensors use, each counted once.
    storage_nbytes: u64,
    /// Keys by storage, for storages that more than one key uses.
    shared: Vec<Vec<&'a str>>,
    unreadable: HashMap<&'a str, &'a str>,
    values: &'a [Value],
    unknown_globals: &'a [String],
    metadata: HashMap<&'a String, &'a String>,
    /// What the key map did, if there is one.
    mapped: Option<&'a Mapped>,
    notices: &'a [String],
}

#[derive(Serialize)]
struct TensorView<'a> {
    key: &'a str,
    #[serde(flatten)]
    layout: Layout,
    contiguous: bool,
    storage: usize,
    storage_offset: u64,
    device: &'a str,
}

impl<'a> CheckpointView<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        let tensors: Vec<TensorView<'a>> = checkpoint
            .tensors()
            .map(|(key, info)| TensorView {
                key,
                layout: Layout::from(info),
                contiguous: info.is_contiguous(),
                storage: info.storage,
                storage_offset: info.storage_offset,
                device: checkpoint.storage_of(info).map_or("", |storage| &*storage.device),
            })
            .collect();
        let mut users: Vec<Vec<&str>> = vec![Vec::new(); checkpoint.storages().len()];
        for tensor in &tensors {
            users[tensor.storage].push(tensor.key);
        }
        let used = checkpoint.storages().iter().zip(&users).filter(|(_, keys)| !keys.is_empty());
        Self {
            kind: "checkpoint",
            file: checkpoint.path().display().to_string(),
            format: checkpoint.format().name(),
            tensors,
            storage_nbytes: used.map(|(storage, _)| storage.nbytes).sum(),
            shared: users.into_iter().filter(|keys| keys.len() > 1).collect(),
            unreadable: checkpoint.unreadable().collect(),
            values: checkpoint.values(),
            unknown_globals: checkpoint.unknown_globals(),
            metadata: checkpoint.metadata().into_iter().flatten().collect(),
            mapped: checkpoint.mapped(),
            notices: checkpoint.notices(),
        }
    }
}

fn show_checkpoint(checkpoint: &Checkpoint, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = CheckpointView::new(checkpoint);
    if json {
        return output::json(out, &view);
    }
    let rows = view.tensors.iter().map(|tensor| {
        let layout = &tensor.layout;
        let strides = if tensor.contiguous { String::new() } else { format!("{:?}", layout.strides) };
        let shape = format!("{:?}", layout.shape);
        let storage = format!("{}+{}", tensor.storage, tensor.storage_offset);
        vec![tensor.key.to_owned(), layout.dtype.to_owned(), shape, strides, output::bytes(layout.nbytes), storage]
    });
    output::table(
        out,
        &["key", "dtype", "shape", "strides", "bytes", "storage"],
        &["bytes", "storage"],
        rows.collect(),
    )?;
    for keys in &view.shared {
        writeln!(out, "shared storage: {}", keys.join(", "))?;
    }
    for (key, why) in checkpoint.unreadable() {
        writeln!(out, "cannot be read: {key}: {why}")?;
    }
    for value in view.values {
        writeln!(out, "not a tensor: {value}")?;
    }
    for global in view.unknown_globals {
        writeln!(out, "unknown, kept as data, not run: {global}")?;
    }
    for (name, value) in checkpoint.metadata().into_iter().flatten() {
        writeln!(out, "metadata: {name} = {value:?}")?;
    }
    if let Some(mapped) = view.mapped {
        show_mapped(mapped, out)?;
    }
    output::notices(view.notices);
    let nbytes: u64 = view.tensors.iter().map(|tensor| tensor.layout.nbytes).sum();
    let (count, held) = (view.tensors.len(), output::bytes(view.storage_nbytes));
    writeln!(out, "{}: {count} tensors, {} bytes, in storages of {held} bytes", view.format, output::bytes(nbytes))?;
    Ok(())
}

/// What a key map did: each rule, what operations made, what was dropped. New names are in the table already.
fn show_mapped(mapped: &Mapped, out: &mut dyn Write) -> anyhow::Result<()> {
    for (rule, count) in &mapped.rules {
        writeln!(out, "rule: {rule}: {count} names")?;
    }
    for (name, recipe) in mapped.made() {
        writeln!(out, "made: {name}: {recipe}")?;
    }
    for key in &mapped.dropped {
        writeln!(out, "dropped: {key}")?;
    }
    Ok(())
}

/// A package as JSON.
#[derive(Serialize)]
struct ArtifactView<'a> {
    kind: &'static str,
    file: String,
    /// Names of the models in a package.
    models: Vec<&'a str>,
    has_manifest: bool,
    /// That of a model that runs on the weights, as the manifest states it.
    weights_version: Option<String>,
    /// Which new weights the package takes, if it says so.
    refit: Option<RefitRule>,
    /// Why no weights can be replaced, if so.
    absent: Option<&'a str>,
    /// Whether weights were left out of the file.
    stripped: bool,
    needs_proxy_executor: bool,
    slots: Vec<SlotView<'a>>,
    /// Names of the tensors that slots are made of, if the compiler folded some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    originals: Vec<&'a str>,
    unused: &'a [String],
    unrefittable: &'a [Unrefittable],
    /// Constants that the program computes from others when it is loaded.
    recomputed: &'a [String],
}

#[derive(Serialize)]
struct SlotView<'a> {
    name: &'a str,
    aliases: &'a [String],
    constant: &'a str,
    kind: artifact::SlotKind,
    persistent: bool,
    mutated: bool,
    dtype: &'static str,
    shape: &'a [u64],
    strides: &'a [u64],
    /// First byte in the file; in a stripped one, that in the whole file.
    byte_offset: Option<u64>,
    nbytes: u64,
    hash: Option<&'a str>,
    obstacle: Option<&'a str>,
    stripped: bool,
    /// How it is made of originals, if the compiler made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    recipe: Option<&'a Recipe>,
}

impl<'a> SlotView<'a> {
    fn new(artifact: &Artifact, slot: &'a Slot) -> Self {
        Self {
            name: &slot.name,
            aliases: &slot.aliases,
            constant: &slot.constant,
            kind: slot.kind,
            persistent: slot.persistent,
            mutated: slot.mutated,
            dtype: slot.dtype.name(),
            shape: &slot.shape,
            strides: &slot.strides,
            byte_offset: artifact.place(slot).ok(),
            nbytes: slot.nbytes,
            hash: slot.hash.as_deref(),
            obstacle: slot.obstacle(),
            stripped: slot.stripped,
            recipe: slot.recipe.as_ref(),
        }
    }
}

impl<'a> ArtifactView<'a> {
    fn new(artifact: &'a Artifact) -> Self {
        let program = artifact.program();
        let models = program.map_or(&[][..], |program| program.models());
        Self {
            kind: "artifact",
            file: artifact.path().display().to_string(),
            models: models.iter().map(|model| model.model.as_str()).collect(),
            has_manifest: artifact.manifest().is_some(),
            weights_version: artifact.weights_version(),
            refit: artifact.manifest().map(Manifest::refit),
            absent: artifact.absent().map(|absent| absent.why.as_str()),
            stripped: artifact.is_stripped(),
            needs_proxy_executor: models.iter().any(|model| model.extern_nodes.is_some()),
            slots: artifact.slots().iter().map(|slot| SlotView::new(artifact, slot)).collect(),
            originals: artifact.originals().iter().flat_map(Slot::names).collect(),
            unused: artifact.unused(),
            unrefittable: artifact.unrefittable(),
            recomputed: program.map_or(&[], |program| program.recomputed()),
        }
    }
}

fn show_artifact(artifact: &Artifact, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = ArtifactView::new(artifact);
    if json {
        return output::json(out, &view);
    }
    let rows = artifact.slots().iter().map(|slot| {
        let (shape, remarks) = (format!("{:?}", slot.shape), remarks(artifact, slot));
        vec![slot.name.clone(), slot.dtype.to_string(), shape, output::bytes(slot.nbytes), remarks]
    });
    output::table(out, &["slot", "dtype", "shape", "bytes", "remarks"], &["bytes"], rows.collect())?;
    show_folded(artifact, out)?;
    for absent in artifact.unrefittable() {
        writeln!(out, "cannot be refitted: {}: {}", absent.name, absent.reason)?;
    }
    for name in artifact.unused() {
        writeln!(out, "never read by the program: {name}")?;
    }
    for name in view.recomputed {
        writeln!(out, "computed from others when the program is loaded: {name}")?;
    }
    if let Some(why) = view.absent {
        writeln!(out, "cannot be refitted: {why}")?;
    }
    if let Some(version) = &view.weights_version {
        writeln!(out, "weights version: {version}")?;
    }
    match view.refit {
        Some(RefitRule::Never) => writeln!(out, "cannot be refitted: traced with immutable_weights")?,
        Some(RefitRule::Identical) => writeln!(out, "takes no other weights: traced with identical_weights")?,
        Some(RefitRule::Any) | None => {}
    }
    if view.models.len() > 1 {
        writeln!(out, "models, whose names stand before those of their slots: {}", view.models.join(", "))?;
    }
    if !view.has_manifest {
        output::notices([
            &"no manifest: small tensors may be compiled into the code, and ties are not known".to_owned()
        ]);
    }
    let nbytes: u64 = artifact.slots().iter().map(|slot| slot.nbytes).sum();
    let (kind, slots) = (artifact.kind().name(), artifact.slots().len());
    let stripped: u64 = artifact.slots().iter().filter(|slot| slot.stripped).map(|slot| slot.nbytes).sum();
    let left_out =
        if artifact.is_stripped() { format!(", {} of them stripped", output::bytes(stripped)) } else { String::new() };
    writeln!(out, "{kind}: {slots} slots, {} bytes{left_out}", output::bytes(nbytes))?;
    Ok(())
}

/// What a frozen package says of itself as a whole.
fn show_folded(artifact: &Artifact, out: &mut dyn Write) -> anyhow::Result<()> {
    let Some(folded) = artifact.manifest().and_then(Manifest::folded) else { return Ok(()) };
    let made = artifact.slots().iter().filter(|slot| slot.recipe.is_some()).count();
    let (count, capability) = (artifact.originals().len(), &folded.capability);
    let compared = if folded.compared { "was the same for other weights" } else { "was generated once" };
    writeln!(out, "frozen: {made} slots are made of {count} tensors; code for {capability} {compared}")?;
    Ok(())
}

/// Where slots come from.
pub fn explain(command: &Explain, out: &mut dyn Write) -> anyhow::Result<bool> {
    let artifact = Artifact::open(&command.artifact, Access::Read, &Limits::default())?;
    let found = artifact.explain(&command.slot)?;
    if command.json {
        let views: Vec<SlotView<'_>> = found.iter().map(|slot| SlotView::new(&artifact, slot)).collect();
        output::json(out, &views)?;
        return Ok(true);
    }
    for slot in found {
        let formula = slot.recipe.as_ref().map_or_else(|| "the tensor of this name".to_owned(), Recipe::formula);
        writeln!(out, "{} = {formula}", slot.name)?;
    }
    Ok(true)
}

/// What there is to say of a slot beside its tensor.
fn remarks(artifact: &Artifact, slot: &Slot) -> String {
    let mut remarks = Vec::new();
    if !slot.aliases.is_empty() {
        remarks.push(format!("also {}", slot.aliases.join(", ")));
    }
    if !slot.persistent {
        remarks.push("not in a state_dict".to_owned());
    }
    // Without a manifest nothing says which buffers the program writes to.
    if slot.mutated && artifact.manifest().is_some() {
        remarks.push("written by the program".to_owned());
    }
    if slot.stripped {
        remarks.push("stripped".to_owned());
    }
    remarks.extend(slot.recipe.as_ref().map(|recipe| {
        let mut seen = HashSet::new();
        let keys: Vec<&str> = recipe.keys().filter(|key| seen.insert(*key)).collect();
        format!("{}: {}", recipe.kind(), keys.join(", "))
    }));
    remarks.extend(slot.obstacle().map(|why| format!("cannot be refitted: {why}")));
    remarks.join("; ")
}
