//! Two tensors of one shape, piece by piece: the elements of both that stand at the same indices.

use std::cmp::Reverse;

use super::elements::{Elements, Tally, is_comparable};
use super::side::Side;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::source::to_usize;
use crate::tensor::{TensorInfo, span};

/// Bytes of one side in memory at a time, where layouts allow.
const PIECE_NBYTES: u64 = 1 << 20;
/// How often a tensor's bytes may be read for the sake of small pieces: where layouts cross, each piece of one
/// side lies all over the other.
const MAX_REREAD: u64 = 4;

/// Compares two tensors of one shape.
pub(super) fn compare(a: &Side<'_>, b: &Side<'_>, key: &str, left: &TensorInfo, right: &TensorInfo) -> Result<Tally> {
    let mut tally = Tally::default();
    if !is_comparable(left.dtype, right.dtype) || left.shape.contains(&0) {
        return Ok(tally);
    }
    let (one, other) = (a.checkpoint(), b.checkpoint());
    one.check_repeats(key, left)?;
    other.check_repeats(key, right)?;
    let in_pieces = one.storage_of(left)?.reads_in_pieces() && other.storage_of(right)?.reads_in_pieces();
    let Some(cut) = Cut::new(left, right).filter(|_| in_pieces) else {
        let (left_bytes, right_bytes) = (one.read(key)?, other.read(key)?);
        let elements = Elements { dtype: left.dtype, bytes: &left_bytes };
        let index = |place: usize| unravel(place as u64, &left.shape);
        tally.add(&elements, &Elements { dtype: right.dtype, bytes: &right_bytes }, index)?;
        return Ok(tally);
    };
    let (mut left_bytes, mut right_bytes) = (Vec::new(), Vec::new());
    let mut position = cut.first();
    loop {
        let (view, of) = (cut.view(&position, left, |dim| dim.a), cut.view(&position, right, |dim| dim.b));
        left_bytes.resize(to_usize(view.nbytes())?, 0);
        right_bytes.resize(to_usize(of.nbytes())?, 0);
        read(one, key, &view, &mut left_bytes)?;
        read(other, key, &of, &mut right_bytes)?;
        let elements = Elements { dtype: left.dtype, bytes: &left_bytes };
        let index = |place: usize| cut.index(&position, &view.shape, place as u64, left.shape.len());
        tally.add(&elements, &Elements { dtype: right.dtype, bytes: &right_bytes }, index)?;
        if !cut.advance(&mut position) {
            return Ok(tally);
        }
    }
}

fn read(checkpoint: &Checkpoint, key: &str, view: &TensorInfo, out: &mut [u8]) -> Result<()> {
    checkpoint.read_view(view, out).map_err(|error| error.of_key(key).in_file(checkpoint.file_of(view)))
}

/// One dimension: its number, its size, and the strides of both sides in elements.
struct Dim {
    number: usize,
    size: u64,
    a: u64,
    b: u64,
}

/// How a tensor is cut: outer dimensions are walked index by index, one is walked in steps, inner ones are taken whole.
struct Cut {
    /// In the order of the bytes, as far as the sides agree on one.
    dims: Vec<Dim>,
    /// How many are walked; the last of them in steps.
    walked: usize,
    step: u64,
}

