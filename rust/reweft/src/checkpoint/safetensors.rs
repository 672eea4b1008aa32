//! Reading safetensors: an 8-byte header length, a JSON header, the tensors without holes.
//!
//! Source: the format's README and its checks, read strictly where readers differ (duplicate keys, white space before
//! the header, bytes behind the last tensor).

use std::fmt;
use std::sync::Arc;

use foldhash::quality::RandomState;
use indexmap::IndexMap;
use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};

use super::json::{Object, Unique};
use super::storage::Extent;
use super::{Contents, Format, Item, Items, OpenOptions, Read, Storage};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, Source, read_vec};
use crate::tensor::{MAX_DIMS, TensorInfo, contiguous, numel};

/// Bytes that state the length of the header.
const LENGTH_NBYTES: u64 = 8;

/// Whether the source begins with a header length and a `{`. Reads 9 bytes.
pub(super) fn detect(source: &dyn ReadAt) -> bool {
    let mut head = [0; 9];
    source.read_exact_at(0, &mut head).is_ok() && head[8] == b'{'
}

pub(super) fn read(source: &Source, options: &OpenOptions) -> Result<Read> {
    if let Some(key) = &options.top_level_key {
        return Err(Error::new(ErrorKind::NotFound, "safetensors has no containers, so no top-level key")
            .of_key(key)
            .with_hint("use a key map to strip a prefix"));
    }
    let mut length = [0; 8];
    source.read_exact_at(0, &mut length)?;
    let header_nbytes = u64::from_le_bytes(length);
    if header_nbytes > options.limits.max_header_nbytes {
        let limit = options.limits.max_header_nbytes;
        return Err(Error::new(
            ErrorKind::Limit,
            format!("header of {header_nbytes} bytes; max_header_nbytes is {limit}"),
        ));
    }
    let json = read_vec(&**source, LENGTH_NBYTES, header_nbytes)?;
    let header: Header =
        serde_json::from_slice(&json).map_err(|error| Error::format(format!("header: {error}")).at(LENGTH_NBYTES))?;
    let data_start = LENGTH_NBYTES + header_nbytes;
    check_holes(&header, source.len() - data_start)?;
    let mut items = Items::with_capacity_and_hasher(header.tensors.len(), RandomState::default());
    let device: Arc<str> = "cpu".into();
    let mut storages = Vec::with_capacity(header.tensors.len());
    for (key, row) in header.tensors {
        let (info, nbytes) = check_row(&row, storages.len()).map_err(|error| error.of_key(&key))?;
        let extent = Extent { dtype: Some(info.dtype), nbytes, device: Arc::clone(&device) };
        storages.push(Storage::range(source.clone(), data_start + row.data_offsets.0, "", extent));
        items.insert(key, Item::Tensor(info));
    }
    let contents = Contents { metadata: header.metadata, ..Contents::default() };
    Ok(Read { format: Format::Safetensors, items, storages, contents })
}

fn check_row(row: &Row, storage: usize) -> Result<(TensorInfo, u64)> {
    let dtype = Dtype::from_safetensors(&row.dtype)
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("dtype {:?} is not known", row.dtype)))?;
    let (start, end) = row.data_offsets;
    if row.shape.len() > MAX_DIMS {
        return Err(Error::format(format!("shape of {} dimensions; at most {MAX_DIMS}", row.shape.len())));
    }
    let wanted = numel(&row.shape).and_then(|numel| dtype.nbytes(numel));
    if wanted.is_none() || end.checked_sub(start) != wanted {
        let wanted = wanted.map_or("an overflow or part of a byte".to_owned(), |nbytes| format!("{nbytes} bytes"));
        return Err(Error::format(format!(
            "data_offsets [{start}, {end}] do not fit {dtype} {:?}, which takes {wanted}",
            row.shape
        )));
    }
    let strides = contiguous(&row.shape);
    let info = TensorInfo { dtype, shape: row.shape.clone(), strides, storage, storage_offset: 0 };
    Ok((info, end - start))
}

/// The tensors must cover the data without holes, overlaps or bytes to spare.
fn check_holes(header: &Header, data_nbytes: u64) -> Result<()> {
    let mut ranges: Vec<_> = header.tensors.iter().map(|(key, row)| (row.data_offsets, key)).collect();
    ranges.sort_unstable();
    let mut end = 0;
    for ((start, stop), key) in ranges {
        if start != end || stop < start {
            return Err(Error::format(format!(
                "data_offsets [{start}, {stop}] leave a hole or overlap; the tensor before ends at {end}"
            ))
            .of_key(key));
        }
        end = stop;
    }
    if end == data_nbytes {
        return Ok(());
    }
    let error = Error::format(format!("tensors take {end} bytes, the file has {data_nbytes} behind its header"));
    Err(if end > data_nbytes {
        error.with_hint(format!("the file is truncated by {} bytes; copy or download it again", end - data_nbytes))
    } else {
        error
    })
}

/// The header: tensors in the order of the JSON, and the free-form metadata.
struct Header {
    tensors: IndexMap<String, Row>,
    metadata: Option<IndexMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the two kinds of entries and refuses duplicates, which a map would swallow.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: IndexMap::new(), metadata: None };
        while let Some(key) = map.next_key::<String>()? {
            let twice = if key == "__metadata__" {
                let Unique(metadata) = map.next_value()?;
                header.metadata.replace(metadata).is_some()
            } else {
                let Object(row) = map.next_value()?;
                header.tensors.insert(key.clone(), row).is_some()
            };
            if twice {
                return Err(de::Error::custom(format!("key {key:?} is there twice")));
            }
        }
        Ok(header)
    }
}
