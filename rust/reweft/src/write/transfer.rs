//! Moving tensors into an output file, each to a place that is known beforehand.
//!
//! Three ways, by what a tensor is:
//! - A window of a file that needs no change is copied by the kernel, neighbours in one call. If its record has a CRC,
//!   a second thread reads the record for it meanwhile.
//! - Small records are read many at a time, headers included, checked in memory and written many at a time.
//! - What must be rearranged, unpacked or made is read in slabs.
//!
//! Bytes pass through buffers of a fixed size, so memory does not grow with the model; only a tensor whose elements are
//! spread over a large part of its storage, such as a transposed one, is held whole.

mod batch;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;

use super::copy::copy_range;
use super::watch::Watch;
use super::{AtomicFile, Progress};
use crate::checkpoint::{Checkpoint, Storage};
use crate::container::zip::NewRecord;
use crate::error::{Error, Result};
use crate::source::{self, Source};
use crate::tensor::TensorInfo;
use batch::Small;

/// Records of fewer bytes go through memory: a system call costs as much as copying some 64 KiB.
const SMALL_NBYTES: u64 = 128 << 10;

/// A tensor and its place in the output, in row-major order.
#[derive(Debug)]
pub(super) struct Piece<'a> {
    /// For messages.
    pub key: &'a str,
    /// What is written; a view of one of the checkpoint's storages.
    pub info: &'a TensorInfo,
    /// Where its first byte goes in the output file.
    pub at: u64,
    /// The record of a new archive that it fills: header and descriptor are written around it.
    pub record: Option<&'a NewRecord>,
}

/// The transfers of one conversion, into one file or several.
pub(super) struct Transfers<'a> {
    checkpoint: &'a Checkpoint,
    /// The source files as they were.
    watch: Watch<'a>,
    /// By storage number: each record is checked once, whatever is taken of it, and by however many files.
    checked: Vec<bool>,
    /// Bytes written, of how many.
    done: (u64, u64),
    progress: Progress<'a>,
}

impl<'a> Transfers<'a> {
    /// Begins to move `nbytes` bytes of tensors.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn new(checkpoint: &'a Checkpoint, nbytes: u64, progress: Progress<'a>) -> Result<Self> {
        let checked = vec![false; checkpoint.storages().len()];
        let watch = Watch::new(checkpoint.path(), checkpoint.files())?;
        Ok(Self { checkpoint, watch, checked, done: (0, nbytes), progress })
    }

    /// Writes all pieces to `out` and checks every CRC of what it reads. Gives the CRC-32 of each piece that is a record,
    /// and 0 for others.
    ///
    /// # Errors
    /// Read errors; [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC;
    /// [`ErrorKind::Limit`](crate::ErrorKind::Limit) for a tensor that repeats a small storage very often.
    pub fn run(&mut self, pieces: &[Piece<'_>], out: &AtomicFile) -> Result<Vec<u32>> {
        let job = Job::plan(self.checkpoint, pieces, out, &mut self.checked)?;
        job.run(&mut |moved| {
            let (done, of) = &mut self.done;
            *done = (*of).min(*done + moved);
            (self.progress)(*done, *of);
        })?;
        job.write_records()?;
        Ok(job.crcs.into_iter().map(AtomicU32::into_inner).collect())
    }

    /// Writes all pieces of a conversion into one file; as [`new`](Self::new), [`run`](Self::run) and
    /// [`finish`](Self::finish).
    pub fn run_all(
        checkpoint: &'a Checkpoint,
        pieces: &[Piece<'_>],
        out: &AtomicFile,
        progress: Progress<'a>,
    ) -> Result<Vec<u32>> {
        let mut transfers = Self::new(checkpoint, pieces.iter().map(|piece| piece.info.nbytes()).sum(), progress)?;
        let crcs = transfers.run(pieces, out)?;
        transfers.finish()?;
        Ok(crcs)
    }

    /// Ends all transfers.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a source that changed meanwhile.
    pub fn finish(self) -> Result<()> {
        self.watch.check()
    }
}

/// What is to be done, by kind.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    pieces: &'a [Piece<'a>],
    out: &'a AtomicFile,
    /// Of each piece; 0 if nobody wants it.
    crcs: Vec<AtomicU32>,
    copies: Vec<Copy<'a>>,
    small: Vec<Small<'a>>,
    /// Numbers of pieces that are read in slabs.
    streams: Vec<usize>,
    checks: Vec<Check<'a>>,
}

/// A range of a file that goes to the output as it is.
struct Copy<'a> {
    source: &'a Source,
    from: u64,
    to: u64,
    nbytes: u64,
    key: &'a str,
}

/// A range whose CRC is wanted.
struct Check<'a> {
    source: &'a Source,
    start: u64,
    nbytes: u64,
    /// The storage that is this range, if the archive states its CRC.
    record: Option<&'a Storage>,
    /// The piece that is this range.
    piece: Option<usize>,
    key: &'a str,
}

