//! Comparisons for Python. The report crosses as JSON.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use reweft::diff::{self as engine, Options, Side};
use reweft::{KeyMap, OpenOptions};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::weights::to_json;

/// What `diff` takes for a side.
#[derive(FromPyObject)]
pub enum Input<'py> {
    Open(PyRef<'py, Checkpoint>),
    File(PathBuf),
}

/// The same without the interpreter.
enum Subject {
    Open(Arc<reweft::Checkpoint>),
    File(PathBuf),
}

impl Subject {
    fn new(input: &Input<'_>) -> Self {
        match input {
            Input::Open(checkpoint) => Self::Open(Arc::clone(&checkpoint.0)),
            Input::File(path) => Self::File(path.clone()),
        }
    }

    fn side(&self) -> reweft::Result<Side<'_>> {
        match self {
            Self::Open(checkpoint) => Ok(Side::of_checkpoint(checkpoint)),
            Self::File(path) => Side::open(path, &OpenOptions::default(), &KeyMap::new()),
        }
    }
}

/// Compares two files or open checkpoints; gives the report as JSON.
#[pyfunction]
#[pyo3(signature = (a, b, *, only, values))]
pub fn diff(py: Python<'_>, a: Input<'_>, b: Input<'_>, only: Vec<String>, values: bool) -> Result<String> {
    let (a, b) = (Subject::new(&a), Subject::new(&b));
    py.detach(|| {
        let options =
            only.iter().try_fold(Options::default().values(values), |options, pattern| options.only(pattern))?;
        to_json(&engine::diff(&a.side()?, &b.side()?, &options, &mut |_, _| ())?)
    })
}
