//! What [`de`](super::de) hands to serde piece by piece: items, members, variants, elements of arrays.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
    VariantAccess, Visitor,
};

use super::de::{Failure, Node, Step};
use super::value::{Array, Id, Pairs, Value};
use crate::error::ErrorKind;

impl Node<'_, '_> {
    fn label(self, key: Id) -> String {
        self.state.config.label(key)
    }
}

/// The items of a container.
pub(super) struct Items<'s, 'c> {
    pub node: Node<'s, 'c>,
    pub held: &'c [Id],
    pub place: usize,
}

impl<'de> SeqAccess<'de> for Items<'_, '_> {
    type Error = Failure;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Step<Option<T::Value>> {
        let Some(item) = self.held.get(self.place) else {
            self.node.leave();
            return Ok(None);
        };
        let place = self.place;
        self.place += 1;
        seed.deserialize(self.node.child(*item, || place.to_string())).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.held.len().saturating_sub(self.place))
    }
}

/// Numbers that are no values of the config by themselves.
pub(super) struct Plain<I>(pub I);

impl<'de, I: Iterator<Item: IntoDeserializer<'de, Failure>>> SeqAccess<'de> for Plain<I> {
    type Error = Failure;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Step<Option<T::Value>> {
        self.0.next().map(|item| seed.deserialize(item.into_deserializer())).transpose()
    }
}

/// The keys and values of a dict or the attributes of an object.
pub(super) struct Members<'s, 'c> {
    pub node: Node<'s, 'c>,
    pub pairs: &'c Pairs,
    pub place: usize,
}

impl<'de> MapAccess<'de> for Members<'_, '_> {
    type Error = Failure;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Step<Option<K::Value>> {
        let Some((key, _)) = self.pairs.get(self.place) else {
            self.node.leave();
            return Ok(None);
        };
        let node = self.node;
        seed.deserialize(node.child(*key, || node.label(*key))).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Step<V::Value> {
        let Some((key, value)) = self.pairs.get(self.place) else {
            return Err(Failure::custom("a value without a key"));
        };
        self.place += 1;
        let node = self.node;
        seed.deserialize(node.child(*value, || node.label(*key)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.pairs.len().saturating_sub(self.place))
    }
}

/// `start`, `stop` and `step` of a range or slice.
pub(super) struct Parts<'s, 'c> {
    pub node: Node<'s, 'c>,
    pub held: &'c [Id; 3],
    pub place: usize,
}

const PART_NAMES: [&str; 3] = ["start", "stop", "step"];

impl<'de> MapAccess<'de> for Parts<'_, '_> {
    type Error = Failure;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Step<Option<K::Value>> {
        let name = PART_NAMES.get(self.place);
        name.map(|name| seed.deserialize(StrDeserializer::<Failure>::new(name))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Step<V::Value> {
        let (Some(name), Some(part)) = (PART_NAMES.get(self.place), self.held.get(self.place)) else {
            return Err(Failure::custom("a value without a key"));
        };
        self.place += 1;
        seed.deserialize(self.node.child(*part, || (*name).to_owned()))
    }
}

/// A variant with content.
pub(super) struct Variant<'s, 'c> {
    pub node: Node<'s, 'c>,
    pub key: Id,
    pub value: Id,
}

impl<'de, 's, 'c> EnumAccess<'de> for Variant<'s, 'c> {
    type Error = Failure;
    type Variant = Node<'s, 'c>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Step<(V::Value, Self::Variant)> {
        let node = self.node;
        let variant = seed.deserialize(node.child(self.key, || node.label(self.key)))?;
        Ok((variant, node.child(self.value, || node.label(self.key))))
    }
}

impl<'de> VariantAccess<'de> for Node<'_, '_> {
    type Error = Failure;

    fn unit_variant(self) -> Step<()> {
        match self.value() {
            Value::None => Ok(()),
            other => Err(Failure::invalid_type(Unexpected::Other(other.kind()), &"a variant without content")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Step<T::Value> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Step<V::Value> {
        self.deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, _fields: &'static [&'static str], visitor: V) -> Step<V::Value> {
        self.visit(visitor)
    }
}

/// A part of an array: all elements whose first indices are given.
#[derive(Clone, Copy)]
pub(super) struct Cells<'s, 'c> {
    pub node: Node<'s, 'c>,
    pub array: &'c Array,
    /// Number of the first element in row-major order.
    pub first: usize,
    /// How many indices are given.
    pub dim: usize,
}

impl Cells<'_, '_> {
    pub fn cell<'de, V: Visitor<'de>>(self, index: usize, visitor: V) -> Step<V::Value> {
        self.node.enter()?;
        let value = self.array.place(index).and_then(|place| self.array.element(place)).ok_or_else(|| {
            let what = format!("serde has no form for a numpy array of {}", self.array.dtype());
            Failure(ErrorKind::Unsupported, what)
        })?;
        self.node.scalar(value, visitor)
    }
}

/// Walks one dimension.
pub(super) struct Rows<'s, 'c> {
    pub cells: Cells<'s, 'c>,
    pub place: u64,
}

impl<'de> SeqAccess<'de> for Rows<'_, '_> {
    type Error = Failure;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Step<Option<T::Value>> {
        let Cells { node, array, first, dim } = self.cells;
        if array.shape.get(dim).is_none_or(|size| self.place >= *size) {
            return Ok(None);
        }
        let inner = crate::tensor::numel(array.shape.get(dim + 1..).unwrap_or_default());
        let step = inner.and_then(|inner| inner.checked_mul(self.place)).and_then(|step| usize::try_from(step).ok());
        let first = step.and_then(|step| first.checked_add(step)).ok_or_else(|| Failure::custom("array too large"))?;
        let place = self.place;
        self.place += 1;
        let node = node.child(node.id, || place.to_string());
        seed.deserialize(Cells { node, array, first, dim: dim + 1 }).map(Some)
    }
}

impl<'de> Deserializer<'de> for Cells<'_, '_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        if self.dim == self.array.shape.len() {
            return self.cell(self.first, visitor);
        }
        self.node.enter()?;
        visitor.visit_seq(Rows { cells: self, place: 0 })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Step<V::Value> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Step<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}
