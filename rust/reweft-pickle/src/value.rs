//! What a pickle holds: values that name each other by id, so that nothing nests and nothing
//! recurses.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;

use crate::bigint::BigInt;
use crate::text::Text;

/// The name of a value within one [`Pickle`](crate::Pickle). Two uses of one id are one Python
/// object.
///
/// The converse does not hold for immutable values: picklers write equal ints or strings anew at
/// will.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(NonZeroU32);

impl NodeId {
    /// The one `None` of every pickle.
    pub const NONE: Self = Self(NonZeroU32::MIN);
    /// The one `True` of every pickle.
    pub const TRUE: Self = Self(NonZeroU32::MIN.saturating_add(1));
    /// The one `False` of every pickle.
    pub const FALSE: Self = Self(NonZeroU32::MIN.saturating_add(2));
    /// The one `()` of every pickle.
    pub const EMPTY_TUPLE: Self = Self(NonZeroU32::MIN.saturating_add(3));

    pub(crate) fn from_index(index: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index))
    }

    /// Position in [`Pickle::nodes`](crate::Pickle::nodes); values are numbered in the order of
    /// creation.
    pub fn index(self) -> usize {
        self.0.get().saturating_sub(1) as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "&{}", self.index())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The items of a tuple or frozenset; [`Pickle::children`](crate::Pickle::children) gives them.
///
/// They lie in one pool for the whole pickle, which spares an allocation per tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Children {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

impl Children {
    /// Number of items.
    pub fn len(self) -> usize {
        self.len as usize
    }

    /// Whether there are no items.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// One value. At most 32 bytes; strings and bytes borrow from the input.
#[derive(Debug, PartialEq)]
#[non_exhaustive]
pub enum Value<'a> {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An `int` that fits 64 bits.
    Int(i64),
    /// An `int` that does not.
    BigInt(BigInt<'a>),
    /// A `float`.
    Float(f64),
    /// A `str`.
    Str(Text<'a>),
    /// A Python 2 `str`: bytes, or text in an encoding that the pickle does not tell.
    ByteStr(Cow<'a, [u8]>),
    /// `bytes`. Pickles below protocol 3 have none; Python writes a call of `_codecs.encode`
    /// instead.
    Bytes(&'a [u8]),
    /// A `bytearray` of protocol 5; older protocols call `builtins.bytearray`.
    ByteArray(&'a [u8]),
    /// A `tuple`.
    Tuple(Children),
    /// A `list`.
    List(Vec<NodeId>),
    /// A `dict`: keys and values as written, with duplicates. In Python the last of equal keys
    /// wins.
    Dict(Vec<(NodeId, NodeId)>),
    /// A `set` of protocol 4 or later, as written.
    Set(Vec<NodeId>),
    /// A `frozenset` of protocol 4 or later, as written.
    FrozenSet(Children),
    /// A class or function by name, not resolved. Both ids are [`Value::Str`] without surrogates;
    /// [`Pickle::as_global`](crate::Pickle::as_global) reads them.
    Global {
        /// The module, as written.
        module: NodeId,
        /// The qualified name, as written.
        name: NodeId,
    },
    /// An object outside the pickle, by the id that the writer gave it.
    Persistent(NodeId),
    /// What a call would have made.
    Object(Object),
    /// An object by its code in `copyreg`'s extension registry.
    Extension(u32),
}

/// Which opcode made an [`Object`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// REDUCE: `callable(*args)`.
    Reduce,
    /// NEWOBJ: `callable.__new__(callable, *args)`.
    NewObj,
    /// `NEWOBJ_EX`: `callable.__new__(callable, *args, **kwargs)`.
    NewObjEx,
    /// INST: `callable(*args)`, with the class named in the opcode.
    Inst,
    /// OBJ: `callable(*args)`, with the class on the stack.
    Obj,
}

/// A call that was written but not made, and all that was then done to its result.
#[derive(Debug, PartialEq)]
pub struct Object {
    /// The opcode.
    pub how: How,
    /// The class or function: a global, a persistent object, an extension or another call's result.
    pub callable: NodeId,
    /// The arguments: a tuple, or another call's result that would be one.
    pub args: NodeId,
    /// The keyword arguments of `NEWOBJ_EX`.
    pub kwargs: Option<NodeId>,
    filled: Option<Box<Filled>>,
}

/// Rare among the calls of a checkpoint, hence boxed.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Filled {
    pub state: Vec<NodeId>,
    pub list_items: Vec<NodeId>,
    pub dict_items: Vec<(NodeId, NodeId)>,
    pub set_items: Vec<NodeId>,
}

impl Object {
    pub(crate) fn new(how: How, callable: NodeId, args: NodeId, kwargs: Option<NodeId>) -> Self {
        Self { how, callable, args, kwargs, filled: None }
    }

    pub(crate) fn fill(&mut self) -> &mut Filled {
        self.filled.get_or_insert_default()
    }

    /// Whether anything was done to the call's result.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.is_some()
    }

    /// The states that BUILD would have set, in order; nearly always none or one.
    pub fn state(&self) -> &[NodeId] {
        self.filled.as_ref().map_or(&[], |filled| &filled.state)
    }

    /// The items that APPEND and APPENDS would have added.
    pub fn list_items(&self) -> &[NodeId] {
        self.filled.as_ref().map_or(&[], |filled| &filled.list_items)
    }

    /// The keys and values that SETITEM and SETITEMS would have set, as written.
    pub fn dict_items(&self) -> &[(NodeId, NodeId)] {
        self.filled.as_ref().map_or(&[], |filled| &filled.dict_items)
    }

    /// The items that ADDITEMS would have added.
    pub fn set_items(&self) -> &[NodeId] {
        self.filled.as_ref().map_or(&[], |filled| &filled.set_items)
    }
}

impl Value<'_> {
    /// The noun for messages: `int`, `tuple`, `global` and so on.
    pub fn kind_name(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "bool",
            Value::Int(_) | Value::BigInt(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::ByteStr(_) => "Python 2 str",
            Value::Bytes(_) => "bytes",
            Value::ByteArray(_) => "bytearray",
            Value::Tuple(_) => "tuple",
            Value::List(_) => "list",
            Value::Dict(_) => "dict",
            Value::Set(_) => "set",
            Value::FrozenSet(_) => "frozenset",
            Value::Global { .. } => "global",
            Value::Persistent(_) => "persistent object",
            Value::Object(_) => "object",
            Value::Extension(_) => "extension",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_ids_are_small() {
        assert!(size_of::<Value>() <= 32, "{}", size_of::<Value>());
        assert_eq!(size_of::<Option<NodeId>>(), 4);
    }
}
