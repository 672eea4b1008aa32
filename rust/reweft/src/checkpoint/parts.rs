//! Tensors that have no dense form, by their parts: the names under which what they are made of can be read.

use reweft_pickle::{NodeId, Pickle};

use super::rebuild::{Part, Rebuilt};
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

/// The attributes of a wrapper subclass; its tensors are among them.
pub(super) fn parts_of_state(pickle: &Pickle<'_>, state: NodeId) -> Vec<(String, Part)> {
    let pairs = pickle.dict(state).unwrap_or_default();
    let named = pairs.iter().filter_map(|(name, value)| Some((pickle.as_str(*name)?.to_owned(), Part::Node(*value))));
    named.collect()
}
