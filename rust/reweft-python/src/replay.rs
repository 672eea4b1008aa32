//! torch as the library that carries out the operations of recipes.

use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use reweft::replay::{Build, Elements, Operation, Replay};
use reweft::{Error, ErrorKind};

/// What `reweft.torch` handed over when it was imported.
struct Lent {
    apply: Py<PyAny>,
    build: Build,
}

static LENT: OnceLock<Lent> = OnceLock::new();

/// Takes the function that carries operations out, and what its results depend on. The first call counts.
#[pyfunction]
pub fn lend_replay(apply: Py<PyAny>, torch: String, capability: String) {
    let _ = LENT.set(Lent { apply, build: Build { torch, capability } });
}

/// Whatever `reweft.torch` lends, now or later.
pub fn torch() -> Arc<dyn Replay> {
    Arc::new(Torch)
}

#[derive(Debug)]
struct Torch;

impl Replay for Torch {
    fn build(&self) -> Option<Build> {
        Some(LENT.get()?.build.clone())
    }

    fn apply(&self, operation: &Operation, operands: &[Elements<'_>], out: &mut [u8]) -> reweft::Result<()> {
        let fail = |what: String| Error::new(ErrorKind::Unsupported, format!("{}: {what}", operation.name()));
        let lent = LENT.get().ok_or_else(|| fail("reweft.torch is not imported".into()))?;
        let made = Python::attach(|py| {
            let operands = operands.iter().map(|of| (of.dtype.name(), of.shape.to_vec(), PyBytes::new(py, of.bytes)));
            let operands = PyList::new(py, operands.collect::<Vec<_>>())?;
            let arguments = (&operation.operator, &operation.arguments, operation.result, operands);
            let (dtype, shape, bytes): (String, Vec<u64>, Vec<u8>) = lent.apply.bind(py).call1(arguments)?.extract()?;
            Ok::<_, PyErr>((dtype, shape, bytes))
        });
        let (dtype, shape, bytes) = made.map_err(|error| fail(error.to_string()))?;
        if (dtype.as_str(), &shape, bytes.len()) != (operation.dtype.name(), &operation.shape, out.len()) {
            return Err(fail(format!("gave {dtype} {shape:?}, wanted {} {:?}", operation.dtype, operation.shape)));
        }
        out.copy_from_slice(&bytes);
        Ok(())
    }
}
