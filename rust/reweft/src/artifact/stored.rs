//! Files whose tensors have places of their own: exported programs, TorchScript archives, checkpoints. The reader of
//! checkpoints finds them; here each becomes a slot.

use std::collections::HashMap;
use std::path::Path;

use super::{Artifact, Checksum, Holds, Kind, Slot, SlotKind, Unrefittable};
use crate::checkpoint::{Checkpoint, Format, OpenOptions, Storage};
use crate::container::zip::Archive;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{Access, Source, origin};
use crate::tensor::TensorInfo;

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
    let slots = slots(&checkpoint, kind)?;
    let unreadable = checkpoint.unreadable();
    let unrefittable = unreadable.map(|(key, why)| Unrefittable { name: key.to_owned(), reason: why.to_owned() });
    let unrefittable = unrefittable.collect();
    // Only exported programs have archives within the archive.
    let archive = if kind == Kind::Exported { Some(Archive::open(source.clone())?) } else { None };
    let holds = Holds::Storages(Box::new(Stored { checkpoint, archive }));
    Ok(Artifact { path: path.to_owned(), source, stripped: None, kind, slots, unused: Vec::new(), unrefittable, holds })
}

/// Tensors that are the same are one slot with several names.
fn slots(checkpoint: &Checkpoint, kind: Kind) -> Result<Vec<Slot>> {
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
            persistent: is_persistent(kind, key, storage),
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
        });
    }
    block_overlaps(&mut slots);
    Ok(slots)
}

/// Whether a state_dict has a tensor: constants of a program are in none.
fn is_persistent(kind: Kind, key: &str, storage: &Storage) -> bool {
    match kind {
        Kind::Exported => !storage.name().contains("/data/constants/"),
        Kind::TorchScript => !key.starts_with("constants.c"),
        _ => true,
    }
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

/// Slots that share some of their bytes would write over each other.
fn block_overlaps(slots: &mut [Slot]) {
    let mut order: Vec<usize> = (0..slots.len()).filter(|number| slots[*number].nbytes > 0).collect();
    order.sort_by_key(|number| (slots[*number].region, slots[*number].byte_offset));
    let mut last: Option<usize> = None;
    for number in order {
        let end = |number: usize| slots[number].byte_offset + slots[number].nbytes;
        let overlapped =
            last.filter(|last| slots[*last].region == slots[number].region && slots[number].byte_offset < end(*last));
        if last.is_none() || overlapped.is_none() || last.is_some_and(|last| end(last) < end(number)) {
            last = Some(number);
        }
        if let Some(other) = overlapped {
            for (one, two) in [(number, other), (other, number)] {
                let what = format!("it shares some of its bytes with {:?}", slots[two].name);
                slots[one].blocked.get_or_insert(what);
            }
        }
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
        let storages: Vec<Source> = vec![Arc::new(vec![0_u8; 64])];
        let info = |first: u64, numel: u64| TensorInfo {
            dtype: crate::Dtype::U8,
            shape: vec![numel],
            strides: vec![1],
            storage: 0,
            storage_offset: first,
        };
        let tensors =
            [("all", 0, 40), ("part", 4, 4), ("later", 30, 5), ("tied", 0, 40), ("free", 40, 8), ("none", 5, 0)];
        let tensors = tensors.map(|(key, first, numel)| (key.to_owned(), info(first, numel)));
        let checkpoint = Checkpoint::from_memory("x".as_ref(), storages, tensors).unwrap();
        let slots = slots(&checkpoint, Kind::Checkpoint).unwrap();
        let blocked: Vec<_> = slots.iter().filter(|slot| slot.blocked.is_some()).map(|slot| &slot.name[..]).collect();
        assert_eq!(blocked, ["all", "part", "later"]);
        assert_eq!(slots[0].aliases, ["tied"]);
    }
}
