//! The zip subset that torch writes, read strictly: stored records, zip64, data descriptors.
//!
//! Sizes come from the central directory, the place of the data from the local header, which is read when a record is
//! used and must agree with the directory. What two readers could understand differently (overlaps, gaps, duplicate
//! names, a lying count) is an error. Source: PKWARE APPNOTE 6.3, sections 4.3.7 to 4.3.16 and 4.5.3; what torch
//! writes was read from its files.

mod cut;
mod directory;
mod write;

use std::io::Read as _;
use std::ops::Range;

use indexmap::IndexMap;

use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, Source, read_vec};
pub use cut::{CutRecord, find_record, has_end};
use directory::Zip64;
pub use write::append_records;
pub(crate) use write::{NewRecord, tail};

/// Bytes of a local header before its name (APPNOTE 4.3.7).
const LOCAL_HEADER_NBYTES: u64 = 30;
/// Signature of a local header.
const LOCAL_SIGNATURE: u32 = 0x0403_4b50;
/// Signature of a data descriptor (APPNOTE 4.3.9).
const DESCRIPTOR_SIGNATURE: u32 = 0x0807_4b50;
/// General purpose bit 3: CRC and sizes follow the data.
const FLAG_DESCRIPTOR: u16 = 1 << 3;
/// General purpose bits 0, 5, 6 and 13: encryption, patched data, strong encryption, masked headers.
const FLAGS_REFUSED: u16 = 1 | 1 << 5 | 1 << 6 | 1 << 13;

/// How a record's bytes are kept. An open set: unknown codes survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method(pub u16);

impl Method {
    /// As they are; the only method torch writes and the only one whose bytes have a place in the file.
    pub const STORED: Self = Self(0);
    /// Deflate, found in files that were zipped again.
    pub const DEFLATED: Self = Self(8);
}

/// One line of the central directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where the local header starts in the file.
    pub header_offset: u64,
    /// Bytes of the record, unpacked.
    pub nbytes: u64,
    /// Bytes the record takes in the file.
    pub packed_nbytes: u64,
    /// CRC-32 of the unpacked bytes; 0 with bytes present means "not computed".
    pub crc: u32,
    /// How the bytes are kept.
    pub method: Method,
    /// General purpose flags.
    pub flags: u16,
    /// Where the entry's fixed part starts in the file's central directory.
    pub directory_offset: u64,
    /// Where the next local header, or the central directory, starts: the record ends before it.
    limit: u64,
}

impl Entry {
    /// From the local header to what follows the record.
    pub(crate) fn extent(&self) -> Range<u64> {
        self.header_offset..self.limit
    }

    /// Whether the writer left the CRC out (torch does with `compute_crc32=False`).
    pub fn crc_is_absent(&self) -> bool {
        self.crc == 0 && self.nbytes > 0
    }
}

/// A record's place, with the local header checked against the central directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The bytes of the record in the file.
    pub data: Range<u64>,
    /// The data descriptor behind them, if there is one; 16 bytes, or 24 with 64-bit sizes.
    pub descriptor: Option<Range<u64>>,
}

/// Entries by name. The hasher is seeded at random, so that nobody can choose names that collide.
pub type Entries = IndexMap<String, Entry, foldhash::quality::RandomState>;

/// An archive whose central directory has been read and checked; record bytes have not.
#[derive(Debug)]
pub struct Archive {
    source: Source,
    entries: Entries,
    directory: Range<u64>,
}

impl Archive {
    /// Whether `source` begins like a zip archive. Reads 4 bytes.
    pub fn detect(source: &dyn ReadAt) -> bool {
        let mut magic = [0; 4];
        source.read_exact_at(0, &mut magic).is_ok() && magic == LOCAL_SIGNATURE.to_le_bytes()
    }

    /// Reads and checks the central directory, and of the records only the last one's header: what stands between it
    /// and the directory would be seen by nobody else.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a truncated archive, lying counts or sizes, bytes before or behind the archive,
    /// duplicate or unsafe names, overlapping records; [`ErrorKind::Unsupported`] for encryption and split archives.
    pub fn open(source: Source) -> Result<Self> {
        let (entries, directory) = directory::read(&*source)?;
        let archive = Self { source, entries, directory };
        let is_last = |entry: &Entry| entry.limit == archive.directory.start && entry.method == Method::STORED;
        if let Some((name, _)) = archive.entries.iter().find(|(_, entry)| is_last(entry)) {
            archive.place(name)?;
        }
        Ok(archive)
    }

    /// The entries by name, in the order of the central directory.
    pub fn entries(&self) -> &Entries {
        &self.entries
    }

    /// The bytes of the central directory in the file; the end records follow it.
    pub fn directory(&self) -> Range<u64> {
        self.directory.clone()
    }

