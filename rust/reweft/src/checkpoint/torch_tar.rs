//! Reading the tar archive that `torch.save` wrote up to 0.1.10, in 2016: three members, `storages`, `tensors` and
//! `pickle`.
//!
//! `storages` holds every storage behind a pickle that names it, then a list of views on them. `tensors` holds a row of
//! numbers for every tensor. `pickle` is the object; its persistent ids are the numbers that the other two give.
//! Source: `legacy_load` in `torch/serialization.py` of 2.15, which still reads these files. They state no byte order
//! and are little-endian.

use std::collections::HashMap;
use std::ops::Range;

use indexmap::IndexMap;
use reweft_pickle::{NodeId, Pickle, Value};

use super::persistent::View;
use super::rebuild::{Places, Saved};
use super::storage::Extent;
use super::torch_zip::read_object;
use super::{Format, Item, OpenOptions, Read, Storage};
use crate::container::tar;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{ReadAt, Source, Window, check_range, read_vec};
use crate::tensor::MAX_DIMS;

/// Bytes read first for a pickle between other data; those of storages and tensors are shorter.
const FIRST_NBYTES: u64 = 256;

/// What the numbers in the pickle of such a file mean.
#[derive(Default)]
pub(super) struct Numbers {
    storages: Vec<Storage>,
    by_key: HashMap<i64, Object>,
}

/// A storage or a tensor by its number.
#[derive(Clone)]
pub(super) enum Object {
    Storage(View),
    Tensor(Item),
}

impl Numbers {
    /// What a persistent id means; `None` for a class, which stands in a tuple.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a number that the file does not define.
    pub fn object(&self, pickle: &Pickle<'_>, pid: NodeId) -> Result<Option<&Object>> {
        let text = || pickle.as_str(pid)?.parse().ok();
        let Some(key) = pickle.as_i64(pid).or_else(text) else {
            if pickle.as_tuple(pid).is_some() {
                return Ok(None);
            }
            return Err(Error::format(format!("persistent id is {}, wanted a number", pickle.describe(pid))));
        };
        let object = self.by_key.get(&key);
        object.map(Some).ok_or_else(|| Error::format(format!("the file has no storage or tensor {key}")))
    }

    /// Hands over the storages.
    pub fn take_storages(&mut self) -> Vec<Storage> {
        std::mem::take(&mut self.storages)
    }

    fn define(&mut self, key: i64, object: Object) -> Result<()> {
        match self.by_key.insert(key, object) {
            None => Ok(()),
            Some(_) => Err(Error::format(format!("the number {key} is given to two objects"))),
        }
    }

    fn view(&self, key: i64) -> Result<View> {
        match self.by_key.get(&key) {
            Some(Object::Storage(view)) => Ok(*view),
            _ => Err(Error::format(format!("the file has no storage {key}"))),
        }
    }

    /// Reads `storages`; `start` is where the member begins in `source`.
    fn read_storages(&mut self, member: &mut Stream<'_>, source: &Source, start: u64) -> Result<()> {
        for _ in 0..member.count()? {
            let (key, device, dtype) = member.pickle(storage_row)?;
            let numel = member.size("storage size")?;
            let nbytes = dtype.nbytes(numel).ok_or_else(|| Error::format("storage takes 2^64 bytes"))?;
            let byte_offset = start + member.skip(nbytes)?;
            let name = key.to_string();
            let extent = Extent { dtype: Some(dtype), nbytes, device: device.into() };
            let storage = Storage::range(source.clone(), byte_offset, &name, extent);
            self.storages.push(storage);
            let view = View { storage: self.storages.len() - 1, byte_offset: 0, nbytes };
            self.define(key, Object::Storage(view))?;
        }
        for [key, root, first, numel] in member.pickle(view_rows)? {
            let root = self.view(root)?;
            let dtype = self.storages.get(root.storage).and_then(|storage| storage.dtype);
            let nbytes = |numel: i64| dtype?.nbytes(u64::try_from(numel).ok()?);
            let window = nbytes(first).zip(nbytes(numel));
            let window = window.filter(|(at, nbytes)| at.checked_add(*nbytes).is_some_and(|end| end <= root.nbytes));
            let Some((at, nbytes)) = window else {
                let what = format!("view {key} of {numel} elements at {first} is larger than its storage");
                return Err(Error::format(what));
            };
            let view = View { storage: root.storage, byte_offset: root.byte_offset + at, nbytes };
            self.define(key, Object::Storage(view))?;
        }
        member.finish()
    }

