//! Files whose tensors have places of their own: exported programs, TorchScript archives, checkpoints. The reader of
//! checkpoints finds them; here each becomes a slot.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::{Artifact, Checksum, Holds, Kind, Slot, SlotKind, Unrefittable};
use crate::checkpoint::{Checkpoint, Format, OpenOptions, Storage};
use crate::container::zip::Archive;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{Access, Source, origin};
use crate::tensor::{TensorInfo, is_dense, span};

/// The tensors of the file, and the archive that it is.
#[derive(Debug)]
pub(super) struct Stored {
    pub checkpoint: Checkpoint,
    /// The file's own archive, if it is one; archives can be within it.
    archive: Option<Archive>,
}

pub(super) fn read(path: &Path, source: Source, access: Access, limits: &Limits) -> Result<Artifact> {
    let options = OpenOptions { access, limits: limits.clone(), ..OpenOptions::default() };
    let checkpoint = Checkpoint::from_source(path, source.clone(), &options).map_err(|error| match error.kind() {
        ErrorKind::Unsupported if error.hint().is_none() => {
            error.with_hint("an artifact is a .pt2 package, an exported program, a TorchScript archive or a checkpoint")
        }
        _ => error,
    })?;
    let kind = match checkpoint.format() {
        Format::Exported => Kind::Exported,
        Format::TorchScript => Kind::TorchScript,
        Format::Sharded => {
            let error =
                Error::new(ErrorKind::Unsupported, "a shard index is no artifact: its tensors are in other files");
            return Err(error.with_hint("refit each shard with --allow-unused"));
        }
        _ => Kind::Checkpoint,
    };
    let unreadable = checkpoint.unreadable();
    let unrefittable = unreadable.map(|(key, why)| Unrefittable { name: key.to_owned(), reason: why.to_owned() });
    let unrefittable = unrefittable.collect();
    // Only exported programs have archives within the archive.
    let archive = if kind == Kind::Exported { Some(Archive::open(source.clone())?) } else { None };
    let slots = slots(&checkpoint, kind, archive.as_ref())?;
    let holds = Holds::Storages(Box::new(Stored { checkpoint, archive }));
    let (originals, unused) = (Vec::new(), Vec::new());
    Ok(Artifact { path: path.to_owned(), source, stripped: None, kind, slots, originals, unused, unrefittable, holds })
}

/// Tensors that are the same are one slot with several names.
fn slots(checkpoint: &Checkpoint, kind: Kind, archive: Option<&Archive>) -> Result<Vec<Slot>> {
    let constants = archive.map(constants).unwrap_or_default();
    let mut numbers: HashMap<&TensorInfo, usize> = HashMap::with_capacity(checkpoint.len());
    let mut slots: Vec<Slot> = Vec::with_capacity(checkpoint.len());
    for (key, info) in checkpoint.tensors() {
        if let Some(number) = numbers.get(info) {
            slots[*number].aliases.push(key.to_owned());
            continue;
        }
        let storage = checkpoint.storage_of(info)?;
        let (byte_offset, _) = info.window(storage.nbytes).map_err(|error| error.of_key(key))?;
        numbers.insert(info, slots.len());
        slots.push(Slot {
            name: key.to_owned(),
            aliases: Vec::new(),
            constant: String::new(),
            kind: SlotKind::Tensor,
            persistent: is_persistent(kind, key, storage, &constants),
            mutated: false,
            dtype: info.dtype,
            shape: info.shape.clone(),
            strides: info.strides.clone(),
            region: Some(info.storage),
            byte_offset,
            nbytes: info.nbytes(),
            row_nbytes: info.nbytes(),
            copies: Vec::new(),
            hash: None,
            blocked: blocked(storage).map(str::to_owned),
            stripped: false,
            recipe: None,
            packed: None,
        });
    }
    block_overlaps(&mut slots);
    Ok(slots)
}

/// Whether a state_dict has a tensor: constants of a program are in none.
fn is_persistent(kind: Kind, key: &str, storage: &Storage, constants: &[Range<u64>]) -> bool {
    match kind {
        Kind::Exported => {
            // An archive of its own is as much a constant as the record that it is.
            let base = storage.archive_record().map_or(0, |(archive, _)| origin(archive.source()).1);
            let number = constants.partition_point(|range| range.end <= base);
            let is_within = base > 0 && constants.get(number).is_some_and(|range| range.contains(&base));
            !is_within && !is_constant(storage.name())
        }
        Kind::TorchScript => !key.starts_with("constants.c"),
        _ => true,
    }
}

/// The records of an exported program that hold constants, in the order of their bytes.
fn constants(archive: &Archive) -> Vec<Range<u64>> {
    let records = archive.entries().iter().filter(|(name, _)| is_constant(name));
    let mut ranges: Vec<_> = records.map(|(_, entry)| entry.extent()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges
}

/// By the name of a record; the second is of torch before 2.8.
fn is_constant(record: &str) -> bool {
    record.contains("/data/constants/") || record == "serialized_constants.pt"
}

fn blocked(storage: &Storage) -> Option<&'static str> {
    if storage.source().is_none() {
        Some("its values are computed when it is read, and stand nowhere in the file")
    } else if storage.is_packed() {
        Some("its record is compressed; save the file again")
    } else if storage.is_swapped() {
        Some("the file is of the other byte order; save it again")
    } else {
        None
    }
}

