//! From a pickle to the values of a config, one value after the other: no recursion, whatever the depth.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use reweft_pickle::{How, NodeId, Object as Call, Pickle, Value as Node};

use super::known;
use super::value::{Array, Dict, DictClass, Elements, Id, Name, NameKind, Object, Opaque, Pairs, Value};
use super::{Config, Label};
use crate::checkpoint::numpy::{self, Data};
use crate::checkpoint::{Budget, OpenOptions, is_tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::suggest;

/// Most wrappers around one value that are looked through; two occur.
const MAX_WRAPPERS: usize = 64;

/// Classes of `builtins` that a `defaultdict` may make values with.
const FACTORIES: &[&str] =
    &["list", "dict", "set", "tuple", "int", "float", "bool", "str", "bytes", "complex", "frozenset"];

/// Reads the value below `top_level_key` and all that it holds.
pub(crate) fn read(pickle: &Pickle<'_>, options: &OpenOptions) -> Result<Config> {
    walk(pickle, root(pickle, options)?, options, false)?.checked()
}

/// Reads an attribute of the object below `top_level_key`, as `copy.copy` and pickles keep it; `None` if it has none.
pub(crate) fn attribute(pickle: &Pickle<'_>, name: &str, options: &OpenOptions) -> Result<Option<Config>> {
    let Some(object) = pickle.as_object(root(pickle, options)?) else { return Ok(None) };
    let named = object.state().iter().rev().filter_map(|state| pickle.dict(*state)).find_map(|pairs| {
        pairs.iter().rev().find(|(key, _)| pickle.as_str(*key) == Some(name)).map(|(_, value)| *value)
    });
    let config = named.map(|value| walk(pickle, value, options, false)?.checked()).transpose();
    config.map_err(|error| error.of_key(name))
}

/// Reads everything in a pickle, with tensors and what is not known as [`Value::Opaque`]. Values may hold themselves,
/// and dicts may have a key twice.
pub(crate) fn survey(pickle: &Pickle<'_>, options: &OpenOptions) -> Result<Config> {
    walk(pickle, root(pickle, options)?, options, true)
}

fn root(pickle: &Pickle<'_>, options: &OpenOptions) -> Result<NodeId> {
    options.top_level_key.as_deref().map_or(Ok(pickle.root()), |key| descend(pickle, key))
}

fn walk(pickle: &Pickle<'_>, root: NodeId, options: &OpenOptions, is_survey: bool) -> Result<Config> {
    let top_level_key = options.top_level_key.as_deref();
    let mut reader = Reader {
        pickle,
        ids: HashMap::new(),
        nodes: Vec::new(),
        config: Config {
            values: Vec::new(),
            origins: Vec::new(),
            prefix: top_level_key.unwrap_or_default().to_owned(),
        },
        shared: HashMap::new(),
        is_survey,
    };
    reader.child(root, Id(0), Label::Root).map_err(|error| error.of_key(top_level_key.unwrap_or_default()))?;
    let (mut next, mut budget) = (0, Budget::new(pickle, &options.limits));
    while let Some(node) = reader.nodes.get(next).copied() {
        let id = Id(number(next)?);
        budget.look_at(pickle, node)?;
        let value = match reader.value(node, id) {
            Err(error) if is_survey && error.kind() != ErrorKind::Limit => {
                let is_tensor = is_tensor(pickle, node);
                Value::Opaque(Box::new(Opaque { is_tensor, what: error.to_string() }))
            }
            found => found.map_err(|error| error.of_key(reader.config.path(id)))?,
        };
        reader.config.values.push(value);
        next += 1;
    }
    Ok(reader.config)
}

fn number(index: usize) -> Result<u32> {
    u32::try_from(index).map_err(|_| Error::new(ErrorKind::Limit, "a config of more than 2^32 values"))
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

pub(super) struct Reader<'p> {
    pub(super) pickle: &'p Pickle<'p>,
    ids: HashMap<NodeId, Id>,
    /// What is still to be read, or was, by number.
    nodes: Vec<NodeId>,
    config: Config,
    /// Bytes of arrays by where the pickle has them, so that many arrays over one text cost it once.
    shared: HashMap<usize, Arc<[u8]>>,
    is_survey: bool,
}

impl<'p> Reader<'p> {
    /// The number of a value that `parent` holds.
    fn child(&mut self, node: NodeId, parent: Id, label: Label) -> Result<Id> {
        if let Some(id) = self.ids.get(&node) {
            return Ok(*id);
        }
        let meant = self.unwrap(node)?;
        if let Some(id) = self.ids.get(&meant).copied() {
            self.ids.insert(node, id);
            return Ok(id);
        }
        let id = Id(number(self.nodes.len())?);
        self.nodes.push(meant);
        self.config.origins.push((parent, label));
        self.ids.insert(meant, id);
        self.ids.insert(node, id);
        Ok(id)
    }

    /// Looks through what only wraps a value: `torch.Size` around its tuple, omegaconf's nodes around their content.
    fn unwrap(&self, node: NodeId) -> Result<NodeId> {
        let mut node = node;
        for _ in 0..MAX_WRAPPERS {
            match known::wrapped(self.pickle, node) {
                Some(inner) => node = inner,
                None => return Ok(node),
            }
        }
        Err(Error::format("a value in a wrapper in a wrapper, and so on"))
    }

    pub(super) fn items(&mut self, items: &[NodeId], parent: Id) -> Result<Vec<Id>> {
        let ids = items.iter().enumerate().map(|(place, item)| self.child(*item, parent, Label::Item(number(place)?)));
        ids.collect()
    }

    pub(super) fn pairs(&mut self, pairs: &[(NodeId, NodeId)], parent: Id) -> Result<Pairs> {
        let mut ids = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            let key = self.child(*key, parent, Label::IsKey)?;
            ids.push((key, self.child(*value, parent, Label::Key(key))?));
        }
        Ok(ids)
    }

    fn value(&mut self, node: NodeId, id: Id) -> Result<Value> {
        let pickle = self.pickle;
        Ok(match pickle.get(node) {
            Node::None => Value::None,
            Node::Bool(value) => Value::Bool(*value),
            Node::Int(value) => Value::Int(*value),
            Node::BigInt(value) => Value::BigInt(Box::new(value.to_static())),
            Node::Float(value) => Value::Float(*value),
            Node::Str(text) => match text.as_str() {
                Some(text) => Value::Str(text.into()),
                None => Value::Surrogates(text.as_bytes().into()),
            },
            // What torch.load does with texts of Python 2, whose encoding nobody wrote down.
            Node::ByteStr(bytes) => match str::from_utf8(bytes) {
                Ok(text) => Value::Str(text.into()),
                Err(_) => return Err(unsupported("it is a text of Python 2 that is not UTF-8")),
            },
            Node::Bytes(bytes) => Value::Bytes((*bytes).into()),
            Node::ByteArray(bytes) => Value::ByteArray((*bytes).into()),
            Node::Tuple(items) => Value::Tuple(self.items(pickle.children(*items), id)?),
            Node::FrozenSet(items) => Value::FrozenSet(self.items(pickle.children(*items), id)?),
            Node::List(items) => Value::List(self.items(items, id)?),
            Node::Set(items) => Value::Set(self.items(items, id)?),
            Node::Dict(pairs) => Value::Dict(Box::new(Dict { class: DictClass::Dict, pairs: self.pairs(pairs, id)? })),
            Node::Global { .. } => Value::Name(Box::new(known::name(pickle, node))),
            Node::Object(call) => self.call(node, call, id)?,
            Node::Persistent(_) => return Err(tensor("the storage of a tensor")),
            _ => return Err(unsupported(format!("it is {}, which reweft does not know", pickle.describe(node)))),
        })
    }

    /// What a call would have made.
    fn call(&mut self, node: NodeId, call: &'p Call, id: Id) -> Result<Value> {
        let pickle = self.pickle;
        if let Some(data) = numpy::bytes(pickle, node) {
            return Ok(Value::Bytes(decoded(data)?));
        }
        if let Some(data) = numpy::bytearray(pickle, node) {
            return Ok(Value::ByteArray(decoded(data)?));
        }
        if self.is_survey && is_tensor(pickle, node) {
            return Err(tensor("a tensor"));
        }
        if let Some(array) = numpy::array(pickle, node)? {
            return self.array(&array, id);
        }
        if let Some(scalar) = numpy::scalar(pickle, node)? {
            check_dtype(&scalar.descr)?;
            let elements = Elements::Bytes(scalar.bytes.into());
            let array = Array { descr: scalar.descr, shape: Vec::new(), strides: Vec::new(), elements };
            return Ok(Value::Scalar(Box::new(array)));
        }
        if let Some((("numpy", "dtype"), _)) = pickle.as_call(node) {
            let descr = numpy::descr(pickle, node)?;
            check_dtype(&descr)?;
            let text = descr.text();
            return Ok(Value::Name(Box::new(Name { kind: NameKind::NumpyDtype, text })));
        }
        if is_tensor(pickle, node) {
            return Err(tensor("a tensor"));
        }
        if let Some(class) = dict_class(pickle, node)? {
            // A state_dict has attributes that say nothing of its values.
            let plain = self.is_survey
                || call.state().iter().all(|state| pickle.dict(*state).is_some_and(|pairs| pairs.is_empty()));
            let pairs = pickle.dict(node).filter(|_| plain && call.list_items().is_empty());
            let Some(pairs) = pairs else {
                return Err(unsupported(format!("it is {} with attributes of its own", pickle.describe(node))));
            };
            return Ok(Value::Dict(Box::new(Dict { class, pairs: self.pairs(&pairs, id)? })));
        }
        match known::value(self, node, id)? {
            Some(value) => Ok(value),
            None => self.unknown(node, call, id),
        }
    }

    fn array(&mut self, array: &numpy::Array<'p>, id: Id) -> Result<Value> {
        if let Some(class) = &array.class {
            return Err(unsupported(format!("it is an array of class {class}, which reweft does not know")));
        }
        check_dtype(&array.descr)?;
        let elements = match array.data {
            Data::Objects(items) => Elements::Objects(self.items(items, id)?),
            Data::Bytes(bytes) => Elements::Bytes(self.share(bytes.as_ptr().addr(), array.data)?),
            Data::Latin1(text) => Elements::Bytes(self.share(text.as_ptr().addr(), array.data)?),
        };
        let numel = crate::tensor::numel(&array.shape);
        if let Elements::Bytes(bytes) = &elements
            && numel.and_then(|numel| numel.checked_mul(array.descr.itemsize)) != Some(bytes.len() as u64)
        {
            return Err(Error::format(format!("{} holds {} bytes", array.describe(), bytes.len())));
        }
        let (descr, shape, strides) = (array.descr.clone(), array.shape.clone(), array.strides.clone());
        Ok(Value::Array(Box::new(Array { descr, shape, strides, elements })))
    }

    fn share(&mut self, place: usize, data: Data<'p>) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.shared.get(&place) {
            return Ok(bytes.clone());
        }
        let bytes: Arc<[u8]> = decoded(data)?.into();
        self.shared.insert(place, bytes.clone());
        Ok(bytes)
    }

    /// An instance of a class that is not known: its name, what it would be called with, and its state.
    fn unknown(&mut self, node: NodeId, call: &Call, id: Id) -> Result<Value> {
        let pickle = self.pickle;
        let bad = |what: &str| unsupported(format!("it is {}, {what}", pickle.describe(node)));
        let Some((class, args)) = known::class_and_args(pickle, call) else {
            return Err(bad("whose class has no name"));
        };
        if call.how == How::NewObjEx || !call.set_items().is_empty() {
            return Err(bad("which is made in a way that is not known"));
        }
        let mut state = Vec::new();
        for part in call.state() {
            let pairs = known::attributes(pickle, *part);
            state.extend(pairs.ok_or_else(|| bad("whose state is no dict of attributes"))?);
        }
        let mut object = Object { class: format!("{}.{}", class.0, class.1), ..Object::default() };
        object.args = self.items(args, id)?;
        object.attributes = self.pairs(&state, id)?;
        if !call.dict_items().is_empty() {
            object.items = Some(self.pairs(call.dict_items(), id)?);
        }
        if !call.list_items().is_empty() {
            object.elements = Some(self.items(call.list_items(), id)?);
        }
        Ok(Value::Object(Box::new(object)))
    }
}

