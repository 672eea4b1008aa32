//! Elements against elements: how many differ, and by how much at most.

use crate::checkpoint::numpy::{Number, number};
use crate::convert::{can_cast, cast};
use crate::dtype::Dtype;
use crate::error::Result;

use super::report::Magnitude;

/// Elements that are decoded at a time, so that buffers stay in the cache.
const BLOCK: usize = 4096;

/// What was found so far in one pair of tensors.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    /// Elements that differ in any bit, or in value where the dtypes differ.
    pub differing: u64,
    /// Elements that are NaN on one side only.
    pub nan: u64,
    /// Elements that are NaN on both sides, with other bits.
    pub nan_bits: u64,
    /// The largest difference; `None` until there is one in numbers.
    pub max_abs: Option<Magnitude>,
    pub max_rel: f64,
    /// Index of the largest difference.
    pub at: Option<Vec<u64>>,
}

/// What arithmetic two dtypes are compared by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int,
    Float,
    Complex,
    /// None: only bytes.
    Bytes,
}

fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bool
        | Dtype::U8
        | Dtype::U16
        | Dtype::U32
        | Dtype::U64
        | Dtype::I8
        | Dtype::I16
        | Dtype::I32
        | Dtype::I64 => Kind::Int,
        Dtype::C32 | Dtype::C64 | Dtype::C128 => Kind::Complex,
        dtype if can_cast(dtype, Dtype::F64) => Kind::Float,
        _ => Kind::Bytes,
    }
}

fn common(a: Dtype, b: Dtype) -> Kind {
    match (kind(a), kind(b)) {
        (Kind::Bytes, _) | (_, Kind::Bytes) => Kind::Bytes,
        (Kind::Complex, _) | (_, Kind::Complex) => Kind::Complex,
        (Kind::Int, Kind::Int) => Kind::Int,
        _ => Kind::Float,
    }
}

/// Whether elements of the two dtypes can be compared at all.
pub(super) fn is_comparable(a: Dtype, b: Dtype) -> bool {
    a == b || common(a, b) != Kind::Bytes
}

/// The same elements of both sides, in one order.
pub(super) struct Elements<'a> {
    pub dtype: Dtype,
    pub bytes: &'a [u8],
}

impl Elements<'_> {
    fn block(&self, number: usize, unit: usize) -> Self {
        let start = (number * BLOCK * unit).min(self.bytes.len());
        let end = (start + BLOCK * unit).min(self.bytes.len());
        Self { dtype: self.dtype, bytes: self.bytes.get(start..end).unwrap_or_default() }
    }

    fn floats(&self) -> Result<Vec<f64>> {
        if kind(self.dtype) == Kind::Int {
            return Ok(self.ints().into_iter().map(to_float).collect());
        }
        let bytes = cast(self.bytes, self.dtype, Dtype::F64)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|item| f64::from_le_bytes(*item)).collect())
    }

    fn ints(&self) -> Vec<i128> {
        let size = unit(self.dtype);
        let value = |item: &[u8]| match number(self.dtype, false, item) {
            Some(Number::Int(value)) => value,
            // A bool of another byte than 0 and 1 is the number that the byte is.
            Some(Number::Bool(_)) => item.first().copied().unwrap_or_default().into(),
            _ => 0,
        };
        self.bytes.chunks_exact(size).map(value).collect()
    }

    fn complex(&self) -> Result<Vec<(f64, f64)>> {
        let part = match self.dtype {
            Dtype::C32 => Dtype::F16,
            Dtype::C64 => Dtype::F32,
            Dtype::C128 => Dtype::F64,
            _ => return Ok(self.floats()?.into_iter().map(|re| (re, 0.0)).collect()),
        };
        let parts = Elements { dtype: part, bytes: self.bytes }.floats()?;
        Ok(parts.as_chunks::<2>().0.iter().map(|[re, im]| (*re, *im)).collect())
    }
}

#[expect(clippy::cast_precision_loss, reason = "differences between an int and a float are floats")]
fn to_float(value: i128) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "a ratio is a float")]
fn ratio(difference: u128, largest: u128) -> f64 {
    difference as f64 / largest as f64
}

/// Bytes of an element; 1 for the packed types, whose elements share bytes.
fn unit(dtype: Dtype) -> usize {
    dtype.itemsize().and_then(|size| usize::try_from(size).ok()).unwrap_or(1).max(1)
}

