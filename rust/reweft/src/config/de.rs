//! Configs into types of serde.
//!
//! serde recurses along the data, so depth is limited here and nowhere else. A value that is shared is visited wherever
//! it is used, so the visits are counted.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, Deserializer, Error as _, Visitor};

use super::access::{Cells, Items, Members, Parts, Plain, Rows, Variant};
use super::json::{Scalar, uuid};
use super::value::{Array, Elements, Id, Pairs, Value};
use super::{Config, OpenOptions};
use crate::checkpoint::numpy::Number;
use crate::error::{Error, ErrorKind, Result};

/// What went wrong inside serde; the path is added where it is known.
#[derive(Debug)]
pub(super) struct Failure(pub ErrorKind, pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Failure {}

impl de::Error for Failure {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(ErrorKind::Mismatch, message.to_string())
    }
}

pub(super) type Step<T> = Result<T, Failure>;

/// What all values of one run share.
pub(super) struct State<'c> {
    pub config: &'c Config,
    options: &'c OpenOptions,
    /// Values visited, and bytes of text given out.
    visited: Cell<u64>,
    nbytes: Cell<u64>,
    /// What was entered last, from the root; an error is about the end of it.
    path: RefCell<Vec<String>>,
}

impl Config {
    /// Reads the config into a type; see [`load_config`](super::load_config).
    ///
    /// # Errors
    /// As [`load_config`](super::load_config).
    pub fn deserialize<T: DeserializeOwned>(&self, options: &OpenOptions) -> Result<T> {
        let (visited, nbytes, path) = (Cell::new(0), Cell::new(0), RefCell::new(Vec::new()));
        let state = State { config: self, options, visited, nbytes, path };
        let found = T::deserialize(Node { state: &state, id: self.root(), depth: 0 });
        found.map_err(|Failure(kind, what)| {
            let mut path = state.path.into_inner();
            if !self.prefix.is_empty() {
                path.insert(0, self.prefix.clone());
            }
            Error::new(kind, what).of_key(path.join("."))
        })
    }
}

/// One value of a config.
#[derive(Clone, Copy)]
pub(super) struct Node<'s, 'c> {
    pub state: &'s State<'c>,
    pub id: Id,
    pub depth: usize,
}

