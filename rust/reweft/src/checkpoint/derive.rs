//! Carrying out a recipe on metadata: views where the elements can stay where they are, made storages elsewhere.

use std::collections::HashMap;

use super::Storage;
use super::made::Making;
use super::storages::Storages;
use crate::convert::{Arithmetic, can_cast};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::recipe::{Recipe, Step};
use crate::replay::Operation;
use crate::tensor::{MAX_DIMS, TensorInfo, contiguous, describe, numel};

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
                Step::Literal { dtype, shape, bytes } => self.literal(step, *dtype, shape, bytes)?,
                Step::Arithmetic { function } => {
                    let operands = take(step, &mut stack, function.arity())?;
                    self.arithmetic(step, *function, operands)?
                }
                Step::Torch(operation) => {
                    let operands = take(step, &mut stack, operation.count)?;
                    self.operation(step, operation, operands)?
                }
                Step::Concat { dim, count } => {
                    let parts = take(step, &mut stack, *count)?;
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
                let to = *to;
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
            Step::Expand { shape } => expand(step, &of, shape),
            Step::Pack(packing) => {
                packing.check(of.dtype, of.numel()).map_err(|error| misfit(step, &error.message()))?;
                self.make(vec![packing.nbytes], Making::Pack { of, packing: packing.clone() })
            }
            Step::Unpack { dtype, packing } => {
                let elements = numel(&packing.dims).unwrap_or(u64::MAX);
                packing.check(*dtype, elements).map_err(|error| misfit(step, &error.message()))?;
                if (of.dtype, of.numel()) != (Dtype::U8, packing.nbytes) {
                    return Err(misfit(step, &format!("{} has other bytes", describe(of.dtype, &of.shape))));
                }
                self.make(packing.dims.clone(), Making::Unpack { of, dtype: *dtype, packing: packing.clone() })
            }
            Step::Leaf { .. }
            | Step::Literal { .. }
            | Step::Restride { .. }
            | Step::Concat { .. }
            | Step::Torch(_)
            | Step::Arithmetic { .. } => Err(misfit(step, "is no change of one tensor")),
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

    fn literal(&mut self, step: &Step, dtype: Dtype, shape: &[u64], bytes: &[u8]) -> Result<TensorInfo> {
        if numel(shape).and_then(|numel| dtype.nbytes(numel)) != Some(bytes.len() as u64) {
            return Err(misfit(step, &format!("it has {} bytes", bytes.len())));
        }
        self.make(shape.to_vec(), Making::Literal { dtype, bytes: bytes.to_vec() })
    }

    /// Applies a function to tensors that are seen under one shape, which they are repeated to.
    fn arithmetic(&mut self, step: &Step, function: Arithmetic, mut operands: Vec<TensorInfo>) -> Result<TensorInfo> {
        let dtype = operands.first().map_or(Dtype::U8, |of| of.dtype);
        if let Some(of) = operands.iter().find(|of| of.dtype != dtype || !Arithmetic::takes(of.dtype)) {
            return Err(misfit(step, &format!("it takes float32 or float64 alone, not {dtype} and {}", of.dtype)));
        }
        let mut shape: Vec<u64> = Vec::new();
        for of in &operands {
            shape = broadcast(step, &shape, &of.shape)?;
        }
        for of in &mut operands {
            *of = expand(step, of, &shape)?;
        }
        self.make(shape, Making::Arithmetic { function, operands })
    }

    fn operation(&mut self, step: &Step, operation: &Operation, operands: Vec<TensorInfo>) -> Result<TensorInfo> {
        if numel(&operation.shape).and_then(|numel| operation.dtype.nbytes(numel)).is_none() {
            return Err(misfit(step, "its result takes 2^64 bytes"));
        }
        self.make(operation.shape.clone(), Making::Torch { operation: Box::new(operation.clone()), operands })
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

/// What a recipe makes, without a checkpoint.
pub(crate) struct Inferred {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// Bytes that are made on the way, the result included.
    pub nbytes: u64,
}

/// Follows a recipe over tensors of which only dtype and shape are known.
///
/// # Errors
/// What `leaf` gives; [`ErrorKind::Usage`] for a step that does not fit its tensor; [`ErrorKind::Limit`] for layers upon
/// layers.
pub(crate) fn infer(recipe: &Recipe, leaf: impl Fn(&str) -> Result<(Dtype, Vec<u64>)>) -> Result<Inferred> {
    let keys: Vec<&str> = recipe.keys().collect();
    let mut known = HashMap::new();
    let mut storages = Vec::with_capacity(keys.len());
    for key in keys {
        let (dtype, shape) = leaf(key)?;
        let info = TensorInfo { dtype, strides: contiguous(&shape), shape, storage: storages.len(), storage_offset: 0 };
        storages.push(Storage::unread(info.nbytes()));
        known.insert(key, info);
    }
    let mut derive = Derive::new(Storages::new(storages, Limits::default().max_repeated_nbytes));
    let find = |key: &str| known.get(key).cloned().ok_or_else(|| Error::format("no such tensor").of_key(key));
    let Derived { info, .. } = derive.follow(recipe, find)?;
    let made = derive.storages.iter().filter(|storage| storage.making().is_some()).map(|storage| storage.nbytes);
    Ok(Inferred { dtype: info.dtype, shape: info.shape, nbytes: made.fold(0, u64::saturating_add) })
}

/// The topmost tensors, the topmost last.
fn take(step: &Step, stack: &mut Vec<TensorInfo>, count: usize) -> Result<Vec<TensorInfo>> {
    let start = stack.len().checked_sub(count).filter(|_| count > 0);
    let start = start.ok_or_else(|| misfit(step, "there are not that many tensors"))?;
    Ok(stack.split_off(start))
}

/// The shape that two tensors are both repeated to, as numpy does it.
fn broadcast(step: &Step, left: &[u64], right: &[u64]) -> Result<Vec<u64>> {
    let rank = left.len().max(right.len());
    let size = |shape: &[u64], dim: usize| (dim + shape.len()).checked_sub(rank).map_or(1, |dim| shape[dim]);
    let pair = |dim: usize| match (size(left, dim), size(right, dim)) {
        (1, other) | (other, 1) => Ok(other),
        (one, other) if one == other => Ok(one),
        _ => Err(misfit(step, &format!("{left:?} and {right:?} do not fit each other"))),
    };
    (0..rank).map(pair).collect()
}

/// The tensor seen under a shape that it is repeated to.
fn expand(step: &Step, of: &TensorInfo, shape: &[u64]) -> Result<TensorInfo> {
    let fits = of.shape.len() <= shape.len() && shape.len() <= MAX_DIMS && broadcast(step, &of.shape, shape)? == shape;
    if !fits || numel(shape).and_then(|numel| of.dtype.nbytes(numel)).is_none() {
        return Err(misfit(step, &format!("{} cannot be repeated to {shape:?}", describe(of.dtype, &of.shape))));
    }
    let mut strides = vec![0; shape.len() - of.shape.len()];
    let kept = of.shape.iter().zip(&of.strides).zip(&shape[strides.len()..]);
    let kept: Vec<u64> = kept.map(|((size, stride), wanted)| if size == wanted { *stride } else { 0 }).collect();
    strides.extend(kept);
    Ok(TensorInfo { shape: shape.to_vec(), strides, ..of.clone() })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(key: &str) -> Result<(Dtype, Vec<u64>)> {
        match key {
            "weight" => Ok((Dtype::F32, vec![4, 3, 2, 2])),
            "scale" => Ok((Dtype::F32, vec![4])),
            "half" => Ok((Dtype::BF16, vec![4])),
            _ => Err(Error::format("no such tensor")),
        }
    }

    fn follow(steps: &str) -> Result<Inferred> {
        infer(&serde_json::from_str(steps).map_err(|error| Error::format(error.to_string()))?, shapes)
    }

    #[test]
    fn recipes_of_folded_weights_are_followed_on_metadata() {
        let made = follow(
            r#"[{"op":"leaf","key":"weight"},{"op":"leaf","key":"scale"},{"op":"reshape","shape":[4,1,1,1]},
                {"op":"literal","dtype":"float32","shape":[],"bytes":"0000803f"},{"op":"arithmetic","function":"div"},
                {"op":"arithmetic","function":"mul"}]"#,
        );
        let made = made.unwrap();
        // The literal, the quotient and the product.
        assert_eq!((made.dtype, made.shape, made.nbytes), (Dtype::F32, vec![4, 3, 2, 2], 4 + 16 + 192));
    }

    #[test]
    fn recipes_that_do_not_fit_are_errors() {
        let leaf = |key: &str| format!(r#"{{"op":"leaf","key":"{key}"}}"#);
        for (steps, why) in [
            (String::new(), "leaves 0 tensors"),
            (format!("{},{}", leaf("scale"), leaf("scale")), "leaves 2 tensors"),
            (leaf("other"), "no such tensor"),
            (format!(r#"{},{{"op":"arithmetic","function":"mul"}}"#, leaf("scale")), "not that many"),
            (format!(r#"{},{},{{"op":"arithmetic","function":"mul"}}"#, leaf("weight"), leaf("scale")), "do not fit"),
            (format!(r#"{},{},{{"op":"arithmetic","function":"mul"}}"#, leaf("half"), leaf("scale")), "alone"),
            (format!(r#"{},{{"op":"expand","shape":[4,3]}}"#, leaf("scale")), "do not fit"),
            (format!(r#"{},{{"op":"expand","shape":[18446744073709551615,4]}}"#, leaf("scale")), "cannot be repeated"),
            (r#"{"op":"literal","dtype":"float32","shape":[2],"bytes":"00"}"#.to_owned(), "1 bytes"),
            (r#"{"op":"literal","dtype":"float32","shape":[],"bytes":"0g"}"#.to_owned(), "hexadecimal"),
            (
                format!(
                    r#"{},{{"op":"pack","dims":[4],"padded":[4],"strides":[1],"blocks":[],"nbytes":8}}"#,
                    leaf("scale")
                ),
                "no layout",
            ),
            (format!(r#"{},{{"op":"explode"}}"#, leaf("scale")), "unknown variant"),
            (leaf("scale") + &r#",{"op":"arithmetic","function":"sqrt"}"#.repeat(70), "deep"),
        ] {
            let error = follow(&format!("[{steps}]")).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(why), "{steps}: {error}");
        }
    }
}
