//! Small records: read many at a time, headers included, checked in memory, written many at a time.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Job, Piece, SMALL_NBYTES};
use crate::checkpoint::Storage;
use crate::container::zip::NewRecord;
use crate::convert;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, Source, slice, to_usize};
use crate::tensor::{TensorInfo, contiguous};

/// Most bytes read at a time.
const WINDOW_NBYTES: u64 = 4 << 20;
/// Bytes between two records that are rather read and thrown away than skipped by another system call.
const GAP_NBYTES: u64 = 64 << 10;

/// A piece in a small record.
pub(super) struct Small<'a> {
    pub piece: usize,
    storage: &'a Storage,
    source: &'a Source,
    /// The record in its file, with header and descriptor.
    extent: Range<u64>,
}

impl<'a> Small<'a> {
    /// `None` for what is no small record, and for a tensor that repeats its elements so often that it does not fit the
    /// buffers.
    pub fn of(piece: usize, info: &TensorInfo, storage: &'a Storage) -> Option<Self> {
        let is_small = storage.nbytes < SMALL_NBYTES && info.nbytes() <= WINDOW_NBYTES;
        let (source, extent) = storage.record_extent().filter(|_| is_small)?;
        (extent.end - extent.start <= WINDOW_NBYTES).then_some(Self { piece, storage, source, extent })
    }
}

impl Job<'_> {
    /// Writes all small pieces.
    pub(super) fn write_small(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let mut order: Vec<&Small<'_>> = self.small.iter().collect();
        order.sort_by_key(|small| (Arc::as_ptr(small.source).cast::<()>(), small.extent.start));
        let (mut window, mut gathered) = (Vec::new(), Gathered { job: self, at: 0, bytes: Vec::new() });
        let mut rest = &order[..];
        while let Some(first) = rest.first() {
            let source = first.source;
            let start = first.extent.start;
            let mut end = first.extent.end;
            let count = rest.iter().take_while(|small| {
                let joins = Arc::ptr_eq(source, small.source)
                    && small.extent.start <= end + GAP_NBYTES
                    && small.extent.end - start <= WINDOW_NBYTES;
                end = if joins { end.max(small.extent.end) } else { end };
                joins
            });
            let (batch, left) = rest.split_at(count.count());
            window.resize(to_usize(end - start)?, 0);
            source
                .read_exact_at(start, &mut window)
                .map_err(|error| self.in_place(self.pieces[first.piece].key, error))?;
            self.write_batch(batch, &Held { source, start, bytes: &window }, &mut gathered, progress)?;
            rest = left;
        }
        gathered.flush(progress)
    }

    fn write_batch(
        &self,
        batch: &[&Small<'_>],
        held: &Held<'_>,
        gathered: &mut Gathered<'_, '_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut batch: Vec<_> = batch.to_vec();
        batch.sort_by_key(|small| self.pieces[small.piece].at);
        for small in batch {
            let piece = &self.pieces[small.piece];
            let mut write = || {
                let bytes = held.record(small.storage)?;
                gathered.begin(piece, progress)?;
                let target = gathered.room(piece.info.nbytes())?;
                place(small.storage, piece.info, bytes, target)?;
                if let Some(record) = piece.record {
                    let crc = crc32fast::hash(target);
                    self.crcs[small.piece].store(crc, Ordering::Relaxed);
                    gathered.bytes.extend(record.descriptor(crc));
                }
                Ok(())
            };
            write().map_err(|error| self.in_place(piece.key, error))?;
        }
        // The next batch may go anywhere.
        gathered.flush(progress)
    }
}

/// Puts a tensor's elements in row-major order, from the bytes of its storage.
fn place(storage: &Storage, info: &TensorInfo, record: &[u8], target: &mut [u8]) -> Result<()> {
    let (byte_offset, nbytes) = info.window(storage.nbytes)?;
    let window = slice(record, byte_offset, nbytes)?;
    if info.is_contiguous() {
        target.copy_from_slice(window);
    } else {
        let itemsize = info.dtype.itemsize().ok_or_else(|| {
            let what = format!("elements of {} share bytes, so their order cannot be changed", info.dtype);
            Error::new(ErrorKind::Unsupported, what)
        })?;
        let itemsize = to_usize(itemsize)?;
        convert::relayout(itemsize, &info.shape, window, &info.strides, target, &contiguous(&info.shape))?;
    }
    if storage.is_swapped() {
        target.chunks_exact_mut(info.dtype.swap_unit().max(1)).for_each(<[u8]>::reverse);
    }
    Ok(())
}

/// Neighbours in the output, written at once.
struct Gathered<'j, 'a> {
    job: &'j Job<'a>,
    at: u64,
    bytes: Vec<u8>,
}

impl Gathered<'_, '_> {
    /// Goes to where a piece starts, which is here if it is neighbour to the one before, and writes its record's header.
    fn begin(&mut self, piece: &Piece<'_>, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let held = self.bytes.len() as u64;
        let start = piece.record.map_or(piece.at, NewRecord::header_offset);
        if self.at + held != start || held + piece.info.nbytes() > WINDOW_NBYTES {
            self.flush(progress)?;
            self.at = start;
        }
        if let Some(record) = piece.record {
            self.bytes.extend(record.header());
        }
        Ok(())
    }

    fn room(&mut self, nbytes: u64) -> Result<&mut [u8]> {
        let start = self.bytes.len();
        self.bytes.resize(start + to_usize(nbytes)?, 0);
        Ok(&mut self.bytes[start..])
    }

    fn flush(&mut self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        self.job.out.write_at(&self.bytes, self.at)?;
        progress(self.bytes.len() as u64);
        self.at += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}

/// A part of a file that is in memory; other parts are read from the file.
struct Held<'a> {
    source: &'a Source,
    start: u64,
    bytes: &'a [u8],
}

impl Held<'_> {
    /// The bytes of a record, after its CRC was compared.
    fn record(&self, storage: &Storage) -> Result<&[u8]> {
        let start = storage.locate_record_in(self)?;
        let bytes = slice(self.bytes, start - self.start.min(start), storage.nbytes)?;
        storage.note_crc(crc32fast::hash(bytes))?;
        Ok(bytes)
    }
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("start", &self.start).field("nbytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl ReadAt for Held<'_> {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let held = byte_offset.checked_sub(self.start).and_then(|at| slice(self.bytes, at, out.len() as u64).ok());
        match held {
            Some(bytes) => out.copy_from_slice(bytes),
            None => self.source.read_exact_at(byte_offset, out)?,
        }
        Ok(())
    }
}
