//! The functions of libtorch's C shim that this crate calls, found in a libtorch that is given or already loaded.
//!
//! Signatures are those of `torch/csrc/inductor/aoti_torch/c/shim.h` and `torch/csrc/stable/c/shim.h` (2.13 to 2.15).

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::symbols::{Function, symbols};

/// An `AtenTensorHandle`: an opaque pointer to a tensor of libtorch.
pub type RawTensor = *mut c_void;

symbols! {
    /// The shim functions in use.
    struct Shim;
    required {
        layout_strided = "aoti_torch_layout_strided": fn() -> i32;
        delete = "aoti_torch_delete_tensor_object": fn(RawTensor) -> i32;
        new_handle = "aoti_torch_new_tensor_handle": fn(RawTensor, *mut RawTensor) -> i32;
        data_ptr = "aoti_torch_get_data_ptr": fn(RawTensor, *mut *mut c_void) -> i32;
        storage_size = "aoti_torch_get_storage_size": fn(RawTensor, *mut i64) -> i32;
        storage_offset = "aoti_torch_get_storage_offset": fn(RawTensor, *mut i64) -> i32;
        reinterpret = "aoti_torch__reinterpret_tensor":
            fn(RawTensor, i64, *const i64, *const i64, i64, *mut RawTensor) -> i32;
        dim = "aoti_torch_get_dim": fn(RawTensor, *mut i64) -> i32;
        sizes = "aoti_torch_get_sizes": fn(RawTensor, *mut *mut i64) -> i32;
        strides = "aoti_torch_get_strides": fn(RawTensor, *mut *mut i64) -> i32;
        dtype = "aoti_torch_get_dtype": fn(RawTensor, *mut i32) -> i32;
        device_type = "aoti_torch_get_device_type": fn(RawTensor, *mut i32) -> i32;
        device_index = "aoti_torch_get_device_index": fn(RawTensor, *mut i32) -> i32;
        assign = "aoti_torch_assign_tensors": fn(RawTensor, RawTensor) -> i32;
        throw_unless = "aoti_torch_check": fn(bool, *const c_char, *const c_char, u32, *const c_char) -> ();
        clone = "aoti_torch_clone": fn(RawTensor, *mut RawTensor) -> i32;
        empty_strided = "aoti_torch_empty_strided":
            fn(i64, *const i64, *const i64, i32, i32, i32, *mut RawTensor) -> i32;
        from_blob = "aoti_torch_create_tensor_from_blob_v2":
            fn(*mut c_void, i64, *const i64, *const i64, i64, i32, i32, i32, *mut RawTensor, i32, *const u8, i64) -> i32;
    }
    optional {
        layout_mkldnn = "aoti_torch_layout__mkldnn": fn() -> i32;
        from_blob_watched = "torch_from_blob":
            fn(*mut c_void, i64, *const i64, *const i64, i64, i32, i32, i32, *mut RawTensor, i32, *const u8, i64,
               unsafe extern "C" fn(*mut c_void, *mut c_void), *mut c_void) -> i32;
        clone_strided = "aoti_torch_clone_preserve_strides": fn(RawTensor, *mut RawTensor) -> i32;
        num_threads = "_ZN2at15get_num_threadsEv": fn() -> i32;
        set_num_threads = "_ZN2at15set_num_threadsEi": fn(i32) -> ();
        abi_version = "aoti_torch_abi_version": fn() -> u64;
        last_error = "torch_exception_get_what_without_backtrace": fn() -> *const c_char;
    }
}

/// A libtorch and the functions of its C shim, resolved once. Cloning shares the table.
///
/// libtorch stays loaded until the process ends: it runs threads of its own and was never made to be unloaded.
#[derive(Clone)]
pub struct Torch(Arc<Inner>);

struct Inner {
    shim: Shim,
    path: Option<PathBuf>,
}

impl Torch {
    /// Opens `libtorch_cpu.so` (or `libtorch.so`) at `path` with the libraries it needs.
    ///
    /// A library that the process has loaded already, under whatever visibility, is shared and not loaded a
    /// second time; this is how a Python process gives its own libtorch. Cost: a lookup, or the loading of
    /// several hundred megabytes of code the first time.
    ///
    /// # Errors
    /// [`ErrorKind::Library`] if the loader refuses the file, [`ErrorKind::Symbol`] if it is no libtorch
    /// with the functions needed.
    ///
    /// # Safety
    /// Opening runs the file's initialisers: `path` must be a genuine libtorch.
    pub unsafe fn open(path: &Path) -> Result<Self> {
        // SAFETY: the caller vouches for the file.
        let library = unsafe { load(path)? };
        // Compiled libraries also name `libtorch.so`, a stub beside it. The loader takes what is loaded under
        // that name already, and finds nothing by itself outside Python. Absent in static builds: not an error.
        let stub = path.with_file_name("libtorch.so");
        if stub.is_file() {
            // SAFETY: the caller vouches for the libtorch that this file is a part of.
            std::mem::forget(unsafe { load(&stub)? });
        }
        // SAFETY: the caller vouches that it is libtorch, whose C shim keeps its signatures.
        unsafe { Self::from_library(library, Some(path.to_owned())) }
    }

