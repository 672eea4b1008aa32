//! JSON that readers must not understand in two ways: objects whose keys are unique, in the order of the file.

use std::fmt;
use std::marker::PhantomData;

use indexmap::IndexMap;
use serde::de::{self, Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result};

/// A JSON object that names no key twice; a plain map would keep the last one without a word.
pub(crate) struct Unique<V>(pub IndexMap<String, V>);

impl<V> Default for Unique<V> {
    fn default() -> Self {
        Self(IndexMap::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Pairs(PhantomData)).map(Self)
    }
}

struct Pairs<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
    type Value = IndexMap<String, V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = IndexMap::new();
        while let Some((key, value)) = map.next_entry::<String, V>()? {
            if pairs.contains_key(&key) {
                return Err(de::Error::custom(format!("key {key:?} is there twice")));
            }
            pairs.insert(key, value);
        }
        Ok(pairs)
    }
}

/// A struct that is written as an object; serde's would also take a list of its fields.
pub(super) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

struct Fields<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(de::value::MapAccessDeserializer::new(map))
    }
}

/// Reads a whole document, which is an object.
///
/// # Errors
/// [`ErrorKind::Format`](crate::ErrorKind::Format) with line and column; also for bytes that are no UTF-8 in parts that
/// nobody asks for, which serde would skip.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let text = str::from_utf8(bytes).map_err(|error| Error::format(format!("JSON: {error}")))?;
    let Object(document) = serde_json::from_str(text).map_err(|error| Error::format(format!("JSON: {error}")))?;
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_skipped_is_text_too() {
        #[derive(serde::Deserialize)]
        struct One {
            a: u8,
        }
        assert_eq!(parse::<One>(br#"{"a":1,"b":"x"}"#).unwrap().a, 1);
        assert!(parse::<One>(b"{\"a\":1,\"b\":\"\xff\"}").is_err_and(|error| error.to_string().contains("utf-8")));
    }
}
