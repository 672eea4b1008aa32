//! Writing safetensors: sizes first, then the header, then tensor after tensor.

use std::io::Write;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Serialize;

use super::{AtomicFile, Progress, refuse_same_file};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// The header is padded so that data starts at a multiple of this.
const HEADER_ALIGNMENT: usize = 8;

/// What to do with tensors that share bytes, which the format cannot say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shared {
    /// Refuse, and name the keys.
    #[default]
    Error,
    /// Write the bytes once for each key.
    Duplicate,
    /// Write only the first key of tensors that are the same; refuse those that merely overlap.
    DropAliases,
}

/// What a conversion did.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// The file that was written.
    pub out: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub nbytes: u64,
    /// Keys left out because another key has the same bytes, with that key.
    pub dropped_aliases: IndexMap<String, String>,
    /// What the checkpoint holds that is no tensor and therefore is not in the file.
    pub not_carried: Vec<String>,
    /// What a careful reader should know.
    pub notices: Vec<String>,
}

/// Writes a checkpoint as one safetensors file with the checkpoint's own `__metadata__`.
///
/// Reads all bytes once and checks every CRC. One tensor is in memory at a time.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a tensor that cannot be read or a dtype that safetensors lacks,
/// [`ErrorKind::Mismatch`] for shared tensors that `shared` does not settle, [`ErrorKind::Usage`] if `out` is the
/// checkpoint itself, read errors and [`ErrorKind::Io`]. `out` is then as it was.
pub fn convert(checkpoint: &Checkpoint, out: &Path, shared: Shared, progress: Progress<'_>) -> Result<ConvertReport> {
    refuse_same_file(out, checkpoint.path(), "the checkpoint that it is made of")?;
    checkpoint.check_readable()?;
    let dropped_aliases = settle_shared(checkpoint, shared)?;
    let tensors: Vec<_> = checkpoint.tensors().filter(|(key, _)| !dropped_aliases.contains_key(*key)).collect();
    let (header, order) = header(checkpoint, &tensors)?;
    let nbytes = tensors.iter().map(|(_, info)| info.nbytes()).sum();
    let file = AtomicFile::create(out)?;
    let mut writer = std::io::BufWriter::with_capacity(1 << 20, file.as_file());
    let failed = |error| Error::io("write", error).in_file(out);
    writer.write_all(&header).map_err(failed)?;
    let mut done = 0;
    for number in order {
        let bytes = checkpoint.read(tensors[number].0)?;
        writer.write_all(&bytes).map_err(failed)?;
        done += bytes.len() as u64;
        progress(done, nbytes);
    }
    writer.flush().map_err(failed)?;
    drop(writer);
    file.commit()?;
    Ok(ConvertReport {
        out: out.to_owned(),
        tensors: tensors.len(),
        nbytes,
        dropped_aliases,
        not_carried: checkpoint.values().iter().map(ToString::to_string).collect(),
        notices: checkpoint.notices().to_vec(),
    })
}

/// One entry of the header.
#[derive(Serialize)]
#[serde(untagged)]
enum HeaderEntry<'a> {
    Metadata(&'a IndexMap<String, String>),
    Tensor { dtype: &'static str, shape: &'a [u64], data_offsets: (u64, u64) },
}

/// The bytes before the data, and the order in which tensors follow. The header keeps the order of the keys; the data
/// is sorted by element size, largest first, so that every tensor is aligned to its elements.
fn header(checkpoint: &Checkpoint, tensors: &[(&str, &TensorInfo)]) -> Result<(Vec<u8>, Vec<usize>)> {
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
        json.insert("__metadata__", HeaderEntry::Metadata(metadata));
    }
    for ((key, info), data_offsets) in tensors.iter().zip(offsets) {
        let dtype = info.dtype.safetensors().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("safetensors has no dtype for {}", info.dtype))
                .of_key(*key)
                .in_file(checkpoint.path())
                .with_hint("leave the key out with --select")
        })?;
        let row = HeaderEntry::Tensor { dtype, shape: &info.shape, data_offsets };
        if json.insert(*key, row).is_some() {
            let what = "a tensor cannot have the name of the format's metadata";
            return Err(Error::new(ErrorKind::Unsupported, what).of_key(*key).in_file(checkpoint.path()));
        }
    }
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &json).map_err(|error| Error::io("write", error.into()))?;
    bytes.resize(bytes.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let length = (bytes.len() - 8) as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok((bytes, order))
}

/// Finds tensors whose bytes overlap. Gives the keys to leave out, with the key that stands for each.
fn settle_shared(checkpoint: &Checkpoint, shared: Shared) -> Result<IndexMap<String, String>> {
    let mut dropped = IndexMap::new();
    if shared == Shared::Duplicate {
        return Ok(dropped);
    }
    let mut windows = Vec::new();
    for (number, (key, info)) in checkpoint.tensors().enumerate() {
        let (start, nbytes) = info.window(checkpoint.storage_of(info).nbytes)?;
        if nbytes > 0 {
            windows.push((info.storage, start, number, start + nbytes, key, info));
        }
    }
    windows.sort_unstable_by_key(|window| (window.0, window.1, window.2));
    let mut last: Option<(usize, u64, &str, &TensorInfo)> = None;
    for (storage, start, _, end, key, info) in windows {
        match last {
            Some((other, until, kept, kept_info)) if other == storage && start < until => {
                if shared == Shared::DropAliases && info == kept_info {
                    dropped.insert(key.to_owned(), kept.to_owned());
                } else {
                    let what = format!("{kept:?} and {key:?} share bytes, which safetensors cannot say");
                    return Err(Error::new(ErrorKind::Mismatch, what).in_file(checkpoint.path()).with_hint(
                        "--shared duplicate writes the bytes twice, --shared drop-aliases only the first key",
                    ));
                }
            }
            _ => last = Some((storage, end, key, info)),
        }
    }
    Ok(dropped)
}
