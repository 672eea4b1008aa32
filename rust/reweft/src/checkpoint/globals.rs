//! The functions and classes that checkpoints name, and what reweft takes them for. None of them is ever called.

use std::collections::{HashMap, HashSet};

use foldhash::quality::RandomState;
use reweft_pickle::{NodeId, Object, Pickle, Value};

use super::{numpy, torchscript};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// What a function that a checkpoint names makes of its arguments.
#[derive(Clone, Copy)]
pub(super) enum Function {
    /// `(storage, offset, size, stride, requires_grad, hooks[, metadata])`, dtype from the storage.
    TensorV2,
    /// The same with the dtype as seventh argument, over an untyped storage.
    TensorV3,
    /// `(tensor, ...)`: a parameter.
    First,
    /// `(tensor, requires_grad, hooks, state)`: a parameter with attributes.
    WithState,
    /// `(tensor, dtype, device, requires_grad)`: a tensor of a device that has no storages of its own.
    FromCpu,
    /// `(function, class, arguments, state)`: a subclass, or a tensor with attributes.
    FromType,
    /// `(storage, offset, size, stride, (scheme, scale, zero point[, axis]), ...)`.
    Quantised,
    /// `(layout, (indices, values, size, ...))`.
    Sparse,
    /// `(buffer, sizes, strides, offsets)`.
    Nested,
    /// `({"values": ..., "offsets": ..., ...})`.
    Jagged,
    /// `(class, dtype, size, stride, ...)`: what a subclass says of itself; its tensors are among its attributes.
    Shell,
    /// `(dtype, size, stride, requires_grad)`, without data.
    Meta,
    /// A numpy array; [`numpy`] reads it.
    Array,
    /// `(array, dtype, device, ...)`: a tensor of a device that has no storages of its own.
    FromNumpy,
    /// A tensor that cannot be read from this file.
    Other(&'static str),
}

/// Module, name, meaning. Source: `torch/_utils.py` and `torch/_tensor.py` of 2.15 and numpy 2.4, checked against files.
pub(super) const FUNCTIONS: &[(&str, &str, Function)] = &[
    ("torch._utils", "_rebuild_tensor", Function::TensorV2),
    ("torch._utils", "_rebuild_tensor_v2", Function::TensorV2),
    ("torch._utils", "_rebuild_tensor_v3", Function::TensorV3),
    ("torch._utils", "_rebuild_parameter", Function::First),
    ("torch._utils", "_rebuild_parameter_with_state", Function::WithState),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", Function::FromCpu),
    ("torch._tensor", "_rebuild_from_type", Function::FromType),
    ("torch._tensor", "_rebuild_from_type_v2", Function::FromType),
    ("torch._utils", "_rebuild_qtensor", Function::Quantised),
    ("torch._utils", "_rebuild_sparse_tensor", Function::Sparse),
    ("torch._utils", "_rebuild_nested_tensor", Function::Nested),
    ("torch.nested._internal.nested_tensor", "_rebuild_njt", Function::Jagged),
    ("torch._utils", "_rebuild_wrapper_subclass", Function::Shell),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", Function::Meta),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", Function::FromNumpy),
    ("torch._utils", "_rebuild_xla_tensor", Function::FromNumpy),
    ("numpy._core.multiarray", "_reconstruct", Function::Array),
    ("numpy.core.multiarray", "_reconstruct", Function::Array),
    ("numpy._core.numeric", "_frombuffer", Function::Array),
    ("numpy.core.numeric", "_frombuffer", Function::Array),
    ("numpy.ma.core", "_mareconstruct", Function::Other("a masked numpy array")),
];

/// Classes whose tensors are nothing but their bytes.
const PLAIN_CLASSES: &[(&str, &str)] = &[
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
];

/// Whether objects of a class are tensors: the plain classes, those named by dtype, and that of old parameters.
fn is_tensor_class(module: &str, name: &str) -> bool {
    let is_typed = |module: &str| module == "torch" || module.starts_with("torch.");
    let dtype = || name.strip_suffix("Tensor").and_then(|name| Dtype::from_storage_class(&format!("{name}Storage")));
    PLAIN_CLASSES.contains(&(module, name))
        || (module, name) == ("torch.autograd.variable", "Variable")
        || is_typed(module) && dtype().is_some()
}

/// Whether an object's class takes its data as its first argument.
pub(super) fn is_parameter(pickle: &Pickle<'_>, object: &Object) -> bool {
    pickle.as_global(object.callable).is_some_and(|(_, name)| matches!(name, "Parameter" | "Variable"))
}

