//! Live models for Python: run, replace, read back.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use reweft::artifact::Slot;
use reweft::artifact::manifest::{Batching, Manifest, RefitRule};
use reweft::plan::{Allow, Given};
use reweft::source::Access;
use reweft::{Artifact, Limits};
use reweft_runtime::{Interrupted, Lending, ModelOptions, OpenOperators, RefitOptions};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::handles;
use crate::operators;
use crate::weights::to_json;

/// A compiled program that runs. Calls hold no interpreter lock.
#[pyclass(frozen, module = "reweft._core")]
pub struct Model(reweft_runtime::Model);

#[pymethods]
impl Model {
    /// Opens a package and binds its weights. Runs native code from it.
    #[staticmethod]
    #[pyo3(signature = (path, *, libtorch, replicas, weights, cast, missing, unused, single_threaded, threads, device, standby))]
    #[expect(
        clippy::too_many_arguments,
        clippy::fn_params_excessive_bools,
        reason = "keywords of one private function"
    )]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        libtorch: PathBuf,
        replicas: usize,
        weights: Option<&Checkpoint>,
        cast: bool,
        missing: bool,
        unused: bool,
        single_threaded: bool,
        threads: Option<i64>,
        device: Option<&str>,
        standby: bool,
    ) -> Result<Self> {
        let weights = weights.map(|weights| Arc::clone(&weights.0));
        let refit = Allow { cast, missing, unused }.into();
        let device = device.map(str::parse).transpose().map_err(reweft::Error::from)?;
        let count = |found: i64| u16::try_from(found).ok().and_then(NonZero::new).ok_or_else(|| wrong_threads(found));
        let threads = threads.map(count).transpose()?;
        let libtorch = Some(libtorch);
        let operators = Some(operators::open as OpenOperators);
        let options =
            ModelOptions { replicas, libtorch, weights, refit, single_threaded, threads, device, standby, operators };
        py.detach(|| handles::open_model(&path, &options)).map(Self)
    }

    /// What the weights given to `open` did, as JSON.
    fn load_report(&self) -> Result<Option<String>> {
        self.0.load_report().map(to_json).transpose()
    }

    /// A second model of the same program with the same weights.
    fn twin(&self, py: Python<'_>) -> Result<Self> {
        Ok(Self(py.detach(|| self.0.twin())?))
    }

    /// Takes the weights of a twin.
    fn adopt(&self, py: Python<'_>, other: &Self) -> Result<()> {
        Ok(py.detach(|| self.0.adopt(&other.0))?)
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.0.artifact().path().to_owned()
    }

    /// How the program is called, as JSON.
    fn signature(&self) -> Result<String> {
        to_json(self.0.signature())
    }

    /// Shape and strides that each input must have, from the shapes that they have.
    fn expect(&self, shapes: Vec<Vec<i64>>) -> Result<Vec<(Vec<i64>, Vec<i64>)>> {
        let expected = self.0.signature().expect(&shapes).map_err(|error| error.in_file(self.0.artifact().path()))?;
        Ok(expected.into_iter().map(|expected| (expected.shape, expected.strides)).collect())
    }

    /// What a caller should be warned of.
    fn notices(&self) -> Vec<String> {
        self.0.notices().to_vec()
    }

    /// Pytree specifications of inputs and outputs, as JSON.
    fn call_spec(&self) -> Result<(String, String)> {
        Ok(self.0.call_spec()?)
    }

    /// Runs on tensors, which must be on the CPU and without a gradient; gives tensors, or None where there is none.
    fn run<'py>(&self, py: Python<'py>, inputs: &Bound<'py, PyList>) -> PyResult<Bound<'py, PyList>> {
        let inputs = handles::take(self.0.torch(), inputs)?;
        let outputs = interruptible(py, |interrupted| self.0.run_unless(inputs, interrupted))?;
        handles::give(py, outputs)
    }

    /// Runs on positional arguments if they are just what the program takes, to the stride; None if they are not. What is
    /// wrong with them, or how to make them fit, is left to whoever asks.
    fn run_fitting<'py>(&self, py: Python<'py>, args: &Bound<'py, PyTuple>) -> PyResult<Option<Bound<'py, PyList>>> {
        if !handles::are_plain(args)? {
            return Ok(None);
        }
        let inputs = handles::take(self.0.torch(), &args.to_list())?;
        let outputs = interruptible(py, |interrupted| self.0.run_fitting(inputs, interrupted))?;
        outputs.map(|outputs| handles::give(py, outputs)).transpose()
    }

    /// Runs on chunks of inputs, all on one set of weights.
    fn run_chunks<'py>(&self, py: Python<'py>, chunks: Vec<Bound<'py, PyList>>) -> PyResult<Vec<Bound<'py, PyList>>> {
        let chunks: PyResult<_> = chunks.iter().map(|inputs| handles::take(self.0.torch(), inputs)).collect();
        let chunks = chunks?;
        let outputs = interruptible(py, |interrupted| self.0.run_chunks_unless(chunks, interrupted))?;
        outputs.into_iter().map(|outputs| handles::give(py, outputs)).collect()
    }

    /// Replaces the weights; gives the report as JSON.
    #[pyo3(signature = (checkpoint, *, cast, missing, unused, lend, lend_written, keep_written, rows=false))]
    #[expect(
        clippy::too_many_arguments,
        clippy::fn_params_excessive_bools,
        reason = "keywords of one private function"
    )]
    fn refit(
        &self,
        py: Python<'_>,
        checkpoint: &Checkpoint,
        cast: bool,
        missing: bool,
        unused: bool,
        lend: bool,
        lend_written: bool,
        keep_written: bool,
        rows: bool,
    ) -> Result<String> {
        let allow = Allow { cast, missing, unused };
        let lending = match (lend, lend_written) {
            (false, _) => Lending::Nothing,
            (true, false) => Lending::Read,
            (true, true) => Lending::All,
        };
        let given = if rows { Given::Rows } else { Given::Weights };
        let options = RefitOptions { allow, lending, keep_written, given };
        py.detach(|| to_json(&self.0.refit(&checkpoint.0, options)?))
    }

    /// Hash of the weights in use.
    fn weights_version(&self, py: Python<'_>) -> Result<String> {
        Ok(py.detach(|| self.0.weights_version())?)
    }

    /// Whether the package was stripped of its weights.
    #[getter]
    fn is_stripped(&self) -> bool {
        self.0.artifact().is_stripped()
    }

    /// Names, dtype and shape of every tensor that a refit takes.
    fn tensors(&self) -> Vec<(Vec<String>, &'static str, Vec<u64>)> {
        let artifact = self.0.artifact();
        let slots = artifact.slots().iter().filter(|slot| slot.recipe.is_none());
        // Of what was folded, a state_dict's alone may get another value.
        let taken = slots.chain(artifact.originals().iter().filter(|original| original.persistent));
        let names = |slot: &Slot| slot.names().map(str::to_owned).collect();
        taken.map(|slot| (names(slot), slot.dtype.name(), slot.shape.clone())).collect()
    }

    /// Whether the slots of another model are made in the same way.
    fn has_rows_of(&self, other: &Self) -> bool {
        self.0.has_rows_of(&other.0)
    }

    /// The weights in use: those of the module that can be read back, or the bytes of all slots.
    #[pyo3(signature = (*, rows=false))]
    fn state(&self, py: Python<'_>, rows: bool) -> Result<Checkpoint> {
        let read = || if rows { self.0.state() } else { self.0.weights() };
        Ok(Checkpoint(std::sync::Arc::new(py.detach(read)?)))
    }

    /// Writes the package with the weights in use, or stripped of them; gives the report as JSON.
    #[pyo3(signature = (out, *, inline_weights, chunks))]
    fn save(&self, py: Python<'_>, out: PathBuf, inline_weights: bool, chunks: bool) -> Result<String> {
        let batching = if chunks { Batching::Chunks } else { Batching::Single };
        py.detach(|| to_json(&self.0.save(&out, inline_weights, batching)?))
    }

    /// Which batch sizes calls may have: "single" or "chunks".
    fn batching(&self) -> &'static str {
        match self.0.artifact().manifest().map(Manifest::batching) {
            Some(Batching::Chunks) => "chunks",
            _ => "single",
        }
    }

    /// Which new weights the package takes: "any", "identical" or "never".
    fn refit_rule(&self) -> &'static str {
        match self.0.artifact().manifest().map(Manifest::refit).unwrap_or_default() {
            RefitRule::Any => "any",
            RefitRule::Identical => "identical",
            RefitRule::Never => "never",
        }
    }

    /// What tells the program from others, if whoever compiled it said so.
    fn program(&self) -> Option<String> {
        self.0.artifact().manifest().and_then(Manifest::program).map(str::to_owned)
    }

    /// Names of buffers that the program writes to.
    fn written(&self) -> Vec<String> {
        let slots = self.0.artifact().slots().iter();
        slots.filter(|slot| slot.mutated).map(|slot| slot.name.clone()).collect()
    }

    /// Weights that no slot holds although the program depends on them, with the reason.
    fn unrefittable(&self) -> Vec<(String, String)> {
        let pairs = self.0.artifact().unrefittable().iter();
        pairs.map(|absent| (absent.name.clone(), absent.reason.clone())).collect()
    }

    /// Every name a weight may be given by: slot names with their aliases, and names the program never reads.
    fn names(&self) -> (Vec<Vec<String>>, Vec<String>) {
        let artifact = self.0.artifact();
        (names(artifact), artifact.unused().to_vec())
    }
}

