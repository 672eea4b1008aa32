//! Finding out at each call whether a module is what it was: its attributes by identity, its tensors by where they are.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PySet};
use reweft_runtime::{Placement, Tensor};

use crate::error::{Error, Result};
use crate::handles;

/// What a module consisted of when this was made. Holds all of it, so that nothing else can come to have its address.
#[pyclass(frozen, module = "reweft._core")]
pub struct Watch {
    containers: Vec<Container>,
    /// Asking a tensor for its address may make the copy of a lazy one, so one thread asks at a time.
    tensors: Mutex<Vec<(Tensor, Placement)>>,
}

/// A dict or list, with what was in it.
enum Container {
    /// A module's own dict: how many entries it had, and those that matter.
    Own(Py<PyDict>, usize, Vec<(Py<PyAny>, Py<PyAny>)>),
    Dict(Py<PyDict>, Vec<(Py<PyAny>, Py<PyAny>)>),
    List(Py<PyList>, Vec<Py<PyAny>>),
}

#[pymethods]
impl Watch {
    /// Notes what is in the dicts of modules, but for what stands under the skipped names; what is in containers, in their
    /// order; and where the tensors are.
    #[new]
    fn new(
        modules: &Bound<'_, PyList>,
        skipped: &Bound<'_, PySet>,
        containers: &Bound<'_, PyList>,
        tensors: &Bound<'_, PyList>,
    ) -> PyResult<Self> {
        let torch = handles::torch()?;
        let placed = handles::take(torch, tensors)?.into_iter().map(|tensor| {
            let placement = tensor.placement()?;
            Ok::<_, reweft_runtime::Error>((tensor, placement))
        });
        let placed: reweft_runtime::Result<Vec<_>> = placed.collect();
        let placed = placed.map_err(|error| Error::from(reweft::Error::from(error)))?;
        let own = modules.iter().map(|module| Container::own(module.cast::<PyDict>()?, skipped));
        let containers = containers.iter().map(|container| Container::of(&container));
        Ok(Self { containers: own.chain(containers).collect::<PyResult<_>>()?, tensors: Mutex::new(placed) })
    }

    /// Whether a tensor has other elements than those that it had, or they lie in another way.
    fn moved(&self) -> Result<bool> {
        let tensors = self.tensors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (tensor, placement) in &*tensors {
            if !tensor.is_at(placement).map_err(reweft::Error::from)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether something else is in one of the dicts and lists.
    fn changed(&self, py: Python<'_>) -> PyResult<bool> {
        for container in &self.containers {
            if !container.is_same(py)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Container {
    fn own(dict: &Bound<'_, PyDict>, skipped: &Bound<'_, PySet>) -> PyResult<Self> {
        let mut items = Vec::new();
        for (key, value) in dict {
            if !skipped.contains(&key)? {
                items.push((key.unbind(), value.unbind()));
            }
        }
        Ok(Self::Own(dict.clone().unbind(), dict.len(), items))
    }

    fn of(value: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(dict) = value.cast::<PyDict>() {
            let items = dict.iter().map(|(key, value)| (key.unbind(), value.unbind())).collect();
            return Ok(Self::Dict(dict.clone().unbind(), items));
        }
        let list = value.cast::<PyList>()?;
        Ok(Self::List(list.clone().unbind(), list.iter().map(Bound::unbind).collect()))
    }

    /// Whether the same objects are in it, under the same keys and in the same order.
    fn is_same(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(match self {
            Self::Own(dict, entries, items) => {
                let dict = dict.bind(py);
                for (key, old) in items {
                    if !dict.get_item(key)?.is_some_and(|value| value.is(old)) {
                        return Ok(false);
                    }
                }
                dict.len() == *entries
            }
            Self::Dict(dict, items) => {
                let dict = dict.bind(py);
                let mut pairs = dict.iter().zip(items);
                dict.len() == items.len() && pairs.all(|((key, value), old)| key.is(&old.0) && value.is(&old.1))
            }
            Self::List(list, items) => {
                let list = list.bind(py);
                list.len() == items.len() && list.iter().zip(items).all(|(value, old)| value.is(old))
            }
        })
    }
}
