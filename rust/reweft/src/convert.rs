//! Bytes to bytes: layout changes and casts, as plain functions over slices.

mod arithmetic;
mod cast;
mod packing;

pub use arithmetic::{Arithmetic, Operand};
pub use cast::{can_cast, cast, cast_into};
pub use packing::Packing;

use crate::error::{Error, Result};
use crate::tensor::{contiguous, same_layout};

/// Copies elements from one layout to another.
///
/// `source` begins with the tensor's first element and `target` is as long as the target layout's span. Bytes of
/// `target` that no element covers are left alone. Costs one pass; runs of neighbours are copied as one piece.
///
/// # Errors
/// [`ErrorKind::Format`](crate::ErrorKind::Format) if a slice is shorter than its layout.
pub fn relayout(
    itemsize: usize,
    shape: &[u64],
    source: &[u8],
    source_strides: &[u64],
    target: &mut [u8],
    target_strides: &[u64],
) -> Result<()> {
    let short = || Error::format(format!("layout of shape {shape:?} is larger than its bytes"));
    if shape.contains(&0) {
        return Ok(());
    }
    let (dims, run) = plan_loops(shape, source_strides, target_strides);
    let run = usize::try_from(run).ok().and_then(|run| run.checked_mul(itemsize)).ok_or_else(short)?;
    let mut index = vec![0_u64; dims.len()];
    let (mut from, mut to) = (0_usize, 0_usize);
    loop {
        let piece = from.checked_add(run).and_then(|end| source.get(from..end)).ok_or_else(short)?;
        let place = to.checked_add(run).and_then(|end| target.get_mut(to..end)).ok_or_else(short)?;
        place.copy_from_slice(piece);
        // Count like an odometer; the innermost dimension stands last.
        let Some(dim) = (0..dims.len()).rev().find(|dim| {
            index[*dim] += 1;
            let more = index[*dim] < dims[*dim].size;
            if !more {
                index[*dim] = 0;
            }
            more
        }) else {
            return Ok(());
        };
        let advance =
            |at: usize, step: i128| usize::try_from(at as i128 + step * itemsize as i128).map_err(|_| short());
        from = advance(from, dims[dim].source_step)?;
        to = advance(to, dims[dim].target_step)?;
    }
}

/// Goes to the next index in row-major order; false behind the last one.
fn count_up(index: &mut [u64], size: impl Fn(usize) -> u64) -> bool {
    for dim in (0..index.len()).rev() {
        index[dim] += 1;
        if index[dim] < size(dim) {
            return true;
        }
        index[dim] = 0;
    }
    false
}

/// One loop of the copy: how often, and how far both sides move when it counts up and all inner loops start again.
struct Loop {
    size: u64,
    source_step: i128,
    target_step: i128,
}

/// Drops dimensions of one element, merges those that both layouts walk alike, and takes the innermost run of
/// neighbours out: the loops that are left, and the elements in a run.
fn plan_loops(shape: &[u64], source: &[u64], target: &[u64]) -> (Vec<Loop>, u64) {
    let mut dims: Vec<(u64, u64, u64)> = Vec::new();
    let mut order: Vec<usize> = (0..shape.len()).filter(|dim| shape[*dim] != 1).collect();
    // Walk the target in the order of its bytes.
    order.sort_by_key(|dim| std::cmp::Reverse(target[*dim]));
    for dim in order {
        let (size, from, to) = (shape[dim], source[dim], target[dim]);
        match dims.last_mut() {
            Some(outer) if Some(outer.1) == size.checked_mul(from) && Some(outer.2) == size.checked_mul(to) => {
                *outer = (outer.0 * size, from, to);
            }
            _ => dims.push((size, from, to)),
        }
    }
    let run = match dims.last() {
        Some((size, 1, 1)) => *size,
        _ => 1,
    };
    if run > 1 {
        dims.pop();
    }
    let mut rewind = (0_i128, 0_i128);
    let mut loops: Vec<Loop> = Vec::with_capacity(dims.len());
    for (size, from, to) in dims.into_iter().rev() {
        let (from, to) = (i128::from(from), i128::from(to));
        loops.push(Loop { size, source_step: from - rewind.0, target_step: to - rewind.1 });
        let last = i128::from(size - 1);
        rewind = (rewind.0 + last * from, rewind.1 + last * to);
    }
    loops.reverse();
    (loops, run)
}

/// Gathers a strided tensor into row-major order; borrows where it is in that order already.
///
/// # Errors
/// As [`relayout`].
pub fn to_contiguous<'a>(
    itemsize: usize,
    shape: &[u64],
    strides: &[u64],
    source: &'a [u8],
) -> Result<std::borrow::Cow<'a, [u8]>> {
    let wanted = contiguous(shape);
    if same_layout(shape, strides, &wanted) {
        return Ok(source.into());
    }
    let nbytes = crate::tensor::numel(shape).and_then(|numel| numel.checked_mul(itemsize as u64));
    let mut target = crate::source::zeroed(nbytes.unwrap_or(u64::MAX))?;
    relayout(itemsize, shape, source, strides, &mut target, &wanted)?;
    Ok(target.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_and_channels_last() {
        // [[0,1,2],[3,4,5]] stored column by column
        let stored = [0_u8, 3, 1, 4, 2, 5];
        assert_eq!(&*to_contiguous(1, &[2, 3], &[1, 2], &stored).unwrap(), [0, 1, 2, 3, 4, 5]);
        let mut back = [9; 6];
        relayout(1, &[2, 3], &[0, 1, 2, 3, 4, 5], &[3, 1], &mut back, &[1, 2]).unwrap();
        assert_eq!(back, stored);
    }

    #[test]
    fn every_permutation_of_a_box_agrees_with_plain_indexing() {
        let shape = [2_u64, 3, 4];
        let source: Vec<u8> = (0..48).collect();
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut strides = [0; 3];
            let mut step = 1;
            for dim in order.into_iter().rev() {
                strides[dim] = step;
                step *= shape[dim];
            }
            let mut wanted: Vec<u8> = Vec::new();
            for (a, b, c) in (0..2).flat_map(|a| (0..3).flat_map(move |b| (0..4).map(move |c| (a, b, c)))) {
                let at = usize::try_from(a * strides[0] + b * strides[1] + c * strides[2]).unwrap() * 2;
                wanted.extend(&source[at..at + 2]);
            }
            assert_eq!(&*to_contiguous(2, &shape, &strides, &source).unwrap(), wanted, "{order:?}");
        }
    }

    #[test]
    fn repeated_and_zero_dim() {
        assert_eq!(&*to_contiguous(1, &[3, 2], &[0, 1], &[7, 8]).unwrap(), [7, 8, 7, 8, 7, 8]);
        assert_eq!(&*to_contiguous(2, &[], &[], &[7, 8]).unwrap(), [7, 8]);
        assert!(to_contiguous(1, &[3, 2], &[1, 3], &[7, 8]).is_err(), "source too short");
    }
}
