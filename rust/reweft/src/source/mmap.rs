//! The engine's one unsafe file: private mappings of a file, to read from and to write to.

#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use super::{ReadAt, copy_from};
use crate::error::{Error, Result};

/// A file mapped into memory, private and read-only.
///
/// Pages are read when they are touched and shared with the page cache, so opening costs no bytes. The price: if
/// another process *truncates* the file, touching the lost pages ends this process with SIGBUS, and if it *overwrites*
/// the file, the new bytes may show. Replacing the file by a rename, as every copy-mode write here does, is safe:
/// the mapping keeps the old file alive.
#[derive(Debug)]
pub struct Mmap {
    file: File,
    map: memmap2::Mmap,
}

impl Mmap {
    /// Maps `len` bytes of `file`.
    pub(super) fn new(path: &Path, file: File, len: u64) -> Result<Self> {
        let len = super::to_usize(len).map_err(|error| error.in_file(path))?;
        // SAFETY: the bytes are only ever read as plain `u8`, for which every value is valid. That no other process
        // truncates or rewrites the file is the promise of the caller who chose `Access::Map`, whose documentation
        // states the consequence.
        let map = unsafe { memmap2::MmapOptions::new().len(len).map_copy_read_only(&file) };
        let map = map.map_err(|error| Error::io("mmap", error).in_file(path))?;
        Ok(Self { file, map })
    }
}

/// A file mapped for one owner, who may write to the bytes: what is written stays in this process and never reaches the file.
///
/// What [`Mmap`] says of files that change holds for pages that nobody wrote to yet.
#[derive(Debug)]
pub struct PrivateMap {
    /// Holds the lock that keeps in-place rewrites away.
    _file: File,
    map: memmap2::MmapRaw,
}

impl PrivateMap {
    /// Maps an open file whole, copy on write.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) if the system refuses, [`ErrorKind::Usage`](crate::ErrorKind::Usage) if
    /// another process rewrites the file in place.
    pub fn new(path: &Path, file: &File) -> Result<Self> {
        let file = file.try_clone().map_err(|error| Error::io("dup", error).in_file(path))?;
        super::lock_shared(path, &file)?;
        // SAFETY: as for `Mmap`; the bytes are handed out as a raw pointer, so that no reference says they stay the same.
        let map = unsafe { memmap2::MmapOptions::new().map_copy(&file) };
        let map = map.map_err(|error| Error::io("mmap", error).in_file(path))?;
        Ok(Self { _file: file, map: map.into() })
    }

    /// How many bytes there are.
    pub fn nbytes(&self) -> usize {
        self.map.len()
    }

    /// The first byte. Valid, also for writing, while this lives.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }
}

/// Bytes that are mapped at a time: they count as memory of the process meanwhile.
const WINDOW_NBYTES: u64 = 8 << 20;

/// Sees to it that the page cache has a range of a file, so that reading it does not wait for the disk, nor fail with it.
/// What is there already costs next to nothing.
pub(super) fn bring_in(source: &dyn ReadAt, file: &File, byte_offset: u64, nbytes: u64) -> Result<()> {
    let end = super::check_range(source.len(), byte_offset, nbytes)?;
    // Pages have at most this size, so windows begin with one.
    let mut at = byte_offset & !0xffff;
    while at < end {
        let step = WINDOW_NBYTES.min(end - at);
        // SAFETY: as for `Mmap`; the bytes are not touched.
        let map =
            unsafe { memmap2::MmapOptions::new().offset(at).len(super::to_usize(step)?).map_copy_read_only(file) };
        if !map.is_ok_and(|map| is_resident(&map)) {
            super::read_through(source, at, step, &mut |_| ())?;
        }
        at += step;
    }
    Ok(())
}

/// Whether the page cache has every page of a mapping that begins with one.
fn is_resident(map: &memmap2::Mmap) -> bool {
    /// No page is smaller.
    const PAGE_NBYTES: usize = 4096;
    let mut pages = vec![0_u8; map.len().div_ceil(PAGE_NBYTES)];
    // SAFETY: the range is mapped, and there is a byte for each page in it; those of larger pages stay as they are.
    let asked = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    // SAFETY: asks for a number, and touches no memory.
    let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(PAGE_NBYTES);
    asked == 0 && pages.iter().take(map.len().div_ceil(size)).all(|page| page & 1 == 1)
}

/// Shows a range of a file window by window, from the page cache and without a copy. What cannot be mapped, or read when
/// it is, is read instead, so that whatever is wrong becomes an error of `source`, which the file is behind.
pub(super) fn look_through(
    source: &dyn ReadAt,
    file: &File,
    byte_offset: u64,
    nbytes: u64,
    see: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let end = super::check_range(source.len(), byte_offset, nbytes)?;
    let mut at = byte_offset;
    while at < end {
        let step = WINDOW_NBYTES.min(end - at);
        // SAFETY: as for `Mmap`. The pages are there before they are looked at, so only a file that is truncated within
        // that moment ends the process.
        let map =
            unsafe { memmap2::MmapOptions::new().offset(at).len(super::to_usize(step)?).map_copy_read_only(file) };
        match map {
            Ok(map) if map.advise(memmap2::Advice::PopulateRead).is_ok() => see(&map),
            _ => super::read_through(source, at, step, see)?,
        }
        at += step;
    }
    Ok(())
}

impl ReadAt for Mmap {
    fn len(&self) -> u64 {
        self.map.len() as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        copy_from(&self.map, byte_offset, out)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(&self.map)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