impl<'c> Node<'_, 'c> {
    pub fn value(self) -> &'c Value {
        self.state.config.get(self.id)
    }

    /// Counts a visit.
    pub fn enter(self) -> Step<()> {
        let state = self.state;
        state.visited.set(state.visited.get() + 1);
        let limits = &state.options.limits;
        if self.depth > limits.max_config_depth {
            let what = format!("nested deeper than {} levels; max_config_depth can be raised", limits.max_config_depth);
            return Err(Failure(ErrorKind::Limit, what));
        }
        if state.visited.get() > limits.max_config_nodes || state.nbytes.get() > limits.max_repeated_nbytes {
            return Err(Failure(ErrorKind::Limit, state.config.too_many(self.id, state.options).to_string()));
        }
        Ok(())
    }

    fn count_text(self, nbytes: usize) {
        self.state.nbytes.set(self.state.nbytes.get() + nbytes as u64);
    }

    /// A value that this one holds.
    pub fn child(self, id: Id, label: impl FnOnce() -> String) -> Self {
        let mut path = self.state.path.borrow_mut();
        path.truncate(self.depth);
        path.push(label());
        Self { id, depth: self.depth + 1, ..self }
    }

    /// What is wrong after the last of its values, such as a missing field, is wrong with this one.
    pub fn leave(self) {
        self.state.path.borrow_mut().truncate(self.depth);
    }

    /// The members of what is a map to serde.
    fn members(self) -> Option<&'c Pairs> {
        match self.value() {
            Value::Dict(dict) => Some(&dict.pairs),
            Value::Namespace(namespace) => Some(&namespace.attributes),
            Value::Object(object) => object.items.as_ref().or(Some(&object.attributes)),
            _ => None,
        }
    }

    /// Looks through an object that is nothing but its one argument, such as an enum's member.
    fn bare(self) -> Self {
        match self.value() {
            Value::Object(object)
                if object.attributes.is_empty() && object.items.is_none() && object.elements.is_none() =>
            {
                match object.args.as_slice() {
                    [arg] => Self { id: *arg, ..self },
                    _ => self,
                }
            }
            _ => self,
        }
    }

    pub fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        self.enter()?;
        let node = self.bare();
        let cannot = |what: &str| Err(Failure(ErrorKind::Unsupported, format!("serde has no form for {what}")));
        match node.value() {
            Value::None => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => visitor.visit_i64(*value),
            Value::BigInt(value) => match value.to_i128().map(|value| (value, u64::try_from(value))) {
                Some((_, Ok(value))) => visitor.visit_u64(value),
                Some((value, _)) => visitor.visit_i128(value),
                None => match unsigned(value.to_le_bytes()) {
                    Some(value) => visitor.visit_u128(value),
                    None => cannot("an int of more than 128 bits"),
                },
            },
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Complex(parts) => visitor.visit_seq(Plain([parts.0, parts.1].into_iter())),
            Value::Str(text) | Value::Decimal(text) => node.text(visitor, text),
            Value::Surrogates(_) => cannot("a str with lone surrogates"),
            Value::Bytes(bytes) | Value::ByteArray(bytes) => {
                node.count_text(bytes.len());
                visitor.visit_bytes(bytes)
            }
            Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
                visitor.visit_seq(Items { node, held: items, place: 0 })
            }
            Value::Deque(deque) => visitor.visit_seq(Items { node, held: &deque.0, place: 0 }),
            Value::Range(parts) | Value::Slice(parts) => visitor.visit_map(Parts { node, held: parts, place: 0 }),
            Value::Name(name) => node.text(visitor, &name.text),
            Value::Time(time) => node.text(visitor, &time.to_string()),
            Value::Uuid(value) => node.text(visitor, &uuid(**value)),
            Value::Path(path) => node.text(visitor, &path.to_string()),
            Value::Object(object)
                if !object.args.is_empty()
                    || object.elements.is_some()
                    || object.items.is_some() && !object.attributes.is_empty() =>
            {
                cannot(&format!("an object of {} with several parts", object.class))
            }
            Value::Dict(_) | Value::Namespace(_) | Value::Object(_) => node.map(visitor),
            Value::Array(array) => node.array(array, visitor),
            Value::Opaque(opaque) => cannot(&opaque.what),
            Value::Scalar(scalar) => match scalar.element(0) {
                Some(value) => node.scalar(value, visitor),
                None => cannot(&format!("a numpy scalar of {}", scalar.dtype())),
            },
        }
    }

    fn text<'de, V: Visitor<'de>>(self, visitor: V, text: &str) -> Step<V::Value> {
        self.count_text(text.len());
        visitor.visit_str(text)
    }

    fn map<'de, V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        match self.members() {
            Some(pairs) => visitor.visit_map(Members { node: self, pairs, place: 0 }),
            None => Err(Failure::custom(format!("a {}, wanted a map", self.value().kind()))),
        }
    }

    pub fn scalar<'de, V: Visitor<'de>>(self, value: Scalar, visitor: V) -> Step<V::Value> {
        match value {
            Scalar::Number(Number::Bool(value)) => visitor.visit_bool(value),
            Scalar::Number(Number::Int(value)) => match (i64::try_from(value), u64::try_from(value)) {
                (Ok(value), _) => visitor.visit_i64(value),
                (_, Ok(value)) => visitor.visit_u64(value),
                _ => visitor.visit_i128(value),
            },
            Scalar::Number(Number::Float(value)) => visitor.visit_f64(value),
            Scalar::Number(Number::Complex(re, im)) => visitor.visit_seq(Plain([re, im].into_iter())),
            Scalar::Text(text) => self.text(visitor, &text),
            Scalar::Bytes(bytes) => visitor.visit_bytes(&bytes),
        }
    }

    fn array<'de, V: Visitor<'de>>(self, array: &'c Array, visitor: V) -> Step<V::Value> {
        if let Elements::Objects(items) = &array.elements {
            return match array.shape.len() {
                1 => visitor.visit_seq(Items { node: self, held: items, place: 0 }),
                dims => {
                    let what = format!("serde has no form for a numpy array of objects with {dims} dimensions");
                    Err(Failure(ErrorKind::Unsupported, what))
                }
            };
        }
        if array.shape.is_empty() {
            return Cells { node: self, array, first: 0, dim: 0 }.cell(0, visitor);
        }
        visitor.visit_seq(Rows { cells: Cells { node: self, array, first: 0, dim: 0 }, place: 0 })
    }

    /// The number that a float field takes; integers only where the float equals them.
    fn as_float(self) -> Option<f64> {
        let number = match self.value() {
            Value::Float(value) => return Some(*value),
            Value::Int(value) => i128::from(*value),
            Value::BigInt(value) => value.to_i128()?,
            Value::Scalar(scalar) => match scalar.element(0)? {
                Scalar::Number(Number::Float(value)) => return Some(value),
                Scalar::Number(Number::Int(value)) => value,
                _ => return None,
            },
            _ => return None,
        };
        exact_float(number)
    }
}

