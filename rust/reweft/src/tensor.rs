//! What is known of a tensor without its bytes: dtype, shape, strides, and its window of a storage.

use serde::Serialize;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Most dimensions a tensor may have; torch's own limit.
pub const MAX_DIMS: usize = 64;

/// A view of a storage. Strides and offset count elements, as in torch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorInfo {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension; empty for a 0-dim tensor, which holds one element.
    pub shape: Vec<u64>,
    /// Elements between neighbours along each dimension; as long as `shape`, 0 where a value is repeated.
    pub strides: Vec<u64>,
    /// Which storage of the checkpoint; tensors with one number share bytes.
    pub storage: usize,
    /// The first element within the storage.
    pub storage_offset: u64,
}

impl TensorInfo {
    /// Elements, counting repeated ones.
    pub fn numel(&self) -> u64 {
        numel(&self.shape).unwrap_or(u64::MAX)
    }

    /// Bytes the tensor takes when it is contiguous.
    pub fn nbytes(&self) -> u64 {
        self.dtype.nbytes(self.numel()).unwrap_or(u64::MAX)
    }

    /// Whether elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        same_layout(&self.shape, &self.strides, &contiguous(&self.shape))
    }

    /// The bytes of the storage that the tensor's elements lie in: first byte and length.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a rank mismatch, overflow, or a window that is larger than
    /// `storage_nbytes`.
    pub fn window(&self, storage_nbytes: u64) -> Result<(u64, u64)> {
        let Self { shape, strides, .. } = self;
        if shape.len() != strides.len() || shape.len() > MAX_DIMS {
            let (sizes, steps) = (shape.len(), strides.len());
            return Err(Error::format(format!("{sizes} sizes and {steps} strides; at most {MAX_DIMS} of each")));
        }
        let overflow = || Error::format(format!("shape {shape:?} with strides {strides:?} overflows"));
        numel(shape).and_then(|numel| self.dtype.nbytes(numel)).ok_or_else(overflow)?;
        let elements = span(shape, strides).ok_or_else(overflow)?;
        let start = self.dtype.nbytes(self.storage_offset).ok_or_else(overflow)?;
        let nbytes = self.dtype.nbytes(elements).ok_or_else(overflow)?;
        if nbytes == 0 {
            return Ok((0, 0));
        }
        match start.checked_add(nbytes) {
            Some(end) if end <= storage_nbytes => Ok((start, nbytes)),
            _ => Err(Error::format(format!(
                "shape {shape:?} with strides {strides:?} at {start} needs {} bytes, storage has {storage_nbytes}",
                start.saturating_add(nbytes)
            ))),
        }
    }
}

/// Product of the sizes; `None` if it overflows.
pub fn numel(shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size))
}

/// Strides of the row-major layout of `shape`, as torch states them for empty dimensions too.
pub fn contiguous(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1_u64; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim].max(1));
    }
    strides
}

/// Elements from the first to the last one, both included; `None` if that overflows.
pub fn span(shape: &[u64], strides: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let steps = shape
        .iter()
        .zip(strides)
        .try_fold(0_u64, |sum, (size, stride)| sum.checked_add((size - 1).checked_mul(*stride)?));
    steps?.checked_add(1)
}

/// Whether two strides place every element alike: dimensions of one element do not count, empty tensors are alike.
pub fn same_layout(shape: &[u64], left: &[u64], right: &[u64]) -> bool {
    shape.contains(&0) || shape.iter().zip(left.iter().zip(right)).all(|(size, (a, b))| *size == 1 || a == b)
}

/// Whether the elements fill their span exactly once: row-major order, channels last, or any other permutation.
pub fn is_dense(shape: &[u64], strides: &[u64]) -> bool {
    let mut dims: Vec<(u64, u64)> =
        strides.iter().copied().zip(shape.iter().copied()).filter(|(_, size)| *size != 1).collect();
    dims.sort_unstable();
    let mut step = 1_u64;
    shape.contains(&0)
        || dims.into_iter().all(|(stride, size)| {
            let fits = stride == step;
            step = step.saturating_mul(size);
            fits
        })
}

/// Dtype and shape as messages state them: `float32 [16, 3]`.
pub fn describe(dtype: Dtype, shape: &[u64]) -> String {
    format!("{dtype} {shape:?}")
}

/// Where two tensors stand in bytes, for reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Name of the dtype.
    pub dtype: &'static str,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// Elements between neighbours along each dimension.
    pub strides: Vec<u64>,
    /// Bytes of the elements.
    pub nbytes: u64,
}

impl From<&TensorInfo> for Layout {
    fn from(info: &TensorInfo) -> Self {
        Self {
            dtype: info.dtype.name(),
            shape: info.shape.clone(),
            strides: info.strides.clone(),
            nbytes: info.nbytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(shape: &[u64], strides: &[u64], storage_offset: u64) -> TensorInfo {
        TensorInfo { dtype: Dtype::F32, shape: shape.into(), strides: strides.into(), storage: 0, storage_offset }
    }

    #[test]
    fn window_is_checked_against_the_storage() {
        assert_eq!(info(&[2, 3], &[3, 1], 1).window(28).unwrap(), (4, 24));
        assert!(info(&[2, 3], &[3, 1], 2).window(28).is_err());
        assert!(info(&[2], &[3, 1], 0).window(28).is_err());
        assert!(info(&[u64::MAX, u64::MAX], &[1, 1], 0).window(28).is_err());
        assert!(info(&[3], &[u64::MAX], 0).window(28).is_err());
        assert_eq!(info(&[0, 9], &[9, 1], 99).window(0).unwrap(), (0, 0));
        assert_eq!(info(&[1000], &[0], 0).window(4).unwrap(), (0, 4));
    }

    #[test]
    fn layouts() {
        assert_eq!(contiguous(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(contiguous(&[2, 0, 4]), [4, 4, 1]);
        assert!(is_dense(&[2, 3, 4, 4], &[48, 1, 12, 3]), "channels last");
        assert!(!is_dense(&[2, 3], &[4, 1]), "gap");
        assert!(!is_dense(&[2, 3], &[0, 1]), "repeated");
        assert!(is_dense(&[], &[]) && is_dense(&[1], &[7]));
        assert!(same_layout(&[1, 4], &[99, 1], &[4, 1]));
    }
}
