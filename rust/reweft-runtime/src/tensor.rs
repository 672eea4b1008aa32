//! Tensors of libtorch, held by their handle. Shapes and strides are in elements, as torch counts them.

use std::ffi::c_void;
use std::fmt;
use std::ptr::{NonNull, null_mut};

use reweft::Dtype;

use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::symbols::Function;
use crate::torch::{RawTensor, Torch};

/// An owned tensor handle; dropping it deletes the handle, and the memory with the last handle that shares it.
///
/// `Send` and not `Sync`: libtorch counts references atomically, so handles may be used and deleted on any
/// thread, but asking for the address of a lazily copied tensor makes the copy at that moment.
pub struct Tensor {
    torch: Torch,
    raw: NonNull<c_void>,
}

/// Where the elements of a tensor were, and how they lay there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    address: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

// SAFETY: a handle is an intrusive pointer with an atomic count; libtorch ties no tensor to a thread.
unsafe impl Send for Tensor {}

impl Tensor {
    /// Takes ownership of a handle. Costs nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `raw` is null.
    ///
    /// # Safety
    /// `raw` is a live handle of the libtorch that `torch` stands for, and nobody else deletes it.
    pub unsafe fn from_raw(torch: &Torch, raw: RawTensor) -> Result<Self> {
        let raw = NonNull::new(raw).ok_or_else(|| Error::usage("tensor handle: found null"))?;
        Ok(Self { torch: torch.clone(), raw })
    }

    /// Makes a handle of its own for a tensor that somebody else's handle is of.
    ///
    /// # Errors
    /// As [`from_raw`](Self::from_raw) and [`try_clone`](Self::try_clone).
    ///
    /// # Safety
    /// `raw` is null or a live handle of the libtorch that `torch` stands for.
    pub(crate) unsafe fn share(torch: &Torch, raw: RawTensor) -> Result<Self> {
        // SAFETY: the caller vouches for the handle, which is given back before this returns.
        let lent = unsafe { Self::from_raw(torch, raw)? };
        let shared = lent.try_clone();
        let _ = lent.into_raw();
        shared
    }

    /// Takes what a call of the shim made. `create_tensor_from_blob_v2` was seen to report success and leave null
    /// where the call it wraps had failed (torch 2.15, a blob on a device that does not exist).
    ///
    /// # Safety
    /// `raw` is null or a new handle.
    unsafe fn created<F>(torch: &Torch, function: &Function<F>, status: i32, raw: RawTensor) -> Result<Self> {
        torch.check(function, status)?;
        let raw = NonNull::new(raw).ok_or_else(|| torch.failed(function, status))?;
        Ok(Self { torch: torch.clone(), raw })
    }

    /// Gives the handle away; whoever gets it deletes it.
    pub fn into_raw(self) -> RawTensor {
        let mut this = std::mem::ManuallyDrop::new(self);
        let raw = this.raw.as_ptr();
        // SAFETY: `this` is never dropped nor read again, so the reference is released exactly once, here.
        unsafe { std::ptr::drop_in_place(&raw mut this.torch) };
        raw
    }

    /// The handle, still owned by this value.
    pub fn as_raw(&self) -> RawTensor {
        self.raw.as_ptr()
    }

    /// Makes a tensor over memory that stays the caller's. Copies nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if shape and strides have different lengths, are negative or overflow, or torch
    /// has no such dtype. [`ErrorKind::Call`] if libtorch refuses.
    ///
    /// # Safety
    /// `ptr` is on `device` and addresses every element that `shape` and `strides` reach, for as long as any
    /// tensor shares the memory. That includes outputs: a program may return its input, or a view of it.
    pub unsafe fn from_blob(
        torch: &Torch,
        ptr: *mut c_void,
        shape: &[i64],
        strides: &[i64],
        dtype: Dtype,
        device: Device,
    ) -> Result<Self> {
        // SAFETY: takes nothing.
        let layout = unsafe { (torch.shim().layout_strided.call)() };
        // SAFETY: the caller vouches for the memory.
        unsafe { Self::over(torch, ptr, (shape, strides), dtype, device, (layout, &[])) }
    }

