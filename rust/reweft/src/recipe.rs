//! Recipes: how a tensor's bytes come from the keys of a checkpoint, as a flat list of steps.
//!
//! One vocabulary for what a key map asks for, for what a slot needs and for what a compiler folded. A recipe is data: it
//! prints, compares and serialises. Steps work on a stack: a leaf puts a tensor on it, an operation replaces what it takes
//! from the top.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::artifact::Slot;
use crate::checkpoint::Checkpoint;
use crate::convert::{Arithmetic, Packing};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::replay::Operation;
use crate::source::zeroed;
use crate::tensor::{TensorInfo, contiguous, describe, numel, same_layout};

/// One step. Dimensions may be negative: they count from the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
#[non_exhaustive]
pub enum Step {
    /// The tensor of a key.
    Leaf {
        /// The key.
        key: String,
    },
    /// Elements that are part of the recipe, in row-major order.
    Literal {
        /// Their dtype.
        dtype: Dtype,
        /// Elements along each dimension.
        shape: Vec<u64>,
        /// The bytes, in hexadecimal where it is stored.
        #[serde(with = "hex")]
        bytes: Vec<u8>,
    },
    /// The same elements with other strides; only a last cast may follow.
    Restride {
        /// Elements between neighbours along each dimension.
        strides: Vec<u64>,
    },
    /// Elements converted to another dtype.
    Cast {
        /// The dtype before, where it is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Dtype>,
        /// The dtype after.
        to: Dtype,
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
    /// Elements repeated along dimensions that have one, and along new ones in front.
    Expand {
        /// The sizes.
        shape: Vec<u64>,
    },
    /// A function of each element of the topmost tensors, which are broadcast against each other.
    Arithmetic {
        /// Which; the topmost tensor is its last argument.
        function: Arithmetic,
    },
    /// An operation that torch carries out, since the engine would give other bits.
    Torch(Operation),
    /// The bytes as oneDNN keeps a tensor, padding included. The last step of a recipe.
    Pack(Packing),
    /// The elements of such bytes, in row-major order.
    Unpack {
        /// Their dtype.
        dtype: Dtype,
        /// Where they stand.
        packing: Packing,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf { key } => f.write_str(key),
            Self::Literal { dtype, shape, bytes } => match number(*dtype, bytes).filter(|_| shape.is_empty()) {
                Some(number) => f.write_str(&number),
                None => write!(f, "literal {}", describe(*dtype, shape)),
            },
            Self::Restride { strides } => write!(f, "strides {strides:?}"),
            Self::Cast { from: Some(from), to } => write!(f, "cast {from} to {to}"),
            Self::Cast { from: None, to } => write!(f, "cast to {to}"),
            Self::Permute { dims } => write!(f, "permute {dims:?}"),
            Self::Transpose { dims: [first, second] } => write!(f, "transpose {first} and {second}"),
            Self::Reshape { shape } => write!(f, "reshape to {shape:?}"),
            Self::Slice { dim, start, length } => write!(f, "{length} from {start} along {dim}"),
            Self::Chunk { dim, index, of } => write!(f, "part {index} of {of} along {dim}"),
            Self::Concat { dim, count } => write!(f, "concat {count} along {dim}"),
            Self::Expand { shape } => write!(f, "expand to {shape:?}"),
            Self::Arithmetic { function } => f.write_str(function.name()),
            Self::Torch(operation) => write!(f, "{}{}", operation.name(), operation.arguments),
            Self::Pack(packing) => write!(f, "pack as {packing}"),
            Self::Unpack { packing, .. } => write!(f, "unpack from {packing}"),
        }
    }
}

