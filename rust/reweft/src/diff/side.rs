//! One of the two things that are compared: a checkpoint, or the weights of a compiled package as one.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use crate::artifact::{self, Artifact, Slot};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::config::Config;
use crate::error::Result;
use crate::keymap::KeyMap;
use crate::source;
use crate::tensor::TensorInfo;
use crate::write;

/// A checkpoint, or a compiled package whose slots are read like one, under every name that they have.
#[derive(Debug)]
pub struct Side<'a> {
    checkpoint: Cow<'a, Checkpoint>,
    is_package: bool,
    /// Names that have no readable bytes here, with the reason.
    out_of_reach: HashMap<String, String>,
    /// Names that one side may lack without being another model, with the reason.
    excuses: HashMap<String, String>,
}

impl<'a> Side<'a> {
    /// Opens a checkpoint or a package; told apart by content. The key map renames its keys or slots.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], [`of_artifact`](Self::of_artifact) and [`Checkpoint::rekey`].
    pub fn open(path: &Path, options: &OpenOptions, keys: &KeyMap) -> Result<Side<'static>> {
        write::recover(path)?;
        // A folder is refused by the reader of checkpoints, which knows what may be in one.
        let is_package = !path.is_dir() && artifact::detect(&source::open(path, options.access)?);
        let side = if is_package {
            Side::of_artifact(&Artifact::open(path, options.access, &options.limits)?)?
        } else {
            let top_level_key = options.top_level_key.clone().or_else(|| keys.top_level_key().map(str::to_owned));
            let options = OpenOptions { top_level_key, ..options.clone() };
            Side::of(Cow::Owned(Checkpoint::open(path, &options)?))
        };
        if keys.is_identity() { Ok(side) } else { side.rekey(keys) }
    }

    /// Takes an open checkpoint.
    pub fn of_checkpoint(checkpoint: &'a Checkpoint) -> Self {
        Self::of(Cow::Borrowed(checkpoint))
    }

    /// Takes the weights of an open package. Reads them once, to compare their CRC.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC, or a slot that leaves the weights record; read
    /// errors.
    pub fn of_artifact(artifact: &Artifact) -> Result<Side<'static>> {
        let checkpoint = Cow::Owned(artifact.weights()?);
        let mut out_of_reach = HashMap::new();
        let absent = artifact.absent().map_or("the package does not hold its bytes", |absent| &absent.why);
        for name in artifact.slots().iter().filter(|slot| slot.region.is_none()).flat_map(Slot::names) {
            out_of_reach.insert(name.to_owned(), absent.to_owned());
        }
        for absent in artifact.unrefittable() {
            out_of_reach.insert(absent.name.clone(), absent.reason.clone());
        }
        for name in artifact.originals().iter().flat_map(Slot::names) {
            out_of_reach.insert(name.to_owned(), "the compiler folded it into slots".to_owned());
        }
        let mut excuses = HashMap::new();
        for name in artifact.slots().iter().filter(|slot| !slot.persistent).flat_map(Slot::names) {
            excuses.insert(name.to_owned(), "no state_dict has it".to_owned());
        }
        for name in artifact.unused() {
            excuses.insert(name.clone(), "the program never reads it".to_owned());
        }
        Ok(Side { checkpoint, is_package: true, out_of_reach, excuses })
    }

    fn of(checkpoint: Cow<'a, Checkpoint>) -> Self {
        Self { checkpoint, is_package: false, out_of_reach: HashMap::new(), excuses: HashMap::new() }
    }

    fn rekey(self, keys: &KeyMap) -> Result<Self> {
        Ok(Self { checkpoint: Cow::Owned(self.checkpoint.rekey(keys)?), ..self })
    }

    /// The tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What kind of file it is.
    pub fn format(&self) -> &'static str {
        if self.is_package { "AOTInductor package" } else { self.checkpoint.format().name() }
    }

    /// A tensor that can be read.
    pub(super) fn tensor(&self, key: &str) -> Option<&TensorInfo> {
        self.checkpoint.get(key).ok()
    }

    /// Whether the name exists, readable or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.checkpoint.contains(key) || self.out_of_reach.contains_key(key)
    }

    /// All names, readable or not.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let beyond = self.out_of_reach.keys().filter(|key| !self.checkpoint.contains(key));
        self.checkpoint.keys().chain(beyond.map(String::as_str))
    }

    /// Names whose bytes are out of reach, and why.
    pub(super) fn unreadable(&self) -> impl Iterator<Item = (&str, &str)> {
        let beyond = self.out_of_reach.iter().map(|(key, why)| (key.as_str(), why.as_str()));
        self.checkpoint.unreadable().chain(beyond)
    }

    /// Why it does not matter that one side lacks a name.
    pub(super) fn excuse(&self, key: &str) -> Option<&str> {
        self.excuses.get(key).map(String::as_str)
    }

    /// What the file holds that is no tensor; `None` for files that hold tensors alone.
    pub(super) fn survey(&self) -> Result<Option<Config>> {
        self.checkpoint.survey()
    }
}
