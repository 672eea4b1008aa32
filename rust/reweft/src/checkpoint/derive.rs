//! Carrying out a recipe on metadata: views where the elements can stay where they are, made storages elsewhere.

use std::collections::HashMap;

use super::made::Making;
use super::storages::Storages;
use crate::convert::can_cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::recipe::{Recipe, Step};
use crate::tensor::{TensorInfo, contiguous, describe, numel};

/// A tensor, and the strides that its bytes are wanted in if a recipe names them.
pub(super) struct Derived {
    pub info: TensorInfo,
    pub strides: Option<Vec<u64>>,
}

/// Adds made storages to those of a checkpoint; what is made twice in the same way is one storage, so that ties stay.
pub(super) struct Derive {
    pub storages: Storages,
    made: HashMap<Making, usize>,
}

impl Derive {
    pub fn new(storages: Storages) -> Self {
        Self { storages, made: HashMap::new() }
    }

    /// Follows the steps of a recipe; `leaf` looks keys up. Reads no bytes.
    ///
    /// # Errors
    /// What `leaf` gives; [`ErrorKind::Usage`] for a step that does not fit its tensor.
    pub fn follow<'k>(&mut self, recipe: &'k Recipe, leaf: impl Fn(&'k str) -> Result<TensorInfo>) -> Result<Derived> {
        let mut stack: Vec<TensorInfo> = Vec::new();
        let mut strides = None;
        for step in &recipe.0 {
            if strides.is_some() && !matches!(step, Step::Cast { .. }) {
                return Err(misfit(step, "strides are given, so only a cast may follow"));
            }
            let made = match step {
                Step::Leaf { key } => leaf(key)?,
                Step::Concat { dim, count } => {
                    let start = stack.len().checked_sub(*count).filter(|_| *count > 0);
                    let start = start.ok_or_else(|| misfit(step, "there are not that many tensors"))?;
                    let parts = stack.split_off(start);
                    self.concat(step, parts, *dim)?
                }
                _ => {
                    let top = stack.pop().ok_or_else(|| misfit(step, "there is no tensor before it"))?;
                    if let Step::Restride { strides: wanted } = step {
                        strides = Some(wanted.clone());
                        top
                    } else {
                        self.change(step, top)?
                    }
                }
            };
            stack.push(made);
        }
        match <[TensorInfo; 1]>::try_from(stack) {
            Ok([info]) => Ok(Derived { info, strides }),
            Err(left) => Err(Error::new(ErrorKind::Usage, format!("recipe leaves {} tensors, wanted one", left.len()))),
        }
    }

    /// A step that takes one tensor.
    pub fn change(&mut self, step: &Step, mut of: TensorInfo) -> Result<TensorInfo> {
        match step {
            Step::Cast { to, .. } => {
                let to = Dtype::from_name(to).ok_or_else(|| misfit(step, "no such dtype"))?;
                if to == of.dtype {
                    return Ok(of);
                }
                if !can_cast(of.dtype, to) {
                    return Err(misfit(step, &format!("there is no cast from {} to {to}", of.dtype)));
                }
                self.make(of.shape.clone(), Making::Cast { of, to })
            }
            Step::Transpose { dims: [first, second] } => {
                let (first, second) = (dim_of(step, *first, &of)?, dim_of(step, *second, &of)?);
                of.shape.swap(first, second);
                of.strides.swap(first, second);
                Ok(of)
            }
            Step::Permute { dims } => permute(step, dims, &of),
            Step::Reshape { shape } => {
                let shape = resolve(step, shape, &of)?;
                if !of.is_contiguous() {
                    of = self.make(of.shape.clone(), Making::Contiguous(of))?;
                }
                Ok(TensorInfo { strides: contiguous(&shape), shape, ..of })
            }
            Step::Slice { dim, start, length } => narrow(step, of, *dim, *start, *length),
            Step::Chunk { dim, index, of: count } => {
                let size = of.shape[dim_of(step, *dim, &of)?];
                if *count == 0 || !size.is_multiple_of(*count) || index >= count {
                    return Err(misfit(step, &format!("{} does not split so", describe(of.dtype, &of.shape))));
                }
                narrow(step, of, *dim, index * (size / count), size / count)
            }
            Step::Leaf { .. } | Step::Restride { .. } | Step::Concat { .. } => Err(misfit(step, "takes no tensor")),
        }
    }

