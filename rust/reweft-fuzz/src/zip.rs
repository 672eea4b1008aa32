//! Zip archives: every record has one place and one content, and what of them is a checkpoint.

use std::sync::Arc;

use reweft::container::zip::{Archive, Method};
use reweft::source;

use crate::memory::within;
use crate::sources::{agree, options};

/// Bytes held while the directory is read, for each byte of the input.
const OPEN_FACTOR: u64 = 60;
/// Bytes held for a record that unpacks, for each of its packed bytes; deflate makes at most 1032 of one.
const UNPACK_FACTOR: u64 = 4 * 1032;
/// Bytes held, whatever the input.
const NBYTES: u64 = 1 << 18;

pub(crate) fn body(bytes: &[u8]) {
    records(bytes);
    let _ = agree(bytes, &options());
}

fn records(bytes: &[u8]) {
    let source = Arc::new(bytes.to_vec());
    let nbytes = bytes.len() as u64;
    let Ok(archive) = within(OPEN_FACTOR * nbytes + NBYTES, "opening", || Archive::open(source)) else { return };
    let mut taken = vec![archive.directory()];
    for (name, entry) in archive.entries() {
        let limit = nbytes + UNPACK_FACTOR * entry.packed_nbytes + NBYTES;
        let read = within(limit, "reading a record", || archive.read(name));
        if let Ok(record) = &read {
            assert_eq!(record.len() as u64, entry.nbytes, "{name:?}");
            assert!(entry.crc_is_absent() || crc32fast::hash(record) == entry.crc, "{name:?}");
        }
        if entry.method != Method::STORED {
            continue;
        }
        let Ok(place) = archive.place(name) else { continue };
        assert_eq!(place.data.end - place.data.start, entry.nbytes);
        let held = source::read_vec(&**archive.source(), place.data.start, entry.nbytes).unwrap();
        assert!(read.is_err() || read.is_ok_and(|record| record == held), "{name:?}");
        taken.push(entry.header_offset..place.descriptor.map_or(place.data.end, |range| range.end));
    }
    taken.sort_unstable_by_key(|range| range.start);
    assert!(taken.is_sorted_by(|left, right| left.end <= right.start), "records overlap: {taken:?}");
}
