//! Between torch's tensors and handles of them, and the opening of models.
//!
//! torch documents no public functions that pass tensors without a copy; two of its own do it by handle, in capsules
//! without a name: `torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors` makes owned ones, and
//! `alloc_tensors_by_stealing_from_void_ptrs` takes such and owns what is in them.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, OnceLock};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyTuple};
use pyo3::{ffi, intern};
use reweft::checkpoint::{Room, Storage};
use reweft::source::{ReadAt, Source};
use reweft::tensor::{is_dense, numel};
use reweft::{Checkpoint, Dtype, ErrorKind, TensorInfo};
use reweft_runtime::{Model, ModelOptions, Tensor, Torch};

use crate::error::{Error, Result};

/// Opens a model of a path that the Python caller chose.
pub fn open_model(path: &Path, options: &ModelOptions) -> Result<Model> {
    // SAFETY: `reweft.torch.load` documents that it runs native code from the package; choosing the file is the
    // caller's decision, as it is for every extension module.
    Ok(unsafe { Model::open(path, options)? })
}

/// What is used of torch; looked up once.
struct TorchNames {
    handles_of: Py<PyAny>,
    tensors_of: Py<PyAny>,
    tensor: Py<PyAny>,
}

fn names(py: Python<'_>) -> PyResult<&'static TorchNames> {
    static NAMES: PyOnceLock<TorchNames> = PyOnceLock::new();
    NAMES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let passing = torch.getattr("_C")?.getattr("_aoti")?;
        Ok(TorchNames {
            handles_of: passing.getattr("unsafe_alloc_void_ptrs_from_tensors")?.unbind(),
            tensors_of: passing.getattr("alloc_tensors_by_stealing_from_void_ptrs")?.unbind(),
            tensor: torch.getattr("Tensor")?.unbind(),
        })
    })
}

