//! Why an archive cannot be opened that was cut short, as an interrupted download is: by how much, at least.
//!
//! The directory of a zip archive stands at its end, but `data.pkl` is the first record that torch writes, and says how
//! long every storage is.

use std::collections::HashMap;

use reweft_pickle::{Pickle, Value};

use super::globals::Globals;
use super::persistent::{StorageId, names_storage, storage_id};
use crate::container::zip::{CutRecord, find_record, has_end};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::limits::Limits;
use crate::source::{ReadAt, read_vec};

/// Bytes of a record's two headers beside its name, which stands in both.
const HEADERS_NBYTES: u64 = 30 + 46;
/// Bytes of the end record.
const END_NBYTES: u64 = 22;
/// Bytes of the pickle that are read first.
const FIRST_NBYTES: u64 = 1 << 16;
/// What to do about it.
const HINT: &str = "copy or download the file again";

/// Says how much is missing, if that is what is wrong; `error` is what was found otherwise.
pub(super) fn explain(source: &dyn ReadAt, limits: &Limits, error: Error) -> Error {
    if has_end(source) {
        return error;
    }
    let Some(record) = find_record(source, "/data.pkl") else { return error };
    let len = source.len();
    match least_nbytes(source, limits, &record) {
        Some(Least::Bytes(least)) if least > len => {
            let missing = least - len;
            let what = format!("the file is truncated: it has {len} bytes, its tensors need {least}");
            Error::format(format!("{what}, so at least {missing} are missing")).with_hint(HINT)
        }
        Some(Least::InThePickle) => {
            let what = format!("the file is truncated within its first record, after {len} bytes");
            Error::format(format!("{what}; how many are missing cannot be told")).in_record(record.name).with_hint(HINT)
        }
        _ => error,
    }
}

/// What the first record says of the whole.
enum Least {
    /// The file has at least so many bytes.
    Bytes(u64),
    /// Nothing: the file ends in the record.
    InThePickle,
}

/// `None` for a pickle that cannot be read.
fn least_nbytes(source: &dyn ReadAt, limits: &Limits, record: &CutRecord) -> Option<Least> {
    let left = source.len().saturating_sub(record.start);
    let limit = left.min(limits.max_metadata_nbytes);
    let mut nbytes = FIRST_NBYTES;
    loop {
        let bytes = read_vec(source, record.start, nbytes.min(limit)).ok()?;
        match Pickle::parse(&bytes, &limits.pickle) {
            Ok(pickle) => return Some(Least::Bytes(needed(&pickle, record))),
            Err(error) if error.kind() == reweft_pickle::ErrorKind::Truncated => {
                if nbytes >= limit {
                    return (limit == left).then_some(Least::InThePickle);
                }
                nbytes = nbytes.saturating_mul(4);
            }
            Err(_) => return None,
        }
    }
}

/// The pickle, the storages that it names, and the headers of their records.
fn needed(pickle: &Pickle<'_>, record: &CutRecord) -> u64 {
    let globals = Globals::new(pickle);
    let folder_nbytes = record.name.len() as u64 - "data.pkl".len() as u64 + "data/".len() as u64;
    let mut storages: HashMap<&str, u64> = HashMap::new();
    for (_, value) in pickle.nodes() {
        if let Value::Persistent(pid) = value
            && names_storage(pickle, *pid)
            && let Ok(StorageId { key, dtype, device, numel, .. }) = storage_id(pickle, &globals, *pid)
            && device != "meta"
        {
            storages.insert(key, numel.saturating_mul(dtype.and_then(Dtype::itemsize).unwrap_or(1)));
        }
    }
    let records = storages.iter().map(|(key, nbytes)| {
        let name_nbytes = folder_nbytes + key.len() as u64;
        nbytes.saturating_add(HEADERS_NBYTES + 2 * name_nbytes)
    });
    let own = record.start + pickle.nbytes() as u64 + 46 + record.name.len() as u64 + END_NBYTES;
    records.fold(own, u64::saturating_add)
}
