//! Reading the weights and constants of an exported program, a `.pt2` that `torch.export.save` writes.
//!
//! `data/weights/<model>_weights_config.json` says for every name which record holds its storage, and its dtype, shape
//! and strides on it; constants have the same beside them. Older files hold a torch checkpoint in place of both. What
//! was pickled is read by our own reader and never unpickled; the program itself is not looked at. Source:
//! `torch/export/pt2_archive/_package.py` and `torch/_export/serde/schema.py` of 2.15.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;

use super::flatten::flatten_all;
use super::globals::unknown_globals;
use super::json::{self, Object, Unique};
use super::persistent::View;
use super::rebuild::{Rebuild, Saved};
use super::storage::Extent;
use super::torch_zip::{self, is_big_endian};
use super::{Contents, Format, Item, Items, OpenOptions, Read, Storage};
use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{Source, Window};

/// The code of the strided layout.
const STRIDED: u32 = 7;
/// Names of records with objects that are no tensors.
const OBJECT_PREFIXES: [&str; 2] = ["custom_obj_", "opaque_obj_"];
/// The program in files of torch before 2.8, which lie in no folder.
const OLD_PROGRAM: &str = "serialized_exported_program.json";
/// Its weights and constants.
const OLD_PARTS: [&str; 2] = ["serialized_state_dict.pt", "serialized_constants.pt"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    config: Unique<Object<Row>>,
}

/// What the configuration says of one name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    path_name: String,
    #[serde(rename = "is_param")]
    _is_param: bool,
    use_pickle: bool,
    tensor_meta: Option<Object<Meta>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    dtype: u32,
    sizes: Vec<Size>,
    #[serde(rename = "requires_grad")]
    _requires_grad: bool,
    device: Object<Device>,
    strides: Vec<Size>,
    storage_offset: Size,
    layout: u32,
}

