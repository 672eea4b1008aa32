//! Refit on disk: new bytes in the slots of an artifact, in a copy or in place.
//!
//! Nothing changes its size, so nothing moves. What is written are the slots' bytes, the CRCs around them and the hashes
//! in the manifest; every other byte stays.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::atomic::Flusher;
use super::convert::{refuse_file_of, refuse_source};
use super::copy::{clone_whole, copy_range};
use super::journal::{Journal, Locked};
use super::slabs::{SLAB_NBYTES, Slabs};
use super::watch::Watch;
use super::{AtomicFile, Progress};
use crate::artifact::stripped::{merged, pieces};
use crate::artifact::{Artifact, Change, Checksum, Slot, manifest, update};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::parallel::{self, Progressed};
use crate::plan::{Finding, Plan, Refill};
use crate::source::{self, to_usize};
use crate::tensor::{TensorInfo, same_layout};

/// Bytes that are copied as one piece of work.
const PIECE_NBYTES: u64 = 64 << 20;
/// Bytes of the old content that are held at a time.
const CHUNK_NBYTES: usize = 256 << 10;

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
/// The kernel copies what stays, or shares its blocks where the file system can. Reads the checkpoint's tensors and the
/// records that they go into once, compares their CRCs, and writes every byte of the copy once, on two or more threads
/// with buffers of 8 MiB; a tensor that must be rearranged is held whole. `out` may be the artifact itself: it is
/// replaced by a rename, which readers of the old file do not notice. The copy has the artifact's mode, and, where the
/// system allows, its owner and extended attributes. A symbolic link at `out` is replaced, not followed; of a file with
/// several names only this one becomes the new file.
///
/// # Errors
/// [`ErrorKind::Mismatch`] for a plan with blocking findings; [`ErrorKind::Usage`] if `out` is a file of the checkpoint
/// or of the original weights, or the plan is of other files; [`ErrorKind::Format`] for a wrong CRC or a file that changes
/// meanwhile; read errors and [`ErrorKind::Io`]. `out` is then as it was.
pub fn refit(
    plan: &Plan,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    out: &Path,
    progress: Progress<'_>,
) -> Result<RefitReport> {
    refuse_source(checkpoint, out)?;
    if let Some(original) = &plan.original {
        refuse_file_of(original, out, "the original weights")?;
    }
    plan.check()?;
    let job = Job::new(plan, artifact, checkpoint)?;
    let file = AtomicFile::create_private(out)?;
    let flusher = Flusher::new(&file, artifact.source().len());
    let cloned = clone_whole(artifact.source(), &file);
    let write = |bytes: &[u8], piece: &Piece| {
        file.write_at(bytes, piece.change.range.start)?;
        flusher.wrote(bytes.len() as u64)
    };
    let keep = |Range { start, end }: Range<u64>| {
        let mut moved = |nbytes| flusher.wrote(nbytes);
        if cloned { Ok(()) } else { copy_range(artifact.source(), start, &file, start, end - start, &mut moved) }
    };
    let (filled, pieces) = job.run(&job.kept(!cloned), &write, &keep, progress)?;
    job.check(&pieces)?;
    for (at, bytes) in job.patches(&filled, pieces)? {
        file.write_at(&bytes, at)?;
    }
    job.finish()?;
    if let Some(source) = artifact.file() {
        file.keep_attributes(source)?;
    }
    file.commit()?;
    Ok(job.report(out, &filled))
}

