//! The tar archive of 2016: as it comes, and with the checksums set right, which a fuzzer would hardly guess.

use reweft::container::tar;

use crate::sources::{agree, options};

/// Headers and data are padded to this.
const BLOCK_NBYTES: usize = 512;

pub(crate) fn body(bytes: &[u8]) {
    members(bytes);
    let _ = agree(bytes, &options());
    let sealed = seal(bytes.to_vec());
    members(&sealed);
    let _ = agree(&sealed, &options());
}

fn members(bytes: &[u8]) {
    let Ok(members) = tar::members(&bytes.to_vec()) else { return };
    let mut end = 0;
    for (name, range) in &members {
        assert!(range.start >= end + BLOCK_NBYTES as u64 && range.end >= range.start, "{name:?} {range:?} in another");
        assert!(!name.contains(['/', '\\', '\0']) && name != "..", "{name:?}");
        end = range.end;
    }
    assert!(end <= bytes.len() as u64);
}

/// Walks the headers by the sizes that they state and writes each one's checksum.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 0;
    while let Some(header) = bytes.get_mut(at..at + BLOCK_NBYTES).filter(|header| header[0] != 0) {
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let digits = header[124..136].iter().copied().take_while(u8::is_ascii_digit);
        let size = digits.fold(0_usize, |size, digit| size.saturating_mul(8).saturating_add(usize::from(digit - b'0')));
        at = at.saturating_add(BLOCK_NBYTES).saturating_add(size).saturating_add(BLOCK_NBYTES - 1);
        at = at / BLOCK_NBYTES * BLOCK_NBYTES;
        if at > bytes.len() {
            break;
        }
    }
    bytes
}
