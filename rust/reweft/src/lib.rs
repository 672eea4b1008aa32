//! The reweft engine: checkpoints, compiled artifacts, and plans that put the one into the other.
//!
//! Data flows one way. A [`Checkpoint`] and an [`Artifact`] are opened by reading metadata only; a [`KeyMap`] renames
//! keys; [`plan::plan`] matches slots and keys and says everything that speaks against it; [`mod@write`] carries a plan
//! out. Nothing in a file is ever executed.
//!
//! ```no_run
//! use reweft::source::Access;
//! use reweft::{Artifact, Checkpoint, KeyMap, Limits, OpenOptions, Rule, plan, write};
//!
//! let options = OpenOptions { top_level_key: Some("model_state_dict".into()), ..OpenOptions::default() };
//! let keys = KeyMap::new().rule(Rule::new(r"^module\.", "")?);
//! let checkpoint = Checkpoint::open("epoch3.pt".as_ref(), &options)?.rekey(&keys)?;
//! let artifact = Artifact::open("net.pt2".as_ref(), Access::Read, &Limits::default())?;
//! let plan = plan::plan(&artifact, &checkpoint, plan::Allow::default())?;
//! let report = write::refit(&plan, &artifact, &checkpoint, "net-epoch3.pt2".as_ref(), &mut |_, _| ())?;
//! println!("{} slots, {} changed", report.slots, report.slots_changed);
//! # Ok::<(), reweft::Error>(())
//! ```

pub mod artifact;
pub mod checkpoint;
pub mod config;
pub mod container;
pub mod convert;
pub mod diff;
pub mod dtype;
pub mod error;
pub mod keymap;
pub mod limits;
pub mod npy;

pub mod parallel;
pub mod plan;
pub mod recipe;
pub mod replay;
pub mod source;
pub mod tensor;
pub mod write;

pub use artifact::Artifact;
pub use checkpoint::{Checkpoint, OpenOptions};
pub use config::load_config;
pub use diff::diff;
pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use keymap::{KeyMap, Rule};
pub use limits::Limits;
pub use recipe::{Recipe, Step};
pub use tensor::TensorInfo;
