//! Weights for build scripts: converts or selects the tensors of a checkpoint, or refits a package, into `OUT_DIR`.
//!
//! ```toml
//! [build-dependencies]
//! reweft-build = "0.1"
//! ```
//!
//! ```no_run
//! // build.rs
//! fn main() -> reweft_build::Result<()> {
//!     reweft_build::Weights::new("weights/model.pt")
//!         .top_level_key("model_state_dict")
//!         .select(r"^module\.encoder\.")
//!         .remap(r"^module\.", "")
//!         .rustc_env("ENCODER")
//!         .convert("encoder.safetensors")?;
//!     reweft_build::Refit::new("net.pt2", "weights/model.pt")
//!         .top_level_key("model_state_dict")
//!         .remap(r"^module\.", "")
//!         .write("net.pt2")?;
//!     Ok(())
//! }
//! ```
//!
//! The crate then embeds the file, by its place or by the name that `rustc_env` gave it:
//!
//! ```ignore
//! static ENCODER: &[u8] = include_bytes!(env!("ENCODER"));
//! static NET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/net.pt2"));
//! ```
//!
//! # What cargo is told
//!
//! - `cargo::rerun-if-changed` for each file that is read, so that the script runs again when one changes and not
//!   otherwise. A file in `OUT_DIR` is left out: the script made it. Whatever else your script reads, it must say.
//! - `cargo::rustc-env`, if asked for.
//! - `cargo::warning` for what a careful reader should know: a rule that matched no key, a CRC that the file lacks.
//!
//! An output whose bytes would stay the same keeps its modification time, for tools that go by it. Cargo itself
//! compiles a crate again whenever its script ran.
//!
//! # Paths
//!
//! Sources are relative to `CARGO_MANIFEST_DIR`, outputs are names of files in `OUT_DIR`.
//!
//! # Speed
//!
//! Cargo builds what build scripts use without optimisation, in release builds too. For weights of many megabytes,
//! say in the workspace's `Cargo.toml`:
//!
//! ```toml
//! [profile.dev.build-override]
//! opt-level = 3
//! [profile.release.build-override]
//! opt-level = 3
//! ```
//!
//! Nothing in a checkpoint or a package is ever executed, and neither Python nor torch is needed.

mod keys;
mod refit;
mod script;
mod weights;

pub use refit::Refit;
pub use reweft::plan::Allow;
pub use reweft::write::Shared;
pub use reweft::{Dtype, Error, ErrorKind, Limits, Result};
pub use weights::Weights;
