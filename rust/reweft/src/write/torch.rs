//! Writing `.pt`: the zip archive that `torch.save` writes, of a dict from keys to tensors.
//!
//! For a dict of plain tensors the file is torch's, byte for byte, but for the 40 digits that name it, which torch
//! makes by a hash of its own. So whatever reads torch's files reads these.
//!
//! Each storage becomes one record, which all its tensors share, as far as they show it: bytes before the first and
//! behind the last that any tensor shows are left out, and a notice says so.

use std::path::Path;

use indexmap::IndexMap;
use reweft_pickle::{Memoized, Writer};

use super::transfer::{Piece, Transfers};
use super::{AtomicFile, ConvertOptions, Progress};
use crate::checkpoint::Checkpoint;
use crate::container::zip::{NewRecord, tail};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// Folder of all records. torch takes the file's name; this way the bytes do not depend on it.
const ROOT: &str = "archive";
/// Pairs that Python's pickler puts into a dict at a time.
const BATCH: usize = 1000;
/// Digits of the record that names the content.
const ID_DIGITS: u64 = 40;

/// Writes tensors as one `.pt` file. Gives notices.
pub(super) fn write(
    checkpoint: &Checkpoint,
    tensors: &[(&str, &TensorInfo)],
    out: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Vec<String>> {
    let storages = Held::of(checkpoint, tensors)?;
    let pickle = Pickler::new(&storages).dict(tensors)?;
    let records = Records::place(&pickle, &storages)?;
    let pieces = storages.values().zip(&records.storages).map(|(held, record)| Piece {
        key: held.key,
        info: &held.bytes,
        at: record.payload_offset(),
        record: Some(record),
    });
    let pieces: Vec<_> = pieces.collect();
    let file = AtomicFile::create(out)?;
    let crcs = Transfers::run_all(checkpoint, &pieces, &file, progress)?;
    records.finish(&file, &crcs)?;
    file.commit_if(options.sync)?;
    notices(checkpoint, &storages)
}

/// A storage of the checkpoint and what the file holds of it.
struct Held<'a> {
    /// Number in the checkpoint.
    storage: usize,
    /// The first tensor on it, for messages.
    key: &'a str,
    /// The bytes that go into the file, as a tensor of one dimension.
    bytes: TensorInfo,
    /// The type that the file states for the storage; `None` for bytes without one.
    class: Option<&'static str>,
    /// Bytes that are shown by no tensor.
    left_out: u64,
}

impl<'a> Held<'a> {
    /// The storages in the order in which tensors name them, by number.
    fn of(checkpoint: &Checkpoint, tensors: &[(&'a str, &TensorInfo)]) -> Result<IndexMap<usize, Self>> {
        let mut shown: IndexMap<usize, Shown<'_>> = IndexMap::new();
        for (key, info) in tensors {
            let fails = |error: Error| error.of_key(*key).in_file(checkpoint.path());
            let storage = checkpoint.storage_of(info).map_err(fails)?;
            check_dtype(info.dtype).map_err(fails)?;
            let (start, nbytes) = info.window(storage.nbytes).map_err(fails)?;
            let shown = shown.entry(info.storage).or_insert(Shown { key, dtypes: Vec::new(), bytes: None });
            if !shown.dtypes.contains(&info.dtype) {
                shown.dtypes.push(info.dtype);
            }
            if nbytes > 0 {
                let (first, end) = shown.bytes.unwrap_or((start, start));
                shown.bytes = Some((first.min(start), end.max(start + nbytes)));
            }
        }
        let held = shown.into_iter().map(|(number, shown)| {
            let key = shown.key;
            let held = shown.hold(checkpoint, number).map_err(|error| error.of_key(key).in_file(checkpoint.path()));
            Ok((number, held?))
        });
        held.collect()
    }

    /// Elements, or bytes where the storage has no type.
    fn numel(&self) -> u64 {
        if self.class.is_some() { self.bytes.numel() } else { self.bytes.nbytes() }
    }
}

/// What tensors show of one storage.
struct Shown<'a> {
    key: &'a str,
    dtypes: Vec<Dtype>,
    /// From the first byte to the end of the last.
    bytes: Option<(u64, u64)>,
}

impl<'a> Shown<'a> {
    fn hold(self, checkpoint: &Checkpoint, number: usize) -> Result<Held<'a>> {
        let storage = checkpoint.storages().get(number)?;
        let itemsize = |dtype: &Dtype| dtype.itemsize().unwrap_or(1);
        // Every window starts at a multiple of its own itemsize, and sizes are powers of two.
        let largest = self.dtypes.iter().map(itemsize).max().unwrap_or(1);
        let dtype = self.dtypes.iter().copied().min_by_key(itemsize).unwrap_or(Dtype::U8);
        if storage.is_swapped() && self.dtypes.iter().any(|other| other.swap_unit() != dtype.swap_unit()) {
            let what = format!("tensors of {dtype} and others show the same bytes, which are of the other byte order");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let (start, end) = self.bytes.unwrap_or((0, 0));
        let start = start / largest * largest;
        let (first, numel) = (start / itemsize(&dtype), (end - start) / itemsize(&dtype));
        let bytes = TensorInfo { dtype, shape: vec![numel], strides: vec![1], storage: number, storage_offset: first };
        // A type can be stated if there is one, and torch has a class for it.
        let class = if self.dtypes.len() == 1 { dtype.storage_class() } else { None };
        Ok(Held { storage: number, key: self.key, bytes, class, left_out: storage.nbytes - (end - start) })
    }
}

/// Refuses what torch cannot load.
fn check_dtype(dtype: Dtype) -> Result<()> {
    if dtype.c10().is_some() && !dtype.is_quantised() {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Unsupported, format!("a .pt file cannot hold plain tensors of {dtype}"));
    Err(error.with_hint("leave the key out with --select"))
}

/// Writes the pickle in the order of Python's pickler, so that every value has the number in the memo that it has there.
struct Pickler<'a> {
    storages: &'a IndexMap<usize, Held<'a>>,
    writer: Writer,
    globals: IndexMap<(&'static str, &'static str), Memoized>,
    texts: IndexMap<&'static str, Memoized>,
    /// The texts that name storages.
    numbers: IndexMap<usize, Memoized>,
}

