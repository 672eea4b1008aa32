//! One of the two things that are compared: a checkpoint, or the weights of a compiled package as one.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::artifact::{self, Artifact, Slot};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::config::Config;
use crate::error::Result;
use crate::keymap::KeyMap;
use crate::source::{self, Source, Window};
use crate::tensor::TensorInfo;

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
        let (mut storages, mut tensors, mut out_of_reach) = (Vec::new(), Vec::new(), HashMap::new());
        match artifact.weights_record() {
            Ok(_) => {
                artifact.check_weights()?;
                for slot in artifact.slots() {
                    let info = slot_info(slot, storages.len());
                    storages.push(slot_source(artifact, slot)?);
                    tensors.extend(slot.names().map(|name| (name.to_owned(), info.clone())));
                }
            }
            Err(error) => {
                for name in artifact.slots().iter().flat_map(Slot::names) {
                    out_of_reach.insert(name.to_owned(), error.to_string());
                }
            }
        }
        for absent in artifact.unrefittable() {
            out_of_reach.insert(absent.name.clone(), absent.reason.clone());
        }
        let mut excuses = HashMap::new();
        for name in artifact.slots().iter().filter(|slot| !slot.persistent).flat_map(Slot::names) {
            excuses.insert(name.to_owned(), "no state_dict has it".to_owned());
        }
        for name in artifact.unused() {
            excuses.insert(name.clone(), "the program never reads it".to_owned());
        }
        let checkpoint = Cow::Owned(Checkpoint::from_memory(artifact.path(), storages, tensors)?);
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

fn slot_info(slot: &Slot, storage: usize) -> TensorInfo {
    let (dtype, shape, strides) = (slot.dtype, slot.shape.clone(), slot.strides.clone());
    TensorInfo { dtype, shape, strides, storage, storage_offset: 0 }
}

/// The row of a slot, padding included, since a view may reach into it.
fn slot_source(artifact: &Artifact, slot: &Slot) -> Result<Source> {
    let (source, start, _) = artifact.weights()?;
    let nbytes = slot.row_nbytes.max(slot.nbytes);
    let window = Window::new(source.clone(), start + slot.byte_offset, nbytes)
        .map_err(|error| error.of_key(&slot.name).in_file(artifact.path()))?;
    Ok(Arc::new(window))
}
