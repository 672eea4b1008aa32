//! Handles that a library makes for what is bound, and forgets.
//!
//! An update gives every constant a shallow handle of the library's own. Libraries that torch 2.13 and 2.14 compiled never
//! delete it (`MaybeOwningAtenTensorHandle` in `aoti_runtime/utils.h`), which lost 377 bytes a constant at each refit;
//! those of 2.15 own it. So for the former, the container deletes what an update has replaced.
//!
//! To delete what the library owns would corrupt memory. So nothing is concluded from version numbers: each library is
//! tried once, with a tensor that says when it is gone.

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Container;
use crate::device::Device;
use crate::error::Result;
use crate::library::Pair;
use crate::tensor::Tensor;
use crate::torch::{RawTensor, Torch};

/// What the tensors of a trial hold. Nobody reads or writes it.
static BYTE: u8 = 0;

/// The handles that are ours to delete, of either set. Empty for a library that deletes its own.
#[derive(Default)]
pub(super) struct Handles {
    active: Vec<Tensor>,
    spare: Vec<Tensor>,
}

impl Handles {
    /// Follows a swap of the sets.
    pub fn swap(&mut self) {
        std::mem::swap(&mut self.active, &mut self.spare);
    }
}

impl Container {
    /// Binds every row of the spare set, and deletes the handles of before if the library has forgotten them. The caller
    /// holds `refit`, where `handles` are.
    ///
    /// The handles that are replaced may be to memory that is gone by now. Nothing has read through them since.
    pub(super) fn update(&self, pairs: &[Pair], handles: &mut Handles) -> Result<()> {
        let forgets = self.library.forgets(|| self.try_forgets(handles).unwrap_or(false));
        self.bind(pairs)?;
        if forgets {
            // SAFETY: the library makes handles for every row it binds and deletes none of them.
            handles.spare = unsafe { self.own(self.made()) };
        }
        Ok(())
    }

    /// Binds a tensor to every row of the spare set, then another one, and sees whether the first is gone.
    ///
    /// False too for what cannot be told: the handles are then lost, as they would be without us.
    fn try_forgets(&self, handles: &mut Handles) -> Result<bool> {
        let (Some((first, first_lives)), Some((second, _))) = (watched(&self.torch)?, watched(&self.torch)?) else {
            return Ok(false);
        };
        if !self.device.is_host() || self.library.functions().extract.is_none() {
            return Ok(false);
        }
        self.bind(&self.all_to(&first))?;
        let made = self.made();
        drop(first);
        self.bind(&self.all_to(&second))?;
        if made.is_empty() || !first_lives.load(Ordering::Acquire) {
            return Ok(false);
        }
        // SAFETY: every row has another tensor now, and yet a handle of the first one is there, which only the library
        // can have made. It treats all rows alike.
        drop(unsafe { self.own(made) });
        // SAFETY: as those of the first.
        handles.spare = unsafe { self.own(self.made()) };
        Ok(true)
    }

    /// A full set of bindings to one tensor, which is never read.
    fn all_to(&self, tensor: &Tensor) -> Vec<Pair> {
        let rows = self.constants.iter().zip(&self.c_names).filter(|(constant, _)| !constant.folded);
        rows.map(|(_, name)| Pair { name: name.as_ptr(), tensor: tensor.as_raw() }).collect()
    }

    fn bind(&self, pairs: &[Pair]) -> Result<()> {
        let update = &self.library.functions().update;
        // SAFETY: the container and the handles are live, `pairs` has `pairs.len()` entries, and no other thread touches
        // the spare set: `refit` is locked.
        let status = unsafe { (update.call)(self.raw(), pairs.as_ptr(), pairs.len(), true, true) };
        self.library.check(update, status)
    }

    /// The library's own handles of the spare set; none if it does not tell.
    fn made(&self) -> Vec<RawTensor> {
        self.pairs(true).unwrap_or_default().iter().map(|pair| pair.tensor).collect()
    }

    /// # Safety
    /// The handles are live, and nobody else deletes them.
    unsafe fn own(&self, made: Vec<RawTensor>) -> Vec<Tensor> {
        // SAFETY: the caller vouches for them.
        made.into_iter().filter_map(|raw| unsafe { Tensor::from_raw(&self.torch, raw) }.ok()).collect()
    }
}

/// A tensor in host memory, and whether it lives; `None` if this libtorch does not tell the one from the other.
fn watched(torch: &Torch) -> Result<Option<(Tensor, Arc<AtomicBool>)>> {
    let Some((tensor, lives)) = try_watched(torch)? else { return Ok(None) };
    drop(tensor);
    if lives.load(Ordering::Acquire) { Ok(None) } else { try_watched(torch) }
}

fn try_watched(torch: &Torch) -> Result<Option<(Tensor, Arc<AtomicBool>)>> {
    let Some(make) = &torch.shim().from_blob_watched else { return Ok(None) };
    let lives = Arc::new(AtomicBool::new(true));
    let (data, context) = ((&raw const BYTE).cast_mut().cast(), Arc::into_raw(Arc::clone(&lives)).cast_mut().cast());
    let (one, device, mut raw) = ([1], Device::CPU, null_mut());
    // SAFETY: one element of 8 bits (dtype code 0) at an address that is there for ever; the arrays have one entry each
    // and are copied; `gone` takes the context, once.
    let status = unsafe {
        let (layout, sizes) = ((torch.shim().layout_strided.call)(), one.as_ptr());
        let (kind, index) = (device.kind, device.index);
        (make.call)(data, 1, sizes, sizes, 0, 0, kind, index, &raw mut raw, layout, null(), 0, gone, context)
    };
    torch.check(make, status)?;
    // SAFETY: a new handle, or null, which is an error.
    Ok(Some((unsafe { Tensor::from_raw(torch, raw)? }, lives)))
}

/// Called by libtorch when the tensor's memory is let go of.
unsafe extern "C" fn gone(_data: *mut c_void, context: *mut c_void) {
    // SAFETY: what `try_watched` gave away, and libtorch calls this once.
    let lives = unsafe { Arc::from_raw(context.cast::<AtomicBool>()) };
    lives.store(false, Ordering::Release);
}
