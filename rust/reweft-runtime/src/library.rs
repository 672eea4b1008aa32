//! Compiled model libraries (`*.wrapper.so`) and the functions they export.
//!
//! Signatures are those of `torch/csrc/inductor/aoti_runtime/interface.h`. The functions are compiled into
//! each library by the torch that compiled it, so what exists and how it behaves is that torch's.

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::null;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::symbols::{Function, symbols};
use crate::torch::{RawTensor, Torch, call_failed, load, text};

/// An `AOTInductorModelContainerHandle`.
pub(crate) type RawContainer = *mut c_void;

/// `AOTInductorConstantMapEntry`: a constant's C name and a tensor.
#[repr(C)]
pub(crate) struct Pair {
    pub name: *const c_char,
    pub tensor: RawTensor,
}

symbols! {
    /// The exported functions in use, without their prefix `AOTInductorModelContainer`.
    struct Functions;
    required {
        create = "AOTInductorModelContainerCreateWithDevice":
            fn(*mut RawContainer, usize, *const c_char, *const c_char) -> i32;
        delete = "AOTInductorModelContainerDelete": fn(RawContainer) -> i32;
        run = "AOTInductorModelContainerRun":
            fn(RawContainer, *mut RawTensor, usize, *mut RawTensor, usize, *mut c_void, *mut c_void) -> i32;
        num_constants = "AOTInductorModelContainerGetNumConstants": fn(RawContainer, *mut usize) -> i32;
        constant_name = "AOTInductorModelContainerGetConstantName": fn(RawContainer, usize, *mut *const c_char) -> i32;
        constant_fqn = "AOTInductorModelContainerGetConstantOriginalFQN": fn(RawContainer, usize, *mut *const c_char) -> i32;
        constant_folded = "AOTInductorModelContainerGetConstantFromFolded": fn(RawContainer, usize, *mut bool) -> i32;
        constant_kind = "AOTInductorModelContainerGetConstantType": fn(RawContainer, usize, *mut i32) -> i32;
        constant_dtype = "AOTInductorModelContainerGetConstantDtype": fn(RawContainer, usize, *mut i32) -> i32;
        constant_nbytes = "AOTInductorModelContainerGetConstantDataSize": fn(RawContainer, usize, *mut usize) -> i32;
        num_inputs = "AOTInductorModelContainerGetNumInputs": fn(RawContainer, *mut usize) -> i32;
        num_outputs = "AOTInductorModelContainerGetNumOutputs": fn(RawContainer, *mut usize) -> i32;
        input_name = "AOTInductorModelContainerGetInputName": fn(RawContainer, usize, *mut *const c_char) -> i32;
        output_name = "AOTInductorModelContainerGetOutputName": fn(RawContainer, usize, *mut *const c_char) -> i32;
        update = "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs":
            fn(RawContainer, *const Pair, usize, bool, bool) -> i32;
        swap = "AOTInductorModelContainerSwapConstantBuffer": fn(RawContainer) -> i32;
    }
    optional {
        run_single_threaded = "AOTInductorModelContainerRunSingleThreaded":
            fn(RawContainer, *mut RawTensor, usize, *mut RawTensor, usize, *mut c_void, *mut c_void) -> i32;
        fold = "AOTInductorModelContainerRunConstantFolding": fn(RawContainer, bool, *mut c_void, *mut c_void) -> i32;
        extract = "AOTInductorModelContainerExtractConstantsMapEntries":
            fn(RawContainer, *mut *const Pair, *mut usize, bool) -> i32;
        free_inactive = "AOTInductorModelContainerFreeInactiveConstantBuffer": fn(RawContainer) -> i32;
        call_spec = "AOTInductorModelContainerGetCallSpec":
            fn(RawContainer, *mut *const c_char, *mut *const c_char) -> i32;
        last_error = "AOTInductorGetLastError": fn(*mut *const c_char) -> i32;
    }
}

/// An opened model library. Cloning shares it; it is closed with the last clone and the last container.
///
/// Closing does not unmap it: a library compiled by gcc holds unique symbols, which glibc never unloads.
/// Each library that was opened once costs its code (1.7 MB for a small model) until the process ends.
#[derive(Clone)]
pub struct Library(Arc<Inner>);

