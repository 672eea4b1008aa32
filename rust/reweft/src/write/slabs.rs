//! Tensors in pieces: slabs along the outer dimensions. Each slab is a tensor of its own that is neighbour to the next in
//! row-major order.

use crate::checkpoint::Storage;
use crate::error::Result;
use crate::tensor::TensorInfo;

/// Bytes of a slab.
pub(super) const SLAB_NBYTES: u64 = 8 << 20;
/// A slab whose elements lie this many times farther apart than they take is no cheaper to read than the whole.
const SPREAD: u64 = 4;

/// Cuts a tensor along its outer dimensions.
pub(super) struct Slabs<'a> {
    info: &'a TensorInfo,
    /// The dimension that is cut into runs; all before it are walked one by one. `None` for the whole tensor.
    dim: Option<usize>,
    /// Indices along the cut dimension that a slab takes.
    run: u64,
    /// Where the next slab starts; `None` when all are done.
    index: Option<Vec<u64>>,
}

impl<'a> Slabs<'a> {
    fn whole(info: &'a TensorInfo) -> Self {
        Self { info, dim: None, run: 0, index: Some(Vec::new()) }
    }

    /// Slabs of at most [`SLAB_NBYTES`], or the whole where a part would cost as much.
    pub fn of(info: &'a TensorInfo, storage: &Storage) -> Result<Self> {
        if storage.reads_in_pieces() { Self::cut(info, storage.nbytes) } else { Ok(Self::whole(info)) }
    }

    fn cut(info: &'a TensorInfo, storage_nbytes: u64) -> Result<Self> {
        // Elements of less than a byte cannot be cut apart everywhere.
        if info.nbytes() <= SLAB_NBYTES || info.dtype.itemsize().is_none() {
            return Ok(Self::whole(info));
        }
        // The outermost dimension whose rows fit a slab; some do, because a single element does.
        let mut row = info.nbytes();
        for (dim, size) in info.shape.iter().enumerate() {
            row /= size;
            if row > SLAB_NBYTES || row == 0 {
                continue;
            }
            let run = (SLAB_NBYTES / row).min(*size);
            let slabs = Self { info, dim: Some(dim), run, index: Some(vec![0; dim + 1]) };
            let first = slabs.slab(&vec![0; dim + 1], dim);
            let (_, window) = first.window(storage_nbytes)?;
            return Ok(if window <= first.nbytes().saturating_mul(SPREAD) { slabs } else { Self::whole(info) });
        }
        Ok(Self::whole(info))
    }

    /// The slab that starts at `index`.
    fn slab(&self, index: &[u64], dim: usize) -> TensorInfo {
        let mut slab = self.info.clone();
        for (place, start) in index.iter().enumerate() {
            slab.storage_offset += start * slab.strides[place];
            slab.shape[place] = if place == dim { self.run.min(self.info.shape[dim] - start) } else { 1 };
        }
        slab
    }
}

impl Iterator for Slabs<'_> {
    type Item = TensorInfo;

    fn next(&mut self) -> Option<TensorInfo> {
        let mut index = self.index.take()?;
        let Some(dim) = self.dim else { return Some(self.info.clone()) };
        let slab = self.slab(&index, dim);
        // Count like an odometer whose last wheel turns by whole runs.
        let mut step = self.run;
        for place in (0..=dim).rev() {
            index[place] += step;
            if index[place] < self.info.shape[place] {
                self.index = Some(index);
                break;
            }
            index[place] = 0;
            step = 1;
        }
        Some(slab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::tensor::contiguous;

    fn info(shape: &[u64], strides: &[u64]) -> TensorInfo {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        TensorInfo { dtype: Dtype::F32, shape, strides, storage: 0, storage_offset: 3 }
    }

    #[test]
    fn slabs_cover_the_tensor_in_order() {
        let mega = 1 << 20;
        for (shape, strides, count) in [
            (vec![5 * mega], vec![1], 3),
            (vec![5 * mega], vec![2], 3),
            (vec![5, 2 * mega], vec![2 * mega + 7, 1], 5),
            (vec![5, mega], vec![mega + 7, 1], 3),
            (vec![3, 5, mega], vec![9 * mega, mega, 1], 9),
            (vec![1, 3, 3 * mega], vec![0, 0, 1], 6),
            (vec![4, 4], vec![1, 4], 1),
        ] {
            let tensor = info(&shape, &strides);
            let slabs: Vec<_> = Slabs::cut(&tensor, u64::MAX).unwrap().collect();
            assert_eq!(slabs.len(), count, "{shape:?}");
            assert!(slabs.iter().all(|slab| slab.nbytes() <= SLAB_NBYTES));
            assert_eq!(slabs.iter().map(TensorInfo::nbytes).sum::<u64>(), tensor.nbytes());
            // Where each slab's first element stands in row-major order is where the slabs before it end.
            let (mut done, row_major) = (0, contiguous(&shape));
            for slab in slabs {
                let mut rest = done;
                let at: u64 = row_major
                    .iter()
                    .zip(&strides)
                    .map(|(size, stride)| {
                        let index = rest / size;
                        rest %= size;
                        index * stride
                    })
                    .sum();
                assert_eq!(slab.storage_offset, 3 + at, "{shape:?}");
                done += slab.numel();
            }
        }
    }

    #[test]
    fn a_large_transposed_tensor_stays_whole() {
        let tensor = info(&[4096, 4096], &[1, 4096]);
        assert_eq!(Slabs::cut(&tensor, u64::MAX).unwrap().count(), 1);
    }
}
