//! Compiled packages and the slots in them that hold weights.
//!
//! Opening reads metadata only. [`aotinductor`] reads the `.pt2` that `torch._inductor.aoti_compile_and_package` and
//! `reweft.torch.trace` write; `stored` reads everything else that holds tensors in places of their own: exported
//! programs, TorchScript archives and checkpoints; `stripped` reads any of them without its weights.

pub mod aotinductor;
mod checksum;
mod folded;
mod library;
pub mod manifest;
mod signature;
mod stored;
pub(crate) mod stripped;
mod version;

pub use checksum::Checksum;
pub(crate) use checksum::{Change, update};
pub use folded::{Folded, Original, Packed};
pub use version::weights_version;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::suggest;
use crate::limits::Limits;
use crate::recipe::Recipe;
use crate::source::{self, Access, Source, Window};
use crate::tensor::{TensorInfo, is_dense};
use crate::write;
use manifest::Manifest;

/// What the compiler took a slot's tensor for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SlotKind {
    /// A parameter of the module.
    Parameter,
    /// A buffer of the module, or a tensor attribute that `trace` made one.
    Buffer,
    /// A tensor that was lifted out of the program; its origin is not recorded.
    Constant,
    /// A tensor of a file that does not say what it is.
    Tensor,
}

/// The place in an artifact that holds one tensor.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The first name the tensor had in its module.
    pub name: String,
    /// Its other names: tied parameters.
    pub aliases: Vec<String>,
    /// The identifier in the compiled program, by which the runtime binds it.
    pub constant: String,
    /// Parameter, buffer or lifted constant.
    pub kind: SlotKind,
    /// Whether a state_dict of the module has it; others keep their value unless a checkpoint names them.
    pub persistent: bool,
    /// Whether the program writes to it while it runs.
    pub mutated: bool,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// Elements between neighbours, as compiled; dense for every slot that can be refitted.
    pub strides: Vec<u64>,
    /// Which of the artifact's weights it lies in: a record, a part of a library, a storage. `None` if the file does not
    /// hold its bytes.
    pub region: Option<usize>,
    /// First byte within the region.
    pub byte_offset: u64,
    /// Bytes of the elements.
    pub nbytes: u64,
    /// Bytes of the row with its padding.
    pub row_nbytes: u64,
    /// Further places of the same bytes, as region and first byte in it: a package may hold weights inside the library and
    /// beside it.
    pub copies: Vec<(usize, u64)>,
    /// BLAKE3 of the slot's bytes as the manifest states it.
    pub hash: Option<String>,
    /// Why the reader of the file says that new weights cannot go here.
    pub blocked: Option<String>,
    /// Whether its bytes were left out of the file, so that it must be filled before the file is of use.
    pub stripped: bool,
    /// How its bytes are made, if it holds what the compiler folded or packed and the manifest says of what: over names of
    /// [`Artifact::originals`] and of slots.
    pub recipe: Option<Recipe>,
    /// The tensor that the program sees, where the bytes are packed for oneDNN.
    pub packed: Option<Packed>,
}

impl Slot {
    /// Name and aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }

    /// Whether the compiler made its value of weights, as `freezing=True` does, and nothing says how.
    pub fn is_folded(&self) -> bool {
        // The identifier, because names are the module's where nothing was compiled, and models' names may stand before them.
        self.constant.starts_with("_frozen_param") && self.recipe.is_none()
    }

    /// Why new weights cannot go here, if so.
    pub fn obstacle(&self) -> Option<&str> {
        if self.is_folded() {
            Some("the compiler folded or packed weights into it (freezing=True); its value is not a key's")
        } else if self.is_numbered() {
            Some("a tensor attribute that the compiler lifted out under a number; its name is not recorded")
        } else if let Some(why) = &self.blocked {
            Some(why)
        } else if !is_dense(&self.shape, &self.strides) {
            Some("it is a view with gaps or repeats of a larger storage")
        } else {
            None
        }
    }

    /// Whether its name is a number that the compiler gave.
    pub fn is_numbered(&self) -> bool {
        self.constant.starts_with("_tensor_constant")
    }
}

