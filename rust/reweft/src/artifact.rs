//! Compiled packages and the slots in them that hold weights.
//!
//! Opening reads metadata only. One file per kind; today that is [`aotinductor`], the `.pt2` that
//! `torch._inductor.aoti_compile_and_package` and `reweft.torch.trace` write.

pub mod aotinductor;
pub mod manifest;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{self, Access, Source};
use crate::tensor::is_dense;
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
    /// First byte within the weights record.
    pub byte_offset: u64,
    /// Bytes of the elements.
    pub nbytes: u64,
    /// Bytes of the row with its padding.
    pub row_nbytes: u64,
    /// BLAKE3 of the slot's bytes as the manifest states it.
    pub hash: Option<String>,
}

impl Slot {
    /// Name and aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }

    /// Whether the compiler made its value of several weights, as `freezing=True` does.
    pub fn is_folded(&self) -> bool {
        self.name.starts_with("_frozen_param")
    }

    /// Why new weights cannot go here, if so.
    pub fn obstacle(&self) -> Option<&'static str> {
        if self.is_folded() {
            Some("the compiler folded or packed weights into it (freezing=True); its value is not a key's")
        } else if self.name.starts_with("_tensor_constant") {
            Some("a tensor attribute that the compiler lifted out under a number; its name is not recorded")
        } else if !is_dense(&self.shape, &self.strides) {
            Some("it is a view with gaps or repeats of a larger storage")
        } else {
            None
        }
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

/// A compiled package: its slots, and what it says of weights that are not there.
#[derive(Debug)]
pub struct Artifact {
    path: PathBuf,
    archive: Arc<Archive>,
    records: aotinductor::Records,
    slots: Vec<Slot>,
    unused: Vec<String>,
    unrefittable: Vec<Unrefittable>,
    manifest: Option<Manifest>,
}

/// Whether a file begins like an archive that says it is a `.pt2` package. Reads the directory and one small record.
pub fn detect(source: &Source) -> bool {
    Archive::detect(&**source) && Archive::open(source.clone()).is_ok_and(|archive| aotinductor::is_package(&archive))
}

impl Artifact {
    /// Opens a package. Reads metadata only: the directory, the manifest and the text of the wrapper source.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Format`] for a damaged package or a manifest that contradicts the program,
    /// [`ErrorKind::Unsupported`] for another kind of file or several models in one package.
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
        let source = source::open(path, access)?;
        let artifact = aotinductor::read(path, source, limits).map_err(|error| error.in_file(path))?;
        artifact.check_names().map_err(|error| error.in_file(path))?;
        Ok(artifact)
    }

    /// Refuses a package in which a name means two slots: a key would fill both.
    fn check_names(&self) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        match self.slots.iter().flat_map(Slot::names).find(|name| !seen.insert(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::format("two slots have this name").of_key(name)),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The slots in the order of their bytes.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Names of module tensors that the program does not read; any value of theirs is right.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Module tensors that no slot holds although the program depends on them.
    pub fn unrefittable(&self) -> &[Unrefittable] {
        &self.unrefittable
    }

    /// Whether `reweft` wrote down the origin of every slot when it compiled the package.
    pub fn has_manifest(&self) -> bool {
        self.manifest.is_some()
    }

    /// What `reweft` wrote down when it compiled the package, if it did.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The archive the package is kept in.
    pub fn archive(&self) -> &Arc<Archive> {
        &self.archive
    }

    /// Names of the records that matter.
    pub fn records(&self) -> &aotinductor::Records {
        &self.records
    }

    /// The record that holds the weights.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if they are inside the library, [`ErrorKind::Usage`] if the package has no slots.
    pub fn weights_record(&self) -> Result<&str> {
        if let Some(record) = &self.records.weights {
            return Ok(record);
        }
        let error = if self.slots.is_empty() {
            Error::new(ErrorKind::Usage, "the package holds no weights")
        } else {
            Error::new(ErrorKind::Unsupported, "the weights are inside the library, where they cannot be replaced yet")
                .with_hint("compile with reweft.torch.trace, or with package_constants_on_disk_format=\"binary_blob\"")
        };
        Err(error.in_file(&self.path))
    }

    /// Where the weights record lies in the file: source, first byte, length.
    ///
    /// # Errors
    /// As [`weights_record`](Self::weights_record) and [`Archive::place`].
    pub fn weights(&self) -> Result<(&Source, u64, u64)> {
        let place = self.archive.place(self.weights_record()?).map_err(|error| error.in_file(&self.path))?;
        Ok((self.archive.source(), place.data.start, place.data.end - place.data.start))
    }

    /// Reads a slot's present bytes in its compiled layout.
    ///
    /// # Errors
    /// As [`weights`](Self::weights), and read errors. The record's CRC is not compared: a slot is only part of it.
    pub fn read_slot(&self, slot: &Slot) -> Result<Vec<u8>> {
        let (source, start, _) = self.weights()?;
        source::read_vec(&**source, start + slot.byte_offset, slot.nbytes)
            .map_err(|error| error.of_key(&slot.name).in_file(&self.path))
    }

    /// Compares the CRC of the weights record. Reads all weight bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if it is wrong; as [`weights`](Self::weights); read errors.
    pub fn check_weights(&self) -> Result<()> {
        let record = self.weights_record()?;
        let (source, start, nbytes) = self.weights()?;
        source::crc(&**source, start, nbytes)
            .and_then(|crc| self.archive.check_crc(record, crc))
            .map_err(|error| error.in_file(&self.path))
    }

    /// Finds the slot that has this name or alias.
    pub fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.names().any(|other| other == name))
    }
}
