//! What the containers of a pickle may unfold to: a few bytes can save one container in very many places, and whoever
//! walks them must not pay for each place without bound.

use reweft_pickle::{NodeId, Pickle, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;

/// The budget of a pickle of no size.
const FREE_COST: u64 = 1 << 20;
/// What it costs to look at an item of a container.
const ITEM_COST: u64 = 8;

/// Steps and bytes that are left to a walk over a pickle; see [`Limits::max_expansion`].
pub(crate) struct Budget {
    left: u64,
    per_byte: u64,
}

impl Budget {
    pub fn new(pickle: &Pickle<'_>, limits: &Limits) -> Self {
        let per_byte = limits.max_expansion;
        Self { left: per_byte.saturating_mul(pickle.nbytes() as u64).saturating_add(FREE_COST), per_byte }
    }

    /// Takes from the budget.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] if it is used up.
    pub fn spend(&mut self, cost: u64) -> Result<()> {
        self.left = self.left.checked_sub(cost).ok_or_else(|| {
            let limit = self.per_byte;
            let what = format!("shared containers unfold to too much for their size; max_expansion is {limit}");
            Error::new(ErrorKind::Limit, what)
        })?;
        Ok(())
    }

    /// Pays for telling what a value is.
    ///
    /// # Errors
    /// As [`spend`](Self::spend).
    pub fn look_at(&mut self, pickle: &Pickle<'_>, id: NodeId) -> Result<()> {
        self.spend(work(pickle, id, self.left / ITEM_COST).saturating_mul(ITEM_COST))
    }
}

/// How many items are looked at to tell what a value is: its own, and those of its arguments and its states, two
/// levels deep. Stops counting above `limit`.
fn work(pickle: &Pickle<'_>, id: NodeId, limit: u64) -> u64 {
    let mut work = items_in(pickle, id);
    let Some(object) = pickle.as_object(id) else { return work };
    let args = pickle.as_tuple(object.args).unwrap_or_default();
    for part in args.iter().chain(object.state()) {
        work += 1 + items_in(pickle, *part);
        let inside: &mut dyn Iterator<Item = NodeId> = match pickle.get(*part) {
            Value::Dict(pairs) => &mut pairs.iter().map(|(_, value)| *value),
            Value::Object(object) => &mut object.dict_items().iter().map(|(_, value)| *value),
            Value::Tuple(items) => &mut pickle.children(*items).iter().copied(),
            _ => &mut std::iter::empty(),
        };
        for item in inside {
            work += 1 + items_in(pickle, item);
        }
        if work > limit {
            break;
        }
    }
    work
}

/// Items of a container, those given to its constructor included.
pub(super) fn items_in(pickle: &Pickle<'_>, id: NodeId) -> u64 {
    let count = match pickle.get(id) {
        Value::Dict(pairs) => pairs.len(),
        Value::List(items) | Value::Set(items) => items.len(),
        Value::Tuple(items) | Value::FrozenSet(items) => items.len(),
        Value::Object(object) => {
            let given = pickle.as_tuple(object.args).and_then(|args| pickle.as_sequence(*args.first()?));
            object.dict_items().len() + object.list_items().len() + given.map_or(0, <[NodeId]>::len)
        }
        _ => 0,
    };
    count as u64
}
