//! Copy mode: a copy of an artifact with new bytes in its slots.
//!
//! The kernel copies the whole file; then the weights record is streamed once, which gives its CRC, and the manifest
//! gets the new hashes. Both keep their size, so nothing moves and every other byte stays.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::copy::copy_whole;
use super::{AtomicFile, Progress, refuse_same_file};
use crate::artifact::{Artifact, Slot, manifest};
use crate::checkpoint::Checkpoint;
use crate::container::zip::{Archive, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Finding, Plan};
use crate::source::read_vec;

/// Bytes moved at a time where no slot is replaced.
const CHUNK_NBYTES: u64 = 1 << 20;
/// Where the CRC is in a data descriptor and in a central directory header (APPNOTE 4.3.9, 4.3.12).
const DESCRIPTOR_CRC: u64 = 4;
const DIRECTORY_CRC: u64 = 16;

/// What a refit did.
#[derive(Clone, Debug, Serialize)]
pub struct RefitReport {
    /// The file that was written, or the name of the live model.
    pub out: PathBuf,
    /// Slots that a checkpoint key filled.
    pub slots: usize,
    /// Of these, slots whose bytes are other than before.
    pub slots_changed: usize,
    /// Slots that kept their bytes.
    pub kept: Vec<String>,
    /// Bytes that were filled in.
    pub nbytes: u64,
    /// Notices of plan and checkpoint.
    pub notices: Vec<String>,
}

/// Writes a copy of the plan's artifact whose slots hold the checkpoint's tensors.
///
/// Reads and writes the whole artifact once, checks the CRCs of the bytes it reads, and holds one slot in memory. `out`
/// may be the artifact itself: it is replaced by a rename, which readers of the old file do not notice.
///
/// # Errors
/// [`ErrorKind::Mismatch`] for a plan with blocking findings; [`ErrorKind::Usage`] if `out` is the checkpoint or the
/// plan is of other files; read errors and [`ErrorKind::Io`]. `out` is then as it was.
pub fn refit(
    plan: &Plan,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    out: &Path,
    progress: Progress<'_>,
) -> Result<RefitReport> {
    plan.check()?;
    if plan.artifact != artifact.path() || plan.checkpoint != checkpoint.path() {
        return Err(Error::new(ErrorKind::Usage, "the plan was made of other files"));
    }
    refuse_same_file(out, checkpoint.path(), "the checkpoint")?;
    let archive = artifact.archive();
    let file = AtomicFile::create(out)?;
    copy_whole(archive.source(), &file).map_err(|error| error.in_file(artifact.path()))?;
    let mut slots_changed = 0;
    if !plan.refills.is_empty() {
        let record = artifact.weights_record()?;
        let mut rewrite = Rewrite {
            archive,
            record,
            out: file.as_file(),
            before: crc32fast::Hasher::new(),
            after: crc32fast::Hasher::new(),
        };
        let hashes =
            rewrite.weights(plan, artifact, checkpoint, progress).map_err(|error| error.in_file(artifact.path()))?;
        slots_changed = hashes.changed;
        rewrite.finish().map_err(|error| error.in_file(artifact.path()))?;
        write_manifest(artifact, file.as_file(), hashes.hashes)?;
    }
    if let Some(source) = archive.source().file() {
        file.keep_mode(source)?;
    }
    file.commit()?;
    Ok(report(plan, checkpoint, out, slots_changed))
}

/// The report of a plan that was carried out.
fn report(plan: &Plan, checkpoint: &Checkpoint, out: &Path, slots_changed: usize) -> RefitReport {
    let findings = plan.findings.iter().map(Finding::to_string);
    RefitReport {
        out: out.to_owned(),
        slots: plan.refills.len(),
        slots_changed,
        kept: plan.kept.clone(),
        nbytes: plan.nbytes(),
        notices: findings.chain(checkpoint.notices().iter().cloned()).collect(),
    }
}

/// New hashes by slot number, and how many differ.
struct Hashes {
    hashes: Vec<(usize, String)>,
    changed: usize,
}

/// Streams one record from the archive to the copy.
struct Rewrite<'a> {
    archive: &'a Archive,
    record: &'a str,
    out: &'a File,
    before: crc32fast::Hasher,
    after: crc32fast::Hasher,
}

