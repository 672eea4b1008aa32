//! Which tensors of a checkpoint are meant, and by what names.
//!
//! Patterns are kept as text until the checkpoint is opened, so that the builders have one place for errors.

use std::path::{Path, PathBuf};

use reweft::{Checkpoint, ErrorKind, KeyMap, Limits, OpenOptions, Result, Rule};

/// A checkpoint, and the selection and rules for its keys.
#[derive(Clone, Debug)]
pub struct Keys {
    pub path: PathBuf,
    pub top_level_key: Option<String>,
    pub select: Vec<String>,
    pub rules: Vec<(String, String)>,
    pub limits: Limits,
}

impl Keys {
    pub fn new(path: PathBuf) -> Self {
        Self { path, top_level_key: None, select: Vec::new(), rules: Vec::new(), limits: Limits::default() }
    }

    /// Opens the checkpoint at its resolved `path`.
    pub fn open(&self, path: &Path) -> Result<Checkpoint> {
        let mut keys = KeyMap::new();
        for pattern in &self.select {
            keys = keys.select(pattern)?;
        }
        for (pattern, replacement) in &self.rules {
            keys = keys.rule(Rule::new(pattern, replacement)?);
        }
        let options = OpenOptions {
            top_level_key: self.top_level_key.clone(),
            limits: self.limits.clone(),
            ..OpenOptions::default()
        };
        Checkpoint::open(path, &options)?.rekey(&keys).map_err(|error| match error.kind() {
            ErrorKind::NotFound => error.with_hint("a selection sees the checkpoint's keys, before any remap"),
            _ => error,
        })
    }
}
