//! Functions of elements that IEEE 754 defines to the last bit, so that they give what torch's give, whatever the machine.
//!
//! Nothing else is here on purpose: an exponential function has as many results as there are libraries. Two operands that
//! are both NaN are the exception: which of their bits the result has is the processor's choice.

use serde::{Deserialize, Serialize};

use super::count_up;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

macro_rules! arithmetic {
    ($($variant:ident $name:literal $arity:literal $of:expr;)*) => {
        /// A function of one or two elements of `float32` or `float64`, rounded to nearest even.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        #[non_exhaustive]
        pub enum Arithmetic {
            $(#[doc = concat!("`", stringify!($of), "`")] $variant,)*
        }

        impl Arithmetic {
            /// Its name in a recipe.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// How many tensors it takes.
            pub const fn arity(self) -> usize {
                match self { $(Self::$variant => $arity,)* }
            }

            /// Applies it to all elements; a loop for each function, which the compiler makes vectors of.
            fn run<T: Element>(self, shape: &[u64], out: &mut [u8], other: &Operand<'_>) -> Result<()> {
                match self { $(Self::$variant => each::<T>(shape, out, other, $of),)* }
            }
        }
    };
}

// Name, number of operands, and what becomes of an element of each.
arithmetic! {
    Add  "add"  2 |left, right| left + right;
    Sub  "sub"  2 |left, right| left - right;
    Mul  "mul"  2 |left, right| left * right;
    Div  "div"  2 |left, right| left / right;
    Sqrt "sqrt" 1 |of, _| of.sqrt();
}

/// Elements of a tensor that may be repeated (stride 0).
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// The bytes from the first element on, in this machine's order.
    pub bytes: &'a [u8],
    /// Elements between neighbours along each dimension.
    pub strides: &'a [u64],
}

impl Arithmetic {
    /// Whether there are such functions of a dtype. Of the narrower floats torch computes in `float32` and rounds, which is
    /// two casts around these.
    pub const fn takes(dtype: Dtype) -> bool {
        matches!(dtype, Dtype::F32 | Dtype::F64)
    }

    /// Applies the function in place: `out` holds the first operand in row-major order.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a dtype that it does not [take](Self::takes), or another number of operands;
    /// [`ErrorKind::Format`] for an operand that is shorter than its layout.
    pub fn apply(self, dtype: Dtype, shape: &[u64], out: &mut [u8], other: Option<&Operand<'_>>) -> Result<()> {
        if other.is_some() != (self.arity() == 2) {
            return Err(Error::new(ErrorKind::Usage, format!("{} takes {} tensors", self.name(), self.arity())));
        }
        // A function of one element is one of two, the second of which is not looked at.
        let unused = vec![0; shape.len()];
        let other = other.copied().unwrap_or(Operand { bytes: &[0; 8], strides: &unused });
        match dtype {
            Dtype::F32 => self.run::<f32>(shape, out, &other),
            Dtype::F64 => self.run::<f64>(shape, out, &other),
            _ => Err(Error::new(ErrorKind::Usage, format!("{} takes no {dtype}", self.name()))),
        }
    }
}

/// A float in memory.
trait Element:
    Copy
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
{
    const NBYTES: usize;
    fn read(bytes: &[u8]) -> Self;
    fn write(self, bytes: &mut [u8]);
    fn sqrt(self) -> Self;
}

macro_rules! element {
    ($float:ident) => {
        impl Element for $float {
            const NBYTES: usize = size_of::<Self>();
            fn read(bytes: &[u8]) -> Self {
                bytes.try_into().map_or(Self::NAN, Self::from_ne_bytes)
            }
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_ne_bytes());
            }
            fn sqrt(self) -> Self {
                Self::sqrt(self)
            }
        }
    };
}

element!(f32);
element!(f64);