/// Whether arguments are tensors whose bytes and shape are all there is to them: no subclass, no gradient to be computed,
/// no conjugation or negation that is pending.
pub fn are_plain(args: &Bound<'_, PyTuple>) -> PyResult<bool> {
    let py = args.py();
    let tensor = names(py)?.tensor.bind(py);
    for value in args.iter_borrowed() {
        let is_plain = value.get_type().is(tensor)
            && !value.getattr(intern!(py, "requires_grad"))?.is_truthy()?
            && !value.call_method0(intern!(py, "is_neg"))?.is_truthy()?
            && !value.call_method0(intern!(py, "is_conj"))?.is_truthy()?;
        if !is_plain {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sees tensors of the CPU as a checkpoint; no byte is copied. Storages that several share are there once.
///
/// # Errors
/// As [`take`], and for a dtype that has no name.
pub fn checkpoint(name: &Path, keys: Vec<String>, tensors: &Bound<'_, PyList>) -> PyResult<Checkpoint> {
    let taken = take(torch()?, tensors)?;
    let mut numbers = HashMap::new();
    let (mut storages, mut rows) = (Vec::new(), Vec::with_capacity(keys.len()));
    for (key, tensor) in keys.into_iter().zip(&taken) {
        let found = described(tensor, &mut numbers, &mut storages);
        let info = found.map_err(|error| Error::from(error.of_key(&key).in_file(name)))?;
        rows.push((key, info));
    }
    Ok(Checkpoint::from_memory(name, storages, rows).map_err(Error::from)?)
}

/// What is known of a tensor, with the number of its storage among those that are known.
fn described(
    tensor: &Tensor,
    numbers: &mut HashMap<(*mut u8, u64), usize>,
    storages: &mut Vec<Source>,
) -> reweft::Result<TensorInfo> {
    let dtype = tensor.dtype()?;
    let (shape, strides) = (unsigned(tensor.shape()?), unsigned(tensor.strides()?));
    let Some(first) = NonNull::new(tensor.data_ptr()?.cast::<u8>()).filter(|_| !shape.contains(&0)) else {
        // What has no elements has no address either.
        storages.push(Arc::new(Vec::new()));
        return Ok(TensorInfo { dtype, shape, strides, storage: storages.len() - 1, storage_offset: 0 });
    };
    let (storage_offset, nbytes) = (tensor.storage_offset()?, tensor.storage_nbytes()?);
    let before = dtype.nbytes(storage_offset).and_then(|before| usize::try_from(before).ok());
    let wrong = || reweft::Error::format(format!("a storage offset of {storage_offset} elements"));
    let start = first.as_ptr().wrapping_sub(before.ok_or_else(wrong)?);
    let storage = *numbers.entry((start, nbytes)).or_insert(storages.len());
    if storage == storages.len() {
        storages.push(Arc::new(Memory { start, nbytes, _storage: Mutex::new(tensor.of_storage()?) }));
    }
    Ok(TensorInfo { dtype, shape, strides, storage, storage_offset })
}

/// Reads the tensors of keys into the memory of torch tensors, with the interpreter lock released.
///
/// # Errors
/// As [`Checkpoint::fill`], and [`ErrorKind::Usage`] for tensors that share memory with one another or with what is read.
pub fn fill(checkpoint: &Checkpoint, keys: &[String], tensors: &Bound<'_, PyList>, cast: bool) -> PyResult<()> {
    let taken = take(torch()?, tensors)?;
    let mut rooms = Vec::with_capacity(keys.len());
    for (key, tensor) in keys.iter().zip(&taken) {
        rooms.push(room(key, tensor).map_err(|error| Error::from(error.of_key(key).in_file(checkpoint.path())))?);
    }
    check_apart(checkpoint, &rooms).map_err(Error::from)?;
    let rooms = rooms.into_iter().map(|room| {
        let Vacant { key, dtype, shape, strides, start, nbytes } = room;
        // SAFETY: the tensor is dense, so its elements are these bytes, which stay allocated while `taken` holds handles;
        // no two rooms have a byte in common and none has one with what is read. That nobody else looks at them meanwhile
        // is the promise of whoever loads into a module, as it is for `load_state_dict`; any value of a byte is valid.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), nbytes) };
        Room { key, dtype, shape, strides, bytes }
    });
    let rooms: Vec<Room<'_>> = rooms.collect();
    tensors.py().detach(|| checkpoint.fill(rooms, cast)).map_err(Error::from)?;
    drop(taken);
    Ok(())
}

/// Where a tensor's bytes go.
struct Vacant<'a> {
    key: &'a str,
    dtype: Dtype,
    shape: Vec<u64>,
    strides: Vec<u64>,
    start: NonNull<u8>,
    nbytes: usize,
}

fn room<'a>(key: &'a str, tensor: &Tensor) -> reweft::Result<Vacant<'a>> {
    let usage = |what: &str| reweft::Error::new(ErrorKind::Usage, what);
    let (dtype, shape, strides) = (tensor.dtype()?, unsigned(tensor.shape()?), unsigned(tensor.strides()?));
    if !is_dense(&shape, &strides) {
        return Err(usage("the tensor to fill is not dense"));
    }
    let nbytes = numel(&shape).and_then(|numel| dtype.nbytes(numel)).ok_or_else(|| usage("its size overflows"))?;
    let (start, nbytes) = match NonNull::new(tensor.data_ptr()?.cast::<u8>()) {
        Some(start) if nbytes > 0 => (start, reweft::source::to_usize(nbytes)?),
        None if nbytes > 0 => return Err(usage("the tensor to fill has no memory")),
        // What has no elements has no address either.
        _ => (NonNull::dangling(), 0),
    };
    Ok(Vacant { key, dtype, shape, strides, start, nbytes })
}

