//! Operators that a compiled program leaves to its host: those without a C function of their own, such as custom ones.
//!
//! The generated code calls them by number through a `ProxyExecutor` of libtorch
//! (`torch/csrc/inductor/aoti_torch/proxy_executor.h`, 2.13 to 2.15): a C++ object of which it knows the virtual methods.
//! [`Proxy`] is laid out as such an object is by the Itanium C++ ABI, which compilers for unix follow.

use std::cell::RefCell;
use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use reweft::Artifact;
use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Tensor;
use crate::torch::{RawTensor, Torch};

/// Runs operators for a compiled program.
pub trait Operators: Send + Sync {
    /// How many tensors a node of the program takes; `None` if there is no such node. Those that it gives come after them.
    fn num_inputs(&self, node: usize) -> Option<usize>;

    /// Runs a node on the tensors that it takes, and the numbers that were not known when the program was compiled. Gives
    /// its results in order. Threads call it at the same time.
    ///
    /// # Errors
    /// Whatever the operator's failure is; the program's call fails with it.
    fn run(&self, node: usize, numbers: &[i64], inputs: Vec<Tensor>) -> reweft::Result<Vec<Tensor>>;
}

/// Makes operators from what a package says of them: the JSON text that torch calls `ExternKernelNodes`.
pub type OpenOperators = fn(&Torch, &str) -> reweft::Result<Arc<dyn Operators>>;

/// The operators that a package's program leaves to its host, if it has such.
///
/// # Errors
/// [`ErrorKind::Unsupported`](reweft::ErrorKind::Unsupported) without a way to make them, which names them;
/// [`ErrorKind::Format`](reweft::ErrorKind::Format) for a text that does not say what they are; what `open` gives.
pub(crate) fn open(
    artifact: &Artifact,
    torch: &Torch,
    open: Option<OpenOperators>,
) -> reweft::Result<Option<Arc<dyn Operators>>> {
    let Some((archive, Some(record))) = artifact.package().map(|(archive, model)| (archive, &model.extern_nodes))
    else {
        return Ok(None);
    };
    let text = archive.read(record)?;
    let nodes: ExternNodes = serde_json::from_slice(&text)
        .map_err(|error| reweft::Error::format(format!("operators of the host: {error}")).in_record(record))?;
    let mut targets: Vec<_> = nodes.nodes.into_iter().map(|node| node.node.target).collect();
    if targets.is_empty() {
        return Ok(None);
    }
    let Some(open) = open else {
        targets.dedup();
        let what = format!("the program leaves operators to Python: {}", targets.join(", "));
        return Err(reweft::Error::new(reweft::ErrorKind::Unsupported, what).with_hint("run it with reweft.torch.load"));
    };
    open(torch, &String::from_utf8_lossy(&text)).map(Some)
}

/// As much of torch's `ExternKernelNodes` as is read here.
#[derive(Deserialize)]
struct ExternNodes {
    nodes: Vec<ExternNode>,
}

#[derive(Deserialize)]
struct ExternNode {
    node: Node,
}

#[derive(Deserialize)]
struct Node {
    target: String,
}

/// The operators of one container, as the object that generated code calls.
#[repr(C)]
pub(crate) struct Proxy {
    methods: *const Methods,
    operators: Arc<dyn Operators>,
    torch: Torch,
}

// SAFETY: the pointer is to a constant; the rest may be shared.
unsafe impl Send for Proxy {}
// SAFETY: the same.
unsafe impl Sync for Proxy {}

/// What stands before and in the table of virtual methods of `ProxyExecutor`.
#[repr(C)]
struct Table {
    offset_to_top: isize,
    type_info: usize,
    methods: Methods,
}

/// The virtual methods in the order of their declaration; a virtual destructor has two entries.
#[repr(C)]
struct Methods {
    destroy: extern "C" fn(*mut Proxy),
    destroy_and_free: extern "C" fn(*mut Proxy),
    call_function: unsafe extern "C-unwind" fn(*mut Proxy, i32, i32, *const i64, i32, *const RawTensor),
    /// 2.15 only. Gives a map through its first argument.
    get_custom_objs: unsafe extern "C-unwind" fn(*mut c_void, *const Proxy),
}

static TABLE: Table = Table {
    offset_to_top: 0,
    type_info: 0,
    methods: Methods { destroy: keep, destroy_and_free: keep, call_function, get_custom_objs },
};

