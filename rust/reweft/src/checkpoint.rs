//! Checkpoints: files that hold a state_dict, whatever their format, as keys and tensors.
//!
//! Opening reads metadata only. The readers (one file per format) yield storages and a flat list of items; what lies
//! between, from a [`TensorInfo`] to bytes, is here and the same for all.

mod arrays;
mod budget;
mod derive;
mod detect;
mod exported;
mod fill;
mod flatten;
mod globals;
pub(crate) mod json;
mod made;
mod module;
pub(crate) mod numpy;
mod parts;
mod persistent;
mod pickled;
mod rebuild;
mod safetensors;
mod shards;
mod storage;
mod storages;
mod torch_legacy;
mod torch_tar;
mod torch_zip;
mod torchscript;
mod truncated;

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use reweft_pickle::Pickle;

use crate::config::{self, Config};
use crate::convert::can_cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::{KeyMap, Mapped};
use crate::limits::Limits;
use crate::recipe::{Recipe, Step};
use crate::replay::Replay;
use crate::source::{self, Access, Source};
use crate::tensor::{TensorInfo, contiguous};
use crate::write;
pub(crate) use budget::Budget;
pub(crate) use derive::infer;
use derive::{Derive, Derived};
pub(crate) use detect::visit;
pub use fill::Room;
pub use flatten::Value;
pub(crate) use globals::is_tensor;
pub use storage::Storage;
pub use storages::Storages;

/// How a checkpoint is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Positional reads, or a mapping.
    pub access: Access,
    /// Dotted path of the container that holds the state_dict; its path is not part of the keys.
    pub top_level_key: Option<String>,
    /// What reading may cost.
    pub limits: Limits,
}

/// The file format a checkpoint was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// The zip archive that `torch.save` writes since 1.6.
    TorchZip,
    /// The stream of pickles that `torch.save` wrote before 1.6.
    TorchLegacy,
    /// The tar archive that `torch.save` wrote up to 0.1.10.
    TorchTar,
    /// A program of TorchScript, as `torch.jit.save` writes it.
    TorchScript,
    /// Several files, of which an index says which holds what.
    Sharded,
    /// An exported program, as `torch.export.save` writes it.
    Exported,
    /// One pickle, as `pickle.dump` writes it.
    Pickle,
    /// safetensors.
    Safetensors,
    /// Tensors that the caller holds in memory.
    Memory,
}

impl Format {
    /// The name reports print.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TorchZip => "torch zip",
            Self::TorchLegacy => "torch legacy",
            Self::TorchTar => "torch tar",
            Self::TorchScript => "TorchScript",
            Self::Sharded => "shard index",
            Self::Exported => "exported program",
            Self::Pickle => "pickle",
            Self::Safetensors => "safetensors",
            Self::Memory => "memory",
        }
    }
}

/// What a key leads to.
#[derive(Clone, Debug)]
enum Item {
    Tensor(TensorInfo),
    /// A tensor that cannot be read, and why; using it is an error, listing it is not.
    Unreadable(String),
}

/// The tensors of a checkpoint under their keys, in file order.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    items: Items,
    storages: Storages,
    contents: Arc<Contents>,
    top_level_key: Option<String>,
    mapped: Option<Arc<Mapped>>,
    /// The file and how it was opened, for reading more of it than its tensors.
    origin: Option<(Source, Limits)>,
    /// Whether nobody writes to the memory that it is made of.
    frozen: bool,
}

/// What a checkpoint's keys lead to. The hasher is seeded at random, so that nobody can choose keys that collide.
type Items = IndexMap<String, Item, foldhash::quality::RandomState>;

/// What a file holds beside its tensors.
#[derive(Clone, Debug, Default)]
struct Contents {
    values: Vec<Value>,
    unknown_globals: Vec<String>,
    metadata: Option<IndexMap<String, String>>,
    notices: Vec<String>,
    /// The files of a sharded checkpoint; empty if there is one file.
    shards: Vec<Shard>,
}

