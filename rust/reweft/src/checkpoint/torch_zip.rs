//! Reading the zip archive that `torch.save` writes since 1.6: `data.pkl` and one record per storage.

use std::sync::Arc;

use reweft_pickle::Pickle;

use super::flatten::flatten;
use super::rebuild::{Places, Rebuild};
use super::{Contents, Format, OpenOptions, Read};
use crate::container::zip::Archive;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Records below the archive's root folder.
mod paths {
    pub const PICKLE: &str = "data.pkl";
    pub const BYTE_ORDER: &str = "byteorder";
    /// Only TorchScript archives have it.
    pub const CONSTANTS: &str = "constants.pkl";
    pub const PT2_FORMAT: &str = "archive_format";
}

pub(super) fn read(source: Source, options: &OpenOptions) -> Result<Read> {
    let archive = Arc::new(Archive::open(source)?);
    let root = archive.root()?.to_owned();
    let record = format!("{root}/{}", paths::PICKLE);
    check_kind(&archive, &root, &record)?;
    let big_endian = is_big_endian(&archive, &root)?;
    let nbytes = archive.entry(&record)?.nbytes;
    let limit = options.limits.max_metadata_nbytes;
    if nbytes > limit {
        let what = format!("pickle of {nbytes} bytes; max_metadata_nbytes is {limit}");
        return Err(Error::new(ErrorKind::Limit, what).in_record(record));
    }
    let bytes = archive.read(&record)?;
    let in_pickle = |error: Error| error.in_record(&record);
    let pickle = Pickle::parse(&bytes, &options.limits.pickle).map_err(|error| in_pickle(error.into()))?;
    if pickle.nbytes() != bytes.len() {
        let left = bytes.len() - pickle.nbytes();
        let error = Error::format(format!("{left} bytes stand behind the pickle"));
        return Err(in_pickle(error.at(pickle.nbytes() as u64)));
    }
    let places = Places::Archive(Arc::clone(&archive), &root);
    let mut read = read_object(&pickle, places, big_endian, Format::TorchZip, options).map_err(in_pickle)?;
    read.contents.notices.extend(crc_notices(&archive));
    Ok(read)
}

/// Rebuilds what one pickle says, whichever container it and its storages are in.
pub(super) fn read_object(
    pickle: &Pickle<'_>,
    places: Places<'_>,
    big_endian: bool,
    format: Format,
    options: &OpenOptions,
) -> Result<Read> {
    let mut rebuild = Rebuild::new(pickle, places, big_endian);
    let flat = flatten(pickle, &mut rebuild, options)?;
    let unknown_globals = rebuild.unknown_globals();
    let notices = rebuild.notices;
    let contents = Contents { values: flat.values, unknown_globals, notices, ..Contents::default() };
    Ok(Read { format, items: flat.items, storages: rebuild.storages, contents })
}

/// Tells the other archives that torch writes from a checkpoint.
fn check_kind(archive: &Archive, root: &str, pickle: &str) -> Result<()> {
    let has = |path: &str| archive.entries().contains_key(&format!("{root}/{path}"));
    let what = if has(paths::CONSTANTS) {
        "this is a TorchScript archive, which is not read yet"
    } else if has(paths::PT2_FORMAT) {
        "this is a .pt2 package, not a checkpoint"
    } else if has(paths::PICKLE) {
        return Ok(());
    } else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("this zip archive has no {pickle}, so torch did not write it"),
        ));
    };
    Err(Error::new(ErrorKind::Unsupported, what).with_hint("pass a .pt or safetensors file with the weights"))
}

/// An absent record means little-endian: writers before 2.1 had none.
fn is_big_endian(archive: &Archive, root: &str) -> Result<bool> {
    let record = format!("{root}/{}", paths::BYTE_ORDER);
    let Some(entry) = archive.entries().get(&record) else { return Ok(false) };
    let order = if entry.nbytes <= 6 { archive.read(&record)? } else { Vec::new() };
    match order.as_slice() {
        b"little" => Ok(false),
        b"big" => Ok(true),
        _ => Err(Error::format("byte order is neither little nor big").in_record(record)),
    }
}

fn crc_notices(archive: &Archive) -> Vec<String> {
    let absent = archive.entries().values().filter(|entry| entry.crc_is_absent()).count();
    if absent == 0 {
        return Vec::new();
    }
    vec![format!("{absent} records have no CRC, so damage in them cannot be found (written with compute_crc32=False)")]
}