    /// Makes a oneDNN tensor over memory that stays the caller's. Copies the descriptor alone.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses, or was built without oneDNN.
    ///
    /// # Safety
    /// `ptr` addresses every byte that `descriptor`, a genuine one, reaches, for as long as any tensor shares the memory.
    pub(crate) unsafe fn packed(
        torch: &Torch,
        ptr: *mut c_void,
        shape: &[i64],
        dtype: Dtype,
        device: Device,
        descriptor: &[u8],
    ) -> Result<Self> {
        let Some(layout) = &torch.shim().layout_mkldnn else {
            return Err(Error::new(ErrorKind::Symbol, "this libtorch has no oneDNN"));
        };
        // SAFETY: takes nothing.
        let layout = unsafe { (layout.call)() };
        // SAFETY: the caller vouches for the memory and the descriptor. Strides mean nothing in this layout.
        unsafe { Self::over(torch, ptr, (shape, &contiguous_strides(shape)), dtype, device, (layout, descriptor)) }
    }

    /// A tensor over memory in some layout, with what that asks for.
    ///
    /// # Safety
    /// The caller vouches for the memory.
    unsafe fn over(
        torch: &Torch,
        ptr: *mut c_void,
        (shape, strides): (&[i64], &[i64]),
        dtype: Dtype,
        device: Device,
        (layout, metadata): (i32, &[u8]),
    ) -> Result<Self> {
        let (ndim, code) = checked(shape, strides, dtype)?;
        let shim = torch.shim();
        let mut raw = null_mut();
        let nbytes = i64::try_from(metadata.len()).map_err(|_| Error::usage("metadata is too long"))?;
        // SAFETY: both arrays have `ndim` elements, `metadata` has `nbytes` bytes, and all are copied; the caller vouches
        // for the memory.
        let status = unsafe {
            (shim.from_blob.call)(
                ptr,
                ndim,
                shape.as_ptr(),
                strides.as_ptr(),
                0,
                code,
                device.kind,
                device.index,
                &raw mut raw,
                layout,
                if metadata.is_empty() { std::ptr::null() } else { metadata.as_ptr() },
                nbytes,
            )
        };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(torch, &shim.from_blob, status, raw) }
    }

    /// Allocates a tensor on `device`. Its elements are not initialised.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] as for [`Tensor::from_blob`]; [`ErrorKind::Call`] if libtorch refuses, such as
    /// for want of memory.
    pub fn empty(torch: &Torch, shape: &[i64], strides: &[i64], dtype: Dtype, device: Device) -> Result<Self> {
        let (ndim, code) = checked(shape, strides, dtype)?;
        let shim = torch.shim();
        let (kind, index) = (device.kind, device.index);
        let mut raw = null_mut();
        // SAFETY: both arrays have `ndim` elements and are copied; `raw` is writable.
        let status = unsafe {
            let (shape, strides) = (shape.as_ptr(), strides.as_ptr());
            (shim.empty_strided.call)(ndim, shape, strides, code, kind, index, &raw mut raw)
        };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(torch, &shim.empty_strided, status, raw) }
    }

    /// Makes a contiguous tensor in host memory that holds a copy of `bytes`, in the byte order of the host.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `bytes` is not as long as `shape` and `dtype` say; else as [`Tensor::empty`].
    pub fn from_bytes(torch: &Torch, bytes: &[u8], shape: &[i64], dtype: Dtype) -> Result<Self> {
        Self::with_strides(torch, bytes, shape, &contiguous_strides(shape), dtype)
    }

    /// As [`from_bytes`](Self::from_bytes), with strides that leave no gap; `bytes` are in the order of memory.
    pub(crate) fn with_strides(
        torch: &Torch,
        bytes: &[u8],
        shape: &[i64],
        strides: &[i64],
        dtype: Dtype,
    ) -> Result<Self> {
        let wanted = extent_nbytes(shape, strides, dtype);
        if wanted != u64::try_from(bytes.len()).ok() {
            let wanted = wanted.map_or_else(|| "no countable".to_owned(), |nbytes| nbytes.to_string());
            let found = bytes.len();
            let message = format!("tensor {shape:?} of {dtype}: found {found} bytes, want {wanted}");
            return Err(Error::usage(message));
        }
        let tensor = Self::empty(torch, shape, strides, dtype, Device::CPU)?;
        if !bytes.is_empty() {
            let to = tensor.data_ptr()?.cast::<u8>();
            // SAFETY: the new tensor has exactly that many bytes to its last element, and nobody else knows it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
        Ok(tensor)
    }

    /// Makes a second handle to the same memory. Copies no element.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses.
    pub fn try_clone(&self) -> Result<Self> {
        let shim = self.torch.shim();
        let mut raw = null_mut();
        // SAFETY: `self.raw` is live (invariant of the type) and `raw` is writable.
        let status = unsafe { (shim.new_handle.call)(self.as_raw(), &raw mut raw) };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(&self.torch, &shim.new_handle, status, raw) }
    }

    /// Copies the elements into memory of the new tensor's own, on the same device, with the same strides.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses, such as for want of memory.
    pub fn try_copy(&self) -> Result<Self> {
        let shim = self.torch.shim();
        let clone = shim.clone_strided.as_ref().unwrap_or(&shim.clone);
        let mut raw = null_mut();
        // SAFETY: `self.raw` is live (invariant of the type) and `raw` is writable.
        let status = unsafe { (clone.call)(self.as_raw(), &raw mut raw) };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(&self.torch, clone, status, raw) }
    }

    /// Copies the elements into memory without gaps, on the same device.
    pub(crate) fn try_compact(&self) -> Result<Self> {
        let clone = &self.torch.shim().clone;
        let mut raw = null_mut();
        // SAFETY: `self.raw` is live (invariant of the type) and `raw` is writable.
        let status = unsafe { (clone.call)(self.as_raw(), &raw mut raw) };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(&self.torch, clone, status, raw) }
    }

    /// The type of the elements.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] for a code that [`Dtype`] has no name for.
    pub fn dtype(&self) -> Result<Dtype> {
        let mut code = 0;
        let get = &self.torch.shim().dtype;
        // SAFETY: `self.raw` is live (invariant of the type) and `code` is writable.
        self.torch.check(get, unsafe { (get.call)(self.as_raw(), &raw mut code) })?;
        Dtype::from_c10(code).ok_or_else(|| Error::mismatch(format!("dtype code {code} is not known")))
    }

    /// Elements per dimension.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses, as it does for a tensor that is not defined.
    pub fn shape(&self) -> Result<Vec<i64>> {
        self.with_shape(<[i64]>::to_vec)
    }

    /// Elements between neighbours, per dimension.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses, as it does for layouts without strides.
    pub fn strides(&self) -> Result<Vec<i64>> {
        self.with_strides_of(<[i64]>::to_vec)
    }

    /// What a look at [`shape`](Self::shape) gives; allocates nothing.
    pub(crate) fn with_shape<T>(&self, look: impl FnOnce(&[i64]) -> T) -> Result<T> {
        let sizes = &self.torch.shim().sizes;
        // SAFETY: `self.raw` is live (invariant of the type).
        self.dimensions(|out| self.torch.check(sizes, unsafe { (sizes.call)(self.as_raw(), out) }), look)
    }

    /// What a look at [`strides`](Self::strides) gives; allocates nothing.
    pub(crate) fn with_strides_of<T>(&self, look: impl FnOnce(&[i64]) -> T) -> Result<T> {
        let strides = &self.torch.shim().strides;
        // SAFETY: `self.raw` is live (invariant of the type).
        self.dimensions(|out| self.torch.check(strides, unsafe { (strides.call)(self.as_raw(), out) }), look)
    }

    /// Where the elements are now, and how they lie there.
    ///
    /// # Errors
    /// As [`dtype`](Self::dtype), [`shape`](Self::shape), [`strides`](Self::strides) and [`data_ptr`](Self::data_ptr).
    pub fn placement(&self) -> Result<Placement> {
        let (dtype, shape, strides) = (self.dtype()?, self.shape()?, self.strides()?);
        Ok(Placement { address: self.data_ptr()?.addr(), dtype, shape, strides })
    }

    /// Whether the elements are where they were, in the same layout. Setting `data` or resizing moves them. Allocates
    /// nothing.
    ///
    /// # Errors
    /// As [`placement`](Self::placement).
    pub fn is_at(&self, placement: &Placement) -> Result<bool> {
        Ok(self.data_ptr()?.addr() == placement.address
            && self.dtype()? == placement.dtype
            && self.with_shape(|shape| shape == placement.shape)?
            && self.with_strides_of(|strides| strides == placement.strides)?)
    }

    /// Where the tensor lives.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses.
    pub fn device(&self) -> Result<Device> {
        let shim = self.torch.shim();
        let (mut kind, mut index) = (0, 0);
        // SAFETY: `self.raw` is live (invariant of the type) and `kind` is writable.
        let status = unsafe { (shim.device_type.call)(self.as_raw(), &raw mut kind) };
        self.torch.check(&shim.device_type, status)?;
        // SAFETY: the same, and `index` is writable.
        let status = unsafe { (shim.device_index.call)(self.as_raw(), &raw mut index) };
        self.torch.check(&shim.device_index, status)?;
        Ok(Device { kind, index })
    }

    /// The address of the first element, on the tensor's device; null for some tensors without elements.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses, as it does for tensors without storage.
    pub fn data_ptr(&self) -> Result<*mut c_void> {
        let mut ptr = null_mut();
        let get = &self.torch.shim().data_ptr;
        // SAFETY: `self.raw` is live (invariant of the type) and `ptr` is writable.
        self.torch.check(get, unsafe { (get.call)(self.as_raw(), &raw mut ptr) })?;
        Ok(ptr)
    }

    /// Bytes of the whole storage, which other tensors may share and this one may view a part of.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses.
    pub fn storage_nbytes(&self) -> Result<u64> {
        let mut nbytes = 0;
        let get = &self.torch.shim().storage_size;
        // SAFETY: `self.raw` is live (invariant of the type) and `nbytes` is writable.
        self.torch.check(get, unsafe { (get.call)(self.as_raw(), &raw mut nbytes) })?;
        u64::try_from(nbytes).map_err(|_| negative("storage size", nbytes))
    }

    /// Elements from the start of the storage to the first element.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses.
    pub fn storage_offset(&self) -> Result<u64> {
        let mut offset = 0;
        let get = &self.torch.shim().storage_offset;
        // SAFETY: `self.raw` is live (invariant of the type) and `offset` is writable.
        self.torch.check(get, unsafe { (get.call)(self.as_raw(), &raw mut offset) })?;
        u64::try_from(offset).map_err(|_| negative("storage offset", offset))
    }

    /// Makes a tensor of its own over the same storage. Copies no element. Unlike another handle it keeps that storage when
    /// this tensor is given another one, as setting `data` in Python does.
    ///
    /// # Errors
    /// [`ErrorKind::Call`] if libtorch refuses.
    pub fn of_storage(&self) -> Result<Self> {
        let (shape, strides) = (self.shape()?, self.strides()?);
        let ndim = i64::try_from(shape.len()).map_err(|_| Error::usage("more dimensions than can be counted"))?;
        let make = &self.torch.shim().reinterpret;
        let mut raw = null_mut();
        // SAFETY: `self.raw` is live (invariant of the type), both arrays have `ndim` elements, `raw` is writable.
        let status = unsafe { (make.call)(self.as_raw(), ndim, shape.as_ptr(), strides.as_ptr(), 0, &raw mut raw) };
        // SAFETY: `raw` is what the call wrote, or null still.
        unsafe { Self::created(&self.torch, make, status, raw) }
    }

    /// The bytes of a contiguous tensor in host memory. Copies nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if the tensor is elsewhere or has gaps; [`Tensor::try_copy`] does not close gaps.
    ///
    /// # Safety
    /// The elements are initialised, and nobody writes to the memory while the slice lives.
    pub unsafe fn bytes(&self) -> Result<&[u8]> {
        let (shape, strides) = (self.shape()?, self.strides()?);
        if !is_contiguous(&shape, &strides) {
            let found = format!("{shape:?} with strides {strides:?}");
            return Err(Error::usage(format!("bytes of a tensor: found {found}, want contiguous")));
        }
        // SAFETY: contiguous, so there is nothing but elements; the caller vouches for the rest.
        unsafe { self.extent() }
    }

    /// The bytes from the first element to the end of the last one, in host memory. Copies nothing.
    ///
    /// # Safety
    /// As [`bytes`](Self::bytes), and there are no gaps between elements.
    pub(crate) unsafe fn extent(&self) -> Result<&[u8]> {
        let (shape, strides, device) = (self.shape()?, self.strides()?, self.device()?);
        if !device.is_host() {
            return Err(Error::usage(format!("bytes of a tensor: found it on {device}, want it on the host")));
        }
        let nbytes = extent_nbytes(&shape, &strides, self.dtype()?);
        let nbytes = nbytes.and_then(|nbytes| usize::try_from(nbytes).ok());
        let nbytes = nbytes.ok_or_else(|| Error::usage(format!("bytes of {shape:?} overflow")))?;
        let ptr = self.data_ptr()?.cast_const().cast::<u8>();
        if nbytes == 0 || ptr.is_null() {
            return Ok(&[]);
        }
        // SAFETY: these bytes are the tensor's; the caller vouches for the rest.
        Ok(unsafe { std::slice::from_raw_parts(ptr, nbytes) })
    }

    /// Looks at an array with one element per dimension that libtorch lends out.
    fn dimensions<T>(&self, get: impl Fn(*mut *mut i64) -> Result<()>, look: impl FnOnce(&[i64]) -> T) -> Result<T> {
        let mut ndim = 0;
        let dim = &self.torch.shim().dim;
        // SAFETY: `self.raw` is live (invariant of the type) and `ndim` is writable.
        self.torch.check(dim, unsafe { (dim.call)(self.as_raw(), &raw mut ndim) })?;
        let ndim = usize::try_from(ndim).map_err(|_| negative("number of dimensions", ndim))?;
        let mut array = null_mut();
        get(&raw mut array)?;
        if ndim == 0 || array.is_null() {
            return Ok(look(&[]));
        }
        // SAFETY: libtorch lends `ndim` elements for as long as the tensor lives unchanged, and the look ends here.
        Ok(look(unsafe { std::slice::from_raw_parts(array, ndim) }))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // The status is not looked at: there is nothing left to do with a handle that cannot be deleted.
        // SAFETY: `self.raw` is live and ours (invariant of the type); this is its last use.
        unsafe { (self.torch.shim().delete.call)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("shape", &self.shape().ok())
            .field("dtype", &self.dtype().ok())
            .field("device", &self.device().ok())
            .finish_non_exhaustive()
    }
}

