//! Where bytes come from: memory, positional file reads, or a mapping the caller opted in to.

mod mmap;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
pub use mmap::{Mmap, PrivateMap};

/// Random access to a fixed number of bytes.
///
/// A source that shrinks after it was opened gives an error on the next read, except [`Mmap`]: see there.
pub trait ReadAt: Send + Sync + fmt::Debug {
    /// Length in bytes, fixed when the source was opened.
    fn len(&self) -> u64;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` with the bytes that start at `byte_offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) if the range ends behind the source,
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) if the system refuses.
    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()>;

    /// All bytes, where they are in memory already; `None` means that they must be read.
    fn as_slice(&self) -> Option<&[u8]> {
        None
    }

    /// The source that this one is a part of, and where it begins there.
    fn part_of(&self) -> Option<(&Source, u64)> {
        None
    }

    /// The file behind the source, for writers that let the kernel move bytes.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// A source that many tensors share.
pub type Source = Arc<dyn ReadAt>;

/// How [`open`] gives access to a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Positional reads: a file that shrinks meanwhile is an error, never a signal.
    #[default]
    Read,
    /// A private mapping: no copy, but a file that shrinks meanwhile ends the process with SIGBUS. A shared lock (`flock`)
    /// keeps in-place rewrites by reweft away.
    Map,
}

/// Opens a regular file. Reads no bytes.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) if the file cannot be opened or is not a regular file.
pub fn open(path: &Path, access: Access) -> Result<Source> {
    // Not to wait for the other end of a pipe; a regular file takes no notice of it.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblocking).open(path);
    let file = file.map_err(|error| Error::io("open", error).in_file(path))?;
    let metadata = file.metadata().map_err(|error| Error::io("stat", error).in_file(path))?;
    if !metadata.is_file() {
        let error = std::io::Error::from(std::io::ErrorKind::InvalidInput);
        return Err(Error::io("open: not a regular file", error).in_file(path));
    }
    match access {
        Access::Map if metadata.len() > 0 => {
            lock_shared(path, &file)?;
            Ok(Arc::new(Mmap::new(path, file, metadata.len())?))
        }
        _ => Ok(of_file(path, file, metadata.len())),
    }
}

/// Tells those who would rewrite the file in place that it is mapped. The lock lasts as long as the mapping.
fn lock_shared(path: &Path, file: &File) -> Result<()> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let error = Error::new(crate::ErrorKind::Usage, "another process rewrites the file").in_file(path);
            Err(error.with_hint("try again when it has finished"))
        }
        // Some file systems know no locks; the promise not to write to mapped files is then the caller's alone.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Checks that `[byte_offset, byte_offset + nbytes)` lies within `len` bytes and gives its end.
///
/// # Errors
/// [`ErrorKind::Format`](crate::ErrorKind::Format), with the number of bytes that are missing.
pub fn check_range(len: u64, byte_offset: u64, nbytes: u64) -> Result<u64> {
    match byte_offset.checked_add(nbytes) {
        Some(end) if end <= len => Ok(end),
        Some(end) => Err(Error::format(format!(
            "ends {} bytes too early: {nbytes} bytes wanted, {} there",
            end - len,
            len.saturating_sub(byte_offset)
        ))
        .at(byte_offset)
        .with_hint("the file is truncated; copy or download it again")),
        None => Err(Error::format(format!("{nbytes} bytes wanted behind the end of the file")).at(byte_offset)),
    }
}

/// A file that is read at positions; nothing is cached.
#[derive(Debug)]
struct FileSource {
    path: PathBuf,
    file: File,
    len: u64,
}

/// An open file of known length, as a source; `path` is for messages.
pub(crate) fn of_file(path: &Path, file: File, len: u64) -> Source {
    Arc::new(FileSource { path: path.to_owned(), file, len })
}

impl ReadAt for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        check_range(self.len, byte_offset, out.len() as u64).map_err(|error| error.in_file(&self.path))?;
        self.file.read_exact_at(out, byte_offset).map_err(|error| {
            let shrunk = error.kind() == std::io::ErrorKind::UnexpectedEof;
            let error = Error::io("read", error).at(byte_offset).in_file(&self.path);
            if shrunk { error.with_hint("the file became shorter while it was read") } else { error }
        })
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> u64 {
        Self::len(self) as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        copy_from(self, byte_offset, out)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self)
    }
}

/// Bytes that are part of the program, such as those of `include_bytes!`: nothing is copied.
impl ReadAt for &'static [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        copy_from(self, byte_offset, out)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self)
    }
}

/// A range of another source, as a source of its own.
#[derive(Debug)]
pub struct Window {
    source: Source,
    byte_offset: u64,
    nbytes: u64,
}

