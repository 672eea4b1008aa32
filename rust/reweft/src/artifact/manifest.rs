//! The manifest: what `trace` writes into a package about its slots, as `extra/reweft_manifest.json`.
//!
//! It names every tensor of the module that was compiled, with all its names, so that a refit knows ties, buffers that
//! the program writes to, tensors it never reads and tensors that were compiled into the code. It is held against the
//! program's own rows whenever a package is opened.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::folded::{self, Folded, Original};
pub use super::signature::{Constant, Expected, Input, Leaf, Operation, Output, Signature, Size, Symbol};
use super::{Artifact, Slot, SlotKind, Unrefittable, aotinductor::Records};
use crate::container::zip::{Archive, append_records};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::recipe::{Recipe, Step};
use crate::source::Access;
use crate::write::AtomicFile;

/// Path of the manifest below the archive's root folder; torch keeps extra files in `extra/`.
const MANIFEST: &str = "extra/reweft_manifest.json";
/// The layout of this file; a reader refuses others.
const VERSION: u32 = 2;

/// One tensor of the compiled module, as the compiler's front end saw it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// Every name it has in the module, in registration order.
    pub names: Vec<String>,
    /// Whether a state_dict has it.
    pub persistent: bool,
    /// Whether the program writes to it.
    pub mutated: bool,
    /// Whether the exported program reads it at all.
    pub used: bool,
}

/// What the compiler built for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The machine: `x86_64`.
    pub machine: String,
    /// Instruction sets of its processor, which the code may use: `avx2`.
    pub features: Vec<String>,
}

/// What `trace` knows and the package does not say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Origins {
    /// Version of torch that compiled the package.
    pub torch: String,
    /// Device the program runs on: `cpu`.
    pub device: String,
    /// The host that compiled it.
    #[serde(default)]
    pub target: Option<Target>,
    /// How the program is called.
    #[serde(flatten)]
    pub signature: Signature,
    /// Which new weights it is to take.
    #[serde(default)]
    pub refit: RefitRule,
    /// What tells the program from others, for who keeps many: a hash of all that it was compiled from but weights.
    #[serde(default)]
    pub program: Option<String>,
    /// Every parameter, buffer and tensor attribute.
    pub tensors: Vec<Origin>,
    /// What a freezing compiler made of them, if it was one.
    #[serde(default)]
    pub folded: Option<Recorded>,
}

/// What was recorded while a compiler froze weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recorded {
    /// As [`Folded::capability`].
    pub capability: String,
    /// As [`Folded::compared`].
    pub compared: bool,
    /// Tensors that recipes name by their first name.
    pub originals: Vec<Original>,
    /// By the name of a row in the program, the steps that make its elements. Packing is not among them: the program states
    /// it.
    pub recipes: IndexMap<String, Recipe>,
}

/// Which batch sizes calls may have. The names are as long as each other, so that another one moves nothing in a package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Batching {
    /// The one that the program was compiled for, or those that its sizes let vary.
    #[default]
    Single,
    /// Any: calls are cut into chunks, since running the program showed that rows are independent.
    Chunks,
}

/// Which new weights a package takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefitRule {
    /// Any that fit.
    #[default]
    Any,
    /// Those that it has; buffers that the program writes to may get others.
    Identical,
    /// None. Weights that were stripped from it may be put back.
    Never,
}

/// The manifest as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: String,
    version: u32,
    torch: String,
    device: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    #[serde(flatten)]
    signature: Signature,
    batching: Batching,
    #[serde(default)]
    refit: RefitRule,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    program: Option<String>,
    weights: Option<String>,
    slots: Vec<ManifestSlot>,
    unused: Vec<String>,
    unrefittable: Vec<Unrefittable>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    folded: Option<Folded>,
}

/// A slot as the manifest states it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ManifestSlot {
    pub name: String,
    aliases: Vec<String>,
    constant: String,
    kind: SlotKind,
    persistent: bool,
    mutated: bool,
    dtype: String,
    shape: Vec<u64>,
    strides: Vec<u64>,
    byte_offset: u64,
    nbytes: u64,
    pub hash: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recipe: Option<Recipe>,
}

/// Hash of a slot's bytes: BLAKE3, in hex behind the name, so that it is as long for every value.
pub fn hash(bytes: &[u8]) -> String {
    hex(blake3::hash(bytes))
}

/// A hash as manifests state it.
pub(crate) fn hex(hash: blake3::Hash) -> String {
    format!("blake3:{}", hash.to_hex())
}

