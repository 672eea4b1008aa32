//! Reading the end records and the central directory.

use std::collections::HashSet;
use std::ops::Range;

use super::{Entries, Entry, FLAGS_REFUSED, Fields, LOCAL_HEADER_NBYTES, Method};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, read_vec};

/// End of central directory (APPNOTE 4.3.16).
const END_SIGNATURE: u32 = 0x0605_4b50;
const END_NBYTES: u64 = 22;
/// Zip64 end of central directory locator (APPNOTE 4.3.15).
const LOCATOR_SIGNATURE: u32 = 0x0706_4b50;
const LOCATOR_NBYTES: u64 = 20;
/// Zip64 end of central directory (APPNOTE 4.3.14).
const END64_SIGNATURE: u32 = 0x0606_4b50;
const END64_NBYTES: u64 = 56;
/// Central directory header (APPNOTE 4.3.12).
const ENTRY_SIGNATURE: u32 = 0x0201_4b50;
const ENTRY_NBYTES: usize = 46;
/// The longest comment an end record can announce.
const COMMENT_MAX_NBYTES: u64 = 65_535;
/// Extra field with 64-bit sizes and offset (APPNOTE 4.5.3).
const EXTRA_ZIP64: u16 = 1;
/// Bit of the external attributes that MS-DOS gave to folders.
const DOS_FOLDER: u32 = 1 << 4;
/// Most bytes that one byte of a deflated record can stand for: 258 for every two bits.
const DEFLATE_RATIO: u64 = 1032;

/// What the end records say: how many entries, where the directory is.
struct End {
    count: u64,
    directory: Range<u64>,
}

/// Reads the whole directory; gives the entries in its order and its place in the file.
pub(super) fn read(source: &dyn ReadAt) -> Result<(Entries, Range<u64>)> {
    let end = read_end(source)?;
    let bytes = read_vec(source, end.directory.start, end.directory.end - end.directory.start)?;
    // A lying count must not allocate: no entry is shorter than its fixed part.
    let capacity = usize::try_from(end.count).unwrap_or(usize::MAX).min(bytes.len() / ENTRY_NBYTES);
    let mut entries = Entries::with_capacity_and_hasher(capacity, foldhash::quality::RandomState::default());
    let mut at = 0;
    while at < bytes.len() {
        let offset = end.directory.start + at as u64;
        let (name, entry, nbytes) = read_entry(&bytes[at..], offset).map_err(|error| error.at(offset))?;
        check_name(&name).map_err(|error| error.in_record(&name))?;
        match entries.entry(name) {
            indexmap::map::Entry::Vacant(vacant) => vacant.insert(entry),
            indexmap::map::Entry::Occupied(taken) => {
                return Err(Error::format("two records have this name").at(offset).in_record(taken.key()));
            }
        };
        at += nbytes;
    }
    if entries.len() as u64 != end.count {
        let found = entries.len();
        return Err(Error::format(format!("directory has {found} entries, the end record says {}", end.count)));
    }
    check_case(&entries)?;
    set_limits(&mut entries, end.directory.start)?;
    Ok((entries, end.directory))
}

fn read_end(source: &dyn ReadAt) -> Result<End> {
    let end_at = find_end(source)?;
    let bytes = read_vec(source, end_at, END_NBYTES)?;
    let field = Fields(&bytes);
    if field.u16(4) != 0 || field.u16(6) != 0 || field.u16(8) != field.u16(10) {
        return Err(Error::new(ErrorKind::Unsupported, "archive is split over several files").at(end_at));
    }
    let narrow = (u64::from(field.u16(10)), u64::from(field.u32(12)), u64::from(field.u32(16)));
    let (count, nbytes, start, tail) = match read_end64(source, end_at)? {
        None => (narrow.0, narrow.1, narrow.2, end_at),
        Some((wide, tail)) => {
            let agrees = |narrow: u64, wide: u64, all_ones: u64| narrow == wide || narrow == all_ones;
            if !agrees(narrow.0, wide.0, u64::from(u16::MAX))
                || !agrees(narrow.1, wide.1, u64::from(u32::MAX))
                || !agrees(narrow.2, wide.2, u64::from(u32::MAX))
            {
                return Err(Error::format("the two end records differ").at(end_at));
            }
            (wide.0, wide.1, wide.2, tail)
        }
    };
    match start.checked_add(nbytes) {
        Some(end) if end == tail => Ok(End { count, directory: start..tail }),
        _ => Err(Error::format(format!(
            "central directory of {nbytes} bytes at {start:#x} does not end where the end records begin"
        ))
        .at(tail)
        .with_hint("bytes were put before or cut out of the archive")),
    }
}