    /// Reads `tensors`.
    fn read_tensors(&mut self, member: &mut Stream<'_>) -> Result<()> {
        for _ in 0..member.count()? {
            let (key, storage, class) = member.pickle(tensor_row)?;
            let dims = i32::from_le_bytes(member.bytes()?);
            // Written as 64 bits once and as 32 later; only the first half counts.
            member.bytes::<4>()?;
            let dims = usize::try_from(dims).ok().filter(|dims| *dims <= MAX_DIMS);
            let dims = dims.ok_or_else(|| Error::format(format!("tensor {key} has no number of dimensions")))?;
            let shape = member.sizes(dims, "size")?;
            let strides = member.sizes(dims, "stride")?;
            let storage_offset = member.size("storage offset")?;
            let view = self.view(storage)?;
            let dtype = self.storages.get(view.storage).and_then(|storage| storage.dtype);
            if dtype.is_none() || dtype != class {
                return Err(Error::format(format!("tensor {key} is of another type than its storage {storage}")));
            }
            let Some(dtype) = dtype else { continue };
            let item = tensor(dtype, shape, strides, storage_offset, view)
                .map_err(|error| error.with_hint(format!("this is the tensor with the number {key}")))?;
            self.define(key, Object::Tensor(item))?;
        }
        member.finish()
    }
}

fn tensor(dtype: Dtype, shape: Vec<u64>, strides: Vec<u64>, storage_offset: u64, view: View) -> Result<Item> {
    if shape.is_empty() && view.nbytes == 0 {
        let why = "it has neither dimensions nor elements, which is how torch of 2016 states an empty tensor";
        return Ok(Item::Unreadable(why.to_owned()));
    }
    view.tensor(dtype, shape, strides, storage_offset).map(Item::Tensor)
}

/// The members that torch wrote.
const MEMBERS: [&str; 3] = ["storages", "tensors", "pickle"];

pub(super) fn read(source: &Source, options: &OpenOptions) -> Result<Read> {
    let members = tar::members(&**source)?;
    let mut read = visit(source, &members, options, |saved| read_object(saved, options))?;
    let others = members.keys().filter(|name| !MEMBERS.contains(&name.as_str()));
    read.contents.notices.extend(others.map(|name| format!("member {name:?} of the tar archive is not read")));
    Ok(read)
}

/// Hands over the archive's object.
pub(super) fn visit<R>(
    source: &Source,
    members: &IndexMap<String, Range<u64>>,
    options: &OpenOptions,
    then: impl FnOnce(Saved<'_>) -> Result<R>,
) -> Result<R> {
    let [storages, tensors, object] = MEMBERS.map(|name| find(members, name));
    let (storages, tensors, object) = (storages?, tensors?, object?);
    let window = |range: &Range<u64>| Window::new(source.clone(), range.start, range.end - range.start);
    let limits = &options.limits;
    let mut numbers = Numbers::default();
    let mut member = Stream { member: &window(storages)?, at: 0, limits };
    numbers.read_storages(&mut member, source, storages.start).map_err(|error| error.in_record(MEMBERS[0]))?;
    let mut member = Stream { member: &window(tensors)?, at: 0, limits };
    numbers.read_tensors(&mut member).map_err(|error| error.in_record(MEMBERS[1]))?;
    let in_pickle = |error: Error| error.in_record(MEMBERS[2]);
    let bytes = read_metadata(&window(object)?, limits).map_err(in_pickle)?;
    let pickle = Pickle::parse(&bytes, &limits.pickle).map_err(|error| in_pickle(error.into()))?;
    if pickle.nbytes() != bytes.len() {
        let left = bytes.len() - pickle.nbytes();
        let error = Error::format(format!("{left} bytes stand behind the pickle"));
        return Err(in_pickle(error.at(pickle.nbytes() as u64)));
    }
    let (origin, places) = (Some((source.clone(), object.start)), Places::Tar(numbers));
    let (pickle, bytes, format) = (&pickle, bytes.as_slice(), Format::TorchTar);
    then(Saved { pickle, bytes, origin, places, big_endian: false, format }).map_err(in_pickle)
}

fn find<'m>(members: &'m IndexMap<String, Range<u64>>, name: &str) -> Result<&'m Range<u64>> {
    members.get(name).ok_or_else(|| {
        let listed: Vec<&str> = members.keys().map(String::as_str).take(20).collect();
        let what = format!("this tar archive has no member {name:?}, so torch did not write it");
        let error = Error::new(ErrorKind::Unsupported, what);
        error.with_hint(format!("it has {}; unpack it first", listed.join(", ")))
    })
}

fn read_metadata(member: &Window, limits: &Limits) -> Result<Vec<u8>> {
    let (nbytes, limit) = (member.len(), limits.max_metadata_nbytes);
    if nbytes > limit {
        let what = format!("pickle of {nbytes} bytes; max_metadata_nbytes is {limit}");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    read_vec(member, 0, nbytes)
}

/// Pickles and numbers that follow each other in a member.
struct Stream<'a> {
    member: &'a Window,
    at: u64,
    limits: &'a Limits,
}

