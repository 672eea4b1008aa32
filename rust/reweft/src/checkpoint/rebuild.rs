//! From the calls in a pickle to tensors: one table of the functions that `torch.save` names, none of which is called.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use foldhash::quality::RandomState;
use reweft_pickle::{NodeId, Object, Pickle, Value};

use super::budget::items_in;
use super::globals::{FUNCTIONS, Function, Globals, global_dtype, is_parameter, is_plain_class};
use super::made::{Making, Signs};
use super::parts::{attributes, describe_meta, describe_shell, jagged, nested, sparse};
use super::persistent::{StorageId, View, names_storage, size, storage_id};
use super::storage::Extent;
use super::torch_tar::{Numbers, Object as Numbered};
use super::{Format, Item, Storage};
use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::tensor::{TensorInfo, contiguous, numel, same_layout};

/// What a call in the pickle makes.
pub(super) enum Rebuilt {
    /// One tensor, or one that is out of reach.
    Item(Item),
    /// What has no dense form: its parts by name, and what they are parts of.
    Parts(String, Vec<(String, Part)>),
    /// A tensor, and its attributes by name.
    With(Item, Vec<(String, Part)>),
    /// No tensor after all, and what it is instead.
    Value(String),
}

impl Rebuilt {
    /// Adds the attributes of what was inside; a value that is among the parts already is not repeated.
    fn with(self, mut attributes: Vec<(String, Part)>) -> Self {
        match self {
            _ if attributes.is_empty() => self,
            Self::Item(item) => Self::With(item, attributes),
            Self::With(item, mut parts) => {
                parts.append(&mut attributes);
                Self::With(item, parts)
            }
            Self::Parts(what, mut parts) => {
                let node = |part: &Part| if let Part::Node(id) = part { Some(*id) } else { None };
                let known: HashSet<NodeId> = parts.iter().filter_map(|(_, part)| node(part)).collect();
                attributes.retain(|(_, part)| node(part).is_none_or(|id| !known.contains(&id)));
                parts.append(&mut attributes);
                Self::Parts(what, parts)
            }
            Self::Value(what) => Self::Parts(what, attributes),
        }
    }
}

/// Something under a name: still to be looked at, or done.
pub(super) enum Part {
    Node(NodeId),
    /// Boxed: nearly all parts are nodes, and a container of many should be small.
    Item(Box<Item>),
    /// No tensor, and what it is.
    Note(Box<Note>),
}

/// What a value is that is not looked into.
pub(super) struct Note(pub String);

/// Where one file keeps the bytes of its storages.
pub(super) enum Places<'p> {
    /// In records of an archive, in this folder.
    Archive(Arc<Archive>, &'p str),
    /// In the file itself, by key: first byte and number of elements.
    File(Source, HashMap<String, (u64, u64)>),
    /// In a tar archive, which numbers its storages and tensors.
    Tar(Numbers),
}

/// One pickle of a file, and where the file keeps what belongs to it.
pub(super) struct Saved<'p> {
    pub pickle: &'p Pickle<'p>,
    /// What the pickle was read from; its texts and bytes are slices of this.
    pub bytes: &'p [u8],
    /// Where `bytes` stands in the file; `None` where it had to be unpacked.
    pub origin: Option<(Source, u64)>,
    pub places: Places<'p>,
    /// Whether the bytes of the storages are of the other order.
    pub big_endian: bool,
    pub format: Format,
}

impl Places<'_> {
    /// About as many storages as there will be, so that tables need not grow; what is in the file bounds it.
    pub fn expected_storages(&self) -> usize {
        match self {
            Self::Archive(archive, _) => archive.entries().len(),
            Self::File(_, places) => places.len(),
            Self::Tar(_) => 0,
        }
    }
}

/// Most calls around a tensor (a parameter, a subclass); torch writes two.
const MAX_LINKS: usize = 8;