/// A number, or the name of one that is known when the program runs.
#[derive(Deserialize)]
enum Size {
    #[serde(rename = "as_int")]
    Int(i64),
    #[serde(rename = "as_expr")]
    Expr(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    r#type: String,
    index: Option<u32>,
}

/// Whether the archive is an exported program of torch before 2.8.
pub(super) fn detect_old(archive: &Archive) -> bool {
    archive.entries().contains_key(OLD_PROGRAM)
}

/// Reads such an archive: two torch checkpoints beside the program.
pub(super) fn read_old(archive: &Arc<Archive>, options: &OpenOptions) -> Result<Read> {
    check_top_level_key(options)?;
    let mut read = empty();
    for record in OLD_PARTS {
        read.append(checkpoint_in(archive, record, options)?)?;
    }
    Ok(read)
}

pub(super) fn read(archive: &Arc<Archive>, options: &OpenOptions) -> Result<Read> {
    let root = archive.root()?;
    check_format(archive, root)?;
    torch_zip::check_version(archive, root)?;
    let models = models(archive, root);
    if models.is_empty() {
        let error = Error::new(ErrorKind::Unsupported, "this is a .pt2 package, not a checkpoint");
        return Err(error.with_hint("`reweft inspect`, `plan` and `refit` read compiled packages"));
    }
    check_top_level_key(options)?;
    let big_endian = is_big_endian(archive, root)?;
    let mut read = empty();
    for model in &models {
        // One program is the rule; the names of several would collide.
        let prefix = if models.len() == 1 { String::new() } else { format!("{model}.") };
        for kind in ["weights", "constants"] {
            let folder = format!("{root}/data/{kind}");
            let config = format!("{folder}/{model}_{kind}_config.json");
            let old = format!("{folder}/{model}.pt");
            let has = |record: &String| archive.entries().contains_key(record);
            let part = match (has(&config), has(&old)) {
                (true, false) => {
                    let mut part = Payloads {
                        archive,
                        folder: &folder,
                        options,
                        big_endian,
                        by_record: HashMap::new(),
                        read: empty(),
                    };
                    part.read_config(&config).map_err(|error| error.in_record(&config))?;
                    part.read
                }
                (false, true) => checkpoint_in(archive, &old, options)?,
                (true, true) => return Err(Error::format("two records hold the same").in_record(old)),
                (false, false) => return Err(Error::format("the archive has no such record").in_record(config)),
            };
            read.append(prefixed(part, &prefix))?;
        }
    }
    if archive.entries().keys().any(|name| name.starts_with(&format!("{root}/data/aotinductor/"))) {
        read.contents.notices.push("the package also holds a compiled program, which is not looked at".to_owned());
    }
    Ok(read)
}

fn check_top_level_key(options: &OpenOptions) -> Result<()> {
    let Some(key) = &options.top_level_key else { return Ok(()) };
    Err(Error::new(ErrorKind::NotFound, "an exported program has no containers, so no top-level key")
        .of_key(key)
        .with_hint("use a key map to strip a prefix"))
}

fn empty() -> Read {
    Read { format: Format::Exported, items: Items::default(), storages: Vec::new(), contents: Contents::default() }
}

fn prefixed(mut read: Read, prefix: &str) -> Read {
    if !prefix.is_empty() {
        read.items = read.items.into_iter().map(|(key, item)| (format!("{prefix}{key}"), item)).collect();
        for value in &mut read.contents.values {
            value.path.insert_str(0, prefix);
        }
    }
    read
}

/// Refuses a package of a later format by its name.
fn check_format(archive: &Archive, root: &str) -> Result<()> {
    for (name, wanted) in [("archive_format", "pt2"), ("archive_version", "0")] {
        let record = format!("{root}/{name}");
        let nbytes = archive.entry(&record)?.nbytes;
        let found = if nbytes <= 16 { archive.read(&record)? } else { Vec::new() };
        if found.trim_ascii() != wanted.as_bytes() {
            let what = format!("{name} is {:?}, wanted {wanted:?}", String::from_utf8_lossy(&found));
            return Err(Error::new(ErrorKind::Unsupported, what).in_record(record));
        }
    }
    Ok(())
}

/// Names of the programs: `models/<name>.json`.
fn models(archive: &Archive, root: &str) -> Vec<String> {
    let folder = format!("{root}/models/");
    let name = |record: &String| Some(record.strip_prefix(&folder)?.strip_suffix(".json")?.to_owned());
    archive.entries().keys().filter_map(name).filter(|name| !name.contains('/')).collect()
}

/// A record of the archive as a source of its own. It must be stored, as torch writes it.
fn record(archive: &Archive, name: &str) -> Result<Source> {
    let place = archive.place(name)?.data;
    Ok(Arc::new(Window::new(archive.source().clone(), place.start, place.end - place.start)?))
}

/// Reads a torch checkpoint that is a record.
fn checkpoint_in(archive: &Archive, name: &str, options: &OpenOptions) -> Result<Read> {
    torch_zip::read_object_of(record(archive, name)?, options).map_err(|error| error.in_record(name))
}

/// Reads the payloads of one configuration.
struct Payloads<'a> {
    archive: &'a Arc<Archive>,
    folder: &'a str,
    options: &'a OpenOptions,
    big_endian: bool,
    /// Storage by record, so that tied tensors stay tied.
    by_record: HashMap<String, View>,
    read: Read,
}