impl<'a> Job<'a> {
    fn plan(
        checkpoint: &'a Checkpoint,
        pieces: &'a [Piece<'a>],
        out: &'a AtomicFile,
        checked: &mut [bool],
    ) -> Result<Self> {
        let crcs = pieces.iter().map(|_| AtomicU32::new(0)).collect();
        let (copies, small, streams, checks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut job = Self { checkpoint, pieces, out, crcs, copies, small, streams, checks };
        for (number, piece) in pieces.iter().enumerate() {
            job.add(number, piece, checked).map_err(|error| job.in_place(piece.key, error))?;
        }
        job.copies.sort_by_key(|copy| copy.to);
        job.copies.dedup_by(|next, copy| {
            let joins = Arc::ptr_eq(copy.source, next.source)
                && (copy.from + copy.nbytes, copy.to + copy.nbytes) == (next.from, next.to);
            copy.nbytes += if joins { next.nbytes } else { 0 };
            joins
        });
        Ok(job)
    }

    /// Decides how a piece is moved.
    fn add(&mut self, number: usize, piece: &'a Piece<'a>, checked: &mut [bool]) -> Result<()> {
        let storage = self.checkpoint.storage_of(piece.info)?;
        let (byte_offset, nbytes) = piece.info.window(storage.nbytes)?;
        if nbytes == 0 {
            return Ok(());
        }
        if let Some(small) = Small::of(number, piece.info, storage) {
            self.small.push(small);
            return Ok(());
        }
        let is_plain = piece.info.is_contiguous() && !storage.is_swapped();
        let located = if is_plain { storage.locate()? } else { None };
        let Some((source, start)) = located else {
            self.streams.push(number);
            return Ok(());
        };
        let whole = nbytes == storage.nbytes;
        let key = piece.key;
        let check = |start, nbytes, record, piece| Check { source, start, nbytes, record, piece, key };
        let mut crc_of_piece = piece.record.map(|_| number);
        if storage.record_extent().is_some() && !std::mem::replace(&mut checked[piece.info.storage], true) {
            // One pass serves both if the piece is the record.
            let same = if whole { crc_of_piece.take() } else { None };
            self.checks.push(check(start, storage.nbytes, Some(storage), same));
        }
        if crc_of_piece.is_some() {
            self.checks.push(check(start + byte_offset, nbytes, None, crc_of_piece));
        }
        self.copies.push(Copy { source, from: start + byte_offset, to: piece.at, nbytes, key: piece.key });
        Ok(())
    }

    /// Writes everything; a second thread does checks, and this one helps when it has written all.
    fn run(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let check_all = || -> Result<()> {
            while let Some(check) = self.checks.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let checked = self.check(check);
                stop.fetch_or(checked.is_err(), Ordering::Relaxed);
                checked?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let checker = (!self.checks.is_empty()).then(|| thread::Builder::new().spawn_scoped(scope, check_all));
            let written = self.write_all(&stop, progress).and_then(|()| check_all());
            stop.fetch_or(written.is_err(), Ordering::Relaxed);
            let checked = match checker {
                Some(Ok(checker)) => {
                    checker.join().unwrap_or_else(|_| Err(Error::format("the checking thread failed")))
                }
                // Without a second thread this one did all checks.
                Some(Err(_)) | None => Ok(()),
            };
            written.and(checked)
        })
    }

    fn write_all(&self, stop: &AtomicBool, progress: &mut dyn FnMut(u64)) -> Result<()> {
        self.write_small(progress)?;
        let mut buffers = stream::Buffers::default();
        for number in &self.streams {
            if !stop.load(Ordering::Relaxed) {
                let (piece, crc) = (&self.pieces[*number], &self.crcs[*number]);
                let streamed =
                    self.stream(piece, &mut buffers, progress).map_err(|error| self.in_place(piece.key, error));
                crc.store(streamed?, Ordering::Relaxed);
            }
        }
        for copy in &self.copies {
            let mut stopped = false;
            let mut moved = |nbytes| {
                progress(nbytes);
                stopped = stop.load(Ordering::Relaxed);
                // Whoever set it has the error that counts; this one is dropped below.
                if stopped { Err(Error::format("stopped")) } else { Ok(()) }
            };
            let copied = copy_range(copy.source, copy.from, self.out, copy.to, copy.nbytes, &mut moved);
            if stopped {
                break;
            }
            copied.map_err(|error| self.in_place(copy.key, error))?;
        }
        Ok(())
    }

    /// Writes header and descriptor of records whose bytes are written; small ones have theirs already.
    fn write_records(&self) -> Result<()> {
        let mut done = vec![false; self.pieces.len()];
        self.small.iter().for_each(|small| done[small.piece] = true);
        for ((piece, crc), done) in self.pieces.iter().zip(&self.crcs).zip(done) {
            if let (Some(record), false) = (piece.record, done) {
                self.out.write_at(&record.header(), record.header_offset())?;
                let descriptor = record.descriptor(crc.load(Ordering::Relaxed));
                self.out.write_at(&descriptor, piece.at + piece.info.nbytes())?;
            }
        }
        Ok(())
    }

    fn check(&self, check: &Check<'_>) -> Result<()> {
        let crc = source::crc(&**check.source, check.start, check.nbytes);
        let checked = crc.and_then(|crc| {
            if let Some(crcs) = check.piece.and_then(|piece| self.crcs.get(piece)) {
                crcs.store(crc, Ordering::Relaxed);
            }
            check.record.map_or(Ok(()), |record| record.note_crc(crc))
        });
        checked.map_err(|error| self.in_place(check.key, error))
    }

    fn in_place(&self, key: &str, error: Error) -> Error {
        error.of_key(key).in_file(self.checkpoint.path())
    }
}
