//! Reading the stream of pickles that `torch.save` wrote before 1.6, and bare pickles.
//!
//! Magic number, protocol version, system info, the object, the sorted keys of its storages; then for each key the
//! number of elements as 64 bits and the elements, without padding. A bare pickle is the object alone.

use std::collections::HashMap;

use reweft_pickle::{Pickle, Value};

use super::globals::Globals;
use super::persistent::{names_storage, storage_id};
use super::rebuild::{Places, Saved};
use super::torch_zip::read_object;
use super::{Format, OpenOptions, Read};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{ReadAt, Source, check_range, read_vec};

/// The number that the first pickle of a legacy stream holds.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
/// More than that pickle takes in any protocol.
const MAGIC_NBYTES: u64 = 64;
/// The second pickle: the version of the stream.
const VERSION: i64 = 1001;
/// Bytes read first; the pickles of an ordinary file are smaller, and larger ones are read again whole.
const FIRST_NBYTES: u64 = 1 << 20;
/// Bytes of an element count.
const COUNT_NBYTES: u64 = 8;

/// Whether the first pickle of the source is the magic number. Reads 64 bytes.
pub(super) fn detect(source: &dyn ReadAt) -> bool {
    let head = read_vec(source, 0, MAGIC_NBYTES.min(source.len())).unwrap_or_default();
    Pickle::parse(&head, &reweft_pickle::Limits::default()).is_ok_and(
        |pickle| matches!(pickle.get(pickle.root()), Value::BigInt(number) if number.to_i128() == Some(MAGIC)),
    )
}

/// Whether the source begins like a pickle of protocol 2 or later. Reads 2 bytes.
pub(super) fn detect_pickle(source: &dyn ReadAt) -> bool {
    let mut head = [0; 2];
    source.read_exact_at(0, &mut head).is_ok() && head[0] == 0x80 && (2..=5).contains(&head[1])
}

/// Whether the whole source is a pickle of protocol 0 or 1, which has no signature: it must be one to its last byte,
/// and hold a container or an object. Reads the source if its first and last byte are those of such a pickle.
pub(super) fn detect_old_pickle(source: &dyn ReadAt, head: &[u8], options: &OpenOptions) -> bool {
    let nbytes = source.len();
    if !head.starts_with(b"(") && !head.starts_with(b"}") && !head.starts_with(b"]") && !head.starts_with(b"c")
        || nbytes > options.limits.max_metadata_nbytes
    {
        return false;
    }
    let mut last = [0];
    if source.read_exact_at(nbytes - 1, &mut last).is_err() || last != *b"." {
        return false;
    }
    let Ok(bytes) = read_vec(source, 0, nbytes) else { return false };
    let Ok(pickle) = Pickle::parse(&bytes, &options.limits.pickle) else { return false };
    let root = pickle.root();
    let holds = |pairs: usize| pairs > 0;
    pickle.nbytes() == bytes.len()
        && (pickle.as_sequence(root).is_some_and(|items| holds(items.len()))
            || pickle.dict(root).is_some_and(|pairs| holds(pairs.len()))
            || pickle.as_object(root).is_some())
}

pub(super) fn read(source: &Source, options: &OpenOptions) -> Result<Read> {
    visit(source, options, |saved| read_object(saved, options))
}

