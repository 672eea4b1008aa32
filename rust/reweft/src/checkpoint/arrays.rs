//! Arrays of numpy as tensors: their bytes stay where they are, inside the pickle, where the file has them as they are.
//!
//! An array of texts, dates or objects is no tensor and is listed as a value.

use std::sync::Arc;

use reweft_pickle::NodeId;

use super::globals::global_dtype;
use super::numpy::{self, Array, Data};
use super::rebuild::{Rebuild, Rebuilt};
use super::storage::Extent;
use super::{Item, Storage};
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;
use crate::tensor::{TensorInfo, numel};

impl Rebuild<'_> {
    /// The tensor that an array is, or what it is instead.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] where the array contradicts itself.
    pub(super) fn array(&mut self, id: NodeId) -> Result<Rebuilt> {
        let array = match numpy::array(self.saved.pickle, id) {
            Ok(Some(array)) => array,
            Ok(None) => return Err(Error::format("a call of numpy that makes no array")),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                return Ok(Rebuilt::Item(Item::Unreadable(error.to_string())));
            }
            Err(error) => return Err(error),
        };
        if array.descr.is_no_number() {
            return Ok(Rebuilt::Value(array.describe()));
        }
        let Some(dtype) = array.descr.dtype else {
            return Ok(Rebuilt::Item(Item::Unreadable(format!(
                "it is a {}, which is no dtype of tensors",
                array.describe()
            ))));
        };
        if let Some(class) = &array.class {
            self.notices.push(format!("an array of class {class} is read as its plain payload"));
        }
        let info = self.array_info(id, &array, dtype, dtype, "cpu")?;
        Ok(Rebuilt::Item(Item::Tensor(info)))
    }

    /// `(array, dtype, device, requires_grad)`: bfloat16 travels as float32, because numpy lacks it.
    pub(super) fn device_array(&mut self, args: &[NodeId]) -> Result<Item> {
        let pickle = self.saved.pickle;
        let [id, wanted, device, ..] = args else {
            return Err(Error::format(format!("tensor of {} arguments, wanted 4", args.len())));
        };
        let array = match numpy::array(pickle, *id) {
            Ok(Some(array)) => array,
            Ok(None) => return Ok(Item::Unreadable(format!("it is made of {}", pickle.describe(*id)))),
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Item::Unreadable(error.to_string())),
            Err(error) => return Err(error),
        };
        match (array.descr.dtype, global_dtype(pickle, *wanted)) {
            (Some(dtype), Some(wanted)) if dtype == wanted || (dtype, wanted) == (Dtype::F32, Dtype::BF16) => {
                let device = pickle.as_str(*device).unwrap_or("cpu").to_owned();
                Ok(Item::Tensor(self.array_info(*id, &array, dtype, wanted, &device)?))
            }
            _ => Ok(Item::Unreadable(format!("it is a {} that stands for another dtype", array.describe()))),
        }
    }

    fn array_info(
        &mut self,
        id: NodeId,
        array: &Array<'_>,
        dtype: Dtype,
        wanted: Dtype,
        device: &str,
    ) -> Result<TensorInfo> {
        let storage = if let Some(number) = self.arrays.get(&(id, wanted)) {
            *number
        } else {
            let storage = self.array_storage(array, dtype, wanted, device)?;
            self.storages.push(storage);
            self.arrays.insert((id, wanted), self.storages.len() - 1);
            self.storages.len() - 1
        };
        let (shape, strides) = (array.shape.clone(), array.strides.clone());
        let info = TensorInfo { dtype: wanted, shape, strides, storage, storage_offset: 0 };
        info.window(self.storages[storage].nbytes)?;
        Ok(info)
    }

    /// The bytes of an array: a window of the file, or of memory where the file has them in another form.
    fn array_storage(&mut self, array: &Array<'_>, dtype: Dtype, wanted: Dtype, device: &str) -> Result<Storage> {
        let place = match array.data {
            Data::Bytes(bytes) if dtype == wanted => self.place_of(bytes).map(|place| (place, bytes.len() as u64)),
            _ => None,
        };
        let ((source, byte_offset), nbytes) = if let Some(found) = place {
            found
        } else {
            let source = self.unpacked(array, dtype, wanted)?;
            let nbytes = source.len();
            ((source, 0), nbytes)
        };
        let needed = numel(&array.shape).and_then(|numel| wanted.nbytes(numel));
        if needed != Some(nbytes) {
            return Err(Error::format(format!("{} holds {nbytes} bytes", array.describe())));
        }
        let extent = Extent { dtype: Some(wanted), nbytes, device: device.into() };
        let storage = Storage::range(source, byte_offset, "", extent);
        // What was cast was turned before.
        Ok(if array.descr.big_endian && dtype == wanted { storage.swapped() } else { storage })
    }

    /// The bytes of an array in memory, once for each text that they are read from, however many arrays use it.
    fn unpacked(&mut self, array: &Array<'_>, dtype: Dtype, wanted: Dtype) -> Result<Source> {
        let start = match array.data {
            Data::Bytes(bytes) => bytes.as_ptr().addr(),
            Data::Latin1(text) => text.as_ptr().addr(),
            Data::Objects(_) => return Err(Error::format("an array of objects has no bytes")),
        };
        let cast = (dtype != wanted).then_some(array.descr.big_endian);
        if let Some(source) = self.unpacked.get(&(start, cast)) {
            return Ok(source.clone());
        }
        let held = array.data.bytes().ok_or_else(|| Error::format("bytes of an array are no Latin-1 text"))?;
        let mut held = held.into_owned();
        if let Some(big_endian) = cast {
            if big_endian {
                held.chunks_exact_mut(dtype.swap_unit().max(1)).for_each(<[u8]>::reverse);
            }
            held = convert::cast(&held, dtype, wanted)?;
        }
        let source: Source = Arc::new(held);
        self.unpacked.insert((start, cast), source.clone());
        Ok(source)
    }

    /// Where a slice of the pickle stands in the file.
    pub(super) fn place_of(&self, bytes: &[u8]) -> Option<(Source, u64)> {
        let (source, start) = self.saved.origin.as_ref()?;
        let whole = self.saved.bytes.as_ptr_range();
        let range = bytes.as_ptr_range();
        if range.start < whole.start || range.end > whole.end {
            return None;
        }
        let distance = range.start.addr().checked_sub(whole.start.addr())?;
        Some((source.clone(), start.checked_add(distance as u64)?))
    }
}