impl Tally {
    pub fn is_equal(&self) -> bool {
        self.differing == 0
    }

    /// Compares elements; `index` tells where one stands in the tensor.
    pub fn add(&mut self, a: &Elements<'_>, b: &Elements<'_>, index: impl Fn(usize) -> Vec<u64>) -> Result<()> {
        if a.dtype == b.dtype && a.bytes == b.bytes {
            return Ok(());
        }
        let (unit_a, unit_b) = (unit(a.dtype), unit(b.dtype));
        let blocks = (a.bytes.len() / unit_a).div_ceil(BLOCK);
        let mut largest = None;
        for number in 0..blocks {
            let (left, right) = (a.block(number, unit_a), b.block(number, unit_b));
            if a.dtype == b.dtype && left.bytes == right.bytes {
                continue;
            }
            let found = match common(a.dtype, b.dtype) {
                Kind::Bytes => {
                    let pairs = left.bytes.chunks(unit_a).zip(right.bytes.chunks(unit_b));
                    self.differing += pairs.filter(|(left, right)| left != right).count() as u64;
                    None
                }
                Kind::Int => self.add_ints(&left, &right),
                Kind::Float => self.add_numbers((left.floats()?, right.floats()?), &left, &right),
                Kind::Complex => self.add_numbers((left.complex()?, right.complex()?), &left, &right),
            };
            largest = found.map(|place| number * BLOCK + place).or(largest);
        }
        if let Some(place) = largest {
            self.at = Some(index(place));
        }
        Ok(())
    }

    /// Gives the place of a new largest difference.
    fn add_ints(&mut self, a: &Elements<'_>, b: &Elements<'_>) -> Option<usize> {
        let mut found = None;
        for (place, (left, right)) in a.ints().into_iter().zip(b.ints()).enumerate() {
            let difference = left.abs_diff(right);
            if difference == 0 {
                continue;
            }
            self.differing += 1;
            self.max_rel = self.max_rel.max(ratio(difference, left.unsigned_abs().max(right.unsigned_abs())));
            if self.raise(Magnitude::Int(difference)) {
                found = Some(place);
            }
        }
        found
    }

    /// Floats or complex numbers, in the order of the elements that they were decoded from.
    fn add_numbers<T: Float>(
        &mut self,
        numbers: (Vec<T>, Vec<T>),
        a: &Elements<'_>,
        b: &Elements<'_>,
    ) -> Option<usize> {
        let (unit_a, unit_b) = (unit(a.dtype), unit(b.dtype));
        let same_bits = |place: usize| {
            let left = a.bytes.get(place * unit_a..(place + 1) * unit_a);
            a.dtype != b.dtype || left == b.bytes.get(place * unit_b..(place + 1) * unit_b)
        };
        let before = self.max_abs.map_or(-1.0, Magnitude::value);
        let (mut largest, mut found) = (before, None);
        for (place, (left, right)) in numbers.0.into_iter().zip(numbers.1).enumerate() {
            let (left_nan, right_nan) = (left.is_nan(), right.is_nan());
            // Zeros of either sign are equal, NaN never is: only bits tell.
            if (left == right || left_nan && right_nan) && same_bits(place) {
                continue;
            }
            self.differing += 1;
            if left_nan || right_nan {
                *(if left_nan && right_nan { &mut self.nan_bits } else { &mut self.nan }) += 1;
                continue;
            }
            let (abs, rel) = left.distance(right);
            self.max_rel = self.max_rel.max(rel);
            if abs > largest {
                (largest, found) = (abs, Some(place));
            }
        }
        if found.is_some() {
            self.max_abs = Some(Magnitude::Float(largest));
        }
        found
    }

    /// Whether a difference is larger than all before it.
    fn raise(&mut self, difference: Magnitude) -> bool {
        let larger =
            self.max_abs.is_none_or(|before| difference.value() > before.value() || difference.exceeds(before));
        if larger {
            self.max_abs = Some(difference);
        }
        larger
    }
}

/// What floats and complex numbers are subtracted by.
trait Float: Copy + PartialEq {
    fn is_nan(self) -> bool;

    /// Absolute and relative difference from another number; neither is NaN.
    fn distance(self, other: Self) -> (f64, f64);
}

impl Float for f64 {
    fn is_nan(self) -> bool {
        self.is_nan()
    }