/// The machine and the instruction sets of its processor, as packages state them; JSON.
#[pyfunction]
pub fn host() -> Result<String> {
    to_json(&reweft_runtime::host())
}

/// The user's folder for caches.
#[pyfunction]
pub fn cache_folder() -> Option<PathBuf> {
    reweft_runtime::user_folder()
}

/// Refuses a folder that others can put code into.
#[pyfunction]
pub fn check_private(folder: PathBuf) -> Result<()> {
    let folder = std::path::absolute(&folder).unwrap_or(folder);
    Ok(reweft_runtime::check_private(&folder)?)
}

/// The names of the tensors that a refit of an artifact takes, the first one first. Reads metadata.
#[pyfunction]
pub fn slot_names(py: Python<'_>, path: PathBuf) -> Result<Vec<Vec<String>>> {
    Ok(py.detach(|| Artifact::open(&path, Access::Read, &Limits::default()).map(|artifact| names(&artifact)))?)
}

fn names(artifact: &Artifact) -> Vec<Vec<String>> {
    artifact.tensors().map(|slot| slot.names().map(str::to_owned).collect()).collect()
}

/// Runs a job that asks now and then whether to give up: if a signal's handler has raised something, as Ctrl-C does.
fn interruptible<T: Send>(
    py: Python<'_>,
    job: impl FnOnce(Interrupted<'_>) -> reweft::Result<T> + Send,
) -> PyResult<T> {
    let raised: Mutex<Option<PyErr>> = Mutex::new(None);
    let interrupted = || {
        let found = Python::attach(|py| py.check_signals().err());
        let is_raised = found.is_some();
        *raised.lock().unwrap_or_else(PoisonError::into_inner) = found;
        is_raised
    };
    let done = py.detach(|| job(&interrupted));
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => done.map_err(|error| operators::raised(py, error)),
    }
}

fn wrong_threads(found: i64) -> reweft::Error {
    reweft::Error::new(reweft::ErrorKind::Usage, format!("threads: found {found}, want 1 to {}", u16::MAX))
}
