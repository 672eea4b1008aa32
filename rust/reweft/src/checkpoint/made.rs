//! Storages that are in no file: what they are made of, and how, when they are read.
//!
//! A tensor that is only seen another way (permuted, cut, reshaped) needs none of this: it is a view of its storage.

use super::storages::Storages;
use crate::convert::{self, Arithmetic, Operand, Packing};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::replay::{Elements, Operation};
use crate::source::{slice, to_usize, zeroed};
use crate::tensor::{TensorInfo, contiguous, numel};

/// Elements that are made at a time where that works in pieces.
const PIECE_ELEMENTS: usize = 1 << 16;

/// One operation; the result is in row-major order. Operands are tensors of the same [`Storages`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Making {
    /// The same elements in row-major order.
    Contiguous(TensorInfo),
    /// The elements in another dtype.
    Cast { of: TensorInfo, to: Dtype },
    /// Tensors one behind the other along a dimension; dtypes and all other sizes agree.
    Concat { parts: Vec<TensorInfo>, dim: usize },
    /// Elements that are part of a recipe.
    Literal { dtype: Dtype, bytes: Vec<u8> },
    /// A function of each element of tensors of one shape and dtype, which may be repeated to it.
    Arithmetic { function: Arithmetic, operands: Vec<TensorInfo> },
    /// What torch makes of tensors.
    Torch { operation: Box<Operation>, operands: Vec<TensorInfo> },
    /// A tensor as oneDNN keeps it.
    Pack { of: TensorInfo, packing: Packing },
    /// The elements of bytes of oneDNN's.
    Unpack { of: TensorInfo, dtype: Dtype, packing: Packing },
    /// The values of a lazily conjugated or negated view.
    Signs { of: TensorInfo, signs: Signs },
}

/// What torch's conjugate and negative bits ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Signs {
    pub conjugate: bool,
    pub negate: bool,
}

impl Making {
    pub fn operands(&self) -> &[TensorInfo] {
        match self {
            Self::Contiguous(of)
            | Self::Cast { of, .. }
            | Self::Signs { of, .. }
            | Self::Pack { of, .. }
            | Self::Unpack { of, .. } => std::slice::from_ref(of),
            Self::Concat { parts, .. } => parts,
            Self::Arithmetic { operands, .. } | Self::Torch { operands, .. } => operands,
            Self::Literal { .. } => &[],
        }
    }

