//! A storage: bytes that tensors share, and the place they are read from.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::made::Making;
use crate::container::zip::{Archive, Method, Record};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{self, ReadAt, Source};

/// Bytes that one or more tensors are views of.
#[derive(Debug)]
pub struct Storage {
    /// Type that the file declares for the storage; `None` for plain bytes.
    pub dtype: Option<Dtype>,
    /// Length in bytes.
    pub nbytes: u64,
    /// Where the tensors lived when they were saved: `cpu`, `cuda:0`. Storages of a file share the text.
    pub device: Arc<str>,
    place: Place,
    /// Whether the record's CRC was compared already.
    checked: AtomicBool,
    /// Whether the file is of the other byte order.
    swapped: bool,
}

#[derive(Debug)]
enum Place {
    /// A record of an archive, by its number in the directory; it has a CRC.
    Record(Arc<Archive>, usize),
    /// A range of a source from this byte on, under a name.
    Range(Source, u64, Box<str>),
    /// Nowhere: made of other storages when it is read, over this many layers.
    Made(Box<Making>, usize),
}

/// What all constructors are given.
pub(super) struct Extent {
    pub dtype: Option<Dtype>,
    pub nbytes: u64,
    pub device: Arc<str>,
}

impl Storage {
    fn new(extent: Extent, place: Place) -> Self {
        let Extent { dtype, nbytes, device } = extent;
        // Only records have something to compare.
        let checked = AtomicBool::new(!matches!(place, Place::Record(..)));
        Self { dtype, nbytes, device, place, checked, swapped: false }
    }

    /// A record of an archive, by its number in the directory.
    pub(super) fn record(archive: Arc<Archive>, number: usize, extent: Extent) -> Self {
        Self::new(extent, Place::Record(archive, number))
    }

    /// A range of a source that has other bytes around it; `name` stands for it in messages.
    pub(super) fn range(source: Source, byte_offset: u64, name: &str, extent: Extent) -> Self {
        Self::new(extent, Place::Range(source, byte_offset, name.into()))
    }

    /// So many bytes that nobody is going to read.
    pub(super) fn unread(nbytes: u64) -> Self {
        let nothing: Source = Arc::new(Vec::new());
        Self::range(nothing, 0, "", Extent { dtype: None, nbytes, device: "cpu".into() })
    }

    /// A whole source.
    pub(super) fn memory(source: Source, number: usize) -> Self {
        let extent = Extent { dtype: None, nbytes: source.len(), device: "cpu".into() };
        Self::range(source, 0, &number.to_string(), extent)
    }

    /// Bytes that other storages of the same checkpoint make up, over `depth` layers of such storages.
    pub(super) fn made(making: Making, depth: usize) -> Result<Self> {
        let extent = Extent { dtype: Some(making.dtype()), nbytes: making.nbytes()?, device: "cpu".into() };
        Ok(Self::new(extent, Place::Made(Box::new(making), depth)))
    }

    /// Says that the bytes of every element stand in the other order.
    pub(super) fn swapped(mut self) -> Self {
        self.swapped = true;
        self
    }

    /// Whether the bytes of every element stand in the other order; [`Checkpoint::read`](super::Checkpoint::read)
    /// turns them.
    pub fn is_swapped(&self) -> bool {
        self.swapped
    }

    /// Adds `first` to the numbers of the storages that the bytes are made of, for a checkpoint of several files.
    pub(super) fn renumbered(mut self, first: usize) -> Self {
        if let Place::Made(making, _) = &mut self.place {
            making.operands_mut().iter_mut().for_each(|of| of.storage += first);
        }
        self
    }

    /// How the bytes are made, if they are in no file.
    pub(super) fn making(&self) -> Option<&Making> {
        match &self.place {
            Place::Made(making, _) => Some(making),
            _ => None,
        }
    }

    /// The file or memory that the bytes lie in; `None` where they are made.
    pub fn source(&self) -> Option<&Source> {
        match &self.place {
            Place::Record(archive, _) => Some(archive.source()),
            Place::Range(source, ..) => Some(source),
            Place::Made(..) => None,
        }
    }

    /// Layers of made storages down to bytes in a file; 0 for those.
    pub(super) fn depth(&self) -> usize {
        match &self.place {
            Place::Made(_, depth) => *depth,
            _ => 0,
        }
    }

    /// Whether a range of the storage costs no more to read than its share: not so where all of it must be unpacked or
    /// made first. Writers that read in pieces ask.
    pub fn reads_in_pieces(&self) -> bool {
        self.making().is_none_or(Making::works_in_pieces) && !self.is_packed()
    }

    /// Name of the record in its archive; empty where storages have no names.
    pub fn name(&self) -> &str {
        match &self.place {
            Place::Record(..) => self.as_record().map_or("", |record| record.name),
            Place::Range(_, _, name) => name,
            Place::Made(..) => "",
        }
    }

    /// The archive that a storage is a record of, and the record's name.
    pub(crate) fn archive_record(&self) -> Option<(&Archive, &str)> {
        match &self.place {
            Place::Record(archive, number) => archive.record(*number).ok().map(|record| (&**archive, record.name)),
            _ => None,
        }
    }