/// Reads the manifest, if the package has one.
pub(super) fn read(archive: &Archive, records: &Records, limits: &Limits) -> Result<Option<Manifest>> {
    let name = record_name(records);
    let Some(entry) = archive.entries().get(&name) else { return Ok(None) };
    if entry.nbytes > limits.max_metadata_nbytes {
        let what = format!("manifest of {} bytes; max_metadata_nbytes is {}", entry.nbytes, limits.max_metadata_nbytes);
        return Err(Error::new(ErrorKind::Limit, what).in_record(name));
    }
    let manifest: Manifest = serde_json::from_slice(&archive.read(&name)?)
        .map_err(|error| Error::format(error.to_string()).in_record(&name))?;
    if manifest.format != "reweft-manifest" || manifest.version != VERSION {
        let what = format!("manifest of format {:?} version {}, not {VERSION}", manifest.format, manifest.version);
        return Err(Error::new(ErrorKind::Unsupported, what).in_record(name));
    }
    if manifest.weights != records.weights {
        return Err(Error::format("manifest is of another weights record").in_record(name));
    }
    manifest.signature.check().map_err(|error| error.in_record(&name))?;
    Ok(Some(manifest))
}

/// Name of the manifest's record.
pub(crate) fn record_name(records: &Records) -> String {
    format!("{}/{MANIFEST}", records.root)
}

impl Manifest {
    /// Puts names, aliases, hashes and recipes on the program's rows, which must be the rows the manifest was made of. Gives
    /// the tensors that recipes name beside them.
    pub(super) fn label(&self, slots: &mut [Slot]) -> Result<Vec<Slot>> {
        if self.slots.len() != slots.len() {
            let (stated, found) = (self.slots.len(), slots.len());
            return Err(Error::format(format!("manifest has {stated} slots, the program {found}")));
        }
        for (stated, slot) in self.slots.iter().zip(&mut *slots) {
            slot.name.clone_from(&stated.name);
            slot.aliases.clone_from(&stated.aliases);
            slot.persistent = stated.persistent;
            slot.mutated = stated.mutated;
            slot.hash = Some(stated.hash.clone());
            slot.recipe.clone_from(&stated.recipe);
            if ManifestSlot::new(slot, stated.hash.clone()) != *stated {
                return Err(Error::format("manifest and program differ on this slot").of_key(&stated.name));
            }
        }
        match &self.folded {
            Some(folded) => folded::originals(folded, slots),
            None if slots.iter().any(|slot| slot.recipe.is_some()) => {
                Err(Error::format("manifest has recipes, but does not say over which tensors"))
            }
            None => Ok(Vec::new()),
        }
    }

    /// What it states of weights that were folded, if some were.
    pub fn folded(&self) -> Option<&Folded> {
        self.folded.as_ref()
    }

    /// Version of torch that compiled the package.
    pub fn torch(&self) -> &str {
        &self.torch
    }

    /// Device the program runs on.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The host that compiled it, if the package says.
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// How the program is called.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// Which batch sizes calls may have.
    pub fn batching(&self) -> Batching {
        self.batching
    }

    /// What tells the program from others, if whoever compiled it said so.
    pub fn program(&self) -> Option<&str> {
        self.program.as_deref()
    }

    /// Which new weights the package takes.
    pub fn refit(&self) -> RefitRule {
        self.refit
    }

    pub(crate) fn set_batching(&mut self, batching: Batching) {
        self.batching = batching;
    }

    /// Names without a slot: never read, and compiled into the code.
    pub(super) fn absent(&self) -> (Vec<String>, Vec<Unrefittable>) {
        (self.unused.clone(), self.unrefittable.clone())
    }

    pub(crate) fn slots_mut(&mut self) -> &mut [ManifestSlot] {
        &mut self.slots
    }

    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::new(ErrorKind::Usage, format!("manifest: {error}")))
    }
}

impl ManifestSlot {
    fn new(slot: &Slot, hash: String) -> Self {
        Self {
            name: slot.name.clone(),
            aliases: slot.aliases.clone(),
            constant: slot.constant.clone(),
            kind: slot.kind,
            persistent: slot.persistent,
            mutated: slot.mutated,
            dtype: slot.dtype.name().to_owned(),
            shape: slot.shape.clone(),
            strides: slot.strides.clone(),
            byte_offset: slot.byte_offset,
            nbytes: slot.nbytes,
            hash,
            recipe: slot.recipe.clone(),
        }
    }
}

/// Writes a copy of a freshly compiled package with a manifest in it. Reads all weight bytes for their hashes and
/// copies the package once.
///
/// # Errors
/// [`ErrorKind::Usage`] if the package has a manifest already or two tensors claim one name;
/// [`ErrorKind::Format`] for a signature that contradicts itself; otherwise as
/// [`Artifact::open`] and [`ErrorKind::Io`].
pub fn seal(package: &Path, origins: &Origins, out: &Path) -> Result<Artifact> {
    let artifact = Artifact::open(package, Access::Read, &Limits::default())?;
    if artifact.manifest().is_some() {
        return Err(Error::new(ErrorKind::Usage, "the package has a manifest already").in_file(package));
    }
    let program = artifact.program().and_then(|program| Some((program.archive()?, program.models())));
    let Some((archive, [records])) = program else {
        return Err(Error::new(ErrorKind::Usage, "only a package of one model can have a manifest").in_file(package));
    };
    let manifest = build(&artifact, records, origins).map_err(|error| error.in_file(package))?;
    let record = (record_name(records), manifest.to_json()?);
    let file = AtomicFile::create(out)?;
    let mut buffered = std::io::BufWriter::with_capacity(1 << 20, file.as_file());
    append_records(archive, &[record], &mut buffered).map_err(|error| error.in_file(out))?;
    buffered.flush().map_err(|error| Error::io("write", error).in_file(out))?;
    drop(buffered);
    file.commit()?;
    Artifact::open(out, Access::Read, &Limits::default())
}