#[cold]
fn negative(what: &str, found: i64) -> Error {
    Error::new(ErrorKind::Call, format!("{what} of a tensor: found {found}, want 0 or more"))
}

/// Checks what would make libtorch compute a size that wraps; returns the number of dimensions and the dtype's code.
fn checked(shape: &[i64], strides: &[i64], dtype: Dtype) -> Result<(i64, i32)> {
    let code = dtype.c10().ok_or_else(|| Error::usage(format!("torch has no dtype {dtype}")))?;
    let extent = extent_nbytes(shape, strides, dtype).and_then(|nbytes| i64::try_from(nbytes).ok());
    let ndim = i64::try_from(shape.len()).ok();
    match (extent, ndim) {
        (Some(_), Some(ndim)) => Ok((ndim, code)),
        _ => Err(Error::usage(format!(
            "tensor of {dtype}: found shape {shape:?} with strides {strides:?}; want as many of each, none \
             negative, and a size that fits"
        ))),
    }
}

/// Bytes from the first element to the end of the last one; `None` if a number is negative, missing or overflows.
pub(crate) fn extent_nbytes(shape: &[i64], strides: &[i64], dtype: Dtype) -> Option<u64> {
    if shape.len() != strides.len() || shape.iter().chain(strides).any(|&number| number < 0) {
        return None;
    }
    if shape.contains(&0) {
        return Some(0);
    }
    let numel = shape.iter().zip(strides).try_fold(1_u64, |numel, (&size, &stride)| {
        let steps = u64::try_from(size - 1).ok()?;
        numel.checked_add(steps.checked_mul(u64::try_from(stride).ok()?)?)
    })?;
    dtype.nbytes(numel)
}

