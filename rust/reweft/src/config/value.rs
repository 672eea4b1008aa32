//! The values of a config: flat in one vector, naming each other by number, so that nothing nests.

use std::fmt;
use std::sync::Arc;

use reweft_pickle::BigInt;

/// The number of a value within one [`Config`](super::Config). Two uses of one number are one Python object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(pub(super) u32);

impl Id {
    /// The position of the value.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A key and its value, in file order.
pub type Pairs = Vec<(Id, Id)>;

/// One value. Containers name what they hold by number.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An `int` of 64 bits.
    Int(i64),
    /// A larger `int`.
    BigInt(Box<BigInt<'static>>),
    /// A `float`, with its sign, infinities and NaN.
    Float(f64),
    /// A `complex`: real and imaginary part.
    Complex(Box<(f64, f64)>),
    /// A `str`.
    Str(Box<str>),
    /// A `str` with lone surrogates, as `encode("utf-8", "surrogatepass")` gives it.
    Surrogates(Box<[u8]>),
    /// `bytes`.
    Bytes(Box<[u8]>),
    /// A `bytearray`.
    ByteArray(Box<[u8]>),
    /// A `list`.
    List(Vec<Id>),
    /// A `tuple`; `torch.Size` is one.
    Tuple(Vec<Id>),
    /// A `set`.
    Set(Vec<Id>),
    /// A `frozenset`.
    FrozenSet(Vec<Id>),
    /// A `dict` of some class.
    Dict(Box<Dict>),
    /// A `collections.deque` and its `maxlen`.
    Deque(Box<(Vec<Id>, Option<u64>)>),
    /// A `range`: start, stop, step.
    Range(Box<[Id; 3]>),
    /// A `slice`: start, stop, step.
    Slice(Box<[Id; 3]>),
    /// A dtype, device or other constant of torch, or a class or function.
    Name(Box<Name>),
    /// A date, time or duration.
    Time(Box<Time>),
    /// A `uuid.UUID`.
    Uuid(Box<u128>),
    /// A `decimal.Decimal` as text.
    Decimal(Box<str>),
    /// A path of `pathlib`.
    Path(Box<PathParts>),
    /// `argparse.Namespace` or `types.SimpleNamespace`.
    Namespace(Box<Namespace>),
    /// An instance of a class that is not known, as data.
    Object(Box<Object>),
    /// A numpy array.
    Array(Box<Array>),
    /// A numpy scalar: dtype as numpy spells it, and the bytes.
    Scalar(Box<Array>),
    /// A tensor, or what is not understood. Only a survey of a whole file has such values.
    Opaque(Box<Opaque>),
}

/// What a survey does not look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opaque {
    /// Whether it is a tensor.
    pub is_tensor: bool,
    /// What it is.
    pub what: String,
}

/// A `dict` and its class.
#[derive(Clone, Debug)]
pub struct Dict {
    /// The class.
    pub class: DictClass,
    /// No key is there twice.
    pub pairs: Pairs,
}

/// The dicts that Python's library has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DictClass {
    /// `dict`.
    Dict,
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `collections.Counter`.
    Counter,
    /// `collections.defaultdict` and its factory, a class of `builtins`; `None` if it has none.
    DefaultDict(Option<Box<str>>),
}

/// What kind of constant a [`Name`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// `torch.float32`.
    Dtype,
    /// `cuda:0`.
    Device,
    /// `torch.strided`.
    Layout,
    /// `torch.channels_last`.
    MemoryFormat,
    /// `torch.per_tensor_affine`.
    Qscheme,
    /// A numpy dtype: `<f4`.
    NumpyDtype,
    /// A class or function by its dotted name; never imported.
    Global,
}

impl NameKind {
    /// How Python calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dtype => "dtype",
            Self::Device => "device",
            Self::Layout => "layout",
            Self::MemoryFormat => "memory_format",
            Self::Qscheme => "qscheme",
            Self::NumpyDtype => "numpy.dtype",
            Self::Global => "global",
        }
    }
}

/// A constant by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// What it is.
    pub kind: NameKind,
    /// What torch or numpy prints for it.
    pub text: String,
}