/// The steps from keys to one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
            recipe.0.push(Step::Cast { from: Some(info.dtype), to: dtype });
        }
        recipe
    }

    /// The recipe that takes one key in a dtype, in whatever layout that comes.
    pub(crate) fn cast_of(key: &str, info: &TensorInfo, dtype: Dtype) -> Self {
        let mut recipe = Self::leaf(key);
        if info.dtype != dtype {
            recipe.0.push(Step::Cast { from: Some(info.dtype), to: dtype });
        }
        recipe
    }

    /// The recipe over other keys: each leaf replaced by the steps that `leaf` gives for it, and the result brought into the
    /// layout of a slot.
    pub(crate) fn over<'a>(&self, leaf: impl Fn(&str) -> Option<&'a Self>, slot: &Slot) -> Self {
        let mut steps = Vec::with_capacity(self.0.len() + 1);
        for step in &self.0 {
            match step {
                Step::Leaf { key } => steps.extend(leaf(key).into_iter().flat_map(|recipe| recipe.0.iter().cloned())),
                other => steps.push(other.clone()),
            }
        }
        if slot.packed.is_none() {
            steps.push(Step::Restride { strides: slot.strides.clone() });
        }
        Self(steps)
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

    /// The recipe that makes its one tensor of what it makes, if it only moves elements and leaves none out: over a key, for
    /// a tensor of that dtype and shape.
    pub(crate) fn inverse(&self, key: &str, dtype: Dtype, shape: &[u64]) -> Option<Self> {
        let [Step::Leaf { .. }, moves @ ..] = self.0.as_slice() else { return None };
        let (mut steps, mut shape) = (Vec::new(), shape.to_vec());
        for step in moves {
            let signed = || shape.iter().map(|size| i64::try_from(*size).ok()).collect::<Option<Vec<_>>>();
            let rank = i64::try_from(shape.len()).ok()?;
            let place = |dim: i64| usize::try_from(if dim < 0 { dim + rank } else { dim }).ok();
            match step {
                Step::Reshape { shape: after } => {
                    steps.push(Step::Reshape { shape: signed()? });
                    let stated: u64 = after.iter().filter_map(|size| u64::try_from(*size).ok()).product();
                    // A size of -1 is what is left.
                    let left = numel(&shape)?.checked_div(stated).unwrap_or(0);
                    shape = after.iter().map(|size| u64::try_from(*size).unwrap_or(left)).collect();
                }
                Step::Transpose { dims: [first, second] } => {
                    steps.push(step.clone());
                    let (first, second) = (place(*first)?, place(*second)?);
                    if first.max(second) >= shape.len() {
                        return None;
                    }
                    shape.swap(first, second);
                }
                Step::Permute { dims } => {
                    let order = dims.iter().map(|dim| place(*dim)).collect::<Option<Vec<_>>>()?;
                    let mut back = vec![0; order.len()];
                    for (after, before) in order.iter().enumerate() {
                        *back.get_mut(*before)? = i64::try_from(after).ok()?;
                    }
                    steps.push(Step::Permute { dims: back });
                    shape = order.iter().map(|dim| shape.get(*dim).copied()).collect::<Option<_>>()?;
                }
                Step::Pack(packing) => {
                    steps.push(Step::Reshape { shape: signed()? });
                    steps.push(Step::Unpack { dtype, packing: packing.clone() });
                }
                _ => return None,
            }
        }
        steps.push(Step::Leaf { key: key.to_owned() });
        steps.reverse();
        Some(Self(steps))
    }

    /// The operations that torch has to carry out.
    pub fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.0.iter().filter_map(|step| match step {
            Step::Torch(operation) => Some(operation),
            _ => None,
        })
    }

    /// What it computes as one formula over keys, for people. Of a recipe that does not fit together, the steps.
    pub fn formula(&self) -> String {
        let mut stack: Vec<Term> = Vec::new();
        for step in &self.0 {
            let Some(term) = Term::of(step, &mut stack) else { return self.to_string() };
            stack.push(term);
        }
        match <[Term; 1]>::try_from(stack) {
            Ok([term]) => term.text,
            Err(_) => self.to_string(),
        }
    }

    /// Whether it computes, or only moves elements; in a word, for people.
    pub fn kind(&self) -> &'static str {
        if self.operations().next().is_some() {
            return "folded by torch";
        }
        let computes = self.0.iter().any(|step| matches!(step, Step::Arithmetic { .. } | Step::Cast { .. }));
        let packs = matches!(self.0.last(), Some(Step::Pack(_)));
        match (computes, packs, self.0.len()) {
            (true, true, _) => "folded and packed",
            (true, false, _) => "folded",
            (false, true, _) => "packed",
            (false, false, 0..=1) => "as it is",
            (false, false, _) => "rearranged",
        }
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