/// Refuses the dtypes that another package adds to numpy's.
fn check_dtype(descr: &numpy::Descr) -> Result<()> {
    match descr.dtype {
        Some(dtype) if dtype.numpy().is_none() => {
            Err(unsupported(format!("its dtype is {dtype}, which numpy alone does not have")))
        }
        _ => Ok(()),
    }
}

fn tensor(what: &str) -> Error {
    unsupported(format!("it is {what}, which is no part of a config"))
        .with_hint("name the part that is a config: top_level_key, or `--key`")
}

fn decoded(data: Data<'_>) -> Result<Box<[u8]>> {
    let bytes = data.bytes().ok_or_else(|| Error::format("bytes that are no Latin-1 text"))?;
    Ok(bytes.into_owned().into())
}

/// Which dict of Python's library a call makes.
fn dict_class(pickle: &Pickle<'_>, node: NodeId) -> Result<Option<DictClass>> {
    let Some((name, call)) = pickle.as_call(node) else { return Ok(None) };
    Ok(Some(match name {
        ("builtins", "dict") => DictClass::Dict,
        ("collections", "OrderedDict") => DictClass::OrderedDict,
        ("collections", "Counter") => DictClass::Counter,
        ("collections", "defaultdict") => {
            let factory = pickle.as_tuple(call.args).and_then(|args| args.first().copied());
            DictClass::DefaultDict(match factory.map(|id| (pickle.get(id), pickle.as_global(id))) {
                None | Some((Node::None, _)) => None,
                Some((_, Some(("builtins", name)))) if FACTORIES.contains(&name) => Some(name.into()),
                Some(_) => {
                    let what = factory.map_or_else(String::new, |id| pickle.describe(id));
                    return Err(unsupported(format!("it is a defaultdict that makes values by {what}")));
                }
            })
        }
        _ => return Ok(None),
    }))
}

