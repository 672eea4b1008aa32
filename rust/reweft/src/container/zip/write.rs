//! Writing archives as torch writes them: stored records, each aligned by a padded extra field and followed by a data
//! descriptor, zip64 where a number needs it.
//!
//! An archive's layout follows from the names and sizes of its records alone, so that bytes can be written in any order
//! and CRCs last.

use std::io::{self, Write};

use super::{Archive, DESCRIPTOR_SIGNATURE, FLAG_DESCRIPTOR, LOCAL_HEADER_NBYTES, LOCAL_SIGNATURE};
use crate::error::{Error, ErrorKind, Result};
use crate::source::read_vec;

/// General purpose bit 11: the name is UTF-8.
const FLAG_UTF8: u16 = 1 << 11;
/// Record data starts at a multiple of this, as torch's does.
const ALIGNMENT: u64 = 64;
/// The extra field that pads: `FB`, length, `Z` bytes.
const EXTRA_PADDING: [u8; 2] = *b"FB";
const PADDING_HEADER_NBYTES: u64 = 4;
/// Extra field with 64-bit sizes and offset (APPNOTE 4.5.3).
const EXTRA_ZIP64: [u8; 2] = [1, 0];
/// Stands for a number that is in the zip64 extra field. Smaller ones are written as they are.
const ELSEWHERE: u32 = u32::MAX;
/// Versions in the zip64 end record: written on Unix by 3.0, needs 4.5. torch's.
const END64_VERSIONS: [u8; 4] = [0x1e, 0x03, 45, 0];

/// A record whose place in a new archive is known; its bytes need not be.
#[derive(Clone, Debug)]
pub(crate) struct NewRecord {
    name: String,
    /// Its first bytes, which are known beforehand.
    lead: Vec<u8>,
    nbytes: u64,
    header_offset: u64,
    data_offset: u64,
}

impl NewRecord {
    /// Puts a record at `offset`, which is where the one before ends.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a name that no header can hold, [`ErrorKind::Limit`] for an archive of 2^64 bytes.
    pub fn new(name: String, nbytes: u64, offset: u64) -> Result<Self> {
        Self::with_lead(name, Vec::new(), nbytes, offset)
    }