/// The strides of a tensor without gaps, last dimension fastest. A size that overflows saturates.
pub fn contiguous_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1_i64; shape.len()];
    for dimension in (1..shape.len()).rev() {
        strides[dimension - 1] = strides[dimension].saturating_mul(shape[dimension].max(1));
    }
    strides
}

/// Whether elements follow one another without gaps; the stride of a dimension of one element says nothing.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let expected = contiguous_strides(shape);
    let same = |((size, stride), expected): ((&i64, &i64), &i64)| *size <= 1 || stride == expected;
    shape.contains(&0) || shape.iter().zip(strides).zip(&expected).all(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_count_to_the_last_element() {
        let extent = |shape: &[i64], strides: &[i64]| extent_nbytes(shape, strides, Dtype::F32);
        assert_eq!(extent(&[], &[]), Some(4));
        assert_eq!(extent(&[2, 3], &[3, 1]), Some(24));
        assert_eq!(extent(&[2, 3], &[8, 1]), Some(44));
        assert_eq!(extent(&[2, 0], &[9, 1]), Some(0));
        assert_eq!(extent(&[4], &[0]), Some(4));
        assert_eq!(extent(&[2], &[]), None);
        assert_eq!(extent(&[-1], &[1]), None);
        assert_eq!(extent(&[i64::MAX, 3], &[i64::MAX, 1]), None);
    }

    #[test]
    fn contiguous_is_what_torch_calls_contiguous() {
        assert_eq!(contiguous_strides(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(contiguous_strides(&[2, 0, 4]), [4, 4, 1]);
        assert!(is_contiguous(&[1, 3], &[77, 1]));
        assert!(is_contiguous(&[0, 3], &[5, 9]));
        assert!(!is_contiguous(&[3, 2], &[1, 3]));
    }
}