/// Follows a dotted path through dicts, lists and attributes; where a key has dots, the longest that fits is taken.
fn descend(pickle: &Pickle<'_>, path: &str) -> Result<NodeId> {
    let mut id = pickle.root();
    let mut rest = path;
    loop {
        let names = known::members(pickle, id);
        let fits = |name: &str| rest.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with('.'));
        // Of equal names the last one, as in a dict.
        let best = names.iter().filter(|(name, _)| fits(name).is_some()).max_by_key(|(name, _)| name.len());
        let Some((name, child)) = best else {
            let listed: Vec<&str> = names.iter().map(|(name, _)| &**name).take(20).collect();
            let hint = suggest(rest, names.iter().map(|(name, _)| &**name));
            let what = format!("no such top-level key; there are: {}", listed.join(", "));
            return Err(Error::new(ErrorKind::NotFound, what).of_key(path).with_hint(hint));
        };
        id = *child;
        rest = rest.get(name.len()..).unwrap_or_default();
        match rest.strip_prefix('.') {
            Some(more) => rest = more,
            None => return Ok(id),
        }
    }
}

/// What Python compares keys by, for keys that are no containers.
#[derive(PartialEq, Eq, Hash)]
enum Key<'c> {
    None,
    Number(i128),
    Big(&'c [u8]),
    Float(u64),
    Text(&'c [u8]),
    Bytes(&'c [u8]),
}

impl Config {
    /// Refuses what Python's dicts and no tree can say.
    fn checked(self) -> Result<Self> {
        self.check_cycles()?;
        self.check_keys()?;
        Ok(self)
    }

    /// Refuses a dict or set that has one key twice: which value is meant depends on the reader.
    fn check_keys(&self) -> Result<()> {
        for (index, value) in self.values.iter().enumerate() {
            let keys: Vec<Id> = match value {
                Value::Dict(dict) => dict.pairs.iter().map(|(key, _)| *key).collect(),
                Value::Namespace(namespace) => namespace.attributes.iter().map(|(key, _)| *key).collect(),
                Value::Set(items) | Value::FrozenSet(items) => items.clone(),
                _ => continue,
            };
            let mut seen = HashSet::with_capacity(keys.len());
            for key in keys {
                if let Some(known) = self.key(key)
                    && !seen.insert(known)
                {
                    let what = format!("a {} has {} twice", value.kind(), self.label(key));
                    let error = Error::new(ErrorKind::KeyCollision, what);
                    return Err(error.of_key(self.path(Id(number(index)?))));
                }
            }
        }
        Ok(())
    }

    fn key(&self, id: Id) -> Option<Key<'_>> {
        Some(match self.get(id) {
            Value::None => Key::None,
            Value::Bool(value) => Key::Number((*value).into()),
            Value::Int(value) => Key::Number((*value).into()),
            Value::BigInt(value) => value.to_i128().map_or(Key::Big(value.to_le_bytes()), Key::Number),
            Value::Float(value) => match exact_integer(*value) {
                Some(number) => Key::Number(number),
                // NaN is no other NaN.
                None if value.is_nan() => return None,
                None => Key::Float(value.to_bits()),
            },
            Value::Str(text) => Key::Text(text.as_bytes()),
            Value::Surrogates(text) => Key::Text(text),
            Value::Bytes(bytes) => Key::Bytes(bytes),
            _ => return None,
        })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the range is checked, and the value is whole")]
fn exact_integer(value: f64) -> Option<i128> {
    /// 2^126, far inside the range.
    const BOUND: f64 = 8.507_059_173_023_462e37;
    (value.fract() == 0.0 && value.abs() < BOUND).then_some(value as i128)
}