/// Globals that a checkpoint may name and that mean nothing dangerous or unknown.
const PLAIN_GLOBALS: &[(&str, &str)] = &[
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("builtins", "bytes"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.nested._internal.nested_tensor", "NestedTensor"),
    ("torch", "per_tensor_affine"),
    ("torch", "per_tensor_symmetric"),
    ("torch", "per_channel_affine"),
    ("torch", "per_channel_symmetric"),
    ("torch", "per_channel_affine_float_qparams"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
];

/// What the globals of one pickle mean, by node: a file names a handful of them, and each of its tensors asks.
#[derive(Default)]
pub(super) struct Globals {
    functions: HashMap<NodeId, Function, RandomState>,
    /// Dtype by storage class; `None` for untyped storages.
    pub(super) storages: HashMap<NodeId, Option<Dtype>, RandomState>,
    /// Classes whose objects are tensors by their state, in old files.
    classes: HashSet<NodeId, RandomState>,
}

impl Globals {
    /// Looks at every global once.
    pub fn new(pickle: &Pickle<'_>) -> Self {
        let mut globals = Self::default();
        for &id in pickle.global_nodes() {
            let Some((module, name)) = pickle.as_global(id) else { continue };
            if let Some(row) = FUNCTIONS.iter().find(|row| (row.0, row.1) == (module, name)) {
                globals.functions.insert(id, row.2);
            } else if is_tensor_class(module, name) {
                globals.classes.insert(id);
            } else if name == "UntypedStorage" {
                globals.storages.insert(id, None);
            } else if let Some(dtype) = Dtype::from_storage_class(name) {
                globals.storages.insert(id, Some(dtype));
            }
        }
        globals
    }

    /// The table's entry for a call, and the call.
    pub fn call<'p>(&self, pickle: &'p Pickle<'_>, id: NodeId) -> Option<(Function, &'p Object)> {
        let object = pickle.as_object(id)?;
        Some((*self.functions.get(&object.callable)?, object))
    }

    /// Refuses a pickle that does something to a tensor after it was made. torch would put items into it, and so into
    /// the storage that others share, or give it another window.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`]: torch writes no such pickle.
    pub fn check_unchanged(&self, pickle: &Pickle<'_>) -> Result<()> {
        let call = |id: &NodeId| Some((*id, self.call(pickle, *id)?.0));
        // An array is made empty, and its state fills it.
        let is_array = |made: &Function| matches!(made, Function::Array | Function::Other(_));
        let changed = pickle.filled_nodes().iter().filter_map(call).find(|(_, made)| !is_array(made));
        let Some((id, _)) = changed else { return Ok(()) };
        let what = format!("{} is changed after it was made, which torch does not write", pickle.describe(id));
        Err(Error::new(ErrorKind::Unsupported, what))
    }

    /// An object of a tensor class.
    pub fn object<'p>(&self, pickle: &'p Pickle<'_>, id: NodeId) -> Option<&'p Object> {
        pickle.as_object(id).filter(|object| self.classes.contains(&object.callable))
    }
}

/// Whether a value is a tensor, or a storage outside of one.
pub(crate) fn is_tensor(pickle: &Pickle<'_>, id: NodeId) -> bool {
    let is_function = |name| FUNCTIONS.iter().any(|row| (row.0, row.1) == name);
    match pickle.as_call(id) {
        Some((name, _)) if is_function(name) => numpy::is_tensor(pickle, id),
        Some(_) => false,
        None => matches!(pickle.get(id), Value::Persistent(_)),
    }
}

/// The dtype that a global like `torch.uint16` names.
pub(super) fn global_dtype(pickle: &Pickle<'_>, id: NodeId) -> Option<Dtype> {
    match pickle.as_global(id)? {
        ("torch", name) => Dtype::from_name(name).filter(|dtype| dtype.name() == name),
        _ => None,
    }
}
/// Globals that reweft gives no meaning to, as `module.name`, in the order of the file.
pub(super) fn unknown_globals(pickle: &Pickle<'_>) -> Vec<String> {
    let known = |module: &str, name: &str| {
        FUNCTIONS.iter().any(|row| (row.0, row.1) == (module, name))
            || PLAIN_GLOBALS.contains(&(module, name))
            || is_tensor_class(module, name)
            || torchscript::is_class(module)
            // How a distributed tensor lies over devices, which is listed beside it.
            || module.starts_with("torch.distributed.")
            || torchscript::WRAPPERS.contains(&(module, name))
            || (module == "torch" || module.starts_with("torch.")) && name.ends_with("Storage")
            || module == "torch" && Dtype::from_name(name).is_some_and(|dtype| dtype.name() == name)
    };
    let unknown = pickle.globals().filter(|(module, name)| !known(module, name));
    unknown.map(|(module, name)| format!("{module}.{name}")).collect()
}

/// Whether tensors of a class are nothing but their bytes.
pub(super) fn is_plain_class(pickle: &Pickle<'_>, class: NodeId) -> bool {
    pickle.as_global(class).is_some_and(|class| PLAIN_CLASSES.contains(&class))
}
