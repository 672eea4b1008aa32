//! Configs as JSON, written without recursion.
//!
//! | value | JSON |
//! |---|---|
//! | `None`, bool, int of any size, finite float, str | itself; `-0.0` keeps its sign |
//! | nan and infinities | `{"$float": "nan"}`, `"inf"`, `"-inf"` |
//! | complex | `{"$complex": [re, im]}` |
//! | bytes, bytearray | `{"$bytes": "00ff"}`, `{"$bytearray": "00ff"}`, in hexadecimal |
//! | list, tuple, set, frozenset, deque, `torch.Size`, numpy array | array |
//! | dict and its subclasses in `collections` | object; keys are texts, or ints in decimal |
//! | range, slice | `{"$range": [start, stop, step]}`, `{"$slice": [...]}` |
//! | namespaces | object of the attributes |
//! | object of an unknown class | `{"$class": "module.name", ...}` with `$args`, `$elements`, its items or attributes |
//! | class or function | `{"$name": "module.name"}` |
//! | dtype, device, layout and so on | text, as torch or numpy prints it |
//! | path, UUID, `Decimal`, date, time, duration | text |
//! | numpy scalar | number, text or truth value |
//!
//! Anything else is an error that names its path: lone surrogates, keys that are neither text nor int, keys that become
//! one text or are one of the names above, ints of more than 2048 bytes, numpy dates and `longdouble`.

use std::collections::HashSet;
use std::fmt::Write;

use super::value::{Array, Elements, Id, NameKind, Object, Pairs, Value};
use super::{Config, OpenOptions};
use crate::checkpoint::numpy::{Number, number};
use crate::error::{Error, ErrorKind, Result};

/// Names that stand for what JSON has no form for.
const TAGS: &[&str] = &[
    "$float",
    "$complex",
    "$bytes",
    "$bytearray",
    "$range",
    "$slice",
    "$class",
    "$args",
    "$elements",
    "$attributes",
    "$name",
];

/// Bytes of an integer that prints as decimal; above, that would take quadratic time.
const MAX_INT_NBYTES: usize = 2048;
/// Deepest indentation, or the text would be quadratic in the depth.
const MAX_INDENT: usize = 32;

/// A value as JSON has it.
enum Form {
    /// A number, text or tagged value, done.
    Atom(String),
    Array(Vec<Part>),
    Object(Vec<(String, Part)>),
}

/// What an array or object holds.
enum Part {
    Node(Id),
    Form(Form),
}

/// An array or object that is being written.
enum Frame {
    Array(std::vec::IntoIter<Part>),
    Object(std::vec::IntoIter<(String, Part)>),
}

impl Config {
    /// The config as indented JSON; see [the table](crate::config) for what becomes of each value.
    ///
    /// Containers that are shared are written wherever they are used. Linear in the text it gives.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the path of a value that JSON cannot say; [`ErrorKind::Limit`] for more than
    /// `max_config_nodes` values, or texts of more than `max_repeated_nbytes`.
    pub fn to_json(&self, options: &OpenOptions) -> Result<String> {
        let limits = &options.limits;
        let mut out = String::new();
        let mut stack: Vec<Frame> = Vec::new();
        let (mut nodes, mut next) = (0_u64, Some(Part::Node(self.root())));
        let mut first = true;
        loop {
            if let Some(part) = next.take() {
                let (form, id) = match part {
                    Part::Node(id) => (self.form(id, options)?, id),
                    Part::Form(form) => (form, self.root()),
                };
                nodes += 1;
                if nodes > limits.max_config_nodes || out.len() as u64 > limits.max_repeated_nbytes {
                    return Err(self.too_many(id, options));
                }
                first = true;
                match form {
                    Form::Atom(text) => {
                        out.push_str(&text);
                        first = false;
                    }
                    Form::Array(parts) => {
                        out.push('[');
                        stack.push(Frame::Array(parts.into_iter()));
                    }
                    Form::Object(parts) => {
                        out.push('{');
                        stack.push(Frame::Object(parts.into_iter()));
                    }
                }
            }
            let depth = stack.len();
            let Some(frame) = stack.last_mut() else { return Ok(out) };
            let (name, part) = match frame {
                Frame::Array(parts) => (None, parts.next()),
                Frame::Object(parts) => parts.next().map_or((None, None), |(name, part)| (Some(name), Some(part))),
            };
            let Some(part) = part else {
                let close = if matches!(frame, Frame::Array(_)) { ']' } else { '}' };
                stack.pop();
                if !first {
                    line(&mut out, depth - 1);
                }
                out.push(close);
                first = false;
                continue;
            };
            if !first {
                out.push(',');
            }
            line(&mut out, depth);
            if let Some(name) = name {
                out.push_str(&text(&name));
                out.push_str(": ");
            }
            next = Some(part);
        }
    }

