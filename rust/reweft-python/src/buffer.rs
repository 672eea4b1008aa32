//! Bytes for Python without a copy: a buffer over owned or mapped bytes.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use reweft::source::PrivateMap;

/// Bytes that live as long as any view of them; read-only, but for those of a private mapping.
#[pyclass(frozen, module = "reweft._core")]
pub struct Buffer(Bytes);

enum Bytes {
    Owned(Vec<u8>),
    /// A storage of a checkpoint that is in memory or mapped, and the range within it.
    Storage(Arc<reweft::Checkpoint>, usize, std::ops::Range<usize>),
    /// A range of a mapping that whoever has the buffer may write to.
    Private(Arc<PrivateMap>, std::ops::Range<usize>),
}

impl Buffer {
    pub fn owned(bytes: Vec<u8>) -> Self {
        Self(Bytes::Owned(bytes))
    }

    /// A range of a storage, if the storage's bytes are in memory; its CRC is checked first.
    pub fn of_storage(
        checkpoint: &Arc<reweft::Checkpoint>,
        storage: usize,
        range: std::ops::Range<usize>,
    ) -> reweft::Result<Option<Self>> {
        let held = checkpoint.storages().get(storage)?.as_slice()?;
        let fits = held.is_some_and(|bytes| bytes.get(range.clone()).is_some());
        Ok(fits.then(|| Self(Bytes::Storage(Arc::clone(checkpoint), storage, range))))
    }

    /// A range of a mapping, which may be written to; `None` if the mapping ends before it.
    pub fn private(map: &Arc<PrivateMap>, range: std::ops::Range<usize>) -> Option<Self> {
        let fits = range.start <= range.end && range.end <= map.nbytes();
        fits.then(|| Self(Bytes::Private(Arc::clone(map), range)))
    }

    /// Where the bytes start, and how many there are.
    fn extent(&self) -> (*const u8, usize) {
        let bytes: &[u8] = match &self.0 {
            Bytes::Owned(bytes) => bytes,
            Bytes::Storage(checkpoint, storage, range) => {
                let bytes = checkpoint.storages().get(*storage).and_then(reweft::checkpoint::Storage::as_slice);
                bytes.ok().flatten().and_then(|bytes| bytes.get(range.clone())).unwrap_or_default()
            }
            Bytes::Private(map, range) => return (map.as_mut_ptr().wrapping_add(range.start), range.len()),
        };
        (bytes.as_ptr(), bytes.len())
    }
}

#[pymethods]
impl Buffer {
    fn __len__(&self) -> usize {
        self.extent().1
    }

    /// Fills a buffer view.
    ///
    /// # Safety
    /// Called by the interpreter with a valid `view`.
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (start, nbytes) = slf.extent();
        // An empty slice may dangle, which some consumers take for an error.
        let start = if nbytes == 0 { EMPTY.as_ptr() } else { start };
        let Ok(nbytes) = ffi::Py_ssize_t::try_from(nbytes) else {
            return Err(PyBufferError::new_err("buffer is too large"));
        };
        let read_only = c_int::from(!matches!(slf.0, Bytes::Private(..)));
        // SAFETY: `view` is valid by the caller's contract. `start` points to `nbytes` bytes that `slf` owns and does not
        // free while it lives; the view takes a reference to `slf`. Where they are read-only, a request for a writable
        // buffer is refused; those of a private mapping are only ever reached through such buffers.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast_mut().cast(), nbytes, read_only, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    /// Nothing to release: the view's reference to this object is dropped by the interpreter.
    ///
    /// # Safety
    /// Called by the interpreter.
    #[expect(clippy::unused_self, reason = "the protocol's signature")]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// What an empty buffer points to.
static EMPTY: [u8; 1] = [0];

/// Copies nothing: the bytes of a Python buffer, kept alive by a reference to it.
#[derive(Debug)]
pub struct Borrowed {
    buffer: pyo3::buffer::PyBuffer<u8>,
}

impl Borrowed {
    /// Takes a C-contiguous buffer of bytes.
    ///
    /// # Errors
    /// `BufferError` if it is not contiguous or not of bytes.
    pub fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = pyo3::buffer::PyBuffer::<u8>::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("storage buffer is not contiguous"));
        }
        Ok(Self { buffer })
    }

    fn as_bytes(&self) -> &[u8] {
        if self.buffer.len_bytes() == 0 {
            return &[];
        }
        let start: *const u8 = ptr::NonNull::new(self.buffer.buf_ptr()).map_or(EMPTY.as_ptr(), |at| at.as_ptr().cast());
        // SAFETY: the buffer is C-contiguous and `len_bytes` long, and stays allocated while `self.buffer` holds it.
        // That nobody writes to it meanwhile is the promise of the Python layer, which passes bytes, that never change, and
        // arrays of one call; a torn read would give a wrong value, never an invalid byte.
        unsafe { std::slice::from_raw_parts(start, self.buffer.len_bytes()) }
    }
}

impl reweft::source::ReadAt for Borrowed {
    fn len(&self) -> u64 {
        self.as_bytes().len() as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> reweft::Result<()> {
        out.copy_from_slice(reweft::source::slice(self.as_bytes(), byte_offset, out.len() as u64)?);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.as_bytes())
    }
}
