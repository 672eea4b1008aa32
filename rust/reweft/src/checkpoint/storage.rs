//! A storage: bytes that tensors share, and the place they are read from.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::container::zip::{Archive, Method};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{self, Source};

/// Bytes that one or more tensors are views of.
#[derive(Debug)]
pub struct Storage {
    /// Name of the record in its archive; empty where storages have no names.
    pub name: String,
    /// Type that the file declares for the storage; `None` for plain bytes.
    pub dtype: Option<Dtype>,
    /// Length in bytes.
    pub nbytes: u64,
    /// Where the tensors lived when they were saved: `cpu`, `cuda:0`.
    pub device: String,
    place: Place,
    /// Whether the record's CRC was compared already.
    checked: AtomicBool,
    /// Whether the file is of the other byte order.
    swapped: bool,
}

#[derive(Debug)]
enum Place {
    /// A record of an archive, with a CRC.
    Record(Arc<Archive>),
    /// A range of a source from this byte on.
    Range(Source, u64),
}

impl Storage {
    pub(super) fn record(archive: Arc<Archive>, name: String, dtype: Option<Dtype>, nbytes: u64, device: &str) -> Self {
        let checked = AtomicBool::new(false);
        Self { name, dtype, nbytes, device: device.to_owned(), place: Place::Record(archive), checked, swapped: false }
    }

    pub(super) fn range(source: Source, byte_offset: u64, nbytes: u64, dtype: Dtype) -> Self {
        let place = Place::Range(source, byte_offset);
        let (name, dtype, device) = (String::new(), Some(dtype), "cpu".to_owned());
        Self { name, dtype, nbytes, device, place, checked: AtomicBool::new(true), swapped: false }
    }

    /// A range of a file that has other bytes around it.
    pub(super) fn in_file(
        source: Source,
        byte_offset: u64,
        key: &str,
        dtype: Option<Dtype>,
        nbytes: u64,
        device: &str,
    ) -> Self {
        let place = Place::Range(source, byte_offset);
        let (name, device, checked) = (key.to_owned(), device.to_owned(), AtomicBool::new(true));
        Self { name, dtype, nbytes, device, place, checked, swapped: false }
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

    pub(super) fn from_memory((number, source): (usize, Source)) -> Self {
        let (name, nbytes, device) = (number.to_string(), source.len(), "cpu".to_owned());
        let place = Place::Range(source, 0);
        Self { name, dtype: None, nbytes, device, place, checked: AtomicBool::new(true), swapped: false }
    }

    /// The file or memory that the bytes lie in.
    pub fn source(&self) -> &Source {
        match &self.place {
            Place::Record(archive) => archive.source(),
            Place::Range(source, _) => source,
        }
    }

    /// The source and the absolute offset of the storage's first byte. Reads the record's local header.
    ///
    /// # Errors
    /// As [`Archive::place`].
    pub fn locate(&self) -> Result<(&Source, u64)> {
        match &self.place {
            Place::Record(archive) => Ok((archive.source(), archive.place(&self.name)?.data.start)),
            Place::Range(source, byte_offset) => Ok((source, *byte_offset)),
        }
    }

    /// Compares the record's CRC, once. Reads the whole record the first time, nothing afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC; read errors.
    pub fn check(&self) -> Result<()> {
        let Place::Record(archive) = &self.place else { return Ok(()) };
        if self.checked.load(Ordering::Acquire) || self.is_packed() {
            return Ok(());
        }
        let (source, start) = self.locate()?;
        archive.check_crc(&self.name, source::crc(&**source, start, self.nbytes)?)?;
        self.checked.store(true, Ordering::Release);
        Ok(())
    }

    /// Reads a range of the storage into `out` after its CRC was checked; a whole record is read once for both.
    ///
    /// # Errors
    /// As [`check`](Self::check) and [`locate`](Self::locate); a range behind the storage.
    pub fn read_into(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let nbytes = out.len() as u64;
        source::check_range(self.nbytes, byte_offset, nbytes).map_err(|error| error.in_record(&self.name))?;
        if let Place::Record(archive) = &self.place
            && self.is_packed()
        {
            // Somebody zipped the file again. Unpacked anew for each tensor; sharing of a record is rare in such files.
            let bytes = archive.read(&self.name)?;
            out.copy_from_slice(source::slice(&bytes, byte_offset, nbytes)?);
            return Ok(());
        }
        let (source, start) = self.locate()?;
        let whole = byte_offset == 0 && nbytes == self.nbytes;
        if !whole {
            self.check()?;
        }
        source.read_exact_at(start + byte_offset, out)?;
        if let Place::Record(archive) = &self.place
            && !self.checked.load(Ordering::Acquire)
        {
            archive.check_crc(&self.name, crc32fast::hash(out))?;
            self.checked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The storage's bytes where they are in memory or mapped, after the CRC was checked; `None` if they must be read.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn as_slice(&self) -> Result<Option<&[u8]>> {
        if self.swapped || self.is_packed() {
            return Ok(None);
        }
        let (source, start) = self.locate()?;
        let Some(bytes) = source.as_slice() else { return Ok(None) };
        self.check()?;
        source::slice(bytes, start, self.nbytes).map(Some)
    }

    /// Whether the record is compressed, so that its bytes have no place in the file.
    fn is_packed(&self) -> bool {
        match &self.place {
            Place::Record(archive) => archive.entry(&self.name).is_ok_and(|entry| entry.method != Method::STORED),
            Place::Range(..) => false,
        }
    }

    /// Refuses a record whose length is not what the file's metadata says.
    pub(super) fn check_nbytes(&self) -> Result<()> {
        let Place::Record(archive) = &self.place else { return Ok(()) };
        let found = archive.entry(&self.name)?.nbytes;
        if found == self.nbytes {
            return Ok(());
        }
        Err(Error::format(format!("record has {found} bytes, storage needs {}", self.nbytes)).in_record(&self.name))
    }
}