fn each<T: Element>(shape: &[u64], out: &mut [u8], other: &Operand<'_>, function: impl Fn(T, T) -> T) -> Result<()> {
    let short = || Error::format(format!("layout of shape {shape:?} is larger than its bytes"));
    let dims = merged(shape, other.strides);
    let Some(((run, step), outer)) = dims.split_last().filter(|_| !shape.contains(&0)) else { return Ok(()) };
    let run = usize::try_from(*run).map_err(|_| short())?;
    let step = usize::try_from(*step).ok().and_then(|step| step.checked_mul(T::NBYTES)).ok_or_else(short)?;
    let last = (run - 1).checked_mul(step).and_then(|last| last.checked_add(T::NBYTES)).ok_or_else(short)?;
    let mut index = vec![0_u64; outer.len()];
    for piece in out.chunks_exact_mut(run * T::NBYTES) {
        let at = index.iter().zip(outer).map(|(index, (_, stride))| index * stride).sum::<u64>();
        let at = usize::try_from(at).ok().and_then(|at| at.checked_mul(T::NBYTES)).ok_or_else(short)?;
        let source = at.checked_add(last).and_then(|end| other.bytes.get(at..end)).ok_or_else(short)?;
        let elements = piece.chunks_exact_mut(T::NBYTES);
        if step == 0 {
            let right = T::read(&source[..T::NBYTES]);
            elements.for_each(|element| function(T::read(element), right).write(element));
        } else if step == T::NBYTES {
            let rights = source.chunks_exact(T::NBYTES);
            elements.zip(rights).for_each(|(element, right)| function(T::read(element), T::read(right)).write(element));
        } else {
            let rights = source.chunks(step).map(|right| T::read(&right[..T::NBYTES]));
            elements.zip(rights).for_each(|(element, right)| function(T::read(element), right).write(element));
        }
        count_up(&mut index, |dim| outer[dim].0);
    }
    Ok(())
}

/// Sizes and strides without dimensions of one element, neighbours joined that are walked as one. At least one is left.
fn merged(shape: &[u64], strides: &[u64]) -> Vec<(u64, u64)> {
    let mut dims: Vec<(u64, u64)> = Vec::with_capacity(shape.len());
    for (size, stride) in shape.iter().copied().zip(strides.iter().copied()).filter(|(size, _)| *size != 1) {
        match dims.last_mut() {
            Some(outer) if Some(outer.1) == size.checked_mul(stride) => *outer = (outer.0.saturating_mul(size), stride),
            _ => dims.push((size, stride)),
        }
    }
    if dims.is_empty() {
        dims.push((1, 0));
    }
    dims
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    fn apply(function: Arithmetic, shape: &[u64], left: &[f32], right: Option<(&[f32], &[u64])>) -> Vec<f32> {
        let mut out = bytes(left);
        let right = right.map(|(values, strides)| (bytes(values), strides));
        let right = right.as_ref().map(|(bytes, strides)| Operand { bytes, strides });
        function.apply(Dtype::F32, shape, &mut out, right.as_ref()).unwrap();
        out.chunks(4).map(|value| f32::from_ne_bytes(value.try_into().unwrap())).collect()
    }

    #[test]
    fn operands_may_be_repeated_permuted_and_cut() {
        let six = [1., 2., 3., 4., 5., 6.];
        let (add, shape) = (Arithmetic::Add, [2, 3]);
        assert_eq!(apply(add, &shape, &six, Some((&[10.], &[0, 0]))), [11., 12., 13., 14., 15., 16.]);
        assert_eq!(apply(add, &shape, &six, Some((&[10., 20.], &[1, 0]))), [11., 12., 13., 24., 25., 26.]);
        assert_eq!(apply(add, &shape, &six, Some((&[10., 20., 30.], &[0, 1]))), [11., 22., 33., 14., 25., 36.]);
        assert_eq!(apply(add, &shape, &six, Some((&six, &[1, 2]))), [2., 5., 8., 6., 9., 12.], "transposed");
        assert_eq!(apply(add, &[2, 1], &[1., 2.], Some((&[10., 0., 20.], &[2, 9]))), [11., 22.], "every other one");
    }

    #[test]
    fn functions_of_one_element_and_of_none() {
        assert_eq!(apply(Arithmetic::Sqrt, &[2], &[4., 2.], None), [2., 2_f32.sqrt()]);
        assert!(apply(Arithmetic::Div, &[0, 3], &[], Some((&[1.], &[0, 0]))).is_empty());
        assert_eq!(apply(Arithmetic::Div, &[], &[1.], Some((&[3.], &[]))), [1_f32 / 3.]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let one = Operand { bytes: &[0; 4], strides: &[1] };
        assert!(Arithmetic::Mul.apply(Dtype::F32, &[2], &mut [0; 8], Some(&one)).is_err(), "too short");
        assert!(Arithmetic::Mul.apply(Dtype::F32, &[1], &mut [0; 4], None).is_err(), "too few");
        assert!(Arithmetic::Mul.apply(Dtype::BF16, &[1], &mut [0; 2], Some(&one)).is_err(), "rounds differently");
    }
}