/// Rebuilds tensors of one pickle; storages are collected once each.
pub(super) struct Rebuild<'p> {
    pub(super) saved: Saved<'p>,
    pickle: &'p Pickle<'p>,
    globals: Globals,
    /// The storages in the order of first use.
    pub storages: Vec<Storage>,
    by_key: HashMap<&'p str, usize, RandomState>,
    /// Storages made for conjugate and negative views, so that two of one view share.
    made: HashMap<Making, usize>,
    /// Text of the last device: files name one or two, for each storage again.
    device: Arc<str>,
    /// Whether a storage was met that no tensor is around.
    bare_storage: bool,
    /// Tensors of classes that are not known, read as their plain payload.
    pub(super) notices: Vec<String>,
    /// Storages of numpy arrays by node, and by dtype where that is another than the array's.
    pub(super) arrays: HashMap<(NodeId, Dtype), usize>,
    /// Bytes of arrays that the pickle holds in another form, by where it does and the byte order of a cast.
    pub(super) unpacked: HashMap<(usize, Option<bool>), Source>,
    /// Storages that were pickled by themselves, by where their bytes stand.
    pub(super) pickled: HashMap<usize, View>,
}

impl<'p> Rebuild<'p> {
    pub fn new(mut saved: Saved<'p>) -> Self {
        let expected = saved.places.expected_storages();
        let storages = match &mut saved.places {
            Places::Tar(numbers) => numbers.take_storages(),
            _ => Vec::with_capacity(expected),
        };
        Self {
            pickle: saved.pickle,
            globals: Globals::new(saved.pickle),
            saved,
            storages,
            by_key: HashMap::with_capacity_and_hasher(expected, RandomState::default()),
            made: HashMap::new(),
            device: "cpu".into(),
            bare_storage: false,
            notices: Vec::new(),
            arrays: HashMap::new(),
            unpacked: HashMap::new(),
            pickled: HashMap::new(),
        }
    }

