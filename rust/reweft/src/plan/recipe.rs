//! Recipes: how a slot's bytes come from keys, as a flat list of steps.

use std::fmt;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::source::to_usize;
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

    /// Makes the slot's bytes. Reads the bytes of its keys; allocates the result.
    ///
    /// # Errors
    /// As [`evaluate_into`](Self::evaluate_into).
    pub fn evaluate(&self, checkpoint: &Checkpoint, nbytes: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(nbytes)?];
        self.evaluate_into(checkpoint, &mut bytes)?;
        Ok(bytes)
    }

    /// Makes the slot's bytes in place. Copies them once, and once more for a cast.
    ///
    /// # Errors
    /// As [`Checkpoint::read_into`]; [`ErrorKind::Usage`] for steps in an order that no plan makes.
    pub fn evaluate_into(&self, checkpoint: &Checkpoint, out: &mut [u8]) -> Result<()> {
        let (Some(Step::Leaf { key }), steps) = (self.0.first(), self.0.get(1..).unwrap_or_default()) else {
            return Err(Error::new(ErrorKind::Usage, "a recipe begins with a key"));
        };
        let info = checkpoint.get(key)?;
        let (strides, steps) = match steps {
            [Step::Restride { strides }, rest @ ..] => (strides, rest),
            rest => (&info.strides, rest),
        };
        match steps {
            [] => checkpoint.read_into(key, strides, out),
            [Step::Cast { from, to }] => {
                let (Some(from), Some(to)) = (Dtype::from_name(from), Dtype::from_name(to)) else {
                    return Err(Error::new(ErrorKind::Usage, "a cast names no dtype").of_key(key));
                };
                let mut bytes = vec![0; to_usize(info.nbytes())?];
                checkpoint.read_into(key, strides, &mut bytes)?;
                let cast = convert::cast(&bytes, from, to).map_err(|error| error.of_key(key))?;
                copy_exact(&cast, out).map_err(|error| error.of_key(key))
            }
            _ => Err(Error::new(ErrorKind::Usage, "a recipe casts last").of_key(key)),
        }
    }
}

fn copy_exact(bytes: &[u8], out: &mut [u8]) -> Result<()> {
    if bytes.len() != out.len() {
        let what = format!("recipe made {} bytes, the slot takes {}", bytes.len(), out.len());
        return Err(Error::new(ErrorKind::Mismatch, what));
    }
    out.copy_from_slice(bytes);
    Ok(())
}