/// Writes the checkpoint's tensors into the plan's artifact itself: only bytes that differ are touched, and an artifact
/// that holds these weights already stays as it is, with its time of modification.
///
/// What is to be written goes into a journal beside the artifact first, named `.NAME.reweft-journal`. When that is on the
/// disk, the refit has happened: should the process or the machine die, the next [`Artifact::open`] or
/// [`Checkpoint::open`] of the file finishes it. Costs what differs twice, and twice waits for the disk. Reads the
/// tensors and the slots that they go into; of the CRCs only those of the checkpoint are compared, those of the artifact
/// are brought up to date by what changes, so that damage elsewhere stays visible.
///
/// A symbolic link is followed; a file with several names (hard links) is refused. Not for a file that somebody serves from:
/// the new bytes would show in every mapping of it. Do not move a file away from its journal before it is finished.
///
/// # Errors
/// [`ErrorKind::Mismatch`] for a plan with blocking findings; [`ErrorKind::Unsupported`] for a stripped artifact;
/// [`ErrorKind::Usage`] if the checkpoint is the artifact, or somebody has it mapped or writes to it;
/// [`ErrorKind::Format`] if it is not the file that was planned with;
/// read errors and [`ErrorKind::Io`]. The artifact is then as it was, unless the hint says that the rewrite is done or is to
/// be finished.
pub fn refit_in_place(
    plan: &Plan,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<RefitReport> {
    plan.check()?;
    artifact.check_whole()?;
    refuse_own_bytes(artifact, checkpoint)?;
    let locked = Locked::open(artifact.path())?;
    locked.check_is(artifact.source())?;
    // What the file states is read once more under the lock: whoever rewrote it since it was opened is noticed.
    let job = Job::new(plan, artifact, checkpoint)?;
    let journal = Mutex::new(Journal::begin(&locked)?);
    let write = |bytes: &[u8], piece: &Piece| {
        if !piece.changed {
            return Ok(());
        }
        journal.lock().unwrap_or_else(PoisonError::into_inner).add(piece.change.range.start, bytes, piece.change.after)
    };
    let (filled, pieces) = job.run(&[], &write, &|_| Ok(()), progress)?;
    let mut journal = journal.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !journal.is_empty() {
        for (at, bytes) in job.patches(&filled, pieces)? {
            journal.add(at, &bytes, crc32fast::hash(&bytes))?;
        }
        job.finish()?;
        journal.commit()?.apply(&locked)?;
    }
    Ok(job.report(artifact.path(), &filled))
}

/// What a comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The artifact.
    pub artifact: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Whether every slot holds its key's bytes.
    pub equal: bool,
    /// Slots that were compared.
    pub slots: usize,
    /// Bytes that were compared.
    pub nbytes: u64,
    /// Slots whose bytes differ, and what stood against a comparison.
    pub differences: Vec<Finding>,
}

/// Compares every slot with what a refit would put there. Reads all weight bytes of both sides on two or more threads,
/// and compares the CRCs of the records that they are in, and the hashes that a manifest states.
///
/// # Errors
/// Read errors, [`ErrorKind::Format`] for a wrong CRC, [`ErrorKind::Unsupported`] for a stripped artifact. Differences are
/// in the report.
pub fn verify(
    plan: &Plan,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<VerifyReport> {
    artifact.check_whole()?;
    // Whether the package takes other weights is no matter of what it holds.
    let mut differences: Vec<Finding> = plan.blocking().filter(|finding| !finding.is_rule()).cloned().collect();
    let mut nbytes = 0;
    // Without bytes to compare the plan says so.
    if artifact.absent().is_none() {
        let job = Job { counts: true, ..Job::new(plan, artifact, checkpoint)? };
        let (found, pieces) = job.run(&job.kept(false), &|_, _| Ok(()), &|_| Ok(()), progress)?;
        job.check(&pieces)?;
        for (fill, found) in job.fills.iter().zip(&found) {
            differences.extend(fill.differences(found));
        }
        job.finish()?;
        nbytes = job.fills.iter().map(|fill| fill.slot.nbytes).sum();
    }
    Ok(VerifyReport {
        artifact: plan.artifact.clone(),
        checkpoint: plan.checkpoint.clone(),
        equal: differences.is_empty(),
        slots: plan.refills.len(),
        nbytes,
        differences,
    })
}

/// The checkpoint must not be read from the file that is rewritten.
fn refuse_own_bytes(artifact: &Artifact, checkpoint: &Checkpoint) -> Result<()> {
    let identity = |file: &File| file.metadata().ok().map(|found| (found.dev(), found.ino()));
    let own = artifact.file().and_then(identity);
    if own.is_some() && checkpoint.files().any(|file| identity(file) == own) {
        let what = "the checkpoint lies in the artifact itself";
        return Err(Error::new(ErrorKind::Usage, what).in_file(artifact.path()).with_hint("write a copy with -o"));
    }
    Ok(())
}

/// Takes a piece of a slot's new bytes, and what is known of it.
type Write<'a> = &'a (dyn Fn(&[u8], &Piece) -> Result<()> + Sync);
/// Takes a range of the file that stays.
type Keep<'a> = &'a (dyn Fn(Range<u64>) -> Result<()> + Sync);

/// A slot that gets new bytes.
struct Fill<'a> {
    refill: &'a Refill,
    slot: &'a Slot,
    /// Where its bytes stand in the file; weights can be in a package twice.
    places: Vec<u64>,
}

