//! Artifacts without their weights.

use std::ops::Range;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::Serialize;

use super::copy::copy_range;
use super::watch::Watch;
use super::{AtomicFile, Progress};
use crate::artifact::stripped::{ABOUT, About, Piece, REST, merged, pieces};
use crate::artifact::{Artifact, Change, Kind, Slot, update};
use crate::container::zip::{NewRecord, tail};
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::compile;
use crate::source::{self, to_usize};

/// Bytes that pass through memory at a time.
const CHUNK_NBYTES: u64 = 1 << 20;

/// What stripping did.
#[derive(Clone, Debug, Serialize)]
pub struct StripReport {
    /// The file that was written.
    pub out: PathBuf,
    /// Slots whose bytes were left out.
    pub slots: usize,
    /// Bytes that were left out.
    pub nbytes: u64,
    /// Slots that kept their bytes: those that no refit can fill, those that no state_dict has, those that were asked for.
    pub kept: Vec<String>,
    /// Bytes of the file that was written.
    pub out_nbytes: u64,
}

/// Writes an artifact without its weights: for whoever ships the program once and weights often.
///
/// What is written is of use to [`Artifact::open`], [`plan`](crate::plan::plan) and [`refit`](super::refit) alone; no
/// loader takes it for the whole. A refit needs a key for every slot that was left out, and gives, byte for byte, what it
/// gives for the whole artifact. Slots that a refit cannot fill keep their bytes, so do those that are no part of a
/// state_dict, and those with a name that one of the patterns `keep` (regex) matches: where no manifest says so, buffers
/// outside the state_dict look like all others. Reads all weight bytes twice and compares their CRCs; writes the others.
///
/// # Errors
/// [`ErrorKind::Usage`] for an artifact that is stripped already or has no slots to strip, and for a pattern that is none or
/// matches no slot; [`ErrorKind::Unsupported`] for a library beside its source, and for weights that are not in the file;
/// [`ErrorKind::Format`] for a wrong CRC; read errors and [`ErrorKind::Io`]. `out` is then as it was.
pub fn strip(artifact: &Artifact, keep: &[&str], out: &Path, progress: Progress<'_>) -> Result<StripReport> {
    refuse(artifact).map_err(|error| error.in_file(artifact.path()))?;
    let keep = Keep::new(artifact, keep)?;
    let (mut slots, mut ranges, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for slot in artifact.slots() {
        let places = if keep.has(slot) { Vec::new() } else { artifact.strippable(slot)? };
        if places.is_empty() {
            kept.push(slot.name.clone());
        } else {
            slots.push(slot);
            ranges.extend(places);
        }
    }
    if slots.is_empty() {
        let what = "no slot can be left out: none can be refitted from a state_dict, or all are to be kept";
        return Err(Error::new(ErrorKind::Usage, what).in_file(artifact.path()));
    }
    let watch = Watch::new(artifact.path(), artifact.file().into_iter())?;
    artifact.check_weights()?;
    let changes = ranges.iter().map(|range| {
        let nbytes = range.end - range.start;
        let before = source::crc(&**artifact.source(), range.start, nbytes)?;
        Ok(Change { range: range.clone(), before, after: crc_of_zeros(nbytes)? })
    });
    let changes: Vec<Change> = changes.collect::<Result<_>>().map_err(|error| error.in_file(artifact.path()))?;
    let patches = update(artifact.checksums(slots.iter().copied())?, changes);
    let left_out = merged(ranges);
    let file = AtomicFile::create(out)?;
    let out_nbytes = write(artifact, &left_out, &patches, &file, progress)?;
    watch.check()?;
    if let Some(source) = artifact.file() {
        file.keep_attributes(source)?;
    }
    file.commit()?;
    let nbytes = left_out.iter().map(|range| range.end - range.start).sum();
    Ok(StripReport { out: out.to_owned(), slots: slots.len(), nbytes, kept, out_nbytes })
}

fn refuse(artifact: &Artifact) -> Result<()> {
    if artifact.is_stripped() {
        return Err(Error::new(ErrorKind::Usage, "the file is stripped already"));
    }
    if artifact.kind() == Kind::Library {
        let what = "a library is read together with the source beside it, and cannot be stripped";
        return Err(Error::new(ErrorKind::Unsupported, what).with_hint("compile a .pt2 package"));
    }
    match artifact.absent() {
        Some(absent) => Err(Error::new(ErrorKind::Unsupported, &absent.why).with_hint(absent.hint)),
        None => Ok(()),
    }
}

/// The slots that stay.
struct Keep(Vec<Regex>);

impl Keep {
    fn new(artifact: &Artifact, patterns: &[&str]) -> Result<Self> {
        let regexes: Vec<Regex> = patterns.iter().map(|pattern| compile(pattern)).collect::<Result<_>>()?;
        let has_slot = |regex: &Regex| artifact.slots().iter().flat_map(Slot::names).any(|name| regex.is_match(name));
        match regexes.iter().find(|regex| !has_slot(regex)) {
            None => Ok(Self(regexes)),
            Some(idle) => {
                let what = format!("no slot has a name that {:?} matches, so it would keep nothing", idle.as_str());
                Err(Error::new(ErrorKind::Usage, what).in_file(artifact.path()))
            }
        }
    }

    fn has(&self, slot: &Slot) -> bool {
        self.0.iter().any(|regex| slot.names().any(|name| regex.is_match(name)))
    }
}

/// Writes both records and gives the length of the file.
fn write(
    artifact: &Artifact,
    left_out: &[Range<u64>],
    patches: &[(u64, Vec<u8>)],
    file: &AtomicFile,
    progress: Progress<'_>,
) -> Result<u64> {
    let source = artifact.source();
    let about = serde_json::to_vec(&About::new(source.len(), left_out))
        .map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?;
    let pieces = pieces(source.len(), left_out);
    let total = pieces.iter().map(|piece| piece.range.end - piece.range.start).sum();
    let first = NewRecord::new(ABOUT.to_owned(), about.len() as u64, 0)?;
    let second = NewRecord::new(REST.to_owned(), total, first.end())?;
    let about_crc = crc32fast::hash(&about);
    file.write_at(&[first.header(), about, first.descriptor(about_crc), second.header()].concat(), 0)?;
    let mut done = 0;
    for Piece { range, at } in &pieces {
        let mut moved = |nbytes| {
            done += nbytes;
            progress(done, total);
            Ok(())
        };
        copy_range(source, range.start, file, second.payload_offset() + at, range.end - range.start, &mut moved)?;
    }
    for (at, bytes) in patches {
        let number = pieces.partition_point(|piece| piece.range.end < at + bytes.len() as u64);
        let piece = pieces.get(number).filter(|piece| piece.range.start <= *at);
        let piece = piece.ok_or_else(|| Error::format("a CRC stands within the weights").in_file(artifact.path()))?;
        file.write_at(bytes, second.payload_offset() + piece.at + (at - piece.range.start))?;
    }
    // Read back, because CRCs within it were written over.
    let crc = source::crc(&*file.written()?, second.payload_offset(), total)?;
    file.write_at(&second.descriptor(crc), second.payload_offset() + total)?;
    let end = second.end();
    let tail = tail(&[(first, about_crc), (second, crc)], end);
    file.write_at(&tail, end)?;
    Ok(end + tail.len() as u64)
}

fn crc_of_zeros(nbytes: u64) -> Result<u32> {
    let zeros = vec![0; to_usize(nbytes.min(CHUNK_NBYTES))?];
    let (mut hasher, mut left) = (crc32fast::Hasher::new(), nbytes);
    while left > 0 {
        let step = left.min(CHUNK_NBYTES);
        hasher.update(&zeros[..to_usize(step)?]);
        left -= step;
    }
    Ok(hasher.finalize())
}