impl<'a> Pickler<'a> {
    fn new(storages: &'a IndexMap<usize, Held<'a>>) -> Self {
        let (globals, texts, numbers) = (IndexMap::new(), IndexMap::new(), IndexMap::new());
        Self { storages, writer: Writer::new(), globals, texts, numbers }
    }

    fn dict(mut self, tensors: &[(&str, &TensorInfo)]) -> Result<Vec<u8>> {
        self.writer.empty_dict();
        self.writer.put();
        if let [(key, info)] = tensors {
            self.pair(key, info)?;
            self.writer.set_item();
            return Ok(self.writer.finish());
        }
        for batch in tensors.chunks(BATCH) {
            self.writer.mark();
            batch.iter().try_for_each(|(key, info)| self.pair(key, info))?;
            self.writer.set_items();
        }
        if !tensors.is_empty() && tensors.len().is_multiple_of(BATCH) {
            // Python's pickler learns that there are no more when it has begun another batch.
            self.writer.mark();
            self.writer.set_items();
        }
        Ok(self.writer.finish())
    }

    fn pair(&mut self, key: &str, info: &TensorInfo) -> Result<()> {
        self.writer.text(key).map_err(|error| Error::from(error).of_key(key))?;
        self.writer.put();
        self.tensor(info)
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, or v3 with the dtype behind it.
    fn tensor(&mut self, info: &TensorInfo) -> Result<()> {
        let held = self.storages.get(&info.storage).ok_or_else(|| Error::format("storage is not held"))?;
        let typed = held.class.is_some();
        self.global("torch._utils", if typed { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" })?;
        self.writer.mark();
        self.storage(held)?;
        // Elements before the record; their size divides what the record leaves out.
        let left_out = held.bytes.storage_offset * held.bytes.dtype.itemsize().unwrap_or(1);
        self.writer.int(info.storage_offset.saturating_sub(left_out / info.dtype.itemsize().unwrap_or(1)));
        self.sizes(&info.shape);
        self.sizes(&info.strides);
        self.writer.bool(false);
        self.global("collections", "OrderedDict")?;
        self.writer.empty_tuple();
        self.writer.reduce();
        self.writer.put();
        if !typed {
            self.global("torch", info.dtype.name())?;
        }
        self.writer.tuple(7);
        self.writer.put();
        self.writer.reduce();
        self.writer.put();
        Ok(())
    }

    /// `("storage", class, number, location, numel)` as a persistent id.
    fn storage(&mut self, held: &Held<'_>) -> Result<()> {
        self.writer.mark();
        self.text("storage")?;
        match held.class {
            Some(class) => self.global("torch", class)?,
            None => self.global("torch.storage", "UntypedStorage")?,
        }
        if let Some(memoized) = self.numbers.get(&held.storage) {
            self.writer.get(*memoized);
        } else {
            self.writer.text(&self.numbers.len().to_string())?;
            self.numbers.insert(held.storage, self.writer.put());
        }
        self.text("cpu")?;
        self.writer.int(held.numel());
        self.writer.tuple(5);
        self.writer.put();
        self.writer.persistent();
        Ok(())
    }

    fn sizes(&mut self, sizes: &[u64]) {
        if sizes.is_empty() {
            return self.writer.empty_tuple();
        }
        if sizes.len() > 3 {
            self.writer.mark();
        }
        for size in sizes {
            self.writer.int(*size);
        }
        self.writer.tuple(sizes.len());
        self.writer.put();
    }

    fn global(&mut self, module: &'static str, name: &'static str) -> Result<()> {
        if let Some(memoized) = self.globals.get(&(module, name)) {
            self.writer.get(*memoized);
        } else {
            self.writer.global(module, name)?;
            self.globals.insert((module, name), self.writer.put());
        }
        Ok(())
    }

    fn text(&mut self, text: &'static str) -> Result<()> {
        if let Some(memoized) = self.texts.get(text) {
            self.writer.get(*memoized);
        } else {
            self.writer.text(text)?;
            self.texts.insert(text, self.writer.put());
        }
        Ok(())
    }
}

/// All records of the file, in the order of their offsets.
struct Records<'a> {
    /// Records before the storages, with their bytes.
    before: Vec<(NewRecord, &'a [u8])>,
    storages: Vec<NewRecord>,
    version: NewRecord,
    id: NewRecord,
}

impl<'a> Records<'a> {
    fn place(pickle: &'a [u8], storages: &IndexMap<usize, Held<'_>>) -> Result<Self> {
        let mut end = 0;
        let mut place = |name: &str, nbytes: u64| {
            let record = NewRecord::new(format!("{ROOT}/{name}"), nbytes, end)?;
            end = record.end();
            Ok(record)
        };
        let before: [(&str, &[u8]); 4] =
            [("data.pkl", pickle), (".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")];
        let before = before.into_iter().map(|(name, bytes)| Ok((place(name, bytes.len() as u64)?, bytes)));
        let before = before.collect::<Result<_>>()?;
        let numbered = storages.values().enumerate();
        let storages = numbered.map(|(number, held)| place(&format!("data/{number}"), held.bytes.nbytes()));
        let storages = storages.collect::<Result<_>>()?;
        let version = place("version", VERSION.len() as u64)?;
        Ok(Self { before, storages, version, id: place(".data/serialization_id", ID_DIGITS)? })
    }

    /// Writes all that is no storage; `crcs` are those of the storages.
    fn finish(self, file: &AtomicFile, crcs: &[u32]) -> Result<()> {
        let mut listed: Vec<(NewRecord, u32)> = Vec::with_capacity(self.storages.len() + 6);
        let write = |listed: &mut Vec<_>, record: NewRecord, bytes: &[u8]| {
            let crc = crc32fast::hash(bytes);
            let whole = [&record.header(), bytes, &record.descriptor(crc)].concat();
            file.write_at(&whole, record.header_offset())?;
            listed.push((record, crc));
            Ok::<_, Error>(())
        };
        for (record, bytes) in self.before {
            write(&mut listed, record, bytes)?;
        }
        listed.extend(self.storages.into_iter().zip(crcs.iter().copied()));
        write(&mut listed, self.version, VERSION)?;
        let id = content_id(&listed);
        let end = self.id.end();
        write(&mut listed, self.id, id.as_bytes())?;
        file.write_at(&tail(&listed, end), end)
    }
}

/// The version of the format that has nothing newer than storages in it.
const VERSION: &[u8] = b"3\n";

/// Digits that two files share if they have the same records: 20 of the names, 20 of the CRCs.
fn content_id(records: &[(NewRecord, u32)]) -> String {
    let (mut names, mut crcs) = (blake3::Hasher::new(), blake3::Hasher::new());
    for (record, crc) in records {
        names.update(record.name().as_bytes()).update(b"\n");
        crcs.update(&crc.to_le_bytes());
    }
    let number = |hasher: &blake3::Hasher| {
        let bytes = hasher.finalize();
        bytes.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    format!("{:020}{:020}", number(&names), number(&crcs))
}

/// What the file does not say that the checkpoint does.
fn notices(checkpoint: &Checkpoint, storages: &IndexMap<usize, Held<'_>>) -> Result<Vec<String>> {
    let mut notices = Vec::new();
    let trimmed: Vec<_> = storages.values().filter(|held| held.left_out > 0).collect();
    if let Some(first) = trimmed.first() {
        let nbytes: u64 = trimmed.iter().map(|held| held.left_out).sum();
        let others = if trimmed.len() > 1 { format!(" and {} others", trimmed.len() - 1) } else { String::new() };
        notices
            .push(format!("{nbytes} bytes that no tensor shows were left out of the storage of {}{others}", first.key));
    }
    let mut devices = Vec::new();
    for held in storages.values() {
        let device = &*checkpoint.storages().get(held.storage)?.device;
        if device != "cpu" && !devices.contains(&device) {
            devices.push(device);
        }
    }
    if !devices.is_empty() {
        notices.push(format!("tensors that were saved on {} load on the CPU", devices.join(", ")));
    }
    Ok(notices)
}