    pub fn operands_mut(&mut self) -> &mut [TensorInfo] {
        match self {
            Self::Contiguous(of)
            | Self::Cast { of, .. }
            | Self::Signs { of, .. }
            | Self::Pack { of, .. }
            | Self::Unpack { of, .. } => std::slice::from_mut(of),
            Self::Concat { parts, .. } => parts,
            Self::Arithmetic { operands, .. } | Self::Torch { operands, .. } => operands,
            Self::Literal { .. } => &mut [],
        }
    }

    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Cast { to, .. } => *to,
            Self::Literal { dtype, .. } | Self::Unpack { dtype, .. } => *dtype,
            Self::Torch { operation, .. } => operation.dtype,
            Self::Pack { .. } => Dtype::U8,
            // Operations have operands; without one there would be no element either.
            _ => self.operands().first().map_or(Dtype::U8, |of| of.dtype),
        }
    }

    pub fn nbytes(&self) -> Result<u64> {
        let elements = match self {
            Self::Literal { bytes, .. } => return Ok(bytes.len() as u64),
            Self::Pack { packing, .. } => return Ok(packing.nbytes),
            Self::Torch { operation, .. } => numel(&operation.shape),
            Self::Unpack { packing, .. } => numel(&packing.dims),
            // Its operands have the shape of the result.
            Self::Arithmetic { operands, .. } => operands.first().map_or(Some(0), |of| numel(&of.shape)),
            _ => self.operands().iter().try_fold(0_u64, |sum, of| sum.checked_add(numel(&of.shape)?)),
        };
        let nbytes = elements.and_then(|elements| self.dtype().nbytes(elements));
        nbytes.ok_or_else(|| Error::format("tensor takes 2^64 bytes"))
    }

    /// Whether a range costs no more than its share.
    pub fn works_in_pieces(&self) -> bool {
        match self {
            Self::Cast { of, .. } | Self::Signs { of, .. } => of.is_contiguous(),
            _ => false,
        }
    }

    /// Makes a range of the result. Holds a piece of the operand where [`works_in_pieces`](Self::works_in_pieces),
    /// else up to the whole result and an operand.
    ///
    /// # Errors
    /// Read errors of the operands; [`ErrorKind::Usage`] for a range that begins or ends within an element.
    pub fn read_into(&self, storages: &Storages, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        if self.works_in_pieces() {
            return self.make_pieces(storages, byte_offset, out);
        }
        let nbytes = self.nbytes()?;
        if out.len() as u64 == nbytes {
            return self.make(storages, out);
        }
        let mut whole = zeroed(nbytes)?;
        self.make(storages, &mut whole)?;
        out.copy_from_slice(slice(&whole, byte_offset, out.len() as u64)?);
        Ok(())
    }

    fn make(&self, storages: &Storages, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Contiguous(of) => storages.gather(of, &contiguous(&of.shape), out),
            Self::Concat { parts, dim } => concat(storages, parts, *dim, out),
            Self::Literal { bytes, .. } => {
                out.copy_from_slice(bytes);
                Ok(())
            }
            Self::Arithmetic { function, operands } => arithmetic(storages, *function, operands, out),
            Self::Torch { operation, operands } => carry_out(storages, operation, operands, out),
            Self::Pack { of, packing } => packing.pack(of.dtype, &storages.elements(of)?, out),
            Self::Unpack { of, dtype, packing } => packing.unpack(*dtype, &storages.elements(of)?, out),
            Self::Cast { of, .. } | Self::Signs { of, .. } => {
                let mut elements = zeroed(of.nbytes())?;
                storages.gather(of, &contiguous(&of.shape), &mut elements)?;
                self.make_elements(&mut elements, out)
            }
        }
    }

    fn make_pieces(&self, storages: &Storages, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let ([of], Some(itemsize)) = (self.operands(), self.dtype().itemsize()) else {
            return Err(Error::new(ErrorKind::Usage, "this is not made in pieces"));
        };
        let (itemsize, wide) = (to_usize(itemsize)?, to_usize(of.dtype.itemsize().unwrap_or(1))?);
        let mut first = byte_offset / itemsize as u64;
        if !byte_offset.is_multiple_of(itemsize as u64) || !out.len().is_multiple_of(itemsize) {
            return Err(Error::new(ErrorKind::Usage, "a range begins or ends within an element"));
        }
        let mut elements = Vec::new();
        for piece in out.chunks_mut(PIECE_ELEMENTS * itemsize) {
            let count = piece.len() / itemsize;
            elements.resize(count * wide, 0);
            storages.read_elements(of, first, &mut elements)?;
            self.make_elements(&mut elements, piece)?;
            first += count as u64;
        }
        Ok(())
    }

    /// Element by element, in one order.
    fn make_elements(&self, elements: &mut [u8], out: &mut [u8]) -> Result<()> {
        match self {
            Self::Cast { of, to } => convert::cast_into(elements, of.dtype, *to, out)?,
            Self::Signs { of, signs } => {
                signs.apply(of.dtype, elements)?;
                out.copy_from_slice(elements);
            }
            _ => out.copy_from_slice(elements),
        }
        Ok(())
    }
}

