//! Tensors that have no dense form, by their parts: the names under which what they are made of can be read.

use reweft_pickle::{NodeId, Pickle, Value};

use super::globals::is_tensor;
use super::rebuild::{Note, Part, Rebuilt, sizes};
use crate::error::{Error, Result};

/// Names of a sparse tensor's index tensors by layout, as torch's methods name them.
const SPARSE_INDICES: &[(&str, &[&str])] = &[
    ("sparse_coo", &["indices"]),
    ("sparse_csr", &["crow_indices", "col_indices"]),
    ("sparse_csc", &["ccol_indices", "row_indices"]),
    ("sparse_bsr", &["crow_indices", "col_indices"]),
    ("sparse_bsc", &["ccol_indices", "row_indices"]),
];

/// `(layout, (indices, values, size, ...))`.
pub(super) fn sparse(pickle: &Pickle<'_>, args: &[NodeId]) -> Result<Rebuilt> {
    let [layout, data, ..] = args else { return Err(Error::format("sparse tensor without layout or data")) };
    let layout = layout_name(pickle, *layout).unwrap_or_default();
    let row = SPARSE_INDICES.iter().find(|row| row.0 == layout);
    let (_, names) = row.ok_or_else(|| Error::format(format!("sparse tensor of layout {layout:?}")))?;
    let names = [*names, &["values", "size"]].concat();
    let parts = pickle.as_tuple(*data).unwrap_or_default();
    if parts.len() < names.len() {
        return Err(Error::format(format!("{layout} tensor of {} parts, wanted {}", parts.len(), names.len())));
    }
    let parts = names.iter().zip(parts).map(|(name, part)| ((*name).to_owned(), Part::Node(*part)));
    Ok(Rebuilt::Parts(format!("{layout} tensor"), parts.collect()))
}

/// `torch.sparse_coo` as a global, or as the argument of `_get_layout`.
fn layout_name<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Option<&'p str> {
    let name = match pickle.as_call(id) {
        Some((("torch.serialization", "_get_layout"), object)) => {
            pickle.as_str(*pickle.as_tuple(object.args)?.first()?)?
        }
        _ => pickle.as_global(id)?.1,
    };
    Some(name.strip_prefix("torch.").unwrap_or(name))
}

/// `(buffer, sizes, strides, offsets)`.
pub(super) fn nested(args: &[NodeId]) -> Result<Rebuilt> {
    let names = ["buffer", "sizes", "strides", "offsets"];
    if args.len() < names.len() {
        return Err(Error::format(format!("nested tensor of {} parts, wanted {}", args.len(), names.len())));
    }
    let parts = names.into_iter().zip(args).map(|(name, part)| (name.to_owned(), Part::Node(*part)));
    Ok(Rebuilt::Parts("nested tensor".to_owned(), parts.collect()))
}

/// `({"values": ..., "offsets": ..., "lengths": ..., ...})`, as the class's constructor takes them.
pub(super) fn jagged(pickle: &Pickle<'_>, args: &[NodeId]) -> Result<Rebuilt> {
    let given = args.first().and_then(|given| pickle.dict(*given));
    let Some(given) = given else { return Err(Error::format("jagged tensor without its parts")) };
    let named = given.iter().map(|(name, value)| (name_of(pickle, *name), *value));
    let parts = named.filter(|(name, _)| name != "requires_grad").map(|(name, value)| (name, Part::Node(value)));
    Ok(Rebuilt::Parts("jagged nested tensor".to_owned(), parts.collect()))
}

/// The attributes of a tensor: a dict, or a dict and the values of slots, either of which may be None.
pub(super) fn attributes(pickle: &Pickle<'_>, state: NodeId) -> Vec<(String, Part)> {
    let states = pickle.as_tuple(state).unwrap_or(std::slice::from_ref(&state));
    let mut parts = Vec::new();
    for pairs in states.iter().filter_map(|state| pickle.dict(*state)) {
        for (name, value) in pairs.iter() {
            let name = name_of(pickle, *name);
            // What makes a tensor a buffer says nothing of its values, as requires_grad does not.
            if !matches!(name.as_str(), "_is_buffer" | "persistent") || pickle.as_bool(*value).is_none() {
                let part = sharding(pickle, *value).map_or(Part::Node(*value), |text| Part::Note(Box::new(Note(text))));
                parts.push((name, part));
            }
        }
    }
    parts
}