/// What `datetime` has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Time {
    /// `datetime.date`: year, month, day.
    Date(u16, u8, u8),
    /// `datetime.datetime`: year, month, day, and the time of day.
    DateTime(u16, u8, u8, Clock),
    /// `datetime.time`.
    Clock(Clock),
    /// `datetime.timedelta`: days, seconds, microseconds, as Python normalises them.
    Delta(i64, i64, i64),
}

/// A time of day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Hour, minute, second.
    pub hms: (u8, u8, u8),
    /// Microseconds.
    pub microsecond: u32,
    /// The second of two equal times when clocks are set back.
    pub fold: bool,
    /// Distance from UTC in days, seconds and microseconds; `None` if the time says nothing of a zone.
    pub offset: Option<(i64, i64, i64)>,
}

impl fmt::Display for Time {
    /// As Python's `isoformat`; a duration as ISO 8601 with days and seconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Date(year, month, day) => write!(f, "{year:04}-{month:02}-{day:02}"),
            Self::DateTime(year, month, day, clock) => write!(f, "{year:04}-{month:02}-{day:02}T{clock}"),
            Self::Clock(clock) => write!(f, "{clock}"),
            Self::Delta(days, seconds, microseconds) => {
                write!(f, "P{days}DT{seconds}")?;
                if *microseconds != 0 {
                    write!(f, ".{microseconds:06}")?;
                }
                f.write_str("S")
            }
        }
    }
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hour, minute, second) = self.hms;
        write!(f, "{hour:02}:{minute:02}:{second:02}")?;
        if self.microsecond != 0 {
            write!(f, ".{:06}", self.microsecond)?;
        }
        let Some((days, seconds, microseconds)) = self.offset else { return Ok(()) };
        let total = days * 86_400 + seconds;
        // Python writes a negative offset as the sign and the distance.
        let (sign, total, microseconds) = match (total < 0, microseconds) {
            (false, _) => ('+', total, microseconds),
            (true, 0) => ('-', -total, 0),
            (true, some) => ('-', -total - 1, 1_000_000 - some),
        };
        write!(f, "{sign}{:02}:{:02}", total / 3600, total / 60 % 60)?;
        if total % 60 != 0 || microseconds != 0 {
            write!(f, ":{:02}", total % 60)?;
        }
        if microseconds != 0 { write!(f, ".{microseconds:06}") } else { Ok(()) }
    }
}

/// A path as pickles hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathParts {
    /// The class: `PosixPath`, `PurePosixPath`, `WindowsPath`, `PureWindowsPath`.
    pub class: &'static str,
    /// What it is made of; the first part may be the root.
    pub parts: Vec<String>,
}

impl fmt::Display for PathParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.class.ends_with("WindowsPath") { '\\' } else { '/' };
        let mut text = String::new();
        for part in &self.parts {
            if !text.is_empty() && !text.ends_with(separator) {
                text.push(separator);
            }
            text.push_str(part);
        }
        f.write_str(if text.is_empty() { "." } else { &text })
    }
}

/// An object that is nothing but attributes.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// `argparse.Namespace` or `types.SimpleNamespace`.
    pub class: &'static str,
    /// Names and values.
    pub attributes: Pairs,
}

/// An instance of a class, or the result of a function, that reweft neither knows nor calls.
#[derive(Clone, Debug, Default)]
pub struct Object {
    /// Dotted name of the class or function.
    pub class: String,
    /// What it was to be called with.
    pub args: Vec<Id>,
    /// What would have been set on it.
    pub attributes: Pairs,
    /// What it holds as a dict.
    pub items: Option<Pairs>,
    /// What it holds as a list.
    pub elements: Option<Vec<Id>>,
}

/// The elements of an array.
#[derive(Clone, Debug)]
pub enum Elements {
    /// As bytes, which several arrays may share.
    Bytes(Arc<[u8]>),
    /// As values, in row-major order.
    Objects(Vec<Id>),
}

/// A numpy array or scalar.
#[derive(Clone, Debug)]
pub struct Array {
    pub(crate) descr: crate::checkpoint::numpy::Descr,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// Elements between neighbours along each dimension.
    pub strides: Vec<u64>,
    /// What it holds.
    pub elements: Elements,
}