    /// The same for a record of `lead` and then `nbytes` bytes.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn with_lead(name: String, lead: Vec<u8>, nbytes: u64, offset: u64) -> Result<Self> {
        if u16::try_from(name.len()).is_err() {
            return Err(Error::new(ErrorKind::Unsupported, "record name is longer than 65535 bytes").in_record(name));
        }
        let nbytes = nbytes.saturating_add(lead.len() as u64);
        let mut record = Self { name, lead, nbytes, header_offset: offset, data_offset: 0 };
        let start =
            offset.checked_add(record.unpadded_nbytes()).and_then(|start| start.checked_next_multiple_of(ALIGNMENT));
        let end = start.and_then(|start| start.checked_add(nbytes)?.checked_add(24));
        let (Some(start), Some(_)) = (start, end) else {
            return Err(Error::new(ErrorKind::Limit, "archive takes 2^64 bytes").in_record(record.name));
        };
        record.data_offset = start;
        Ok(record)
    }

    /// Name, with the root folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the record's header starts.
    pub fn header_offset(&self) -> u64 {
        self.header_offset
    }

    /// Where the bytes behind the lead start.
    pub fn payload_offset(&self) -> u64 {
        self.data_offset + self.lead.len() as u64
    }

    /// Where the next record may start: behind the data descriptor.
    pub fn end(&self) -> u64 {
        self.data_offset + self.nbytes + self.descriptor(0).len() as u64
    }

    /// Everything from the header's offset to the payload's.
    pub fn header(&self) -> Vec<u8> {
        let mut out = LOCAL_SIGNATURE.to_le_bytes().to_vec();
        let zip64 = self.zip64();
        let padding = self.data_offset - self.header_offset - self.unpadded_nbytes();
        // CRC and sizes follow the data. Until then they are zero, or all ones for a size that is in the zip64 field.
        let size = if narrow(self.nbytes) == ELSEWHERE { ELSEWHERE } else { 0 };
        out.extend(self.version_to_date());
        out.extend(0_u32.to_le_bytes());
        out.extend([size.to_le_bytes(); 2].as_flattened());
        out.extend(length(self.name.len() as u64));
        out.extend(length(zip64.len() as u64 + PADDING_HEADER_NBYTES + padding));
        out.extend(self.name.as_bytes());
        out.extend(zip64);
        out.extend(EXTRA_PADDING);
        out.extend(length(padding));
        out.extend((0..padding).map(|_| b'Z'));
        out.extend(&self.lead);
        out
    }

    /// Bytes of the header if nothing had to be padded.
    fn unpadded_nbytes(&self) -> u64 {
        LOCAL_HEADER_NBYTES + (self.name.len() + self.zip64().len()) as u64 + PADDING_HEADER_NBYTES
    }

    /// The CRC of the record, from that of the bytes behind its lead.
    fn crc(&self, payload_crc: u32) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.lead);
        let payload_nbytes = self.nbytes - self.lead.len() as u64;
        crc.combine(&crc32fast::Hasher::new_with_initial_len(payload_crc, payload_nbytes));
        crc.finalize()
    }

    /// What follows the data: nothing if there are no bytes, else CRC and sizes.
    pub fn descriptor(&self, payload_crc: u32) -> Vec<u8> {
        if self.nbytes == 0 {
            return Vec::new();
        }
        let mut out = DESCRIPTOR_SIGNATURE.to_le_bytes().to_vec();
        out.extend(self.crc(payload_crc).to_le_bytes());
        if self.zip64().is_empty() {
            out.extend([narrow(self.nbytes).to_le_bytes(); 2].as_flattened());
        } else {
            out.extend([self.nbytes.to_le_bytes(); 2].as_flattened());
        }
        out
    }

    /// The record's line in the central directory.
    fn directory_header(&self, payload_crc: u32) -> Vec<u8> {
        let mut out = 0x0201_4b50_u32.to_le_bytes().to_vec();
        let zip64 = self.zip64();
        out.extend([0; 2]); // made by
        out.extend(self.version_to_date());
        out.extend(self.crc(payload_crc).to_le_bytes());
        out.extend([narrow(self.nbytes).to_le_bytes(); 2].as_flattened());
        out.extend(length(self.name.len() as u64));
        out.extend(length(zip64.len() as u64));
        out.extend([0; 10]); // comment length, disk, internal and external attributes
        out.extend(narrow(self.header_offset).to_le_bytes());
        out.extend(self.name.as_bytes());
        out.extend(zip64);
        out
    }

    /// Version, flags, method, time and date, which both headers have. Version and time are zero in torch's files too,
    /// so that the same content is the same bytes.
    fn version_to_date(&self) -> [u8; 10] {
        let flags = FLAG_UTF8 | if self.nbytes > 0 { FLAG_DESCRIPTOR } else { 0 };
        let mut out = [0; 10];
        out[2..4].copy_from_slice(&flags.to_le_bytes());
        out
    }

    /// The extra field for numbers of more than 32 bits; empty if there are none.
    fn zip64(&self) -> Vec<u8> {
        let wide =
            [self.nbytes, self.nbytes, self.header_offset].into_iter().filter(|number| narrow(*number) == ELSEWHERE);
        let numbers: Vec<u8> = wide.flat_map(u64::to_le_bytes).collect();
        if numbers.is_empty() {
            return numbers;
        }
        [&EXTRA_ZIP64, &length(numbers.len() as u64), &numbers[..]].concat()
    }
}

/// A number in 32 bits, or what says that it is in the zip64 extra field.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(ELSEWHERE)
}

/// A length of a name or extra field. Names were checked, and extra fields are short.
fn length(nbytes: u64) -> [u8; 2] {
    u16::try_from(nbytes).unwrap_or(u16::MAX).to_le_bytes()
}

/// Central directory and end records of an archive whose records, with the CRCs of their payloads, end at `start`.
pub(crate) fn tail(records: &[(NewRecord, u32)], start: u64) -> Vec<u8> {
    let mut out: Vec<u8> = records.iter().flat_map(|(record, crc)| record.directory_header(*crc)).collect();
    out.extend(end_records(records.len() as u64, start, out.len() as u64));
    out
}

/// Writes `archive` with `records` (name, bytes) added behind its last one; what is there stays as it is, byte for byte.
///
/// Copies the archive once.
///
/// # Errors
/// [`ErrorKind::Usage`] if a name exists already, [`ErrorKind::Unsupported`] for one that is too long;
/// [`ErrorKind::Io`] from `out`.
pub fn append_records(archive: &Archive, records: &[(String, Vec<u8>)], out: &mut dyn Write) -> Result<()> {
    let failed = |error| Error::io("write", error);
    let directory = archive.directory();
    io::copy(&mut Span { archive, at: 0, end: directory.start }, out).map_err(failed)?;
    let mut headers = read_vec(&**archive.source(), directory.start, directory.end - directory.start)?;
    let mut offset = directory.start;
    for (name, bytes) in records {
        if archive.entries().contains_key(name) {
            return Err(Error::new(ErrorKind::Usage, "the archive has this record already").in_record(name));
        }
        let (record, crc) = (NewRecord::new(name.clone(), bytes.len() as u64, offset)?, crc32fast::hash(bytes));
        for part in [&record.header(), bytes, &record.descriptor(crc)] {
            out.write_all(part).map_err(failed)?;
        }
        headers.extend(record.directory_header(crc));
        offset = record.end();
    }
    out.write_all(&headers).map_err(failed)?;
    let count = (archive.entries().len() + records.len()) as u64;
    out.write_all(&end_records(count, offset, headers.len() as u64)).map_err(failed)
}

