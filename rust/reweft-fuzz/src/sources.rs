//! One checkpoint from three kinds of sources, seen whole: metadata, errors and bytes.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use reweft::source::{self, Access, Source};
use reweft::{Checkpoint, Limits, OpenOptions, TensorInfo};
use tempfile::NamedTempFile;

use crate::memory::within;

/// Bytes held while opening, for each byte of the input. A value of a pickle takes 32 bytes, an object that is filled
/// about 150, and vectors grow by doubling; a byte or two make either.
pub(crate) const OPEN_FACTOR: u64 = 400;
/// Bytes held while opening, whatever the input.
pub(crate) const OPEN_NBYTES: u64 = 4 << 20;
/// Bytes of tensors that are read of one input; more would only make the fuzzer slow.
const READ_NBYTES: u64 = 4 << 20;
/// Elements of a tensor up to which it is compared with plain indexing.
const INDEXED_NUMEL: u64 = 1 << 12;

thread_local! {
    /// The file that every input is written to in turn.
    static FILE: RefCell<Option<NamedTempFile>> = const { RefCell::new(None) };
}

/// All that a checkpoint says, or the error's text with its hint.
#[derive(Debug, PartialEq)]
struct Seen {
    facts: Vec<String>,
    tensors: Vec<(String, TensorInfo)>,
    bytes: Vec<(String, Result<Vec<u8>, String>)>,
}

/// Opens `bytes` from memory, by reading a file and by mapping it, and checks that nothing tells the three apart.
/// Gives the one from memory.
pub(crate) fn agree(bytes: &[u8], options: &OpenOptions) -> Result<Checkpoint, String> {
    with_file(bytes, |path| agree_at(path, bytes, options))
}

/// Hands over a file that holds `bytes`.
pub(crate) fn with_file<T>(bytes: &[u8], then: impl FnOnce(&Path) -> T) -> T {
    FILE.with_borrow_mut(|slot| {
        let file = slot.get_or_insert_with(|| NamedTempFile::new().unwrap());
        std::fs::write(file.path(), bytes).unwrap();
        then(file.path())
    })
}

fn agree_at(path: &Path, bytes: &[u8], options: &OpenOptions) -> Result<Checkpoint, String> {
    let limit = OPEN_FACTOR * bytes.len() as u64 + OPEN_NBYTES;
    let open = |source: Source| {
        within(limit, "opening", || Checkpoint::from_source(path, source, options)).map_err(|error| error.to_string())
    };
    let of_file = |access| source::open(path, access).map_err(|error| error.to_string());
    let memory = open(Arc::new(bytes.to_vec()));
    let seen = see(&memory);
    for access in [Access::Read, Access::Map] {
        let found = of_file(access).and_then(open);
        assert_eq!(see(&found), seen, "{access:?} and memory differ");
    }
    let again = open(Arc::new(bytes.to_vec()));
    assert_eq!(see(&again), seen, "opening twice gives two answers");
    if let Ok(checkpoint) = &memory {
        plain_indexing(checkpoint);
    }
    memory
}

/// Limits of a fuzzing run: the defaults, but for what one small input may make a target spend its time on.
pub(crate) fn options() -> OpenOptions {
    let limits = Limits { max_repeated_nbytes: 1 << 20, ..Limits::default() };
    OpenOptions { limits, ..OpenOptions::default() }
}

fn see(checkpoint: &Result<Checkpoint, String>) -> Result<Seen, String> {
    let checkpoint = checkpoint.as_ref().map_err(Clone::clone)?;
    let mut facts = vec![format!(
        "{} {:?} {:?} {:?} {:?}",
        checkpoint.format().name(),
        checkpoint.values(),
        checkpoint.unknown_globals(),
        checkpoint.metadata(),
        checkpoint.notices()
    )];
    facts.extend(checkpoint.unreadable().map(|(key, why)| format!("{key:?} {why}")));
    facts.extend(checkpoint.storages().iter().map(|storage| {
        let (swapped, nbytes) = (storage.is_swapped(), storage.nbytes);
        format!("{:?} {:?} {:?} {nbytes} {swapped}", storage.name(), storage.dtype, storage.device)
    }));
    let tensors: Vec<_> = checkpoint.tensors().map(|(key, info)| (key.to_owned(), info.clone())).collect();
    assert_eq!(checkpoint.len(), tensors.len() + checkpoint.unreadable().count());
    Ok(Seen { facts, bytes: read(checkpoint), tensors })
}

/// Reads tensors up to a total; each has the length that its metadata states, or an error.
fn read(checkpoint: &Checkpoint) -> Vec<(String, Result<Vec<u8>, String>)> {
    let (mut left, mut read) = (READ_NBYTES, Vec::new());
    for (key, info) in checkpoint.tensors() {
        let (nbytes, held) = (info.nbytes(), checkpoint.storage_of(info).map_or(0, |storage| storage.nbytes));
        let cost = held.saturating_add(nbytes.min(1 << 20)).saturating_add(64);
        let Some(rest) = left.checked_sub(cost) else { continue };
        left = rest;
        // The tensor, a window of its storage, and the storage unpacked; nothing of it if there is an error.
        let limit = 2 * nbytes.min(held.max(1 << 20)) + 3 * held + (1 << 20);
        let bytes = within(limit, "reading", || checkpoint.read(key));
        if let Ok(bytes) = &bytes {
            assert_eq!(bytes.len() as u64, nbytes, "{key:?}");
        }
        read.push((key.to_owned(), bytes.map_err(|error| error.to_string())));
    }
    read
}

/// Compares small tensors with what their strides say, element by element.
fn plain_indexing(checkpoint: &Checkpoint) {
    for (key, info) in checkpoint.tensors() {
        let storage = checkpoint.storage_of(info).unwrap();
        let small = info.numel() <= INDEXED_NUMEL && storage.nbytes <= READ_NBYTES;
        let (Some(itemsize), true) = (info.dtype.itemsize(), small) else { continue };
        let (Ok(bytes), Ok(Some((source, start)))) = (checkpoint.read(key), storage.locate()) else { continue };
        let Ok(held) = source::read_vec(&**source, start, storage.nbytes) else { continue };
        let itemsize = usize::try_from(itemsize).unwrap();
        let unit = if storage.is_swapped() { info.dtype.swap_unit() } else { 1 };
        for (number, item) in bytes.chunks_exact(itemsize).enumerate() {
            let at = usize::try_from(element(info, number as u64)).unwrap() * itemsize;
            let swapped: Vec<u8> =
                held[at..at + itemsize].chunks(unit).flat_map(|part| part.iter().rev()).copied().collect();
            assert_eq!(item, swapped, "element {number} of {key:?} {info:?}");
        }
    }
}

/// Where the element of a row-major number lies in its storage, in elements.
fn element(info: &TensorInfo, mut number: u64) -> u64 {
    let mut at = info.storage_offset;
    for (size, stride) in info.shape.iter().zip(&info.strides).rev() {
        at += number % size * stride;
        number /= size;
    }
    at
}
