//! From the calls in a pickle to tensors: one table of the functions that `torch.save` names, none of which is called.

use std::collections::HashMap;
use std::sync::Arc;

use reweft_pickle::{NodeId, Object, Pickle, Value};

use super::{Item, Storage};
use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// What a function that a checkpoint names makes of its arguments.
#[derive(Clone, Copy)]
enum Function {
    /// `(storage, offset, size, stride, requires_grad, hooks[, metadata])`, dtype from the storage.
    TensorV2,
    /// The same with the dtype as seventh argument, over an untyped storage.
    TensorV3,
    /// `(tensor, ...)`: the tensor is a parameter.
    Parameter,
    /// A tensor, but not one with a strided storage.
    Other(&'static str),
}

/// Module, name, meaning. Source: `torch/_utils.py` and `torch/_tensor.py` of 2.15, checked against files.
const FUNCTIONS: &[(&str, &str, Function)] = &[
    ("torch._utils", "_rebuild_tensor", Function::TensorV2),
    ("torch._utils", "_rebuild_tensor_v2", Function::TensorV2),
    ("torch._utils", "_rebuild_tensor_v3", Function::TensorV3),
    ("torch._utils", "_rebuild_parameter", Function::Parameter),
    ("torch._utils", "_rebuild_parameter_with_state", Function::Parameter),
    ("torch._tensor", "_rebuild_from_type_v2", Function::Other("a tensor subclass or a tensor with attributes")),
    ("torch._utils", "_rebuild_wrapper_subclass", Function::Other("a tensor subclass")),
    ("torch._utils", "_rebuild_qtensor", Function::Other("a quantised tensor")),
    ("torch._utils", "_rebuild_sparse_tensor", Function::Other("a sparse tensor")),
    ("torch._utils", "_rebuild_nested_tensor", Function::Other("a nested tensor")),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", Function::Other("a meta tensor, which has no data")),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", Function::Other("a tensor of another device")),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", Function::Other("a tensor of another device")),
];

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
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
];

/// Most links from a parameter to its tensor; torch writes one.
const MAX_PARAMETER_LINKS: usize = 8;

/// Rebuilds tensors of one pickle; storages are collected once each.
pub(super) struct Rebuild<'p> {
    pickle: &'p Pickle<'p>,
    archive: Arc<Archive>,
    root: &'p str,
    /// The storages in the order of first use.
    pub storages: Vec<Storage>,
    by_key: HashMap<&'p str, usize>,
    /// Storage by persistent id node, so that a shared one is looked up once.
    by_node: HashMap<NodeId, usize>,
}

impl<'p> Rebuild<'p> {
    pub fn new(pickle: &'p Pickle<'p>, archive: Arc<Archive>, root: &'p str) -> Self {
        Self { pickle, archive, root, storages: Vec::new(), by_key: HashMap::new(), by_node: HashMap::new() }
    }

    /// The tensor that a value is, if it is one. `Unreadable` where only this tensor is out of reach.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] where the arguments contradict themselves or the archive.
    pub fn item(&mut self, id: NodeId) -> Result<Option<Item>> {
        let mut id = id;
        for _ in 0..MAX_PARAMETER_LINKS {
            let Some((function, object)) = function(self.pickle, id) else { return Ok(None) };
            let args = self.pickle.as_tuple(object.args).unwrap_or_default();
            let found = match function {
                Function::Parameter => {
                    id = *args.first().ok_or_else(|| Error::format("parameter without a tensor"))?;
                    if function_of(self.pickle, id).is_none() {
                        let what = self.pickle.describe(id);
                        return Ok(Some(Item::Unreadable(format!("it depends on {what}, which reweft does not know"))));
                    }
                    continue;
                }
                Function::TensorV2 => self.tensor(args, None, args.get(6)),
                Function::TensorV3 => {
                    let dtype = args.get(6).and_then(|id| self.pickle.as_global(*id));
                    let name = dtype.map_or_else(String::new, |(module, name)| format!("{module}.{name}"));
                    let dtype = Dtype::from_name(&name);
                    match dtype {
                        Some(dtype) => self.tensor(args, Some(dtype), args.get(7)),
                        None => Ok(Item::Unreadable(format!("its dtype {name:?} is not known"))),
                    }
                }
                Function::Other(what) => Ok(Item::Unreadable(format!("it is {what}, which is not read yet"))),
            };
            return found.map(Some);
        }
        Err(Error::format("parameter of a parameter of a parameter, and so on"))
    }

    fn tensor(&mut self, args: &[NodeId], dtype: Option<Dtype>, metadata: Option<&NodeId>) -> Result<Item> {
        let pickle = self.pickle;
        let [storage, storage_offset, shape, strides, ..] = args else {
            return Err(Error::format(format!("tensor of {} arguments, wanted at least 4", args.len())));
        };
        if metadata.is_some_and(|id| pickle.dict(*id).is_none_or(|pairs| !pairs.is_empty())) {
            return Ok(Item::Unreadable("it is a conjugate or negative view, which is not read yet".to_owned()));
        }
        let Some(storage) = self.storage(*storage)? else {
            let what = pickle.describe(*storage);
            return Ok(Item::Unreadable(format!("its storage is {what}, which reweft does not know")));
        };
        let held = &self.storages[storage];
        if held.device == "meta" {
            return Ok(Item::Unreadable("it is a meta tensor, which has no data".to_owned()));
        }
        let Some(dtype) = dtype.or(held.dtype) else {
            return Err(Error::format("tensor of an untyped storage states no dtype"));
        };
        if dtype.itemsize().is_none() {
            return Err(Error::format(format!("torch has no dtype {dtype}")));
        }
        let info = TensorInfo {
            dtype,
            shape: sizes(pickle, *shape, "size")?,
            strides: sizes(pickle, *strides, "stride")?,
            storage,
            storage_offset: size(pickle, *storage_offset, "storage offset")?,
        };
        info.window(held.nbytes)?;
        Ok(match dtype {
            Dtype::QInt8 | Dtype::QUInt8 | Dtype::QInt32 | Dtype::QUInt4x2 | Dtype::QUInt2x4 => {
                Item::Unreadable("it is a quantised tensor without its parameters".to_owned())
            }
            _ => Item::Tensor(info),
        })
    }