/// The float that equals an integer, if there is one.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "the result is compared")]
fn exact_float(value: i128) -> Option<f64> {
    let float = value as f64;
    // The largest i128 rounds up to 2^127, which would saturate on the way back.
    (float.abs() < 1.7e38 && float as i128 == value).then_some(float)
}

/// 128 bits without a sign, from two's complement with a sign byte.
fn unsigned(bytes: &[u8]) -> Option<u128> {
    let (low, sign) = bytes.split_first_chunk::<16>()?;
    (sign == [0]).then(|| u128::from_le_bytes(*low))
}

macro_rules! by_kind {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
            self.visit(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Node<'_, '_> {
    type Error = Failure;

    by_kind! {
        deserialize_any deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_i128 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
        deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf deserialize_unit
        deserialize_map deserialize_identifier
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        self.enter()?;
        let node = self.bare();
        match (node.as_float(), node.value()) {
            (Some(value), _) => visitor.visit_f64(value),
            (None, Value::Int(_) | Value::BigInt(_)) => Err(Failure::custom("an int that no float equals")),
            (None, _) => self.visit(visitor),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        match self.bare().as_float() {
            Some(value) if value.is_finite() && value.abs() > f64::from(f32::MAX) => {
                Err(Failure::custom(format!("the float {value:?} is larger than any f32")))
            }
            _ => self.deserialize_f64(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        match self.value() {
            Value::None => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Step<V::Value> {
        self.visit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Step<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    /// Bytes are a sequence too, for `Vec<u8>`.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        match self.value() {
            Value::Bytes(bytes) | Value::ByteArray(bytes) => {
                self.enter()?;
                self.count_text(bytes.len());
                visitor.visit_seq(Plain(bytes.iter().copied()))
            }
            _ => self.visit(visitor),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Step<V::Value> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _name: &'static str, _len: usize, visitor: V) -> Step<V::Value> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Step<V::Value> {
        self.visit(visitor)
    }

    /// A text is a variant by name, a dict with one key a variant with content.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Step<V::Value> {
        self.enter()?;
        let node = self.bare();
        match node.value() {
            Value::Str(text) => visitor.visit_enum(StrDeserializer::<Failure>::new(text)),
            Value::Name(name) => visitor.visit_enum(StrDeserializer::<Failure>::new(&name.text)),
            Value::Dict(dict) => match dict.pairs.as_slice() {
                [(key, value)] => visitor.visit_enum(Variant { node, key: *key, value: *value }),
                pairs => Err(Failure::custom(format!("a dict of {} keys, wanted one variant", pairs.len()))),
            },
            other => Err(Failure::custom(format!("a {}, wanted a variant", other.kind()))),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        visitor.visit_unit()
    }

    fn is_human_readable(&self) -> bool {
        true
    }
}