impl Window {
    /// Takes `nbytes` bytes from `byte_offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) if they end behind the source.
    pub fn new(source: Source, byte_offset: u64, nbytes: u64) -> Result<Self> {
        check_range(source.len(), byte_offset, nbytes)?;
        Ok(Self { source, byte_offset, nbytes })
    }
}

impl ReadAt for Window {
    fn len(&self) -> u64 {
        self.nbytes
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        check_range(self.nbytes, byte_offset, out.len() as u64)?;
        self.source.read_exact_at(self.byte_offset + byte_offset, out)
    }

    fn part_of(&self) -> Option<(&Source, u64)> {
        Some((&self.source, self.byte_offset))
    }

    fn as_slice(&self) -> Option<&[u8]> {
        slice(self.source.as_slice()?, self.byte_offset, self.nbytes).ok()
    }
}

/// The whole that a source is a part of, and where it begins there; sources that are no part are their own whole.
pub fn origin(mut source: &Source) -> (&Source, u64) {
    let mut byte_offset = 0;
    while let Some((whole, start)) = source.part_of() {
        (source, byte_offset) = (whole, byte_offset + start);
    }
    (source, byte_offset)
}

/// Copies a checked range of `bytes`; serves every source that is in memory.
fn copy_from(bytes: &[u8], byte_offset: u64, out: &mut [u8]) -> Result<()> {
    out.copy_from_slice(slice(bytes, byte_offset, out.len() as u64)?);
    Ok(())
}

/// A checked range of `bytes`.
///
/// # Errors
/// [`ErrorKind::Format`](crate::ErrorKind::Format) if the range ends behind `bytes`.
pub fn slice(bytes: &[u8], byte_offset: u64, nbytes: u64) -> Result<&[u8]> {
    let end = check_range(bytes.len() as u64, byte_offset, nbytes)?;
    let range = usize::try_from(byte_offset).ok().zip(usize::try_from(end).ok());
    range
        .and_then(|(start, end)| bytes.get(start..end))
        .ok_or_else(|| Error::format("range does not fit the address space").at(byte_offset))
}

/// Reads a range into a new buffer; the range is checked before anything is allocated.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
pub fn read_vec(source: &dyn ReadAt, byte_offset: u64, nbytes: u64) -> Result<Vec<u8>> {
    check_range(source.len(), byte_offset, nbytes)?;
    let mut bytes = zeroed(nbytes)?;
    source.read_exact_at(byte_offset, &mut bytes)?;
    Ok(bytes)
}

/// A buffer of zeros. What is not touched takes no memory.
///
/// # Errors
/// [`ErrorKind::Limit`](crate::ErrorKind::Limit) where the system does not have so much memory; Rust itself would end
/// the process.
pub fn zeroed(nbytes: u64) -> Result<Vec<u8>> {
    /// Bytes that every system has. Sparse files and records that unpack ask for terabytes.
    const SURE_NBYTES: usize = 1 << 26;
    let nbytes = to_usize(nbytes)?;
    if nbytes > SURE_NBYTES {
        let short = |_| Error::new(crate::ErrorKind::Limit, format!("{nbytes} bytes of memory are not to be had"));
        Vec::<u8>::new().try_reserve_exact(nbytes).map_err(short)?;
    }
    Ok(vec![0; nbytes])
}

/// Fills `out` with the bytes that start at `byte_offset`, and gives their CRC-32.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
pub fn read_hashed(source: &dyn ReadAt, byte_offset: u64, out: &mut [u8]) -> Result<u32> {
    /// Bytes read at a time: few enough to be still in the second cache when they are hashed.
    const CHUNK_NBYTES: usize = 256 << 10;
    check_range(source.len(), byte_offset, out.len() as u64)?;
    let (mut hasher, mut at) = (crc32fast::Hasher::new(), byte_offset);
    for chunk in out.chunks_mut(CHUNK_NBYTES) {
        source.read_exact_at(at, chunk)?;
        hasher.update(chunk);
        at += chunk.len() as u64;
    }
    Ok(hasher.finalize())
}

/// CRC-32 of a range, read in pieces where it is not in memory.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
pub fn crc(source: &dyn ReadAt, byte_offset: u64, nbytes: u64) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    if let Some(bytes) = source.as_slice() {
        hasher.update(slice(bytes, byte_offset, nbytes)?);
    } else {
        read_through(source, byte_offset, nbytes, &mut |piece| hasher.update(piece))?;
    }
    Ok(hasher.finalize())
}

/// Fewer bytes are read for less than a mapping costs.
const MAPPED_NBYTES: u64 = 1 << 20;