impl Array {
    /// The dtype as numpy spells and reads it: `<f4`, `>M8[ns]`, `object`.
    pub fn dtype(&self) -> String {
        self.descr.text()
    }

    /// Bytes of one element.
    pub fn itemsize(&self) -> u64 {
        self.descr.itemsize
    }
}

impl Value {
    /// The noun that messages use.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::BigInt(_) => "int",
            Self::Float(_) => "float",
            Self::Complex(_) => "complex",
            Self::Str(_) | Self::Surrogates(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::ByteArray(_) => "bytearray",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Set(_) => "set",
            Self::FrozenSet(_) => "frozenset",
            Self::Dict(_) => "dict",
            Self::Deque(_) => "deque",
            Self::Range(_) => "range",
            Self::Slice(_) => "slice",
            Self::Name(name) => name.kind.name(),
            Self::Time(_) => "time",
            Self::Uuid(_) => "UUID",
            Self::Decimal(_) => "Decimal",
            Self::Path(_) => "path",
            Self::Namespace(_) => "namespace",
            Self::Object(_) => "object",
            Self::Array(_) => "numpy array",
            Self::Scalar(_) => "numpy scalar",
            Self::Opaque(opaque) if opaque.is_tensor => "tensor",
            Self::Opaque(_) => "value that is not known",
        }
    }

    /// The value that comes at `place` among those that this one holds, keys and values in turn.
    pub fn child(&self, place: usize) -> Option<Id> {
        let pair = |pairs: &Pairs, place: usize| {
            pairs.get(place / 2).map(|(key, value)| if place.is_multiple_of(2) { *key } else { *value })
        };
        match self {
            Self::List(items) | Self::Tuple(items) | Self::Set(items) | Self::FrozenSet(items) => {
                items.get(place).copied()
            }
            Self::Deque(deque) => deque.0.get(place).copied(),
            Self::Dict(dict) => pair(&dict.pairs, place),
            Self::Range(parts) | Self::Slice(parts) => parts.get(place).copied(),
            Self::Namespace(namespace) => pair(&namespace.attributes, place),
            Self::Object(object) => {
                let (args, elements) = (&object.args, object.elements.as_deref().unwrap_or_default());
                if let Some(id) = args.get(place) {
                    return Some(*id);
                }
                let place = place - args.len();
                if let Some(id) = elements.get(place) {
                    return Some(*id);
                }
                let place = place - elements.len();
                let attributes = object.attributes.len() * 2;
                if place < attributes {
                    return pair(&object.attributes, place);
                }
                object.items.as_ref().and_then(|items| pair(items, place - attributes))
            }
            Self::Array(array) => match &array.elements {
                Elements::Objects(items) => items.get(place).copied(),
                Elements::Bytes(_) => None,
            },
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_small() {
        assert!(size_of::<Value>() <= 32, "{}", size_of::<Value>());
    }

    #[test]
    fn times_print_as_python_does() {
        let clock = |offset| Clock { hms: (1, 2, 3), microsecond: 40, fold: false, offset };
        assert_eq!(clock(None).to_string(), "01:02:03.000040");
        assert_eq!(clock(Some((0, 5400, 0))).to_string(), "01:02:03.000040+01:30");
        assert_eq!(clock(Some((-1, 82_800, 0))).to_string(), "01:02:03.000040-01:00");
        assert_eq!(clock(Some((-1, 86_399, 500_000))).to_string(), "01:02:03.000040-00:00:00.500000");
        assert_eq!(Time::Date(987, 1, 2).to_string(), "0987-01-02");
        assert_eq!(Time::Delta(-1, 5, 6).to_string(), "P-1DT5.000006S");
    }

    #[test]
    fn paths_have_one_separator_between_parts() {
        let path = |class, parts: &[&str]| {
            PathParts { class, parts: parts.iter().map(|part| (*part).to_owned()).collect() }.to_string()
        };
        assert_eq!(path("PosixPath", &["/", "a", "b"]), "/a/b");
        assert_eq!(path("PosixPath", &["a", "b"]), "a/b");
        assert_eq!(path("PosixPath", &[]), ".");
        assert_eq!(path("PureWindowsPath", &["C:\\", "a"]), "C:\\a");
    }
}
