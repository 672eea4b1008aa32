//! The tar subset that torch wrote in 2016, read strictly: a few plain files, and nothing else.
//!
//! Members are ranges of the file; nothing is unpacked. Links, devices, folders, sparse files and headers that rename
//! or resize what follows (GNU, PAX) are refused, because readers differ in what they make of them. Source: POSIX
//! 1003.1 `pax`, section "ustar Interchange Format"; GNU tar's binary numbers.

use std::ops::Range;

use indexmap::IndexMap;

use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, read_vec};

/// Headers and data are padded to this.
pub const BLOCK_NBYTES: u64 = 512;
/// A header, or as much of the data behind it.
type Block = [u8; 512];
/// Blocks of zeros that end an archive.
const END_BLOCKS: u64 = 2;
/// Most members that are listed; torch wrote three.
const MAX_MEMBERS: usize = 1000;

/// Fields of a header, as ranges of its block.
mod fields {
    use std::ops::Range;

    pub const NAME: Range<usize> = 0..100;
    pub const SIZE: Range<usize> = 124..136;
    pub const CHECKSUM: Range<usize> = 148..156;
    pub const TYPE: usize = 156;
    pub const PREFIX: Range<usize> = 345..500;
    pub const MAGIC: Range<usize> = 257..263;
}

/// Whether `head`, the first bytes of a file, begins with a header whose checksum is right.
pub fn detect(head: &[u8]) -> bool {
    head.first_chunk().is_some_and(has_checksum)
}

/// The members by name, in the order of the file, as ranges of it. Reads one block for each.
///
/// # Errors
/// [`ErrorKind::Format`] for a wrong checksum, a name that is there twice or leaves its folder, a size that is no number
/// or ends behind the file, an archive without its end, and bytes behind it; [`ErrorKind::Unsupported`] for members
/// that are no plain files; [`ErrorKind::Limit`] for more than a thousand.
pub fn members(source: &dyn ReadAt) -> Result<IndexMap<String, Range<u64>>> {
    let mut members = IndexMap::new();
    let mut at = 0;
    loop {
        let block = read_block(source, at)?;
        if block.iter().all(|byte| *byte == 0) {
            check_end(source, at)?;
            return Ok(members);
        }
        let (name, nbytes) = read_header(&block).map_err(|error| error.at(at))?;
        let start = at + BLOCK_NBYTES;
        let end = crate::source::check_range(source.len(), start, nbytes).map_err(|error| error.in_record(&name))?;
        if members.len() == MAX_MEMBERS {
            let what = format!("tar archive of more than {MAX_MEMBERS} members");
            return Err(Error::new(ErrorKind::Limit, what).with_hint("unpack the checkpoint out of it first"));
        }
        if members.insert(name.clone(), start..end).is_some() {
            return Err(Error::format("two members have this name").at(at).in_record(name));
        }
        // No overflow: `end` is within the file.
        at = end.next_multiple_of(BLOCK_NBYTES);
    }
}

fn read_block(source: &dyn ReadAt, at: u64) -> Result<Block> {
    let mut block = [0; 512];
    source.read_exact_at(at, &mut block).map_err(|error| match error.kind() {
        ErrorKind::Format => Error::format("tar archive does not end as tar archives do")
            .at(at)
            .with_hint("the file is truncated; copy or download it again"),
        _ => error,
    })?;
    Ok(block)
}

/// From the first block of zeros on, there is at least another one, and nothing but zeros.
fn check_end(source: &dyn ReadAt, at: u64) -> Result<()> {
    /// Bytes read at a time.
    const CHUNK_NBYTES: u64 = 1 << 16;
    let mut from = at;
    while from < source.len() {
        let chunk = read_vec(source, from, CHUNK_NBYTES.min(source.len() - from))?;
        if let Some(position) = chunk.iter().position(|byte| *byte != 0) {
            return Err(Error::format("bytes stand behind the tar archive").at(from + position as u64));
        }
        from += chunk.len() as u64;
    }
    if source.len() - at < END_BLOCKS * BLOCK_NBYTES {
        return Err(Error::format("tar archive ends in less than two blocks of zeros")
            .at(at)
            .with_hint("the file is truncated; copy or download it again"));
    }
    Ok(())
}

/// Name and length of a plain file.
fn read_header(block: &Block) -> Result<(String, u64)> {
    if !has_checksum(block) {
        return Err(Error::format("tar header with a wrong checksum"));
    }
    let name = str::from_utf8(text(&block[fields::NAME])).map_err(|_| Error::format("member name is not UTF-8"))?;
    check_name(name)?;
    let refuse = |what: &str| {
        let what = format!("member is {what}; torch wrote plain files");
        Err(Error::new(ErrorKind::Unsupported, what).in_record(name))
    };
    let is_ustar = &block[fields::MAGIC] == b"ustar\0";
    if is_ustar && !text(&block[fields::PREFIX]).is_empty() {
        return refuse("in a folder");
    }
    match block[fields::TYPE] {
        b'0' | 0 => {}
        b'1' | b'2' => return refuse("a link"),
        b'3' | b'4' | b'6' => return refuse("a device or a pipe"),
        b'5' => return refuse("a folder"),
        b'x' | b'g' => return refuse("a PAX header"),
        b'L' | b'K' => return refuse("a GNU long name"),
        b'S' => return refuse("a sparse file"),
        other => return refuse(&format!("of type {:?}", char::from(other))),
    }
    let nbytes = number(&block[fields::SIZE]).ok_or_else(|| Error::format("member size is no number from 0"))?;
    Ok((name.to_owned(), nbytes))
}

