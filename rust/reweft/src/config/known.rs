//! The classes of Python's library and of torch that a config may hold, as one table of their pickled forms.
//!
//! None is imported or called. A form that is not in the table stays an object with the name of its class.

use std::borrow::Cow;

use reweft_pickle::{NodeId, Object as Call, Pickle, Value as Node};

use super::read::Reader;
use super::value::{Clock, Id, Name, NameKind, Namespace, PathParts, Time, Value};
use crate::checkpoint::numpy;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

const LAYOUTS: &[&str] =
    &["strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "_mkldnn", "jagged"];
const MEMORY_FORMATS: &[&str] = &["contiguous_format", "channels_last", "channels_last_3d", "preserve_format"];
const QSCHEMES: &[&str] = &[
    "per_tensor_affine",
    "per_channel_affine",
    "per_tensor_symmetric",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
];
const PATHS: &[&str] = &["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"];

/// What only wraps another value.
pub(super) fn wrapped(pickle: &Pickle<'_>, node: NodeId) -> Option<NodeId> {
    let (name, call) = pickle.as_call(node)?;
    match name {
        ("torch", "Size") => match pickle.as_tuple(call.args)? {
            [items] if pickle.as_tuple(*items).is_some() => Some(*items),
            _ => None,
        },
        // Interpolations (`${...}`) stay the texts that they are.
        (module, _) if module == "omegaconf" || module.starts_with("omegaconf.") => {
            let [state] = call.state() else { return None };
            let state = pickle.dict(*state)?;
            let find = |wanted: &str| state.iter().rev().find(|(key, _)| pickle.as_str(*key) == Some(wanted));
            find("_content").or_else(|| find("_val")).map(|(_, value)| *value)
        }
        _ => None,
    }
}

/// The class of an instance and what it would be made with; protocols 0 and 1 call `copyreg._reconstructor`.
pub(super) fn class_and_args<'p>(pickle: &'p Pickle<'_>, call: &'p Call) -> Option<((&'p str, &'p str), &'p [NodeId])> {
    let args = pickle.as_tuple(call.args)?;
    match (pickle.as_global(call.callable)?, args) {
        (("copyreg", "_reconstructor"), [class, base, state])
            if pickle.as_global(*base) == Some(("builtins", "object")) && matches!(pickle.get(*state), Node::None) =>
        {
            Some((pickle.as_global(*class)?, &[]))
        }
        (class, args) => Some((class, args)),
    }
}

/// The attributes that a state sets: a dict, or a dict and the one of the slots.
pub(super) fn attributes(pickle: &Pickle<'_>, state: NodeId) -> Option<Vec<(NodeId, NodeId)>> {
    let of = |id: NodeId| match pickle.get(id) {
        Node::None => Some(Vec::new()),
        Node::Dict(pairs) => Some(pairs.clone()),
        _ => None,
    };
    match pickle.as_tuple(state) {
        Some([dict, slots]) => Some([of(*dict)?, of(*slots)?].concat()),
        _ => of(state),
    }
}

/// Names and values inside a container or object, for following a path.
pub(super) fn members<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Vec<(Cow<'p, str>, NodeId)> {
    let mut id = id;
    while let Some(inner) = wrapped(pickle, id).filter(|inner| *inner != id) {
        id = inner;
        if pickle.as_sequence(id).is_some() || matches!(pickle.get(id), Node::Dict(_)) {
            break;
        }
    }
    if let Some(items) = pickle.as_sequence(id) {
        return items.iter().enumerate().map(|(place, item)| (place.to_string().into(), *item)).collect();
    }
    let mut pairs = pickle.dict(id).map(Cow::into_owned).unwrap_or_default();
    if let Some(call) = pickle.as_object(id) {
        pairs.extend(call.state().iter().filter_map(|state| attributes(pickle, *state)).flatten());
    }
    let name = |key: NodeId| match pickle.get(key) {
        Node::Int(number) => Some(number.to_string().into()),
        _ => pickle.as_str(key).map(Cow::Borrowed),
    };
    pairs.into_iter().filter_map(|(key, value)| Some((name(key)?, value))).collect()
}

/// What a class, function or constant is that stands alone.
pub(super) fn name(pickle: &Pickle<'_>, node: NodeId) -> Name {
    let (module, name) = pickle.as_global(node).unwrap_or_default();
    let bare = name.strip_prefix("torch.").unwrap_or(name);
    let kind = match module {
        "torch" if Dtype::from_name(name).is_some_and(|dtype| dtype.name() == name) => NameKind::Dtype,
        "torch" if QSCHEMES.contains(&name) => NameKind::Qscheme,
        "torch" | "torch._utils" if MEMORY_FORMATS.contains(&bare) => NameKind::MemoryFormat,
        "torch" if LAYOUTS.contains(&name) => NameKind::Layout,
        _ => NameKind::Global,
    };
    let text = match kind {
        NameKind::MemoryFormat => format!("torch.{bare}"),
        _ => format!("{module}.{name}"),
    };
    Name { kind, text }
}