    fn as_record(&self) -> Option<Record<'_>> {
        match &self.place {
            Place::Record(archive, number) => archive.record(*number).ok(),
            _ => None,
        }
    }

    /// The source and the absolute offset of the storage's first byte; `None` where the bytes have no place in a file,
    /// because they are packed or made. Reads the record's local header.
    ///
    /// # Errors
    /// As [`Record::place`].
    pub fn locate(&self) -> Result<Option<(&Source, u64)>> {
        match &self.place {
            Place::Record(archive, number) => {
                let record = archive.record(*number)?;
                if record.entry.method != Method::STORED {
                    return Ok(None);
                }
                Ok(Some((archive.source(), record.place()?.data.start)))
            }
            Place::Range(source, byte_offset, _) => Ok(Some((source, *byte_offset))),
            Place::Made(..) => Ok(None),
        }
    }

    /// The file of a record with a CRC, and where it lies, from its local header to what follows it; `None` for what is
    /// no such record, or compressed.
    pub(crate) fn record_extent(&self) -> Option<(&Source, Range<u64>)> {
        let record = self.as_record().filter(|record| record.entry.method == Method::STORED)?;
        Some((self.source()?, record.entry.extent()))
    }

    /// The offset of a record's first byte, found through a reader of its file that may hold the header already.
    pub(crate) fn locate_record_in(&self, file: &dyn ReadAt) -> Result<u64> {
        let record = self.as_record().ok_or_else(|| Error::format("storage is no record"))?;
        Ok(record.place_in(file)?.data.start)
    }

    /// Compares the record's CRC, once. Reads the whole record the first time, nothing afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC; read errors.
    pub fn check(&self) -> Result<()> {
        if self.checked.load(Ordering::Acquire) {
            return Ok(());
        }
        if let (Some(record), Some((source, start))) = (self.as_record(), self.locate()?) {
            record.check_crc(source::crc(&**source, start, self.nbytes)?)?;
            self.checked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Reads every byte once and compares the CRC, so that a later read meets no error that this one would not have met.
    /// Bytes that are in memory or mapped are taken for readable.
    ///
    /// # Errors
    /// As [`check`](Self::check); read errors.
    pub(super) fn probe(&self) -> Result<()> {
        if self.is_packed() {
            return self.as_record().map_or(Ok(()), |record| record.read().map(drop));
        }
        let Some((source, start)) = self.locate()?.filter(|(source, _)| source.as_slice().is_none()) else {
            return self.check();
        };
        if self.is_checked() {
            return source::bring_in(source, start, self.nbytes);
        }
        let mut hasher = crc32fast::Hasher::new();
        source::look_through(source, start, self.nbytes, &mut |piece| hasher.update(piece))?;
        self.note_crc(hasher.finalize())
    }

    /// Takes note of a CRC that somebody computed over the whole record while reading it for another purpose.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) if it is wrong.
    pub(crate) fn note_crc(&self, found: u32) -> Result<()> {
        if let Some(record) = self.as_record() {
            record.check_crc(found)?;
            self.checked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether the record's CRC was compared, or there is none.
    pub(crate) fn is_checked(&self) -> bool {
        self.checked.load(Ordering::Acquire)
    }

    /// Reads a range of a storage that is in a file, after its CRC was checked; a whole record is read once for both.
    ///
    /// # Errors
    /// As [`check`](Self::check) and [`locate`](Self::locate); a range behind the storage.
    pub(super) fn read_into(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let nbytes = out.len() as u64;
        source::check_range(self.nbytes, byte_offset, nbytes).map_err(|error| error.in_record(self.name()))?;
        let Some((source, start)) = self.locate()? else {
            // Somebody zipped the file again. Unpacked anew for each tensor; sharing of a record is rare in such files.
            let record = self.as_record().ok_or_else(|| Error::format("storage has no bytes of its own"))?;
            out.copy_from_slice(source::slice(&record.read()?, byte_offset, nbytes)?);
            return Ok(());
        };
        if nbytes == self.nbytes && !self.is_checked() {
            return self.note_crc(source::read_hashed(&**source, start, out)?);
        }
        self.check()?;
        source.read_exact_at(start + byte_offset, out)
    }

    /// The storage's bytes where they are in memory or mapped, after the CRC was checked; `None` if they must be read.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn as_slice(&self) -> Result<Option<&[u8]>> {
        if self.swapped {
            return Ok(None);
        }
        let Some((source, start)) = self.locate()? else { return Ok(None) };
        let Some(bytes) = source.as_slice() else { return Ok(None) };
        self.check()?;
        source::slice(bytes, start, self.nbytes).map(Some)
    }

    /// Whether the record is compressed, so that its bytes have no place in the file.
    pub(crate) fn is_packed(&self) -> bool {
        self.as_record().is_some_and(|record| record.entry.method != Method::STORED)
    }

    /// Refuses a record whose length is not what the file's metadata says.
    pub(super) fn check_nbytes(&self) -> Result<()> {
        let Some(record) = self.as_record() else { return Ok(()) };
        let found = record.entry.nbytes;
        if found == self.nbytes {
            return Ok(());
        }
        Err(Error::format(format!("record has {found} bytes, storage needs {}", self.nbytes)).in_record(record.name))
    }
}
