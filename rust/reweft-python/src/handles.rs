//! Tensor handles in capsules, as torch's own functions pass them, and the opening of models.
//!
//! `torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors` makes capsules without a name, each with an owned
//! `AtenTensorHandle`; `alloc_tensors_by_stealing_from_void_ptrs` takes such capsules and owns what is in them.

#![allow(unsafe_code)]

use std::path::Path;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyList;
use reweft_runtime::{Model, ModelOptions, Tensor, Torch};

use crate::error::{Error, Result};

/// Opens a model of a path that the Python caller chose.
pub fn open_model(path: &Path, options: &ModelOptions) -> Result<Model> {
    // SAFETY: `reweft.torch.load` documents that it runs native code from the package; choosing the file is the
    // caller's decision, as it is for every extension module.
    Ok(unsafe { Model::open(path, options)? })
}

/// Takes the handles out of capsules.
pub fn take(torch: &Torch, capsules: &Bound<'_, PyList>) -> PyResult<Vec<Tensor>> {
    let one = |capsule: Bound<'_, PyAny>| {
        // SAFETY: checks that it is a capsule without a name, and sets an exception otherwise.
        let handle = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), ptr::null()) };
        if handle.is_null() {
            return Err(PyErr::fetch(capsule.py()));
        }
        // SAFETY: unnamed capsules come from torch's function, whose handles are owned by whoever takes them; the
        // Python layer passes each list once.
        unsafe { Tensor::from_raw(torch, handle.cast()) }
            .map_err(|error| Error::from(reweft::Error::from(error)).into())
    };
    capsules.iter().map(one).collect()
}

/// Puts a handle into a capsule for torch to take.
pub fn give(py: Python<'_>, tensor: Tensor) -> PyResult<Bound<'_, PyAny>> {
    let raw = tensor.into_raw();
    // SAFETY: the handle is not null, and a capsule without name and destructor is what torch's function expects.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(raw.cast(), ptr::null(), None)) }
}