impl Rewrite<'_> {
    fn weights(
        &mut self,
        plan: &Plan,
        artifact: &Artifact,
        checkpoint: &Checkpoint,
        progress: Progress<'_>,
    ) -> Result<Hashes> {
        let place = self.archive.place(self.record)?;
        let mut at = place.data.start;
        let mut found = Hashes { hashes: Vec::new(), changed: 0 };
        for refill in &plan.refills {
            let slot = artifact.slots().get(refill.slot).ok_or_else(|| {
                Error::new(ErrorKind::Usage, "the plan was made of another artifact").of_key(&refill.name)
            })?;
            let start = place.data.start + slot.byte_offset;
            self.skip(at, start)?;
            let new = refill.recipe.evaluate(checkpoint, slot.nbytes)?;
            found.changed += usize::from(self.replace(slot, start, &new)?);
            found.hashes.push((refill.slot, manifest::hash(&new)));
            at = start + slot.nbytes;
            progress(at - place.data.start, place.data.end - place.data.start);
        }
        self.skip(at, place.data.end)?;
        Ok(found)
    }

    /// Takes bytes into both CRCs that stay as they are.
    fn skip(&mut self, mut at: u64, end: u64) -> Result<()> {
        while at < end {
            let bytes = read_vec(&**self.archive.source(), at, CHUNK_NBYTES.min(end - at))?;
            self.before.update(&bytes);
            self.after.update(&bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes a slot's new bytes; gives whether they differ from the old ones.
    fn replace(&mut self, slot: &Slot, start: u64, new: &[u8]) -> Result<bool> {
        let old = read_vec(&**self.archive.source(), start, slot.nbytes)?;
        self.before.update(&old);
        self.after.update(new);
        if old == new {
            return Ok(false);
        }
        self.out.write_all_at(new, start).map_err(|error| Error::io("write", error))?;
        Ok(true)
    }

    /// Checks the CRC of what was read and writes the CRC of what was written.
    fn finish(self) -> Result<()> {
        let (before, after) = (self.before.finalize(), self.after.finalize());
        self.archive.check_crc(self.record, before)?;
        if before == after { Ok(()) } else { write_crc(self.archive, self.record, self.out, after) }
    }
}

/// Puts a record's CRC where the archive states it: the descriptor or local header, and the central directory.
fn write_crc(archive: &Archive, record: &str, out: &File, crc: u32) -> Result<()> {
    let entry = archive.entry(record)?;
    let Place { descriptor, .. } = archive.place(record)?;
    // Without a descriptor the CRC is in the local header, 14 bytes in (APPNOTE 4.3.7).
    let beside = descriptor.map_or(entry.header_offset + 14, |range| range.start + DESCRIPTOR_CRC);
    for at in [beside, entry.directory_offset + DIRECTORY_CRC] {
        out.write_all_at(&crc.to_le_bytes(), at).map_err(|error| Error::io("write", error))?;
    }
    Ok(())
}

/// Writes the new hashes into the copy's manifest, which keeps its size because every hash has the same length.
fn write_manifest(artifact: &Artifact, out: &File, hashes: Vec<(usize, String)>) -> Result<()> {
    let Some(mut manifest) = artifact.manifest().cloned() else { return Ok(()) };
    let before = manifest.to_json()?;
    for (number, hash) in hashes {
        if let Some(slot) = manifest.slots_mut().get_mut(number) {
            slot.hash = hash;
        }
    }
    let after = manifest.to_json()?;
    if before == after {
        return Ok(());
    }
    let record = manifest::record_name(artifact.records());
    let place = artifact.archive().place(&record)?;
    if after.len() as u64 != place.data.end - place.data.start {
        let what = format!("manifest would take {} bytes; it was written by another version", after.len());
        return Err(Error::new(ErrorKind::Unsupported, what).in_record(record).in_file(artifact.path()));
    }
    out.write_all_at(&after, place.data.start).map_err(|error| Error::io("write", error))?;
    write_crc(artifact.archive(), &record, out, crc32fast::hash(&after))
}