/// A tensor of the module that no slot holds, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unrefittable {
    /// Its name in the module.
    pub name: String,
    /// What became of it.
    pub reason: String,
}

/// What kind of file an artifact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// A `.pt2` package that AOTInductor compiled.
    Aotinductor,
    /// A library that AOTInductor compiled, beside its source.
    Library,
    /// A `.pt2` of `torch.export.save`.
    Exported,
    /// An archive of `torch.jit.save`.
    TorchScript,
    /// A file of weights alone.
    Checkpoint,
}

impl Kind {
    /// The name that people use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aotinductor => "AOTInductor package",
            Self::Library => "AOTInductor library",
            Self::Exported => "exported program",
            Self::TorchScript => "TorchScript archive",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// Why a package holds no weights that could be replaced, and what to do about it.
#[derive(Clone, Debug)]
pub struct Absent {
    /// The reason.
    pub why: String,
    /// The way out.
    pub hint: &'static str,
}

/// What is behind the slots.
#[derive(Debug)]
enum Holds {
    /// A compiled program with its rows.
    Program(Box<aotinductor::Program>),
    /// Tensors in storages, as a checkpoint has them.
    Storages(Box<stored::Stored>),
}

/// A compiled package, or another file that holds tensors: its slots, and what it says of weights that are not there.
#[derive(Debug)]
pub struct Artifact {
    path: PathBuf,
    source: Source,
    /// The file of a stripped artifact, whose source is what the whole file would be.
    stripped: Option<Source>,
    kind: Kind,
    slots: Vec<Slot>,
    originals: Vec<Slot>,
    unused: Vec<String>,
    unrefittable: Vec<Unrefittable>,
    holds: Holds,
}

/// Whether a file begins like a library, or like an archive that says it is a `.pt2` package. Reads the directory and one
/// small record.
pub fn detect(source: &Source) -> bool {
    stripped::detect(&**source)
        || library::detect(&**source)
        || Archive::detect(&**source)
            && Archive::open(source.clone()).is_ok_and(|archive| aotinductor::is_package(&archive))
}

impl Artifact {
    /// Opens an artifact; content tells what it is. Reads metadata only: directory, manifest, the text of the wrapper
    /// source, the symbols of a library; of other files what [`Checkpoint::open`] reads. An in-place rewrite that was cut
    /// short is finished first.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Format`] for a damaged file or a manifest that contradicts the program,
    /// [`ErrorKind::Unsupported`] for another kind of file.
    ///
    /// # Examples
    /// ```no_run
    /// use reweft::source::Access;
    ///
    /// let artifact = reweft::Artifact::open("net.pt2".as_ref(), Access::Read, &reweft::Limits::default())?;
    /// for slot in artifact.slots() {
    ///     println!("{} {} {:?}", slot.name, slot.dtype, slot.shape);
    /// }
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn open(path: &Path, access: Access, limits: &Limits) -> Result<Self> {
        write::recover(path)?;
        let file = source::open(path, access)?;
        let read = || {
            if !stripped::detect(&*file) {
                return Self::read(path, file, access, limits);
            }
            let (whole, left_out) = stripped::read(&file, limits)?;
            let mut artifact = Self::read(path, whole, access, limits)?;
            artifact.mark_stripped(&left_out)?;
            Ok(Self { stripped: Some(file), ..artifact })
        };
        read().map_err(|error| error.in_file(path))
    }

    fn read(path: &Path, source: Source, access: Access, limits: &Limits) -> Result<Self> {
        let artifact = if detect(&source) {
            aotinductor::read(path, source, limits)?
        } else {
            stored::read(path, source, access, limits)?
        };
        artifact.check_names()?;
        Ok(artifact)
    }

