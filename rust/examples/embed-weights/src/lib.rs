//! Weights inside a binary.
//!
//! `build.rs` takes the linear layer out of a checkpoint as a training loop saves it, gives its keys the names that are
//! wanted here, and writes safetensors to `OUT_DIR`. This crate embeds that file and reads it from memory: no file is
//! opened at run time, and neither Python nor torch is needed at any time. When the checkpoint changes, cargo builds
//! again; when it does not, cargo does not.
//!
//! `cargo run -p embed-weights` prints the tensors.

use std::path::Path;
use std::sync::Arc;

use reweft::{Checkpoint, OpenOptions, Result};

/// What `build.rs` made.
static LINEAR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/linear.safetensors"));

/// Opens the embedded weights: `linear.weight` of shape (3, 4) and `linear.bias` of shape (3,), both float32. Copies
/// nothing.
///
/// # Errors
/// None that a build let through: the build script wrote the bytes.
pub fn weights() -> Result<Checkpoint> {
    Checkpoint::from_source(Path::new("linear.safetensors"), Arc::new(LINEAR), &OpenOptions::default())
}
