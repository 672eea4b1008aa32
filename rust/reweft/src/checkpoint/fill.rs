//! Reading many tensors to where the caller wants them: each byte once, on several threads, with no buffer between.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Mutex, PoisonError};

use super::derive::Derive;
use super::{Checkpoint, Storages};
use crate::convert::can_cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::parallel;
use crate::recipe::Step;
use crate::source;
use crate::tensor::{TensorInfo, describe, same_layout};
use crate::write::Watch;

/// Bytes that a thread reads at a time: many enough that taking the next piece costs nothing, few enough that threads end
/// together.
const PIECE_NBYTES: usize = 4 << 20;

/// Memory for one tensor, in a dense layout.
#[derive(Debug)]
pub struct Room<'a> {
    /// The tensor's key.
    pub key: &'a str,
    /// The type that the elements must have.
    pub dtype: Dtype,
    /// The shape that it must have.
    pub shape: Vec<u64>,
    /// Elements between neighbours along each dimension.
    pub strides: Vec<u64>,
    /// As many bytes as the tensor has.
    pub bytes: &'a mut [u8],
}

/// What one thread does at a time.
struct Piece<'a> {
    key: &'a str,
    info: TensorInfo,
    part: Part,
    out: &'a mut [u8],
}

enum Part {
    /// The bytes of the storage from this one on, as they are.
    From(u64),
    /// A tensor that has to be laid out with these strides, turned, unpacked or made whole.
    Whole(Vec<u64>),
}

impl Checkpoint {
    /// Reads tensors into memory of the caller's, on several threads. With `cast`, float tensors are converted to the float
    /// dtype of their room, rounded to nearest even.
    ///
    /// Everything is looked at before the first byte of a room changes: dtypes, shapes, CRCs that the file states, and that
    /// the page cache has every byte which will be read. Allocates only for tensors that are laid out in another way than their room, packed or joined: one for each
    /// thread.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`ErrorKind::Mismatch`] for another dtype or shape, [`ErrorKind::Usage`] for a room of
    /// another size, [`ErrorKind::Format`] for a wrong CRC or a truncated file, [`ErrorKind::Limit`],
    /// [`ErrorKind::Io`]. No room has changed then, unless the message says so: if the file is changed by somebody else
    /// while the rooms are filled, or its disk fails at what it gave a moment ago.
    ///
    /// # Examples
    /// ```
    /// use reweft::checkpoint::Room;
    ///
    /// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/checkpoints/fc.pt");
    /// let checkpoint = reweft::Checkpoint::open(path.as_ref(), &reweft::OpenOptions::default())?;
    /// let (key, info) = checkpoint.tensors().next().unwrap();
    /// let mut bytes = vec![0; usize::try_from(info.nbytes()).unwrap()];
    /// let (dtype, shape, strides) = (info.dtype, info.shape.clone(), info.strides.clone());
    /// checkpoint.fill(vec![Room { key, dtype, shape, strides, bytes: &mut bytes }], false)?;
    /// assert_eq!(bytes, checkpoint.read(key)?);
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn fill(&self, rooms: Vec<Room<'_>>, cast: bool) -> Result<()> {
        let watch = Watch::new(self.path(), self.files())?;
        let mut derive = Derive::new(self.storages.clone());
        let mut infos = Vec::with_capacity(rooms.len());
        for room in &rooms {
            let info = self.get(room.key)?;
            let fitting = fit(&mut derive, info, room, cast);
            infos.push(fitting.map_err(|error| error.of_key(room.key).in_file(self.file_of(info)))?);
        }
        let storages = derive.storages;
        let (mut read, mut pieces) = (BTreeSet::new(), Vec::with_capacity(rooms.len()));
        for (info, room) in infos.into_iter().zip(rooms) {
            if !room.bytes.is_empty() {
                collect(&storages, &info, &mut read)?;
                cut(&storages, info, room, &mut pieces)?;
            }
        }
        self.check_storages(&read, true)?;
        watch.check()?;
        let pieces: Vec<_> = pieces.into_iter().map(Mutex::new).collect();
        let read = |number: usize, _: &parallel::Progressed<'_>| {
            let mut piece = pieces[number].lock().unwrap_or_else(PoisonError::into_inner);
            let Piece { key, info, part, out } = &mut *piece;
            let read = match part {
                Part::From(byte_offset) => storages.read_into(info.storage, *byte_offset, out),
                Part::Whole(strides) => storages.gather(info, strides, out),
            };
            read.map_err(|error| error.of_key(*key).in_file(self.file_of(info)))
        };
        parallel::run(pieces.len(), 0, &read, &mut |_, _| ()).and_then(|_| watch.check()).map_err(|error| {
            error.with_hint(
                "some tensors have their new bytes now and some have not: read all again, from a file that stays",
            )
        })
    }

    /// Compares the CRCs of storages, each once, on several threads.
    ///
    /// # Errors
    /// As [`Storage::check`](super::Storage::check).
    pub fn check_crcs(&self, storages: &[usize]) -> Result<()> {
        self.check_storages(&storages.iter().copied().collect(), false)
    }

    /// The open file in which a storage lies as it is, and its first byte there; `None` where it is in memory, packed, made,
    /// or of the other byte order.
    ///
    /// # Errors
    /// As [`Storage::locate`](super::Storage::locate).
    pub fn place_of(&self, storage: usize) -> Result<Option<(&File, u64)>> {
        let storage = self.storages.get(storage)?;
        let Some((source, start)) = storage.locate()?.filter(|_| !storage.is_swapped()) else { return Ok(None) };
        let (whole, before) = source::origin(source);
        Ok(whole.file().map(|file| (file, before + start)))
    }

    fn check_storages(&self, storages: &BTreeSet<usize>, read_all: bool) -> Result<()> {
        let numbers: Vec<usize> = storages.iter().copied().collect();
        let check = |number: usize, _: &parallel::Progressed<'_>| {
            let storage = self.storages.get(numbers[number])?;
            if read_all { storage.probe() } else { storage.check() }
        };
        parallel::run(numbers.len(), 0, &check, &mut |_, _| ()).map(drop).map_err(|error| error.in_file(self.path()))
    }
}

