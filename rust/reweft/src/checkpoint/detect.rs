//! From the first bytes of a file to its reader, or to what the file is instead.

use std::path::Path;
use std::sync::Arc;

use reweft_pickle::Pickle;

use super::rebuild::Saved;
use super::{OpenOptions, Read, safetensors, shards, torch_legacy, torch_tar, torch_zip};
use crate::artifact::stripped;
use crate::container::{tar, zip::Archive};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{self, ReadAt, Source};

/// Bytes that are read to tell formats apart: one header of a tar archive.
const HEAD_NBYTES: u64 = tar::BLOCK_NBYTES;

/// Reads a file, or the files that an index in `folder` names; without a folder an index is refused.
pub(super) fn read(source: &Source, folder: Option<&Path>, options: &OpenOptions) -> Result<Read> {
    let head = source::read_vec(&**source, 0, source.len().min(HEAD_NBYTES))?;
    if shards::detect(&head) {
        return shards::read(source, folder, options);
    }
    read_one(source, &head, options)
}

/// Reads a file of an index, which can be no index.
pub(super) fn read_shard(source: &Source, options: &OpenOptions) -> Result<Read> {
    let head = source::read_vec(&**source, 0, source.len().min(HEAD_NBYTES))?;
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
    fn of(source: &dyn ReadAt, head: &[u8], options: &OpenOptions) -> Result<Self> {
        if stripped::detect(source) {
            let error = Error::new(ErrorKind::Unsupported, "this is an artifact that was stripped of its weights");
            Err(error.with_hint("a refit puts weights into it: reweft refit FILE CHECKPOINT -o OUT"))
        } else if Archive::detect(source) {
            Ok(Self::Zip)
        } else if tar::detect(head) {
            Ok(Self::Tar)
        } else if safetensors::detect(source) {
            Ok(Self::Safetensors)
        } else if torch_legacy::detect(source) {
            Ok(Self::Legacy)
        } else if torch_legacy::detect_pickle(source) || torch_legacy::detect_old_pickle(source, head, options) {
            Ok(Self::Pickle)
        } else {
            Err(not_a_checkpoint(head))
        }
    }
}

fn read_one(source: &Source, head: &[u8], options: &OpenOptions) -> Result<Read> {
    match Kind::of(&**source, head, options)? {
        Kind::Zip => torch_zip::read(source, options),
        Kind::Tar => torch_tar::read(source, options),
        Kind::Safetensors => safetensors::read(source, options),
        Kind::Legacy => torch_legacy::read(source, options),
        Kind::Pickle => torch_legacy::read_pickle(source, options),
    }
}

/// Hands over the pickle of the object that a file holds, for readers of something else than its tensors.
pub(crate) fn visit<R>(
    source: &Source,
    options: &OpenOptions,
    then: impl FnOnce(&Pickle<'_>) -> Result<R>,
) -> Result<R> {
    let then = |saved: Saved<'_>| then(saved.pickle);
    let head = source::read_vec(&**source, 0, source.len().min(HEAD_NBYTES))?;
    match Kind::of(&**source, &head, options)? {
        Kind::Zip => torch_zip::visit(&Arc::new(torch_zip::open(source, options)?), options, then),
        Kind::Tar => torch_tar::visit(source, &tar::members(&**source)?, options, then),
        Kind::Safetensors => {
            let what = "this is a safetensors file, which holds nothing but tensors and texts about them";
            Err(Error::new(ErrorKind::Unsupported, what))
        }
        Kind::Legacy => torch_legacy::visit(source, options, then),
        Kind::Pickle => torch_legacy::visit_pickle(source, options, then),
    }
}

/// What other files begin with: byte offset, bytes, and what to say.
const KNOWN: &[(usize, &[u8], &str)] = &[
    (0, b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    (0, b"<", "an HTML or XML page; the download was probably refused"),
    (0, b"\x1f\x8b", "gzip; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"\xfd7zXZ\0", "xz; unpack it first"),
    (0, b"BZh", "bzip2; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd; unpack it first"),
    (0, b"\x04\x22\x4d\x18", "lz4; unpack it first"),
    (0, b"Rar!\x1a\x07", "a rar archive; unpack it first"),
    (0, b"GGUF", "GGUF, which is not read"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5, which is not read"),
    (0, b"\x93NUMPY", "a numpy array (.npy), which is not read"),
    (0, b"PYTORCH1", "a file of the preview of torch 1.0, which no release reads"),
    (4, b"PTMF", "a mobile program of torch in the flatbuffer format, which is not read"),
    (4, b"TFL3", "a TensorFlow Lite model, which is not read"),
    (4, b"ET12", "an ExecuTorch program, which is not read"),
    (0, b"\x7fELF", "a native library, not a checkpoint"),
    (0, b"MZ", "a Windows program, not a checkpoint"),
    (0, b"PAR1", "Parquet, which is not read"),
    (0, b"[", "a JSON list, not a checkpoint"),
    (0, b"{", "JSON, which holds no tensors"),
];

/// Says what a file is that is no checkpoint, as far as its first bytes tell.
fn not_a_checkpoint(head: &[u8]) -> Error {
    if head.is_empty() {
        return Error::format("the file is empty");
    }
    let begins = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let known = KNOWN.iter().find(|(at, magic, _)| begins(*at, magic)).map(|row| row.2);
    match known.or_else(|| is_onnx(head).then_some("an ONNX model, which is not read")) {
        Some(what) => Error::new(ErrorKind::Unsupported, format!("this is {what}")),
        None if head.iter().all(|byte| *byte == 0) => {
            Error::format("the file begins with zeros; it was probably allocated and not written")
        }
        None => Error::new(ErrorKind::Unsupported, "this is no checkpoint that reweft reads").with_hint(
            "formats read: .pt as torch.save writes and wrote it, TorchScript, exported programs, pickles, \
             safetensors, shard indexes",
        ),
    }
}

/// Whether a file begins as exporters begin ONNX: `ir_version` in one byte, then the name of a producer as text.
fn is_onnx(head: &[u8]) -> bool {
    let [0x08, 1..=0x20, 0x12, nbytes, rest @ ..] = head else { return false };
    let name = rest.get(..usize::from(*nbytes)).unwrap_or_default();
    !name.is_empty() && name.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_formats_are_named() {
        for (at, magic, what) in KNOWN {
            let head = [&vec![1; *at][..], magic, &[9; 64]].concat();
            let error = not_a_checkpoint(&head).to_string();
            assert!(error.contains(what), "{error}");
        }
        let onnx = b"\x08\x08\x12\x07pytorch\x1a\x05";
        assert!(not_a_checkpoint(onnx).to_string().contains("ONNX"));
        assert!(!not_a_checkpoint(b"\x08\x08\x12\x07pyt\0rch").to_string().contains("ONNX"));
        assert!(not_a_checkpoint(&[0; 512]).to_string().contains("zeros"));
        assert!(not_a_checkpoint(b"").to_string().contains("empty"));
        assert!(not_a_checkpoint(b"words and words").to_string().contains("no checkpoint"));
    }
}