    /// Marks the slots whose bytes are not in the file. What was left out must be slots and nothing else: where code or
    /// names were, there are zeros now.
    fn mark_stripped(&mut self, left_out: &[Range<u64>]) -> Result<()> {
        let mut found = Vec::new();
        for number in 0..self.slots.len() {
            let places = self.strippable(&self.slots[number])?;
            let is_out = |place: &Range<u64>| {
                let next = left_out.partition_point(|range| range.end < place.end);
                left_out.get(next).is_some_and(|range| range.start <= place.start && place.end <= range.end)
            };
            if !places.is_empty() && places.iter().all(is_out) {
                self.slots[number].stripped = true;
                self.strip_originals(number);
                found.extend(places);
            }
        }
        if stripped::merged(found) == left_out {
            return Ok(());
        }
        Err(Error::format("the ranges that were left out are not those of slots").in_record(stripped::ABOUT))
    }

    /// What a slot without bytes was made of cannot stay as it is either.
    fn strip_originals(&mut self, number: usize) {
        let recipe = self.slots[number].recipe.as_ref();
        for original in &mut self.originals {
            original.stripped |= recipe.is_some_and(|recipe| recipe.keys().any(|key| key == original.name));
        }
    }

    /// The places of a slot that can be left out of a file: one that a refit can fill, and that a state_dict has.
    pub(crate) fn strippable(&self, slot: &Slot) -> Result<Vec<Range<u64>>> {
        if slot.obstacle().is_some() || slot.region.is_none() || !slot.persistent || slot.nbytes == 0 {
            return Ok(Vec::new());
        }
        Ok(self.places(slot)?.into_iter().map(|place| place..place + slot.nbytes).collect())
    }

    /// Refuses a package in which a name means two slots: a key would fill both.
    fn check_names(&self) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        match self.slots.iter().chain(&self.originals).flat_map(Slot::names).find(|name| !seen.insert(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::format("two slots have this name").of_key(name)),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes; those of a stripped one are what the whole file's would be, with zeros for weights.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The file that is read.
    pub(crate) fn file(&self) -> Option<&File> {
        self.stripped.as_ref().unwrap_or(&self.source).file()
    }

    /// Whether weights were left out of the file.
    pub fn is_stripped(&self) -> bool {
        self.stripped.is_some()
    }

    /// Refuses a stripped file.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub fn check_whole(&self) -> Result<()> {
        if !self.is_stripped() {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Unsupported, "the file was stripped of its weights").in_file(&self.path);
        Err(error.with_hint("a refit makes a whole file of it: reweft refit FILE CHECKPOINT -o OUT"))
    }

    /// What kind of file it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The slots in the order of their bytes, as far as the kind of file has one.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Tensors of the module that the compiler folded into slots and that no slot holds as they are. They have no bytes here:
    /// only [recipes](Slot::recipe) name them.
    pub fn originals(&self) -> &[Slot] {
        &self.originals
    }

    /// Every tensor of the module that a key can be meant for: slots that hold one, then [originals](Self::originals).
    pub fn tensors(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.recipe.is_none()).chain(&self.originals)
    }

    /// The slots that have a name, or that are made of the original that has it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] with the nearest name.
    pub fn explain(&self, name: &str) -> Result<Vec<&Slot>> {
        let is_named = |slot: &&Slot| slot.names().any(|other| other == name);
        let original = self.originals().iter().find(is_named);
        let is_of = |slot: &Slot| {
            let mut keys = slot.recipe.iter().flat_map(Recipe::keys);
            original.is_some_and(|original| keys.any(|key| key == original.name))
        };
        let found: Vec<&Slot> = self.slots.iter().filter(|slot| is_named(slot) || is_of(slot)).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let hint = suggest(name, self.slots.iter().chain(self.originals()).flat_map(Slot::names));
        let error = Error::new(ErrorKind::NotFound, "no slot has this name, and none is made of such a tensor");
        Err(error.of_key(name).in_file(&self.path).with_hint(hint))
    }

    /// Names of module tensors that the program does not read; any value of theirs is right.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Module tensors that no slot holds although the program depends on them.
    pub fn unrefittable(&self) -> &[Unrefittable] {
        &self.unrefittable
    }