struct Inner {
    functions: Functions,
    path: PathBuf,
    forgets: OnceLock<bool>,
    // Declared last: the functions above point into it.
    _library: libloading::Library,
}

impl Library {
    /// Opens the model library at `path`.
    ///
    /// It needs a libtorch; `torch` is proof that one is loaded. Cost: maps the file and binds its symbols. The
    /// weights inside, if any, are not read before [`Container::open`](crate::Container::open).
    ///
    /// # Errors
    /// [`ErrorKind::Library`] if the loader refuses the file, or if another file was opened under this path
    /// before: the loader would hand out that one, so give every library a path of its own.
    /// [`ErrorKind::Symbol`] if it is no model library, or from a torch before user-managed constants.
    ///
    /// # Safety
    /// **Opening runs native code of the file**, and the functions it exports are called later. `path` must be
    /// a library that `AOTInductor` compiled, from a source that may run code in this process, and the file must
    /// not be overwritten while it is open.
    pub unsafe fn open(torch: &Torch, path: &Path) -> Result<Self> {
        // Opening a path needs libtorch's symbols and nothing of the table, so the table is only proof.
        let _: &Torch = torch;
        // Held while loading, so that two threads cannot both find a path unused.
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = opened.get_or_insert_default();
        let identity = same_file_as_before(opened, path)?;
        // SAFETY: the caller vouches for the file.
        let library = unsafe { load(path)? };
        opened.insert(path.to_owned(), identity);
        // SAFETY: the caller vouches that AOTInductor made it, whose C interface keeps its signatures; the
        // library lives in the same value as the functions.
        let functions = unsafe { Functions::resolve(&library) }
            .map_err(|error| Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self(Arc::new(Inner { functions, path: path.to_owned(), forgets: OnceLock::new(), _library: library })))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub(crate) fn functions(&self) -> &Functions {
        &self.0.functions
    }

    /// Whether it forgets to delete the handles it makes for what is bound. Tried once.
    pub(crate) fn forgets(&self, attempt: impl FnOnce() -> bool) -> bool {
        *self.0.forgets.get_or_init(attempt)
    }

    /// Turns the status of a call into a result, with the library's own message where it keeps one.
    pub(crate) fn check<F>(&self, function: &Function<F>, status: i32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut message = null();
        let message = self.functions().last_error.as_ref().and_then(|last_error| {
            // SAFETY: `message` is writable; the string lives until this thread's next call into the library.
            unsafe {
                (last_error.call)(&raw mut message);
                text(message)
            }
        });
        Err(call_failed(function.name, status, message.as_deref()))
    }

    /// Unwraps a function that only some versions export.
    pub(crate) fn need<'a, F>(&self, function: Option<&'a Function<F>>, name: &str) -> Result<&'a Function<F>> {
        function.ok_or_else(|| {
            let path = self.path().display();
            Error::new(ErrorKind::Symbol, format!("{path}: function {name} is not exported; it is needed"))
        })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("path", &self.path()).finish_non_exhaustive()
    }
}

/// Device, inode and length of a file: what tells it from another one under the same path.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity(u64, u64, u64);

/// Paths opened so far. The loader finds a library by its path first and looks at the file only if it knows
/// none by that name, and model libraries stay loaded: a second file under a path would silently be the first.
static OPENED: Mutex<Option<HashMap<PathBuf, Identity>>> = Mutex::new(None);

fn same_file_as_before(opened: &HashMap<PathBuf, Identity>, path: &Path) -> Result<Identity> {
    let refuse =
        |cause: &dyn fmt::Display| Error::new(ErrorKind::Library, format!("{}: not loaded: {cause}", path.display()));
    let found = identity(path).map_err(|error| refuse(&error))?;
    if opened.get(path).is_some_and(|known| *known != found) {
        return Err(refuse(&"another file was opened under this path before and is still loaded; use a fresh path"));
    }
    Ok(found)
}

#[cfg(unix)]
fn identity(path: &Path) -> std::io::Result<Identity> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)?;
    Ok(Identity(metadata.dev(), metadata.ino(), metadata.len()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> std::io::Result<Identity> {
    Ok(Identity(0, 0, std::fs::metadata(path)?.len()))
}