impl Signs {
    /// Refuses a dtype for which a bit means nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Format`]: torch does not write such a tensor.
    pub fn check(self, dtype: Dtype) -> Result<()> {
        let integer = matches!(dtype, Dtype::U8 | Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
        // Of the float8 kinds some have no sign, and some use its bit alone for NaN.
        let float = dtype.is_float() && dtype.bits() > 8;
        let bit = match dtype {
            _ if self.conjugate && !dtype.is_complex() => "conjugate",
            _ if self.negate && !(dtype.is_complex() || float || integer) => "negative",
            _ => return Ok(()),
        };
        Err(Error::format(format!("{bit} view of {dtype}")))
    }

    /// Applies both bits to elements in place. Floats only change their sign bit, as in torch.
    fn apply(self, dtype: Dtype, elements: &mut [u8]) -> Result<()> {
        self.check(dtype)?;
        let (size, complex) = (dtype.swap_unit(), dtype.is_complex());
        let is_sign = complex || dtype.is_float();
        for (number, part) in elements.chunks_exact_mut(size).enumerate() {
            let imaginary = complex && number % 2 == 1;
            if self.negate == (self.conjugate && imaginary) {
                continue;
            }
            if let (true, Some(last)) = (is_sign, part.last_mut()) {
                *last ^= 0x80;
            } else {
                negate_integer(part);
            }
        }
        Ok(())
    }
}

/// Two's complement of a little-endian integer: the bytes up to the lowest one stay, the others are inverted.
fn negate_integer(bytes: &mut [u8]) {
    let mut carry = true;
    for byte in bytes {
        let (sum, overflow) = (!*byte).overflowing_add(u8::from(carry));
        (*byte, carry) = (sum, overflow);
    }
}

/// Applies a function to each element. The first operand is made in the place of the result where it is as long, so that
/// a chain of functions holds one result.
fn arithmetic(storages: &Storages, function: Arithmetic, operands: &[TensorInfo], out: &mut [u8]) -> Result<()> {
    let Some((first, rest)) = operands.split_first() else { return Ok(()) };
    storages.gather(first, &contiguous(&first.shape), out)?;
    let windows = rest.iter().map(|of| storages.window(of)).collect::<Result<Vec<_>>>()?;
    let rest: Vec<_> = rest.iter().zip(&windows).map(|(of, bytes)| Operand { bytes, strides: &of.strides }).collect();
    function.apply(first.dtype, &first.shape, out, rest.first())
}

/// Has torch carry an operation out.
fn carry_out(storages: &Storages, operation: &Operation, operands: &[TensorInfo], out: &mut [u8]) -> Result<()> {
    let Some(replay) = storages.replay() else {
        let what = format!("{} is carried out by torch, which is not here", operation.name());
        return Err(Error::new(ErrorKind::Unsupported, what));
    };
    let bytes = operands.iter().map(|of| storages.elements(of)).collect::<Result<Vec<_>>>()?;
    let given = operands.iter().zip(&bytes).map(|(of, bytes)| Elements { dtype: of.dtype, shape: &of.shape, bytes });
    replay.apply(operation, &given.collect::<Vec<_>>(), out)
}

/// Puts each part at its place along `dim`; one part is in memory at a time beside the result.
fn concat(storages: &Storages, parts: &[TensorInfo], dim: usize, out: &mut [u8]) -> Result<()> {
    let Some(first) = parts.first() else { return Ok(()) };
    let size = |part: &TensorInfo| part.shape.get(dim).copied().unwrap_or(1);
    let mut shape = first.shape.clone();
    if let Some(along) = shape.get_mut(dim) {
        *along = parts.iter().map(size).sum();
    }
    let strides = contiguous(&shape);
    let step = strides.get(dim).copied().unwrap_or(1);
    let itemsize = to_usize(first.dtype.itemsize().unwrap_or(1))?;
    let mut before = 0;
    for part in parts {
        let mut bytes = zeroed(part.nbytes())?;
        let own = contiguous(&part.shape);
        storages.gather(part, &own, &mut bytes)?;
        let start = to_usize(before * step)?.saturating_mul(itemsize);
        let target = out.get_mut(start..).ok_or_else(|| Error::format("parts are larger than the whole"))?;
        convert::relayout(itemsize, &part.shape, &bytes, &own, target, &strides)?;
        before += size(part);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float8_has_no_negative_view() {
        let negative = Signs { conjugate: false, negate: true };
        for dtype in [Dtype::F8E8M0, Dtype::F8E4M3Fnuz, Dtype::F8E5M2Fnuz, Dtype::F8E4M3, Dtype::F8E5M2] {
            let error = negative.check(dtype).unwrap_err();
            assert!(error.to_string().contains(dtype.name()), "{error}");
        }
        for dtype in [Dtype::BF16, Dtype::F64, Dtype::C64, Dtype::I8] {
            negative.check(dtype).unwrap();
        }
    }
}