    /// The compiled program, if it is one.
    pub fn program(&self) -> Option<&aotinductor::Program> {
        match &self.holds {
            Holds::Program(program) => Some(program),
            Holds::Storages(_) => None,
        }
    }

    /// The archive of a compiled package, and its first model: the only one of a package that has a manifest.
    pub fn package(&self) -> Option<(&Arc<Archive>, &aotinductor::Records)> {
        let program = self.program()?;
        Some((program.archive()?, program.models().first()?))
    }

    /// What `reweft` wrote down about the origin of every slot when it compiled the package, if it did.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.program()?.manifest.as_ref()
    }

    /// The version of the weights by the hashes that the manifest states, which is that of a model that runs on them. Reads
    /// nothing. `None` for an artifact without a manifest, or without weights.
    pub fn weights_version(&self) -> Option<String> {
        self.manifest().filter(|_| !self.is_stripped())?;
        let rows: Option<Vec<_>> = self.slots.iter().map(|slot| Some((slot, slot.hash.as_deref()?))).collect();
        rows.map(weights_version)
    }

    /// Whether all tensors of the module are accounted for: by a manifest, or because nothing was compiled.
    pub fn is_complete(&self) -> bool {
        self.program().is_none_or(|program| program.manifest.is_some())
    }

    /// Why a program's weights cannot be replaced at all, if so.
    pub fn absent(&self) -> Option<&Absent> {
        self.program().filter(|_| !self.slots.is_empty())?.absent.as_ref()
    }

    /// Where a slot's first byte stands in the file. May read the header of its record.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the file does not hold its bytes as they are. In a stripped file it is the place that
    /// the bytes will have in the whole one.
    pub fn place(&self, slot: &Slot) -> Result<u64> {
        let place = match slot.region {
            // Where nothing stands there is no place.
            _ if slot.nbytes == 0 => Ok(0),
            Some(region) => self.locate(slot, (region, slot.byte_offset)),
            None => {
                let absent = self.absent();
                let why = absent.map_or("it has no bytes here", |absent| &absent.why);
                let error = Error::new(ErrorKind::Unsupported, why);
                Err(if let Some(absent) = absent { error.with_hint(absent.hint) } else { error })
            }
        };
        place.map_err(|error| error.of_key(&slot.name).in_file(&self.path))
    }

    /// All places of a slot's bytes in the file.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub(crate) fn places(&self, slot: &Slot) -> Result<Vec<u64>> {
        let mut places = vec![self.place(slot)?];
        for copy in slot.copies.iter().filter(|_| slot.nbytes > 0) {
            let place = self.locate(slot, *copy);
            places.push(place.map_err(|error| error.of_key(&slot.name).in_file(&self.path))?);
        }
        Ok(places)
    }

    fn locate(&self, slot: &Slot, (region, byte_offset): (usize, u64)) -> Result<u64> {
        let start = match &self.holds {
            Holds::Program(program) => program.place(region, byte_offset)?,
            Holds::Storages(stored) => stored.place(region, byte_offset)?,
        };
        source::check_range(self.source.len(), start, slot.nbytes).map(|_| start)
    }

    /// Reads a slot's present bytes in its compiled layout.
    ///
    /// # Errors
    /// As [`place`](Self::place), [`ErrorKind::Unsupported`] for a slot that was stripped, and read errors. The record's
    /// CRC is not compared: a slot is only part of it.
    pub fn read_slot(&self, slot: &Slot) -> Result<Vec<u8>> {
        if slot.stripped {
            self.check_whole()?;
        }
        let start = self.place(slot)?;
        source::read_vec(&*self.source, start, slot.nbytes)
            .map_err(|error| error.of_key(&slot.name).in_file(&self.path))
    }

    /// The CRCs that the file states over the bytes of some slots, once each; a record in a record stands before the one
    /// around it.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] where an archive contradicts itself.
    pub fn checksums<'a>(&self, slots: impl IntoIterator<Item = &'a Slot>) -> Result<Vec<Checksum>> {
        let copies = |slot: &'a Slot| slot.copies.iter().map(|(region, _)| *region);
        let regions = slots.into_iter().flat_map(|slot| slot.region.into_iter().chain(copies(slot)));
        let mut regions: Vec<usize> = regions.collect();
        regions.sort_unstable();
        regions.dedup();
        let mut checksums = match &self.holds {
            Holds::Program(program) => program.checksums(&regions),
            Holds::Storages(stored) => stored.checksums(&regions),
        }
        .map_err(|error| error.in_file(&self.path))?;
        checksums.sort_by_key(|checksum| (checksum.covers.end - checksum.covers.start, checksum.covers.start));
        checksums.dedup();
        Ok(checksums)
    }

    /// Compares the CRCs of all records that hold weights. Reads all weight bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if one is wrong; read errors.
    pub fn check_weights(&self) -> Result<()> {
        let checksums = self.checksums(&self.slots)?;
        let mut outermost = Checksum::outermost(&checksums).into_iter();
        outermost.try_for_each(|checksum| checksum.check(&*self.source)).map_err(|error| error.in_file(&self.path))
    }

    /// Finds the slot that has this name or alias.
    pub fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.names().any(|other| other == name))
    }

    /// The weights as a checkpoint, under every name that a slot has; slots without bytes here are left out, and so is
    /// what a compiler folded, which a notice names. Compares the CRCs first, which reads all weight bytes; copies none.
    ///
    /// # Errors
    /// As [`check_weights`](Self::check_weights), [`check_whole`](Self::check_whole) and [`place`](Self::place).
    pub fn weights(&self) -> Result<Checkpoint> {
        self.check_whole()?;
        if let Holds::Storages(stored) = &self.holds {
            return Ok(stored.checkpoint.clone());
        }
        self.check_weights()?;
        let (mut storages, mut tensors) = (Vec::new(), Vec::new());
        for slot in self.slots.iter().filter(|slot| slot.region.is_some()) {
            // The row with its padding, since a view may reach into it.
            let nbytes = slot.row_nbytes.max(slot.nbytes);
            let window = Window::new(self.source.clone(), self.place(slot)?, nbytes)
                .map_err(|error| error.of_key(&slot.name).in_file(&self.path))?;
            let (dtype, shape, strides) = (slot.dtype, slot.shape.clone(), slot.strides.clone());
            let info = TensorInfo { dtype, shape, strides, storage: storages.len(), storage_offset: 0 };
            storages.push(Arc::new(window) as Source);
            tensors.extend(slot.names().map(|name| (name.to_owned(), info.clone())));
        }
        self.read_back(&Checkpoint::from_memory(&self.path, storages, tensors)?)
    }

    /// From a checkpoint of the slots' own bytes to the tensors of the module, as far as they can be read back: what was
    /// only moved, and not what was folded into others.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if a slot is not in the checkpoint.
    pub fn read_back(&self, slots: &Checkpoint) -> Result<Checkpoint> {
        if self.slots.iter().all(|slot| slot.recipe.is_none()) {
            return Ok(slots.clone());
        }
        let (mut tensors, mut folded) = (Vec::new(), Vec::new());
        for slot in self.slots.iter().filter(|slot| slot.recipe.is_none() && slots.contains(&slot.name)) {
            tensors.extend(slot.names().map(|name| (name.to_owned(), Recipe::leaf(&slot.name))));
        }
        for original in self.originals() {
            let of_it = self.slots.iter().filter_map(|slot| Some((slot, slot.recipe.as_ref()?)));
            let mut of_it = of_it.filter(|(_, recipe)| recipe.keys().eq([original.name.as_str()]));
            match of_it.find_map(|(slot, recipe)| recipe.inverse(&slot.name, original.dtype, &original.shape)) {
                Some(recipe) => tensors.extend(original.names().map(|name| (name.to_owned(), recipe.clone()))),
                None => folded.extend(original.names()),
            }
        }
        let read = slots.remade(&tensors)?;
        let what = "the compiler folded them into others, so they cannot be read back";
        Ok(if folded.is_empty() { read } else { read.noticed(format!("{what}: {}", folded.join(", "))) })
    }
}
