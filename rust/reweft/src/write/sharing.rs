//! Which tensors share bytes, for formats that cannot say so.

use indexmap::IndexMap;

use super::{Shared, TargetFormat};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// Comparisons of tensors whose windows interleave, as columns of a matrix do; more are taken for shared bytes.
const MAX_COMPARISONS: u64 = 20_000_000;

/// A tensor and the bytes of its storage from its first element to its last.
struct Window<'a> {
    storage: usize,
    start: u64,
    end: u64,
    number: usize,
    key: &'a str,
    info: &'a TensorInfo,
}

/// All windows that have bytes, by storage and start.
fn windows<'a>(checkpoint: &Checkpoint, tensors: &[(&'a str, &'a TensorInfo)]) -> Result<Vec<Window<'a>>> {
    let mut windows = Vec::new();
    for (number, (key, info)) in tensors.iter().enumerate() {
        let (start, nbytes) = info.window(checkpoint.storage_of(info)?.nbytes)?;
        if nbytes > 0 {
            windows.push(Window { storage: info.storage, start, end: start + nbytes, number, key, info });
        }
    }
    windows.sort_unstable_by_key(|window| (window.storage, window.start, window.number));
    Ok(windows)
}

/// Finds tensors that share bytes. Gives the keys to leave out, with the key that stands for each.
///
/// # Errors
/// [`ErrorKind::Mismatch`] for shared bytes that `shared` does not settle.
pub(super) fn settle(
    checkpoint: &Checkpoint,
    tensors: &[(&str, &TensorInfo)],
    shared: Shared,
    format: TargetFormat,
) -> Result<IndexMap<String, String>> {
    let mut dropped = IndexMap::new();
    if shared == Shared::Duplicate {
        return Ok(dropped);
    }
    let windows = windows(checkpoint, tensors)?;
    // Windows that reach behind the start of the present one.
    let mut open: Vec<&Window<'_>> = Vec::new();
    let mut comparisons = 0;
    for window in &windows {
        open.retain(|other| other.storage == window.storage && other.end > window.start);
        comparisons += open.len() as u64;
        let enough = comparisons > MAX_COMPARISONS;
        match open.iter().find(|other| enough || !disjoint(other.info, window.info)) {
            None => open.push(window),
            Some(kept) if shared == Shared::DropAliases && kept.info == window.info => {
                dropped.insert(window.key.to_owned(), kept.key.to_owned());
            }
            Some(kept) => {
                let what =
                    format!("{:?} and {:?} share bytes, which {} cannot say", kept.key, window.key, format.name());
                return Err(Error::new(ErrorKind::Mismatch, what)
                    .in_file(checkpoint.path())
                    .with_hint("--shared duplicate writes the bytes twice, --shared drop-aliases only the first key"));
            }
        }
    }
    Ok(dropped)
}

/// Puts tensors whose windows overlap into one group: the numbers of each, in the order of the first.
pub(super) fn groups(checkpoint: &Checkpoint, tensors: &[(&str, &TensorInfo)]) -> Result<Vec<Vec<usize>>> {
    let mut leader: Vec<usize> = (0..tensors.len()).collect();
    let windows = windows(checkpoint, tensors)?;
    let overlap = |left: &Window<'_>, end: u64, right: &Window<'_>| left.storage == right.storage && right.start < end;
    let mut rest = &windows[..];
    while let Some(first) = rest.first() {
        let mut end = first.end;
        let count = rest.iter().take_while(|window| {
            let joins = overlap(first, end, window);
            end = if joins { end.max(window.end) } else { end };
            joins
        });
        let (group, left) = rest.split_at(count.count().max(1));
        let least = group.iter().map(|window| window.number).min().unwrap_or(first.number);
        for window in group {
            leader[window.number] = least;
        }
        rest = left;
    }
    let mut groups: IndexMap<usize, Vec<usize>> = IndexMap::new();
    for (number, leader) in leader.into_iter().enumerate() {
        groups.entry(leader).or_default().push(number);
    }
    Ok(groups.into_values().collect())
}

