//! Stripped artifacts: everything but the weights.
//!
//! A zip archive of two stored records: `reweft_stripped/about.json` states the length of the whole file and the ranges
//! that its weights took, `reweft_stripped/rest` holds all other bytes in order. No loader of the whole takes it for one.
//! Read back, the ranges are zeros, and the CRCs that the rest states are those of zeros, so that a refit that fills all
//! ranges gives the bytes that a refit of the whole file gives.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::aotinductor::check_text;
use crate::checkpoint::json;
use crate::container::zip::Archive;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{ReadAt, Source, Window, check_range, read_vec, to_usize};

/// The record that comes first.
pub(crate) const ABOUT: &str = "reweft_stripped/about.json";
/// The record of all bytes that stayed.
pub(crate) const REST: &str = "reweft_stripped/rest";
const FORMAT: &str = "reweft-stripped";
/// The layout of these records; a reader refuses others.
const VERSION: u32 = 1;
/// Where the name of a zip archive's first record begins (APPNOTE 4.3.7).
const FIRST_NAME: u64 = 30;

/// What the first record says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct About {
    format: String,
    version: u32,
    /// Bytes of the whole file.
    nbytes: u64,
    /// Start and end of each range that was left out, in order; no two touch.
    left_out: Vec<[u64; 2]>,
}

impl About {
    pub fn new(nbytes: u64, left_out: &[Range<u64>]) -> Self {
        let left_out = left_out.iter().map(|range| [range.start, range.end]).collect();
        Self { format: FORMAT.to_owned(), version: VERSION, nbytes, left_out }
    }

    fn read(archive: &Archive, limits: &Limits) -> Result<Self> {
        check_text(archive.entry(ABOUT)?.nbytes, limits)?;
        let about: Self = json::parse(&archive.read(ABOUT)?)?;
        if about.format != FORMAT || about.version != VERSION {
            let what = format!("{:?} of version {}, not {FORMAT:?} {VERSION}", about.format, about.version);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(about)
    }

    /// The ranges, if they are in order, apart from each other and within the file.
    fn left_out(&self) -> Result<Vec<Range<u64>>> {
        let mut last = None;
        for [start, end] in &self.left_out {
            if start >= end || *end > self.nbytes || last.is_some_and(|last| last >= *start) {
                return Err(Error::format(format!("the range from {start} to {end} is out of order or of the file")));
            }
            last = Some(*end);
        }
        Ok(self.left_out.iter().map(|[start, end]| *start..*end).collect())
    }
}

/// Whether a file is a stripped artifact, by the name of its first record.
pub(crate) fn detect(source: &dyn ReadAt) -> bool {
    let nbytes = FIRST_NAME + ABOUT.len() as u64;
    source.len() > nbytes
        && read_vec(source, 0, nbytes)
            .is_ok_and(|head| head.starts_with(b"PK\x03\x04") && head.ends_with(ABOUT.as_bytes()))
}

/// The whole file with zeros for what was left out, and the ranges of those. Reads the first record.
pub(super) fn read(file: &Source, limits: &Limits) -> Result<(Source, Vec<Range<u64>>)> {
    let archive = Archive::open(file.clone())?;
    let in_about = |error: Error| error.in_record(ABOUT);
    let about = About::read(&archive, limits).map_err(in_about)?;
    let left_out = about.left_out().map_err(in_about)?;
    let place = archive.place(REST)?.data;
    let rest = Window::new(file.clone(), place.start, place.end - place.start)?;
    let pieces = pieces(about.nbytes, &left_out);
    let wanted: u64 = pieces.iter().map(Piece::nbytes).sum();
    if wanted != rest.len() {
        let what = format!("record of {} bytes, the ranges that were left out say {wanted}", rest.len());
        return Err(Error::format(what).in_record(REST));
    }
    Ok((Arc::new(Whole { rest, pieces, nbytes: about.nbytes }), left_out))
}

/// Bytes of the whole file that stayed.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Where they stand in the whole file.
    pub range: Range<u64>,
    /// Where they begin in the record.
    pub at: u64,
}

impl Piece {
    fn nbytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// What is left of a file of `nbytes` when ranges are taken out.
pub(crate) fn pieces(nbytes: u64, left_out: &[Range<u64>]) -> Vec<Piece> {
    let (mut pieces, mut start, mut at) = (Vec::new(), 0, 0);
    let end = nbytes..nbytes;
    for gap in left_out.iter().chain(std::iter::once(&end)) {
        if start < gap.start {
            pieces.push(Piece { range: start..gap.start, at });
            at += gap.start - start;
        }
        start = gap.end;
    }
    pieces
}

/// Ranges in order, those that touch as one. Empty ones are left out.
pub(crate) fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// A file of which some ranges are not stored, and read as zeros.
#[derive(Debug)]
struct Whole {
    rest: Window,
    pieces: Vec<Piece>,
    nbytes: u64,
}

impl ReadAt for Whole {
    fn len(&self) -> u64 {
        self.nbytes
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let end = check_range(self.nbytes, byte_offset, out.len() as u64)?;
        out.fill(0);
        let first = self.pieces.partition_point(|piece| piece.range.end <= byte_offset);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.range.start < end) {
            let (from, until) = (piece.range.start.max(byte_offset), piece.range.end.min(end));
            let part = to_usize(from - byte_offset)?..to_usize(until - byte_offset)?;
            self.rest.read_exact_at(piece.at + (from - piece.range.start), &mut out[part])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(ends: &[[u64; 2]]) -> Vec<Range<u64>> {
        ends.iter().map(|[start, end]| *start..*end).collect()
    }

    fn within(range: &Range<u64>) -> Range<usize> {
        usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
    }

    #[test]
    fn what_was_left_out_reads_as_zeros() {
        let whole: Vec<u8> = (1..=40).collect();
        let cases: [&[[u64; 2]]; 5] = [&[], &[[0, 3]], &[[37, 40]], &[[0, 40]], &[[2, 5], [7, 8], [20, 39]]];
        for left_out in cases.map(ranges) {
            let pieces = pieces(40, &left_out);
            let kept = |piece: &Piece| whole[within(&piece.range)].to_vec();
            let rest: Source = Arc::new(pieces.iter().flat_map(kept).collect::<Vec<u8>>());
            let rest = Window::new(rest.clone(), 0, rest.len()).unwrap();
            let file = Whole { rest, pieces, nbytes: 40 };
            let mut wanted = whole.clone();
            for range in &left_out {
                wanted[within(range)].fill(0);
            }
            for start in 0..40 {
                for end in start..=40 {
                    let found = read_vec(&file, start, end - start).unwrap();
                    assert_eq!(found, wanted[within(&(start..end))], "{left_out:?} {start}..{end}");
                }
            }
            assert!(read_vec(&file, 30, 11).is_err());
        }
    }

    #[test]
    fn ranges_that_lie_are_refused() {
        let cases: [&[[u64; 2]]; 6] =
            [&[[3, 3]], &[[5, 4]], &[[0, 41]], &[[4, 8], [8, 9]], &[[4, 8], [2, 3]], &[[1, u64::MAX]]];
        for left_out in cases.map(ranges) {
            assert!(About::new(40, &left_out).left_out().is_err(), "{left_out:?}");
        }
        assert_eq!(About::new(40, &[0..1, 2..40]).left_out().unwrap(), [0..1, 2..40]);
        assert_eq!(merged(vec![8..9, 1..4, 2..3, 4..6, 7..7]), [1..6, 8..9]);
    }
}