/// Hands over the stream's object.
pub(super) fn visit<R>(source: &Source, options: &OpenOptions, then: impl FnOnce(Saved<'_>) -> Result<R>) -> Result<R> {
    let bytes = read_pickles(&**source, &options.limits)?;
    let mut stream = Stream { bytes: &bytes, at: 0, limits: &options.limits };
    stream.next()?; // the magic number
    let version = stream.next()?;
    if version.as_i64(version.root()) != Some(VERSION) {
        let found = version.describe(version.root());
        return Err(Error::new(ErrorKind::Unsupported, format!("legacy stream of version {found}, not {VERSION}")));
    }
    // The system info: byte order and sizes of the machine that wrote it. Storages are little-endian on every machine.
    stream.next()?;
    let object = stream.next()?;
    let keys = stream.next()?;
    let places = find_storages(&**source, &object, &keys, stream.at as u64)?;
    let places = Places::File(source.clone(), places);
    let (pickle, bytes, origin) = (&object, bytes.as_slice(), Some((source.clone(), 0)));
    then(Saved { pickle, bytes, origin, places, big_endian: false, format: Format::TorchLegacy })
}

/// Reads a file that is one pickle, as `pickle.dump` writes it.
pub(super) fn read_pickle(source: &Source, options: &OpenOptions) -> Result<Read> {
    visit_pickle(source, options, |saved| read_object(saved, options))
}

/// Hands over the object of a file that is one pickle.
pub(super) fn visit_pickle<R>(
    source: &Source,
    options: &OpenOptions,
    then: impl FnOnce(Saved<'_>) -> Result<R>,
) -> Result<R> {
    let limit = options.limits.max_metadata_nbytes;
    if source.len() > limit {
        let what = format!("pickle of {} bytes; max_metadata_nbytes is {limit}", source.len());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let bytes = read_vec(&**source, 0, source.len())?;
    let pickle = Pickle::parse(&bytes, &options.limits.pickle)?;
    if pickle.nbytes() != bytes.len() {
        let left = bytes.len() - pickle.nbytes();
        return Err(Error::format(format!("{left} bytes stand behind the pickle")).at(pickle.nbytes() as u64));
    }
    let places = Places::File(source.clone(), HashMap::new());
    let (pickle, bytes, origin) = (&pickle, bytes.as_slice(), Some((source.clone(), 0)));
    then(Saved { pickle, bytes, origin, places, big_endian: false, format: Format::Pickle })
}

/// The front of the file with all five pickles in it: a first piece, or as much as the limit allows.
fn read_pickles(source: &dyn ReadAt, limits: &Limits) -> Result<Vec<u8>> {
    let mut nbytes = FIRST_NBYTES;
    loop {
        let bytes = read_vec(source, 0, nbytes.min(source.len()))?;
        let mut stream = Stream { bytes: &bytes, at: 0, limits };
        let mut pickles = (0..5).map(|_| stream.next().map(|_| ()));
        match pickles.find_map(Result::err) {
            None => return Ok(bytes),
            Some(error) if nbytes >= source.len() => return Err(error),
            Some(error) if nbytes >= limits.max_metadata_nbytes => {
                let limit = limits.max_metadata_nbytes;
                return Err(error.with_hint(format!("max_metadata_nbytes is {limit}")));
            }
            // The last pickle may have been cut; four times as much costs at most a third more in all.
            Some(_) => nbytes = nbytes.saturating_mul(4).min(limits.max_metadata_nbytes),
        }
    }
}

/// Pickles that follow each other.
struct Stream<'a> {
    bytes: &'a [u8],
    at: usize,
    limits: &'a Limits,
}

impl<'a> Stream<'a> {
    fn next(&mut self) -> Result<Pickle<'a>> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let base = self.at as u64;
        let pickle = Pickle::parse(rest, &self.limits.pickle).map_err(|error| error.offset_by(base))?;
        self.at += pickle.nbytes();
        Ok(pickle)
    }
}

/// First byte and number of elements of every storage, by key.
fn find_storages(
    source: &dyn ReadAt,
    object: &Pickle<'_>,
    keys: &Pickle<'_>,
    start: u64,
) -> Result<HashMap<String, (u64, u64)>> {
    let globals = Globals::new(object);
    let mut dtypes: HashMap<&str, Option<Dtype>> = HashMap::new();
    for (_, value) in object.nodes() {
        if let Value::Persistent(pid) = value
            && names_storage(object, *pid)
        {
            let id = storage_id(object, &globals, *pid)?;
            dtypes.insert(id.key, id.dtype);
        }
    }
    let listed = keys.as_sequence(keys.root()).ok_or_else(|| Error::format("the list of storage keys is no list"))?;
    let mut places = HashMap::with_capacity(listed.len());
    let mut at = start;
    for key in listed {
        let key = keys.as_str(*key).ok_or_else(|| Error::format("a storage key is no text"))?;
        let dtype = dtypes
            .get(key)
            .ok_or_else(|| Error::format(format!("storage {key:?} is in the file, but no tensor uses it")))?;
        let mut count = [0; 8];
        source.read_exact_at(at, &mut count)?;
        let numel = u64::from_le_bytes(count);
        let itemsize = dtype.and_then(Dtype::itemsize).unwrap_or(1);
        let first = at + COUNT_NBYTES;
        let nbytes = numel.checked_mul(itemsize).ok_or_else(|| Error::format("storage takes 2^64 bytes").at(at))?;
        at = check_range(source.len(), first, nbytes)?;
        if places.insert(key.to_owned(), (first, numel)).is_some() {
            return Err(Error::format(format!("storage {key:?} is listed twice")));
        }
    }
    match source.len().checked_sub(at) {
        Some(0) => Ok(places),
        left => Err(Error::format(format!("{} bytes stand behind the last storage", left.unwrap_or(0))).at(at)),
    }
}
