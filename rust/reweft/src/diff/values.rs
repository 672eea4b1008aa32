//! What two files hold that is no tensor, compared by path and without recursion.

use std::collections::{HashMap, HashSet};

use super::report::{Report, ValueChange};
use super::side::Side;
use crate::config::{Array, Config, Elements, Id, Pairs, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;

/// Bytes of a path or text in a report.
const MAX_SHOWN: usize = 200;
/// Bytes of a key made of tuples in tuples; what is shared in it multiplies.
const MAX_KEY: usize = 100_000;

/// Adds what differs to the report. Files that hold tensors alone are not compared.
pub(super) fn compare(a: &Side<'_>, b: &Side<'_>, report: &mut Report) -> Result<()> {
    compare_metadata(a, b, report);
    let (Some(left), Some(right)) = (a.survey()?, b.survey()?) else { return Ok(()) };
    let mut walk = Walk { a: &left, b: &right, seen: HashSet::new(), stack: Vec::new(), report };
    walk.stack.push((left.root(), right.root(), String::new()));
    while let Some((one, other, path)) = walk.stack.pop() {
        if walk.seen.insert((one, other)) {
            walk.visit(one, other, path);
        }
        if walk.seen.len() as u64 > Limits::default().max_config_nodes {
            let what = "the values of the files come to too many pairs; compare the tensors alone";
            return Err(Error::new(ErrorKind::Limit, what));
        }
    }
    report.values.sort_by(|left, right| left.path.cmp(&right.path));
    report.values_not_compared.sort();
    Ok(())
}

/// `__metadata__` of two safetensors files.
fn compare_metadata(a: &Side<'_>, b: &Side<'_>, report: &mut Report) {
    if a.format() != "safetensors" || b.format() != "safetensors" {
        return;
    }
    let of = |side: &Side<'_>| -> HashMap<String, String> {
        side.checkpoint().metadata().into_iter().flatten().map(|(name, text)| (name.clone(), text.clone())).collect()
    };
    let (left, right) = (of(a), of(b));
    let names: HashSet<&String> = left.keys().chain(right.keys()).collect();
    for name in names.into_iter().filter(|name| left.get(*name) != right.get(*name)) {
        let text = |side: &HashMap<String, String>| side.get(name).map(|text| cut(&format!("{text:?}")));
        let path = cut(&format!("__metadata__.{name}"));
        report.values.push(ValueChange { path, a: text(&left), b: text(&right) });
    }
}

struct Walk<'c, 'r> {
    a: &'c Config,
    b: &'c Config,
    /// Pairs that were compared: what is shared or loops is compared once.
    seen: HashSet<(Id, Id)>,
    stack: Vec<(Id, Id, String)>,
    report: &'r mut Report,
}

/// What a value holds, as far as values are told apart.
enum Form<'c> {
    Members(Vec<&'c Pairs>),
    Items(&'c [Id]),
    /// Sets of values that hold nothing.
    Set(HashSet<String>),
    /// All there is to know, as text.
    Leaf(String),
    /// A tensor, which is compared elsewhere.
    Tensor,
    /// Something that is not understood.
    Unknown,
}

impl Walk<'_, '_> {
    fn visit(&mut self, one: Id, other: Id, path: String) {
        let (a, b) = (self.a, self.b);
        match (form(a, one), form(b, other)) {
            (Form::Tensor, Form::Tensor) => {}
            (Form::Unknown, Form::Unknown) => self.report.values_not_compared.push(path),
            (Form::Leaf(left), Form::Leaf(right)) if left == right => {}
            (Form::Set(left), Form::Set(right)) if left == right => {}
            (Form::Items(left), Form::Items(right)) if left.len() == right.len() && same_class(a, one, b, other) => {
                let pairs = left.iter().zip(right).enumerate();
                self.stack
                    .extend(pairs.map(|(place, (left, right))| (*left, *right, below(&path, &place.to_string()))));
            }
            (Form::Members(left), Form::Members(right))
                if left.len() == right.len() && same_class(a, one, b, other) =>
            {
                self.members(&left, &right, &path);
            }
            // A tensor against something else is a key that only one side has.
            (Form::Tensor, _) => self.change(path, None, Some(describe(b, other))),
            (_, Form::Tensor) => self.change(path, Some(describe(a, one)), None),
            _ => self.change(path, Some(describe(a, one)), Some(describe(b, other))),
        }
    }

    fn change(&mut self, path: String, a: Option<String>, b: Option<String>) {
        self.report.values.push(ValueChange { path, a, b });
    }

    fn members(&mut self, left: &[&Pairs], right: &[&Pairs], path: &str) {
        let (a, b) = (self.a, self.b);
        for (left, right) in left.iter().zip(right) {
            let mut there: HashMap<String, (Id, Id)> = right.iter().map(|pair| (identity(b, pair.0), *pair)).collect();
            for (key, value) in *left {
                let path = below(path, &a.label(*key));
                match there.remove(&identity(a, *key)) {
                    Some((_, other)) => self.stack.push((*value, other, path)),
                    None if !holds_only_tensors(a, *value) => self.change(path, Some(describe(a, *value)), None),
                    None => {}
                }
            }
            for (key, value) in *right {
                if there.contains_key(&identity(b, *key)) && !holds_only_tensors(b, *value) {
                    self.change(below(path, &b.label(*key)), None, Some(describe(b, *value)));
                }
            }
        }
    }
}

/// Whether both are instances of one class; dicts of Python's library count as one.
fn same_class(a: &Config, one: Id, b: &Config, other: Id) -> bool {
    match (a.get(one), b.get(other)) {
        (Value::Object(left), Value::Object(right)) => left.class == right.class,
        (left, right) => left.kind() == right.kind(),
    }
}

/// A tensor is listed by its key; a dict of nothing but tensors has nothing else to list.
fn holds_only_tensors(config: &Config, id: Id) -> bool {
    let is_tensor = |id: &Id| matches!(form(config, *id), Form::Tensor);
    match form(config, id) {
        Form::Tensor => true,
        Form::Items(items) => !items.is_empty() && items.iter().all(is_tensor),
        Form::Members(groups) => {
            let mut values = groups.into_iter().flatten().map(|(_, value)| value).peekable();
            values.peek().is_some() && values.all(is_tensor)
        }
        _ => false,
    }
}

fn form(config: &Config, id: Id) -> Form<'_> {
    match config.get(id) {
        Value::Opaque(opaque) => {
            if opaque.is_tensor {
                Form::Tensor
            } else {
                Form::Unknown
            }
        }
        Value::List(items) | Value::Tuple(items) => Form::Items(items),
        Value::Deque(deque) => Form::Items(&deque.0),
        Value::Range(parts) | Value::Slice(parts) => Form::Items(&parts[..]),
        Value::Dict(dict) => Form::Members(vec![&dict.pairs]),
        Value::Namespace(namespace) => Form::Members(vec![&namespace.attributes]),
        Value::Object(object) if object.args.is_empty() && object.elements.is_none() => {
            Form::Members([Some(&object.attributes), object.items.as_ref()].into_iter().flatten().collect())
        }
        Value::Object(object) if object.attributes.is_empty() && object.items.is_none() => {
            match (&object.args[..], object.elements.as_deref()) {
                (args, None) => Form::Items(args),
                ([], Some(elements)) => Form::Items(elements),
                _ => Form::Unknown,
            }
        }
        Value::Object(_) => Form::Unknown,
        Value::Set(items) | Value::FrozenSet(items) => {
            let leaves: Option<HashSet<String>> = items
                .iter()
                .map(|item| match form(config, *item) {
                    Form::Leaf(text) => Some(text),
                    _ => None,
                })
                .collect();
            leaves.map_or(Form::Unknown, Form::Set)
        }
        Value::Array(array) | Value::Scalar(array) => array_form(array),
        _ => Form::Leaf(identity(config, id)),
    }
}

