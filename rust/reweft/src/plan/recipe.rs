//! Recipes: how a slot's bytes come from keys, as a flat list of steps.

use std::fmt;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{TensorInfo, same_layout};

/// One step; each takes what the one before it made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Step {
    /// The tensor of a key.
    Leaf {
        /// The key.
        key: String,
    },
    /// The same elements with other strides.
    Restride {
        /// Elements between neighbours along each dimension.
        strides: Vec<u64>,
    },
    /// Elements converted to another dtype.
    Cast {
        /// Name of the dtype before.
        from: &'static str,
        /// Name of the dtype after.
        to: &'static str,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf { key } => f.write_str(key),
            Self::Restride { strides } => write!(f, "strides {strides:?}"),
            Self::Cast { from, to } => write!(f, "cast {from} to {to}"),
        }
    }
}

/// The steps from keys to one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Recipe(pub Vec<Step>);

impl Recipe {
    /// The recipe that takes one key as it is, changing layout and dtype only where the slot has another.
    pub(super) fn of_key(key: &str, info: &TensorInfo, dtype: Dtype, strides: &[u64]) -> Self {
        let mut steps = vec![Step::Leaf { key: key.to_owned() }];
        if !same_layout(&info.shape, &info.strides, strides) {
            steps.push(Step::Restride { strides: strides.to_vec() });
        }
        if info.dtype != dtype {
            steps.push(Step::Cast { from: info.dtype.name(), to: dtype.name() });
        }
        Self(steps)
    }

    /// The one key whose bytes are the slot's as they are, if no step changes them.
    pub fn plain_key(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Step::Leaf { key }] => Some(key),
            _ => None,
        }
    }

    /// Makes the slot's bytes. Reads the bytes of its keys; copies once more for a cast.
    ///
    /// # Errors
    /// As [`Checkpoint::read_strided`]; [`ErrorKind::Usage`] for steps in an order that no plan makes.
    pub fn evaluate(&self, checkpoint: &Checkpoint) -> Result<Vec<u8>> {
        let (Some(Step::Leaf { key }), steps) = (self.0.first(), self.0.get(1..).unwrap_or_default()) else {
            return Err(Error::new(ErrorKind::Usage, "a recipe begins with a key"));
        };
        let info = checkpoint.get(key)?;
        let (strides, steps) = match steps {
            [Step::Restride { strides }, rest @ ..] => (strides, rest),
            rest => (&info.strides, rest),
        };
        let bytes = checkpoint.read_strided(key, strides)?;
        match steps {
            [] => Ok(bytes),
            [Step::Cast { from, to }] => match (Dtype::from_name(from), Dtype::from_name(to)) {
                (Some(from), Some(to)) => convert::cast(&bytes, from, to).map_err(|error| error.of_key(key)),
                _ => Err(Error::new(ErrorKind::Usage, "a cast names no dtype").of_key(key)),
            },
            _ => Err(Error::new(ErrorKind::Usage, "a recipe casts last").of_key(key)),
        }
    }
}
