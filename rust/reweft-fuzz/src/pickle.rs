//! Pickles: alone, as a checkpoint, and as the record of an archive with storages that its tensors can name.

use reweft_pickle::{DumpLimits, Limits, Pickle, disassemble, dump};

use crate::archive::stored;
use crate::memory::within;
use crate::sources::{agree, options};

/// Bytes held while parsing, for each byte of the input.
const PARSE_FACTOR: u64 = 250;
/// Bytes held while parsing, whatever the input.
const PARSE_NBYTES: u64 = 1 << 16;
/// Bytes of the storages `0` and `1` that the archive around a pickle holds.
const STORAGE_NBYTES: [usize; 2] = [96, 24];

pub(crate) fn body(bytes: &[u8]) {
    parse(bytes);
    let _ = agree(bytes, &options());
    let _ = agree(&archive_of(bytes), &options());
}

/// An archive with this pickle and the storages `0` and `1`.
pub(crate) fn archive_of(bytes: &[u8]) -> Vec<u8> {
    let storages = STORAGE_NBYTES.map(|nbytes| (0_u8..=255).cycle().take(nbytes).collect::<Vec<u8>>());
    let records = [
        ("a/data.pkl", bytes),
        ("a/byteorder", b"little".as_slice()),
        ("a/data/0", &storages[0]),
        ("a/data/1", &storages[1]),
        ("a/version", b"3\n"),
    ];
    stored(&records)
}

fn parse(bytes: &[u8]) {
    let limit = PARSE_FACTOR * bytes.len() as u64 + PARSE_NBYTES;
    let parsed = within(limit, "parsing", || Pickle::parse(bytes, &Limits::default()));
    let mut text = String::new();
    let decoded = disassemble(bytes, &mut text);
    let Ok(pickle) = parsed else { return };
    assert_eq!(decoded.unwrap(), pickle.nbytes() as u64, "the disassembly ends elsewhere");
    assert!(pickle.nodes().count() <= pickle.nbytes() + 4, "more values than bytes");
    for (id, _) in pickle.nodes() {
        assert!(pickle.describe(id).len() < 1000);
    }
    assert!(pickle.globals().count() <= pickle.nodes().count());
    text.clear();
    dump(&pickle, &DumpLimits::default(), &mut text).unwrap();
    // What stands behind STOP is not of this pickle.
    let again = Pickle::parse(&bytes[..pickle.nbytes()], &Limits::default()).unwrap();
    assert_eq!(format!("{pickle:?}"), format!("{again:?}"));
}