/// Makes sure that a range can be read, at the least cost.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
pub(crate) fn bring_in(source: &Source, byte_offset: u64, nbytes: u64) -> Result<()> {
    let (whole, start) = origin(source);
    match whole.file() {
        Some(file) if nbytes >= MAPPED_NBYTES => mmap::bring_in(&**whole, file, start + byte_offset, nbytes),
        _ => read_through(&**source, byte_offset, nbytes, &mut |_| ()),
    }
}

/// Shows a range piece by piece, without a copy if it is in a file.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
pub(crate) fn look_through(source: &Source, byte_offset: u64, nbytes: u64, see: &mut dyn FnMut(&[u8])) -> Result<()> {
    let (whole, start) = origin(source);
    match whole.file() {
        Some(file) if nbytes >= MAPPED_NBYTES => mmap::look_through(&**whole, file, start + byte_offset, nbytes, see),
        _ => read_through(&**source, byte_offset, nbytes, see),
    }
}

/// Reads a range piece by piece and shows each to `see`.
///
/// # Errors
/// As [`ReadAt::read_exact_at`].
fn read_through(source: &dyn ReadAt, byte_offset: u64, nbytes: u64, see: &mut dyn FnMut(&[u8])) -> Result<()> {
    /// Bytes read at a time: few enough to be still in the second cache when they are looked at.
    const CHUNK_NBYTES: u64 = 256 << 10;
    let end = check_range(source.len(), byte_offset, nbytes)?;
    let mut at = byte_offset;
    let mut chunk = vec![0; to_usize(CHUNK_NBYTES.min(nbytes))?];
    while at < end {
        let step = CHUNK_NBYTES.min(end - at);
        let piece = &mut chunk[..to_usize(step)?];
        source.read_exact_at(at, piece)?;
        see(piece);
        at += step;
    }
    Ok(())
}

/// Converts a length to `usize`; fails only where the address space is smaller than the file.
///
/// # Errors
/// [`ErrorKind::Limit`](crate::ErrorKind::Limit) on such a machine.
pub fn to_usize(nbytes: u64) -> Result<usize> {
    usize::try_from(nbytes)
        .map_err(|_| Error::new(crate::ErrorKind::Limit, format!("{nbytes} bytes do not fit the address space")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_program_are_a_source() {
        static BYTES: &[u8] = &[1, 2, 3];
        let source: Source = Arc::new(BYTES);
        assert_eq!((source.len(), source.as_slice().map(<[u8]>::as_ptr)), (3, Some(BYTES.as_ptr())));
        assert_eq!(read_vec(&*source, 1, 2).unwrap(), [2, 3]);
        assert!(read_vec(&*source, 2, 2).is_err());
    }

    #[test]
    fn ranges_are_checked_before_reading() {
        let bytes = vec![1_u8, 2, 3];
        let mut out = [0; 2];
        bytes.read_exact_at(1, &mut out).unwrap();
        assert_eq!(out, [2, 3]);
        let error = bytes.read_exact_at(2, &mut out).unwrap_err().to_string();
        assert!(error.contains("ends 1 bytes too early"), "{error}");
        assert!(read_vec(&bytes, u64::MAX, 2).is_err());
        assert!(read_vec(&bytes, 0, u64::MAX / 2).is_err());
    }

    #[test]
    fn a_pipe_without_a_writer_is_refused_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        let error = open(&path, Access::Read).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        assert_eq!(zeroed(1 << 46).unwrap_err().kind(), crate::ErrorKind::Limit);
        assert_eq!(zeroed(1 << 27).unwrap().len(), 1 << 27);
    }

    #[test]
    fn looking_at_a_file_shows_its_bytes_or_what_is_missing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..9_000_001_u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let (source, nbytes) = (open(file.path(), Access::Read).unwrap(), bytes.len() as u64 - 5);
        let mut seen = Vec::new();
        look_through(&source, 5, nbytes, &mut |piece| seen.extend_from_slice(piece)).unwrap();
        assert!(seen == bytes[5..]);
        bring_in(&source, 5, nbytes).unwrap();
        file.as_file().set_len(4_000_000).unwrap();
        assert!(look_through(&source, 5, nbytes, &mut |_| ()).is_err());
        assert!(bring_in(&source, 5, nbytes).is_err());
    }

    #[test]
    fn file_map_and_memory_agree() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"0123456789").unwrap();
        for access in [Access::Read, Access::Map] {
            let source = open(file.path(), access).unwrap();
            assert_eq!(read_vec(&*source, 3, 4).unwrap(), b"3456");
            assert!(read_vec(&*source, 8, 3).is_err());
        }
        assert!(open(file.path().parent().unwrap(), Access::Read).is_err());
    }
}
