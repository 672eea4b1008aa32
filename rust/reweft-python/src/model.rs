//! Live models for Python: run, replace, read back.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyList;
use reweft::plan::Allow;
use reweft_runtime::ModelOptions;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::handles;
use crate::weights::{save_live, to_json};

/// A compiled program that runs. Calls hold no interpreter lock.
#[pyclass(frozen, module = "reweft._core")]
pub struct Model(reweft_runtime::Model);

#[pymethods]
impl Model {
    /// Opens a package and binds its weights. Runs native code from it.
    #[staticmethod]
    #[pyo3(signature = (path, *, libtorch, replicas))]
    fn open(py: Python<'_>, path: PathBuf, libtorch: PathBuf, replicas: usize) -> Result<Self> {
        let options = ModelOptions { replicas, libtorch: Some(libtorch) };
        py.detach(|| handles::open_model(&path, &options)).map(Self)
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

    /// Runs on tensor handles in capsules, which are taken; gives handles in capsules, or None.
    fn run<'py>(&self, py: Python<'py>, inputs: &Bound<'py, PyList>) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let inputs = handles::take(self.0.torch(), inputs)?;
        let outputs = py.detach(|| self.0.run(inputs)).map_err(crate::error::Error::from)?;
        outputs.into_iter().map(|tensor| tensor.map(|tensor| handles::give(py, tensor)).transpose()).collect()
    }

    /// Replaces the weights; gives the report as JSON.
    #[pyo3(signature = (checkpoint, *, cast, missing, unused))]
    fn refit(
        &self,
        py: Python<'_>,
        checkpoint: &Checkpoint,
        cast: bool,
        missing: bool,
        unused: bool,
    ) -> Result<String> {
        let allow = Allow { cast, missing, unused };
        py.detach(|| to_json(&self.0.refit(&checkpoint.0, allow)?))
    }

    /// The weights in use.
    fn state(&self, py: Python<'_>) -> Result<Checkpoint> {
        Ok(Checkpoint(std::sync::Arc::new(py.detach(|| self.0.state())?)))
    }

    /// Writes the package with the weights in use; gives the report as JSON.
    fn save(&self, py: Python<'_>, out: PathBuf) -> Result<String> {
        py.detach(|| save_live(&self.0, &out))
    }

    /// Weights that no slot holds although the program depends on them, with the reason.
    fn unrefittable(&self) -> Vec<(String, String)> {
        let pairs = self.0.artifact().unrefittable().iter();
        pairs.map(|absent| (absent.name.clone(), absent.reason.clone())).collect()
    }

    /// Every name a weight may be given by: slot names with their aliases, and names the program never reads.
    fn names(&self) -> (Vec<Vec<String>>, Vec<String>) {
        let artifact = self.0.artifact();
        let slots = artifact.slots().iter().map(|slot| slot.names().map(str::to_owned).collect()).collect();
        (slots, artifact.unused().to_vec())
    }
}
