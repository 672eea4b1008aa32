//! Checkpoints, tensors and key maps for Python.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use reweft::source::{Access, PrivateMap, Source};
use reweft::{Dtype, Limits, OpenOptions};

use crate::buffer::{Borrowed, Buffer};
use crate::config::to_python;
use crate::error::{Error, Result};
use crate::handles;
use crate::replay::torch;

/// A selection and ordered rules; see `reweft.KeyMap`.
#[pyclass(frozen, module = "reweft._core")]
pub struct KeyMap(pub reweft::KeyMap);

#[pymethods]
impl KeyMap {
    /// Takes JSON with the fields of a key map file.
    #[new]
    fn new(json: &str) -> Result<Self> {
        Ok(Self(reweft::KeyMap::from_json(json)?))
    }

    #[staticmethod]
    fn from_toml(text: &str) -> Result<Self> {
        Ok(Self(reweft::KeyMap::from_toml(text)?))
    }

    #[staticmethod]
    fn open(path: PathBuf) -> Result<Self> {
        Ok(Self(reweft::KeyMap::open(&path)?))
    }

    #[getter]
    fn top_level_key(&self) -> Option<&str> {
        self.0.top_level_key()
    }

    /// What the key map makes of keys, as JSON.
    fn apply(&self, keys: Vec<String>) -> Result<String> {
        report(&self.0.apply(keys.iter().map(String::as_str))?)
    }
}

/// The report with every recipe also as text, which has one writer.
#[derive(serde::Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    mapped: &'a reweft::keymap::Mapped,
    recipes: serde_json::Map<String, serde_json::Value>,
}

fn report(mapped: &reweft::keymap::Mapped) -> Result<String> {
    let recipes = mapped.tensors.iter().map(|(name, recipe)| (name.clone(), recipe.to_string().into()));
    let text = serde_json::to_string(&Report { mapped, recipes: recipes.collect() });
    Ok(text.map_err(|error| reweft::Error::new(reweft::ErrorKind::Usage, error.to_string()))?)
}

/// What is known of a tensor without its bytes.
#[pyclass(frozen, get_all, module = "reweft._core")]
pub struct TensorInfo {
    dtype: &'static str,
    shape: Vec<u64>,
    strides: Vec<u64>,
    storage: usize,
    storage_offset: u64,
    nbytes: u64,
    numpy: Option<&'static str>,
}

impl From<&reweft::TensorInfo> for TensorInfo {
    fn from(info: &reweft::TensorInfo) -> Self {
        Self {
            dtype: info.dtype.name(),
            shape: info.shape.clone(),
            strides: info.strides.clone(),
            storage: info.storage,
            storage_offset: info.storage_offset,
            nbytes: info.nbytes(),
            numpy: info.dtype.numpy(),
        }
    }
}

/// An open checkpoint.
#[pyclass(frozen, module = "reweft._core")]
pub struct Checkpoint(pub Arc<reweft::Checkpoint>);

impl Checkpoint {
    /// A checkpoint whose recipes may need torch.
    fn new(checkpoint: reweft::Checkpoint) -> Self {
        Self(Arc::new(checkpoint.with_replay(torch())))
    }
}