/// Finds the one end record whose comment reaches exactly to the end of the file.
pub(super) fn find_end(source: &dyn ReadAt) -> Result<u64> {
    let len = source.len();
    if len < END_NBYTES {
        return Err(Error::format(format!("{len} bytes are too few for a zip archive")));
    }
    let start = len.saturating_sub(END_NBYTES + COMMENT_MAX_NBYTES);
    // Without a comment, as torch writes, the last 22 bytes settle it.
    for from in [len - END_NBYTES, start] {
        let tail = read_vec(source, from, len - from)?;
        let mut found = None;
        for at in 0..=tail.len() - 22 {
            let field = Fields(&tail[at..]);
            if field.u32(0) == END_SIGNATURE && at + 22 + usize::from(field.u16(20)) == tail.len() {
                if found.is_some() {
                    return Err(Error::format("archive has two end records").at(from + at as u64));
                }
                found = Some(from + at as u64);
            }
        }
        if let Some(at) = found {
            return check_alone(source, at).map(|()| at);
        }
    }
    if let Some(at) = find_earlier_end(source, start)? {
        let left = len - at;
        return Err(Error::format(format!("{left} bytes stand behind the archive")).at(at));
    }
    Err(Error::format("zip archive has no end record")
        .with_hint("the file is truncated or has bytes behind the archive; copy or download it again"))
}

/// Where the archive ends, if it ends before the file does: behind an end record that follows its directory.
fn find_earlier_end(source: &dyn ReadAt, start: u64) -> Result<Option<u64>> {
    let tail = read_vec(source, start, source.len() - start)?;
    for at in (0..=tail.len().saturating_sub(22)).rev() {
        let field = Fields(tail.get(at..).unwrap_or_default());
        let offset = start + at as u64;
        let directory = u64::from(field.u32(16)).checked_add(u64::from(field.u32(12)));
        let end = offset + END_NBYTES + u64::from(field.u16(20));
        if field.u32(0) == END_SIGNATURE && directory.is_some_and(|end| end <= offset) && end < source.len() {
            return Ok(Some(end));
        }
    }
    Ok(None)
}

/// Refuses an end record that other readers may take for the end: one before it whose comment reaches just as far.
fn check_alone(source: &dyn ReadAt, end_at: u64) -> Result<()> {
    let start = end_at.saturating_sub(END_NBYTES + COMMENT_MAX_NBYTES);
    let bytes = read_vec(source, start, end_at - start)?;
    let candidates = bytes.windows(4).enumerate().filter(|(_, window)| **window == END_SIGNATURE.to_le_bytes());
    for (at, _) in candidates {
        let comment = u64::from(Fields(bytes.get(at..).unwrap_or_default()).u16(20));
        let at = start + at as u64;
        if at + END_NBYTES + comment == source.len() {
            return Err(Error::format("archive has two end records, one in the comment of the other").at(at));
        }
    }
    Ok(())
}

/// Count, bytes and start of the directory, as the zip64 end record says, and the record's own offset.
type End64 = ((u64, u64, u64), u64);

