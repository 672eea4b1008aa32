//! CRCs that a file states over ranges of its bytes, and what they become when bytes change.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::container::zip::{Archive, Place};
use crate::error::{Error, Result};
use crate::source::{self, ReadAt};

/// Where the CRC is in a data descriptor with a signature, in a local header and in a central directory header (APPNOTE
/// 4.3.9, 4.3.7, 4.3.12).
const DESCRIPTOR_CRC: u64 = 4;
const LOCAL_CRC: u64 = 14;
const DIRECTORY_CRC: u64 = 16;

/// The CRC-32 of one record, as an archive states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Name of the record.
    pub record: String,
    /// The bytes that it is of, in the file.
    pub covers: Range<u64>,
    /// The CRC.
    pub stated: u32,
    /// The places in the file where it stands, as 4 bytes, little-endian.
    pub at: Vec<u64>,
}

impl Checksum {
    /// The CRC of a record of an archive that begins at `base` in the file; `None` if the writer left it out.
    ///
    /// # Errors
    /// As [`Archive::place`].
    pub(crate) fn of_record(archive: &Archive, record: &str, base: u64) -> Result<Option<Self>> {
        let entry = archive.entry(record)?;
        if entry.crc_is_absent() {
            return Ok(None);
        }
        let Place { data, descriptor } = archive.place(record)?;
        let beside = match descriptor {
            // Descriptors of 12 and 20 bytes have no signature.
            Some(range) if matches!(range.end - range.start, 16 | 24) => range.start + DESCRIPTOR_CRC,
            Some(range) => range.start,
            None => entry.header_offset + LOCAL_CRC,
        };
        let at = [beside, entry.directory_offset + DIRECTORY_CRC].map(|at| base + at).to_vec();
        Ok(Some(Self { record: record.to_owned(), covers: base + data.start..base + data.end, stated: entry.crc, at }))
    }

    /// Those that no other one covers: who reads the bytes of these has read all.
    pub(crate) fn outermost(checksums: &[Self]) -> Vec<&Self> {
        let mut order: Vec<&Self> = checksums.iter().collect();
        order.sort_by_key(|checksum| (checksum.covers.start, std::cmp::Reverse(checksum.covers.end)));
        // Records lie behind or within each other, so a range is covered by the last outermost one or by none.
        let mut outermost: Vec<&Self> = Vec::new();
        for checksum in order {
            let last = outermost.last().map(|last| &last.covers);
            let is_covered = last.is_some_and(|last| checksum.covers.end <= last.end && checksum.covers != *last);
            if !is_covered {
                outermost.push(checksum);
            }
        }
        outermost
    }

    /// Compares it with the bytes. Reads all of them.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for another CRC; read errors.
    pub fn check(&self, file: &dyn ReadAt) -> Result<()> {
        self.compare(source::crc(file, self.covers.start, self.covers.end - self.covers.start)?)
    }

    /// Compares it with the CRCs of pieces, each with its range of the file, in order. Pieces that do not make up the
    /// bytes exactly prove nothing: then all bytes are read.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(crate) fn check_joined(
        &self,
        pieces: impl Iterator<Item = (Range<u64>, u32)>,
        file: &dyn ReadAt,
    ) -> Result<()> {
        let (mut joined, mut at) = (crc32fast::Hasher::new(), self.covers.start);
        for (range, crc) in pieces {
            if range.start != at {
                return self.check(file);
            }
            joined.combine(&crc32fast::Hasher::new_with_initial_len(crc, range.end - range.start));
            at = range.end;
        }
        if at == self.covers.end { self.compare(joined.finalize()) } else { self.check(file) }
    }

    fn compare(&self, found: u32) -> Result<()> {
        if found == self.stated {
            return Ok(());
        }
        let what = format!("CRC of the bytes is {found:08x}, the archive says {:08x}", self.stated);
        Err(Error::format(what).in_record(&self.record).at(self.covers.start))
    }

    /// What it is to be when the bytes of `range` change: `before` and `after` are the CRCs of those bytes alone.
    ///
    /// A CRC is linear: a change anywhere adds the CRC of the difference, shifted by the bytes behind it. So only what
    /// changes is read, and a record that was damaged elsewhere keeps a CRC that says so.
    pub(crate) fn change(&mut self, range: &Range<u64>, before: u32, after: u32) {
        if self.covers.start <= range.start && range.end <= self.covers.end {
            let behind = self.covers.end - range.end;
            let mut shifted = crc32fast::Hasher::new_with_initial_len(before ^ after, 0);
            shifted.combine(&crc32fast::Hasher::new_with_initial_len(0, behind));
            self.stated ^= shifted.finalize();
        }
    }
}

