//! Writing `.npz`: the zip archive that `numpy.savez` writes, a record `KEY.npy` for each tensor.
//!
//! Each record is what `numpy.save` writes, byte for byte (the format's description is numpy's NEP 1); the archive around
//! them is laid out as torch's are, so that every array starts at a multiple of 64 bytes.

use std::collections::HashSet;
use std::path::Path;

use super::transfer::{Piece, Transfers};
use super::{AtomicFile, ConvertOptions, Progress};
use crate::checkpoint::Checkpoint;
use crate::container::zip::{NewRecord, tail};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// What numpy takes off a record's name to get the key.
const EXTENSION: &str = ".npy";
/// The magic string and version 1.0, whose header is at most 65,535 bytes of Latin-1.
const MAGIC: [u8; 8] = *b"\x93NUMPY\x01\x00";
/// A record's header is padded so that its data starts at a multiple of this.
const ALIGNMENT: usize = 64;
/// The last of an archive's end records (APPNOTE 4.3.16).
const END_NBYTES: usize = 22;
/// Digits that the first size has room for, so that whoever appends can change it in place.
const GROWTH_DIGITS: usize = 21;

/// Writes tensors as one `.npz` file.
pub(super) fn write(
    checkpoint: &Checkpoint,
    tensors: &[(&str, &TensorInfo)],
    out: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<()> {
    check_keys(tensors).map_err(|error| error.in_file(checkpoint.path()))?;
    let mut end = 0;
    let records = tensors.iter().map(|(key, info)| {
        let record = lead(info.dtype, &info.shape)
            .and_then(|lead| NewRecord::with_lead(format!("{key}{EXTENSION}"), lead, info.nbytes(), end))
            .map_err(|error| error.of_key(*key).in_file(checkpoint.path()))?;
        end = record.end();
        Ok(record)
    });
    let records = records.collect::<Result<Vec<_>>>()?;
    let pieces = tensors.iter().zip(&records);
    let pieces =
        pieces.map(|((key, info), record)| Piece { key, info, at: record.payload_offset(), record: Some(record) });
    let pieces: Vec<_> = pieces.collect();
    let file = AtomicFile::create(out)?;
    let crcs = Transfers::run_all(checkpoint, &pieces, &file, progress)?;
    let listed: Vec<_> = records.into_iter().zip(crcs).collect();
    let tail = tail(&listed, end);
    // numpy knows an archive by its first bytes, and one without records only by the plain end record.
    let start = if listed.is_empty() { tail.len().saturating_sub(END_NBYTES) } else { 0 };
    file.write_at(&tail[start..], end)?;
    file.commit_if(options.sync)
}

/// Refuses keys that numpy would look up as another key, or not find.
fn check_keys(tensors: &[(&str, &TensorInfo)]) -> Result<()> {
    let known: HashSet<&str> = tensors.iter().map(|(key, _)| *key).collect();
    for (key, _) in tensors {
        let what = if key.contains('\0') {
            "a name in an archive ends at a zero character".to_owned()
        } else if known.contains(format!("{key}{EXTENSION}").as_str()) {
            format!("numpy gives this tensor also to those who ask for \"{key}{EXTENSION}\", which is another key")
        } else {
            continue;
        };
        let error = Error::new(ErrorKind::Unsupported, what).of_key(*key);
        return Err(error.with_hint("give it another name with --remap"));
    }
    Ok(())
}

/// What stands before an array's data: magic string, length, a Python dict, spaces and a line's end.
pub(crate) fn lead(dtype: Dtype, shape: &[u64]) -> Result<Vec<u8>> {
    let descr = descr(dtype)?;
    let sizes: Vec<_> = shape.iter().map(u64::to_string).collect();
    let comma = if sizes.len() == 1 { "," } else { "" };
    let room = sizes.first().map_or(0, |size| GROWTH_DIGITS.saturating_sub(size.len()));
    let mut dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", sizes.join(", "));
    dict.extend(std::iter::repeat_n(' ', room));
    let before = MAGIC.len() + size_of::<u16>();
    // One more for the line's end. numpy pads what is aligned already by a whole step.
    let padding = ALIGNMENT - (before + dict.len() + 1) % ALIGNMENT;
    dict.extend(std::iter::repeat_n(' ', padding));
    dict.push('\n');
    // Tensors have at most 64 dimensions, as arrays of numpy have; their sizes are far from the field's limit.
    let length = u16::try_from(dict.len()).map_err(|_| Error::format("numpy header of 65536 bytes"))?;
    Ok([&MAGIC[..], &length.to_le_bytes(), dict.as_bytes()].concat())
}

/// The dtype as numpy spells it; elements of one byte have no byte order.
fn descr(dtype: Dtype) -> Result<String> {
    let Some(name) = dtype.numpy() else {
        let error = Error::new(ErrorKind::Unsupported, format!("numpy has no dtype for {dtype}"));
        let hint = if dtype.is_float() { "convert with --dtype float32" } else { "leave the key out with --select" };
        return Err(error.with_hint(hint));
    };
    let order = if dtype.itemsize() == Some(1) { '|' } else { '<' };
    Ok(format!("{order}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lead_of(dtype: Dtype, shape: &[u64]) -> String {
        let bytes = lead(dtype, shape).unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        String::from_utf8_lossy(&bytes[10..]).trim_end().to_owned()
    }

    #[test]
    fn shapes_are_python_tuples() {
        assert_eq!(lead_of(Dtype::F32, &[]), "{'descr': '<f4', 'fortran_order': False, 'shape': (), }");
        assert_eq!(lead_of(Dtype::U8, &[3]), "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }");
        assert_eq!(lead_of(Dtype::C128, &[3, 0]), "{'descr': '<c16', 'fortran_order': False, 'shape': (3, 0), }");
    }
}