    /// The number of the storage behind a persistent id; `None` if the value is something else.
    fn storage(&mut self, id: NodeId) -> Result<Option<usize>> {
        if let Some(number) = self.by_node.get(&id) {
            return Ok(Some(*number));
        }
        let Value::Persistent(pid) = self.pickle.get(id) else { return Ok(None) };
        let (key, dtype, device, numel) = storage_id(self.pickle, *pid)?;
        let itemsize = dtype.and_then(Dtype::itemsize).unwrap_or(1);
        let nbytes = numel.checked_mul(itemsize).ok_or_else(|| Error::format("storage takes 2^64 bytes"))?;
        if let Some(number) = self.by_key.get(key) {
            let held = &self.storages[*number];
            if (held.dtype, held.nbytes, held.device.as_str()) != (dtype, nbytes, device) {
                return Err(Error::format(format!("storage {key:?} is described in two ways")));
            }
            self.by_node.insert(id, *number);
            return Ok(Some(*number));
        }
        let record = format!("{}/data/{key}", self.root);
        let storage = Storage::record(Arc::clone(&self.archive), record, dtype, nbytes, device);
        if device != "meta" {
            storage.check_nbytes()?;
        }
        let number = self.storages.len();
        self.storages.push(storage);
        self.by_key.insert(key, number);
        self.by_node.insert(id, number);
        Ok(Some(number))
    }

    /// Globals that reweft gives no meaning to, as `module.name`, in the order of the file.
    pub fn unknown_globals(&self) -> Vec<String> {
        let known = |module: &str, name: &str| {
            FUNCTIONS.iter().any(|row| (row.0, row.1) == (module, name))
                || PLAIN_GLOBALS.contains(&(module, name))
                || (module == "torch" || module.starts_with("torch.")) && name.ends_with("Storage")
                || module == "torch" && Dtype::from_name(name).is_some_and(|dtype| dtype.name() == name)
        };
        let unknown = self.pickle.globals().filter(|(module, name)| !known(module, name));
        unknown.map(|(module, name)| format!("{module}.{name}")).collect()
    }
}

/// The table's entry for a call, and the call.
fn function<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Option<(Function, &'p Object)> {
    let ((module, name), object) = pickle.as_call(id)?;
    let row = FUNCTIONS.iter().find(|row| row.1 == name && row.0 == module)?;
    Some((row.2, object))
}

fn function_of(pickle: &Pickle<'_>, id: NodeId) -> Option<Function> {
    function(pickle, id).map(|(function, _)| function)
}

/// Whether a value is a tensor, or a storage outside of one.
pub(super) fn is_tensor(pickle: &Pickle<'_>, id: NodeId) -> bool {
    matches!(pickle.get(id), Value::Persistent(_)) || function_of(pickle, id).is_some()
}

/// `("storage", class, key, location, numel)`: key, dtype, device and number of elements.
fn storage_id<'p>(pickle: &'p Pickle<'_>, pid: NodeId) -> Result<(&'p str, Option<Dtype>, &'p str, u64)> {
    let bad = |what: &str| Err(Error::format(format!("persistent id: {what}")));
    let Some([kind, class, key, device, numel]) = pickle.as_tuple(pid) else {
        return bad("is no tuple of 5, as torch writes it");
    };
    if pickle.as_str(*kind) != Some("storage") {
        return bad("names something else than a storage");
    }
    let Some((module, class)) = pickle.as_global(*class) else { return bad("storage class is no class") };
    let (Some(key), Some(device)) = (pickle.as_str(*key), pickle.as_str(*device)) else {
        return bad("key or location is no text");
    };
    if key.is_empty() || key.contains(['/', '\\']) || key.starts_with('.') {
        return bad("key leaves the folder of the storages");
    }
    let dtype = match class {
        "UntypedStorage" => None,
        class => Some(Dtype::from_storage_class(class).ok_or_else(|| {
            let what = format!("storage class {module}.{class} is not known");
            Error::new(ErrorKind::Unsupported, what)
        })?),
    };
    Ok((key, dtype, device, size(pickle, *numel, "storage size")?))
}

fn size(pickle: &Pickle<'_>, id: NodeId, what: &str) -> Result<u64> {
    let value = pickle.as_i64(id).and_then(|value| u64::try_from(value).ok());
    value.ok_or_else(|| Error::format(format!("{what} is {}, wanted a number from 0", pickle.describe(id))))
}

/// A tuple of sizes; `torch.Size` calls hold it as their one argument.
fn sizes(pickle: &Pickle<'_>, id: NodeId, what: &str) -> Result<Vec<u64>> {
    let id = match pickle.as_call(id) {
        Some((("torch", "Size"), object)) => match pickle.as_tuple(object.args) {
            Some([items]) => *items,
            _ => id,
        },
        _ => id,
    };
    let items = pickle.as_sequence(id);
    let items = items.ok_or_else(|| Error::format(format!("{what} is {}, wanted a tuple", pickle.describe(id))))?;
    items.iter().map(|item| size(pickle, *item, what)).collect()
}
