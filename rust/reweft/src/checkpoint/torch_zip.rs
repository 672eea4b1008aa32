//! Reading the zip archive that `torch.save` writes since 1.6: `data.pkl` and one record per storage.

use std::ops::RangeInclusive;
use std::sync::Arc;

use reweft_pickle::Pickle;

use super::flatten::flatten;
use super::globals::unknown_globals;
use super::rebuild::{Places, Rebuild, Saved};
use super::{Contents, Format, OpenOptions, Read, exported, torchscript, truncated};
use crate::container::zip::{Archive, Method};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Bytes of a pickle up to which it does not matter how small it was packed.
const FREE_NBYTES: u64 = 1 << 20;

/// Records below the archive's root folder.
mod paths {
    pub const BYTE_ORDER: &str = "byteorder";
    pub const PT2_FORMAT: &str = "archive_format";
}

/// One pickle of an archive, and where its storages are.
pub(super) struct Pickled {
    /// The record, below the root folder.
    pub record: &'static str,
    /// The folder of the storages, below the root folder.
    pub storages: &'static str,
    pub format: Format,
}

/// How records of other programs' archives end, and what those are.
const FOREIGN: &[(&str, &str)] = &[
    (".npy", "an archive of numpy arrays (.npz)"),
    ("model.weights.h5", "a Keras model"),
    ("AndroidManifest.xml", "an Android program"),
];
/// Versions of the archive: `kMinSupportedFileFormatVersion` to `kMaxSupportedFileFormatVersion` of
/// `caffe2/serialize/versions.h`.
const VERSIONS: RangeInclusive<u64> = 1..=10;
/// More than any 64-bit number takes as text.
const MAX_VERSION_NBYTES: u64 = 24;
/// What `torch.save` writes.
const OBJECT: Pickled = Pickled { record: "data.pkl", storages: "data", format: Format::TorchZip };

pub(super) fn read(source: &Source, options: &OpenOptions) -> Result<Read> {
    let archive = Arc::new(open(source, options)?);
    let mut read = if exported::detect_old(&archive) {
        exported::read_old(&archive, options)?
    } else {
        let root = archive.root()?;
        let has = |path: &str| archive.entries().contains_key(&format!("{root}/{path}"));
        if has(paths::PT2_FORMAT) {
            exported::read(&archive, options)?
        } else if has(torchscript::CONSTANTS.record) {
            torchscript::read(&archive, options)?
        } else {
            visit(&archive, options, |saved| read_object(saved, options))?
        }
    };
    read.contents.notices.extend(crc_notices(&archive));
    Ok(read)
}

/// Opens an archive; says of one that is cut how much is missing.
pub(super) fn open(source: &Source, options: &OpenOptions) -> Result<Archive> {
    let archive = Archive::open(source.clone());
    let archive = archive.map_err(|error| truncated::explain(&**source, &options.limits, error))?;
    let foreign = FOREIGN.iter().find(|(end, _)| archive.entries().keys().any(|name| name.ends_with(end)));
    match foreign {
        Some((_, what)) => Err(Error::new(ErrorKind::Unsupported, format!("this is {what}, which is not read"))),
        None => Ok(archive),
    }
}

/// Reads an archive that must be what `torch.save` writes.
pub(super) fn read_object_of(source: Source, options: &OpenOptions) -> Result<Read> {
    let archive = Arc::new(Archive::open(source)?);
    visit(&archive, options, |saved| read_object(saved, options))
}