fn build(artifact: &Artifact, records: &Records, origins: &Origins) -> Result<Manifest> {
    origins.signature.check()?;
    let mut labels = Labels::new(origins)?;
    let mut slots = Vec::with_capacity(artifact.slots().len());
    for slot in artifact.slots() {
        let slot = labels.put_on(slot)?;
        slots.push(ManifestSlot::new(&slot, hash(&artifact.read_slot(&slot)?)));
    }
    let (used, unused): (Vec<_>, Vec<_>) = labels.absent().partition(|origin| origin.used);
    let baked = "the compiler put its value into the code";
    Ok(Manifest {
        format: "reweft-manifest".to_owned(),
        version: VERSION,
        torch: origins.torch.clone(),
        device: origins.device.clone(),
        target: origins.target.clone(),
        signature: origins.signature.clone(),
        batching: Batching::Single,
        refit: origins.refit,
        program: origins.program.clone(),
        weights: records.weights.clone(),
        folded: origins.folded.as_ref().map(|recorded| recorded.seal(&slots)).transpose()?,
        slots,
        unused: unused.into_iter().flat_map(|origin| origin.names.clone()).collect(),
        unrefittable: used
            .into_iter()
            .flat_map(|origin| &origin.names)
            .map(|name| Unrefittable { name: name.clone(), reason: baked.to_owned() })
            .collect(),
    })
}

/// Names and recipes, as they are put on the program's rows.
struct Labels<'a> {
    origins: &'a Origins,
    by_name: IndexMap<&'a str, usize>,
    /// For each tensor of the module, whether a row holds it.
    placed: Vec<bool>,
}

impl<'a> Labels<'a> {
    fn new(origins: &'a Origins) -> Result<Self> {
        let mut by_name: IndexMap<&str, usize> = IndexMap::new();
        for (number, origin) in origins.tensors.iter().enumerate() {
            for name in &origin.names {
                if by_name.insert(name, number).is_some() {
                    return Err(Error::new(ErrorKind::Usage, "two tensors of the module have this name").of_key(name));
                }
            }
        }
        Ok(Self { origins, by_name, placed: vec![false; origins.tensors.len()] })
    }

    fn put_on(&mut self, slot: &Slot) -> Result<Slot> {
        let mut slot = slot.clone();
        slot.recipe = self.origins.folded.as_ref().and_then(|recorded| recipe_of(&slot, recorded));
        if let Some(number) = self.by_name.get(slot.name.as_str()) {
            let origin = &self.origins.tensors[*number];
            if std::mem::replace(&mut self.placed[*number], true) {
                return Err(Error::format("two rows hold one tensor").of_key(&slot.name));
            }
            let mut names = origin.names.iter().cloned();
            slot.name = names.next().unwrap_or(slot.name);
            slot.aliases = names.collect();
            (slot.persistent, slot.mutated) = (origin.persistent, origin.mutated);
        } else if let Some(recipe) = &slot.recipe {
            // Whatever has a recipe is made anew from its tensors, and never written to by the program.
            let mut of = recipe.keys().filter_map(|key| self.by_name.get(key));
            (slot.persistent, slot.mutated) = (of.any(|number| self.origins.tensors[*number].persistent), false);
        }
        Ok(slot)
    }

    /// The tensors that no row holds or is made of.
    fn absent(&self) -> impl Iterator<Item = &'a Origin> {
        let originals = self.origins.folded.iter().flat_map(|recorded| &recorded.originals);
        let made_of: HashSet<&str> = originals.flat_map(|original| &original.names).map(String::as_str).collect();
        let tensors = self.origins.tensors.iter().zip(&self.placed);
        let absent = tensors.filter(|(_, placed)| !**placed).map(|(origin, _)| origin);
        absent.filter(move |origin| !origin.names.iter().any(|name| made_of.contains(name.as_str())))
    }
}

impl Recorded {
    /// What the manifest states, with the hash that tells an edit.
    fn seal(&self, slots: &[ManifestSlot]) -> Result<Folded> {
        let recipes = slots.iter().filter_map(|slot| Some((slot.name.as_str(), slot.recipe.as_ref()?)));
        let digest = folded::digest(&self.originals, recipes)?;
        let (capability, originals) = (self.capability.clone(), self.originals.clone());
        Ok(Folded { capability, compared: self.compared, originals, digest })
    }
}

/// How a row is made: as it was recorded, and packed as the program states it.
fn recipe_of(slot: &Slot, recorded: &Recorded) -> Option<Recipe> {
    let mut recipe = recorded.recipes.get(&slot.name)?.clone();
    recipe.0.extend(slot.packed.iter().map(|packed| Step::Pack(packed.packing.clone())));
    Some(recipe)
}