impl Fill<'_> {
    /// What stands against calling a slot filled.
    fn differences(&self, found: &Filled) -> Vec<Finding> {
        if found.changed {
            let differ = found.differ;
            let nbytes = self.slot.nbytes * self.places.len() as u64;
            return vec![Finding::value(self.slot, format!("{differ} of {nbytes} bytes differ from the checkpoint"))];
        }
        // The slot's bytes are the checkpoint's, whose hash is known.
        let lies = self.slot.hash.is_some() && self.slot.hash != found.hash;
        let what = "its bytes are not those that the manifest states";
        lies.then(|| Finding::value(self.slot, what)).into_iter().collect()
    }
}

/// What became of a slot.
struct Filled {
    /// Number of the slot.
    slot: usize,
    changed: bool,
    /// How many bytes changed, if the job counts them.
    differ: u64,
    /// BLAKE3 of the new bytes, if the manifest wants it.
    hash: Option<String>,
}

/// A range of the file that no slot is written to.
struct Kept {
    range: Range<u64>,
    /// Whether it counts for a checksum that is compared.
    covered: bool,
}

/// Bytes of the file that were looked at.
struct Piece {
    change: Change,
    /// Whether they become others.
    changed: bool,
}

/// Pieces by where they begin. None is empty, so there is one at most for each place.
type Pieces = BTreeMap<u64, Piece>;

fn differ(before: &[u8], after: &[u8]) -> u64 {
    before.iter().zip(after).filter(|(left, right)| left != right).count() as u64
}

/// A plan and the files that it is of.
struct Job<'a> {
    plan: &'a Plan,
    artifact: &'a Artifact,
    checkpoint: &'a Checkpoint,
    fills: Vec<Fill<'a>>,
    checksums: Vec<Checksum>,
    watch: [Watch<'a>; 2],
    /// Whether to count bytes that differ.
    counts: bool,
    /// Memory of slots that are done: touching fresh pages takes longer than the copies.
    buffers: Mutex<Vec<Buffers>>,
}

/// Memory for a piece of a slot and for what is there.
#[derive(Default)]
struct Buffers {
    new: Vec<u8>,
    old: Vec<u8>,
}

impl<'a> Job<'a> {
    fn new(plan: &'a Plan, artifact: &'a Artifact, checkpoint: &'a Checkpoint) -> Result<Self> {
        if plan.artifact != artifact.path() || plan.checkpoint != checkpoint.path() {
            return Err(Error::new(ErrorKind::Usage, "the plan was made of other files"));
        }
        let fills = plan.refills.iter().map(|refill| {
            let slot = artifact.slots().get(refill.slot).ok_or_else(|| {
                Error::new(ErrorKind::Usage, "the plan was made of another artifact").of_key(&refill.name)
            })?;
            Ok(Fill { refill, slot, places: artifact.places(slot)? })
        });
        let fills: Vec<_> = fills.collect::<Result<_>>()?;
        let checksums = artifact.checksums(fills.iter().map(|fill| fill.slot))?;
        let watch = [
            Watch::new(artifact.path(), artifact.file().into_iter())?,
            Watch::new(checkpoint.path(), checkpoint.files())?,
        ];
        let (counts, buffers) = (false, Mutex::default());
        Ok(Self { plan, artifact, checkpoint, fills, checksums, watch, counts, buffers })
    }