    #[expect(clippy::float_cmp, reason = "infinities that agree must not be subtracted")]
    fn distance(self, other: Self) -> (f64, f64) {
        let abs = if self == other { 0.0 } else { (self - other).abs() };
        (abs, relative(abs, self.abs().max(other.abs())))
    }
}

impl Float for (f64, f64) {
    fn is_nan(self) -> bool {
        self.0.is_nan() || self.1.is_nan()
    }

    fn distance(self, other: Self) -> (f64, f64) {
        let abs = self.0.distance(other.0).0.hypot(self.1.distance(other.1).0);
        (abs, relative(abs, self.0.hypot(self.1).max(other.0.hypot(other.1))))
    }
}

fn relative(abs: f64, largest: f64) -> f64 {
    if abs == 0.0 {
        0.0
    } else if abs.is_infinite() {
        f64::INFINITY
    } else {
        abs / largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(dtype: Dtype, a: &[u8], b: &[u8]) -> Tally {
        let mut tally = Tally::default();
        tally.add(&Elements { dtype, bytes: a }, &Elements { dtype, bytes: b }, |place| vec![place as u64]).unwrap();
        tally
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn nan_and_infinity() {
        let a = floats(&[f32::NAN, f32::NAN, 1.0, f32::INFINITY, f32::INFINITY, 0.0]);
        let mut b = floats(&[f32::NAN, 1.0, f32::NAN, f32::INFINITY, -1.0, -0.0]);
        b[0] ^= 1;
        let found = tally(Dtype::F32, &a, &b);
        assert_eq!((found.differing, found.nan, found.nan_bits), (5, 2, 1));
        assert_eq!((found.max_abs, found.at), (Some(Magnitude::Float(f64::INFINITY)), Some(vec![4])));
        assert!(tally(Dtype::F32, &a, &a).is_equal());
    }

    #[test]
    fn integers_are_exact() {
        let (a, b) = ([u64::MAX, 1 << 60], [0, (1 << 60) + 1]);
        let bytes = |values: [u64; 2]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let found = tally(Dtype::U64, &bytes(a), &bytes(b));
        assert_eq!((found.differing, found.max_abs), (2, Some(Magnitude::Int(u64::MAX.into()))));
        let found = tally(Dtype::I64, &bytes([1 << 60, 0]), &bytes([(1 << 60) + 1, 0]));
        assert_eq!((found.max_abs, found.at), (Some(Magnitude::Int(1)), Some(vec![0])));
    }

    #[test]
    fn complex_numbers_differ_by_their_modulus() {
        let found = tally(Dtype::C64, &floats(&[1.0, 1.0, 0.0, 0.0]), &floats(&[4.0, 5.0, 0.0, 0.0]));
        assert_eq!((found.differing, found.max_abs), (1, Some(Magnitude::Float(5.0))));
    }

    #[test]
    fn the_largest_of_many_blocks_is_found() {
        let (a, mut b) = (vec![0.0; 3 * BLOCK], vec![0.0; 3 * BLOCK]);
        (b[5], b[BLOCK + 7], b[2 * BLOCK]) = (1.0, 3.0, 2.0);
        let found = tally(Dtype::F32, &floats(&a), &floats(&b));
        assert_eq!((found.differing, found.at), (3, Some(vec![BLOCK as u64 + 7])));
    }

    #[test]
    fn other_dtypes_are_compared_by_value() {
        let mut found = Tally::default();
        let (a, b) = (floats(&[1.0, 2.5, f32::NAN]), [0_u16.to_le_bytes(), [0, 0], [0, 0]].concat());
        let half = cast(&a, Dtype::F32, Dtype::BF16).unwrap();
        let (left, right) = (Elements { dtype: Dtype::F32, bytes: &a }, Elements { dtype: Dtype::BF16, bytes: &half });
        found.add(&left, &right, |_| Vec::new()).unwrap();
        assert!(found.is_equal());
        let right = Elements { dtype: Dtype::BF16, bytes: &b };
        found.add(&left, &right, |place| vec![place as u64]).unwrap();
        assert_eq!((found.differing, found.nan, found.max_abs), (3, 1, Some(Magnitude::Float(2.5))));
        assert!(!is_comparable(Dtype::F32, Dtype::Bits8) && is_comparable(Dtype::Bits8, Dtype::Bits8));
    }
}
