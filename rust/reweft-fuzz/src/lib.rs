//! What fuzzing checks: one body per format, from bytes to a panic where a promise is broken.
//!
//! A body is a plain function, so that `cargo test` replays seeds and fixtures through it on a stable compiler
//! (`tests/replay.rs`). The shells that libFuzzer needs are in `fuzz/`, outside the workspace. CONTRIBUTING.md says how
//! to run them and what to do with a finding.
//!
//! The promises: no panic, no abort and no hang; a mapped file, a file that is read and the same bytes in memory give
//! the same tensors or the same error; opening twice gives the same; every tensor that is listed can be read, or says
//! why not, and has the bytes that plain indexing finds; memory stays within a multiple of the input.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a body reports a finding by panicking")]

mod archive;
mod config;
mod convert;
mod index;
mod legacy;
mod memory;
mod pickle;
mod safetensors;
mod sources;
mod tar;
mod zip;

/// A fuzz target: its name, which is also that of its folder in `fixtures/seeds`, and its body.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As `cargo fuzz run` takes it.
    pub name: &'static str,
    /// Panics where a promise is broken.
    pub body: fn(&[u8]),
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "pickle", body: pickle::body },
    Target { name: "zip", body: zip::body },
    Target { name: "legacy", body: legacy::body },
    Target { name: "tar", body: tar::body },
    Target { name: "safetensors", body: safetensors::body },
    Target { name: "index", body: index::body },
    Target { name: "config", body: config::body },
    Target { name: "convert", body: convert::body },
];

/// Runs the body of a target.
///
/// # Panics
/// Where the body finds something, and for a name that no target has.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.body)(bytes);
}
