//! How a compiled program is called: what `trace` saw of its arguments and results, and which sizes may vary.
//!
//! The program checks nothing itself: it computes something for a batch of 600 where it was compiled for 2 to 512, and
//! has no input for an argument that is no tensor. So the manifest states all of it, and every call is held against it.

use std::collections::HashMap;
use std::fmt;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// One input tensor as it was when the package was compiled; the program takes no other shape, dtype or layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Name of the argument.
    pub name: String,
    /// Name of the dtype.
    pub dtype: String,
    /// Elements along each dimension.
    pub shape: Vec<Size>,
    /// Elements between neighbours along each dimension.
    pub strides: Vec<Size>,
    /// Where the tensor must be: `cpu`.
    pub device: String,
    /// Whether the program writes to it.
    pub mutated: bool,
}

/// A value that an argument had, or a result has, that is no tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constant {
    /// Name of the Python type: `bool`, `int`, `float`, `str`, `NoneType`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The value as text; floats in hexadecimal, so that it is exact.
    pub value: String,
}

/// One leaf of the arguments, in the order of the call specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Leaf {
    /// The next input of the program.
    Input,
    /// An argument that was compiled in; the program has no input for it.
    Constant(Constant),
}

/// One leaf of the results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// A tensor.
    Tensor,
    /// A Python number that the program hands out as a tensor without dimensions.
    Number,
    /// A value that does not depend on the inputs.
    Constant(Constant),
}

/// A size that may vary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// The least value that the program was compiled for.
    pub min: i64,
    /// The largest; `None` if there is none.
    pub max: Option<i64>,
}

/// A number of elements, or how it follows from sizes that vary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// A fixed number.
    Number(i64),
    /// A size that varies.
    Symbol(String),
    /// An operation on others.
    Apply {
        /// Which one.
        op: Operation,
        /// What it is applied to.
        of: Vec<Size>,
    },
}

/// What can be done with sizes; comparisons give 0 or 1. Division rounds down, as in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Operation {
    Add,
    Mul,
    Pow,
    FloorDiv,
    Mod,
    Min,
    Max,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    And,
    Or,
    Not,
}

/// How a program is called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// The program's inputs in call order.
    pub inputs: Vec<Input>,
    /// The arguments' leaves; as many of them are inputs as the program has.
    pub leaves: Vec<Leaf>,
    /// The results' leaves.
    pub outputs: Vec<Output>,
    /// Sizes that may vary.
    pub symbols: IndexMap<String, Symbol>,
    /// What must be true of them beside their ranges.
    pub guards: Vec<Size>,
}

/// Shape and strides that an input must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Elements along each dimension.
    pub shape: Vec<i64>,
    /// Elements between neighbours along each dimension.
    pub strides: Vec<i64>,
}

impl Signature {
    /// Whether any size may vary.
    pub fn is_dynamic(&self) -> bool {
        !self.symbols.is_empty()
    }

    /// Refuses a signature that no call could be held against.
    ///
    /// # Errors
    /// [`ErrorKind::Format`].
    pub fn check(&self) -> Result<()> {
        let inputs = self.leaves.iter().filter(|leaf| **leaf == Leaf::Input).count();
        if inputs != self.inputs.len() {
            let what = format!("{inputs} arguments are tensors, the program has {} inputs", self.inputs.len());
            return Err(Error::format(what));
        }
        let is_size = |name: &String| {
            self.inputs
                .iter()
                .flat_map(|input| &input.shape)
                .any(|size| matches!(size, Size::Symbol(other) if other == name))
        };
        if let Some(name) = self.symbols.keys().find(|name| !is_size(name)) {
            return Err(Error::format(format!("no input has the size {name}")));
        }
        for input in &self.inputs {
            if input.shape.len() != input.strides.len() {
                return Err(Error::format("shape and strides are of different length").of_key(&input.name));
            }
        }
        // With every symbol at its least value all expressions can be computed, unless one names an unknown symbol.
        let least = self.symbols.iter().map(|(name, symbol)| (name.as_str(), symbol.min)).collect();
        let sizes = self.inputs.iter().flat_map(|input| input.shape.iter().chain(&input.strides));
        sizes.chain(&self.guards).try_for_each(|size| size.names(&least))
    }

