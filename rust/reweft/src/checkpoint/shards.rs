//! Reading a checkpoint of several files by its index: `model.safetensors.index.json` and its kin.
//!
//! The index maps keys to files. It is an allow-list: a tensor that it does not name is not read, and a key that its
//! file lacks, or that two files hold, is an error. Files are named relative to the index's folder and cannot leave
//! it, with one exception that [`resolve`] states. Each is opened as any file is; an index in an index is refused.
//! Source: files of the `transformers` library; no specification is known.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use indexmap::IndexMap;
use serde::Deserialize;

use super::json::{self, Unique};
use super::{Contents, Format, Item, Items, OpenOptions, Read, Shard, Value, detect};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{self, Source};
use crate::write;

/// How names of an index end, for the hint about a folder.
const INDEX_SUFFIX: &str = ".index.json";
/// Keys that a notice lists.
const LISTED: usize = 10;

#[derive(Deserialize)]
struct Index {
    weight_map: Option<Unique<String>>,
    #[serde(default)]
    metadata: Unique<serde_json::Value>,
}

/// Whether a file begins like a JSON object. A safetensors file may begin with `{` too, but has a NUL soon after.
pub(super) fn detect(head: &[u8]) -> bool {
    let text = head.trim_ascii_start();
    text.starts_with(b"{") && !head.iter().take(8).any(|byte| *byte == 0)
}

/// Says what to open in place of a folder.
pub(super) fn is_a_folder(path: &Path) -> Error {
    let error = Error::io("open", std::io::Error::from(std::io::ErrorKind::IsADirectory)).in_file(path);
    let names = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.ends_with(INDEX_SUFFIX));
    names.sort();
    error.with_hint(match names.as_slice() {
        [] => "open a file in it".to_owned(),
        names => format!("open its shard index: {}", names.join(" or ")),
    })
}

/// Reads the index and every file it names; `folder` is where it lies, `None` for an index in memory.
pub(super) fn read(source: &Source, folder: Option<&Path>, options: &OpenOptions) -> Result<Read> {
    let (nbytes, limit) = (source.len(), options.limits.max_metadata_nbytes);
    if nbytes > limit {
        return Err(Error::new(ErrorKind::Limit, format!("JSON of {nbytes} bytes; max_metadata_nbytes is {limit}")));
    }
    let index: Index = json::parse(&source::read_vec(&**source, 0, nbytes)?)?;
    let Some(Unique(weight_map)) = index.weight_map else {
        let error = Error::new(ErrorKind::Unsupported, "this is a JSON file without a weight_map, so no shard index");
        return Err(error.with_hint("open the checkpoint that it belongs to"));
    };
    let Some(folder) = folder else {
        let error = Error::new(ErrorKind::Unsupported, "a shard index in memory has no folder to find its files in");
        return Err(error.with_hint("open it by its path"));
    };
    let limit = options.limits.max_keys;
    if weight_map.len() > limit {
        let what = format!("index of {} keys; max_keys is {limit}", weight_map.len());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let mut shards = Shards { read: empty(), files: IndexMap::new() };
    for (key, file) in &weight_map {
        if !shards.files.contains_key(file.as_str()) {
            shards.open(folder, file, options).map_err(|error| error.of_key(key))?;
        }
    }
    shards.pick(&weight_map)?;
    let values = index
        .metadata
        .0
        .into_iter()
        .map(|(name, value)| Value { path: format!("metadata.{name}"), what: value.to_string() });
    shards.read.contents.values.extend(values);
    Ok(shards.read)
}

fn empty() -> Read {
    Read { format: Format::Sharded, items: Items::default(), storages: Vec::new(), contents: Contents::default() }
}

struct Shards<'i> {
    read: Read,
    /// The tensors of each file, whose storages are numbered through.
    files: IndexMap<&'i str, Items>,
}