/// Texts, dates and scalars; arrays of numbers are tensors.
fn array_form(array: &Array) -> Form<'_> {
    match &array.elements {
        Elements::Objects(items) => Form::Items(items),
        Elements::Bytes(bytes) => {
            let layout = (array.dtype(), &array.shape, &array.strides);
            Form::Leaf(format!("{layout:?} {}", blake3::hash(bytes).to_hex()))
        }
    }
}

/// A text that is equal exactly for values that are: kind and everything in it, for values that hold no others but
/// tuples, which can be keys.
fn identity(config: &Config, id: Id) -> String {
    let mut out = String::new();
    let mut rest = vec![Some(id)];
    while let Some(next) = rest.pop() {
        let Some(id) = next else {
            out.push(')');
            continue;
        };
        match config.get(id) {
            Value::Tuple(items) if out.len() < MAX_KEY => {
                out.push('(');
                rest.push(None);
                rest.extend(items.iter().rev().map(|item| Some(*item)));
            }
            // Equal to itself alone: a difference too many is better than one too few.
            Value::Tuple(_) => {
                out.extend(["#", &std::ptr::from_ref(config).addr().to_string(), "#", &id.index().to_string()]);
            }
            // The length tells where a text ends that has anything in it.
            value => {
                let text = leaf_identity(config, id, value);
                out.extend([&text.len().to_string(), ":", &text]);
            }
        }
    }
    out
}

fn leaf_identity(config: &Config, id: Id, value: &Value) -> String {
    let text = match value {
        Value::Str(text) | Value::Decimal(text) => text.to_string(),
        Value::Surrogates(bytes) | Value::Bytes(bytes) | Value::ByteArray(bytes) => {
            blake3::hash(bytes).to_hex().to_string()
        }
        Value::BigInt(number) => blake3::hash(number.to_le_bytes()).to_hex().to_string(),
        Value::Float(number) => format!("{:x}", number.to_bits()),
        Value::Complex(parts) => format!("{:x} {:x}", parts.0.to_bits(), parts.1.to_bits()),
        Value::Time(time) => format!("{time:?}"),
        Value::Path(path) => format!("{path:?}"),
        _ => config.text(id),
    };
    format!("{} {text}", value.kind())
}

/// Kind and value, cut short.
fn describe(config: &Config, id: Id) -> String {
    let value = config.get(id);
    let text = match value {
        Value::Object(object) => format!("object of {}", object.class),
        Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
            format!("{} of {}", value.kind(), items.len())
        }
        Value::Dict(dict) => format!("dict of {}", dict.pairs.len()),
        Value::Opaque(opaque) => opaque.what.clone(),
        Value::None => "None".to_owned(),
        _ => format!("{} {}", value.kind(), config.text(id)),
    };
    cut(&text)
}

fn below(path: &str, name: &str) -> String {
    if path.len() > MAX_SHOWN {
        return path.to_owned();
    }
    cut(&if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") })
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