#[pymethods]
impl Checkpoint {
    /// Opens a file.
    #[staticmethod]
    #[pyo3(signature = (path, *, top_level_key, keys, mmap, limits))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        top_level_key: Option<String>,
        keys: Option<&KeyMap>,
        mmap: bool,
        limits: HashMap<String, u64>,
    ) -> Result<Self> {
        let access = if mmap { Access::Map } else { Access::Read };
        let options = OpenOptions { limits: crate::limits::limits(limits)?, ..options(access, top_level_key, keys) };
        py.detach(|| rekeyed(reweft::Checkpoint::open(&path, &options)?, keys))
    }

    /// Reads a whole file that is in memory; the bytes are borrowed, not copied.
    #[staticmethod]
    #[pyo3(signature = (data, *, name, top_level_key, keys, limits))]
    fn from_bytes(
        py: Python<'_>,
        data: Bound<'_, PyBytes>,
        name: PathBuf,
        top_level_key: Option<String>,
        keys: Option<&KeyMap>,
        limits: HashMap<String, u64>,
    ) -> PyResult<Self> {
        let source: Source = Arc::new(Borrowed::new(&data)?);
        let limits = crate::limits::limits(limits)?;
        let options = OpenOptions { limits, ..options(Access::Read, top_level_key, keys) };
        let opened = py.detach(|| rekeyed(reweft::Checkpoint::from_source(&name, source, &options)?, keys));
        Ok(opened?)
    }

    /// The weights of an artifact, under the names of its slots. Compares their CRCs.
    #[staticmethod]
    fn of_artifact(py: Python<'_>, path: PathBuf) -> Result<Self> {
        let weights = py.detach(|| reweft::Artifact::open(&path, Access::Read, &Limits::default())?.weights());
        Ok(Self::new(weights?))
    }

    /// Makes a checkpoint of torch tensors that are plain and on the CPU; they are borrowed, not copied.
    #[staticmethod]
    #[pyo3(signature = (name, keys, tensors, *, metadata=None))]
    fn from_tensors(
        name: PathBuf,
        keys: Vec<String>,
        tensors: &Bound<'_, PyList>,
        metadata: Option<Vec<(String, String)>>,
    ) -> PyResult<Self> {
        let made = handles::checkpoint(&name, keys, tensors)?;
        let made = if let Some(pairs) = metadata { made.with_metadata(pairs.into_iter().collect()) } else { made };
        Ok(Self::new(made))
    }

    /// Reads the tensors of keys into tensors that are plain, dense, on the CPU and apart from one another.
    #[pyo3(signature = (keys, tensors, *, cast))]
    fn fill(&self, keys: Vec<String>, tensors: &Bound<'_, PyList>, cast: bool) -> PyResult<()> {
        handles::fill(&self.0, &keys, tensors, cast)
    }

    /// For each storage a buffer of its bytes that may be written to without changing the file, or None where the bytes do
    /// not lie in a file as they are. CRCs are compared; no byte is copied.
    fn map_privately(&self, py: Python<'_>, storages: Vec<usize>) -> Result<Vec<Option<Buffer>>> {
        Ok(py.detach(|| {
            self.0.check_crcs(&storages)?;
            let mut maps = HashMap::new();
            storages.into_iter().map(|number| self.private_storage(number, &mut maps)).collect::<reweft::Result<_>>()
        })?)
    }

    fn rekey(&self, keys: &KeyMap) -> Result<Self> {
        Ok(Self(Arc::new(self.0.rekey(&keys.0)?)))
    }

    /// Float tensors in another dtype.
    fn cast(&self, dtype: &str) -> Result<Self> {
        let Some(to) = Dtype::from_name(dtype) else {
            return Err(reweft::Error::new(reweft::ErrorKind::Usage, format!("no dtype {dtype:?}")).into());
        };
        Ok(Self(Arc::new(self.0.cast(to)?)))
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.0.format().name()
    }

    fn keys(&self) -> Vec<String> {
        self.0.keys().map(str::to_owned).collect()
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __contains__(&self, key: &str) -> bool {
        self.0.contains(key)
    }

    fn info(&self, key: &str) -> Result<TensorInfo> {
        Ok(self.0.get(key)?.into())
    }

    /// The bytes of a tensor in row-major order.
    fn read(&self, py: Python<'_>, key: &str) -> Result<Buffer> {
        Ok(Buffer::owned(py.detach(|| self.0.read(key))?))
    }

    /// The bytes that a tensor's elements lie in, without a copy, or None where they must be read.
    fn view(&self, py: Python<'_>, key: &str) -> Result<Option<Buffer>> {
        let info = self.0.get(key)?;
        let (start, nbytes) = info.window(self.0.storage_of(info)?.nbytes)?;
        let start = reweft::source::to_usize(start)?;
        let end = start + reweft::source::to_usize(nbytes)?;
        Ok(py.detach(|| Buffer::of_storage(&self.0, info.storage, start..end))?)
    }

    fn unreadable(&self) -> Vec<(String, String)> {
        self.0.unreadable().map(|(key, why)| (key.to_owned(), why.to_owned())).collect()
    }

    fn values(&self) -> Vec<(String, String)> {
        self.0.values().iter().map(|value| (value.path.clone(), value.what.clone())).collect()
    }

    /// The value at a path of `values`, as the Python data that it was.
    fn value<'py>(&self, py: Python<'py>, path: &str) -> PyResult<Bound<'py, PyAny>> {
        let read = || {
            let config = self.0.config(path)?;
            config.check_plain().map_err(|error| error.in_file(self.0.path()))?;
            Ok::<_, reweft::Error>(config)
        };
        let config = py.detach(read).map_err(Error::from)?;
        to_python(py, &config, self.0.path(), &Limits::default())
    }

    /// The `_metadata` of a state_dict, as plain Python data.
    fn state_metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let config = py.detach(|| self.0.state_metadata()).map_err(Error::from)?;
        config.map(|config| to_python(py, &config, self.0.path(), &Limits::default())).transpose()
    }

    fn unknown_globals(&self) -> Vec<String> {
        self.0.unknown_globals().to_vec()
    }

    fn metadata(&self) -> Vec<(String, String)> {
        self.0.metadata().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// What the last key map did, as JSON.
    fn mapped(&self) -> Result<Option<String>> {
        self.0.mapped().map(report).transpose()
    }

    fn notices(&self) -> Vec<String> {
        self.0.notices().to_vec()
    }
}

impl Checkpoint {
    /// The private mapping of a storage, if its bytes lie in a file as they are; `maps` has those of each file.
    fn private_storage(
        &self,
        number: usize,
        maps: &mut HashMap<*const File, Arc<PrivateMap>>,
    ) -> reweft::Result<Option<Buffer>> {
        let Some((file, start)) = self.0.place_of(number)? else { return Ok(None) };
        let map = match maps.entry(std::ptr::from_ref(file)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Arc::new(PrivateMap::new(self.0.path(), file)?)),
        };
        let start = reweft::source::to_usize(start)?;
        let end = start + reweft::source::to_usize(self.0.storages().get(number)?.nbytes)?;
        let gone = || reweft::Error::format("the file became shorter after it was opened").in_file(self.0.path());
        Buffer::private(map, start..end).ok_or_else(gone).map(Some)
    }
}

/// Finds a dtype by torch's name.
pub fn dtype_of(name: &str) -> reweft::Result<Dtype> {
    let unknown = || reweft::Error::new(reweft::ErrorKind::Unsupported, format!("dtype {name} is not known"));
    Dtype::from_name(name).ok_or_else(unknown)
}

fn options(access: Access, top_level_key: Option<String>, keys: Option<&KeyMap>) -> OpenOptions {
    let named = || keys.and_then(|keys| keys.0.top_level_key()).map(str::to_owned);
    OpenOptions { access, top_level_key: top_level_key.or_else(named), ..OpenOptions::default() }
}

fn rekeyed(checkpoint: reweft::Checkpoint, keys: Option<&KeyMap>) -> Result<Checkpoint> {
    let checkpoint = if let Some(keys) = keys { checkpoint.rekey(&keys.0)? } else { checkpoint };
    Ok(Checkpoint::new(checkpoint))
}