/// Hands over the archive's object, and says where an error of `then` is.
pub(super) fn visit<R>(
    archive: &Arc<Archive>,
    options: &OpenOptions,
    then: impl FnOnce(Saved<'_>) -> Result<R>,
) -> Result<R> {
    let root = archive.root()?;
    check_kind(archive, root, &format!("{root}/{}", OBJECT.record))?;
    visit_pickle(archive, &OBJECT, options, then)
}

/// Hands over one object of an archive that may have several.
pub(super) fn visit_pickle<R>(
    archive: &Arc<Archive>,
    pickled: &Pickled,
    options: &OpenOptions,
    then: impl FnOnce(Saved<'_>) -> Result<R>,
) -> Result<R> {
    let root = archive.root()?;
    let record = format!("{root}/{}", pickled.record);
    check_version(archive, root)?;
    let big_endian = is_big_endian(archive, root)?;
    let entry = archive.entry(&record)?;
    let (nbytes, stored) = (entry.nbytes, entry.method == Method::STORED);
    let limit = options.limits.max_metadata_nbytes;
    if nbytes > limit {
        let what = format!("pickle of {nbytes} bytes; max_metadata_nbytes is {limit}");
        return Err(Error::new(ErrorKind::Limit, what).in_record(record));
    }
    let inflation = options.limits.max_inflation;
    if nbytes > entry.packed_nbytes.saturating_mul(inflation).saturating_add(FREE_NBYTES) {
        let what = format!("pickle of {nbytes} bytes in {}; max_inflation is {inflation}", entry.packed_nbytes);
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
    let folder = format!("{root}/{}", pickled.storages);
    let places = Places::Archive(Arc::clone(archive), &folder);
    let (pickle, bytes, format) = (&pickle, bytes.as_slice(), pickled.format);
    then(Saved { pickle, bytes, origin, places, big_endian, format }).map_err(in_pickle)
}

/// Rebuilds what one pickle says, whichever container it and its storages are in.
pub(super) fn read_object(saved: Saved<'_>, options: &OpenOptions) -> Result<Read> {
    let (pickle, format) = (saved.pickle, saved.format);
    let mut rebuild = Rebuild::new(saved);
    let flat = flatten(pickle, &mut rebuild, options)?;
    let unknown_globals = unknown_globals(pickle);
    let notices = rebuild.take_notices();
    let contents = Contents { values: flat.values, unknown_globals, notices, ..Contents::default() };
    Ok(Read { format, items: flat.items, storages: rebuild.storages, contents })
}

/// Tells the other archives that torch writes from a checkpoint.
fn check_kind(archive: &Archive, root: &str, pickle: &str) -> Result<()> {
    let has = |path: &str| archive.entries().contains_key(&format!("{root}/{path}"));
    let what = if has(torchscript::CONSTANTS.record) {
        "this is a TorchScript archive, not what torch.save writes"
    } else if has(paths::PT2_FORMAT) {
        "this is a .pt2 package, not a checkpoint"
    } else if has(OBJECT.record) {
        return Ok(());
    } else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("this zip archive has no {pickle}, so torch did not write it"),
        ));
    };
    Err(Error::new(ErrorKind::Unsupported, what).with_hint("pass a .pt or safetensors file with the weights"))
}

/// Refuses an archive of a version that no torch is known to write. The version stands in one of two records; the
/// newer writers use the second for programs.
pub(super) fn check_version(archive: &Archive, root: &str) -> Result<()> {
    let records = [format!("{root}/version"), format!("{root}/.data/version")];
    let mut found: Option<u64> = None;
    for record in &records {
        let Some(entry) = archive.entries().get(record) else { continue };
        let text = if entry.nbytes <= MAX_VERSION_NBYTES { archive.read(record)? } else { Vec::new() };
        let version = str::from_utf8(&text).ok().and_then(|text| text.trim_ascii().parse().ok());
        let version = version.ok_or_else(|| Error::format("the version is no number").in_record(record))?;
        if found.is_some_and(|found| found != version) {
            return Err(Error::format("two records state two versions").in_record(record));
        }
        if !VERSIONS.contains(&version) {
            let what = format!("archive of version {version}; {} to {} are read", VERSIONS.start(), VERSIONS.end());
            return Err(Error::new(ErrorKind::Unsupported, what).in_record(record));
        }
        found = Some(version);
    }
    match found {
        Some(_) => Ok(()),
        None => Err(Error::format("the archive states no version").in_record(&records[0])),
    }
}

/// An absent record means little-endian: writers before 2.1 had none.
pub(super) fn is_big_endian(archive: &Archive, root: &str) -> Result<bool> {
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
