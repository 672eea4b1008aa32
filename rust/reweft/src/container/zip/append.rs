//! Adding records to an archive: everything before the central directory stays as it is, byte for byte.

use std::io::{self, Write};

use super::{Archive, LOCAL_HEADER_NBYTES, LOCAL_SIGNATURE};
use crate::error::{Error, ErrorKind, Result};
use crate::source::read_vec;

/// Version needed for zip64 (APPNOTE 4.4.3).
const VERSION_ZIP64: u16 = 45;
/// General purpose bit 11: the name is UTF-8.
const FLAG_UTF8: u16 = 1 << 11;
/// Date of 1980-01-01, the earliest a zip can state: a rewrite of the same content is the same bytes.
const DATE: u16 = 0x21;

/// Writes `archive` with `records` (name, bytes) added behind its last one.
///
/// Copies the archive once. The records are stored without alignment, so this is for metadata.
///
/// # Errors
/// [`ErrorKind::Usage`] if a name exists already or a record takes 4 GiB; [`ErrorKind::Io`] from `out`.
pub fn append_records(archive: &Archive, records: &[(String, Vec<u8>)], out: &mut dyn Write) -> Result<()> {
    let failed = |error| Error::io("write", error);
    let directory = archive.directory();
    io::copy(&mut Span { archive, at: 0, end: directory.start }, out).map_err(failed)?;
    let mut headers = read_vec(&**archive.source(), directory.start, directory.end - directory.start)?;
    let mut offset = directory.start;
    for (name, bytes) in records {
        let Ok(nbytes) = u32::try_from(bytes.len()) else {
            return Err(Error::new(ErrorKind::Usage, "an added record takes less than 4 GiB").in_record(name));
        };
        if archive.entries().contains_key(name) {
            return Err(Error::new(ErrorKind::Usage, "the archive has this record already").in_record(name));
        }
        let shared = shared_header(name, crc32fast::hash(bytes), nbytes)?;
        let local = [&LOCAL_SIGNATURE.to_le_bytes(), &shared[..], name.as_bytes(), bytes].concat();
        out.write_all(&local).map_err(failed)?;
        headers.extend(directory_header(&shared, name, offset));
        offset += LOCAL_HEADER_NBYTES + (name.len() + bytes.len()) as u64;
    }
    out.write_all(&headers).map_err(failed)?;
    let count = (archive.entries().len() + records.len()) as u64;
    out.write_all(&end_records(count, offset, headers.len() as u64)).map_err(failed)
}

/// The 26 bytes that local and central header have in common: version to extra length.
fn shared_header(name: &str, crc: u32, nbytes: u32) -> Result<Vec<u8>> {
    let Ok(name_nbytes) = u16::try_from(name.len()) else {
        return Err(Error::new(ErrorKind::Usage, "record name is longer than 65535 bytes").in_record(name));
    };
    let mut out = Vec::with_capacity(26);
    for value in [VERSION_ZIP64, FLAG_UTF8, 0, 0, DATE] {
        out.extend(value.to_le_bytes());
    }
    for value in [crc, nbytes, nbytes] {
        out.extend(value.to_le_bytes());
    }
    out.extend(name_nbytes.to_le_bytes());
    out.extend(0_u16.to_le_bytes());
    Ok(out)
}

/// A central directory header that keeps its offset in a zip64 field.
fn directory_header(shared: &[u8], name: &str, header_offset: u64) -> Vec<u8> {
    let mut out = 0x0201_4b50_u32.to_le_bytes().to_vec();
    out.extend(VERSION_ZIP64.to_le_bytes());
    // All of it but the extra length, which is 12 here: id, length, one 64-bit offset.
    out.extend(&shared[..24]);
    out.extend(12_u16.to_le_bytes());
    out.extend([0; 10]); // comment length, disk, internal and external attributes
    out.extend(u32::MAX.to_le_bytes());
    out.extend(name.as_bytes());
    out.extend([1, 0, 8, 0]);
    out.extend(header_offset.to_le_bytes());
    out
}

/// Zip64 end record, locator and end record, all three always, as torch writes them.
fn end_records(count: u64, start: u64, nbytes: u64) -> Vec<u8> {
    let mut out = 0x0606_4b50_u32.to_le_bytes().to_vec();
    out.extend(44_u64.to_le_bytes());
    out.extend([VERSION_ZIP64.to_le_bytes(); 2].as_flattened());
    out.extend([0; 8]);
    for value in [count, count, nbytes, start] {
        out.extend(value.to_le_bytes());
    }
    out.extend(0x0706_4b50_u32.to_le_bytes());
    out.extend([0; 4]);
    out.extend((start + nbytes).to_le_bytes());
    out.extend(1_u32.to_le_bytes());
    out.extend(0x0605_4b50_u32.to_le_bytes());
    out.extend([0; 4]);
    let count = u16::try_from(count).unwrap_or(u16::MAX);
    out.extend([count.to_le_bytes(); 2].as_flattened());
    out.extend(u32::try_from(nbytes).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(u32::try_from(start).unwrap_or(u32::MAX).to_le_bytes());
    out.extend([0; 2]);
    out
}

/// Reads a range of the archive's bytes in order.
struct Span<'a> {
    archive: &'a Archive,
    at: u64,
    end: u64,
}

impl io::Read for Span<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let nbytes = out.len().min(left);
        let chunk = &mut out[..nbytes];
        self.archive.source().read_exact_at(self.at, chunk).map_err(io::Error::other)?;
        self.at += nbytes as u64;
        Ok(nbytes)
    }
}
