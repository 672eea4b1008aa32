//! What a comparison found, as data.

use std::cmp::Ordering;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::elements::Tally;
use super::side::Side;
use crate::tensor::{Layout, TensorInfo};

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The first.
    A,
    /// The second.
    B,
}

/// What was compared.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// The file.
    pub path: PathBuf,
    /// What its content was found to be.
    pub format: &'static str,
    /// Its names, readable or not.
    pub tensors: usize,
}

/// Everything that differs.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The first side.
    pub a: Subject,
    /// The second side.
    pub b: Subject,
    /// Whether nothing differs; ties, values that were not compared and names with an excuse do not count.
    pub equal: bool,
    /// Tensors that both sides have and that can be read.
    pub tensors: usize,
    /// Bytes of those that were compared by their elements.
    pub nbytes: u64,
    /// Names that only the first side has.
    pub only_in_a: Vec<Absent>,
    /// Names that only the second side has.
    pub only_in_b: Vec<Absent>,
    /// Tensors that differ, what changed most first: shapes, then NaN, then the largest absolute difference.
    pub changed: Vec<Change>,
    /// Names that both sides have and that could not be compared.
    pub unreadable: Vec<Unreadable>,
    /// Names that are one tensor on one side only.
    pub ties: Vec<Tie>,
    /// What is no tensor and differs, by path.
    pub values: Vec<ValueChange>,
    /// Paths of values that have no form that could be compared.
    pub values_not_compared: Vec<String>,
}

/// A name that one side lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Absent {
    /// The name.
    pub key: String,
    /// Dtype and shape; `None` if it cannot be read.
    pub layout: Option<Layout>,
    /// Why that is no difference, if so.
    pub excuse: Option<String>,
}

/// A tensor that differs.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The name.
    pub key: String,
    /// How the first side has it.
    pub a: Layout,
    /// How the second side has it.
    pub b: Layout,
    /// Elements that differ in any bit, or in value where the dtypes differ; `None` where shapes differ.
    pub differing: Option<u64>,
    /// Elements that are NaN on one side only.
    pub nan: u64,
    /// Elements that are NaN on both sides, with other bits.
    pub nan_bits: u64,
    /// The largest absolute difference; `None` if there are no numbers to subtract.
    pub max_abs: Option<Magnitude>,
    /// The largest relative difference: from 0 to 2, or infinite.
    #[serde(serialize_with = "float_or_text")]
    pub max_rel: Option<f64>,
    /// Index of the largest absolute difference.
    pub at: Option<Vec<u64>>,
}

/// A difference: exact for integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Magnitude {
    /// Of integers.
    Int(u128),
    /// Of floats and complex numbers; never NaN, may be infinite.
    Float(f64),
}

impl Magnitude {
    /// The nearest float.
    #[expect(clippy::cast_precision_loss, reason = "the nearest float is what is asked for")]
    pub fn value(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    /// Whether an integer is larger than another one whose float is the same.
    pub(super) fn exceeds(self, other: Self) -> bool {
        matches!((self, other), (Self::Int(left), Self::Int(right)) if left > right)
    }
}

impl std::fmt::Display for Magnitude {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value:.4e}"),
        }
    }
}

impl Serialize for Magnitude {
    /// A number; infinity is the text `inf`, which JSON lacks.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Int(value) => serializer.serialize_u128(*value),
            Self::Float(value) => float_or_text(&Some(*value), serializer),
        }
    }
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn float_or_text<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        None => serializer.serialize_none(),
        Some(value) if value.is_finite() => serializer.serialize_f64(*value),
        Some(_) => serializer.serialize_str("inf"),
    }
}

/// A name that could not be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The name.
    pub key: String,
    /// The side that cannot be read.
    pub side: Which,
    /// Why.
    pub reason: String,
}

/// Names that are one tensor on one side, and not on the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tie {
    /// The names.
    pub keys: Vec<String>,
    /// The side on which they are one.
    pub tied_in: Which,
}

/// Something that is no tensor and differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ValueChange {
    /// Dotted path.
    pub path: String,
    /// What the first side has, cut short; `None` if nothing.
    pub a: Option<String>,
    /// What the second side has, cut short; `None` if nothing.
    pub b: Option<String>,
}

impl Change {
    pub(super) fn of_layout(key: &str, a: &TensorInfo, b: &TensorInfo) -> Self {
        let (key, a, b) = (key.to_owned(), Layout::from(a), Layout::from(b));
        Self { key, a, b, differing: None, nan: 0, nan_bits: 0, max_abs: None, max_rel: None, at: None }
    }

    pub(super) fn of_values(key: &str, a: &TensorInfo, b: &TensorInfo, tally: &Tally) -> Self {
        let compared = super::elements::is_comparable(a.dtype, b.dtype);
        Self {
            differing: compared.then_some(tally.differing),
            nan: tally.nan,
            nan_bits: tally.nan_bits,
            max_abs: tally.max_abs,
            max_rel: tally.max_abs.map(|_| tally.max_rel),
            at: tally.at.clone(),
            ..Self::of_layout(key, a, b)
        }
    }

    /// What changed more comes first.
    fn rank(&self, other: &Self) -> Ordering {
        let weight = |change: &Self| {
            let abs = change.max_abs.map_or(0.0, Magnitude::value);
            (change.differing.is_none(), change.nan > 0, abs, change.max_rel.unwrap_or(0.0))
        };
        let (left, right) = (weight(self), weight(other));
        (right.0, right.1)
            .cmp(&(left.0, left.1))
            .then(right.2.total_cmp(&left.2))
            .then(right.3.total_cmp(&left.3))
            .then_with(|| other.differing.cmp(&self.differing))
    }
}

impl Report {
    pub(super) fn new(a: &Side<'_>, b: &Side<'_>) -> Self {
        let subject = |side: &Side<'_>| Subject {
            path: side.checkpoint().path().to_owned(),
            format: side.format(),
            tensors: side.names().count(),
        };
        Self {
            a: subject(a),
            b: subject(b),
            equal: false,
            tensors: 0,
            nbytes: 0,
            only_in_a: Vec::new(),
            only_in_b: Vec::new(),
            changed: Vec::new(),
            unreadable: Vec::new(),
            ties: Vec::new(),
            values: Vec::new(),
            values_not_compared: Vec::new(),
        }
    }

    /// Sorts, and sums up.
    pub(super) fn finish(&mut self) {
        self.changed.sort_by(Change::rank);
        let missed = self.only_in_a.iter().chain(&self.only_in_b).any(|absent| absent.excuse.is_none());
        let differs = missed || !self.changed.is_empty() || !self.unreadable.is_empty() || !self.values.is_empty();
        self.equal = !differs;
    }
}
