//! The storages of a checkpoint together, and from a tensor to its bytes.

use std::borrow::Cow;
use std::sync::Arc;

use super::Storage;
use super::made::Making;
use crate::convert;
use crate::error::{Error, ErrorKind, Result};
use crate::replay::Replay;
use crate::source;
use crate::tensor::{TensorInfo, contiguous, same_layout};

/// Most layers of tensors that are made of made tensors; each is a call within a call when bytes are read.
const MAX_DEPTH: usize = 64;

/// The storages of a checkpoint by number: those of its file, and those that are made of them when they are read.
///
/// Cheap to clone; a clone sees the same storages and the same checked CRCs.
#[derive(Clone, Debug)]
pub struct Storages {
    read: Arc<Vec<Storage>>,
    made: Arc<Vec<Arc<Storage>>>,
    /// Made since the last [`seal`](Self::seal), so that adding some to a checkpoint with many copies nothing.
    added: Vec<Arc<Storage>>,
    /// Bytes that a tensor which repeats its storage may take when it is written out.
    max_repeated_nbytes: u64,
    /// What carries out the operations that the engine has not.
    replay: Option<Arc<dyn Replay>>,
}

impl Storages {
    pub(super) fn new(read: Vec<Storage>, max_repeated_nbytes: u64) -> Self {
        Self { read: Arc::new(read), made: Arc::default(), added: Vec::new(), max_repeated_nbytes, replay: None }
    }

    pub(super) fn with_replay(self, replay: Arc<dyn Replay>) -> Self {
        Self { replay: Some(replay), ..self }
    }

    pub(crate) fn replay(&self) -> Option<&dyn Replay> {
        self.replay.as_deref()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.read.len() + self.made.len() + self.added.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The storage of that number.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a number of another checkpoint.
    pub fn get(&self, number: usize) -> Result<&Storage> {
        let made = || {
            let number = number.checked_sub(self.read.len())?;
            self.made.get(number).or_else(|| self.added.get(number.checked_sub(self.made.len())?)).map(|made| &**made)
        };
        let storage = self.read.get(number).or_else(made);
        storage.ok_or_else(|| Error::new(ErrorKind::Usage, format!("no storage {number}, there are {}", self.len())))
    }

    /// All of them, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Storage> {
        self.read.iter().chain(self.made.iter().chain(&self.added).map(|storage| &**storage))
    }