    /// As [`Globals::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.globals.check_unchanged(self.pickle)
    }

    /// The tensor or the parts that a value is, if it is a call of the table. `Unreadable` where only this tensor is
    /// out of reach.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) where the arguments contradict themselves or the archive.
    pub fn item(&mut self, id: NodeId) -> Result<Option<Rebuilt>> {
        let mut around = Around::default();
        let rebuilt = self.rebuilt(id, &mut around)?;
        let Around { attributes, is_cast, dtype } = around;
        let rebuilt = if is_cast { rebuilt.map(|rebuilt| cast(rebuilt, dtype)) } else { rebuilt };
        Ok(rebuilt.map(|rebuilt| rebuilt.with(attributes)))
    }

    fn rebuilt(&mut self, id: NodeId, around: &mut Around) -> Result<Option<Rebuilt>> {
        let pickle = self.pickle;
        let id = self.unwrap(id)?;
        let Some((mut function, object)) = self.globals.call(pickle, id) else { return self.uncalled(id) };
        if let Function::Array = function {
            return self.array(id).map(Some);
        }
        let mut args = pickle.as_tuple(object.args).unwrap_or_default();
        for _ in 0..MAX_LINKS {
            let item = match function {
                Function::First | Function::WithState | Function::FromCpu | Function::FromType => {
                    match self.inner(function, args, around)? {
                        Inner::Call(next, inner) => (function, args) = (next, inner),
                        Inner::Done(rebuilt) => return Ok(Some(rebuilt)),
                    }
                    continue;
                }
                Function::TensorV2 => self.tensor(args, None, args.get(6))?,
                Function::TensorV3 => match args.get(6).and_then(|id| global_dtype(pickle, *id)) {
                    Some(dtype) => self.tensor(args, Some(dtype), args.get(7))?,
                    None => Item::Unreadable("its dtype is not known".to_owned()),
                },
                Function::Quantised => return self.quantised(args).map(Some),
                Function::Sparse => return sparse(pickle, args).map(Some),
                Function::Nested => return nested(args).map(Some),
                Function::Jagged => return jagged(pickle, args).map(Some),
                Function::Shell => Item::Unreadable("it is a tensor subclass without its parts".to_owned()),
                Function::Meta => {
                    let [dtype, shape, ..] = args else { return Err(Error::format("meta tensor without a shape")) };
                    let what = describe_meta(pickle, *dtype, *shape);
                    Item::Unreadable(format!("it is a meta tensor {what}, which has no data"))
                }
                Function::FromNumpy => self.device_array(args)?,
                Function::Array => Item::Unreadable("it is a parameter around a numpy array".to_owned()),
                Function::Other(what) => Item::Unreadable(format!("it is {what}, which is not read yet")),
            };
            return Ok(Some(Rebuilt::Item(item)));
        }
        Err(Error::format("a tensor in a tensor in a tensor, and so on"))
    }

    /// Looks into a parameter or subclass: the call that makes its tensor, or what can be said without one.
    fn inner(&mut self, outer: Function, args: &'p [NodeId], around: &mut Around) -> Result<Inner<'p>> {
        let pickle = self.pickle;
        if let Function::First | Function::WithState | Function::FromCpu = outer {
            match (outer, args) {
                (Function::WithState, [_, _, _, state, ..]) => around.attributes.extend(attributes(pickle, *state)),
                (Function::FromCpu, [_, dtype, ..]) => {
                    (around.is_cast, around.dtype) = (true, global_dtype(pickle, *dtype));
                }
                _ => {}
            }
            let id = self.unwrap(*args.first().ok_or_else(|| Error::format("parameter without a tensor"))?)?;
            let Some((function, object)) = self.globals.call(pickle, id) else {
                if let Some(rebuilt) = self.uncalled(id)? {
                    return Ok(Inner::Done(rebuilt));
                }
                let what = format!("it depends on {}, which reweft does not know", pickle.describe(id));
                return Ok(Inner::Done(Rebuilt::Item(Item::Unreadable(what))));
            };
            return Ok(Inner::Call(function, pickle.as_tuple(object.args).unwrap_or_default()));
        }
        let [function, class, inner, state, ..] = args else {
            return Err(Error::format(format!("tensor of a class with {} arguments, wanted 4", args.len())));
        };
        let name = pickle.as_global(*class).map_or_else(String::new, |(module, name)| format!("{module}.{name}"));
        let row = pickle.as_global(*function).and_then(|name| FUNCTIONS.iter().find(|row| (row.0, row.1) == name));
        match (row, pickle.as_tuple(*inner)) {
            (Some((_, _, Function::Shell)), Some(inner)) => {
                let parts = attributes(pickle, *state);
                let what = describe_shell(pickle, inner);
                Ok(Inner::Done(if parts.is_empty() {
                    Rebuilt::Item(Item::Unreadable(format!("it is a {what} without its parts")))
                } else {
                    Rebuilt::Parts(what, parts)
                }))
            }
            (Some((_, _, function)), Some(inner)) => {
                around.attributes.extend(attributes(pickle, *state));
                if !is_plain_class(pickle, *class) && !matches!(function, Function::Jagged) {
                    self.notices.push(format!("a tensor of class {name} is read as its plain payload"));
                }
                Ok(Inner::Call(*function, inner))
            }
            _ => {
                let what = format!("it is made by {}, which reweft does not know", pickle.describe(*function));
                Ok(Inner::Done(Rebuilt::Item(Item::Unreadable(what))))
            }
        }
    }

    /// A tensor that no function of the table makes: a persistent id, or an object of a tensor class with a state.
    fn uncalled(&mut self, id: NodeId) -> Result<Option<Rebuilt>> {
        let pickle = self.pickle;
        if let Value::Persistent(pid) = pickle.get(id) {
            return Ok(self.persistent(id, *pid)?.map(Rebuilt::Item));
        }
        self.old_tensor(id)
    }

    /// What stands for itself and not in a call: a tensor of a tar archive, or a storage without a tensor.
    fn persistent(&mut self, id: NodeId, pid: NodeId) -> Result<Option<Item>> {
        if let Places::Tar(numbers) = &self.saved.places
            && let Some(Numbered::Tensor(item)) = numbers.object(self.pickle, pid)?
        {
            return Ok(Some(item.clone()));
        }
        let Some(view) = self.storage(id)? else { return Ok(None) };
        let held = &self.storages[view.storage];
        if &*held.device == "meta" {
            return Ok(Some(Item::Unreadable("it is a storage without data".to_owned())));
        }
        let dtype = held.dtype.unwrap_or(Dtype::U8);
        let numel = view.nbytes / dtype.itemsize().unwrap_or(1);
        self.bare_storage = true;
        view.tensor(dtype, vec![numel], vec![1], 0).map(|info| Some(readable(info)))
    }

    /// Tensors of the first releases: an object of a tensor class with `(storage, offset, size, stride)` as its state.
    fn old_tensor(&mut self, id: NodeId) -> Result<Option<Rebuilt>> {
        let pickle = self.pickle;
        let Some([.., state]) = self.globals.object(pickle, id).map(Object::state) else { return Ok(None) };
        match pickle.as_tuple(*state) {
            Some(state) if state.len() == 4 => Ok(Some(Rebuilt::Item(self.tensor(state, None, None)?))),
            _ => Ok(None),
        }
    }

    /// From a parameter of the first releases to its data: `(data, grad, hooks, requires_grad, volatile)` as its
    /// state, or the data as its first argument. Source: `Tensor.__setstate__`.
    fn unwrap(&self, mut id: NodeId) -> Result<NodeId> {
        let pickle = self.pickle;
        for _ in 0..MAX_LINKS {
            let Some(object) = self.globals.object(pickle, id) else { return Ok(id) };
            let state = object.state().last().and_then(|state| pickle.as_tuple(*state)).unwrap_or_default();
            id = match (state, pickle.as_tuple(object.args)) {
                ([_, _, _, _], _) => return Ok(id),
                ([data, _, _, _, _], _) => *data,
                (_, Some([data, ..])) if is_parameter(pickle, object) => *data,
                _ => return Ok(id),
            };
        }
        Err(Error::format("a tensor in a tensor in a tensor, and so on"))
    }

    fn tensor(&mut self, args: &[NodeId], dtype: Option<Dtype>, metadata: Option<&NodeId>) -> Result<Item> {
        let info = match self.view(args, dtype)? {
            Ok(info) => info,
            Err(why) => return Ok(Item::Unreadable(why)),
        };
        Ok(match metadata.map(|id| signs(self.pickle, *id)) {
            None => readable(info),
            Some(Some(signs)) => readable(self.with_signs(info, signs)?),
            Some(None) => Item::Unreadable("its metadata says something that reweft does not know".to_owned()),
        })
    }

    /// The values that torch's conjugate and negative bits ask for; they are computed when they are read.
    fn with_signs(&mut self, of: TensorInfo, signs: Signs) -> Result<TensorInfo> {
        if signs == (Signs { conjugate: false, negate: false }) {
            return Ok(of);
        }
        let (dtype, shape) = (of.dtype, of.shape.clone());
        signs.check(dtype)?;
        let making = Making::Signs { of, signs };
        let storage = if let Some(number) = self.made.get(&making) {
            *number
        } else {
            self.storages.push(Storage::made(making.clone(), 1)?);
            self.made.insert(making, self.storages.len() - 1);
            self.storages.len() - 1
        };
        Ok(TensorInfo { dtype, strides: contiguous(&shape), shape, storage, storage_offset: 0 })
    }

    /// `(storage, offset, size, stride, ...)` as a view; the inner error says why only this tensor is out of reach.
    fn view(&mut self, args: &[NodeId], dtype: Option<Dtype>) -> Result<Result<TensorInfo, String>> {
        let pickle = self.pickle;
        let [storage, storage_offset, shape, strides, ..] = args else {
            return Err(Error::format(format!("tensor of {} arguments, wanted at least 4", args.len())));
        };
        let Some(view) = self.storage(*storage)? else {
            let what = pickle.describe(*storage);
            return Ok(Err(format!("its storage is {what}, which reweft does not know")));
        };
        let held = &self.storages[view.storage];
        let is_meta = &*held.device == "meta";
        let Some(dtype) = dtype.or(held.dtype) else {
            return Err(Error::format("tensor of an untyped storage states no dtype"));
        };
        if dtype.itemsize().is_none() {
            return Err(Error::format(format!("torch has no dtype {dtype}")));
        }
        let storage_offset = size(pickle, *storage_offset, "storage offset")?;
        let (shape, strides) = (sizes(pickle, *shape, "size")?, sizes(pickle, *strides, "stride")?);
        if is_meta {
            return Ok(Err(format!("it is a meta tensor of {dtype} {shape:?}, which has no data")));
        }
        view.tensor(dtype, shape, strides, storage_offset).map(Ok)
    }

    /// The integers of a quantised tensor, and what turns them into numbers.
    fn quantised(&mut self, args: &[NodeId]) -> Result<Rebuilt> {
        let pickle = self.pickle;
        let (quantised, info) = match self.integers(args)? {
            Ok(found) => found,
            Err(why) => return Ok(Rebuilt::Item(Item::Unreadable(why))),
        };
        let Some([scheme, scale, zero_point, rest @ ..]) = args.get(4).and_then(|id| pickle.as_tuple(*id)) else {
            return Err(Error::format("quantised tensor without a scheme"));
        };
        let scheme = pickle.as_global(*scheme).map_or("unknown scheme", |(_, name)| name);
        let what = format!("{scheme} quantised tensor of {quantised}");
        let mut parts = vec![
            ("int_repr".to_owned(), Part::Item(Box::new(Item::Tensor(info)))),
            ("scale".to_owned(), Part::Node(*scale)),
            ("zero_point".to_owned(), Part::Node(*zero_point)),
        ];
        parts.extend(rest.iter().map(|axis| ("axis".to_owned(), Part::Node(*axis))));
        Ok(Rebuilt::Parts(what, parts))
    }

    /// The dtype of a quantised tensor, and its integers as `int_repr()` gives them: those of fewer than 8 bits stay
    /// packed, in one dimension.
    fn integers(&mut self, args: &[NodeId]) -> Result<Result<(Dtype, TensorInfo), String>> {
        let Some(view) = args.first().map(|id| self.storage(*id)).transpose()?.flatten() else {
            return Ok(self.view(args, None)?.map(|info| (info.dtype, info)));
        };
        let held = self.storages[view.storage].dtype;
        let (dtype, in_a_byte) = match held {
            Some(Dtype::QInt8) => (Dtype::I8, 1),
            Some(Dtype::QInt32) => (Dtype::I32, 1),
            Some(Dtype::QUInt8) => (Dtype::U8, 1),
            Some(Dtype::QUInt4x2) => (Dtype::U8, 2),
            Some(Dtype::QUInt2x4) => (Dtype::U8, 4),
            other => {
                let found = other.map_or("untyped bytes", Dtype::name);
                return Err(Error::format(format!("quantised tensor of {found}")));
            }
        };
        let quantised = held.unwrap_or(dtype);
        if in_a_byte == 1 {
            return Ok(self.view(args, None)?.map(|info| (quantised, TensorInfo { dtype, ..info })));
        }
        let [_, offset, shape, strides, ..] = args else {
            return Err(Error::format(format!("tensor of {} arguments, wanted at least 4", args.len())));
        };
        let (shape, strides) = (sizes(self.pickle, *shape, "size")?, sizes(self.pickle, *strides, "stride")?);
        if size(self.pickle, *offset, "storage offset")? != 0 || !same_layout(&shape, &strides, &contiguous(&shape)) {
            return Ok(Err(format!("it is a view of a packed tensor of {quantised}")));
        }
        let numel = numel(&shape).ok_or_else(|| Error::format(format!("shape {shape:?} overflows")))?;
        let info = view.tensor(dtype, vec![numel.div_ceil(in_a_byte)], vec![1], 0)?;
        Ok(Ok((quantised, info)))
    }

    /// What of a storage a persistent id means; `None` if the value is something else.
    fn storage(&mut self, id: NodeId) -> Result<Option<View>> {
        let Value::Persistent(pid) = self.pickle.get(id) else { return self.pickled_storage(id) };
        if let Places::Tar(numbers) = &self.saved.places {
            return Ok(match numbers.object(self.pickle, *pid)? {
                Some(Numbered::Storage(view)) => Some(*view),
                _ => None,
            });
        }
        if !names_storage(self.pickle, *pid) {
            return Ok(None);
        }
        let StorageId { key, dtype, device, numel, view } = storage_id(self.pickle, &self.globals, *pid)?;
        let itemsize = dtype.and_then(Dtype::itemsize).unwrap_or(1);
        let nbytes = numel.checked_mul(itemsize).ok_or_else(|| Error::format("storage takes 2^64 bytes"))?;
        let number = if let Some(number) = self.by_key.get(key) {
            let held = &self.storages[*number];
            if (held.dtype, held.nbytes, &*held.device) != (dtype, nbytes, device) {
                return Err(Error::format(format!("storage {key:?} is described in two ways")));
            }
            *number
        } else {
            let storage = self.place(key, dtype, device, numel, nbytes)?;
            self.storages.push(storage);
            self.by_key.insert(key, self.storages.len() - 1);
            self.storages.len() - 1
        };
        // No overflow: the view's elements were held against the storage's.
        Ok(Some(View { storage: number, byte_offset: view.0 * itemsize, nbytes: view.1 * itemsize }))
    }

    fn place(&mut self, key: &str, dtype: Option<Dtype>, device: &str, numel: u64, nbytes: u64) -> Result<Storage> {
        if *self.device != *device {
            self.device = device.into();
        }
        let extent = Extent { dtype, nbytes, device: Arc::clone(&self.device) };
        let storage = match &self.saved.places {
            Places::Archive(archive, folder) => {
                let name = [folder, "/", key].concat();
                // Meta tensors have a storage, but no bytes anywhere.
                let number = archive.entries().get_index_of(&name);
                if let Some(number) = number {
                    let storage = Storage::record(Arc::clone(archive), number, extent);
                    if device != "meta" {
                        storage.check_nbytes()?;
                    }
                    storage
                } else if device == "meta" {
                    Storage::range(Arc::clone(archive.source()), 0, &name, Extent { nbytes: 0, ..extent })
                } else {
                    return Err(Error::format("the archive has no such record").in_record(name));
                }
            }
            Places::File(source, places) => {
                let (start, found) =
                    *places.get(key).ok_or_else(|| Error::format(format!("the file has no storage {key:?}")))?;
                if found != numel {
                    let what = format!("storage {key:?} has {found} elements, its tensors say {numel}");
                    return Err(Error::format(what));
                }
                Storage::range(Arc::clone(source), start, key, extent)
            }
            Places::Tar(_) => return Err(Error::format("a tar archive numbers its storages")),
        };
        Ok(if self.saved.big_endian { storage.swapped() } else { storage })
    }

    /// What a careful reader should know of the tensors that were asked for.
    pub fn take_notices(&mut self) -> Vec<String> {
        let mut notices = std::mem::take(&mut self.notices);
        if self.bare_storage {
            notices.push("a storage that no tensor is around is read as a tensor of one dimension".to_owned());
        }
        notices
    }
}