/// One file of several.
#[derive(Clone, Debug)]
struct Shard {
    path: PathBuf,
    /// The numbers of its storages; those of the next shard follow.
    storages: Range<usize>,
}

impl Checkpoint {
    /// Opens a file. Detects the format by content and reads metadata only.
    ///
    /// A shard index (`model.safetensors.index.json`) opens the files beside it as one checkpoint. The index is an
    /// allow-list: what is in a shard and not in the index is not read, and a notice names it. Shards lie in the
    /// index's folder or below; a link may lead elsewhere in that folder, or, in a snapshot of the Hugging Face cache,
    /// to the blobs of the same repository, and nowhere else.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Format`] for a damaged file, [`ErrorKind::Unsupported`] for a format that is not
    /// read, [`ErrorKind::NotFound`] for an absent top-level key, [`ErrorKind::KeyCollision`] for two tensors that
    /// flatten to one key, [`ErrorKind::Limit`].
    ///
    /// # Examples
    /// ```no_run
    /// let checkpoint = reweft::Checkpoint::open("model.pt".as_ref(), &reweft::OpenOptions::default())?;
    /// for (key, info) in checkpoint.tensors() {
    ///     println!("{key} {} {:?}", info.dtype, info.shape);
    /// }
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        if path.is_dir() {
            return Err(shards::is_a_folder(path));
        }
        write::recover(path)?;
        let source = source::open(path, options.access)?;
        Self::read_source(path, &source, path.parent(), options)
    }

    /// Reads a checkpoint from any source; `name` stands in for the path in messages. No other file is opened, so a
    /// shard index is refused.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[allow(clippy::needless_pass_by_value, reason = "the source is handed over, whatever its format makes of it")]
    pub fn from_source(name: &Path, source: Source, options: &OpenOptions) -> Result<Self> {
        Self::read_source(name, &source, None, options)
    }

    fn read_source(name: &Path, source: &Source, folder: Option<&Path>, options: &OpenOptions) -> Result<Self> {
        let origin = Some((source.clone(), options.limits.clone()));
        let read = detect::read(source, folder, options).map_err(|error| error.in_file(name))?;
        let Read { format, items, storages, mut contents } = read;
        // Several pickles may name the same.
        let mut seen = HashSet::new();
        contents.unknown_globals.retain(|name| seen.insert(name.clone()));
        Ok(Self {
            path: name.to_owned(),
            format,
            items,
            storages: Storages::new(storages, options.limits.max_repeated_nbytes),
            contents: Arc::new(contents),
            top_level_key: options.top_level_key.clone(),
            mapped: None,
            origin,
            frozen: false,
        })
    }

    /// Makes a checkpoint of tensors in memory, so that they pass the same checks as a file's.
    ///
    /// # Errors
    /// [`ErrorKind::KeyCollision`] for a key that is given twice, [`ErrorKind::Format`] for a tensor whose window is
    /// larger than its storage, [`ErrorKind::Usage`] for a storage number that does not exist.
    pub fn from_memory(
        name: &Path,
        storages: Vec<Source>,
        tensors: impl IntoIterator<Item = (String, TensorInfo)>,
    ) -> Result<Self> {
        let numbered = storages.into_iter().enumerate();
        let storages: Vec<Storage> = numbered.map(|(number, source)| Storage::memory(source, number)).collect();
        let mut items = Items::default();
        for (key, info) in tensors {
            let Some(storage) = storages.get(info.storage) else {
                return Err(Error::new(ErrorKind::Usage, format!("no storage {}", info.storage)).of_key(key));
            };
            info.window(storage.nbytes).map_err(|error| error.of_key(&key))?;
            if items.insert(key.clone(), Item::Tensor(info)).is_some() {
                return Err(Error::new(ErrorKind::KeyCollision, "key is given twice").of_key(key));
            }
        }
        Ok(Self {
            path: name.to_owned(),
            format: Format::Memory,
            items,
            storages: Storages::new(storages, Limits::default().max_repeated_nbytes),
            contents: Arc::default(),
            top_level_key: None,
            mapped: None,
            origin: None,
            frozen: false,
        })
    }

    /// Gives the checkpoint the `__metadata__` that safetensors files keep; any that it has is replaced.
    #[must_use]
    pub fn with_metadata(self, metadata: IndexMap<String, String>) -> Self {
        let contents = Contents { metadata: Some(metadata), ..(*self.contents).clone() };
        Self { contents: Arc::new(contents), ..self }
    }

    /// Lends a library that carries out the operations of recipes which the engine has not.
    #[must_use]
    pub fn with_replay(self, replay: Arc<dyn Replay>) -> Self {
        Self { storages: self.storages.with_replay(replay), ..self }
    }

    /// States that nobody writes to the memory that the checkpoint was made of, so that whoever takes its tensors may use
    /// them where they are.
    #[must_use]
    pub fn freeze(self) -> Self {
        Self { frozen: true, ..self }
    }

    /// Whether somebody stated that nobody writes to its memory.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Selects, renames and remakes tensors as a key map says; [`mapped`](Self::mapped) then tells what it did.
    ///
    /// Costs the keys alone: permuted, cut or reshaped tensors are views of the same bytes, and what must be computed
    /// (casts, joins) is computed whenever it is read, and not kept.
    ///
    /// # Errors
    /// [`ErrorKind::KeyCollision`] if two keys get one name, [`ErrorKind::NotFound`] if a selection matched no key,
    /// [`ErrorKind::Usage`] for an operation that does not fit its tensor, or if the key map names a top-level key
    /// and this checkpoint was opened without it.
    pub fn rekey(&self, keys: &KeyMap) -> Result<Self> {
        self.map_keys(keys).map_err(|error| error.in_file(&self.path))
    }

    fn map_keys(&self, keys: &KeyMap) -> Result<Self> {
        if let Some(key) = keys.top_level_key()
            && self.top_level_key.as_deref() != Some(key)
        {
            let what = "the key map names this top-level key, the checkpoint was opened without it";
            return Err(Error::new(ErrorKind::Usage, what).of_key(key).with_hint("open the checkpoint with it"));
        }
        let mapped = keys.apply(self.keys())?;
        let mut derive = Derive::new(self.storages.clone());
        let mut items =
            Items::with_capacity_and_hasher(mapped.tensors.len(), foldhash::quality::RandomState::default());
        for (name, recipe) in &mapped.tensors {
            let item = match recipe.plain_key() {
                Some(key) => self.item(key)?.clone(),
                None => self.derive_item(&mut derive, name, recipe)?,
            };
            items.insert(name.clone(), item);
        }
        let mut contents = (*self.contents).clone();
        contents.notices.extend(mapped.idle_rules.iter().map(|rule| format!("rule {rule:?} matched no key")));
        let (storages, mapped) = (derive.storages.seal(), Some(Arc::new(mapped)));
        Ok(Self { items, storages, contents: Arc::new(contents), mapped, ..self.clone() })
    }

    /// These tensors, made of this checkpoint's. Reads nothing. What is made twice in the same way stays tied.
    pub(crate) fn remade(&self, tensors: &[(String, Recipe)]) -> Result<Self> {
        let mut derive = Derive::new(self.storages.clone());
        let mut items = Items::with_capacity_and_hasher(tensors.len(), foldhash::quality::RandomState::default());
        for (name, recipe) in tensors {
            items.insert(name.clone(), self.derive_item(&mut derive, name, recipe)?);
        }
        Ok(Self { items, storages: derive.storages.seal(), ..self.clone() })
    }

    /// Adds a notice for careful readers.
    pub(crate) fn noticed(self, notice: String) -> Self {
        let mut contents = (*self.contents).clone();
        contents.notices.push(notice);
        Self { contents: Arc::new(contents), ..self }
    }

    /// A tensor that a recipe makes, or the reason why one of its keys cannot be read.
    fn derive_item(&self, derive: &mut Derive, name: &str, recipe: &Recipe) -> Result<Item> {
        for key in recipe.keys() {
            if let Item::Unreadable(why) = self.item(key)? {
                return Ok(Item::Unreadable(format!("it is made of {key:?}, and {why}")));
            }
        }
        let Derived { info, .. } = derive
            .follow(recipe, |key| self.get(key).cloned())
            .map_err(|error| error.of_key(name).with_hint(format!("its recipe is: {recipe}")))?;
        info.window(derive.storages.get(info.storage)?.nbytes).map_err(|error| error.of_key(name))?;
        Ok(Item::Tensor(info))
    }

    /// Converts float tensors to another float dtype, rounding to nearest even; others stay, and a notice names them.
    ///
    /// Reads nothing: the elements are converted whenever they are read, and tensors that were tied stay so.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `to` is no float dtype.
    pub fn cast(&self, to: Dtype) -> Result<Self> {
        if !can_cast(Dtype::F32, to) {
            return Err(Error::new(ErrorKind::Usage, format!("{to} is no float dtype, so nothing is cast to it")));
        }
        let mut derive = Derive::new(self.storages.clone());
        let (mut items, mut left) = (self.items.clone(), Vec::new());
        for (key, item) in &mut items {
            let Item::Tensor(info) = item else { continue };
            if can_cast(info.dtype, to) {
                let step = Step::Cast { from: None, to };
                *info = derive.change(&step, info.clone()).map_err(|error| error.of_key(key).in_file(&self.path))?;
            } else {
                left.push(format!("{key} ({})", info.dtype));
            }
        }
        let mut contents = (*self.contents).clone();
        if !left.is_empty() {
            contents.notices.push(format!("not float, so not cast to {to}: {}", left.join(", ")));
        }
        Ok(Self { items, storages: derive.storages.seal(), contents: Arc::new(contents), ..self.clone() })
    }

    /// What the last key map did, if one was applied.
    pub fn mapped(&self) -> Option<&Mapped> {
        self.mapped.as_deref()
    }

    /// Makes the bytes of a recipe over this checkpoint's keys.
    pub(crate) fn evaluate_into(&self, recipe: &Recipe, out: &mut [u8]) -> Result<()> {
        let mut derive = Derive::new(self.storages.clone());
        let Derived { info, strides } = derive.follow(recipe, |key| self.get(key).cloned())?;
        let strides = strides.as_ref().unwrap_or(&info.strides);
        let key = recipe.keys().next().unwrap_or_default();
        derive.storages.gather(&info, strides, out).map_err(|error| error.of_key(key).in_file(&self.path))
    }

    fn item(&self, key: &str) -> Result<&Item> {
        self.items.get(key).ok_or_else(|| Error::new(ErrorKind::NotFound, "the checkpoint has no such key").of_key(key))
    }

    /// The file, or the name given for what is in memory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds a tensor: [`path`](Self::path), or a shard of it.
    pub fn file_of(&self, info: &TensorInfo) -> &Path {
        let shards = &self.contents.shards;
        // What a key map makes belongs to none of them.
        let shard = shards.get(shards.partition_point(|shard| shard.storages.end <= info.storage));
        shard.filter(|shard| shard.storages.contains(&info.storage)).map_or(&self.path, |shard| &shard.path)
    }

    /// The format the file was detected as.
    pub fn format(&self) -> Format {
        self.format
    }

    /// All keys, also of tensors that cannot be read, in file order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.items.keys().map(String::as_str)
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The readable tensors in file order; [`unreadable`](Self::unreadable) lists the others.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.items.iter().filter_map(|(key, item)| match item {
            Item::Tensor(info) => Some((key.as_str(), info)),
            Item::Unreadable(_) => None,
        })
    }

    /// Keys of tensors that this version cannot read, with the reason.
    pub fn unreadable(&self) -> impl Iterator<Item = (&str, &str)> {
        self.items.iter().filter_map(|(key, item)| match item {
            Item::Tensor(_) => None,
            Item::Unreadable(why) => Some((key.as_str(), why.as_str())),
        })
    }

    /// Fails if any key leads to a tensor that cannot be read; writers call it, so that nothing is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with key and reason.
    pub fn check_readable(&self) -> Result<()> {
        match self.unreadable().next() {
            None => Ok(()),
            Some((key, _)) => self.get(key).map(|_| ()),
        }
    }

    /// Looks a tensor up. Reads nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] with the nearest key, [`ErrorKind::Unsupported`] for one that cannot be read.
    pub fn get(&self, key: &str) -> Result<&TensorInfo> {
        let error = match self.items.get(key) {
            Some(Item::Tensor(info)) => return Ok(info),
            Some(Item::Unreadable(why)) => Error::new(ErrorKind::Unsupported, why.clone()),
            None => {
                let hint = crate::keymap::suggest(key, self.keys());
                Error::new(ErrorKind::NotFound, "the checkpoint has no such key").with_hint(hint)
            }
        };
        Err(error.of_key(key).in_file(&self.path))
    }

    /// Whether the key exists, readable or not.
    pub fn contains(&self, key: &str) -> bool {
        self.items.contains_key(key)
    }

    /// The storages that tensors point into by number; a key map does not renumber them, and may add some.
    pub fn storages(&self) -> &Storages {
        &self.storages
    }

    /// The open files that the storages lie in, each once; none for what is in memory.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        let mut seen = HashSet::new();
        let files = self.storages.iter().filter_map(|storage| storage.source()?.file());
        files.filter(move |file| seen.insert(std::ptr::from_ref(*file)))
    }

    /// What the file holds beside tensors: epoch, optimizer settings, and so on.
    pub fn values(&self) -> &[Value] {
        &self.contents.values
    }

    /// Classes and functions that the file names and reweft does not know; they were kept as inert data.
    pub fn unknown_globals(&self) -> &[String] {
        &self.contents.unknown_globals
    }

    /// `__metadata__` of a safetensors file, if it has one.
    pub fn metadata(&self) -> Option<&IndexMap<String, String>> {
        self.contents.metadata.as_ref()
    }

    /// What a careful reader should know: a missing CRC, for one.
    pub fn notices(&self) -> &[String] {
        &self.contents.notices
    }

    /// Reads a tensor in row-major order. Reads its bytes once, plus the rest of its record on first use to check the
    /// CRC; one allocation of the result's size.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`ErrorKind::Io`]; [`ErrorKind::Format`] for a wrong CRC or a truncated file;
    /// [`ErrorKind::Limit`] for a tensor that repeats a small storage very often.
    pub fn read(&self, key: &str) -> Result<Vec<u8>> {
        let info = self.get(key)?;
        let in_place = |error: Error| error.of_key(key).in_file(self.file_of(info));
        self.storages.check_repeats(info).map_err(in_place)?;
        let mut bytes = source::zeroed(info.nbytes()).map_err(in_place)?;
        self.read_into(key, &contiguous(&info.shape), &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a tensor in a dense layout of the caller's choice, strides in elements. Allocates only where the layout
    /// is another than the file's, or the tensor is made of others.
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`ErrorKind::Usage`] if `out` is not as long as the tensor.
    pub fn read_into(&self, key: &str, strides: &[u64], out: &mut [u8]) -> Result<()> {
        let info = self.get(key)?;
        self.storages.gather(info, strides, out).map_err(|error| error.of_key(key).in_file(self.file_of(info)))
    }

    /// Reads any view of this checkpoint's storages in row-major order.
    pub(crate) fn read_view(&self, info: &TensorInfo, out: &mut [u8]) -> Result<()> {
        self.storages.gather(info, &contiguous(&info.shape), out)
    }

    /// Refuses to walk a tensor that repeats a small storage very often.
    pub(crate) fn check_repeats(&self, key: &str, info: &TensorInfo) -> Result<()> {
        self.storages.check_repeats(info).map_err(|error| error.of_key(key).in_file(self.file_of(info)))
    }

    /// Everything in the file's pickle as data, tensors as what they are; `None` for formats that hold tensors alone.
    pub(crate) fn survey(&self) -> Result<Option<Config>> {
        self.visit(self.top_level_key.clone(), config::survey)
    }

    /// What the file holds at a path of [`values`](Self::values), as data. Reads the file's pickle again, no tensor.
    ///
    /// # Errors
    /// As [`Config::open`]; [`ErrorKind::Unsupported`] for formats that hold tensors alone.
    pub fn config(&self, path: &str) -> Result<Config> {
        let key = self.top_level_key.iter().map(String::as_str).chain([path]).collect::<Vec<_>>().join(".");
        self.visit(Some(key), config::read)?.ok_or_else(|| {
            let what = format!("a {} file holds nothing but tensors", self.format.name());
            Error::new(ErrorKind::Unsupported, what).of_key(path).in_file(&self.path)
        })
    }

    /// The attribute `_metadata` that `state_dict()` gives to its dict and `torch.save` keeps: a dict from the path of each
    /// module to a dict with its `version`. `None` if the file has none, or a key map has renamed what it speaks of.
    /// Reads the file's pickle again, no tensor.
    ///
    /// # Errors
    /// As [`Config::open`].
    pub fn state_metadata(&self) -> Result<Option<Config>> {
        if self.mapped.is_some() {
            return Ok(None);
        }
        let found =
            self.visit(self.top_level_key.clone(), |pickle, options| config::attribute(pickle, "_metadata", options));
        Ok(found?.flatten())
    }

    /// Hands over the file's pickle; `None` for formats that hold tensors alone.
    fn visit<R>(
        &self,
        top_level_key: Option<String>,
        then: impl FnOnce(&Pickle<'_>, &OpenOptions) -> Result<R>,
    ) -> Result<Option<R>> {
        let Some((source, limits)) = &self.origin else { return Ok(None) };
        if !matches!(self.format, Format::TorchZip | Format::TorchLegacy | Format::TorchTar | Format::Pickle) {
            return Ok(None);
        }
        let options = OpenOptions { top_level_key, limits: limits.clone(), ..OpenOptions::default() };
        let found = visit(source, &options, |pickle| then(pickle, &options));
        found.map(Some).map_err(|error| error.in_file(&self.path))
    }

    /// The storage of one of this checkpoint's tensors.
    ///
    /// # Errors
    /// As [`Storages::get`].
    pub fn storage_of(&self, info: &TensorInfo) -> Result<&Storage> {
        self.storages.get(info.storage)
    }
}

/// What a reader hands over.
struct Read {
    format: Format,
    items: Items,
    storages: Vec<Storage>,
    contents: Contents,
}

impl Read {
    /// Takes in what another reader found, so that storages keep their identity and no key is there twice.
    fn append(&mut self, other: Self) -> Result<()> {
        let first = self.storages.len();
        for (key, mut item) in other.items {
            if let Item::Tensor(info) = &mut item {
                info.storage += first;
            }
            if self.items.contains_key(&key) {
                return Err(Error::new(ErrorKind::KeyCollision, "two tensors have this key").of_key(key));
            }
            self.items.insert(key, item);
        }
        self.storages.extend(other.storages.into_iter().map(|storage| storage.renumbered(first)));
        let (ours, theirs) = (&mut self.contents, other.contents);
        ours.values.extend(theirs.values);
        ours.unknown_globals.extend(theirs.unknown_globals);
        ours.notices.extend(theirs.notices);
        Ok(())
    }
}