/// Blocks slots that share some of their bytes, in any of their places: they would write over each other.
pub(super) fn block_overlaps(slots: &mut [Slot]) {
    let mut places: Vec<(usize, u64, u64, usize)> = Vec::with_capacity(slots.len());
    for (number, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.nbytes > 0) {
        let own = slot.region.map(|region| (region, slot.byte_offset));
        let all = own.into_iter().chain(slot.copies.iter().copied());
        places.extend(all.map(|(region, start)| (region, start, start.saturating_add(reach(slot)), number)));
    }
    places.sort_unstable();
    let mut last: Option<(usize, u64, u64, usize)> = None;
    for place in places {
        let (region, start, end, number) = place;
        let overlapped = last.filter(|last| last.0 == region && start < last.2);
        if overlapped.is_none_or(|last| last.2 < end) {
            last = Some(place);
        }
        if let Some((.., other)) = overlapped {
            block(slots, number, other);
            block(slots, other, number);
        }
    }
}

/// Bytes from the first element to the last: a view with gaps has fewer.
fn reach(slot: &Slot) -> u64 {
    span(&slot.shape, &slot.strides).and_then(|elements| slot.dtype.nbytes(elements)).unwrap_or(slot.nbytes)
}

fn block(slots: &mut [Slot], number: usize, by: usize) {
    let other = &slots[by];
    let what = if is_dense(&other.shape, &other.strides) {
        format!("it shares some of its bytes with {:?}", other.name)
    } else {
        format!("it lies among the bytes of {:?}, a view with gaps or repeats", other.name)
    };
    let slot = &mut slots[number];
    // That a slot is itself such a view is said anyway.
    if is_dense(&slot.shape, &slot.strides) {
        slot.blocked.get_or_insert(what);
    }
}

impl Stored {
    /// Where a byte of a storage stands in the file.
    pub fn place(&self, region: usize, byte_offset: u64) -> Result<u64> {
        let storage = self.checkpoint.storages().get(region)?;
        let Some((source, start)) = storage.locate()? else {
            return Err(Error::new(ErrorKind::Unsupported, blocked(storage).unwrap_or("it has no place in the file")));
        };
        Ok(origin(source).1 + start + byte_offset)
    }

    /// CRCs of storages, and of the records of the file that hold the archives that those are in.
    pub fn checksums(&self, regions: &[usize]) -> Result<Vec<Checksum>> {
        let mut checksums = Vec::new();
        for region in regions {
            let storage = self.checkpoint.storages().get(*region)?;
            let Some((archive, record)) = storage.archive_record() else { continue };
            let base = origin(archive.source()).1;
            checksums.extend(Checksum::of_record(archive, record, base)?);
            if base > 0
                && let Some(outer) = &self.archive
            {
                checksums.extend(around(outer, base)?);
            }
        }
        Ok(checksums)
    }
}

/// The CRC of the record that a byte lies in.
fn around(archive: &Archive, byte_offset: u64) -> Result<Option<Checksum>> {
    let found = archive.entries().iter().find(|(_, entry)| entry.extent().contains(&byte_offset));
    found.map_or(Ok(None), |(name, _)| Checksum::of_record(archive, name, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn overlaps_block_both() {
        let tensors =
            [("all", 0, 40), ("part", 4, 4), ("later", 30, 5), ("tied", 0, 40), ("free", 40, 8), ("none", 5, 0)];
        let slots = slots_of(&tensors.map(|(key, first, numel)| (key, first, numel, 1)));
        let blocked: Vec<_> = slots.iter().filter(|slot| slot.blocked.is_some()).map(|slot| &slot.name[..]).collect();
        assert_eq!(blocked, ["all", "part", "later"]);
        assert_eq!(slots[0].aliases, ["tied"]);
    }

    #[test]
    fn a_view_with_gaps_blocks_what_lies_among_its_bytes() {
        let slots = slots_of(&[("even", 0, 8, 2), ("odd", 1, 8, 2), ("within", 12, 3, 1), ("behind", 16, 4, 1)]);
        let blocked = slots.iter().map(|slot| slot.blocked.as_deref());
        let within = "it lies among the bytes of \"odd\", a view with gaps or repeats";
        assert_eq!(blocked.collect::<Vec<_>>(), [None, None, Some(within), None]);
        assert!(slots[..2].iter().all(|slot| slot.obstacle().is_some_and(|why| why.contains("a view with gaps"))));
    }

    /// Slots on one storage of 64 bytes: name, first byte, elements, stride.
    fn slots_of(tensors: &[(&str, u64, u64, u64)]) -> Vec<Slot> {
        let storages: Vec<Source> = vec![Arc::new(vec![0_u8; 64])];
        let infos = tensors.iter().map(|(key, storage_offset, numel, stride)| {
            let (shape, strides, storage_offset) = (vec![*numel], vec![*stride], *storage_offset);
            ((*key).to_owned(), TensorInfo { dtype: crate::Dtype::U8, shape, strides, storage: 0, storage_offset })
        });
        slots(&Checkpoint::from_memory("x".as_ref(), storages, infos).unwrap(), Kind::Checkpoint, None).unwrap()
    }
}
