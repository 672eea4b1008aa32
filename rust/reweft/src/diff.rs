//! What differs between two checkpoints, or a checkpoint and a compiled package.
//!
//! Tensors are matched by name and compared by their elements, in pieces of bounded size; a strided tensor equals a
//! contiguous one with the same elements. Equal bytes are equal, NaN included. Otherwise
//!
//! - integers are subtracted exactly, floats as `float64`, complex numbers by the modulus of their difference;
//! - the relative difference is the absolute one over the larger of the two magnitudes;
//! - an element that is NaN on one side counts as `nan`, and one that is NaN on both, with other bits, as `nan_bits`;
//! - dtypes without numbers (packed and quantised ones) are compared by their bytes.
//!
//! What is no tensor is compared by path where both files can hold such values.

mod elements;
mod pieces;
mod report;
mod side;
mod values;

use std::collections::HashMap;

use indexmap::IndexMap;

use crate::error::Result;
use crate::tensor::{Layout, TensorInfo};
use crate::write::Progress;
use elements::Tally;
pub use report::{Absent, Change, Magnitude, Report, Tie, Unreadable, ValueChange, Which};
pub use side::Side;

/// What is compared.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only names that one of these matches; none means every name.
    only: Vec<regex::Regex>,
    /// Also what is no tensor.
    values: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { only: Vec::new(), values: true }
    }
}

impl Options {
    /// Compares only names that this or another pattern matches, after any key map.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::ErrorKind::Usage) for a pattern that does not compile.
    pub fn only(mut self, pattern: &str) -> Result<Self> {
        self.only.push(crate::keymap::compile(pattern)?);
        Ok(self)
    }

    /// Says whether what is no tensor is compared too; so it is by default.
    #[must_use]
    pub fn values(mut self, values: bool) -> Self {
        self.values = values;
        self
    }

    fn takes(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| pattern.is_match(name))
    }
}

/// Compares two sides. Reads all tensors that both have, in pieces; tensors whose layouts do not go together, and those
/// of packed records, are read whole, one at a time.
///
/// # Errors
/// Read errors, [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC among them. What cannot be read because
/// this version does not know it is in the report.
///
/// # Examples
/// ```no_run
/// use reweft::diff::{Options, Side, diff};
/// use reweft::{KeyMap, OpenOptions};
///
/// let open = |path: &str| Side::open(path.as_ref(), &OpenOptions::default(), &KeyMap::new());
/// let report = diff(&open("epoch3.pt")?, &open("epoch4.pt")?, &Options::default(), &mut |_, _| ())?;
/// for change in report.changed.iter().take(10) {
///     println!("{} {:?}", change.key, change.max_abs);
/// }
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn diff(a: &Side<'_>, b: &Side<'_>, options: &Options, progress: Progress<'_>) -> Result<Report> {
    let mut report = Report::new(a, b);
    report.only_in_a = absent(a, b, options);
    report.only_in_b = absent(b, a, options);
    report.unreadable = unreadable(a, b, options);
    let pairs: Vec<(&str, &TensorInfo, &TensorInfo)> = a
        .checkpoint()
        .tensors()
        .filter(|(key, _)| options.takes(key))
        .filter_map(|(key, left)| Some((key, left, b.tensor(key)?)))
        .collect();
    let total: u64 = pairs.iter().map(|(_, left, _)| left.nbytes()).fold(0, u64::saturating_add);
    // Tied tensors are read once.
    let mut known: HashMap<(View<'_>, View<'_>), Tally> = HashMap::new();
    for (key, left, right) in &pairs {
        report.tensors += 1;
        if left.shape != right.shape {
            report.changed.push(Change::of_layout(key, left, right));
            continue;
        }
        let views = (View::of(left), View::of(right));
        let tally = match known.get(&views) {
            Some(tally) => tally.clone(),
            None => known.entry(views).or_insert(pieces::compare(a, b, key, left, right)?).clone(),
        };
        report.nbytes = report.nbytes.saturating_add(left.nbytes());
        progress(report.nbytes, total);
        if left.dtype != right.dtype || !tally.is_equal() {
            report.changed.push(Change::of_values(key, left, right, &tally));
        }
    }
    report.ties = ties(&pairs);
    if options.values {
        values::compare(a, b, &mut report)?;
    }
    report.finish();
    Ok(report)
}

/// Names that only `one` has.
fn absent(one: &Side<'_>, other: &Side<'_>, options: &Options) -> Vec<Absent> {
    let names = one.names().filter(|key| options.takes(key) && !other.has(key));
    let excused = |key: &str| one.excuse(key).or_else(|| other.excuse(key)).map(str::to_owned);
    names
        .map(|key| Absent { key: key.to_owned(), layout: one.tensor(key).map(Layout::from), excuse: excused(key) })
        .collect()
}

/// Names that both sides have and that cannot be compared.
fn unreadable(a: &Side<'_>, b: &Side<'_>, options: &Options) -> Vec<Unreadable> {
    let of = |one: &Side<'_>, other: &Side<'_>, which: Which| {
        let names = one.unreadable().filter(|(key, _)| options.takes(key) && other.has(key));
        let rows = names.map(|(key, why)| Unreadable { key: key.to_owned(), side: which, reason: why.to_owned() });
        rows.collect::<Vec<_>>()
    };
    [of(a, b, Which::A), of(b, a, Which::B)].concat()
}

/// A tensor by where its elements lie.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct View<'a> {
    storage: usize,
    storage_offset: u64,
    dtype: crate::Dtype,
    shape: &'a [u64],
    strides: &'a [u64],
}

impl<'a> View<'a> {
    fn of(info: &'a TensorInfo) -> Self {
        let TensorInfo { dtype, shape, strides, storage, storage_offset } = info;
        Self { storage: *storage, storage_offset: *storage_offset, dtype: *dtype, shape, strides }
    }
}

/// Groups of names that are one tensor on one side and several on the other.
fn ties(pairs: &[(&str, &TensorInfo, &TensorInfo)]) -> Vec<Tie> {
    let mut found = Vec::new();
    for which in [Which::A, Which::B] {
        let mut groups: IndexMap<View<'_>, Vec<(&str, View<'_>)>> = IndexMap::new();
        for (key, left, right) in pairs {
            let (left, right) = (View::of(left), View::of(right));
            let (here, there) = if which == Which::A { (left, right) } else { (right, left) };
            if !here.shape.contains(&0) {
                groups.entry(here).or_default().push((key, there));
            }
        }
        for group in groups.into_values() {
            if group.iter().any(|(_, there)| group.first().is_some_and(|(_, first)| first != there)) {
                let keys = group.into_iter().map(|(key, _)| key.to_owned()).collect();
                found.push(Tie { keys, tied_in: which });
            }
        }
    }
    found
}