/// Zip64 end record, locator and end record, all three always, as torch writes them.
fn end_records(count: u64, start: u64, nbytes: u64) -> Vec<u8> {
    let mut out = 0x0606_4b50_u32.to_le_bytes().to_vec();
    out.extend(44_u64.to_le_bytes());
    out.extend(END64_VERSIONS);
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
    out.extend(narrow(nbytes).to_le_bytes());
    out.extend(narrow(start).to_le_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{ReadAt, check_range};
    use std::sync::Arc;

    /// A file of zeros but for a few places.
    #[derive(Debug)]
    struct Sparse(Vec<(u64, Vec<u8>)>, u64);

    impl ReadAt for Sparse {
        fn len(&self) -> u64 {
            self.1
        }

        fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
            out.fill(0);
            let end = check_range(self.1, byte_offset, out.len() as u64)?;
            for (at, bytes) in &self.0 {
                let (from, until) = (byte_offset.max(*at), end.min(at + bytes.len() as u64));
                if from < until {
                    let place = |offset: u64| usize::try_from(offset).unwrap();
                    let part = &bytes[place(from - at)..place(until - at)];
                    out[place(from - byte_offset)..place(until - byte_offset)].copy_from_slice(part);
                }
            }
            Ok(())
        }
    }

    /// Writes only headers, descriptors and the directory of records of these sizes, and reads the archive back.
    fn archive(sizes: &[u64]) -> (Archive, Vec<NewRecord>) {
        let (mut records, mut parts, mut offset) = (Vec::new(), Vec::new(), 0);
        for (number, nbytes) in sizes.iter().enumerate() {
            let record = NewRecord::new(format!("root/{number}"), *nbytes, offset).unwrap();
            assert_eq!((record.header_offset, record.data_offset % ALIGNMENT), (offset, 0));
            parts.push((offset, record.header()));
            parts.push((record.data_offset + nbytes, record.descriptor(7)));
            offset = record.end();
            records.push((record, if *nbytes > 0 { 7 } else { 0 }));
        }
        let bytes = tail(&records, offset);
        let nbytes = offset + bytes.len() as u64;
        parts.push((offset, bytes));
        parts.retain(|(_, bytes)| !bytes.is_empty());
        let archive = Archive::open(Arc::new(Sparse(parts, nbytes))).unwrap();
        (archive, records.into_iter().map(|(record, _)| record).collect())
    }

    #[test]
    fn numbers_around_four_gibibytes_are_read_back() {
        let edge = u64::from(u32::MAX);
        for sizes in [
            vec![1, 0, 64, 3],
            vec![edge - 1, 5],
            vec![edge, 5],
            vec![edge + 1, 5, 0],
            vec![edge / 2, edge / 2, 5, 5],
            vec![1 << 40, 1 << 33, 1],
        ] {
            let (archive, records) = archive(&sizes);
            assert_eq!(archive.entries().len(), sizes.len());
            for (record, (name, entry)) in records.iter().zip(archive.entries()) {
                assert_eq!(
                    (&record.name, record.nbytes, record.header_offset),
                    (name, entry.nbytes, entry.header_offset)
                );
                let place = archive.place(name).unwrap();
                assert_eq!(place.data, record.data_offset..record.data_offset + record.nbytes);
                let wide = record.header_offset >= edge || record.nbytes >= edge;
                let descriptor = place.descriptor.map(|range| range.end - range.start);
                assert_eq!(descriptor, (record.nbytes > 0).then_some(if wide { 24 } else { 16 }), "{sizes:?}");
            }
        }
        assert!(NewRecord::new("a".repeat(65_536), 1, 0).is_err());
        assert!(NewRecord::new("a".into(), u64::MAX - 80, 0).is_err());
        assert!(NewRecord::new("a".into(), 1, u64::MAX - 9).is_err());
    }
}
