//! Plans: which slot takes which key, by what recipe, and everything that speaks against it.
//!
//! A plan is data. It is made from metadata, prints, serialises to JSON, and is carried out by [`crate::write`] or by a
//! runtime. The only bytes that planning reads are those of keys that may be tied: where a checkpoint stores them twice,
//! or where nothing states which weights are tied.

mod finding;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde::Serialize;

use crate::artifact::manifest::{self, Batching, Manifest, RefitRule};
use crate::artifact::{Artifact, Kind, Slot};
use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::suggest;
use crate::recipe::{Recipe, Step};
use crate::replay::{Build, Replay};
use crate::tensor::{TensorInfo, contiguous};
pub use finding::{Finding, FindingKind};

/// What a caller accepts that is an error otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allow {
    /// Convert between float dtypes, rounding to nearest even.
    pub cast: bool,
    /// Leave a slot as it is when the checkpoint has none of its names.
    pub missing: bool,
    /// Leave a key out when no slot has its name.
    pub unused: bool,
}

/// What is different where the slots' values are held beside the file: in a model that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// Every slot has a value, also those that the file was stripped of.
    pub filled: bool,
    /// Leave slots that the program writes to as they are, whatever the checkpoint has for them.
    pub keep_written: bool,
    /// What the checkpoint has.
    pub given: Given,
}

/// What the tensors of a checkpoint are to an artifact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Given {
    /// Tensors of the module, of which slots may be made.
    #[default]
    Weights,
    /// The slots' own bytes, under their names.
    Rows,
    /// The same, to be written down and not replaced, so that the package need not allow a refit.
    Saved,
}

/// One slot and how its bytes are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refill {
    /// Number of the slot in the artifact.
    pub slot: usize,
    /// Name of the slot.
    pub name: String,
    /// Steps from keys to the slot's bytes.
    pub recipe: Recipe,
    /// Bytes the slot takes.
    pub nbytes: u64,
}

/// The checked list of replacements.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The artifact.
    pub artifact: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Slots that get new bytes, in the order of their bytes.
    pub refills: Vec<Refill>,
    /// Names of slots that stay as they are.
    pub kept: Vec<String>,
    /// What was found; blocking ones stop a refit.
    pub findings: Vec<Finding>,
    /// What the manifest is to say of batch sizes, if something else than before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batching: Option<Batching>,
    /// The weights that the artifact was compiled with, if it was held against them; no refit may replace their file.
    #[serde(skip)]
    pub(crate) original: Option<Checkpoint>,
}

/// Plans the refit of `artifact` from `checkpoint`.
///
/// Reads metadata, and the bytes of tied keys that the checkpoint stores more than once. Where no manifest states which
/// weights are tied, also those of keys without a slot, and of keys that look like them. Where the package takes none but
/// the weights that it has, all of them.
///
/// # Errors
/// Only read errors, [`ErrorKind::Format`] among them. What does not fit is a finding in the plan.
pub fn plan(artifact: &Artifact, checkpoint: &Checkpoint, allow: Allow) -> Result<Plan> {
    plan_running(artifact, checkpoint, allow, Running::default())
}

/// Plans the replacement of the weights of a model that runs `artifact`. Otherwise as [`plan`].
///
/// # Errors
/// As [`plan`].
pub fn plan_running(artifact: &Artifact, checkpoint: &Checkpoint, allow: Allow, running: Running) -> Result<Plan> {
    let mut planner = Planner::new(artifact, checkpoint, allow, running);
    let (mut refills, mut kept) = (Vec::new(), Vec::new());
    let leaves = planner.leaves()?;
    for (number, slot) in artifact.slots().iter().enumerate() {
        let refill = match &slot.recipe {
            Some(recipe) if running.given == Given::Weights => planner.remake(number, slot, recipe, &leaves)?,
            _ => planner.refill(number, slot)?,
        };
        match refill {
            Some(refill) => refills.push(refill),
            None => kept.push(slot.name.clone()),
        }
    }
    planner.check_leftover_keys()?;
    planner.check_absent();
    planner.check_mutable(&refills);
    Ok(Plan {
        artifact: artifact.path().to_owned(),
        checkpoint: checkpoint.path().to_owned(),
        refills,
        kept,
        findings: planner.findings,
        batching: None,
        original: None,
    })
}