    /// Finds the libtorch that is loaded in this process.
    ///
    /// Looks among the global symbols and, on Linux, for a mapped `libtorch_cpu.so`, since Python loads it
    /// without making its symbols global. Cost: on Linux it reads the process's table of mappings.
    ///
    /// # Errors
    /// [`ErrorKind::Library`] if none is loaded; [`ErrorKind::Symbol`] as for [`Torch::open`].
    pub fn from_process() -> Result<Self> {
        if let Some(path) = mapped_library("libtorch_cpu.so") {
            // SAFETY: the process runs this very file already; opening it again adds a reference.
            return unsafe { Self::open(&path) };
        }
        // SAFETY: functions of the names in the table exist in libtorch only, with these signatures.
        unsafe { Self::from_library(this_process()?, None) }.map_err(|error| {
            let message = format!("no libtorch in this process ({error}); open one by its path");
            Error::new(ErrorKind::Library, message)
        })
    }

    /// The path this libtorch was opened by, unless its symbols are global in the process.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Its version as it states it, a byte for each part with the major version in the highest; `None` if it does not.
    pub(crate) fn abi_version(&self) -> Option<u64> {
        // SAFETY: takes nothing and reads nothing.
        self.shim().abi_version.as_ref().map(|version| unsafe { (version.call)() })
    }

    /// Threads that an operator takes when this thread calls it; `None` if this libtorch does not tell and let it be set.
    pub(crate) fn num_threads(&self) -> Option<i32> {
        let (get, _) = self.shim().num_threads.as_ref().zip(self.shim().set_num_threads.as_ref())?;
        // SAFETY: takes nothing; initialises the number for this thread if need be.
        Some(unsafe { (get.call)() })
    }

    /// Sets that number for this thread, and for threads that have not used libtorch yet. It is 1 or more.
    pub(crate) fn set_num_threads(&self, count: i32) {
        if let Some(set) = &self.shim().set_num_threads {
            // SAFETY: the function throws for numbers below 1 only.
            unsafe { (set.call)(count.max(1)) };
        }
    }

    /// # Safety
    /// `library` is libtorch.
    unsafe fn from_library(library: libloading::Library, path: Option<PathBuf>) -> Result<Self> {
        // SAFETY: the caller vouches that it is libtorch; it is never closed, see below.
        let shim = unsafe { Shim::resolve(&library) };
        crate::process::note_origin();
        std::mem::forget(library);
        Ok(Self(Arc::new(Inner { shim: shim?, path })))
    }

    pub(crate) fn shim(&self) -> &Shim {
        &self.0.shim
    }

    /// Turns the status of a shim call into a result.
    pub(crate) fn check<F>(&self, function: &Function<F>, status: i32) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(function, status)) }
    }

    /// The error for a shim call that failed, with libtorch's own message where it keeps one (2.13 and later).
    #[cold]
    pub(crate) fn failed<F>(&self, function: &Function<F>, status: i32) -> Error {
        let message = self.shim().last_error.as_ref().and_then(|last_error| {
            // SAFETY: takes nothing and returns null or a string that lives until this thread's next failure.
            unsafe { text((last_error.call)()) }
        });
        call_failed(function.name, status, message.as_deref())
    }
}

impl fmt::Debug for Torch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Torch").field("path", &self.path()).finish_non_exhaustive()
    }
}

#[cold]
pub(crate) fn call_failed(function: &str, status: i32, message: Option<&str>) -> Error {
    // libtorch appends where it threw and twenty frames of its stack.
    let message = message.and_then(|message| message.split("\nException raised from ").next());
    let message = message.map(str::trim).filter(|message| !message.is_empty());
    let message = message.unwrap_or("no message; the library may have printed one on stderr");
    Error::new(ErrorKind::Call, format!("{function} failed with status {status}: {message}"))
}

/// Copies a C string; `None` for null. Bytes that are not UTF-8 are replaced.
///
/// # Safety
/// `pointer` is null or a string that ends in NUL and lives until this returns.
pub(crate) unsafe fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller vouches for the rest.
    Some(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
}

/// Opens a library with all its symbols bound now, so that a missing one is an error and not an abort later.
///
/// # Safety
/// Runs the file's initialisers.
#[cfg(unix)]
pub(crate) unsafe fn load(path: &Path) -> Result<libloading::Library> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    // SAFETY: passed on to the caller.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map(Into::into)
        .map_err(|error| not_loaded(path, &error))
}

/// Opens a library.
///
/// # Safety
/// Runs the file's initialisers.
#[cfg(not(unix))]
pub(crate) unsafe fn load(path: &Path) -> Result<libloading::Library> {
    // SAFETY: passed on to the caller.
    unsafe { libloading::Library::new(path) }.map_err(|error| not_loaded(path, &error))
}

#[cold]
fn not_loaded(path: &Path, error: &libloading::Error) -> Error {
    // The loader's own words are the cause of a libloading error, not its text.
    let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    Error::new(ErrorKind::Library, format!("{}: not loaded: {cause}", path.display()))
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "fails on other systems")]
fn this_process() -> Result<libloading::Library> {
    Ok(libloading::os::unix::Library::this().into())
}

#[cfg(not(unix))]
fn this_process() -> Result<libloading::Library> {
    Err(Error::new(ErrorKind::Library, "global symbols exist on unix only"))
}

/// The path of a mapped file called `name`; `None` too where the system keeps no such table.
fn mapped_library(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| path.file_name().is_some_and(|found| found == name))
        .map(Path::to_owned)
}
