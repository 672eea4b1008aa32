//! Configs: what a checkpoint holds beside its tensors, as plain data.
//!
//! Nothing is imported or called. A [`Config`] is a flat list of values that name each other by number, so depth costs
//! nothing and shared containers stay shared. It goes into JSON ([`Config::to_json`]) or any type of serde
//! ([`load_config`]). What a target cannot say exactly is an error that names the value's path.

mod access;
mod de;
mod json;
mod known;
mod read;
mod value;

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::checkpoint::{self, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{self, Source};
use crate::write;
pub(crate) use read::{attribute, read, survey};
pub use value::{
    Array, Clock, Dict, DictClass, Elements, Id, Name, NameKind, Namespace, Object, Opaque, Pairs, PathParts, Time,
    Value,
};

/// Most bytes of a path in a message.
const MAX_PATH_NBYTES: usize = 1000;

/// Reads a config of a checkpoint into a type of serde's.
///
/// `options.top_level_key` names the part of the file; without one it is all of it. Reads the file's pickle, no tensor.
///
/// Numbers are converted only where nothing is lost: an integer becomes a float if the float equals it, and a field
/// `f32` takes the nearest value, as Python floats have 64 bits. Lists, tuples, sets, ranges' parts and arrays are
/// sequences; dicts, namespaces and objects of unknown classes are maps; an object with one argument and no attributes,
/// such as an enum's member, is that argument; dtypes, devices, paths, dates and UUIDs are texts.
///
/// # Errors
/// As [`Config::open`]; [`ErrorKind::Mismatch`] with the path of what does not fit the type; [`ErrorKind::Limit`] for
/// more than `max_config_depth` levels, or for containers that are shared so often that they come to more than
/// `max_config_nodes` values.
///
/// # Examples
/// ```no_run
/// #[derive(serde::Deserialize)]
/// struct NetConfig {
///     n_head: usize,
///     d_model: usize,
///     dropout: f64,
/// }
///
/// let options = reweft::OpenOptions { top_level_key: Some("my_config".into()), ..Default::default() };
/// let config: NetConfig = reweft::load_config("weights_with_config.pt".as_ref(), &options)?;
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn load_config<T: DeserializeOwned>(path: &Path, options: &OpenOptions) -> Result<T> {
    Config::open(path, options)?.deserialize(options).map_err(|error| error.in_file(path))
}

/// The values of a file, or of a part of it.
#[derive(Clone, Debug)]
pub struct Config {
    /// The root is the first.
    values: Vec<Value>,
    /// For each value, where it was found first: in which other one, and as what.
    origins: Vec<(Id, Label)>,
    /// The top-level key that led to the root.
    prefix: String,
}

/// What a value is to the one that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Label {
    Root,
    Item(u32),
    /// The value of this key.
    Key(Id),
    /// A key itself.
    IsKey,
}

/// How far a walk has come with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Open,
    Done,
}