/// The value of a call in the table; `None` for one that is not, or whose arguments are not as they should be.
pub(super) fn value(reader: &mut Reader<'_>, node: NodeId, id: Id) -> Result<Option<Value>> {
    let pickle = reader.pickle;
    let Some(call) = pickle.as_object(node) else { return Ok(None) };
    let Some((class, args)) = class_and_args(pickle, call) else { return Ok(None) };
    let is_filled = !(call.dict_items().is_empty() && call.set_items().is_empty());
    if is_filled || (!call.list_items().is_empty() && class != ("collections", "deque")) {
        return Ok(None);
    }
    match class {
        ("argparse", "Namespace") | ("types", "SimpleNamespace") if args.is_empty() => {
            let class = if class.0 == "argparse" { "argparse.Namespace" } else { "types.SimpleNamespace" };
            let mut pairs = Vec::new();
            for state in call.state() {
                let Some(found) = attributes(pickle, *state) else { return Ok(None) };
                pairs.extend(found);
            }
            let attributes = reader.pairs(&pairs, id)?;
            Ok(Some(Value::Namespace(Box::new(Namespace { class, attributes }))))
        }
        ("uuid", "UUID") if args.is_empty() => Ok(uuid(pickle, call).map(|uuid| Value::Uuid(Box::new(uuid)))),
        _ if !call.state().is_empty() => Ok(None),
        ("collections", "deque") => deque(reader, call, args, id),
        ("builtins", "set" | "frozenset") => {
            let items = match args {
                [] => &[],
                [items] => match pickle.as_sequence(*items) {
                    Some(items) => items,
                    None => return Ok(None),
                },
                _ => return Ok(None),
            };
            let items = reader.items(items, id)?;
            Ok(Some(if class.1 == "set" { Value::Set(items) } else { Value::FrozenSet(items) }))
        }
        ("builtins", "range" | "slice") => {
            let Ok(parts) = <[Id; 3]>::try_from(reader.items(args, id)?) else {
                return Err(Error::format(format!("{} of {} parts, wanted 3", class.1, args.len())));
            };
            let parts = Box::new(parts);
            Ok(Some(if class.1 == "range" { Value::Range(parts) } else { Value::Slice(parts) }))
        }
        _ => Ok(leaf(pickle, class, args)),
    }
}

/// Calls that hold nothing but texts and numbers.
fn leaf(pickle: &Pickle<'_>, class: (&str, &str), args: &[NodeId]) -> Option<Value> {
    match (class, args) {
        (("builtins", "complex"), [re, im]) => {
            Some(Value::Complex(Box::new((pickle.as_f64(*re)?, pickle.as_f64(*im)?))))
        }
        (("decimal", "Decimal"), [text]) => Some(Value::Decimal(pickle.as_str(*text)?.into())),
        (("pathlib" | "pathlib._local", name), parts) => {
            let class = PATHS.iter().find(|class| **class == name)?;
            let parts: Option<Vec<String>> = parts.iter().map(|part| Some(pickle.as_str(*part)?.to_owned())).collect();
            Some(Value::Path(Box::new(PathParts { class, parts: parts? })))
        }
        (("datetime", _), _) => time(pickle, class.1, args).map(|time| Value::Time(Box::new(time))),
        (("torch", "device"), [kind]) => Some(named(NameKind::Device, pickle.as_str(*kind)?.to_owned())),
        (("torch", "device"), [kind, index]) => {
            Some(named(NameKind::Device, format!("{}:{}", pickle.as_str(*kind)?, pickle.as_i64(*index)?)))
        }
        (("torch.serialization", "_get_layout"), [name]) => {
            let name = pickle.as_str(*name)?;
            let known = LAYOUTS.contains(&name.strip_prefix("torch.")?);
            known.then(|| named(NameKind::Layout, name.to_owned()))
        }
        // How an enum is pickled by name.
        (("builtins", "getattr"), [class, member]) => {
            let (module, name) = pickle.as_global(*class)?;
            Some(named(NameKind::Global, format!("{module}.{name}.{}", pickle.as_str(*member)?)))
        }
        _ => None,
    }
}

fn named(kind: NameKind, text: String) -> Value {
    Value::Name(Box::new(Name { kind, text }))
}

