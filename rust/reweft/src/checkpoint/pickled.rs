//! Storages that were pickled by themselves, as `pickle.dump` does it with a tensor: a legacy stream of their own, in
//! bytes within the pickle. Source: `TypedStorage.__reduce__` of torch 2.15.

use std::sync::Arc;

use reweft_pickle::{NodeId, Value};

use super::numpy::{self, Data};
use super::persistent::{StorageId, View, storage_id};
use super::rebuild::{Places, Rebuild, Saved};
use super::storage::Extent;
use super::{OpenOptions, Storage, torch_legacy};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{Source, Window};

impl Rebuild<'_> {
    /// The storage that a call of `_load_from_bytes` would give; `None` if a value is something else.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) where the stream contradicts itself.
    pub(super) fn pickled_storage(&mut self, id: NodeId) -> Result<Option<View>> {
        let pickle = self.saved.pickle;
        let Some((("torch.storage", "_load_from_bytes"), object)) = pickle.as_call(id) else { return Ok(None) };
        let args = pickle.as_tuple(object.args).unwrap_or_default();
        let data = args.first().and_then(|bytes| numpy::bytes(pickle, *bytes));
        let start = match data {
            Some(Data::Bytes(bytes)) => bytes.as_ptr().addr(),
            Some(Data::Latin1(text)) => text.as_ptr().addr(),
            _ => return Err(Error::format("a pickled storage without its bytes")),
        };
        if let Some(view) = self.pickled.get(&start) {
            return Ok(Some(*view));
        }
        let source: Source = match data {
            Some(Data::Bytes(bytes)) if let Some((source, byte_offset)) = self.place_of(bytes) => {
                Arc::new(Window::new(source, byte_offset, bytes.len() as u64)?)
            }
            data => {
                let bytes = data.and_then(Data::bytes);
                Arc::new(bytes.ok_or_else(|| Error::format("bytes of a storage are no Latin-1 text"))?.into_owned())
            }
        };
        let (storage, first, nbytes) = torch_legacy::visit(&source, &OpenOptions::default(), |saved| only(&saved))?;
        self.storages.push(storage);
        let view = View { storage: self.storages.len() - 1, byte_offset: first, nbytes };
        self.pickled.insert(start, view);
        Ok(Some(view))
    }
}

/// The storage that a stream consists of, and which of its bytes are meant.
fn only(saved: &Saved<'_>) -> Result<(Storage, u64, u64)> {
    let (pickle, globals) = (saved.pickle, super::globals::Globals::new(saved.pickle));
    let (Value::Persistent(pid), Places::File(source, places)) = (pickle.get(pickle.root()), &saved.places) else {
        return Err(Error::format("a pickled storage that holds something else"));
    };
    let StorageId { key, dtype, device, numel, view } = storage_id(pickle, &globals, *pid)?;
    let found = places.get(key).filter(|(_, found)| *found == numel);
    let (start, _) = *found.ok_or_else(|| Error::format(format!("the stream has no storage {key:?} of {numel}")))?;
    let itemsize = dtype.and_then(Dtype::itemsize).unwrap_or(1);
    // No overflow: the stream's own places were held against its length.
    let extent = Extent { dtype, nbytes: numel * itemsize, device: device.into() };
    let storage = Storage::range(source.clone(), start, "", extent);
    let storage = if saved.big_endian { storage.swapped() } else { storage };
    Ok((storage, view.0 * itemsize, view.1 * itemsize))
}