    /// Bytes that are written into slots.
    fn nbytes(&self) -> u64 {
        self.fills.iter().map(|fill| fill.slot.nbytes * fill.places.len() as u64).sum()
    }

    /// The ranges of the file that no slot is written to, in pieces; only those that count for a checksum, if not `all`.
    fn kept(&self, all: bool) -> Vec<Kept> {
        let place = |fill: &Fill<'_>, at: &u64| *at..*at + fill.slot.nbytes;
        let filled = self.fills.iter().flat_map(|fill| fill.places.iter().map(move |at| place(fill, at)));
        let length = self.artifact.source().len();
        let covers: Vec<&Range<u64>> = self.outermost().map(|checksum| &checksum.covers).collect();
        let mut kept = Vec::new();
        for gap in pieces(length, &merged(filled.collect())) {
            let Range { start: mut at, end: until } = gap.range;
            while at < until {
                // Each piece lies in the bytes of one checksum or of none.
                let next = covers.partition_point(|covers| covers.end <= at);
                let (covered, cut) = match covers.get(next) {
                    Some(covers) if covers.start <= at => (true, covers.end),
                    Some(covers) => (false, covers.start),
                    None => (false, length),
                };
                let end = until.min(at + PIECE_NBYTES).min(cut);
                if all || covered {
                    kept.push(Kept { range: at..end, covered });
                }
                at = end;
            }
        }
        kept
    }

