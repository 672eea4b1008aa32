//! Reading the archives that `torch.jit.save` writes, frozen and mobile ones too: the tensors, not the program.
//!
//! `data.pkl` is the tree of modules, whose attributes are parameters, buffers and whatever else; their path is the
//! key. `constants.pkl` is a tuple of what the code names `CONSTANTS.c0`, `CONSTANTS.c1` and so on: the keys are
//! `constants.c0`, `constants.c1`. Each of the two has storages of its own. The code is not looked at. Source: files
//! of torch 2.15.

use std::sync::Arc;

use reweft_pickle::{NodeId, Pickle};

use super::flatten::flatten_all;
use super::globals::unknown_globals;
use super::rebuild::{Rebuild, Saved};
use super::torch_zip::{Pickled, read_object, visit_pickle};
use super::{Contents, Format, OpenOptions, Read};
use crate::container::zip::Archive;
use crate::error::{Error, Result};

/// The tree of modules.
const OBJECT: Pickled = Pickled { record: "data.pkl", storages: "data", format: Format::TorchScript };
/// Only TorchScript archives have it.
pub(super) const CONSTANTS: Pickled =
    Pickled { record: "constants.pkl", storages: "constants", format: Format::TorchScript };

/// Functions around a list or dict that say the type of its items; the container is the first argument.
pub(super) const WRAPPERS: &[(&str, &str)] = &[
    ("torch.jit._pickle", "restore_type_tag"),
    ("torch.jit._pickle", "build_tensorlist"),
    ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_boollist"),
];

/// Most wrappers around a value; torch writes one, and an object has one state.
const MAX_LINKS: usize = 4;

pub(super) fn read(archive: &Arc<Archive>, options: &OpenOptions) -> Result<Read> {
    let mut read = visit_pickle(archive, &OBJECT, options, |saved| read_object(saved, options))?;
    // A top-level key leads to a module, and constants are in none.
    if options.top_level_key.is_none() {
        read.append(visit_pickle(archive, &CONSTANTS, options, |saved| read_constants(saved, options))?)?;
    }
    Ok(read)
}

fn read_constants(saved: Saved<'_>, options: &OpenOptions) -> Result<Read> {
    let (pickle, format) = (saved.pickle, saved.format);
    let constants = pickle.as_tuple(pickle.root()).ok_or_else(|| Error::format("the constants are no tuple"))?;
    let named = constants.iter().enumerate().map(|(number, constant)| (format!("constants.c{number}"), *constant));
    let mut rebuild = Rebuild::new(saved);
    let flat = flatten_all(pickle, &mut rebuild, options, &named.collect::<Vec<_>>())?;
    let (unknown_globals, notices) = (unknown_globals(pickle), rebuild.take_notices());
    let contents = Contents { values: flat.values, unknown_globals, notices, ..Contents::default() };
    Ok(Read { format, items: flat.items, storages: rebuild.storages, contents })
}

/// Whether a class is one of the program's own.
pub(super) fn is_class(module: &str) -> bool {
    module == "__torch__" || module.starts_with("__torch__.")
}

/// What stands in for a value that only TorchScript writes: an object of the program is its state, and a container with
/// the type of its items is the container. Any other value stands for itself.
pub(super) fn value(pickle: &Pickle<'_>, mut id: NodeId) -> NodeId {
    for _ in 0..MAX_LINKS {
        let Some(((module, name), object)) = pickle.as_call(id) else { break };
        id = if is_class(module) {
            let [state] = object.state() else { break };
            *state
        } else if WRAPPERS.contains(&(module, name)) {
            let Some([inner, ..]) = pickle.as_tuple(object.args) else { break };
            *inner
        } else {
            break;
        };
    }
    id
}
