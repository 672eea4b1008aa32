//! Plans, refits and conversions for Python. Reports cross as JSON, which Python makes dataclasses of.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use reweft::artifact::manifest::{self, Origins};
use reweft::source::{Access, ReadAt};
use reweft::write::{ConvertOptions, TargetFormat};
use reweft::{Artifact, Error, ErrorKind, Limits, convert, plan as engine, write};

use crate::buffer::{Borrowed, Buffer};
use crate::checkpoint::{Checkpoint, dtype_of};
use crate::error::{Error as Failed, Result};

/// A checked list of replacements, with the files it is of.
#[pyclass(frozen, module = "reweft._core")]
pub struct Plan {
    inner: engine::Plan,
    artifact: Artifact,
    checkpoint: Arc<reweft::Checkpoint>,
}

#[pymethods]
impl Plan {
    /// The whole plan.
    fn to_json(&self) -> Result<String> {
        Ok(self.inner.to_json()?)
    }

    /// Raises `MismatchError` if a finding blocks a refit.
    fn check(&self) -> Result<()> {
        Ok(self.inner.check()?)
    }

    fn __len__(&self) -> usize {
        self.inner.refills.len()
    }

    /// The bytes that a refit would put into a slot; None for a slot that stays as it is.
    fn make(&self, py: Python<'_>, name: &str) -> Result<Option<Buffer>> {
        let Some(refill) = self.inner.refills.iter().find(|refill| refill.name == name) else { return Ok(None) };
        let bytes = py.detach(|| refill.recipe.evaluate(&self.checkpoint, refill.nbytes));
        Ok(Some(Buffer::owned(bytes?)))
    }
}

/// A report as JSON.
pub fn to_json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string(value).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?)
}

/// Plans a refit. Reads metadata, and tied keys that are stored twice.
#[pyfunction]
#[pyo3(signature = (artifact, checkpoint, *, original, cast, missing, unused))]
pub fn plan(
    py: Python<'_>,
    artifact: PathBuf,
    checkpoint: &Checkpoint,
    original: Option<&Checkpoint>,
    cast: bool,
    missing: bool,
    unused: bool,
) -> Result<Plan> {
    let checkpoint = Arc::clone(&checkpoint.0);
    let original = original.map(|original| Arc::clone(&original.0));
    py.detach(|| {
        let artifact = Artifact::open(&artifact, Access::Read, &Limits::default())?;
        let mut plan = engine::plan(&artifact, &checkpoint, engine::Allow { cast, missing, unused })?;
        if let Some(original) = original {
            plan.check_original(&artifact, &original)?;
        }
        Ok(Plan { inner: plan, artifact, checkpoint })
    })
}

/// Carries a plan out as a copy, or in place if there is no `out`; gives the report as JSON.
#[pyfunction]
pub fn refit(py: Python<'_>, plan: &Plan, out: Option<PathBuf>) -> Result<String> {
    let Plan { inner, artifact, checkpoint } = plan;
    py.detach(|| {
        to_json(&match out {
            Some(out) => write::refit(inner, artifact, checkpoint, &out, &mut |_, _| ())?,
            None => write::refit_in_place(inner, artifact, checkpoint, &mut |_, _| ())?,
        })
    })
}

/// Compares slots with the checkpoint; gives the report as JSON.
#[pyfunction]
pub fn verify(py: Python<'_>, plan: &Plan) -> Result<String> {
    let Plan { inner, artifact, checkpoint } = plan;
    py.detach(|| to_json(&write::verify(inner, artifact, checkpoint, &mut |_, _| ())?))
}

/// Writes an artifact without its weights; gives the report as JSON.
#[pyfunction]
pub fn strip(py: Python<'_>, artifact: PathBuf, out: PathBuf, keep: Vec<String>) -> Result<String> {
    let keep: Vec<&str> = keep.iter().map(String::as_str).collect();
    py.detach(|| {
        let artifact = Artifact::open(&artifact, Access::Read, &Limits::default())?;
        to_json(&write::strip(&artifact, &keep, &out, &mut |_, _| ())?)
    })
}

/// Writes a checkpoint in another format; gives the report as JSON.
#[pyfunction]
#[pyo3(name = "convert", signature = (checkpoint, out, *, target, shared, max_shard, sync))]
pub fn write_converted(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    out: PathBuf,
    target: Option<&str>,
    shared: &str,
    max_shard: Option<&str>,
    sync: bool,
) -> Result<String> {
    let format = target.map(TargetFormat::from_name).transpose()?;
    let shared = match shared {
        "error" => write::Shared::Error,
        "duplicate" => write::Shared::Duplicate,
        "drop-aliases" => write::Shared::DropAliases,
        other => {
            let what = format!("shared is {other:?}, wanted \"error\", \"duplicate\" or \"drop-aliases\"");
            return Err(Error::new(ErrorKind::Usage, what).into());
        }
    };
    let max_shard_nbytes = max_shard.map(write::parse_nbytes).transpose()?;
    let options = ConvertOptions { format, shared, max_shard_nbytes, sync };
    py.detach(|| to_json(&write::convert(&checkpoint.0, &out, &options, &mut |_, _| ())?))
}

/// Converts elements between float dtypes, given by torch's names.
#[pyfunction]
pub fn cast(py: Python<'_>, data: &Bound<'_, PyAny>, source: &str, target: &str) -> PyResult<Buffer> {
    let (from, to) = (dtype_of(source).map_err(Failed::from)?, dtype_of(target).map_err(Failed::from)?);
    let bytes = Borrowed::new(data)?;
    let cast: Result<_> = py.detach(|| Ok(convert::cast(bytes.as_slice().unwrap_or_default(), from, to)?));
    Ok(Buffer::owned(cast?))
}

/// Hash of bytes as manifests state it.
#[pyfunction]
pub fn row_hash(data: &Bound<'_, PyAny>) -> PyResult<String> {
    let bytes = Borrowed::new(data)?;
    Ok(manifest::hash(bytes.as_slice().unwrap_or_default()))
}

/// Writes a copy of a fresh package with a manifest made of `origins` (JSON).
#[pyfunction]
pub fn seal(py: Python<'_>, package: PathBuf, origins: &str, out: PathBuf) -> Result<()> {
    let mut origins: Origins =
        serde_json::from_str(origins).map_err(|error| Error::new(ErrorKind::Usage, format!("origins: {error}")))?;
    // The compiler ran on this host, for this host.
    origins.target.get_or_insert_with(reweft_runtime::host);
    py.detach(|| manifest::seal(&package, &origins, &out))?;
    Ok(())
}

/// Runs the `reweft` command; gives its exit code.
#[pyfunction]
pub fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| reweft_cli::run(args))
}