    /// What the inputs must be, from the shapes that they have.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] for a shape that the program was not compiled for, with input, dimension, found and wanted.
    pub fn expect(&self, shapes: &[Vec<i64>]) -> Result<Vec<Expected>> {
        let mut values: HashMap<&str, i64> = HashMap::with_capacity(self.symbols.len());
        for (input, found) in self.inputs.iter().zip(shapes) {
            if found.len() != input.shape.len() {
                let what = format!("input has {} dimensions, the program takes {}", found.len(), input.shape.len());
                return Err(Error::new(ErrorKind::Mismatch, what).of_key(&input.name));
            }
            for (dim, (size, found)) in input.shape.iter().zip(found).enumerate() {
                if let Size::Symbol(name) = size
                    && !values.contains_key(name.as_str())
                {
                    self.check_range(name, *found)
                        .map_err(|wanted| differs(dim, *found, &wanted).of_key(&input.name))?;
                    values.insert(name, *found);
                }
            }
        }
        let mut expected = Vec::with_capacity(self.inputs.len());
        for (input, found) in self.inputs.iter().zip(shapes) {
            let evaluate =
                |sizes: &[Size]| sizes.iter().map(|size| size.evaluate(&values)).collect::<Result<Vec<i64>>>();
            let of_input = |error: Error| error.of_key(&input.name);
            let shape = evaluate(&input.shape).map_err(of_input)?;
            if let Some(dim) = (0..shape.len()).find(|dim| shape[*dim] != found[*dim]) {
                let wanted = match &input.shape[dim] {
                    Size::Number(_) => shape[dim].to_string(),
                    size => format!("{} ({size})", shape[dim]),
                };
                return Err(differs(dim, found[dim], &wanted).of_key(&input.name));
            }
            expected.push(Expected { shape, strides: evaluate(&input.strides).map_err(of_input)? });
        }
        match self.guards.iter().find(|guard| guard.evaluate(&values).ok() != Some(1)) {
            None => Ok(expected),
            Some(guard) => {
                let sizes: Vec<String> = values.iter().map(|(name, value)| format!("{name} = {value}")).collect();
                let what = format!("the program was compiled for {guard}, here {}", sizes.join(", "));
                Err(Error::new(ErrorKind::Mismatch, what))
            }
        }
    }

    /// Gives the range if the value lies outside.
    fn check_range(&self, name: &str, value: i64) -> std::result::Result<(), String> {
        let Some(Symbol { min, max }) = self.symbols.get(name) else { return Err("a size that is stated".to_owned()) };
        match max {
            Some(max) if value < *min || value > *max => Err(format!("{min} to {max}")),
            None if value < *min => Err(format!("{min} or more")),
            _ => Ok(()),
        }
    }
}

fn differs(dim: usize, found: i64, wanted: &str) -> Error {
    Error::new(ErrorKind::Mismatch, format!("dim {dim} of the input is {found}, the program takes {wanted}"))
}

impl Size {
    /// Computes it.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] where there is no such number: a division by zero, more than 64 bits.
    pub fn evaluate(&self, values: &HashMap<&str, i64>) -> Result<i64> {
        let found = match self {
            Self::Number(number) => Some(*number),
            Self::Symbol(name) => values.get(name.as_str()).copied(),
            Self::Apply { op, of } => {
                let of = of.iter().map(|size| size.evaluate(values)).collect::<Result<Vec<i64>>>()?;
                op.apply(&of)
            }
        };
        found.ok_or_else(|| Error::new(ErrorKind::Mismatch, format!("{self} cannot be computed")))
    }

    /// Refuses names that are not known, and operations with the wrong number of operands.
    fn names(&self, known: &HashMap<&str, i64>) -> Result<()> {
        match self {
            Self::Number(_) => Ok(()),
            Self::Symbol(name) if known.contains_key(name.as_str()) => Ok(()),
            Self::Symbol(name) => Err(Error::format(format!("{name} is no size of an input"))),
            Self::Apply { op, of } if op.takes(of.len()) => of.iter().try_for_each(|size| size.names(known)),
            Self::Apply { op, of } => Err(Error::format(format!("{op:?} of {} operands", of.len()))),
        }
    }
}

impl Operation {
    fn takes(self, count: usize) -> bool {
        match self {
            Self::Add | Self::Mul | Self::Min | Self::Max | Self::And | Self::Or => count > 0,
            Self::Not => count == 1,
            _ => count == 2,
        }
    }

    fn apply(self, of: &[i64]) -> Option<i64> {
        let fold = |combine: fn(i64, i64) -> Option<i64>| {
            of.split_first().and_then(|(first, rest)| rest.iter().try_fold(*first, |left, right| combine(left, *right)))
        };
        let is = |holds: bool| Some(i64::from(holds));
        match (self, of) {
            (Self::Add, _) => fold(i64::checked_add),
            (Self::Mul, _) => fold(i64::checked_mul),
            (Self::Min, _) => of.iter().min().copied(),
            (Self::Max, _) => of.iter().max().copied(),
            (Self::And, _) => is(of.iter().all(|value| *value != 0)),
            (Self::Or, _) => is(of.iter().any(|value| *value != 0)),
            (Self::Not, [value]) => is(*value == 0),
            (Self::Pow, [base, power]) => base.checked_pow(u32::try_from(*power).ok()?),
            // Rounded down, the remainder with the divisor's sign.
            (Self::FloorDiv, [left, right]) => {
                let quotient = left.checked_div(*right)?;
                let is_inexact = left % right != 0 && (left % right < 0) != (*right < 0);
                quotient.checked_sub(i64::from(is_inexact))
            }
            (Self::Mod, [left, right]) => {
                let rest = left.checked_rem(*right)?;
                if rest != 0 && (rest < 0) != (*right < 0) { rest.checked_add(*right) } else { Some(rest) }
            }
            (Self::Eq, [left, right]) => is(left == right),
            (Self::Ne, [left, right]) => is(left != right),
            (Self::Lt, [left, right]) => is(left < right),
            (Self::Le, [left, right]) => is(left <= right),
            (Self::Gt, [left, right]) => is(left > right),
            (Self::Ge, [left, right]) => is(left >= right),
            _ => None,
        }
    }

