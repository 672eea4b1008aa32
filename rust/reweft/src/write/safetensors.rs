//! Writing safetensors: sizes first, then the header, then tensor after tensor.

use std::path::Path;

use indexmap::IndexMap;
use serde::Serialize;

use super::transfer::{Piece, Transfers};
use super::{AtomicFile, ConvertOptions, Progress};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// The header is padded so that data starts at a multiple of this.
const HEADER_ALIGNMENT: usize = 8;
/// Bytes that state the header's length.
const LENGTH_NBYTES: usize = 8;
/// The key under which the format keeps its free-form metadata.
const METADATA_KEY: &str = "__metadata__";

/// The largest header that the reference implementation reads.
const MAX_HEADER_NBYTES: usize = 100_000_000;

/// Writes tensors as one file with the checkpoint's own `__metadata__`.
pub(super) fn write(
    checkpoint: &Checkpoint,
    tensors: &[(&str, &TensorInfo)],
    out: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<()> {
    let prepared = Prepared::of(checkpoint, tensors)?;
    let file = AtomicFile::create(out)?;
    let mut transfers = Transfers::new(checkpoint, tensors.iter().map(|(_, info)| info.nbytes()).sum(), progress)?;
    prepared.write(tensors, &file, &mut transfers)?;
    transfers.finish()?;
    file.commit_if(options.sync)
}

/// A file's header, and where each of its tensors starts behind it.
pub(super) struct Prepared {
    header: Vec<u8>,
    starts: Vec<u64>,
}

impl Prepared {
    /// Makes the header.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a dtype or key that the format lacks, and for too many keys.
    pub fn of(checkpoint: &Checkpoint, tensors: &[(&str, &TensorInfo)]) -> Result<Self> {
        let (header, starts) = header(checkpoint, tensors)?;
        if header.len() - LENGTH_NBYTES > MAX_HEADER_NBYTES {
            let what =
                format!("header of {} bytes; the format allows {MAX_HEADER_NBYTES}", header.len() - LENGTH_NBYTES);
            let error = Error::new(ErrorKind::Unsupported, what).in_file(checkpoint.path());
            return Err(error.with_hint("write several files with --max-shard-size"));
        }
        Ok(Self { header, starts })
    }

    /// Writes header and tensors.
    pub fn write(
        &self,
        tensors: &[(&str, &TensorInfo)],
        file: &AtomicFile,
        transfers: &mut Transfers<'_>,
    ) -> Result<()> {
        file.write_at(&self.header, 0)?;
        let at = |start| self.header.len() as u64 + start;
        let pieces = tensors.iter().zip(&self.starts);
        let pieces = pieces.map(|((key, info), start)| Piece { key, info, at: at(start), record: None });
        transfers.run(&pieces.collect::<Vec<_>>(), file).map(drop)
    }
}

/// One entry of the header.
#[derive(Serialize)]
#[serde(untagged)]
enum HeaderEntry<'a> {
    Metadata(&'a IndexMap<String, String>),
    Tensor { dtype: &'static str, shape: &'a [u64], data_offsets: (u64, u64) },
}

/// The bytes before the data, and where each tensor starts behind them. The header keeps the order of the keys; the data
/// is sorted by element size, largest first, so that every tensor is aligned to its elements.
fn header(checkpoint: &Checkpoint, tensors: &[(&str, &TensorInfo)]) -> Result<(Vec<u8>, Vec<u64>)> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|number| std::cmp::Reverse(tensors[*number].1.dtype.bits()));
    let mut offsets = vec![(0, 0); tensors.len()];
    let mut end = 0_u64;
    for number in &order {
        let start = end;
        end = end.checked_add(tensors[*number].1.nbytes()).ok_or_else(|| Error::format("tensors take 2^64 bytes"))?;
        offsets[*number] = (start, end);
    }
    let mut json = IndexMap::with_capacity(tensors.len() + 1);
    if let Some(metadata) = checkpoint.metadata() {
        json.insert(METADATA_KEY, HeaderEntry::Metadata(metadata));
    }
    for ((key, info), data_offsets) in tensors.iter().zip(&offsets) {
        let unsupported =
            |what: String| Error::new(ErrorKind::Unsupported, what).of_key(*key).in_file(checkpoint.path());
        if *key == METADATA_KEY {
            let what = "a tensor cannot have the name of the format's metadata".to_owned();
            return Err(unsupported(what).with_hint("give it another name with --remap"));
        }
        let dtype = info.dtype.safetensors().ok_or_else(|| {
            unsupported(format!("safetensors has no dtype for {}", info.dtype))
                .with_hint("leave the key out with --select")
        })?;
        json.insert(*key, HeaderEntry::Tensor { dtype, shape: &info.shape, data_offsets: *data_offsets });
    }
    let mut bytes = vec![0; LENGTH_NBYTES];
    serde_json::to_writer(&mut bytes, &json).map_err(|error| Error::io("write", error.into()))?;
    bytes.resize(bytes.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let length = (bytes.len() - LENGTH_NBYTES) as u64;
    bytes[..LENGTH_NBYTES].copy_from_slice(&length.to_le_bytes());
    Ok((bytes, offsets.into_iter().map(|(start, _)| start).collect()))
}
