//! What weights are, on both sides: the constants a program was compiled with, and the bytes bound to them.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use reweft::Dtype;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, extent_nbytes};
use crate::torch::Torch;

/// Rows of programs with any constant on the host are padded to this many bytes.
const ROW_ALIGNMENT: u64 = 64;

/// What a constant was in the source of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConstantKind {
    /// The compiler did not say, or said something newer than this version.
    Unknown,
    /// An `nn.Parameter`.
    Parameter,
    /// A registered buffer. A program may write to it; nothing in the library tells which ones.
    Buffer,
    /// A tensor that was neither, such as a plain attribute.
    TensorConstant,
    /// Computed by the program from other constants.
    FoldedConstant,
}

impl ConstantKind {
    /// Reads the code of `torch::aot_inductor::ConstantType`.
    pub(crate) fn from_code(code: i32) -> Self {
        match code {
            1 => Self::Parameter,
            2 => Self::Buffer,
            3 => Self::TensorConstant,
            4 => Self::FoldedConstant,
            _ => Self::Unknown,
        }
    }
}

/// A constant of a compiled program. Its shape and strides are not to be had from the library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constant {
    /// The name in the compiled code (`fc_weight`), by which it is bound.
    pub name: String,
    /// The name in the source (`fc.weight`), by which checkpoints know it.
    pub fqn: String,
    /// The type of its elements; `None` for a code that [`Dtype`] has no name for.
    pub dtype: Option<Dtype>,
    /// Bytes of its row: the whole storage, padded to 64 unless every constant is on a GPU.
    pub nbytes: u64,
    /// What it was in the source.
    pub kind: ConstantKind,
    /// Whether the program computes it, so that it is never bound.
    pub folded: bool,
}

/// New bytes for one constant, together with what keeps them alive.
///
/// The bytes are used where they are; nothing is copied. Once a [`Container`](crate::Container) has taken the
/// binding it holds `keep` until no call can read the bytes any more.
pub struct Binding {
    name: String,
    ptr: *mut c_void,
    shape: Vec<i64>,
    strides: Vec<i64>,
    dtype: Dtype,
    device: Device,
    storage_nbytes: Option<u64>,
    /// What oneDNN wrote of the layout, if the bytes are packed for it.
    descriptor: Vec<u8>,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: whoever made the binding vouched that the memory may be used from any thread.
unsafe impl Send for Binding {}

impl Binding {
    /// Describes the bytes for the constant called `name` in the compiled code. Reads nothing.
    ///
    /// # Safety
    /// Until `keep` is dropped, and from any thread:
    /// * `ptr` is on `device` and addresses every element that `shape` and `strides` reach;
    /// * nobody writes to that memory, except the program itself through this binding;
    /// * if the program writes to this constant (a mutated buffer, such as a counter or a cache), the memory is
    ///   writable and read by nobody else: **the program writes in place**. A read-only mapping ends in a fault.
    ///
    /// `shape` and `strides` are those the constant was compiled with, and its layout is strided; the library
    /// cannot tell, and compiled code indexes by the numbers it was compiled with.
    pub unsafe fn new(
        name: impl Into<String>,
        ptr: *mut c_void,
        shape: impl Into<Vec<i64>>,
        strides: impl Into<Vec<i64>>,
        dtype: Dtype,
        device: Device,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let (name, shape, strides) = (name.into(), shape.into(), strides.into());
        Self { name, ptr, shape, strides, dtype, device, storage_nbytes: None, descriptor: Vec::new(), keep }
    }

    /// Says that the constant was compiled as a view into a storage of `nbytes` bytes.
    ///
    /// A row has the size of the whole storage, so a view smaller than it is refused without this.
    #[must_use]
    pub fn in_storage_of(mut self, nbytes: u64) -> Self {
        self.storage_nbytes = Some(nbytes);
        self
    }

    /// Says that the bytes are packed for oneDNN as `descriptor` states; strides then mean nothing.
    ///
    /// # Safety
    /// The descriptor is what the program was compiled with, and reaches no further than the storage.
    #[must_use]
    pub(crate) unsafe fn packed_as(mut self, descriptor: &[u8]) -> Self {
        self.descriptor = descriptor.to_vec();
        self
    }

    /// The constant's name in the compiled code.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes from the first element to the end of the last; `None` if shape and strides make no sense.
    pub fn nbytes(&self) -> Option<u64> {
        extent_nbytes(&self.shape, &self.strides, self.dtype)
    }

    /// Checks everything that the library's table allows to check.
    pub(crate) fn check(&self, constant: &Constant) -> Result<()> {
        let name = &self.name;
        let differs = |what: &str, found: &dyn fmt::Display, wanted: &dyn fmt::Display| {
            Err(Error::mismatch(format!("constant \"{name}\": {what}: found {found}, want {wanted}")))
        };
        if constant.folded {
            return differs("binding", &"bytes", &"none: the program computes it");
        }
        match constant.dtype {
            Some(dtype) if dtype == self.dtype => {}
            Some(dtype) => return differs("dtype", &self.dtype, &dtype),
            None => return differs("dtype", &self.dtype, &"one that this version does not know"),
        }
        let (shape, strides) = (&self.shape, &self.strides);
        let Some(extent) = self.nbytes() else {
            let found = format!("{shape:?} with strides {strides:?}");
            return differs("shape", &found, &"as many of each, none negative, and a size that fits");
        };
        let nbytes = self.storage_nbytes.unwrap_or(extent);
        if nbytes < extent || !fills(nbytes, constant.nbytes) {
            let found = format!("{nbytes} bytes ({shape:?} with strides {strides:?})");
            let wanted = format!("{} bytes, padding included", constant.nbytes);
            return differs("size", &found, &wanted);
        }
        if extent > 0 && (self.ptr.is_null() || !self.ptr.addr().is_multiple_of(alignment(self.dtype))) {
            let found = format!("{:p}", self.ptr);
            return differs("address", &found, &format!("a multiple of {}", alignment(self.dtype)));
        }
        Ok(())
    }