/// Reads the zip64 end record, if a locator stands before the plain one.
fn read_end64(source: &dyn ReadAt, end_at: u64) -> Result<Option<End64>> {
    let Some(locator_at) = end_at.checked_sub(LOCATOR_NBYTES) else { return Ok(None) };
    let bytes = read_vec(source, locator_at, LOCATOR_NBYTES)?;
    let locator = Fields(&bytes);
    if locator.u32(0) != LOCATOR_SIGNATURE {
        return Ok(None);
    }
    let at = locator.u64(8);
    if locator.u32(4) != 0 || locator.u32(16) > 1 || at.checked_add(END64_NBYTES) != Some(locator_at) {
        return Err(Error::format("zip64 locator does not point at the record before it").at(locator_at));
    }
    let bytes = read_vec(source, at, END64_NBYTES)?;
    let field = Fields(&bytes);
    let whole = field.u32(0) == END64_SIGNATURE && field.u64(4) == END64_NBYTES - 12;
    if !whole || field.u32(16) != 0 || field.u32(20) != 0 || field.u64(24) != field.u64(32) {
        return Err(Error::format("zip64 end record is not understood").at(at));
    }
    Ok(Some(((field.u64(32), field.u64(40), field.u64(48)), at)))
}

/// Reads one directory header: its name, the entry, and the bytes it takes.
fn read_entry(bytes: &[u8], directory_offset: u64) -> Result<(String, Entry, usize)> {
    let field = Fields(bytes);
    if bytes.len() < ENTRY_NBYTES || field.u32(0) != ENTRY_SIGNATURE {
        return Err(Error::format("no directory header here"));
    }
    let name_end = ENTRY_NBYTES + usize::from(field.u16(28));
    let extra_end = name_end + usize::from(field.u16(30));
    let nbytes = extra_end + usize::from(field.u16(32));
    let behind = || Error::format("directory header runs behind the directory");
    let name = bytes.get(ENTRY_NBYTES..name_end).ok_or_else(behind)?;
    let extra = bytes.get(name_end..extra_end).ok_or_else(behind)?;
    if nbytes > bytes.len() {
        return Err(behind());
    }
    let name = String::from_utf8(name.to_vec()).map_err(|_| Error::format("record name is not UTF-8"))?;
    let flags = field.u16(8);
    if flags & FLAGS_REFUSED != 0 {
        return Err(Error::new(ErrorKind::Unsupported, "record is encrypted").in_record(name));
    }
    if field.u16(34) != 0 {
        return Err(Error::new(ErrorKind::Unsupported, "record is on another disk").in_record(name));
    }
    if field.u32(38) & DOS_FOLDER != 0 && !name.ends_with('/') {
        // torch reads nothing here and gives whatever its memory held.
        return Err(Error::format("record is marked as a folder").in_record(name));
    }
    // Taken in this order, which is the order of the 64-bit values (APPNOTE 4.5.3).
    let mut wide = Zip64::find(extra)?;
    let unpacked = wide.field(field.u32(24))?;
    let entry = Entry {
        nbytes: unpacked,
        packed_nbytes: wide.field(field.u32(20))?,
        header_offset: wide.field(field.u32(42))?,
        crc: field.u32(16),
        method: Method(field.u16(10)),
        flags,
        directory_offset,
        limit: 0,
    };
    wide.finish()?;
    check_sizes(&entry)?;
    Ok((name, entry, nbytes))
}

/// Refuses sizes that no packing explains: readers reserve memory by them.
fn check_sizes(entry: &Entry) -> Result<()> {
    let (nbytes, packed) = (entry.nbytes, entry.packed_nbytes);
    let possible = match entry.method {
        Method::STORED => nbytes == packed,
        Method::DEFLATED => nbytes <= packed.saturating_mul(DEFLATE_RATIO),
        // Not read; the sizes mean nothing.
        _ => true,
    };
    if possible {
        return Ok(());
    }
    Err(Error::format(format!("record has {nbytes} bytes and takes {packed}, which its packing cannot do")))
}

/// The 64-bit values of an extra field, taken in the order of the 32-bit ones that say "look there".
pub(super) struct Zip64<'a>(&'a [u8]);

