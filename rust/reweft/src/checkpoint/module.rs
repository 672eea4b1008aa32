//! Whole modules in a pickle: their weights under the names that `state_dict()` would give, without their class.

use std::collections::HashSet;

use reweft_pickle::{NodeId, Pickle, Value};

/// A module's own tensors and its children, in the order of a state_dict.
pub(super) struct Module {
    /// Parameters, buffers, submodules.
    pub items: Vec<(String, NodeId)>,
    /// Buffers that a state_dict leaves out.
    pub left_out: Vec<String>,
}

/// Reads an object as a module, if its state is one: `_parameters`, `_buffers` and `_modules`, whatever its class.
pub(super) fn state(pickle: &Pickle<'_>, id: NodeId) -> Option<Module> {
    let states = pickle.as_object(id)?.state();
    let find = |name: &str| {
        states.iter().rev().find_map(|state| {
            let pairs = pickle.dict(*state)?;
            pairs.iter().rev().find(|(key, _)| pickle.as_str(*key) == Some(name)).map(|(_, value)| *value)
        })
    };
    let groups = [find("_parameters")?, find("_buffers")?, find("_modules")?];
    let transient = find("_non_persistent_buffers_set").map(|set| names_in_set(pickle, set)).unwrap_or_default();
    let mut module = Module { items: Vec::new(), left_out: Vec::new() };
    for (group, members) in groups.into_iter().enumerate() {
        for (key, value) in pickle.dict(members)?.iter() {
            let name = pickle.as_str(*key)?;
            if matches!(pickle.get(*value), Value::None) {
                // A parameter, buffer or child that was registered as None has no key.
            } else if group == 1 && transient.contains(name) {
                module.left_out.push(name.to_owned());
            } else {
                module.items.push((name.to_owned(), *value));
            }
        }
    }
    Some(module)
}

/// The texts in a set, as opcodes of protocol 4 write it or as a call of `set`.
fn names_in_set<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> HashSet<&'p str> {
    let items = match pickle.get(id) {
        Value::Set(items) => items.as_slice(),
        _ => match pickle.as_call(id) {
            Some((("builtins", "set"), object)) => {
                pickle.as_tuple(object.args).and_then(|args| pickle.as_sequence(*args.first()?)).unwrap_or_default()
            }
            _ => &[],
        },
    };
    items.iter().filter_map(|item| pickle.as_str(*item)).collect()
}
