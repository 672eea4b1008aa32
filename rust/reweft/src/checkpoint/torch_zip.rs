//! Reading the zip archive that `torch.save` writes since 1.6: `data.pkl` and one record per storage.

use std::sync::Arc;

use reweft_pickle::Pickle;

use super::flatten::flatten;
use super::rebuild::{Places, Rebuild, Saved};
use super::{Contents, Format, OpenOptions, Read};
use crate::container::zip::{Archive, Method};
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
    let mut read = visit(&archive, options, |saved| read_object(saved, options))?;
    read.contents.notices.extend(crc_notices(&archive));
    Ok(read)
}

/// Hands over the archive's object, and says where an error of `then` is.
pub(super) fn visit<R>(
    archive: &Arc<Archive>,
    options: &OpenOptions,
    then: impl FnOnce(Saved<'_>) -> Result<R>,
) -> Result<R> {
    let root = archive.root()?.to_owned();
    let record = format!("{root}/{}", paths::PICKLE);
    check_kind(archive, &root, &record)?;
    let big_endian = is_big_endian(archive, &root)?;
    let entry = archive.entry(&record)?;
    let (nbytes, stored) = (entry.nbytes, entry.method == Method::STORED);
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
    let origin = if stored { Some((archive.source().clone(), archive.place(&record)?.data.start)) } else { None };
    let places = Places::Archive(Arc::clone(archive), &root);
    let (pickle, bytes, format) = (&pickle, bytes.as_slice(), Format::TorchZip);
    then(Saved { pickle, bytes, origin, places, big_endian, format }).map_err(in_pickle)
}

/// Rebuilds what one pickle says, whichever container it and its storages are in.
pub(super) fn read_object(saved: Saved<'_>, options: &OpenOptions) -> Result<Read> {
    let (pickle, format) = (saved.pickle, saved.format);
    let mut rebuild = Rebuild::new(saved);
    let flat = flatten(pickle, &mut rebuild, options)?;
    let unknown_globals = rebuild.unknown_globals();
    let notices = rebuild.take_notices();
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