/// Bytes that become others, with the CRCs of both.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub range: Range<u64>,
    pub before: u32,
    pub after: u32,
}

/// Brings CRCs up to date with changes of what they cover, from the innermost record to the outermost, because the CRC of
/// a record in a record is part of what the outer one covers. Gives what is to be written, and where.
pub(crate) fn update(checksums: Vec<Checksum>, changes: impl IntoIterator<Item = Change>) -> Vec<(u64, Vec<u8>)> {
    // By where they begin, so that each checksum looks at its own alone.
    let mut changes: BTreeMap<u64, Change> = changes.into_iter().map(|change| (change.range.start, change)).collect();
    let mut patches = Vec::new();
    for mut checksum in checksums {
        let stated = checksum.stated;
        for change in changes.range(checksum.covers.clone()).map(|(_, change)| change) {
            checksum.change(&change.range, change.before, change.after);
        }
        if checksum.stated == stated {
            continue;
        }
        let (before, after) = (stated.to_le_bytes(), checksum.stated.to_le_bytes());
        for at in checksum.at {
            changes.insert(at, Change::of(at, &before, &after));
            patches.push((at, after.to_vec()));
        }
    }
    patches
}

impl Change {
    pub fn of(at: u64, before: &[u8], after: &[u8]) -> Self {
        let range = at..at + after.len() as u64;
        Self { range, before: crc32fast::hash(before), after: crc32fast::hash(after) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_one_covers_is_read_with_it() {
        let of = |covers: Range<u64>| Checksum { record: String::new(), covers, stated: 0, at: Vec::new() };
        let checksums = [of(10..20), of(0..30), of(12..13), of(30..40), of(30..40), of(35..40), of(50..60)];
        let covers = |found: Vec<&Checksum>| found.iter().map(|found| found.covers.clone()).collect::<Vec<_>>();
        assert_eq!(covers(Checksum::outermost(&checksums)), [0..30, 30..40, 30..40, 50..60]);
        assert!(Checksum::outermost(&[]).is_empty());
    }

    #[test]
    fn pieces_that_make_up_the_bytes_save_reading_them() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let stated = crc32fast::hash(&bytes[100..900]);
        let checksum = Checksum { record: "x".into(), covers: 100..900, stated, at: Vec::new() };
        let nothing: Vec<u8> = Vec::new();
        let joined = |cuts: &[usize], file: &Vec<u8>| {
            let pieces =
                cuts.chunks(2).map(|cut| (cut[0] as u64..cut[1] as u64, crc32fast::hash(&bytes[cut[0]..cut[1]])));
            checksum.check_joined(pieces, file).is_ok()
        };
        for cuts in [&[100, 900][..], &[100, 101, 101, 899, 899, 900]] {
            assert!(joined(cuts, &nothing), "{cuts:?}");
        }
        // A gap, an overlap, an end too early or too late, nothing at all: only the bytes can tell.
        for cuts in [&[101, 900][..], &[100, 500, 501, 900], &[100, 500, 499, 900], &[100, 899], &[100, 901], &[]] {
            assert!(!joined(cuts, &nothing) && joined(cuts, &bytes), "{cuts:?}");
        }
        assert!(checksum.check_joined([(100..900, stated ^ 1)].into_iter(), &bytes).is_err());
    }

    #[test]
    fn a_change_gives_the_crc_of_the_new_bytes() {
        let mut bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let mut checksum =
            Checksum { record: "x".into(), covers: 100..1000, stated: crc32fast::hash(&bytes[100..]), at: Vec::new() };
        for (start, end) in [(100, 101), (999, 1000), (100, 1000), (400, 777), (5, 50)] {
            let before = crc32fast::hash(&bytes[start..end]);
            bytes[start..end].iter_mut().for_each(|byte| *byte = byte.wrapping_mul(7).wrapping_add(3));
            checksum.change(&(start as u64..end as u64), before, crc32fast::hash(&bytes[start..end]));
            assert_eq!(checksum.stated, crc32fast::hash(&bytes[100..]), "{start}..{end}");
            checksum.check(&bytes).unwrap();
        }
        bytes[500] ^= 1;
        assert!(checksum.check(&bytes).is_err());
    }
}
