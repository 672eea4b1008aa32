//! Operations that a library carries out for the engine.
//!
//! What IEEE 754 does not define to the last bit (powers, trigonometry, sums in some order, transforms) differs between
//! libraries, versions and processors. So the engine computes none of it: a recipe names the library's operation, and
//! whoever has the library in the process lends it to a checkpoint.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::Dtype;
use crate::error::Result;

/// One operation of torch, as a step of a recipe: tensors in, one tensor out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    /// The operator with its overload: `aten::cos.default`.
    pub operator: String,
    /// Its arguments as JSON, `{"tensor":0}` for the first tensor. The engine does not look into it.
    pub arguments: String,
    /// How many tensors it takes from the stack; the topmost is the last.
    pub count: usize,
    /// Which of its results is meant.
    pub result: usize,
    /// Type of the result's elements.
    pub dtype: Dtype,
    /// Elements of the result along each dimension.
    pub shape: Vec<u64>,
}

impl Operation {
    /// The call as a formula.
    pub(crate) fn formula(&self, operands: &[String]) -> String {
        let mut text = self.arguments.clone();
        for (number, operand) in operands.iter().enumerate() {
            text = text.replace(&format!("{{\"tensor\":{number}}}"), operand);
        }
        format!("{}{text}", self.name())
    }

    /// The operator, without the overload that most have.
    pub fn name(&self) -> &str {
        self.operator.strip_suffix(".default").unwrap_or(&self.operator)
    }
}

/// A tensor that an operation takes, in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'a> {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension.
    pub shape: &'a [u64],
    /// The elements.
    pub bytes: &'a [u8],
}

/// What the last bits of results depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// The version of torch.
    pub torch: String,
    /// Which of its vector functions it uses here: `AVX512`.
    pub capability: String,
}

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "torch {} with {}", self.torch, self.capability)
    }
}

/// A library that carries out operations.
pub trait Replay: fmt::Debug + Send + Sync {
    /// What is there; `None` if the library is not loaded.
    fn build(&self) -> Option<Build>;

    /// Writes the elements of the result in row-major order.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for an operator that is none or is not pure, or whose
    /// result is another than the operation states; what the library says.
    fn apply(&self, operation: &Operation, operands: &[Elements<'_>], out: &mut [u8]) -> Result<()>;
}