/// A part of a formula.
struct Term {
    text: String,
    /// How tightly it holds together: 0 for a sum, 1 for a product, 2 for what needs no brackets.
    tightness: u8,
}

impl Term {
    /// What a step makes of the terms before it, which it takes; `None` if there are too few.
    fn of(step: &Step, stack: &mut Vec<Self>) -> Option<Self> {
        let whole = |text: String| Some(Self { text, tightness: 2 });
        let mut take = |count: usize| {
            let start = stack.len().checked_sub(count)?;
            Some(stack.split_off(start))
        };
        match step {
            Step::Leaf { .. } | Step::Literal { .. } => whole(step.to_string()),
            Step::Arithmetic { function } if function.arity() == 2 => {
                let (sign, tightness) = match function {
                    Arithmetic::Add => ("+", 0),
                    Arithmetic::Sub => ("-", 0),
                    Arithmetic::Mul => ("*", 1),
                    _ => ("/", 1),
                };
                let [left, right] = <[Self; 2]>::try_from(take(2)?).ok()?;
                let text = format!("{} {sign} {}", left.within(tightness), right.within(tightness + 1));
                Some(Self { text, tightness })
            }
            Step::Arithmetic { function } => whole(format!("{}({})", function.name(), take(1)?.pop()?.text)),
            Step::Concat { dim, count } => {
                let parts: Vec<String> = take(*count)?.into_iter().map(|part| part.text).collect();
                whole(format!("concat({}; along {dim})", parts.join(", ")))
            }
            Step::Torch(operation) => {
                let operands: Vec<String> = take(operation.count)?.into_iter().map(|of| of.text).collect();
                whole(operation.formula(&operands))
            }
            Step::Cast { to, .. } => whole(format!("{to}({})", take(1)?.pop()?.text)),
            _ => whole(format!("{{{} | {step}}}", take(1)?.pop()?.text)),
        }
    }

    /// In brackets, if what is around it holds tighter.
    fn within(self, tightness: u8) -> String {
        if self.tightness < tightness { format!("({})", self.text) } else { self.text }
    }
}

/// The value of one float, for people: as few digits as tell it from others of its dtype.
fn number(dtype: Dtype, bytes: &[u8]) -> Option<String> {
    if dtype == Dtype::F32 {
        return Some(f32::from_ne_bytes(bytes.try_into().ok()?).to_string());
    }
    let wide = crate::convert::cast(bytes, dtype, Dtype::F64).ok()?;
    Some(f64::from_ne_bytes(wide.try_into().ok()?).to_string())
}