impl Cut {
    /// `None` where pieces cost too much, or elements share bytes.
    fn new(left: &TensorInfo, right: &TensorInfo) -> Option<Self> {
        let (item_a, item_b) = (left.dtype.itemsize()?, right.dtype.itemsize()?);
        let sizes = left.shape.iter().zip(left.strides.iter().zip(&right.strides)).enumerate();
        let mut dims: Vec<Dim> =
            sizes.map(|(number, (size, (a, b)))| Dim { number, size: *size, a: *a, b: *b }).collect();
        dims.retain(|dim| dim.size != 1);
        // A side that repeats its elements along a dimension has no say where that goes.
        dims.sort_by_key(|dim| Reverse((dim.a.max(dim.b), dim.a, dim.b)));
        // Elements of the inner dimensions, and how far they reach on either side.
        let (mut numel, mut reach_a, mut reach_b) = (1_u64, 1_u64, 1_u64);
        let fits = |numel: u64, reach_a: u64, reach_b: u64| {
            let nbytes = |count: u64, item: u64| count.checked_mul(item).is_some_and(|nbytes| nbytes <= PIECE_NBYTES);
            nbytes(numel, item_a.max(item_b)) && nbytes(reach_a, item_a) && nbytes(reach_b, item_b)
        };
        let mut walked = dims.len();
        let mut step = 1;
        while let Some(dim) = walked.checked_sub(1).and_then(|place| dims.get(place)) {
            let far = |count: u64, stride: u64, reach: u64| (count - 1).saturating_mul(stride).saturating_add(reach);
            let taken =
                |count: u64| fits(numel.saturating_mul(count), far(count, dim.a, reach_a), far(count, dim.b, reach_b));
            if !taken(dim.size) {
                step = largest(dim.size, taken);
                break;
            }
            (numel, reach_a, reach_b) =
                (numel * dim.size, far(dim.size, dim.a, reach_a), far(dim.size, dim.b, reach_b));
            walked -= 1;
        }
        let cut = Self { dims, walked, step };
        cut.is_cheap(left, right, numel, reach_a.saturating_mul(item_a), reach_b.saturating_mul(item_b)).then_some(cut)
    }

    /// Whether all pieces together read not much more than the tensors.
    fn is_cheap(&self, left: &TensorInfo, right: &TensorInfo, numel: u64, nbytes_a: u64, nbytes_b: u64) -> bool {
        let whole = left.numel();
        let pieces = whole / numel.max(1);
        let dim = self.walked.checked_sub(1).and_then(|place| self.dims.get(place));
        let per_step = |nbytes: u64, stride: u64, item: u64| {
            let reach = (self.step - 1).saturating_mul(stride).saturating_mul(item).saturating_add(nbytes);
            reach.saturating_mul(pieces / self.step.max(1) + 1)
        };
        let (a, b) = dim.map_or((0, 0), |dim| (dim.a, dim.b));
        let (item_a, item_b) = (left.dtype.itemsize().unwrap_or(1), right.dtype.itemsize().unwrap_or(1));
        // What reading it whole would cost: all that lies between its first and its last element.
        let bound = |info: &TensorInfo, item: u64| {
            let nbytes = span(&info.shape, &info.strides).unwrap_or(u64::MAX).saturating_mul(item);
            nbytes.max(info.nbytes()).saturating_mul(MAX_REREAD).saturating_add(PIECE_NBYTES)
        };
        per_step(nbytes_a, a, item_a) <= bound(left, item_a) && per_step(nbytes_b, b, item_b) <= bound(right, item_b)
    }

    fn first(&self) -> Vec<u64> {
        vec![0; self.walked]
    }

    /// Moves on; false at the end.
    fn advance(&self, position: &mut [u64]) -> bool {
        for (place, at) in position.iter_mut().enumerate().rev() {
            let step = if place + 1 == self.walked { self.step } else { 1 };
            let Some(dim) = self.dims.get(place) else { return false };
            *at += step;
            if *at < dim.size {
                return true;
            }
            *at = 0;
        }
        false
    }

    /// The elements at a position, as a tensor of one side.
    fn view(&self, position: &[u64], info: &TensorInfo, stride: impl Fn(&Dim) -> u64) -> TensorInfo {
        let (mut shape, mut strides) = (Vec::new(), Vec::new());
        let mut storage_offset = info.storage_offset;
        for (place, dim) in self.dims.iter().enumerate() {
            let at = position.get(place).copied().unwrap_or(0);
            // In range: `window` was checked for the whole tensor when the file was opened.
            storage_offset = storage_offset.saturating_add(at.saturating_mul(stride(dim)));
            if place + 1 >= self.walked {
                let size = if place + 1 == self.walked { self.step.min(dim.size - at) } else { dim.size };
                shape.push(size);
                strides.push(stride(dim));
            }
        }
        TensorInfo { dtype: info.dtype, shape, strides, storage: info.storage, storage_offset }
    }

