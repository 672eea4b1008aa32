//! Between torch's tensors and handles of them, and the opening of models.
//!
//! torch documents no public functions that pass tensors without a copy; two of its own do it by handle, in capsules
//! without a name: `torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors` makes owned ones, and
//! `alloc_tensors_by_stealing_from_void_ptrs` takes such and owns what is in them.

#![allow(unsafe_code)]

use std::path::Path;
use std::ptr;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyTuple};
use pyo3::{ffi, intern};
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