fn name_of(pickle: &Pickle<'_>, name: NodeId) -> String {
    pickle.as_str(name).map_or_else(|| pickle.describe(name), str::to_owned)
}

/// Class, dtype and shape that a wrapper subclass states: `(class, dtype, size, ...)`.
pub(super) fn describe_shell(pickle: &Pickle<'_>, args: &[NodeId]) -> String {
    let [class, dtype, shape, ..] = args else { return "tensor subclass".to_owned() };
    let class = pickle.as_global(*class).map_or("tensor subclass", |(_, name)| name);
    format!("{class} {}", describe_meta(pickle, *dtype, *shape))
}

/// Dtype and shape of a tensor, where nothing else of it is there.
pub(super) fn describe_meta(pickle: &Pickle<'_>, dtype: NodeId, shape: NodeId) -> String {
    let dtype = pickle.as_global(dtype).map_or("unknown dtype", |(_, name)| name);
    sizes(pickle, shape, "size").map_or_else(|_| format!("of {dtype}"), |shape| format!("of {dtype} {shape:?}"))
}

/// How a distributed tensor lies over devices, in one line; `None` if a value is no such specification.
///
/// Its classes change from release to release, so nothing but the names `placements` and `mesh` is relied upon.
fn sharding(pickle: &Pickle<'_>, id: NodeId) -> Option<String> {
    let ((module, "DTensorSpec"), object) = pickle.as_call(id)? else { return None };
    if !module.starts_with("torch.distributed") {
        return None;
    }
    let state = pickle.dict(*object.state().last()?)?;
    let find = |wanted: &str| state.iter().find(|(name, _)| pickle.as_str(*name) == Some(wanted)).map(|(_, id)| *id);
    let mut text = "placements ".to_owned();
    show(pickle, find("placements")?, 0, &mut text);
    if let Some(mesh) = find("mesh") {
        text.push_str(" on ");
        show(pickle, mesh, 0, &mut text);
    }
    Some(text)
}

/// What of a mesh says how it is laid out, in this and earlier releases; the rest is of the process that wrote it.
const SHOWN_OF_MESH: &[&str] = &["_device_type", "device_type", "_layout", "_mesh_dim_names", "mesh_dim_names"];
/// Longest text of a value.
const MAX_SHOWN_NBYTES: usize = 400;
/// Deepest value within a value that is shown.
const MAX_SHOWN_DEPTH: usize = 6;

/// Appends a value as Python would print a dataclass; stops where it grows long or deep.
fn show(pickle: &Pickle<'_>, id: NodeId, depth: usize, text: &mut String) {
    if text.len() > MAX_SHOWN_NBYTES || depth > MAX_SHOWN_DEPTH {
        if !text.ends_with("...") {
            text.push_str("...");
        }
        return;
    }
    let list = |items: &[NodeId], text: &mut String| {
        for (number, item) in items.iter().take(MAX_SHOWN_NBYTES).enumerate() {
            text.push_str(if number > 0 { ", " } else { "" });
            show(pickle, *item, depth + 1, text);
        }
    };
    if let Some(items) = pickle.as_sequence(id) {
        text.push('(');
        list(items, text);
        text.push(')');
        return;
    }
    let Some(((_, class), object)) = pickle.as_call(id) else {
        let what = pickle.describe(id);
        let is_plain = matches!(pickle.get(id), Value::Int(_) | Value::Bool(_) | Value::Str(_) | Value::Float(_));
        text.push_str(what.split_once(' ').filter(|_| is_plain).map_or(what.as_str(), |(_, value)| value));
        return;
    };
    text.push_str(class);
    text.push('(');
    let state = object.state().last().and_then(|state| pickle.dict(*state));
    match state {
        Some(pairs) => {
            let named = pairs.iter().filter_map(|(name, value)| Some((pickle.as_str(*name)?, *value)));
            let named = named.filter(|(name, _)| class != "DeviceMesh" || SHOWN_OF_MESH.contains(name));
            for (number, (name, value)) in named.take(MAX_SHOWN_NBYTES).enumerate() {
                text.push_str(if number > 0 { ", " } else { "" });
                text.push_str(name);
                text.push('=');
                show(pickle, value, depth + 1, text);
            }
        }
        // A tensor's arguments are numbers that mean nothing here.
        None if is_tensor(pickle, id) => text.push_str("..."),
        None => list(pickle.as_tuple(object.args).unwrap_or_default(), text),
    }
    text.push(')');
}