    /// Makes the tensor that the library is given.
    pub(crate) fn tensor(&self, torch: &Torch) -> Result<Tensor> {
        let (shape, strides) = (&self.shape, &self.strides);
        if !self.descriptor.is_empty() {
            // SAFETY: as below; `packed_as`'s caller vouched for the descriptor.
            return unsafe { Tensor::packed(torch, self.ptr, shape, self.dtype, self.device, &self.descriptor) };
        }
        // SAFETY: `new`'s caller vouched for the memory while `keep` lives. The container holds `keep` for as
        // long as the library may read through its copy of this handle.
        unsafe { Tensor::from_blob(torch, self.ptr, shape, strides, self.dtype, self.device) }
    }
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binding")
            .field("name", &self.name)
            .field("shape", &self.shape)
            .field("strides", &self.strides)
            .field("dtype", &self.dtype)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Whether `nbytes` fill a row up to its padding.
fn fills(nbytes: u64, row_nbytes: u64) -> bool {
    nbytes <= row_nbytes && row_nbytes - nbytes < ROW_ALIGNMENT
}

/// What the C++ type of an element is aligned to.
fn alignment(dtype: Dtype) -> usize {
    dtype.itemsize().and_then(|itemsize| usize::try_from(itemsize).ok()).unwrap_or(1).max(1)
}

/// The weights that calls may be reading: what owns them, and where they are.
#[derive(Default)]
pub(crate) struct Weights {
    /// Start and end addresses, sorted, without overlaps.
    ranges: Vec<(usize, usize)>,
    /// Held, never looked at.
    _keeps: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Weights {
    pub fn bound(bindings: Vec<Binding>) -> Self {
        let range = |binding: &Binding| range(binding.ptr, binding.nbytes().unwrap_or(0));
        let ranges = merge(bindings.iter().map(range).collect());
        Self { ranges, _keeps: bindings.into_iter().map(|binding| binding.keep).collect() }
    }

    /// Weights that the container owns.
    pub fn inside(tensors: &[Tensor]) -> Self {
        let range = |tensor: &Tensor| Some(range(tensor.data_ptr().ok()?, tensor.storage_nbytes().ok()?));
        Self { ranges: merge(tensors.iter().filter_map(range).collect()), _keeps: Vec::new() }
    }

    /// Whether `ptr` is in memory that goes away with these weights.
    pub fn contain(&self, ptr: *const c_void) -> bool {
        let after = self.ranges.partition_point(|&(start, _)| start <= ptr.addr());
        after > 0 && ptr.addr() < self.ranges[after - 1].1
    }
}

fn range(ptr: *mut c_void, nbytes: u64) -> (usize, usize) {
    let end = ptr.addr().saturating_add(usize::try_from(nbytes).unwrap_or(usize::MAX));
    (ptr.addr(), end)
}

/// Sorts ranges and joins those that touch; tied weights are bound to the same memory twice.
fn merge(mut ranges: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    ranges.sort_unstable();
    let mut merged: Vec<(usize, usize)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn constant() -> Constant {
        let (name, fqn) = ("fc_weight".to_owned(), "fc.weight".to_owned());
        let (dtype, kind) = (Some(Dtype::F32), ConstantKind::Parameter);
        Constant { name, fqn, dtype, nbytes: 64, kind, folded: false }
    }

    fn binding(address: usize, shape: &[i64], dtype: Dtype) -> Binding {
        let ptr = std::ptr::without_provenance_mut(address);
        let strides = crate::contiguous_strides(shape);
        // SAFETY: the binding is only checked, and a check reads nothing.
        unsafe { Binding::new("fc_weight", ptr, shape, strides, dtype, Device::CPU, Arc::new(())) }
    }

    #[test]
    fn a_binding_that_does_not_fit_is_refused() {
        let row = constant();
        assert!(binding(64, &[3, 4], Dtype::F32).check(&row).is_ok());
        assert!(binding(64, &[4, 4], Dtype::F32).check(&row).is_ok());
        assert!(binding(64, &[2], Dtype::F32).in_storage_of(64).check(&row).is_ok());
        let refused = [
            (binding(64, &[3, 4], Dtype::F64), "dtype"),
            (binding(64, &[5, 4], Dtype::F32), "size"),
            (binding(64, &[0], Dtype::F32), "size"),
            (binding(64, &[5, 4], Dtype::F32).in_storage_of(64), "size"),
            (binding(66, &[3, 4], Dtype::F32), "address"),
            (binding(0, &[3, 4], Dtype::F32), "address"),
            (binding(64, &[-3, 4], Dtype::F32), "shape"),
        ];
        for (binding, word) in refused {
            let error = binding.check(&row).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Mismatch);
            assert!(error.to_string().contains(&format!(": {word}: found")), "{error}");
        }
        let folded = Constant { folded: true, ..row };
        assert!(binding(64, &[4, 4], Dtype::F32).check(&folded).is_err());
    }

    #[test]
    fn ranges_are_found_by_any_address_inside() {
        let weights = Weights { ranges: merge(vec![(40, 50), (10, 30), (15, 20), (30, 35)]), _keeps: Vec::new() };
        assert_eq!(weights.ranges, [(10, 35), (40, 50)]);
        let inside = |address| weights.contain(std::ptr::without_provenance(address));
        assert!([10, 29, 34, 40, 49].into_iter().all(inside));
        assert!(![0, 9, 35, 39, 50].into_iter().any(inside));
    }
}