impl Stream<'_> {
    /// Reads the pickle that stands here. Reads at most a few times its bytes.
    fn pickle<T>(&mut self, read: impl FnOnce(&Pickle<'_>) -> Result<T>) -> Result<T> {
        let (start, left) = (self.at, self.member.len() - self.at);
        let limit = self.limits.max_metadata_nbytes;
        let mut nbytes = FIRST_NBYTES;
        loop {
            let bytes = read_vec(self.member, start, nbytes.min(left))?;
            match Pickle::parse(&bytes, &self.limits.pickle) {
                Ok(pickle) => {
                    self.at += pickle.nbytes() as u64;
                    return read(&pickle).map_err(|error| error.at(start));
                }
                // What is cut short may only have been read too short.
                Err(error) if is_cut(&error) && nbytes < left.min(limit) => {
                    nbytes = nbytes.saturating_mul(4).min(limit);
                }
                Err(error) => return Err(error.offset_by(start).into()),
            }
        }
    }

    /// The pickled number of entries that follow. Nothing is allocated by it.
    fn count(&mut self) -> Result<u64> {
        self.pickle(|pickle| {
            let count = pickle.as_i64(pickle.root()).and_then(|count| u64::try_from(count).ok());
            let found = || pickle.describe(pickle.root());
            count.ok_or_else(|| Error::format(format!("number of entries is {}, wanted a number from 0", found())))
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.member.read_exact_at(self.at, &mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn size(&mut self, what: &str) -> Result<u64> {
        let at = self.at;
        let value = i64::from_le_bytes(self.bytes()?);
        u64::try_from(value).map_err(|_| Error::format(format!("{what} is {value}, wanted a number from 0")).at(at))
    }

    fn sizes(&mut self, dims: usize, what: &str) -> Result<Vec<u64>> {
        (0..dims).map(|_| self.size(what)).collect()
    }

    /// Steps over bytes and says where they began.
    fn skip(&mut self, nbytes: u64) -> Result<u64> {
        let at = self.at;
        self.at = check_range(self.member.len(), at, nbytes)?;
        Ok(at)
    }

    fn finish(&self) -> Result<()> {
        match self.member.len() - self.at {
            0 => Ok(()),
            left => Err(Error::format(format!("{left} bytes stand behind the last entry")).at(self.at)),
        }
    }
}

fn is_cut(error: &reweft_pickle::Error) -> bool {
    matches!(error.kind(), reweft_pickle::ErrorKind::Truncated | reweft_pickle::ErrorKind::Frame)
}

/// `(key, location, storage class)`.
fn storage_row(pickle: &Pickle<'_>) -> Result<(i64, String, Dtype)> {
    let Some([key, device, class]) = pickle.as_tuple(pickle.root()) else {
        return Err(Error::format("storage is described by no tuple of 3"));
    };
    let (Some(key), Some(device)) = (pickle.as_i64(*key), pickle.as_str(*device)) else {
        return Err(Error::format("key of a storage is no number, or its location no text"));
    };
    let dtype = pickle.as_global(*class).and_then(|(_, name)| Dtype::from_storage_class(name));
    let unknown = || {
        let what = format!("storage class {} is not known", pickle.describe(*class));
        Error::new(ErrorKind::Unsupported, what)
    };
    Ok((key, device.to_owned(), dtype.ok_or_else(unknown)?))
}

/// A list of `(key, key of the whole, first element, elements)`.
fn view_rows(pickle: &Pickle<'_>) -> Result<Vec<[i64; 4]>> {
    let row = |id: &NodeId| match pickle.as_tuple(*id) {
        Some([key, root, first, numel]) => {
            let number = |id: &NodeId| pickle.as_i64(*id);
            Some([number(key)?, number(root)?, number(first)?, number(numel)?])
        }
        _ => None,
    };
    let rows = pickle.as_sequence(pickle.root()).and_then(|rows| rows.iter().map(row).collect());
    rows.ok_or_else(|| Error::format("the views on storages are no list of tuples of 4 numbers"))
}

/// `(key, storage key, tensor class)`; the type is that of the class.
fn tensor_row(pickle: &Pickle<'_>) -> Result<(i64, i64, Option<Dtype>)> {
    let Some([key, storage, class]) = pickle.as_tuple(pickle.root()) else {
        return Err(Error::format("tensor is described by no tuple of 3"));
    };
    let (Some(key), Some(storage)) = (pickle.as_i64(*key), pickle.as_i64(*storage)) else {
        return Err(Error::format("key of a tensor or of its storage is no number"));
    };
    let class = match pickle.get(*class) {
        Value::Global { .. } => pickle.as_global(*class).and_then(|(_, name)| name.strip_suffix("Tensor")),
        _ => None,
    };
    Ok((key, storage, class.and_then(|name| Dtype::from_storage_class(&format!("{name}Storage")))))
}