thread_local! {
    /// Why an operator failed in the call that runs on this thread; what libtorch passes on says no more than that.
    static FAILED: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// The failure of an operator in this thread's call, if there was one.
pub(crate) fn take_failure() -> Option<Error> {
    FAILED.take()
}

impl Proxy {
    pub fn new(torch: &Torch, operators: Arc<dyn Operators>) -> Self {
        Self { methods: &raw const TABLE.methods, operators, torch: torch.clone() }
    }

    /// What is handed to generated code, which keeps it no longer than its call.
    pub fn as_raw(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Runs a node and puts its results where the program expects them.
    ///
    /// # Safety
    /// The handles are live, and nobody else uses the outputs among them.
    unsafe fn run(&self, node: i32, numbers: &[i64], tensors: &[RawTensor]) -> Result<()> {
        let number = usize::try_from(node).ok();
        let node = number.and_then(|number| Some((number, self.operators.num_inputs(number)?)));
        let (number, count) = node.ok_or_else(|| failed("the package states no such operator"))?;
        let (inputs, outputs) = tensors.split_at_checked(count).ok_or_else(|| failed("it passes too few tensors"))?;
        // SAFETY: the caller vouches for the handles.
        let inputs = inputs.iter().map(|raw| unsafe { Tensor::share(&self.torch, *raw) }).collect::<Result<_>>()?;
        let results = self
            .operators
            .run(number, numbers, inputs)
            .map_err(|error| Error::new(ErrorKind::Call, error.to_string()))?;
        if results.len() != outputs.len() {
            let (found, wanted) = (results.len(), outputs.len());
            return Err(failed(&format!("it gave {found} tensors, the program wants {wanted}")));
        }
        let assign = &self.torch.shim().assign;
        for (result, output) in results.iter().zip(outputs) {
            // SAFETY: both are live; the output becomes another handle of the result.
            self.torch.check(assign, unsafe { (assign.call)(result.as_raw(), *output) })?;
        }
        Ok(())
    }
}

fn failed(what: &str) -> Error {
    Error::new(ErrorKind::Call, format!("an operator of the program cannot be run: {what}"))
}

/// Generated code owns no proxy and destroys none.
extern "C" fn keep(_: *mut Proxy) {}

/// # Safety
/// Generated code calls it, with a live proxy and arrays of the lengths given.
unsafe extern "C-unwind" fn call_function(
    this: *mut Proxy,
    node: i32,
    num_numbers: i32,
    numbers: *const i64,
    num_tensors: i32,
    tensors: *const RawTensor,
) {
    // SAFETY: live until the program's call ends, and never written to.
    let proxy = unsafe { &*this };
    let run = || {
        // SAFETY: the arrays have these lengths, and the handles are live.
        unsafe { proxy.run(node, array(numbers, num_numbers), array(tensors, num_tensors)) }
    };
    let done = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(failed("it panicked")));
    let Err(error) = done else { return };
    FAILED.set(Some(error));
    // Nothing that has to be dropped is left in this frame.
    // SAFETY: called by C++ that expects exceptions.
    unsafe { throw(proxy, c"an operator of the program failed") }
}

/// # Safety
/// As [`call_function`]. Nothing is written to the first argument.
unsafe extern "C-unwind" fn get_custom_objs(_: *mut c_void, this: *const Proxy) {
    // SAFETY: live, and called by C++ that expects exceptions.
    unsafe { throw(&*this, c"objects of custom classes are not supported") }
}

/// Throws a C++ exception.
///
/// # Safety
/// No frame above but those of C++ has anything left to drop.
unsafe fn throw(proxy: &Proxy, message: &CStr) -> ! {
    let file = c"reweft".as_ptr();
    // SAFETY: the strings end in NUL; the function throws if its first argument is false.
    unsafe { (proxy.torch.shim().throw_unless.call)(false, file, file, 0, message.as_ptr()) };
    // Generated code would go on with outputs that are not there.
    std::process::abort()
}

/// # Safety
/// `count` elements are at `first`, which may be null or dangle if there are none.
unsafe fn array<'a, T>(first: *const T, count: i32) -> &'a [T] {
    match usize::try_from(count) {
        // SAFETY: the caller vouches for it.
        Ok(count) if count > 0 => unsafe { std::slice::from_raw_parts(first, count) },
        _ => &[],
    }
}