/// Refuses rooms that have bytes in common, with one another or with the memory that a checkpoint reads from.
fn check_apart(checkpoint: &Checkpoint, rooms: &[Vacant<'_>]) -> reweft::Result<()> {
    let mut spans = Vec::with_capacity(rooms.len());
    for room in rooms.iter().filter(|room| room.nbytes > 0) {
        spans.push((room.start.as_ptr().addr(), room.nbytes, Some(room.key)));
    }
    // Of sources in files nothing lies where tensors are.
    for source in checkpoint.storages().iter().filter_map(Storage::source).filter(|source| source.file().is_none()) {
        if let Some(bytes) = source.as_slice() {
            spans.push((bytes.as_ptr().addr(), bytes.len(), None));
        }
    }
    spans.sort_unstable();
    let mut last: (usize, Option<&str>) = (0, None);
    for (start, nbytes, key) in spans {
        if start < last.0
            && let Some(key) = key.or(last.1)
        {
            let what = "the tensor to fill shares memory with another, or with what is read";
            return Err(reweft::Error::new(ErrorKind::Usage, what).of_key(key).in_file(checkpoint.path()));
        }
        if start + nbytes > last.0 {
            last = (start + nbytes, key);
        }
    }
    Ok(())
}

fn unsigned(sizes: Vec<i64>) -> Vec<u64> {
    sizes.into_iter().map(i64::unsigned_abs).collect()
}

/// The libtorch of this process, found once.
pub fn torch() -> PyResult<&'static Torch> {
    static TORCH: OnceLock<Torch> = OnceLock::new();
    if let Some(torch) = TORCH.get() {
        return Ok(torch);
    }
    let found = Torch::from_process().map_err(|error| Error::from(reweft::Error::from(error)))?;
    Ok(TORCH.get_or_init(|| found))
}

/// The bytes of a storage of torch, which this keeps alive.
#[derive(Debug)]
struct Memory {
    start: *mut u8,
    nbytes: u64,
    /// Nobody looks at it: a handle may be dropped on any thread, and used on one at a time.
    _storage: Mutex<Tensor>,
}

// SAFETY: the address is only read from, and what it is of stays where it is while this lives.
unsafe impl Send for Memory {}
// SAFETY: the same.
unsafe impl Sync for Memory {}

impl ReadAt for Memory {
    fn len(&self) -> u64 {
        self.nbytes
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> reweft::Result<()> {
        let bytes = self.as_slice().unwrap_or_default();
        out.copy_from_slice(reweft::source::slice(bytes, byte_offset, out.len() as u64)?);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        let nbytes = usize::try_from(self.nbytes).ok()?;
        // SAFETY: a storage of the CPU with elements is `nbytes` long and stays allocated while `_storage` holds it. That
        // nobody writes to it meanwhile is the promise of the Python layer, which passes tensors of one call and drops
        // them at its end; a torn read would give a wrong weight, never an invalid byte. Of tensors that are lent to a
        // model (`copy=False`) only the address is taken from the slice after that.
        Some(unsafe { std::slice::from_raw_parts(self.start, nbytes) })
    }
}

/// Handles of tensors.
///
/// # Errors
/// torch's, for what is no tensor.
pub fn take(torch: &Torch, tensors: &Bound<'_, PyList>) -> PyResult<Vec<Tensor>> {
    let py = tensors.py();
    let one = |capsule: Bound<'_, PyAny>| {
        // SAFETY: checks that it is a capsule without a name, and sets an exception otherwise.
        let handle = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), ptr::null()) };
        if handle.is_null() {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: unnamed capsules come from torch's function, whose handles are owned by whoever takes them; the list
        // was made just now and is dropped with this function.
        unsafe { Tensor::from_raw(torch, handle.cast()) }
            .map_err(|error| Error::from(reweft::Error::from(error)).into())
    };
    let capsules = names(py)?.handles_of.bind(py).call1((tensors,))?;
    // Every capsule is looked at: an error half-way would leave the handles behind it to nobody.
    let found: Vec<PyResult<Tensor>> = capsules.cast::<PyList>()?.iter().map(one).collect();
    found.into_iter().collect()
}

/// The tensors of handles; None stays None.
pub fn give(py: Python<'_>, handles: Vec<Option<Tensor>>) -> PyResult<Bound<'_, PyList>> {
    let absent: Vec<usize> = (0..handles.len()).filter(|number| handles[*number].is_none()).collect();
    let capsules = PyList::empty(py);
    for handle in handles.into_iter().flatten() {
        let raw = handle.into_raw();
        // SAFETY: the handle is not null, and a capsule without name and destructor is what torch's function expects.
        let capsule = unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(raw.cast(), ptr::null(), None)) };
        capsules.append(capsule?)?;
    }
    let tensors = names(py)?.tensors_of.bind(py).call1((capsules,))?.cast_into::<PyList>()?;
    for number in absent {
        tensors.insert(number, py.None())?;
    }
    Ok(tensors)
}
