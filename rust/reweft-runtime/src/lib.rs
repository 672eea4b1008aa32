//! Runs models that `AOTInductor` compiled, and gives them new weights while they run.
//!
//! A compiled model is a shared library (`*.wrapper.so`) with a C interface of its own, which calls back into
//! libtorch through a second one. This crate finds both at run time: it is built without torch's headers and links to
//! no libtorch, and it needs no Python, nor holds its interpreter lock.
//!
//! [`Torch`] is a libtorch, [`Library`] a compiled model, [`Container`] a number of running instances of it,
//! [`Binding`] the new bytes of one of its constants, [`Tensor`] what goes in and comes out. Reading packages
//! (`.pt2`) and deciding which bytes belong to which constant is not done here.
//!
//! **Opening a library runs native code from the file.** Nothing else in reweft does.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use reweft::Dtype;
//! use reweft_runtime::{Binding, Container, Device, Library, Tensor, Torch, contiguous_strides};
//!
//! let torch = Torch::from_process()?;
//! // SAFETY: compiled by us, and nobody overwrites it.
//! let library = unsafe { Library::open(&torch, Path::new("/srv/model/net.wrapper.so"))? };
//! let container = Container::open(&torch, &library, Device::CPU, 2, false)?;
//!
//! let weight: Arc<Vec<f32>> = Arc::new(vec![0.5; 16 * 4]);
//! let ptr = weight.as_ptr().cast_mut().cast();
//! let strides = contiguous_strides(&[16, 4]);
//! // SAFETY: compiled with this shape, which the vector holds, and never written to.
//! let binding = unsafe { Binding::new("fc_weight", ptr, [16, 4], strides, Dtype::F32, Device::CPU, weight) };
//! container.refit(vec![binding])?;
//!
//! let input = Tensor::from_bytes(&torch, &[0; 4 * 4], &[1, 4], Dtype::F32)?;
//! // SAFETY: the input is what the program was compiled for.
//! let outputs = unsafe { container.run(vec![input])? };
//! assert_eq!(outputs.len(), container.num_outputs());
//! # Ok::<(), reweft_runtime::Error>(())
//! ```
// The crate exists to call functions found by name in native code; every block says what it rests on.
#![allow(unsafe_code)]

mod arrays;
mod binding;
mod cache;
mod container;
mod device;
mod error;
mod gate;
mod host;
mod library;
mod memory;
mod model;
mod permits;
mod process;
mod proxy;
mod reentry;
mod serving;
mod slots;
mod symbols;
mod tensor;
mod torch;

pub use arrays::find_libtorch;
pub use binding::{Binding, Constant, ConstantKind};
pub use cache::{CacheEntry, LibraryCache, check_private, user_folder};
pub use container::Container;
pub use device::Device;
pub use error::{Error, ErrorKind, Result};
pub use host::host;
pub use library::Library;
pub use model::{LiveReport, Model, ModelOptions, RefitOptions};
pub use permits::Interrupted;
pub use proxy::{OpenOperators, Operators};
pub use slots::Lending;
pub use tensor::{Placement, Tensor, contiguous_strides};
pub use torch::{RawTensor, Torch};
