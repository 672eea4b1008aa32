//! Persistent ids: what a pickle says of a storage that stands outside of it, and what of the storage it means.

use reweft_pickle::{NodeId, Pickle, Value};

use super::globals::Globals;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// A storage, or the part of one that a persistent id means.
#[derive(Clone, Copy)]
pub(super) struct View {
    /// Number of the storage.
    pub storage: usize,
    /// First byte.
    pub byte_offset: u64,
    /// Bytes from there.
    pub nbytes: u64,
}

impl View {
    /// A tensor whose window lies within the view; the storage offset counts from the view's first byte.
    pub fn tensor(self, dtype: Dtype, shape: Vec<u64>, strides: Vec<u64>, storage_offset: u64) -> Result<TensorInfo> {
        let mut info = TensorInfo { dtype, shape, strides, storage: self.storage, storage_offset };
        info.window(self.nbytes)?;
        if self.byte_offset > 0 {
            let itemsize = dtype.itemsize().filter(|itemsize| self.byte_offset.is_multiple_of(*itemsize));
            let first = itemsize.and_then(|itemsize| storage_offset.checked_add(self.byte_offset / itemsize));
            info.storage_offset = first.ok_or_else(|| Error::format("view begins within an element"))?;
        }
        Ok(info)
    }
}

/// What a persistent id says of a storage.
pub(super) struct StorageId<'p> {
    pub key: &'p str,
    pub dtype: Option<Dtype>,
    pub device: &'p str,
    pub numel: u64,
    /// First element and number of elements of the view that the id means; only old files have other views than the
    /// whole.
    pub view: (u64, u64),
}

/// Persistent ids of modules stand beside those of storages in files that hold a whole module.
pub(super) fn names_storage(pickle: &Pickle<'_>, pid: NodeId) -> bool {
    let kind = pickle.as_tuple(pid).and_then(|parts| pickle.as_str(*parts.first()?));
    kind != Some("module")
}

/// Reads `("storage", class, key, location, numel[, (view key, offset, view numel) or None])`.
pub(super) fn storage_id<'p>(pickle: &'p Pickle<'_>, globals: &Globals, pid: NodeId) -> Result<StorageId<'p>> {
    let bad = |what: &str| Err(Error::format(format!("persistent id: {what}")));
    let Some([kind, class, key, device, numel, view @ ..]) = pickle.as_tuple(pid) else {
        return bad("is no tuple of 5 or 6, as torch writes it");
    };
    if pickle.as_str(*kind) != Some("storage") || view.len() > 1 {
        return bad("names something else than a storage");
    }
    let (Some(key), Some(device)) = (pickle.as_str(*key), pickle.as_str(*device)) else {
        return bad("key or location is no text");
    };
    if key.is_empty() || key.contains(['/', '\\']) || key.starts_with('.') {
        return bad("key leaves the folder of the storages");
    }
    let dtype = *globals.storages.get(class).ok_or_else(|| {
        let what = format!("storage class {} is not known", pickle.describe(*class));
        Error::new(ErrorKind::Unsupported, what)
    })?;
    let numel = size(pickle, *numel, "storage size")?;
    let view = match view.first().map(|view| (pickle.as_tuple(*view), pickle.get(*view))) {
        None | Some((_, Value::None)) => (0, numel),
        Some((Some([_, offset, view_numel]), _)) => {
            let (first, count) = (size(pickle, *offset, "view offset")?, size(pickle, *view_numel, "view size")?);
            if first.checked_add(count).is_none_or(|end| end > numel) {
                return bad("view is larger than its storage");
            }
            (first, count)
        }
        Some(_) => return bad("view is no tuple of 3"),
    };
    Ok(StorageId { key, dtype, device, numel, view })
}

/// A number from 0.
pub(super) fn size(pickle: &Pickle<'_>, id: NodeId, what: &str) -> Result<u64> {
    let value = pickle.as_i64(id).and_then(|value| u64::try_from(value).ok());
    value.ok_or_else(|| Error::format(format!("{what} is {}, wanted a number from 0", pickle.describe(id))))
}
