//! The engine's one unsafe file: a private, read-only mapping of a file.

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