    /// The index in the tensor of an element of a piece.
    fn index(&self, position: &[u64], shape: &[u64], place: u64, dims: usize) -> Vec<u64> {
        let within = unravel(place, shape);
        let first = self.dims.len() - shape.len();
        let mut index = vec![0; dims];
        for (place, dim) in self.dims.iter().enumerate() {
            let inner = place.checked_sub(first).and_then(|place| within.get(place)).copied().unwrap_or(0);
            if let Some(slot) = index.get_mut(dim.number) {
                *slot = position.get(place).copied().unwrap_or(0) + inner;
            }
        }
        index
    }
}

/// The largest count from 1 to `most` that is taken; 1 if none is.
fn largest(most: u64, taken: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (1, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if taken(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// The index of an element by its number in row-major order.
fn unravel(number: u64, shape: &[u64]) -> Vec<u64> {
    let mut rest = number;
    let mut index: Vec<u64> = shape
        .iter()
        .rev()
        .map(|size| {
            let at = rest % (*size).max(1);
            rest /= (*size).max(1);
            at
        })
        .collect();
    index.reverse();
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::tensor::contiguous;

    fn info(shape: &[u64], strides: &[u64]) -> TensorInfo {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        TensorInfo { dtype: Dtype::F32, shape, strides, storage: 0, storage_offset: 0 }
    }

    /// Every index of the tensor is in exactly one piece, at the place that both views say.
    fn check(shape: &[u64], a: &[u64], b: &[u64]) -> usize {
        let (left, right) = (info(shape, a), info(shape, b));
        let cut = Cut::new(&left, &right).unwrap();
        let mut seen = std::collections::HashSet::new();
        let (mut position, mut pieces) = (cut.first(), 0);
        loop {
            pieces += 1;
            let views = (cut.view(&position, &left, |dim| dim.a), cut.view(&position, &right, |dim| dim.b));
            assert!(views.0.nbytes() <= PIECE_NBYTES);
            for place in [0, views.0.numel() / 2, views.0.numel() - 1] {
                let index = cut.index(&position, &views.0.shape, place, shape.len());
                for (view, strides) in [(&views.0, a), (&views.1, b)] {
                    let within = unravel(place, &view.shape);
                    let there: u64 = within.iter().zip(&view.strides).map(|(at, stride)| at * stride).sum();
                    let wanted: u64 = index.iter().zip(strides).map(|(at, stride)| at * stride).sum();
                    assert_eq!(view.storage_offset + there, wanted);
                }
                seen.insert(index);
            }
            if !cut.advance(&mut position) {
                break;
            }
        }
        assert!(seen.len() >= pieces);
        pieces
    }

    #[test]
    fn pieces_cover_a_tensor() {
        assert_eq!(check(&[], &[], &[]), 1);
        assert_eq!(check(&[5], &[1], &[1]), 1);
        assert_eq!(check(&[1 << 20], &[1], &[1]), 4);
        assert_eq!(check(&[1000, 1000], &contiguous(&[1000, 1000]), &contiguous(&[1000, 1000])), 4);
        assert_eq!(check(&[1000, 1000], &[1, 1000], &[1, 1000]), 4);
        assert_eq!(check(&[3, 1, 500, 700], &[350_000, 9, 700, 1], &[400_000, 7, 750, 1]), 3 * 2);
        check(&[2000, 1000], &[0, 1], &[1000, 1]);
        check(&[700, 600], &[1200, 2], &[600, 1]);
        check(&[300, 1], &[100_000, 1], &[1, 1]);
    }

    #[test]
    fn layouts_that_cross_are_read_whole() {
        let shape = [4096, 4096];
        assert!(Cut::new(&info(&shape, &[4096, 1]), &info(&shape, &[1, 4096])).is_none());
        assert!(Cut::new(&info(&[64, 64], &[64, 1]), &info(&[64, 64], &[1, 64])).is_some(), "one piece");
    }
}