impl<'i> Shards<'i> {
    fn open(&mut self, folder: &Path, file: &'i str, options: &OpenOptions) -> Result<()> {
        let path = resolve(folder, file)?;
        write::recover(&path)?;
        let source = source::open(&path, options.access)?;
        let mut found = detect::read_shard(&source, options).map_err(|error| error.in_file(&path))?;
        let first_storage = self.read.storages.len();
        let mut items = std::mem::take(&mut found.items);
        for item in items.values_mut() {
            if let Item::Tensor(info) = item {
                info.storage += first_storage;
            }
        }
        self.files.insert(file, items);
        self.merge_metadata(file, found.contents.metadata.take());
        let notices = std::mem::take(&mut found.contents.notices);
        self.read.contents.notices.extend(notices.into_iter().map(|notice| format!("{file}: {notice}")));
        self.read.append(found)?;
        let storages = first_storage..self.read.storages.len();
        self.read.contents.shards.push(Shard { path, storages });
        Ok(())
    }

    /// Keeps what files say of themselves where they agree; says where they do not.
    fn merge_metadata(&mut self, file: &str, metadata: Option<IndexMap<String, String>>) {
        let contents = &mut self.read.contents;
        let Some(metadata) = metadata else { return };
        let merged = contents.metadata.get_or_insert_default();
        for (name, value) in metadata {
            let kept = merged.entry(name.clone()).or_insert_with(|| value.clone());
            if *kept != value {
                contents.notices.push(format!("{file}: metadata {name:?} is another than in the files before"));
            }
        }
    }

    /// Takes what the index names, in its order.
    fn pick(&mut self, weight_map: &IndexMap<String, String>) -> Result<()> {
        let mut holder: HashMap<&str, &str> = HashMap::new();
        for (file, items) in &self.files {
            for key in items.keys().filter(|key| weight_map.contains_key(*key)) {
                if let Some(other) = holder.insert(key, file) {
                    return Err(Error::format(format!("both {other} and {file} hold this key")).of_key(key));
                }
            }
        }
        for (key, file) in weight_map {
            match holder.get(key.as_str()) {
                Some(found) if found == file => {}
                Some(found) => {
                    let what = format!("the index puts this key into {file}, but {found} holds it");
                    return Err(Error::format(what).of_key(key));
                }
                None => {
                    let error = Error::format(format!("the index puts this key into {file}, which does not hold it"));
                    return Err(error.of_key(key).with_hint("the index belongs to other files"));
                }
            }
            let item = self.files.get(file.as_str()).and_then(|items| items.get(key));
            self.read.items.extend(item.map(|item| (key.clone(), item.clone())));
        }
        for (file, items) in &self.files {
            let others: Vec<&str> =
                items.keys().filter(|key| !weight_map.contains_key(*key)).map(String::as_str).collect();
            if !others.is_empty() {
                let more = if others.len() > LISTED { ", ..." } else { "" };
                let listed = others.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
                let what =
                    format!("{file}: {} tensors are not in the index and are not read: {listed}{more}", others.len());
                self.read.contents.notices.push(what);
            }
        }
        Ok(())
    }
}

/// The path of a file that the index names.
///
/// The name must lead down from the folder, without `..`. Links are followed within the folder. One link may leave it:
/// the Hugging Face cache keeps `<repository>/snapshots/<revision>/<file>` as a link to
/// `<repository>/blobs/<hash>`, which is followed into that `blobs` folder and no other place.
fn resolve(folder: &Path, name: &str) -> Result<PathBuf> {
    let plain = !name.is_empty()
        && !name.contains('\\')
        && !name.chars().any(char::is_control)
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return Err(Error::format(format!("the index names the file {name:?}, which is no path below its folder")));
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let path = folder.join(name);
    let real = |path: &Path| path.canonicalize().map_err(|error| Error::io("open", error).in_file(path));
    let (root, target) = (real(folder)?, real(&path)?);
    if target.starts_with(&root) || blobs(&root).is_some_and(|blobs| target.parent() == Some(&blobs)) {
        return Ok(path);
    }
    let error = Error::new(ErrorKind::Unsupported, "the file is a link that leaves the folder of its index");
    Err(error.in_file(path).with_hint("copy the file into the folder, or open it by itself"))
}

/// Where the Hugging Face cache keeps the contents of a snapshot's files.
fn blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    Some(snapshots.parent()?.join("blobs"))
}
