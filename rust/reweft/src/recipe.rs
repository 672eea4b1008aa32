//! Recipes: how a tensor's bytes come from the keys of a checkpoint, as a flat list of steps.
//!
//! One vocabulary for what a key map asks for and for what a slot needs. A recipe is data: it prints, compares and
//! serialises. Steps work on a stack: a leaf puts a tensor on it, an operation replaces what it takes from the top.

use std::fmt;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::source::zeroed;
use crate::tensor::{TensorInfo, contiguous, same_layout};

/// One step. Dimensions may be negative: they count from the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Step {
    /// The tensor of a key.
    Leaf {
        /// The key.
        key: String,
    },
    /// The same elements with other strides; only a last cast may follow.
    Restride {
        /// Elements between neighbours along each dimension.
        strides: Vec<u64>,
    },
    /// Elements converted to another dtype.
    Cast {
        /// Name of the dtype before, where it is known.
        #[serde(skip_serializing_if = "Option::is_none")]
        from: Option<&'static str>,
        /// Name of the dtype after.
        to: &'static str,
    },
    /// Dimensions in another order.
    Permute {
        /// For each dimension of the result, which one it was.
        dims: Vec<i64>,
    },
    /// Two dimensions swapped.
    Transpose {
        /// The two.
        dims: [i64; 2],
    },
    /// The same elements in row-major order under another shape.
    Reshape {
        /// The sizes; one may be -1, which is then what is left.
        shape: Vec<i64>,
    },
    /// A range along a dimension.
    Slice {
        /// Which.
        dim: i64,
        /// First index.
        start: u64,
        /// How many.
        length: u64,
    },
    /// One of several equal ranges along a dimension.
    Chunk {
        /// Which dimension.
        dim: i64,
        /// Which range, from 0.
        index: u64,
        /// How many there are.
        of: u64,
    },
    /// The topmost tensors one behind the other.
    Concat {
        /// Along which dimension.
        dim: i64,
        /// How many; the topmost is the last.
        count: usize,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf { key } => f.write_str(key),
            Self::Restride { strides } => write!(f, "strides {strides:?}"),
            Self::Cast { from: Some(from), to } => write!(f, "cast {from} to {to}"),
            Self::Cast { from: None, to } => write!(f, "cast to {to}"),
            Self::Permute { dims } => write!(f, "permute {dims:?}"),
            Self::Transpose { dims: [first, second] } => write!(f, "transpose {first} and {second}"),
            Self::Reshape { shape } => write!(f, "reshape to {shape:?}"),
            Self::Slice { dim, start, length } => write!(f, "{length} from {start} along {dim}"),
            Self::Chunk { dim, index, of } => write!(f, "part {index} of {of} along {dim}"),
            Self::Concat { dim, count } => write!(f, "concat {count} along {dim}"),
        }
    }
}

/// The steps from keys to one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Recipe(pub Vec<Step>);

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { " | " };
            write!(f, "{separator}{step}")?;
        }
        Ok(())
    }
}

impl Recipe {
    /// The tensor of a key, as it is.
    pub(crate) fn leaf(key: &str) -> Self {
        Self(vec![Step::Leaf { key: key.to_owned() }])
    }

    /// The recipe that takes one key as it is, changing layout and dtype only where the slot has another.
    pub(crate) fn of_key(key: &str, info: &TensorInfo, dtype: Dtype, strides: &[u64]) -> Self {
        let mut recipe = Self::leaf(key);
        // A cast gives row-major order, whatever it takes.
        let row_major = contiguous(&info.shape);
        let given = if info.dtype == dtype { &info.strides } else { &row_major };
        if !same_layout(&info.shape, given, strides) {
            recipe.0.push(Step::Restride { strides: strides.to_vec() });
        }
        if info.dtype != dtype {
            recipe.0.push(Step::Cast { from: Some(info.dtype.name()), to: dtype.name() });
        }
        recipe
    }

    /// The one key whose bytes are the result's as they are, if no step changes them.
    pub fn plain_key(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Step::Leaf { key }] => Some(key),
            _ => None,
        }
    }

    /// The keys that it takes, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|step| match step {
            Step::Leaf { key } => Some(key.as_str()),
            _ => None,
        })
    }

    /// Makes the bytes. Reads the bytes of its keys; allocates the result.
    ///
    /// # Errors
    /// As [`evaluate_into`](Self::evaluate_into).
    pub fn evaluate(&self, checkpoint: &Checkpoint, nbytes: u64) -> Result<Vec<u8>> {
        let mut bytes = zeroed(nbytes)?;
        self.evaluate_into(checkpoint, &mut bytes)?;
        Ok(bytes)
    }

    /// Makes the bytes in place. Copies them once where no step needs more.
    ///
    /// # Errors
    /// As [`Checkpoint::read_into`]; [`ErrorKind::Usage`](crate::ErrorKind::Usage) for steps that do not fit their
    /// tensors, or if `out` is not as long as the result.
    pub fn evaluate_into(&self, checkpoint: &Checkpoint, out: &mut [u8]) -> Result<()> {
        checkpoint.evaluate_into(self, out)
    }
}
