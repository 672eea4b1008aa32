//! The public face of the engine on real files.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod build;
mod checkpoints;
mod config;
mod costs;
mod hostile;
mod packages;
mod tensor_lies;
mod zip_lies;

use std::path::{Path, PathBuf};

/// A file of the fixtures' folder.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}