    /// Adds a storage that is made of others; gives its number.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] for layers upon layers; [`ErrorKind::Format`] if it takes 2^64 bytes.
    pub(super) fn push(&mut self, making: Making) -> Result<usize> {
        let mut depth = 0;
        // What a tensor is combined with may be repeated to its size.
        let held = making.operands().iter().map(|of| Ok(self.get(of.storage)?.nbytes));
        let held = held.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0);
        for operand in making.operands() {
            if !matches!(making, Making::Arithmetic { .. }) || operand.nbytes() > held {
                self.check_repeats(operand)?;
            }
            depth = depth.max(self.get(operand.storage)?.depth() + 1);
        }
        if depth > MAX_DEPTH {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("tensors made of made tensors, more than {MAX_DEPTH} deep"),
            ));
        }
        self.added.push(Arc::new(Storage::made(making, depth)?));
        Ok(self.len() - 1)
    }

    /// Moves what was added to where clones share it.
    pub(super) fn seal(mut self) -> Self {
        if !self.added.is_empty() {
            self.made = Arc::new(self.made.iter().cloned().chain(self.added.drain(..)).collect());
        }
        self
    }

    /// Reads a tensor in a dense layout of the caller's choice, strides in elements, in this machine's byte order.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `out` is not as long as the tensor, [`ErrorKind::Limit`] as
    /// [`check_repeats`](Self::check_repeats); read errors.
    pub(super) fn gather(&self, info: &TensorInfo, strides: &[u64], out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != info.nbytes() {
            let what = format!("tensor of {} bytes, room for {}", info.nbytes(), out.len());
            return Err(Error::new(ErrorKind::Usage, what));
        }
        let storage = self.get(info.storage)?;
        let (byte_offset, nbytes) = info.window(storage.nbytes)?;
        if nbytes == 0 {
            // There is nothing to read, so it does not matter how the storage is kept. Writers agree.
            return Ok(());
        }
        if same_layout(&info.shape, &info.strides, strides) {
            self.read_into(info.storage, byte_offset, out)?;
        } else {
            self.check_repeats(info)?;
            let itemsize = info.dtype.itemsize().ok_or_else(|| {
                let what = format!("elements of {} share bytes, so their order cannot be changed", info.dtype);
                Error::new(ErrorKind::Unsupported, what)
            })?;
            let itemsize = source::to_usize(itemsize)?;
            if let Some(bytes) = storage.as_slice()? {
                let window = source::slice(bytes, byte_offset, nbytes)?;
                convert::relayout(itemsize, &info.shape, window, &info.strides, out, strides)?;
            } else {
                let mut window = source::zeroed(nbytes)?;
                self.read_into(info.storage, byte_offset, &mut window)?;
                convert::relayout(itemsize, &info.shape, &window, &info.strides, out, strides)?;
            }
        }
        swap(storage, info, out);
        Ok(())
    }

    /// The elements of a tensor in row-major order; where they are if they stand so in memory.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub(super) fn elements(&self, info: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        if info.is_contiguous() {
            return self.window(info);
        }
        let mut elements = source::zeroed(info.nbytes())?;
        self.gather(info, &contiguous(&info.shape), &mut elements)?;
        Ok(elements.into())
    }

    /// The bytes from a tensor's first element to its last, in this machine's byte order; where they are if they are in
    /// memory.
    ///
    /// # Errors
    /// Read errors.
    pub(super) fn window(&self, info: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let storage = self.get(info.storage)?;
        let (byte_offset, nbytes) = info.window(storage.nbytes)?;
        if let Some(bytes) = storage.as_slice()? {
            return Ok(source::slice(bytes, byte_offset, nbytes)?.into());
        }
        let mut window = source::zeroed(nbytes)?;
        self.read_into(info.storage, byte_offset, &mut window)?;
        swap(storage, info, &mut window);
        Ok(window.into())
    }

    /// Reads elements of a row-major tensor from the one of number `first` on, as many as `out` takes.
    pub(super) fn read_elements(&self, info: &TensorInfo, first: u64, out: &mut [u8]) -> Result<()> {
        let start = info.storage_offset.checked_add(first).and_then(|first| info.dtype.nbytes(first));
        let start = start.ok_or_else(|| Error::format("offset overflows"))?;
        self.read_into(info.storage, start, out)?;
        swap(self.get(info.storage)?, info, out);
        Ok(())
    }

    /// Reads a range of a storage, in the byte order that it has.
    pub(super) fn read_into(&self, number: usize, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let storage = self.get(number)?;
        match storage.making() {
            Some(making) => making.read_into(self, byte_offset, out),
            None => storage.read_into(byte_offset, out),
        }
    }

    /// Refuses to write a small storage out very often, before anything is allocated.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`].
    pub(crate) fn check_repeats(&self, info: &TensorInfo) -> Result<()> {
        let (limit, held) = (self.max_repeated_nbytes, self.get(info.storage)?.nbytes);
        if info.nbytes() <= limit.max(held) {
            return Ok(());
        }
        let what = format!("tensor repeats {held} bytes to {}; max_repeated_nbytes is {limit}", info.nbytes());
        Err(Error::new(ErrorKind::Limit, what))
    }
}

/// Turns elements of a file of the other byte order.
fn swap(storage: &Storage, info: &TensorInfo, out: &mut [u8]) {
    if storage.is_swapped() {
        out.chunks_exact_mut(info.dtype.swap_unit().max(1)).for_each(<[u8]>::reverse);
    }
}