/// What the calls around a tensor say of it.
#[derive(Default)]
struct Around {
    attributes: Vec<(String, Part)>,
    /// Whether it is a tensor of another device, which is cast to `dtype`; `None` is one that is not known.
    is_cast: bool,
    dtype: Option<Dtype>,
}

/// Refuses a tensor that would be cast when it is loaded; torch states the dtype that is there.
fn cast(rebuilt: Rebuilt, dtype: Option<Dtype>) -> Rebuilt {
    match rebuilt {
        Rebuilt::Item(Item::Tensor(info)) if Some(info.dtype) != dtype => {
            let wanted = dtype.map_or("an unknown dtype", Dtype::name);
            Rebuilt::Item(Item::Unreadable(format!("it is a tensor of {} that stands for {wanted}", info.dtype)))
        }
        other => other,
    }
}

/// What is inside a parameter or subclass.
enum Inner<'p> {
    Call(Function, &'p [NodeId]),
    Done(Rebuilt),
}

/// The bits in `{"conj": True, "neg": True}`, either of which may be absent; `None` for anything else.
/// The bits in `{"conj": True, "neg": True}`, either of which may be absent; `None` for anything else.
fn signs(pickle: &Pickle<'_>, metadata: NodeId) -> Option<Signs> {
    if items_in(pickle, metadata) > 2 {
        return None;
    }
    let mut signs = Signs { conjugate: false, negate: false };
    for (key, value) in pickle.dict(metadata)?.iter() {
        match pickle.as_str(*key)? {
            "conj" => signs.conjugate = pickle.as_bool(*value)?,
            "neg" => signs.negate = pickle.as_bool(*value)?,
            _ => return None,
        }
    }
    Some(signs)
}

/// A tensor that can be read; the elements of quantised types mean nothing by themselves.
fn readable(info: TensorInfo) -> Item {
    match info.dtype {
        Dtype::QInt8 | Dtype::QUInt8 | Dtype::QInt32 | Dtype::QUInt4x2 | Dtype::QUInt2x4 => {
            Item::Unreadable("it is a quantised tensor without its parameters".to_owned())
        }
        _ => Item::Tensor(info),
    }
}

/// A tuple of sizes; `torch.Size` calls hold it as their one argument.
pub(super) fn sizes(pickle: &Pickle<'_>, id: NodeId, what: &str) -> Result<Vec<u64>> {
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
