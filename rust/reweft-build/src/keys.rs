//! Which tensors of a checkpoint are meant, and by what names.
//!
//! Patterns are kept as text until the checkpoint is opened, so that the builders have one place for errors.

use std::path::{Path, PathBuf};

use reweft::{Checkpoint, KeyMap, Limits, OpenOptions, Result, Rule};

/// A checkpoint, and the selection and rules for its keys.
#[derive(Clone, Debug)]
pub struct Keys {
    pub path: PathBuf,
    pub top_level_key: Option<String>,
    pub select: Vec<String>,
    pub rules: Vec<(String, String)>,
    pub file: Option<PathBuf>,
    pub limits: Limits,
}

impl Keys {
    pub fn new(path: PathBuf) -> Self {
        Self { path, top_level_key: None, select: Vec::new(), rules: Vec::new(), file: None, limits: Limits::default() }
    }

    /// Opens the checkpoint at its resolved `path`, with the key map at its own.
    pub fn open(&self, path: &Path, file: Option<&Path>) -> Result<Checkpoint> {
        let mut keys = file.map(KeyMap::open).transpose()?.unwrap_or_default();
        for pattern in &self.select {
            keys = keys.select(pattern)?;
        }
        for (pattern, replacement) in &self.rules {
            keys = keys.rule(Rule::new(pattern, replacement)?);
        }
        let options = OpenOptions {
            top_level_key: self.top_level_key.clone().or_else(|| keys.top_level_key().map(str::to_owned)),
            limits: self.limits.clone(),
            ..OpenOptions::default()
        };
        Checkpoint::open(path, &options)?.rekey(&keys)
    }
}