fn check_name(name: &str) -> Result<()> {
    let bad = if name.is_empty() {
        "is empty"
    } else if name.contains(['/', '\\']) || name.chars().any(char::is_control) || name.starts_with("..") {
        "leaves the archive, is in a folder or has a control character"
    } else {
        return Ok(());
    };
    Err(Error::format(format!("member name {name:?} {bad}")))
}

/// The checksum is the sum of all bytes, its own field counted as spaces.
fn has_checksum(block: &Block) -> bool {
    let own: u64 = block[fields::CHECKSUM].iter().map(|byte| u64::from(*byte)).sum();
    let all: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    number(&block[fields::CHECKSUM]) == Some(all - own + 8 * u64::from(b' '))
}

/// Octal digits between spaces, closed by a NUL or space; or GNU's binary form for what needs more digits.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, rest)) = field.split_first() {
        return rest.iter().try_fold(0_u64, |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits = text(field).trim_ascii();
    if digits.is_empty() || !digits.iter().all(|byte| (b'0'..=b'7').contains(byte)) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| value.checked_mul(8)?.checked_add(u64::from(digit - b'0')))
}

/// A field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: u8, size: &[u8]) -> Vec<u8> {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[fields::SIZE.start..fields::SIZE.start + size.len()].copy_from_slice(size);
        block[fields::TYPE] = kind;
        sealed(block)
    }

    fn sealed(mut block: Block) -> Vec<u8> {
        block[fields::CHECKSUM].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[fields::CHECKSUM.start..][..7].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block.to_vec()
    }

    fn archive(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    fn refused(bytes: &[u8]) -> String {
        members(&bytes.to_vec()).unwrap_err().to_string()
    }

    #[test]
    fn members_are_ranges_of_the_file() {
        let bytes = archive(&[header("a", b'0', b"5\0"), b"hello".into(), header("b", 0, b"00000000000\0")]);
        assert!(detect(&bytes));
        let found = members(&bytes).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [("a".to_owned(), 512..517), ("b".to_owned(), 1536..1536)]);
        let binary = [&[0x80][..], &[0; 10], &[5]].concat();
        let bytes = archive(&[header("a", b'0', &binary), b"hello".into()]);
        assert_eq!(members(&bytes).unwrap()["a"], 512..517);
    }

    #[test]
    fn what_readers_understand_in_two_ways_is_refused() {
        for (kind, what) in [
            (b'1', "link"),
            (b'2', "link"),
            (b'3', "device"),
            (b'5', "folder"),
            (b'6', "pipe"),
            (b'x', "PAX"),
            (b'g', "PAX"),
            (b'L', "long name"),
            (b'S', "sparse"),
            (b'Z', "type 'Z'"),
        ] {
            let error = refused(&archive(&[header("a", kind, b"0\0")]));
            assert!(error.contains(what), "{error}");
        }
        for name in ["/etc/passwd", "../a", "a/b", "a\\b", "a\nb", ""] {
            let error = refused(&archive(&[header(name, b'0', b"0\0")]));
            assert!(error.contains("member name"), "{error}");
        }
        let mut in_folder: Block = header("a", b'0', b"0\0").try_into().unwrap();
        in_folder[fields::MAGIC].copy_from_slice(b"ustar\0");
        in_folder[fields::PREFIX.start] = b'x';
        assert!(refused(&archive(&[in_folder.to_vec()])).contains("checksum"), "the checksum covers all of the header");
        assert!(refused(&archive(&[sealed(in_folder)])).contains("in a folder"));
    }

    #[test]
    fn sizes_that_lie_are_errors() {
        for size in [&b"-1\0"[..], b"9\0", b"\0", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"0x5\0"] {
            let error = refused(&archive(&[header("a", b'0', size)]));
            assert!(error.contains("member size"), "{error}");
        }
        let error = refused(&archive(&[header("a", b'0', b"77777777777\0")]));
        assert!(error.contains("too early"), "{error}");
    }

    #[test]
    fn twice_cut_or_followed_is_refused() {
        let twice = archive(&[header("a", b'0', b"0\0"), header("a", b'0', b"0\0")]);
        assert!(refused(&twice).contains("two members"));
        let whole = archive(&[header("a", b'0', b"0\0")]);
        for len in 0..whole.len() {
            assert!(members(&whole[..len].to_vec()).is_err(), "cut to {len}");
        }
        assert!(refused(&[whole, b"x".to_vec()].concat()).contains("behind"));
    }
}
