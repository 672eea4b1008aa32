//! A parsed pickle and the questions that its readers ask.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::limits::Limits;
use crate::names::python3_name;
use crate::value::{Children, How, NodeId, Object, Value};
use crate::vm;

/// Protocols below this carry Python 2 names.
const FIRST_PYTHON3_PROTOCOL: u8 = 3;

/// Classes that are filled like a dict and may get pairs in their constructor, under Python 3
/// names. The factory of a `defaultdict` is not a pair, so that class has a row of its own.
const DICT_CLASSES: &[(&str, &str)] =
    &[("collections", "OrderedDict"), ("collections", "Counter"), ("builtins", "dict")];
const DEFAULTDICT: (&str, &str) = ("collections", "defaultdict");

/// One pickle as data, borrowing strings and bytes from the input.
///
/// Values are flat in one vector, so cloning ids is free and dropping a pickle of any depth does
/// not recurse. An id of another pickle gives some other value or `None`; it does not panic.
///
/// A pickle is a graph that may share and loop: a walk over it must keep a set of what it has seen,
/// or a budget.
///
/// ```
/// use reweft_pickle::{Limits, Pickle, Value};
/// let pickle = Pickle::parse(b"\x80\x02ctorch\nfloat32\nK\x05\x86.and the rest", &Limits::default())?;
/// let items = pickle.as_tuple(pickle.root()).expect("a tuple");
/// assert_eq!(pickle.as_global(items[0]), Some(("torch", "float32")));
/// assert_eq!(pickle.get(items[1]), &Value::Int(5));
/// assert_eq!(pickle.nbytes(), 21);
/// # Ok::<(), reweft_pickle::Error>(())
/// ```
#[derive(Debug)]
pub struct Pickle<'a> {
    pub(crate) nodes: Vec<Value<'a>>,
    pub(crate) globals: Vec<NodeId>,
    pub(crate) filled: Vec<NodeId>,
    pub(crate) pool: Vec<NodeId>,
    pub(crate) root: NodeId,
    pub(crate) protocol: u8,
    pub(crate) nbytes: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that starts at the first of `bytes` and ends with STOP; see
    /// [`Pickle::nbytes`] for the rest.
    ///
    /// Linear in the bytes of that pickle. Copies no string or bytes without escapes.
    ///
    /// # Errors
    /// Any [`ErrorKind`](crate::ErrorKind) but `Output`, with the byte offset of the opcode at
    /// fault. Nothing is given back of a pickle that is damaged anywhere before STOP.
    pub fn parse(bytes: &'a [u8], limits: &Limits) -> Result<Self> {
        vm::run(bytes, limits)
    }

    /// The value that the pickle stands for.
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// The declared protocol; 0 if none is declared.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Number of bytes read, STOP included; the next pickle of a stream starts there.
    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// All values in the order of creation, also those that the root does not reach.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Value<'a>)> {
        (0_u32..).map(NodeId::from_index).zip(&self.nodes)
    }

    /// The values that are classes or functions, in the order of creation: one for each opcode that names one.
    pub fn global_nodes(&self) -> &[NodeId] {
        &self.globals
    }

    /// The calls to whose results something was done afterwards: items or a state, in the order in which it began.
    pub fn filled_nodes(&self) -> &[NodeId] {
        &self.filled
    }

    #[cfg(test)]
    pub(crate) fn pool_len(&self) -> usize {
        self.pool.len()
    }

    /// The value of `id`.
    #[inline]
    pub fn get(&self, id: NodeId) -> &Value<'a> {
        self.nodes.get(id.index()).unwrap_or(&Value::None)
    }

    /// The items of a tuple or frozenset.
    #[inline]
    pub fn children(&self, children: Children) -> &[NodeId] {
        let rest = self.pool.get(children.start as usize..).unwrap_or_default();
        rest.get(..children.len()).unwrap_or_default()
    }

    /// The items, if `id` is a tuple.
    pub fn as_tuple(&self, id: NodeId) -> Option<&[NodeId]> {
        if let Value::Tuple(children) = *self.get(id) { Some(self.children(children)) } else { None }
    }

    /// The items, if `id` is a list.
    pub fn as_list(&self, id: NodeId) -> Option<&[NodeId]> {
        if let Value::List(items) = self.get(id) { Some(items) } else { None }
    }

    /// The items, if `id` is a list or a tuple.
    pub fn as_sequence(&self, id: NodeId) -> Option<&[NodeId]> {
        self.as_tuple(id).or_else(|| self.as_list(id))
    }

    /// The text, if `id` is a `str` without lone surrogates or a Python 2 `str` of ASCII.
    pub fn as_str(&self, id: NodeId) -> Option<&str> {
        match self.get(id) {
            Value::Str(text) => text.as_str(),
            Value::ByteStr(bytes) if bytes.is_ascii() => str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// The bytes, if `id` is `bytes`, a `bytearray` or a Python 2 `str`.
    pub fn as_bytes(&self, id: NodeId) -> Option<&[u8]> {
        match self.get(id) {
            Value::Bytes(bytes) | Value::ByteArray(bytes) => Some(bytes),
            Value::ByteStr(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The number, if `id` is an `int` of 64 bits; a `bool` is none here.
    pub fn as_i64(&self, id: NodeId) -> Option<i64> {
        if let Value::Int(value) = *self.get(id) { Some(value) } else { None }
    }

    /// The truth value, if `id` is a `bool`.
    pub fn as_bool(&self, id: NodeId) -> Option<bool> {
        if let Value::Bool(value) = *self.get(id) { Some(value) } else { None }
    }

    /// The number, if `id` is a `float`.
    pub fn as_f64(&self, id: NodeId) -> Option<f64> {
        if let Value::Float(value) = *self.get(id) { Some(value) } else { None }
    }

    /// The call, if `id` is the result of one.
    pub fn as_object(&self, id: NodeId) -> Option<&Object> {
        if let Value::Object(object) = self.get(id) { Some(object) } else { None }
    }

    /// Module and name, if `id` is a class or function; under Python 3 names whatever wrote the
    /// pickle.
    pub fn as_global(&self, id: NodeId) -> Option<(&str, &str)> {
        let Value::Global { module, name } = *self.get(id) else {
            return None;
        };
        let (module, name) = (self.as_str(module)?, self.as_str(name)?);
        Some(if self.protocol < FIRST_PYTHON3_PROTOCOL { python3_name(module, name) } else { (module, name) })
    }

    /// The call and the Python 3 name of what is called, if `id` is the result of calling a global.
    pub fn as_call(&self, id: NodeId) -> Option<((&str, &str), &Object)> {
        let object = self.as_object(id)?;
        Some((self.as_global(object.callable)?, object))
    }

    /// Keys and values of a `dict` or of an object filled like one, in the order written,
    /// duplicates included.
    ///
    /// For `OrderedDict`, `Counter`, `dict` and `defaultdict` the pairs given to the constructor
    /// come first, as in pickles of Python 2. Any other object counts if it has
    /// [`Object::dict_items`]; what its constructor would make of its arguments is not known.
    /// Borrowed unless constructor pairs must be collected, which is linear.
    pub fn dict(&self, id: NodeId) -> Option<Cow<'_, [(NodeId, NodeId)]>> {
        if let Value::Dict(pairs) = self.get(id) {
            return Some(Cow::Borrowed(pairs));
        }
        let object = self.as_object(id)?;
        let items = object.dict_items();
        let initial = match self.as_global(object.callable) {
            Some(class) if DICT_CLASSES.contains(&class) => self.as_tuple(object.args)?,
            Some(DEFAULTDICT) => self.as_tuple(object.args)?.get(1..).unwrap_or_default(),
            _ if items.is_empty() => return None,
            _ => &[],
        };
        let [initial] = initial else {
            return initial.is_empty().then_some(Cow::Borrowed(items));
        };
        let mut pairs = self.initial_pairs(*initial)?;
        pairs.extend_from_slice(items);
        Some(Cow::Owned(pairs))
    }

    /// What a dict makes of its one argument: a dict, or a sequence of pairs.
    fn initial_pairs(&self, id: NodeId) -> Option<Vec<(NodeId, NodeId)>> {
        if let Value::Dict(pairs) = self.get(id) {
            return Some(pairs.clone());
        }
        let pair = |&id: &NodeId| match self.as_sequence(id) {
            Some(&[key, value]) => Some((key, value)),
            _ => None,
        };
        self.as_sequence(id)?.iter().map(pair).collect()
    }

    /// Module and name of all classes and functions that the pickle mentions, each once, in the
    /// order of first mention; under Python 3 names. Also those whose use was undone by POP. Costs
    /// a pass over [`global_nodes`](Self::global_nodes).
    pub fn globals(&self) -> impl Iterator<Item = (&str, &str)> {
        // Each name is hashed once per value, not per mention, so that a long name mentioned often
        // stays cheap.
        let mut by_text = HashMap::new();
        let mut by_node = HashMap::new();
        let mut number = |id: NodeId| {
            let next = by_text.len();
            *by_node.entry(id).or_insert_with(|| *by_text.entry(self.as_str(id)).or_insert(next))
        };
        let mut seen = HashSet::new();
        let mut globals = Vec::new();
        for &id in &self.globals {
            if let Value::Global { module, name } = *self.get(id)
                && seen.insert((number(module), number(name)))
            {
                globals.extend(self.as_global(id));
            }
        }
        globals.into_iter()
    }

    /// A short text for messages, such as `int 3`, `str "abc"`, `list of 4` or `__main__.Net
    /// object`.
    ///
    /// Bounded: long texts are cut, and nothing inside a container is shown.
    pub fn describe(&self, id: NodeId) -> String {
        let value = self.get(id);
        let kind = value.kind_name();
        match value {
            Value::None => kind.to_owned(),
            Value::Bool(true) => "bool True".to_owned(),
            Value::Bool(false) => "bool False".to_owned(),
            Value::Int(value) => format!("{kind} {value}"),
            Value::BigInt(value) if value.to_le_bytes().len() <= SHOWN_NBYTES => {
                format!("{kind} {value}")
            }
            Value::BigInt(value) => format!("{kind} of {} bytes", value.to_le_bytes().len()),
            Value::Float(value) => format!("{kind} {value:?}"),
            Value::Str(text) => format!("{kind} {}", quoted(text.as_str(), text.as_bytes())),
            Value::ByteStr(bytes) => format!("{kind} {}", quoted(None, bytes)),
            Value::Bytes(bytes) | Value::ByteArray(bytes) => {
                format!("{kind} {}", quoted(None, bytes))
            }
            Value::Tuple(items) | Value::FrozenSet(items) => format!("{kind} of {}", items.len()),
            Value::List(items) | Value::Set(items) => format!("{kind} of {}", items.len()),
            Value::Dict(pairs) => format!("{kind} of {}", pairs.len()),
            Value::Global { .. } => format!("{kind} {}", self.global_name(id)),
            Value::Persistent(pid) => format!("{kind} with id {}", self.get(*pid).kind_name()),
            Value::Object(object) if object.how == How::Reduce => {
                format!("result of {}", self.global_name(object.callable))
            }
            Value::Object(object) => format!("{} object", self.global_name(object.callable)),
            Value::Extension(code) => format!("{kind} {code}"),
        }
    }

    /// The dotted name of a global, cut if long; the kind of anything else.
    fn global_name(&self, id: NodeId) -> String {
        match self.as_global(id) {
            Some((module, name)) => format!("{}.{}", clip(module), clip(name)),
            None => self.get(id).kind_name().to_owned(),
        }
    }
}

/// The text, or else the bytes, in quotes; if cut, with the length in bytes.
pub(crate) fn quoted(text: Option<&str>, bytes: &[u8]) -> String {
    let shown = bytes.get(..SHOWN_NBYTES).unwrap_or(bytes);
    let (quoted, nbytes) = match text.map(clip) {
        Some(text) => (format!("{text:?}"), text.len()),
        None => (format!("\"{}\"", shown.escape_ascii()), shown.len()),
    };
    if nbytes < bytes.len() { format!("{quoted}... ({} bytes)", bytes.len()) } else { quoted }
}

/// How much of a text [`Pickle::describe`] shows.
const SHOWN_NBYTES: usize = 60;

/// The start of a text, ending between characters.
fn clip(text: &str) -> &str {
    let end = (0..=SHOWN_NBYTES).rev().find(|&end| text.is_char_boundary(end));
    end.filter(|&end| end < text.len()).and_then(|end| text.get(..end)).unwrap_or(text)
}