impl Config {
    /// Reads a config of a file: a checkpoint of any format that torch writes or wrote, or a pickle.
    ///
    /// Time and memory are linear in the file's pickle; `max_expansion` bounds what sharing multiplies.
    ///
    /// # Errors
    /// As [`Checkpoint::open`](crate::Checkpoint::open); [`ErrorKind::Unsupported`] with the path of a tensor or of a
    /// value that is not known, and for safetensors; [`ErrorKind::Format`] for a value that holds itself;
    /// [`ErrorKind::KeyCollision`] for a dict that has one key twice.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        write::recover(path)?;
        Self::from_source(path, source::open(path, options.access)?, options)
    }

    /// Reads a config from any source; `name` stands in for the path in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[allow(clippy::needless_pass_by_value, reason = "the source is handed over, as to a checkpoint")]
    pub fn from_source(name: &Path, source: Source, options: &OpenOptions) -> Result<Self> {
        checkpoint::visit(&source, options, |pickle| read(pickle, options)).map_err(|error| error.in_file(name))
    }

    /// Number of the outermost value.
    pub fn root(&self) -> Id {
        Id(0)
    }

    /// A value by its number.
    pub fn get(&self, id: Id) -> &Value {
        self.values.get(id.index()).unwrap_or(&Value::None)
    }

    /// All values, the root first; what holds a value may come after it.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// The dotted path at which a value was found first, from the root of the file; long ones are cut.
    pub fn path(&self, id: Id) -> String {
        let mut parts = Vec::new();
        let (mut id, mut nbytes) = (id, 0);
        while let Some((parent, label)) = self.origins.get(id.index()) {
            let part = match label {
                Label::Root => break,
                Label::Item(place) => place.to_string(),
                Label::Key(key) => self.label(*key),
                Label::IsKey => format!("key {}", self.label(id)),
            };
            nbytes += part.len();
            parts.push(part);
            if nbytes > MAX_PATH_NBYTES {
                parts.push("...".to_owned());
                break;
            }
            id = *parent;
        }
        if !self.prefix.is_empty() {
            parts.push(self.prefix.clone());
        }
        parts.reverse();
        parts.join(".")
    }

    /// A key as a path shows it.
    pub(crate) fn label(&self, id: Id) -> String {
        match self.get(id) {
            Value::Str(text) => text.chars().take(MAX_PATH_NBYTES).collect(),
            Value::Int(number) => number.to_string(),
            Value::Bool(true) => "True".to_owned(),
            Value::Bool(false) => "False".to_owned(),
            Value::Float(number) => format!("{number:?}"),
            Value::BigInt(number) if number.to_le_bytes().len() < 32 => number.to_string(),
            other => format!("({})", other.kind()),
        }
    }

    /// A value that holds no others, short and exact but for long texts and bytes.
    pub(crate) fn text(&self, id: Id) -> String {
        /// Longer texts and bytes are told by their length alone.
        const MAX_NBYTES: usize = 100;
        match self.get(id) {
            Value::None => "None".to_owned(),
            Value::BigInt(number) if number.to_le_bytes().len() <= MAX_NBYTES => number.to_string(),
            Value::BigInt(number) => format!("of {} bytes", number.to_le_bytes().len()),
            Value::Complex(parts) => format!("({:?}, {:?})", parts.0, parts.1),
            Value::Str(text) if text.len() <= MAX_NBYTES => format!("{text:?}"),
            Value::Str(text) => format!("of {} bytes", text.len()),
            Value::Surrogates(bytes) | Value::Bytes(bytes) | Value::ByteArray(bytes) if bytes.len() <= MAX_NBYTES => {
                format!("\"{}\"", bytes.escape_ascii())
            }
            Value::Surrogates(bytes) | Value::Bytes(bytes) | Value::ByteArray(bytes) => {
                format!("of {} bytes", bytes.len())
            }
            Value::Name(name) => name.text.clone(),
            Value::Time(time) => time.to_string(),
            Value::Uuid(number) => json::uuid(**number),
            Value::Decimal(text) => text.to_string(),
            Value::Path(path) => path.to_string(),
            Value::Array(array) | Value::Scalar(array) => match array.scalar_text() {
                Some(text) => text,
                None => format!("of {} {:?}", array.dtype(), array.shape),
            },
            Value::Opaque(opaque) => opaque.what.clone(),
            _ => self.label(id),
        }
    }

    /// Refuses what only the library that wrote it can make: instances of classes that are not known, and constants of
    /// torch.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the path of the first one.
    pub fn check_plain(&self) -> Result<()> {
        for (index, value) in self.values.iter().enumerate() {
            let what = match value {
                Value::Object(object) => format!("an instance of {}", object.class),
                Value::Name(name) if name.kind != NameKind::NumpyDtype => format!("{} {}", name.kind.name(), name.text),
                _ => continue,
            };
            let id = Id(u32::try_from(index).unwrap_or(u32::MAX));
            return Err(self.error(id, ErrorKind::Unsupported, format!("{what}, which is not made here")));
        }
        Ok(())
    }

    /// Refuses a value that holds itself, which no tree can say.
    fn check_cycles(&self) -> Result<()> {
        let mut states = vec![State::New; self.values.len()];
        let mut stack = vec![(self.root(), 0_usize)];
        while let Some((id, place)) = stack.last_mut() {
            let Some(state) = states.get_mut(id.index()) else { break };
            *state = State::Open;
            let Some(child) = self.get(*id).child(*place) else {
                *state = State::Done;
                stack.pop();
                continue;
            };
            *place += 1;
            match states.get(child.index()) {
                Some(State::New) => stack.push((child, 0)),
                Some(State::Open) => {
                    let what = format!("a {} that holds itself", self.get(child).kind());
                    return Err(Error::format(what).of_key(self.path(child)));
                }
                Some(State::Done) | None => {}
            }
        }
        Ok(())
    }

    /// An error about a value, with its path.
    fn error(&self, id: Id, kind: ErrorKind, what: impl Into<String>) -> Error {
        Error::new(kind, what).of_key(self.path(id))
    }
}