    /// The file or memory the archive is in.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Looks up a record.
    ///
    /// # Errors
    /// [`ErrorKind::Format`]: every caller asks for what the format requires.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::format("the archive has no such record").in_record(name))
    }

    /// A record by its number in the directory, as [`IndexMap::get_index_of`] on [`entries`](Self::entries) gives it.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a number that the directory does not have.
    pub fn record(&self, number: usize) -> Result<Record<'_>> {
        match self.entries.get_index(number) {
            Some((name, entry)) => Ok(Record { archive: self, name, entry }),
            None => Err(Error::format(format!("the archive has no record number {number}"))),
        }
    }

    fn find<'a>(&'a self, name: &'a str) -> Result<Record<'a>> {
        Ok(Record { archive: self, name, entry: self.entry(name)? })
    }

    /// The one folder that all records share, as torch writes them, without its slash.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if a record lies outside the first one's folder.
    pub fn root(&self) -> Result<&str> {
        let root = self.entries.keys().next().and_then(|name| name.split_once('/')).map(|(root, _)| root);
        let Some(root) = root else {
            let error = Error::format("records do not lie in a folder, as torch writes them");
            return Err(error.with_hint("if this is an archive of files with a checkpoint among them, unpack it first"));
        };
        match self.entries.keys().find(|name| name.strip_prefix(root).is_none_or(|rest| !rest.starts_with('/'))) {
            None => Ok(root),
            Some(other) => Err(Error::format(format!("record lies outside the folder {root:?}")).in_record(other)),
        }
    }

    /// Finds a stored record's bytes; see [`Record::place`].
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Format`] if there is no such record.
    pub fn place(&self, name: &str) -> Result<Place> {
        self.find(name)?.place()
    }

    /// Reads a whole record; see [`Record::read`].
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Format`] if there is no such record.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.find(name)?.read()
    }

    /// Compares a computed CRC with the directory's; see [`Record::check_crc`].
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Format`] if there is no such record.
    pub fn check_crc(&self, name: &str, found: u32) -> Result<()> {
        self.find(name)?.check_crc(found)
    }
}

/// One record of an archive. Costs nothing to make.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    archive: &'a Archive,
    /// Name, with the archive's root folder.
    pub name: &'a str,
    /// What the directory says of it.
    pub entry: &'a Entry,
}

impl Record<'_> {
    /// Finds a stored record's bytes. Reads its local header and descriptor, which must agree with the directory.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] where they disagree, [`ErrorKind::Unsupported`] for a compressed record.
    pub fn place(&self) -> Result<Place> {
        self.place_in(&*self.archive.source)
    }

    /// As [`place`](Self::place), through a reader of the same file that may hold the bytes already.
    pub(crate) fn place_in(&self, file: &dyn ReadAt) -> Result<Place> {
        self.find_bytes(file).map_err(|error| error.in_record(self.name))
    }

    fn find_bytes(&self, file: &dyn ReadAt) -> Result<Place> {
        let entry = self.entry;
        if entry.method != Method::STORED {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("record is compressed (zip method {}), torch stores records as they are", entry.method.0),
            )
            .with_hint("the file was zipped again; unpack it and store it with `zip -0`"));
        }
        let start = self.local_header(file)?;
        let end = start.checked_add(entry.nbytes).filter(|end| *end <= entry.limit).ok_or_else(|| {
            Error::format(format!("record of {} bytes runs into what follows it", entry.nbytes)).at(start)
        })?;
        Ok(Place { data: start..end, descriptor: self.descriptor(file, end)? })
    }

    /// Checks the local header and gives the offset of the data behind it.
    fn local_header(&self, file: &dyn ReadAt) -> Result<u64> {
        let Self { name, entry, .. } = *self;
        let at = entry.header_offset;
        let fixed = LOCAL_HEADER_NBYTES + name.len() as u64;
        let header = read_vec(file, at, fixed)?;
        let field = Fields(&header);
        let disagree = |what: &str| Err(Error::format(format!("local header and directory differ in {what}")).at(at));
        if field.u32(0) != LOCAL_SIGNATURE {
            return Err(Error::format("no local header where the directory says").at(at));
        }
        if field.u16(6) != entry.flags {
            return disagree("flags");
        }
        if field.u16(8) != entry.method.0 {
            return disagree("method");
        }
        if usize::from(field.u16(26)) != name.len() || !header.ends_with(name.as_bytes()) {
            return disagree("name");
        }
        let deferred = entry.flags & FLAG_DESCRIPTOR != 0 && field.u32(14) == 0;
        if !deferred && field.u32(14) != entry.crc {
            return disagree("CRC");
        }
        let (size, packed, extra_nbytes) = (field.u32(22), field.u32(18), u64::from(field.u16(28)));
        // All ones mean that the size is in a zip64 field, zero with a descriptor that it follows the data.
        let is_wide = size == u32::MAX || packed == u32::MAX;
        let extra = if is_wide { read_vec(file, at + fixed, extra_nbytes)? } else { Vec::new() };
        let mut wide = Zip64::find(&extra)?;
        for (size, wanted) in [(size, entry.nbytes), (packed, entry.packed_nbytes)] {
            let size = wide.field(size).map_err(|error| error.at(at))?;
            if size != wanted && !(deferred && size == 0) {
                return disagree("size");
            }
        }
        Ok(at + fixed + extra_nbytes)
    }

    /// Checks the data descriptor and that nothing else lies before the next record.
    fn descriptor(&self, file: &dyn ReadAt, end: u64) -> Result<Option<Range<u64>>> {
        let entry = self.entry;
        let left = entry.limit - end;
        if left == 0 {
            return Ok(None);
        }
        // The signature came into use later than the descriptor, and sizes have 32 or 64 bits.
        let (signed, wide) = (matches!(left, 16 | 24), left >= 20);
        if entry.flags & FLAG_DESCRIPTOR == 0 || !matches!(left, 12 | 16 | 20 | 24) {
            return Err(Error::format(format!("{left} bytes between two records belong to neither")).at(end));
        }
        let bytes = read_vec(file, end, left)?;
        let signature = Fields(&bytes).u32(0);
        let field = Fields(bytes.get(if signed { 4 } else { 0 }..).unwrap_or_default());
        let sizes = if wide { [field.u64(4), field.u64(12)] } else { [field.u32(4), field.u32(8)].map(u64::from) };
        let agrees = (!signed || signature == DESCRIPTOR_SIGNATURE) && sizes == [entry.packed_nbytes, entry.nbytes];
        if !agrees || field.u32(0) != entry.crc {
            return Err(Error::format("data descriptor and directory differ").at(end));
        }
        Ok(Some(end..entry.limit))
    }

    /// Reads a whole record, stored or deflated, and checks its CRC, unless the writer left it out. Allocates no more
    /// than the record's stated size.
    ///
    /// # Errors
    /// As [`place`](Self::place), [`ErrorKind::Format`] for a wrong CRC or a record that unpacks to another size, and
    /// [`ErrorKind::Unsupported`] for another kind of compression.
    pub fn read(&self) -> Result<Vec<u8>> {
        let bytes = if self.entry.method == Method::DEFLATED {
            self.inflate().map_err(|error| error.in_record(self.name))?
        } else {
            let place = self.place()?;
            read_vec(&*self.archive.source, place.data.start, place.data.end - place.data.start)?
        };
        self.check_crc(crc32fast::hash(&bytes))?;
        Ok(bytes)
    }

    fn inflate(&self) -> Result<Vec<u8>> {
        let entry = self.entry;
        let file = &*self.archive.source;
        let start = self.local_header(file)?;
        let end = start.checked_add(entry.packed_nbytes).filter(|end| *end <= entry.limit).ok_or_else(|| {
            Error::format(format!("record of {} bytes runs into what follows it", entry.packed_nbytes)).at(start)
        })?;
        self.descriptor(file, end)?;
        let packed = read_vec(file, start, entry.packed_nbytes)?;
        let mut bytes = Vec::new();
        let mut decoder = flate2::bufread::DeflateDecoder::new(packed.as_slice());
        // One byte more than stated shows that there are more; the buffer grows with what is really there.
        let unpacked = decoder.by_ref().take(entry.nbytes.saturating_add(1)).read_to_end(&mut bytes);
        unpacked.map_err(|error| Error::format(format!("deflated record: {error}")).at(start))?;
        if bytes.len() as u64 == entry.nbytes {
            let left = packed.len() as u64 - decoder.total_in();
            return match left {
                0 => Ok(bytes),
                _ => Err(Error::format(format!("{left} bytes stand behind the deflated record's end")).at(end - left)),
            };
        }
        let found = if bytes.len() as u64 > entry.nbytes { "more".to_owned() } else { bytes.len().to_string() };
        Err(Error::format(format!("record unpacks to {found} bytes, the archive says {}", entry.nbytes)).at(start))
    }

    /// Compares a computed CRC with the directory's.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if they differ and the writer did compute one.
    pub fn check_crc(&self, found: u32) -> Result<()> {
        let entry = self.entry;
        if entry.crc == found || entry.crc_is_absent() {
            return Ok(());
        }
        Err(Error::format(format!("CRC of the bytes is {found:08x}, the archive says {:08x}", entry.crc))
            .in_record(self.name)
            .with_hint("the file is damaged; copy or download it again"))
    }
}

/// Little-endian fields of a header whose length was checked by reading it; what is missing reads as zero.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}
