//! Operators that compiled programs leave to their host, run by torch from Python.

use std::cell::RefCell;
use std::sync::Arc;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyList;
use reweft::ErrorKind;
use reweft_runtime::{Operators, Tensor, Torch};

use crate::error::Error;
use crate::handles;

thread_local! {
    /// What an operator raised in the call that runs on this thread.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// An object of the class `reweft.torch.operators.Operators`.
struct PythonOperators {
    torch: Torch,
    run: Py<PyAny>,
    num_inputs: Vec<usize>,
    names: Vec<String>,
}

/// Makes operators of the nodes that a package states.
///
/// # Errors
/// As the class, for what it does not know.
pub fn open(torch: &Torch, nodes: &str) -> reweft::Result<Arc<dyn Operators>> {
    Python::attach(|py| {
        let class = py.import("reweft.torch.operators")?.getattr("Operators")?;
        let made = class.call1((nodes,))?;
        Ok(Arc::new(PythonOperators {
            torch: torch.clone(),
            run: made.getattr("run")?.unbind(),
            num_inputs: made.getattr("num_inputs")?.extract()?,
            names: made.getattr("names")?.extract()?,
        }) as _)
    })
    .map_err(|error: PyErr| Python::attach(|py| refused(py, &error)))
}

/// The class refuses what this process cannot run.
fn refused(py: Python<'_>, error: &PyErr) -> reweft::Error {
    let value = error.value(py);
    let text = value.to_string();
    let hint = value.getattr("hint").and_then(|hint| hint.extract::<String>()).ok();
    let error = |text: &str| reweft::Error::new(ErrorKind::Unsupported, text);
    match hint {
        // The text ends with the hint, which the error puts there itself.
        Some(hint) => error(text.split("\nhint: ").next().unwrap_or_default()).with_hint(hint),
        None => error(&text),
    }
}

impl Operators for PythonOperators {
    fn num_inputs(&self, node: usize) -> Option<usize> {
        self.num_inputs.get(node).copied()
    }

    fn run(&self, node: usize, numbers: &[i64], inputs: Vec<Tensor>) -> reweft::Result<Vec<Tensor>> {
        Python::attach(|py| {
            let run = || {
                let inputs = handles::give(py, inputs.into_iter().map(Some).collect())?;
                let outputs = self.run.bind(py).call1((node, numbers.to_vec(), inputs))?;
                handles::take(&self.torch, outputs.cast::<PyList>()?)
            };
            run().map_err(|raised| {
                let name = self.names.get(node).map_or("", String::as_str);
                let error = reweft::Error::new(ErrorKind::Run, format!("operator {name} failed: {raised}"));
                RAISED.set(Some(raised));
                error
            })
        })
    }
}

/// The exception for a call that failed: with what an operator raised as its cause, or that itself if it is none that code
/// should catch, such as `KeyboardInterrupt`.
pub fn raised(py: Python<'_>, error: reweft::Error) -> PyErr {
    let cause = RAISED.take();
    if let Some(cause) = &cause
        && !cause.is_instance_of::<PyException>(py)
    {
        return cause.clone_ref(py);
    }
    let error = PyErr::from(Error::from(error));
    error.set_cause(py, cause);
    error
}