    pub(super) fn too_many(&self, id: Id, options: &OpenOptions) -> Error {
        let limits = &options.limits;
        let what = format!(
            "the config comes to more than {} values or {} bytes of text; max_config_nodes and max_repeated_nbytes \
             can be raised",
            limits.max_config_nodes, limits.max_repeated_nbytes
        );
        self.error(id, ErrorKind::Limit, what)
    }

    fn form(&self, id: Id, options: &OpenOptions) -> Result<Form> {
        let limits = &options.limits;
        let cannot = |what: &str| self.error(id, ErrorKind::Unsupported, format!("JSON has no form for {what}"));
        let nodes = |items: &[Id]| items.iter().map(|item| Part::Node(*item)).collect::<Vec<_>>();
        Ok(match self.get(id) {
            Value::None => atom("null"),
            Value::Bool(value) => atom(if *value { "true" } else { "false" }),
            Value::Int(value) => Form::Atom(value.to_string()),
            Value::BigInt(value) if value.to_le_bytes().len() <= MAX_INT_NBYTES => Form::Atom(value.to_string()),
            Value::BigInt(value) => return Err(cannot(&format!("an int of {} bytes", value.to_le_bytes().len()))),
            Value::Float(value) => float(*value),
            Value::Complex(parts) => complex(parts.0, parts.1),
            Value::Str(value) | Value::Decimal(value) => Form::Atom(text(value)),
            Value::Surrogates(_) => return Err(cannot("a str with lone surrogates")),
            Value::Bytes(bytes) => tagged("$bytes", Form::Atom(text(&hex(bytes)))),
            Value::ByteArray(bytes) => tagged("$bytearray", Form::Atom(text(&hex(bytes)))),
            Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
                Form::Array(nodes(items))
            }
            Value::Deque(deque) => Form::Array(nodes(&deque.0)),
            Value::Dict(dict) => Form::Object(self.members(id, &dict.pairs)?),
            Value::Range(parts) => tagged("$range", Form::Array(nodes(&parts[..]))),
            Value::Slice(parts) => tagged("$slice", Form::Array(nodes(&parts[..]))),
            Value::Name(name) if name.kind == NameKind::Global => tagged("$name", Form::Atom(text(&name.text))),
            Value::Name(name) => Form::Atom(text(&name.text)),
            Value::Time(time) => Form::Atom(text(&time.to_string())),
            Value::Uuid(value) => Form::Atom(text(&uuid(**value))),
            Value::Path(path) => Form::Atom(text(&path.to_string())),
            Value::Namespace(namespace) => Form::Object(self.members(id, &namespace.attributes)?),
            Value::Object(object) => self.object(id, object)?,
            Value::Array(array) => {
                let numel = crate::tensor::numel(&array.shape).unwrap_or(u64::MAX);
                // Also the rows of an array without elements, of which there may be any number.
                let rows =
                    array.shape.iter().filter(|size| **size != 0).try_fold(1_u64, |all, size| all.checked_mul(*size));
                if numel.max(rows.unwrap_or(u64::MAX)) > limits.max_config_nodes {
                    return Err(self.too_many(id, options));
                }
                array_form(array).ok_or_else(|| cannot(&format!("a numpy array of {}", array.dtype())))?
            }
            Value::Opaque(opaque) => return Err(cannot(&opaque.what)),
            Value::Scalar(scalar) => {
                element(scalar, 0).ok_or_else(|| cannot(&format!("a numpy scalar of {}", scalar.dtype())))?
            }
        })
    }

    /// The members of a JSON object; names must differ from each other and from the tags.
    fn members(&self, id: Id, pairs: &Pairs) -> Result<Vec<(String, Part)>> {
        let mut seen = HashSet::with_capacity(pairs.len());
        let mut members = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            let name = match self.get(*key) {
                Value::Str(name) => name.to_string(),
                Value::Int(number) => number.to_string(),
                other => {
                    let what = format!("JSON has no form for a {} as a key", other.kind());
                    return Err(self.error(*key, ErrorKind::Unsupported, what));
                }
            };
            if TAGS.contains(&name.as_str()) {
                let what = format!("the key {name:?} is a name that the JSON form keeps for itself");
                return Err(self.error(id, ErrorKind::Unsupported, what));
            }
            if !seen.insert(name.clone()) {
                let what = format!("an int and a text both become the key {name:?} in JSON");
                return Err(self.error(id, ErrorKind::KeyCollision, what));
            }
            members.push((name, Part::Node(*value)));
        }
        Ok(members)
    }

    fn object(&self, id: Id, object: &Object) -> Result<Form> {
        let nodes = |items: &[Id]| Part::Form(Form::Array(items.iter().map(|item| Part::Node(*item)).collect()));
        let mut members = vec![("$class".to_owned(), Part::Form(Form::Atom(text(&object.class))))];
        if !object.args.is_empty() {
            members.push(("$args".to_owned(), nodes(&object.args)));
        }
        if let Some(elements) = &object.elements {
            members.push(("$elements".to_owned(), nodes(elements)));
        }
        let mut attributes = self.members(id, &object.attributes)?;
        if let Some(items) = &object.items {
            if !attributes.is_empty() {
                members.push(("$attributes".to_owned(), Part::Form(Form::Object(attributes))));
            }
            attributes = self.members(id, items)?;
        }
        members.extend(attributes);
        Ok(Form::Object(members))
    }
}