/// Whether two tensors on one storage surely have no element in common: columns of one matrix, even and odd elements.
/// False also where that is not easily seen.
fn disjoint(left: &TensorInfo, right: &TensorInfo) -> bool {
    if left.strides != right.strides || left.dtype != right.dtype {
        return false;
    }
    let distance = left.storage_offset.abs_diff(right.storage_offset);
    let common = left.strides.iter().fold(0, |common, stride| gcd(common, *stride));
    if common > 1 && !distance.is_multiple_of(common) {
        return true;
    }
    let base = left.storage_offset.min(right.storage_offset);
    match (place(left, base), place(right, base)) {
        (Some(left), Some(right)) => left.iter().zip(&right).any(|(a, b)| a.1 <= b.0 || b.1 <= a.0),
        _ => false,
    }
}

/// A tensor as a box of a larger one that has the same strides and starts at `base`: where it begins and ends along each
/// dimension, from the largest stride to the smallest. `None` if it is no such box.
fn place(info: &TensorInfo, base: u64) -> Option<Vec<(u64, u64)>> {
    let mut dims: Vec<(u64, u64)> = info.strides.iter().copied().zip(info.shape.iter().copied()).collect();
    dims.sort_unstable_by_key(|(stride, _)| std::cmp::Reverse(*stride));
    let (mut rest, mut outer) = (info.storage_offset - base, None::<u64>);
    let mut ranges = Vec::with_capacity(dims.len());
    for (stride, size) in dims {
        let start = rest.checked_div(stride)?;
        let end = start.checked_add(size)?;
        rest %= stride;
        // An index that reaches the next larger stride would be another element's.
        if outer.is_some_and(|outer| outer % stride != 0 || end > outer / stride) {
            return None;
        }
        ranges.push((start, end));
        outer = Some(stride);
    }
    (rest == 0).then_some(ranges)
}

fn gcd(mut left: u64, mut right: u64) -> u64 {
    while right > 0 {
        (left, right) = (right, left % right);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use std::collections::HashSet;

    fn info(shape: &[u64], strides: &[u64], storage_offset: u64) -> TensorInfo {
        TensorInfo { dtype: Dtype::U8, shape: shape.into(), strides: strides.into(), storage: 0, storage_offset }
    }

    fn elements(info: &TensorInfo) -> HashSet<u64> {
        let mut places = vec![info.storage_offset];
        for (size, stride) in info.shape.iter().zip(&info.strides) {
            places = places.iter().flat_map(|place| (0..*size).map(move |index| place + index * stride)).collect();
        }
        places.into_iter().collect()
    }

    #[test]
    fn columns_and_combs_are_disjoint() {
        assert!(disjoint(&info(&[4, 3], &[7, 1], 0), &info(&[4, 4], &[7, 1], 3)));
        assert!(disjoint(&info(&[3, 4], &[1, 7], 0), &info(&[4, 4], &[1, 7], 3)));
        assert!(disjoint(&info(&[5], &[2], 0), &info(&[5], &[2], 1)));
        assert!(!disjoint(&info(&[4, 4], &[7, 1], 0), &info(&[4, 4], &[7, 1], 3)), "a column in common");
        assert!(!disjoint(&info(&[4, 7], &[7, 1], 0), &info(&[4, 7], &[7, 1], 1)), "wraps");
        assert!(!disjoint(&info(&[3], &[0], 0), &info(&[3], &[0], 0)), "repeated");
    }

    #[test]
    fn what_is_called_disjoint_is_disjoint() {
        let mut found = 0;
        let shapes: Vec<[u64; 2]> = (1..4).flat_map(|rows| (1..5).map(move |columns| [rows, columns])).collect();
        for strides in [[5, 1], [1, 5], [4, 1], [6, 2], [3, 1], [2, 2], [0, 1], [5, 3]] {
            for (left, right) in shapes.iter().flat_map(|left| shapes.iter().map(move |right| (left, right))) {
                for offset in 0..14 {
                    let (left, right) = (info(left, &strides, 2), info(right, &strides, 2 + offset));
                    let apart = elements(&left).is_disjoint(&elements(&right));
                    assert!(apart || !disjoint(&left, &right), "{left:?} {right:?}");
                    assert_eq!(disjoint(&left, &right), disjoint(&right, &left));
                    found += usize::from(disjoint(&left, &right));
                }
            }
        }
        assert!(found > 1000, "{found}");
    }
}