    const fn sign(self) -> &'static str {
        match self {
            Self::Add => " + ",
            Self::Mul => " * ",
            Self::Pow => "**",
            Self::FloorDiv => " // ",
            Self::Mod => " % ",
            Self::Eq => " == ",
            Self::Ne => " != ",
            Self::Lt => " < ",
            Self::Le => " <= ",
            Self::Gt => " > ",
            Self::Ge => " >= ",
            Self::And => " and ",
            Self::Or => " or ",
            Self::Min => "min",
            Self::Max => "max",
            Self::Not => "not",
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Apply { op, of } => {
                let is_call = matches!(op, Operation::Min | Operation::Max | Operation::Not);
                f.write_str(if is_call { op.sign() } else { "" })?;
                f.write_str("(")?;
                for (number, size) in of.iter().enumerate() {
                    if number > 0 {
                        f.write_str(if is_call { ", " } else { op.sign() })?;
                    }
                    write!(f, "{size}")?;
                }
                f.write_str(")")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(name: &str) -> Size {
        Size::Symbol(name.to_owned())
    }

    fn apply(op: Operation, of: &[Size]) -> Size {
        Size::Apply { op, of: of.to_vec() }
    }

    fn signature() -> Signature {
        let input = |name: &str, shape: Vec<Size>, strides: Vec<Size>| Input {
            name: name.to_owned(),
            dtype: "float32".to_owned(),
            shape,
            strides,
            device: "cpu".to_owned(),
            mutated: false,
        };
        let twice = apply(Operation::Mul, &[Size::Number(2), symbol("n")]);
        Signature {
            inputs: vec![
                input("x", vec![symbol("n"), Size::Number(4)], vec![Size::Number(4), Size::Number(1)]),
                input("y", vec![Size::Number(4), twice.clone()], vec![twice, Size::Number(1)]),
            ],
            leaves: vec![Leaf::Input, Leaf::Input],
            outputs: vec![Output::Tensor],
            symbols: [("n".to_owned(), Symbol { min: 2, max: Some(64) })].into(),
            guards: vec![apply(Operation::Ne, &[symbol("n"), Size::Number(7)])],
        }
    }

    #[test]
    fn sizes_follow_from_the_inputs() {
        let signature = signature();
        signature.check().unwrap();
        let expected = signature.expect(&[vec![5, 4], vec![4, 10]]).unwrap();
        assert_eq!(expected[1], Expected { shape: vec![4, 10], strides: vec![10, 1] });
        for (shapes, what) in [
            ([vec![1, 4], vec![4, 2]], "dim 0 of the input is 1, the program takes 2 to 64"),
            ([vec![65, 4], vec![4, 130]], "takes 2 to 64"),
            ([vec![5, 3], vec![4, 10]], "dim 1 of the input is 3, the program takes 4"),
            ([vec![5, 4], vec![4, 11]], "dim 1 of the input is 11, the program takes 10 ((2 * n))"),
            ([vec![5, 4], vec![4, 10, 1]], "3 dimensions"),
            ([vec![7, 4], vec![4, 14]], "(n != 7), here n = 7"),
        ] {
            let error = signature.expect(&shapes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Mismatch);
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn signatures_that_no_call_can_be_held_against_are_refused() {
        let mut unknown = signature();
        unknown.guards.push(symbol("m"));
        let mut unbound = signature();
        unbound.symbols.insert("m".to_owned(), Symbol { min: 0, max: None });
        let mut operands = signature();
        operands.guards.push(apply(Operation::Mod, &[symbol("n")]));
        let mut leaves = signature();
        leaves.leaves.pop();
        for signature in [unknown, unbound, operands, leaves] {
            assert_eq!(signature.check().unwrap_err().kind(), ErrorKind::Format);
        }
    }

    #[test]
    fn division_rounds_as_in_python() {
        for (left, right, quotient, rest) in
            [(7, 2, 3, 1), (-7, 2, -4, 1), (7, -2, -4, -1), (-7, -2, 3, -1), (6, 3, 2, 0)]
        {
            assert_eq!(Operation::FloorDiv.apply(&[left, right]), Some(quotient));
            assert_eq!(Operation::Mod.apply(&[left, right]), Some(rest));
        }
        for op in [Operation::FloorDiv, Operation::Mod] {
            assert_eq!((op.apply(&[1, 0]), op.apply(&[i64::MIN, -1])), (None, None));
        }
        assert_eq!(Operation::Pow.apply(&[2, 63]), None);
        assert_eq!(Operation::Mul.apply(&[i64::MAX, 2]), None);
    }

    #[test]
    fn a_signature_is_the_same_after_json() {
        let text = serde_json::to_string(&signature()).unwrap();
        assert_eq!(serde_json::from_str::<Signature>(&text).unwrap(), signature());
        assert!(text.contains(r#""shape":["n",4]"#), "{text}");
        assert!(serde_json::from_str::<Size>(r#"{"op":"exec","of":[]}"#).is_err());
    }
}