fn line(out: &mut String, depth: usize) {
    out.push('\n');
    for _ in 0..depth.min(MAX_INDENT) {
        out.push_str("  ");
    }
}

fn atom(text: &str) -> Form {
    Form::Atom(text.to_owned())
}

fn tagged(tag: &str, form: Form) -> Form {
    Form::Object(vec![(tag.to_owned(), Part::Form(form))])
}

/// A text in quotes.
fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

fn float(value: f64) -> Form {
    let name = match value {
        _ if value.is_finite() => return Form::Atom(format!("{value:?}")),
        _ if value.is_nan() => "nan",
        _ if value > 0.0 => "inf",
        _ => "-inf",
    };
    tagged("$float", Form::Atom(text(name)))
}

fn complex(re: f64, im: f64) -> Form {
    tagged("$complex", Form::Array(vec![Part::Form(float(re)), Part::Form(float(im))]))
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The usual form of 8, 4, 4, 4 and 12 digits.
pub(super) fn uuid(value: u128) -> String {
    let digits = format!("{value:032x}");
    let part = |range: std::ops::Range<usize>| digits.get(range).unwrap_or_default();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

/// An array as nested arrays; `None` for a dtype that JSON cannot say. Depth is at most the number of dimensions.
fn array_form(array: &Array) -> Option<Form> {
    let shape = array.shape.as_slice();
    let mut level: Vec<Part> = match &array.elements {
        Elements::Objects(items) => items.iter().map(|item| Part::Node(*item)).collect(),
        Elements::Bytes(_) => {
            let numel = usize::try_from(crate::tensor::numel(shape)?).ok()?;
            let elements = (0..numel).map(|place| Some(Part::Form(element(array, array.place(place)?)?)));
            elements.collect::<Option<_>>()?
        }
    };
    for (dim, size) in shape.iter().enumerate().rev() {
        let size = usize::try_from(*size).ok()?;
        let outer = usize::try_from(crate::tensor::numel(shape.get(..dim)?)?).ok()?;
        let mut items = level.into_iter();
        level = (0..outer).map(|_| Part::Form(Form::Array(items.by_ref().take(size).collect()))).collect();
    }
    match level.pop()? {
        Part::Form(form) => Some(form),
        // An array of objects without dimensions, which is no list.
        Part::Node(_) => None,
    }
}

/// One element, by its place in storage.
fn element(array: &Array, place: usize) -> Option<Form> {
    Some(match array.element(place)? {
        Scalar::Number(Number::Bool(value)) => atom(if value { "true" } else { "false" }),
        Scalar::Number(Number::Int(value)) => Form::Atom(value.to_string()),
        Scalar::Number(Number::Float(value)) => float(value),
        Scalar::Number(Number::Complex(re, im)) => complex(re, im),
        Scalar::Text(value) => Form::Atom(text(&value)),
        Scalar::Bytes(bytes) => tagged("$bytes", Form::Atom(text(&hex(&bytes)))),
    })
}

/// An element of an array that is no object.
pub(super) enum Scalar {
    Number(Number),
    Text(String),
    Bytes(Vec<u8>),
}

impl Array {
    /// The one element of a scalar, if it is a number.
    pub(super) fn scalar_text(&self) -> Option<String> {
        if !self.shape.is_empty() {
            return None;
        }
        let dtype = self.descr.dtype?;
        match self.element(0)? {
            Scalar::Number(Number::Bool(value)) => Some(format!("{dtype} {value}")),
            Scalar::Number(Number::Int(value)) => Some(format!("{dtype} {value}")),
            Scalar::Number(Number::Float(value)) => Some(format!("{dtype} {value:?}")),
            Scalar::Number(Number::Complex(re, im)) => Some(format!("{dtype} ({re:?}, {im:?})")),
            Scalar::Text(_) | Scalar::Bytes(_) => None,
        }
    }

    /// Where the element stands that is `index`th in row-major order.
    pub(super) fn place(&self, index: usize) -> Option<usize> {
        let (mut rest, mut place) = (index as u64, 0_u64);
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            place = place.checked_add((rest % size).checked_mul(*stride)?)?;
            rest /= size;
        }
        usize::try_from(place).ok()
    }

    /// The element at a place; `None` for a dtype without an exact form.
    pub(super) fn element(&self, place: usize) -> Option<Scalar> {
        let Elements::Bytes(bytes) = &self.elements else { return None };
        let itemsize = usize::try_from(self.descr.itemsize).ok()?;
        let start = place.checked_mul(itemsize)?;
        let bytes = bytes.get(start..start.checked_add(itemsize)?)?;
        if let Some(dtype) = self.descr.dtype {
            return number(dtype, self.descr.big_endian, bytes).map(Scalar::Number);
        }
        match self.descr.kind {
            // Both kinds are filled up with zeros, which numpy takes off again.
            b'S' => Some(Scalar::Bytes(trim(bytes, 1).to_vec())),
            b'U' => {
                let chars = trim(bytes, 4).as_chunks::<4>().0.iter().map(|unit| {
                    let unit =
                        if self.descr.big_endian { u32::from_be_bytes(*unit) } else { u32::from_le_bytes(*unit) };
                    char::from_u32(unit)
                });
                chars.collect::<Option<String>>().map(Scalar::Text)
            }
            b'V' => Some(Scalar::Bytes(bytes.to_vec())),
            _ => None,
        }
    }
}

/// Takes whole zero units off the end.
fn trim(bytes: &[u8], unit: usize) -> &[u8] {
    let kept = bytes.chunks_exact(unit).rposition(|unit| unit.iter().any(|byte| *byte != 0));
    bytes.get(..kept.map_or(0, |last| (last + 1) * unit)).unwrap_or_default()
}