impl Payloads<'_> {
    fn read_config(&mut self, config: &str) -> Result<()> {
        let (nbytes, limit) = (self.archive.entry(config)?.nbytes, self.options.limits.max_metadata_nbytes);
        if nbytes > limit {
            let what = format!("record of {nbytes} bytes; max_metadata_nbytes is {limit}");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let Config { config } = json::parse(&self.archive.read(config)?)?;
        for (key, Object(row)) in config.0 {
            self.read_row(&key, &row).map_err(|error| error.of_key(&key))?;
        }
        Ok(())
    }

    fn read_row(&mut self, key: &str, row: &Row) -> Result<()> {
        if row.path_name.is_empty() || row.path_name.contains(['/', '\\']) {
            return Err(Error::format(format!("record name {:?} leaves its folder", row.path_name)));
        }
        let record = format!("{}/{}", self.folder, row.path_name);
        if OBJECT_PREFIXES.iter().any(|prefix| row.path_name.starts_with(prefix)) {
            self.archive.entry(&record)?;
            return self.keep(key, Item::Unreadable("it is a custom object, which is not read".to_owned()));
        }
        if row.use_pickle {
            return self.read_pickled(key, &record);
        }
        let Object(meta) =
            row.tensor_meta.as_ref().ok_or_else(|| Error::format("no tensor_meta for what is not pickled"))?;
        let item = self.tensor(&record, meta)?;
        self.keep(key, item)
    }

    fn keep(&mut self, key: &str, item: Item) -> Result<()> {
        match self.read.items.insert(key.to_owned(), item) {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::KeyCollision, "two tensors have this key")),
        }
    }

    /// A tensor that torch.save wrote into a record: it may be of a class of its own, and is read by our own rules.
    fn read_pickled(&mut self, key: &str, name: &str) -> Result<()> {
        let archive = Arc::new(Archive::open(record(self.archive, name)?)?);
        let options = self.options;
        let read_at = |saved: Saved<'_>| {
            let (pickle, mut read) = (saved.pickle, empty());
            let mut rebuild = Rebuild::new(saved);
            let flat = flatten_all(pickle, &mut rebuild, options, &[(key.to_owned(), pickle.root())])?;
            (read.items, read.contents.values) = (flat.items, flat.values);
            read.contents.unknown_globals = unknown_globals(pickle);
            read.contents.notices = rebuild.take_notices();
            read.storages = rebuild.storages;
            Ok(read)
        };
        let read = torch_zip::visit(&archive, options, read_at).map_err(|error| error.in_record(name))?;
        self.read.append(read)
    }

    fn tensor(&mut self, record: &str, meta: &Meta) -> Result<Item> {
        let Some(dtype) = Dtype::from_export(meta.dtype) else {
            return Ok(Item::Unreadable(format!("its dtype has the code {}, which is not known", meta.dtype)));
        };
        if meta.layout != STRIDED {
            return Ok(Item::Unreadable(format!("its layout has the code {}, which is not read", meta.layout)));
        }
        let view = self.storage(record, dtype, &meta.device.0)?;
        let (sizes, strides) = (numbers(&meta.sizes, "size")?, numbers(&meta.strides, "stride")?);
        let offset = numbers(std::slice::from_ref(&meta.storage_offset), "storage offset")?;
        let (Some(sizes), Some(strides), Some(&[offset])) = (sizes, strides, offset.as_deref()) else {
            return Ok(Item::Unreadable("its shape is not known before the program runs".to_owned()));
        };
        view.tensor(dtype, sizes, strides, offset).map(Item::Tensor)
    }

    fn storage(&mut self, record: &str, dtype: Dtype, device: &Device) -> Result<View> {
        let device: Arc<str> = match device.index {
            Some(index) => format!("{}:{index}", device.r#type).into(),
            None => device.r#type.as_str().into(),
        };
        if let Some(view) = self.by_record.get(record) {
            let held = self.read.storages.get(view.storage);
            if held.is_none_or(|held| held.dtype != Some(dtype) || held.device != device) {
                return Err(Error::format("its record is described in two ways").in_record(record));
            }
            return Ok(*view);
        }
        let nbytes = self.archive.entry(record)?.nbytes;
        if !nbytes.is_multiple_of(dtype.itemsize().unwrap_or(1)) {
            return Err(
                Error::format(format!("record has {nbytes} bytes, no whole number of {dtype}")).in_record(record)
            );
        }
        let number = self.archive.entries().get_index_of(record);
        let number = number.ok_or_else(|| Error::format("the archive has no such record").in_record(record))?;
        let extent = Extent { dtype: Some(dtype), nbytes, device };
        let storage = Storage::record(Arc::clone(self.archive), number, extent);
        self.read.storages.push(if self.big_endian { storage.swapped() } else { storage });
        let view = View { storage: self.read.storages.len() - 1, byte_offset: 0, nbytes };
        self.by_record.insert(record.to_owned(), view);
        Ok(view)
    }
}

/// Numbers from 0; `None` if one of them is not known yet.
fn numbers(sizes: &[Size], what: &str) -> Result<Option<Vec<u64>>> {
    let mut numbers = Vec::with_capacity(sizes.len());
    for size in sizes {
        let Size::Int(value) = size else { return Ok(None) };
        let number = u64::try_from(*value);
        numbers.push(number.map_err(|_| Error::format(format!("{what} is {value}, wanted a number from 0")))?);
    }
    Ok(Some(numbers))
}