/// The tensor that a room takes: the key's own, or what a cast makes of it.
fn fit(derive: &mut Derive, info: &TensorInfo, room: &Room<'_>, cast: bool) -> Result<TensorInfo> {
    let castable = cast && can_cast(info.dtype, room.dtype);
    if info.shape != room.shape || (info.dtype != room.dtype && !castable) {
        let (found, wanted) = (describe(info.dtype, &info.shape), describe(room.dtype, &room.shape));
        return Err(Error::new(ErrorKind::Mismatch, format!("found {found}, wanted {wanted}")));
    }
    derive.storages.check_repeats(info)?;
    let info = derive.change(&Step::Cast { from: None, to: room.dtype }, info.clone())?;
    if info.nbytes() != room.bytes.len() as u64 {
        let what = format!("tensor of {} bytes, room for {}", info.nbytes(), room.bytes.len());
        return Err(Error::new(ErrorKind::Usage, what));
    }
    Ok(info)
}

/// The storages in files that a tensor is read from, through whatever it is made of.
fn collect(storages: &Storages, info: &TensorInfo, found: &mut BTreeSet<usize>) -> Result<()> {
    if let Some(making) = storages.get(info.storage)?.making() {
        return making.operands().iter().try_for_each(|of| collect(storages, of, found));
    }
    found.insert(info.storage);
    Ok(())
}

/// Cuts what can be read in ranges.
fn cut<'a>(storages: &Storages, info: TensorInfo, room: Room<'a>, pieces: &mut Vec<Piece<'a>>) -> Result<()> {
    let Room { key, strides, bytes, .. } = room;
    let storage = storages.get(info.storage)?;
    let (mut start, _) = info.window(storage.nbytes).map_err(|error| error.of_key(key))?;
    let in_ranges = storage.reads_in_pieces() && !storage.is_swapped();
    if !in_ranges || !same_layout(&info.shape, &info.strides, &strides) {
        pieces.push(Piece { key, info, part: Part::Whole(strides), out: bytes });
        return Ok(());
    }
    for out in bytes.chunks_mut(PIECE_NBYTES) {
        let nbytes = out.len() as u64;
        pieces.push(Piece { key, info: info.clone(), part: Part::From(start), out });
        start += nbytes;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KeyMap, OpenOptions};

    fn fixture(name: &str) -> Checkpoint {
        let path = format!("{}/../../fixtures/checkpoints/{name}", env!("CARGO_MANIFEST_DIR"));
        Checkpoint::open(path.as_ref(), &OpenOptions::default()).unwrap()
    }

    fn filled(checkpoint: &Checkpoint, keys: &[&str]) -> Result<Vec<Vec<u8>>> {
        let infos: Vec<_> = keys.iter().map(|key| checkpoint.get(key).unwrap().clone()).collect();
        let mut bytes: Vec<_> = infos.iter().map(|info| vec![7; usize::try_from(info.nbytes()).unwrap()]).collect();
        let rooms = keys.iter().zip(infos).zip(&mut bytes).map(|((key, info), bytes)| {
            let strides = crate::tensor::contiguous(&info.shape);
            Room { key, dtype: info.dtype, shape: info.shape, strides, bytes }
        });
        let rooms = rooms.collect();
        checkpoint.fill(rooms, false).map(|()| bytes)
    }

    #[test]
    fn rooms_get_what_reading_gives() {
        let checkpoint = fixture("fc.pt");
        let keys: Vec<&str> = checkpoint.keys().collect();
        for (key, bytes) in keys.iter().zip(filled(&checkpoint, &keys).unwrap()) {
            assert_eq!(bytes, checkpoint.read(key).unwrap(), "{key}");
        }
    }

    #[test]
    fn made_tensors_fill_rooms_too() {
        let checkpoint = fixture("fc.pt");
        let weight = checkpoint.tensors().find(|(_, info)| info.shape.len() == 2).unwrap().0;
        let rules = r#"{"rules": [{"match": "weight$", "permute": [1, 0]}, {"match": "weight$", "cast": "float16"}]}"#;
        let made = checkpoint.rekey(&KeyMap::from_json(rules).unwrap()).unwrap();
        assert_eq!(filled(&made, &[weight]).unwrap()[0], made.read(weight).unwrap());
    }

    #[test]
    fn another_shape_changes_no_room() {
        let checkpoint = fixture("fc.pt");
        let (key, info) = checkpoint.tensors().next().unwrap();
        let mut bytes = vec![7; usize::try_from(info.nbytes()).unwrap()];
        let (shape, strides) = (vec![info.numel(), 1], vec![1, 1]);
        let room = Room { key, dtype: info.dtype, shape, strides, bytes: &mut bytes };
        let error = checkpoint.fill(vec![room], true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(bytes.iter().all(|byte| *byte == 7));
    }
}