/// Bytes as text.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let text: String = digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect();
        to.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |of: u8| char::from(of).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.ok_or_else(|| D::Error::custom("bytes are no pairs of hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::replay::{Build, Elements, Replay};

    #[test]
    fn formulas_have_brackets_where_they_need_them() {
        let leaf = |key: &str| Step::Leaf { key: key.to_owned() };
        let one = Step::Literal { dtype: Dtype::F32, shape: vec![], bytes: 1_f32.to_ne_bytes().into() };
        let apply = |function| Step::Arithmetic { function };
        let mut steps = vec![leaf("b"), leaf("m"), apply(Arithmetic::Sub), one, leaf("v"), apply(Arithmetic::Sqrt)];
        steps.extend([apply(Arithmetic::Div), apply(Arithmetic::Mul)]);
        let recipe = Recipe(steps);
        assert_eq!(recipe.formula(), "(b - m) * (1 / sqrt(v))");
        assert_eq!(recipe.kind(), "folded");
        let torn = Recipe(vec![leaf("b"), apply(Arithmetic::Mul)]);
        assert_eq!(torn.formula(), "b | mul");
    }

    /// A checkpoint of one tensor of bytes.
    fn holding(key: &str, dtype: Dtype, shape: &[u64], bytes: Vec<u8>) -> Checkpoint {
        let strides = contiguous(shape);
        let info = TensorInfo { dtype, shape: shape.to_vec(), strides, storage: 0, storage_offset: 0 };
        Checkpoint::from_memory("test".as_ref(), vec![Arc::new(bytes)], [(key.to_owned(), info)]).unwrap()
    }

    fn parse(steps: &str) -> Recipe {
        serde_json::from_str(steps).unwrap()
    }

    #[test]
    fn moves_are_turned_round() {
        let moved = parse(
            r#"[{"op":"leaf","key":"w"},{"op":"permute","dims":[2,0,-2]},{"op":"reshape","shape":[12,2]},
                {"op":"permute","dims":[1,0]},{"op":"reshape","shape":[3,8]},
                {"op":"pack","dims":[3,8],"padded":[4,8],"strides":[32,8],"blocks":[[0,4],[1,2]],"nbytes":64}]"#,
        );
        let (shape, bytes) = ([2, 3, 4], (0..48).collect::<Vec<u8>>());
        let row = moved.evaluate(&holding("w", Dtype::BF16, &shape, bytes.clone()), 64).unwrap();
        let mut back = moved.inverse("row", Dtype::BF16, &shape).unwrap();
        back.0.push(Step::Restride { strides: contiguous(&shape) });
        assert_eq!(back.evaluate(&holding("row", Dtype::U8, &[64], row), 48).unwrap(), bytes);
        for computed in [
            r#"[{"op":"leaf","key":"w"},{"op":"cast","to":"float32"}]"#,
            r#"[{"op":"leaf","key":"w"},{"op":"slice","dim":0,"start":0,"length":1}]"#,
            r#"[{"op":"leaf","key":"w"},{"op":"leaf","key":"v"},{"op":"arithmetic","function":"add"}]"#,
        ] {
            assert_eq!(parse(computed).inverse("row", Dtype::BF16, &shape), None);
        }
    }

    /// Adds one to every byte, and says what it was asked for.
    #[derive(Debug)]
    struct AddsOne;

    impl Replay for AddsOne {
        fn build(&self) -> Option<Build> {
            None
        }

        fn apply(&self, operation: &Operation, operands: &[Elements<'_>], out: &mut [u8]) -> Result<()> {
            assert_eq!((operation.name(), operands.len(), operands[0].shape), ("aten::cos", 1, [2_u64, 2].as_slice()));
            out.iter_mut().zip(operands[0].bytes).for_each(|(out, byte)| *out = byte + 1);
            Ok(())
        }
    }

    #[test]
    fn what_torch_carries_out_needs_whoever_has_it() {
        let recipe = parse(
            r#"[{"op":"leaf","key":"w"},{"op":"permute","dims":[1,0]},
                {"op":"torch","operator":"aten::cos.default","arguments":"[[{\"tensor\":0}]]","count":1,"result":0,
                 "dtype":"uint8","shape":[2,2]}]"#,
        );
        assert_eq!(recipe.formula(), "aten::cos[[{w | permute [1, 0]}]]");
        let weights = holding("w", Dtype::U8, &[2, 2], vec![1, 2, 3, 4]);
        let error = recipe.evaluate(&weights, 4).unwrap_err();
        assert!(error.to_string().contains("aten::cos"), "{error}");
        assert_eq!(recipe.evaluate(&weights.with_replay(Arc::new(AddsOne)), 4).unwrap(), [2, 4, 3, 5]);
    }
}
