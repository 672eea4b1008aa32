//! From the first bytes of a file to its reader, or to what the file is instead.

use std::path::Path;
use std::sync::Arc;

use reweft_pickle::Pickle;

use super::rebuild::Saved;
use super::{OpenOptions, Read, safetensors, shards, torch_legacy, torch_tar, torch_zip};
use crate::container::{tar, zip::Archive};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{self, ReadAt, Source};

/// Bytes that are read to tell formats apart: one header of a tar archive.
const HEAD_NBYTES: u64 = tar::BLOCK_NBYTES;

/// Reads a file, or the files that an index in `folder` names; without a folder an index is refused.
pub(super) fn read(source: Source, folder: Option<&Path>, options: &OpenOptions) -> Result<Read> {
    let head = source::read_vec(&*source, 0, source.len().min(HEAD_NBYTES))?;
    if shards::detect(&head) {
        return shards::read(&source, folder, options);
    }
    read_one(source, &head, options)
}

/// Reads a file of an index, which can be no index.
pub(super) fn read_shard(source: Source, options: &OpenOptions) -> Result<Read> {
    let head = source::read_vec(&*source, 0, source.len().min(HEAD_NBYTES))?;
    if shards::detect(&head) {
        return Err(Error::new(ErrorKind::Unsupported, "this is JSON, and an index names files with tensors"));
    }
    read_one(source, &head, options)
}

/// The formats that one file can have.
enum Kind {
    Zip,
    Tar,
    Safetensors,
    Legacy,
    Pickle,
}

impl Kind {
    /// Tells by content; an error says what the file is instead.
    fn of(source: &dyn ReadAt, head: &[u8]) -> Result<Self> {
        if Archive::detect(source) {
            Ok(Self::Zip)
        } else if tar::detect(head) {
            Ok(Self::Tar)
        } else if safetensors::detect(source) {
            Ok(Self::Safetensors)
        } else if torch_legacy::detect(source) {
            Ok(Self::Legacy)
        } else if torch_legacy::detect_pickle(source) {
            Ok(Self::Pickle)
        } else {
            Err(not_a_checkpoint(source))
        }
    }
}

fn read_one(source: Source, head: &[u8], options: &OpenOptions) -> Result<Read> {
    match Kind::of(&*source, head)? {
        Kind::Zip => torch_zip::read(source, options),
        Kind::Tar => torch_tar::read(&source, options),
        Kind::Safetensors => safetensors::read(&source, options),
        Kind::Legacy => torch_legacy::read(&source, options),
        Kind::Pickle => torch_legacy::read_pickle(&source, options),
    }
}

/// Hands over the pickle of the object that a file holds, for readers of something else than its tensors.
pub(crate) fn visit<R>(
    source: Source,
    options: &OpenOptions,
    then: impl FnOnce(&Pickle<'_>) -> Result<R>,
) -> Result<R> {
    let then = |saved: Saved<'_>| then(saved.pickle);
    let head = source::read_vec(&*source, 0, source.len().min(HEAD_NBYTES))?;
    match Kind::of(&*source, &head)? {
        Kind::Zip => torch_zip::visit(&Arc::new(Archive::open(source)?), options, then),
        Kind::Tar => torch_tar::visit(&source, &tar::members(&*source)?, options, then),
        Kind::Safetensors => {
            let what = "this is a safetensors file, which holds nothing but tensors and texts about them";
            Err(Error::new(ErrorKind::Unsupported, what))
        }
        Kind::Legacy => torch_legacy::visit(&source, options, then),
        Kind::Pickle => torch_legacy::visit_pickle(&source, options, then),
    }
}

/// Says what a file is that is no checkpoint, as far as its first bytes tell.
fn not_a_checkpoint(source: &dyn ReadAt) -> Error {
    let nbytes = source.len().min(64);
    let head = source::read_vec(source, 0, nbytes).unwrap_or_default();
    let known: &[(&[u8], &str)] = &[
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`"),
        (b"<", "an HTML or XML page; the download was probably refused"),
        (b"\x1f\x8b", "gzip; unpack it first"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
        (b"GGUF", "GGUF, which is not read"),
        (b"\x7fELF", "a native library, not a checkpoint"),
    ];
    if nbytes == 0 {
        return Error::format("the file is empty");
    }
    match known.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, what)) => Error::new(ErrorKind::Unsupported, format!("this is {what}")),
        None => Error::new(ErrorKind::Unsupported, "this is no checkpoint that reweft reads")
            .with_hint("formats read: .pt as torch.save writes and wrote it, pickles, safetensors"),
    }
}