    /// Fills the slots and hands over what stays. Gives what became of each slot, and the pieces that were looked at.
    fn run(
        &self,
        kept: &[Kept],
        write: Write<'_>,
        keep: Keep<'_>,
        progress: Progress<'_>,
    ) -> Result<(Vec<Filled>, Pieces)> {
        let work = |number: usize, done: &Progressed<'_>| {
            let Some(fill) = self.fills.get(number) else {
                let Kept { range, covered } = &kept[number - self.fills.len()];
                keep(range.clone())?;
                let piece = covered.then(|| self.unchanged(range)).transpose()?;
                done.add(range.end - range.start)?;
                return Ok((None, Vec::from_iter(piece)));
            };
            self.fill(fill, write, done).map(|(filled, pieces)| (Some(filled), pieces))
        };
        let total = self.nbytes() + kept.iter().map(|kept| kept.range.end - kept.range.start).sum::<u64>();
        let found = parallel::run(self.fills.len() + kept.len(), total, &work, progress)?;
        let (filled, pieces): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let pieces = pieces.into_iter().flatten().filter(|piece: &Piece| !piece.change.range.is_empty());
        Ok((filled.into_iter().flatten().collect(), pieces.map(|piece| (piece.change.range.start, piece)).collect()))
    }

    /// The checksums that are compared: others are of bytes within theirs.
    fn outermost(&self) -> impl Iterator<Item = &Checksum> {
        Checksum::outermost(&self.checksums).into_iter()
    }

    /// Compares the CRCs of what the records held, which the work on the slots found piece by piece.
    fn check(&self, pieces: &Pieces) -> Result<()> {
        let mut outermost = self.outermost();
        let checked = outermost.try_for_each(|checksum| {
            let within = pieces
                .range(checksum.covers.clone())
                .map(|(_, Piece { change, .. })| (change.range.clone(), change.before));
            checksum.check_joined(within, &**self.artifact.source())
        });
        checked.map_err(|error| error.in_file(self.artifact.path()))
    }

    /// A piece that stays.
    fn unchanged(&self, range: &Range<u64>) -> Result<Piece> {
        let crc = source::crc(&**self.artifact.source(), range.start, range.end - range.start);
        let crc = crc.map_err(|error| error.in_file(self.artifact.path()))?;
        Ok(Piece { change: Change { range: range.clone(), before: crc, after: crc }, changed: false })
    }

    /// Makes a slot's bytes, compares them with those that are there, and hands over each piece with its place and
    /// whether it differs.
    fn fill(&self, fill: &Fill<'_>, write: Write<'_>, done: &Progressed<'_>) -> Result<(Filled, Vec<Piece>)> {
        let lock = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let Buffers { mut new, mut old } = lock().pop().unwrap_or_default();
        let mut hasher = self.artifact.manifest().map(|_| blake3::Hasher::new());
        let mut filled = Filled { slot: fill.refill.slot, changed: false, differ: 0, hash: None };
        let mut pieces = Vec::new();
        let mut first = 0;
        let mut take = |bytes: &[u8]| {
            if let Some(hasher) = &mut hasher {
                hasher.update(bytes);
            }
            for place in &fill.places {
                let at = place + first;
                let (piece, differ) = self.compare(at, bytes, &mut old)?;
                write(bytes, &piece)?;
                filled.changed |= piece.changed;
                filled.differ += differ;
                pieces.push(piece);
                done.add(bytes.len() as u64)?;
            }
            first += bytes.len() as u64;
            Ok(())
        };
        self.make(fill, &mut new, &mut take)?;
        filled.hash = hasher.map(|hasher| manifest::hex(hasher.finalize()));
        // Memory of a tensor that had to be held whole is given back.
        if new.capacity() as u64 <= SLAB_NBYTES {
            lock().push(Buffers { new, old });
        }
        Ok((filled, pieces))
    }

    /// Hands over a slot's new bytes in pieces, in order.
    fn make(&self, fill: &Fill<'_>, bytes: &mut Vec<u8>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (refill, slot, checkpoint) = (fill.refill, fill.slot, self.checkpoint);
        let info = refill.recipe.plain_key().map(|key| checkpoint.get(key).map(|info| (key, info))).transpose()?;
        let is_plain =
            |info: &TensorInfo| info.is_contiguous() && same_layout(&info.shape, &info.strides, &slot.strides);
        // Slabs come in row-major order.
        let Some((key, info)) = info.filter(|(_, info)| is_plain(info)) else {
            make_room(bytes, slot.nbytes)?;
            refill.recipe.evaluate_into(checkpoint, bytes)?;
            return take(bytes);
        };
        let in_place = |error: Error| error.of_key(key).in_file(checkpoint.path());
        let storage = checkpoint.storage_of(info).map_err(in_place)?;
        for slab in Slabs::of(info, storage).map_err(in_place)? {
            make_room(bytes, slab.nbytes())?;
            checkpoint.read_view(&slab, bytes).map_err(in_place)?;
            take(bytes)?;
        }
        Ok(())
    }

    /// Compares bytes with those at a place of the artifact; counts those that differ, if the job wants it.
    fn compare(&self, at: u64, new: &[u8], old: &mut Vec<u8>) -> Result<(Piece, u64)> {
        old.resize(CHUNK_NBYTES, 0);
        let mut before = crc32fast::Hasher::new();
        // The CRC of the new bytes, from the first chunk on that differs.
        let mut after = None;
        let (mut count, mut from) = (0, at);
        for chunk in new.chunks(CHUNK_NBYTES) {
            let old = &mut old[..chunk.len()];
            self.artifact.source().read_exact_at(from, old).map_err(|error| error.in_file(self.artifact.path()))?;
            let differs = old != chunk;
            if differs || after.is_some() {
                after.get_or_insert_with(|| before.clone()).update(chunk);
            }
            before.update(old);
            // A pass of its own over all bytes, which only a comparison has a use for.
            count += if self.counts && differs { differ(old, chunk) } else { 0 };
            from += chunk.len() as u64;
        }
        let (before, changed) = (before.finalize(), after.is_some());
        let after = after.map_or(before, crc32fast::Hasher::finalize);
        Ok((Piece { change: Change { range: at..from, before, after }, changed }, count))
    }

    /// What is to be written beside the slots: the manifest with new hashes, then the CRCs.
    fn patches(&self, filled: &[Filled], pieces: Pieces) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut patches = Vec::new();
        let mut checksums = self.checksums.clone();
        let changed = pieces.into_values().filter(|piece| piece.changed);
        let mut changes: Vec<Change> = changed.map(|piece| piece.change).collect();
        if let Some((change, bytes)) = self.new_manifest(filled)? {
            checksums.extend(self.manifest_checksum()?);
            patches.push((change.range.start, bytes));
            changes.push(change);
        }
        patches.extend(update(checksums, changes));
        Ok(patches)
    }

    /// The manifest with the new hashes, as the bytes that it changes and what they become. It keeps its length because
    /// every hash is as long, and every name of a batching.
    fn new_manifest(&self, filled: &[Filled]) -> Result<Option<(Change, Vec<u8>)>> {
        let Some(mut manifest) = self.artifact.manifest().cloned() else { return Ok(None) };
        let before = manifest.to_json()?;
        for filled in filled {
            if let (Some(slot), Some(hash)) = (manifest.slots_mut().get_mut(filled.slot), &filled.hash) {
                slot.hash.clone_from(hash);
            }
        }
        if let Some(batching) = self.plan.batching {
            manifest.set_batching(batching);
        }
        let after = manifest.to_json()?;
        if before == after {
            return Ok(None);
        }
        let Some((archive, record)) = self.manifest_record() else { return Ok(None) };
        let place = archive.place(&record).map_err(|error| error.in_file(self.artifact.path()))?.data;
        let present = source::read_vec(&**self.artifact.source(), place.start, place.end - place.start)?;
        if present != before || after.len() != before.len() {
            let what = "the manifest was written by another version, and would change its size";
            return Err(Error::new(ErrorKind::Unsupported, what).in_record(record).in_file(self.artifact.path()));
        }
        Ok(Some((Change::of(place.start, &before, &after), after)))
    }

    fn manifest_record(&self) -> Option<(&crate::container::zip::Archive, String)> {
        let (archive, model) = self.artifact.package()?;
        Some((archive, manifest::record_name(model)))
    }

    fn manifest_checksum(&self) -> Result<Option<Checksum>> {
        let Some((archive, record)) = self.manifest_record() else { return Ok(None) };
        Checksum::of_record(archive, &record, 0)
    }

    /// Neither file may have changed meanwhile.
    fn finish(&self) -> Result<()> {
        self.watch.iter().try_for_each(Watch::check)
    }

    /// The report of a plan that was carried out.
    fn report(&self, out: &Path, filled: &[Filled]) -> RefitReport {
        let findings = self.plan.findings.iter().map(Finding::to_string);
        RefitReport {
            out: out.to_owned(),
            slots: self.plan.refills.len(),
            slots_changed: filled.iter().filter(|filled| filled.changed).count(),
            kept: self.plan.kept.clone(),
            nbytes: self.plan.nbytes(),
            notices: findings.chain(self.checkpoint.notices().iter().cloned()).collect(),
        }
    }
}

/// Gives a buffer a length; what is in it may be left from before.
fn make_room(bytes: &mut Vec<u8>, nbytes: u64) -> Result<()> {
    if (bytes.capacity() as u64) < nbytes {
        *bytes = source::zeroed(nbytes)?;
    } else {
        bytes.resize(to_usize(nbytes)?, 0);
    }
    Ok(())
}