impl<'a> Zip64<'a> {
    pub(super) fn find(mut extra: &'a [u8]) -> Result<Self> {
        let mut found = None;
        while !extra.is_empty() {
            let field = Fields(extra);
            let end = 4 + usize::from(field.u16(2));
            let Some((head, rest)) = extra.split_at_checked(end) else {
                return Err(Error::format("extra field runs behind its header"));
            };
            if field.u16(0) == EXTRA_ZIP64 && found.replace(&head[4..]).is_some() {
                return Err(Error::format("two zip64 extra fields"));
            }
            extra = rest;
        }
        Ok(Self(found.unwrap_or_default()))
    }

    pub(super) fn field(&mut self, narrow: u32) -> Result<u64> {
        if narrow != u32::MAX {
            return Ok(u64::from(narrow));
        }
        let (wide, rest) =
            self.0.split_first_chunk().ok_or_else(|| Error::format("64-bit value announced, but absent"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*wide))
    }

    /// Refuses values that no 32-bit one points to: some readers would take them, and some would not.
    fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Error::format(format!("zip64 extra field has {} bytes that nothing points to", self.0.len())))
    }
}

/// Refuses names that mean something else to another program.
fn check_name(name: &str) -> Result<()> {
    if is_plain(name) {
        return Ok(());
    }
    let bad = if name.is_empty() {
        "is empty"
    } else if name.starts_with('/') || name.contains('\\') || name.chars().any(char::is_control) {
        "is absolute or has a backslash or control character"
    } else if matches!(name.as_bytes(), [drive, b':', b'/', ..] if drive.is_ascii_alphabetic()) {
        "begins with a drive"
    } else if name.trim_end_matches('/').split('/').any(|part| matches!(part, "" | "." | "..")) {
        "leaves its folder or has an empty part"
    } else {
        return Ok(());
    };
    Err(Error::format(format!("record name {bad}")))
}

/// Whether a name is made of ordinary letters and of parts that do not begin with a dot: all but a handful are, and this
/// is one pass over their bytes.
fn is_plain(name: &str) -> bool {
    let mut before = b'/';
    for byte in name.bytes() {
        let ordinary = byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'/');
        if !ordinary || before == b'/' && matches!(byte, b'.' | b'/') {
            return false;
        }
        before = byte;
    }
    before != b'/'
}

/// Refuses names that differ in the case of ASCII letters only: torch looks records up without regard to it.
///
/// Names that differ in Unicode normalisation are two names to every reader, because nothing is unpacked to a disk.
fn check_case(entries: &Entries) -> Result<()> {
    // The names that torch gives below the root have no capitals; then there is nothing to compare.
    let has_capital =
        |name: &str| name.split_once('/').map_or(name, |(_, rest)| rest).bytes().any(|byte| byte.is_ascii_uppercase());
    if !entries.keys().any(|name| has_capital(name)) {
        return Ok(());
    }
    let mut seen = HashSet::with_capacity(entries.len());
    match entries.keys().find(|name| !seen.insert(name.to_ascii_lowercase())) {
        None => Ok(()),
        Some(name) => Err(Error::format("two records have this name but for the case of letters").in_record(name)),
    }
}

/// Gives each entry the offset it must end before, and refuses overlaps and bytes before the first record.
fn set_limits(entries: &mut Entries, directory_start: u64) -> Result<()> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|index| entries[*index].header_offset);
    if let Some(first) = order.first().map(|index| entries[*index].header_offset).filter(|first| *first != 0) {
        return Err(Error::format(format!("{first} bytes stand before the archive")));
    }
    let mut limit = directory_start;
    for index in order.into_iter().rev() {
        let Some((name, entry)) = entries.get_index_mut(index) else { continue };
        let least = LOCAL_HEADER_NBYTES.saturating_add(name.len() as u64).saturating_add(entry.packed_nbytes);
        if entry.header_offset.checked_add(least).is_none_or(|end| end > limit) {
            return Err(Error::format("record overlaps what follows it").at(entry.header_offset).in_record(name));
        }
        entry.limit = limit;
        limit = entry.header_offset;
    }
    Ok(())
}