impl Plan {
    /// The findings that stop a refit.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.blocking)
    }

    /// Bytes that a refit puts into slots.
    pub fn nbytes(&self) -> u64 {
        self.refills.iter().map(|refill| refill.nbytes).sum()
    }

    /// Refuses a plan with blocking findings; every carrier of a plan calls this first.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] that lists the findings; its key and hint are the first one's.
    pub fn check(&self) -> Result<()> {
        /// More lines than this hide the first ones.
        const MAX_LINES: usize = 20;
        let Some(first) = self.blocking().next() else { return Ok(()) };
        let count = self.blocking().count();
        let mut lines = vec![format!("{} does not fit; nothing was changed", self.checkpoint.display())];
        lines.extend(self.blocking().take(MAX_LINES).map(Finding::to_string));
        if count > MAX_LINES {
            lines.push(format!("and {} more", count - MAX_LINES));
        }
        let what = lines.join("\n  ");
        let error = Error::new(ErrorKind::Mismatch, what).in_file(&self.artifact);
        let error = match first.key.as_ref().or(first.slot.as_ref()) {
            Some(key) if count == 1 => error.of_key(key),
            _ => error,
        };
        Err(match &first.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        })
    }

    /// Holds the artifact against the weights that it was compiled with: a slot that keeps its name, but holds what the
    /// compiler made of it and others, is a blocking finding. Reads the bytes of all slots that the original has keys for.
    ///
    /// # Errors
    /// Read errors of both.
    pub fn check_original(&mut self, artifact: &Artifact, original: &Checkpoint) -> Result<()> {
        self.original = Some(original.clone());
        for slot in artifact.slots().iter().filter(|slot| slot.obstacle().is_none() && slot.region.is_some()) {
            let Some(key) = slot.names().find(|name| original.contains(name)) else { continue };
            let info = original.get(key)?;
            let fits =
                info.shape == slot.shape && (info.dtype == slot.dtype || convert::can_cast(info.dtype, slot.dtype));
            let recipe = Recipe::of_key(key, info, slot.dtype, &slot.strides);
            if !fits || recipe.evaluate(original, slot.nbytes)? != artifact.read_slot(slot)? {
                let what = "it does not hold the original's tensor: the compiler put another value under this name";
                self.findings
                    .push(Finding::new(FindingKind::Unrefittable, what).slot(slot).key(key).hint(KEEP_CONSTANTS));
            }
        }
        Ok(())
    }

    /// The plan as JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a path that is not UTF-8.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))
    }
}

/// Gathers findings while slots and keys are matched.
struct Planner<'a> {
    artifact: &'a Artifact,
    checkpoint: &'a Checkpoint,
    allow: Allow,
    running: Running,
    rule: RefitRule,
    used: HashSet<&'a str>,
    slot_names: HashSet<&'a str>,
    /// Names that need no slot, and names that have none but should.
    not_read: HashSet<&'a str>,
    baked: HashMap<&'a str, &'a str>,
    /// What the checkpoint holds under a name that is no tensor.
    values: HashMap<&'a str, &'a str>,
    /// Keys that fill a slot, by dtype and shape, and by the hash of their bytes.
    by_hash: HashMap<(Dtype, Vec<u64>), HashMap<blake3::Hash, &'a str>>,
    /// Suggestions that may still be made: each looks at every name, and a plan full of findings has another cause
    /// than a typing error.
    suggestions: std::ops::Range<u32>,
    findings: Vec<Finding>,
}

impl<'a> Planner<'a> {
    fn new(artifact: &'a Artifact, checkpoint: &'a Checkpoint, allow: Allow, running: Running) -> Self {
        let baked = artifact.unrefittable().iter().map(|absent| (absent.name.as_str(), absent.reason.as_str()));
        Self {
            artifact,
            checkpoint,
            allow,
            running,
            rule: rule(artifact, running),
            used: HashSet::new(),
            slot_names: artifact.tensors().flat_map(Slot::names).collect(),
            not_read: artifact.unused().iter().map(String::as_str).collect(),
            baked: baked.collect(),
            values: checkpoint.values().iter().map(|value| (value.path.as_str(), value.what.as_str())).collect(),
            by_hash: HashMap::new(),
            suggestions: 0..20,
            findings: Vec::new(),
        }
    }