fn uuid(pickle: &Pickle<'_>, call: &Call) -> Option<u128> {
    let [state] = call.state() else { return None };
    let state = pickle.dict(*state)?;
    let [(key, value)] = *state else { return None };
    if pickle.as_str(key) != Some("int") {
        return None;
    }
    match pickle.get(value) {
        Node::Int(value) => u128::try_from(*value).ok(),
        Node::BigInt(value) => {
            // One byte more than 128 bits where the highest is set.
            let mut bytes = [0; 17];
            bytes.get_mut(..value.to_le_bytes().len())?.copy_from_slice(value.to_le_bytes());
            let (number, sign) = bytes.split_first_chunk::<16>()?;
            (!value.is_negative() && *sign == [0]).then(|| u128::from_le_bytes(*number))
        }
        _ => None,
    }
}

/// `deque((), maxlen)` and the items after it.
fn deque(reader: &mut Reader<'_>, call: &Call, args: &[NodeId], id: Id) -> Result<Option<Value>> {
    let pickle = reader.pickle;
    let (initial, maxlen) = match args {
        [] => (&[][..], None),
        [initial] => (pickle.as_sequence(*initial).unwrap_or_default(), None),
        [initial, maxlen] => match u64::try_from(pickle.as_i64(*maxlen).unwrap_or(-1)) {
            Ok(maxlen) => (pickle.as_sequence(*initial).unwrap_or_default(), Some(maxlen)),
            Err(_) => return Ok(None),
        },
        _ => return Ok(None),
    };
    let items = [initial, call.list_items()].concat();
    if maxlen.is_some_and(|most| items.len() as u64 > most) {
        return Err(Error::format(format!("deque of {} items, more than its maxlen", items.len())));
    }
    let items = reader.items(&items, id)?;
    Ok(Some(Value::Deque(Box::new((items, maxlen)))))
}

/// Packed dates and times, as `datetime` pickles them; zones only as a distance from UTC.
fn time(pickle: &Pickle<'_>, class: &str, args: &[NodeId]) -> Option<Time> {
    if class == "timedelta" {
        return delta(pickle, args).map(|(days, seconds, microseconds)| Time::Delta(days, seconds, microseconds));
    }
    let (packed, zone) = match args {
        [packed] => (packed, None),
        [packed, zone] => (packed, Some(offset(pickle, *zone)?)),
        _ => return None,
    };
    let packed = numpy::bytes(pickle, *packed)?.bytes()?;
    match (class, &*packed, zone) {
        ("date", &[high, low, month, day], None) => {
            let (year, month, day) = date(high, low, month, day)?;
            Some(Time::Date(year, month, day))
        }
        ("datetime", &[high, low, month, day, ref rest @ ..], zone) => {
            let (year, month_of_year, day) = date(high, low, month & 0x7f, day)?;
            Some(Time::DateTime(year, month_of_year, day, clock(rest.try_into().ok()?, month > 0x7f, zone)?))
        }
        ("time", &[hour, minute, second, a, b, c], zone) => {
            Some(Time::Clock(clock([hour & 0x7f, minute, second, a, b, c], hour > 0x7f, zone)?))
        }
        _ => None,
    }
}

fn date(high: u8, low: u8, month: u8, day: u8) -> Option<(u16, u8, u8)> {
    let year = u16::from_be_bytes([high, low]);
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = match month {
        2 if is_leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    ((1..=9999).contains(&year) && (1..=days).contains(&day)).then_some((year, month, day))
}

fn clock(packed: [u8; 6], fold: bool, offset: Option<(i64, i64, i64)>) -> Option<Clock> {
    let [hour, minute, second, a, b, c] = packed;
    let microsecond = u32::from_be_bytes([0, a, b, c]);
    let fits = hour < 24 && minute < 60 && second < 60 && microsecond < 1_000_000;
    fits.then_some(Clock { hms: (hour, minute, second), microsecond, fold, offset })
}

/// `timezone(timedelta)`, less than a day from UTC.
fn offset(pickle: &Pickle<'_>, zone: NodeId) -> Option<(i64, i64, i64)> {
    let (("datetime", "timezone"), call) = pickle.as_call(zone)? else { return None };
    let [distance] = pickle.as_tuple(call.args)? else { return None };
    let (("datetime", "timedelta"), call) = pickle.as_call(*distance)? else { return None };
    let (days, seconds, microseconds) = delta(pickle, pickle.as_tuple(call.args)?)?;
    (days == 0 || days == -1 && (seconds, microseconds) != (0, 0)).then_some((days, seconds, microseconds))
}

/// `timedelta(days, seconds, microseconds)` as Python normalises it.
fn delta(pickle: &Pickle<'_>, args: &[NodeId]) -> Option<(i64, i64, i64)> {
    let [days, seconds, microseconds] = args else { return None };
    let (days, seconds) = (pickle.as_i64(*days)?, pickle.as_i64(*seconds)?);
    let microseconds = pickle.as_i64(*microseconds)?;
    let fits = days.abs() <= 999_999_999 && (0..86_400).contains(&seconds) && (0..1_000_000).contains(&microseconds);
    fits.then_some((days, seconds, microseconds))
}
