//! `reweft._core`: the engine's types for Python. Registration and conversion; every decision is in the engine.

#![allow(clippy::needless_pass_by_value, reason = "the interpreter's values are extracted, not borrowed")]
#![allow(missing_debug_implementations, reason = "Python sees the repr of the Python classes")]

mod buffer;
mod checkpoint;
mod config;
mod diff;
mod error;
mod handles;
mod limits;
mod model;
mod operators;
mod replay;
mod watch;
mod weights;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::buffer::Buffer;
    #[pymodule_export]
    use crate::checkpoint::{Checkpoint, KeyMap, TensorInfo};
    #[pymodule_export]
    use crate::config::load_config;
    #[pymodule_export]
    use crate::diff::diff;
    #[pymodule_export]
    use crate::model::{Model, cache_folder, check_private, host, slot_names};
    #[pymodule_export]
    use crate::replay::lend_replay;
    #[pymodule_export]
    use crate::watch::Watch;
    #[pymodule_export]
    use crate::weights::{Plan, cast, main, plan, refit, row_hash, seal, strip, verify, write_converted};
}