    /// What recipes may take: for each tensor of the module its key, and the cast that it may need. Checks those that no
    /// slot holds as they are, by the rules for slots.
    fn leaves(&mut self) -> Result<HashMap<&'a str, Recipe>> {
        let mut leaves = HashMap::new();
        if self.running.given != Given::Weights {
            return Ok(leaves);
        }
        for original in self.artifact.originals() {
            if let Some(refill) = self.refill(usize::MAX, original)? {
                self.check_fixed(original, &refill.recipe)?;
                leaves.insert(original.name.as_str(), refill.recipe);
            }
        }
        for slot in self.artifact.slots().iter().filter(|slot| slot.recipe.is_none()) {
            // What does not fit is a finding when the slot itself is looked at.
            if let Some(key) = slot.names().find(|name| self.checkpoint.contains(name))
                && let Ok(info) = self.checkpoint.get(key)
                && self.misfit(slot, key, info).is_none()
            {
                leaves.insert(&slot.name, Recipe::cast_of(key, info, slot.dtype));
            }
        }
        Ok(leaves)
    }

    /// A tensor that rows were made with, but no state_dict has, must be what it was.
    fn check_fixed(&mut self, original: &'a Slot, recipe: &Recipe) -> Result<()> {
        let Some(wanted) = &original.hash else { return Ok(()) };
        let mut row_major = recipe.clone();
        row_major.0.push(Step::Restride { strides: contiguous(&original.shape) });
        if manifest::hash(&row_major.evaluate(self.checkpoint, original.nbytes)?) != *wanted {
            let what = "it is no part of a state_dict, so the compiler folded it with the value that it had";
            let hint = "register it as a persistent buffer and trace the module again";
            self.findings.push(Finding::new(FindingKind::Unrefittable, what).slot(original).hint(hint));
        }
        Ok(())
    }

    /// A slot that is made of tensors: all of them must be there, since those that are not cannot be read back from it.
    fn remake(
        &mut self,
        number: usize,
        slot: &'a Slot,
        recipe: &Recipe,
        leaves: &HashMap<&str, Recipe>,
    ) -> Result<Option<Refill>> {
        let absent: Vec<&str> = recipe.keys().filter(|key| !leaves.contains_key(key)).collect();
        if absent.len() == recipe.keys().count() {
            return Ok(None);
        }
        if !absent.is_empty() {
            let what = format!("it is made of {} too, which is not there and cannot be read back", absent.join(", "));
            self.findings.push(Finding::new(FindingKind::Missing, what).slot(slot));
            return Ok(None);
        }
        if let Some((what, hint)) = self.lack_of_torch(recipe) {
            self.findings.push(Finding::new(FindingKind::Unrefittable, what).slot(slot).hint(hint));
            return Ok(None);
        }
        let recipe = recipe.over(|key| leaves.get(key), slot);
        let key = recipe.keys().next().unwrap_or_default().to_owned();
        self.compare_identical(slot, &key, &recipe)?;
        Ok(Some(Refill { slot: number, name: slot.name.clone(), recipe, nbytes: slot.nbytes }))
    }

    /// Why the operations that torch has to carry out cannot be carried out here as they were, and what to do about it.
    fn lack_of_torch(&self, recipe: &Recipe) -> Option<(String, &'static str)> {
        let operation = recipe.operations().next()?;
        let Some(here) = self.checkpoint.storages().replay().and_then(Replay::build) else {
            let what = format!("it is made with {}, which torch has to compute", operation.name());
            return Some((what, "refit it from Python, where reweft.torch is imported"));
        };
        let manifest = self.artifact.manifest()?;
        let capability = manifest.folded().map(|folded| folded.capability.clone()).unwrap_or_default();
        let there = Build { torch: manifest.torch().to_owned(), capability };
        if here == there {
            return None;
        }
        let what = format!("it was made with {} by {there}; {here} may give other bits", operation.name());
        Some((what, "refit it where it was traced, or trace the module again"))
    }

    fn refill(&mut self, number: usize, slot: &'a Slot) -> Result<Option<Refill>> {
        let keys: Vec<&str> = slot.names().filter(|name| self.checkpoint.contains(name)).collect();
        self.used.extend(&keys);
        if self.running.keep_written && slot.mutated && !self.is_empty(slot) {
            return Ok(None);
        }
        if slot.is_folded() {
            // Not even on request: the other slots would get new weights and this one would keep the old ones.
            let why = slot.obstacle().unwrap_or_default();
            self.findings.push(Finding::new(FindingKind::Unrefittable, why).slot(slot).hint(KEEP_CONSTANTS));
            return Ok(None);
        }
        let Some(key) = keys.first() else {
            let finding = self.missing(slot);
            self.findings.push(finding);
            return Ok(None);
        };
        let info = match self.checkpoint.get(key) {
            Ok(info) => info,
            Err(error) => {
                self.findings.push(Finding::new(FindingKind::Unreadable, error.message()).slot(slot).key(key));
                return Ok(None);
            }
        };
        if let Some(finding) = self.misfit(slot, key, info) {
            self.findings.push(finding);
            return Ok(None);
        }
        self.compare_tied(slot, &keys)?;
        // An original has no place, and so no strides to be brought into.
        let recipe = match slot.region {
            None if number == usize::MAX => Recipe::cast_of(key, info, slot.dtype),
            _ => Recipe::of_key(key, info, slot.dtype, &slot.strides),
        };
        self.compare_identical(slot, key, &recipe)?;
        Ok(Some(Refill { slot: number, name: slot.name.clone(), recipe, nbytes: slot.nbytes }))
    }

    /// Whether a slot has no value that could stay.
    fn is_empty(&self, slot: &Slot) -> bool {
        slot.stripped && !self.running.filled
    }

    fn missing(&mut self, slot: &Slot) -> Finding {
        let names: Vec<&str> = slot.names().collect();
        let what = match names.iter().find_map(|name| Some((name, self.values.get(name)?))) {
            // A sparse or quantised tensor is there by its parts, a number as a plain value.
            Some((name, what)) => format!("the checkpoint has {name:?}, but as {what}"),
            None => format!("the checkpoint has none of the slot's names: {}", names.join(", ")),
        };
        let finding = Finding::new(FindingKind::Missing, what).slot(slot).wanted(slot);
        if self.is_empty(slot) {
            return finding.hint("the artifact was stripped of this slot's bytes, so there is no value to keep");
        }
        if !slot.persistent {
            return finding.allowed("it is no part of a state_dict, so it keeps its value");
        }
        if slot.is_numbered() && !self.allow.missing {
            let what = "a tensor attribute of the module that has no name here, so no key can be meant for it";
            return finding.hint(format!("{what}; --allow-missing keeps its value, reweft.torch.trace keeps its name"));
        }
        if self.allow.missing {
            return finding.allowed("it keeps its value, as asked");
        }
        let free = self.checkpoint.keys().filter(|key| !self.slot_names.contains(key));
        let hint = self.suggestions.next().map(|_| {
            let mut keys = self.checkpoint.keys();
            let prefixed = keys.find_map(|key| Some((key, slot.names().find_map(|name| prefix(key, name))?)));
            prefixed.map_or_else(|| suggest(&slot.name, free), |(key, prefix)| prefix_hint(key, prefix))
        });
        Finding { hint, ..finding }
    }

    /// What makes key and slot different things, if anything.
    fn misfit(&self, slot: &Slot, key: &str, info: &TensorInfo) -> Option<Finding> {
        if let Some(why) = slot.obstacle() {
            return Some(Finding::new(FindingKind::Unrefittable, why).slot(slot).key(key));
        }
        if info.shape != slot.shape {
            let finding = Finding::new(FindingKind::Shape, "shapes differ").slot(slot).key(key);
            let reversed = info.shape.len() > 1 && info.shape.iter().rev().eq(&slot.shape);
            let hint = if reversed {
                "it looks transposed; reweft does not transpose on its own"
            } else {
                "the checkpoint is of a model of another size"
            };
            return Some(finding.found(info).wanted(slot).hint(hint));
        }
        if info.dtype == slot.dtype {
            return None;
        }
        let finding = Finding::new(FindingKind::Dtype, "dtypes differ").slot(slot).key(key).found(info).wanted(slot);
        Some(if !convert::can_cast(info.dtype, slot.dtype) {
            finding.hint("there is no conversion between these two; convert the checkpoint")
        } else if self.allow.cast {
            return None;
        } else {
            finding.hint("--allow-cast (allow_cast=True) converts, rounding to nearest even")
        })
    }

    /// A slot has one value, so all its names must have the same one.
    fn compare_tied(&mut self, slot: &Slot, keys: &[&str]) -> Result<()> {
        let Some((first, others)) = keys.split_first() else { return Ok(()) };
        let Ok(one) = self.checkpoint.get(first) else { return Ok(()) };
        for key in others {
            let differs = match self.checkpoint.get(key) {
                Ok(info) if info == one => false,
                Ok(info) if (&info.shape, info.dtype) != (&one.shape, one.dtype) => true,
                Ok(_) => self.checkpoint.read(first)? != self.checkpoint.read(key)?,
                Err(_) => true,
            };
            if differs {
                let what = format!("{first:?} and {key:?} share this slot, but differ in the checkpoint");
                let hint =
                    "they were tied when the model was compiled; compile again with them untied, or drop one key";
                self.findings.push(Finding::new(FindingKind::Tied, what).slot(slot).key(key).hint(hint));
            }
        }
        Ok(())
    }

    /// Where no other weights are taken, a key must have the bytes that the manifest states. State of the program is no weight.
    fn compare_identical(&mut self, slot: &Slot, key: &str, recipe: &Recipe) -> Result<()> {
        // Originals have no bytes to compare with; what is made of them has.
        if self.rule != RefitRule::Identical || slot.mutated || slot.region.is_none() {
            return Ok(());
        }
        let found = manifest::hash(&recipe.evaluate(self.checkpoint, slot.nbytes)?);
        let wanted = slot.hash.clone().unwrap_or_default();
        if found != wanted {
            self.findings.push(Finding::not_identical(slot, key, found, wanted));
        }
        Ok(())
    }

    /// A package may take no weights at all.
    fn check_mutable(&mut self, refills: &[Refill]) {
        let first = refills.first().and_then(|refill| self.artifact.slots().get(refill.slot));
        if let Some(first) = first.filter(|_| self.rule == RefitRule::Never) {
            self.findings.push(Finding::immutable(first, refills.len()));
        }
    }

    /// Every key must have a slot, or a reason why it needs none.
    fn check_leftover_keys(&mut self) -> Result<()> {
        let (artifact, checkpoint) = (self.artifact, self.checkpoint);
        let leftover: Vec<&str> = checkpoint.keys().filter(|key| !self.used.contains(key)).collect();
        for key in leftover {
            let finding = if self.not_read.contains(key) {
                Finding::new(FindingKind::NotRead, "the program does not read it").key(key).allowed("left out")
            } else if let Some(reason) = self.baked.get(key) {
                Finding::new(FindingKind::Baked, *reason).key(key).hint(KEEP_CONSTANTS)
            } else if let Some(prefix) = self.prefix_before_a_slot(key) {
                Finding::new(FindingKind::Unused, "no slot has this name").key(key).hint(prefix_hint(key, prefix))
            } else if !artifact.is_complete() && self.may_be_literal(key) {
                let what = "no slot has this name; tensors this small are compiled into the code by default";
                Finding::new(FindingKind::Baked, what).key(key).hint(KEEP_CONSTANTS)
            } else if let Some(why) = self.hidden() {
                Finding::new(FindingKind::Unrefittable, why).key(key).hint(KEEP_CONSTANTS)
            } else if let Some(other) = self.same_bytes(key)? {
                let what = format!("it has the bytes of {other:?}, which has a slot");
                Finding::new(FindingKind::Alias, what).key(key).allowed("taken for tied weights, which are one slot")
            } else {
                self.unused(key)
            };
            self.findings.push(finding);
        }
        Ok(())
    }

    /// Why a key may have no slot although the program depends on it: its value is in a slot that has no name.
    fn hidden(&self) -> Option<&'static str> {
        let mut slots = self.artifact.slots().iter();
        let is_program = self.artifact.program().is_some();
        if slots.any(|slot| slot.is_folded() || is_program && slot.blocked.is_some()) {
            return Some("no slot has this name: the compiler folded or packed weights (freezing=True)");
        }
        let is_constant = |slot: &Slot| !slot.persistent && slot.name.starts_with("constants.c");
        let is_frozen = self.artifact.kind() == Kind::TorchScript && self.artifact.slots().iter().any(is_constant);
        is_frozen
            .then_some("no slot has this name: the module was frozen, which makes its weights constants without names")
    }

    /// A key that fills a slot and has the same bytes as this one; only where nothing states which weights are tied. Reads
    /// this key and, once each, those that it could be.
    fn same_bytes(&mut self, key: &str) -> Result<Option<&'a str>> {
        if self.artifact.is_complete() {
            return Ok(None);
        }
        let (checkpoint, used) = (self.checkpoint, &self.used);
        let Ok(info) = checkpoint.get(key) else { return Ok(None) };
        let looks_alike = |other: &&'a str| {
            checkpoint.get(other).is_ok_and(|other| (&other.shape, other.dtype) == (&info.shape, info.dtype))
        };
        let alike = match self.by_hash.entry((info.dtype, info.shape.clone())) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let alike = used.iter().copied().filter(looks_alike);
                let hashed = alike.map(|other| Ok((blake3::hash(&checkpoint.read(other)?), other)));
                entry.insert(hashed.collect::<Result<_>>()?)
            }
        };
        if alike.is_empty() {
            return Ok(None);
        }
        Ok(alike.get(&blake3::hash(&checkpoint.read(key)?)).copied())
    }

    /// What stands before the name of a slot that is still empty, if the key ends in one.
    fn prefix_before_a_slot<'k>(&self, key: &'k str) -> Option<&'k str> {
        let names = key.match_indices('.').map(|(dot, _)| key.split_at(dot + 1));
        let mut empty = names.filter(|(_, name)| self.slot_names.contains(name) && !self.used.contains(name));
        empty.next().filter(|_| !self.allow.unused).map(|(prefix, _)| prefix)
    }

    /// AOTInductor writes tensors of no dimension, or of one with up to 8 elements, into the code unless told not to.
    fn may_be_literal(&self, key: &str) -> bool {
        self.checkpoint.get(key).is_ok_and(|info| info.shape.len() <= 1 && info.numel() <= 8)
    }

    fn unused(&mut self, key: &str) -> Finding {
        let finding = Finding::new(FindingKind::Unused, "no slot has this name").key(key);
        if self.allow.unused {
            return finding.allowed("left out, as asked");
        }
        let free = self.slot_names.difference(&self.used).copied();
        let hint = self.suggestions.next().map(|_| suggest(key, free));
        Finding { hint, ..finding }
    }

    /// Weights that cannot be replaced where they are block the plan, not the inspection.
    fn check_absent(&mut self) {
        if let Some(absent) = self.artifact.absent() {
            let finding = Finding::new(FindingKind::Unrefittable, absent.why.as_str());
            self.findings.push(finding.hint(absent.hint));
        }
    }
}

/// Which weights the artifact takes. To put back what it was stripped of replaces nothing.
fn rule(artifact: &Artifact, running: Running) -> RefitRule {
    match artifact.manifest().map(Manifest::refit).unwrap_or_default() {
        _ if running.given == Given::Saved => RefitRule::Any,
        RefitRule::Never if artifact.is_stripped() && !running.filled => RefitRule::Identical,
        rule => rule,
    }
}

/// What stands before `name` in a dotted key.
fn prefix<'k>(key: &'k str, name: &str) -> Option<&'k str> {
    key.strip_suffix(name).filter(|prefix| prefix.ends_with('.'))
}

fn prefix_hint(key: &str, prefix: &str) -> String {
    let pattern = regex::escape(prefix);
    format!("{key:?} has it behind a prefix; --remap '^{pattern}=' takes it off, or --top-level-key a dict's name")
}

const KEEP_CONSTANTS: &str = "compile with reweft.torch.trace, or with always_keep_tensor_constants=True and \
    joint_graph_constant_folding=False, so that it stays a slot";