    fn concat(&mut self, step: &Step, parts: Vec<TensorInfo>, dim: i64) -> Result<TensorInfo> {
        let [first, rest @ ..] = parts.as_slice() else { return Err(misfit(step, "there is no tensor before it")) };
        let dim = dim_of(step, dim, first)?;
        let mut shape = first.shape.clone();
        for part in rest {
            let same = part.dtype == first.dtype
                && part.shape.len() == shape.len()
                && part.shape.iter().zip(&shape).enumerate().all(|(at, (left, right))| at == dim || left == right);
            if !same {
                let (left, right) = (describe(first.dtype, &first.shape), describe(part.dtype, &part.shape));
                return Err(misfit(step, &format!("{left} and {right} do not fit each other")));
            }
            shape[dim] = shape[dim].checked_add(part.shape[dim]).ok_or_else(|| misfit(step, "sizes overflow"))?;
        }
        if first.dtype.itemsize().is_none() {
            return Err(misfit(step, &format!("elements of {} are no whole bytes", first.dtype)));
        }
        self.make(shape, Making::Concat { parts, dim })
    }

    /// A row-major tensor over a made storage.
    fn make(&mut self, shape: Vec<u64>, making: Making) -> Result<TensorInfo> {
        let dtype = making.dtype();
        let storage = if let Some(number) = self.made.get(&making) {
            *number
        } else {
            let number = self.storages.push(making.clone())?;
            self.made.insert(making, number);
            number
        };
        Ok(TensorInfo { dtype, strides: contiguous(&shape), shape, storage, storage_offset: 0 })
    }
}

fn misfit(step: &Step, why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("{step}: {why}"))
}

/// The dimension that a number from the front or from the back means.
fn dim_of(step: &Step, dim: i64, of: &TensorInfo) -> Result<usize> {
    let rank = of.shape.len();
    let index = if dim < 0 { i64::try_from(rank).ok().and_then(|rank| rank.checked_add(dim)) } else { Some(dim) };
    let index = index.and_then(|index| usize::try_from(index).ok()).filter(|index| *index < rank);
    index.ok_or_else(|| misfit(step, &format!("{} has no dimension {dim}", describe(of.dtype, &of.shape))))
}

fn permute(step: &Step, dims: &[i64], of: &TensorInfo) -> Result<TensorInfo> {
    let order: Vec<usize> = dims.iter().map(|dim| dim_of(step, *dim, of)).collect::<Result<_>>()?;
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..of.shape.len()) {
        return Err(misfit(step, &format!("{} has each dimension once", describe(of.dtype, &of.shape))));
    }
    let pick = |values: &[u64]| order.iter().map(|dim| values[*dim]).collect();
    Ok(TensorInfo { shape: pick(&of.shape), strides: pick(&of.strides), ..of.clone() })
}

/// The sizes of a reshape, with -1 replaced by what is left.
fn resolve(step: &Step, wanted: &[i64], of: &TensorInfo) -> Result<Vec<u64>> {
    let fail = || misfit(step, &format!("{} has other elements", describe(of.dtype, &of.shape)));
    let known: Vec<u64> = wanted
        .iter()
        .filter(|size| **size != -1)
        .map(|size| u64::try_from(*size))
        .collect::<Result<_, _>>()
        .map_err(|_| misfit(step, "a size is negative"))?;
    let product = numel(&known).ok_or_else(fail)?;
    let left = match wanted.len() - known.len() {
        0 => (product == of.numel()).then_some(1),
        1 if product > 0 && of.numel().is_multiple_of(product) => Some(of.numel() / product),
        _ => None,
    };
    let left = left.ok_or_else(fail)?;
    Ok(wanted.iter().map(|size| u64::try_from(*size).unwrap_or(left)).collect())
}

fn narrow(step: &Step, mut of: TensorInfo, dim: i64, start: u64, length: u64) -> Result<TensorInfo> {
    let dim = dim_of(step, dim, &of)?;
    if start.checked_add(length).is_none_or(|end| end > of.shape[dim]) {
        return Err(misfit(step, &format!("{} is smaller", describe(of.dtype, &of.shape))));
    }
    let skipped = start.checked_mul(of.strides[dim]).and_then(|skipped| of.storage_offset.checked_add(skipped));
    of.storage_offset = skipped.ok_or_else(|| misfit(step, "offset overflows"))?;
    of.shape[dim] = length;
    Ok(of)
}
