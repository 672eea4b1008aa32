//! Configs as Python objects, made one after the other: depth costs nothing, and what is shared stays one object.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pyo3::exceptions::{PyMemoryError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyComplex, PyDict, PyFrozenSet, PyList, PySet, PyString, PyTuple};
use reweft::config::{Array, Clock, Config, DictClass, Elements, Id, NameKind, Object, Pairs, Time, Value};
use reweft::{Error, ErrorKind, Limits, OpenOptions};

use crate::error::Error as PyError;

/// Reads a config; gives plain Python data.
#[pyfunction]
#[pyo3(signature = (path, *, top_level_key, limits))]
pub fn load_config(
    py: Python<'_>,
    path: PathBuf,
    top_level_key: Option<String>,
    limits: HashMap<String, u64>,
) -> PyResult<Py<PyAny>> {
    let limits = crate::limits::limits(limits)?;
    let options = OpenOptions { top_level_key, limits, ..OpenOptions::default() };
    let config = py.detach(|| Config::open(&path, &options)).map_err(PyError::from)?;
    Ok(to_python(py, &config, &path, &options.limits)?.unbind())
}

/// Makes Python data of a config; the path is for messages.
pub fn to_python<'py>(py: Python<'py>, config: &Config, path: &Path, limits: &Limits) -> PyResult<Bound<'py, PyAny>> {
    let builder = Builder { py, config, made: vec![None; config.values().len()], nbytes: 0 };
    builder.build(path, limits)
}

struct Builder<'py, 'c> {
    py: Python<'py>,
    config: &'c Config,
    made: Vec<Option<Bound<'py, PyAny>>>,
    /// Bytes of the arrays made so far.
    nbytes: u64,
}

impl<'py> Builder<'py, '_> {
    /// Makes the root, after all that it holds.
    fn build(mut self, path: &Path, limits: &Limits) -> PyResult<Bound<'py, PyAny>> {
        let mut stack = vec![(self.config.root(), 0_usize)];
        while let Some((id, place)) = stack.last_mut() {
            let (id, value) = (*id, self.config.get(*id));
            if let Some(child) = value.child(*place) {
                *place += 1;
                if self.made.get(child.index()).is_some_and(Option::is_none) {
                    stack.push((child, 0));
                }
                continue;
            }
            let made = self.make(value, limits).map_err(|error| self.explain(error, id, path))?;
            if let Some(slot) = self.made.get_mut(id.index()) {
                *slot = Some(made);
            }
            stack.pop();
        }
        self.get(self.config.root())
    }

    /// Python's refusal (a key that cannot be hashed, a decimal that is none) as an error of the file.
    fn explain(&self, error: PyErr, id: Id, path: &Path) -> PyErr {
        if error.is_instance_of::<PyMemoryError>(self.py) {
            return error;
        }
        let (kind, what) = if error.is_instance_of::<TooLarge>(self.py) {
            (ErrorKind::Limit, error.value(self.py).to_string())
        } else {
            (ErrorKind::Format, format!("Python does not make a {} of it: {error}", self.config.get(id).kind()))
        };
        PyError::from(Error::new(kind, what).of_key(self.config.path(id)).in_file(path)).into()
    }

    fn get(&self, id: Id) -> PyResult<Bound<'py, PyAny>> {
        let made = self.made.get(id.index()).and_then(Option::as_ref);
        made.cloned().ok_or_else(|| PyTypeError::new_err("a value is used before it was made"))
    }

    fn items(&self, ids: &[Id]) -> PyResult<Vec<Bound<'py, PyAny>>> {
        ids.iter().map(|id| self.get(*id)).collect()
    }

    fn fill(&self, dict: &Bound<'py, PyAny>, pairs: &Pairs) -> PyResult<()> {
        pairs.iter().try_for_each(|(key, value)| dict.set_item(self.get(*key)?, self.get(*value)?))
    }

    fn dict(&self, pairs: &Pairs) -> PyResult<Bound<'py, PyAny>> {
        let dict = PyDict::new(self.py).into_any();
        self.fill(&dict, pairs)?;
        Ok(dict)
    }

    /// A class of Python's library, numpy or `reweft.config`; never one that a file names.
    fn class(&self, module: &str, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.py.import(module)?.getattr(name)
    }

    fn make(&mut self, value: &Value, limits: &Limits) -> PyResult<Bound<'py, PyAny>> {
        let py = self.py;
        Ok(match value {
            Value::None => py.None().into_bound(py),
            Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
            Value::Int(value) => value.into_pyobject(py)?.into_any(),
            Value::BigInt(value) => {
                let options = PyDict::new(py);
                options.set_item("signed", true)?;
                let bytes = PyBytes::new(py, value.to_le_bytes());
                self.class("builtins", "int")?.call_method("from_bytes", (bytes, "little"), Some(&options))?
            }
            Value::Float(value) => value.into_pyobject(py)?.into_any(),
            Value::Complex(parts) => PyComplex::from_doubles(py, parts.0, parts.1).into_any(),
            Value::Str(text) => PyString::new(py, text).into_any(),
            Value::Surrogates(bytes) => PyBytes::new(py, bytes).call_method1("decode", ("utf-8", "surrogatepass"))?,
            Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
            Value::ByteArray(bytes) => PyByteArray::new(py, bytes).into_any(),
            Value::List(items) => PyList::new(py, self.items(items)?)?.into_any(),
            Value::Tuple(items) => PyTuple::new(py, self.items(items)?)?.into_any(),
            Value::Set(items) => PySet::new(py, self.items(items)?)?.into_any(),
            Value::FrozenSet(items) => PyFrozenSet::new(py, self.items(items)?)?.into_any(),
            Value::Dict(dict) => self.library_dict(&dict.class, &dict.pairs)?,
            Value::Deque(deque) => {
                let items = PyList::new(py, self.items(&deque.0)?)?;
                self.class("collections", "deque")?.call1((items, deque.1))?
            }
            Value::Range(parts) => {
                self.class("builtins", "range")?.call1(PyTuple::new(py, self.items(&parts[..])?)?)?
            }
            Value::Slice(parts) => {
                self.class("builtins", "slice")?.call1(PyTuple::new(py, self.items(&parts[..])?)?)?
            }
            Value::Name(name) if name.kind == NameKind::NumpyDtype => {
                self.class("numpy", "dtype")?.call1((&name.text,))?
            }
            Value::Name(name) if name.text == "builtins.Ellipsis" => py.Ellipsis().into_bound(py),
            Value::Name(name) => self.class("reweft.config", "ConfigName")?.call1((name.kind.name(), &name.text))?,
            Value::Time(time) => self.time(time)?,
            Value::Uuid(number) => {
                let options = PyDict::new(py);
                options.set_item("int", **number)?;
                self.class("uuid", "UUID")?.call((), Some(&options))?
            }
            Value::Decimal(text) => self.class("decimal", "Decimal")?.call1((&**text,))?,
            Value::Path(path) => {
                // A path of the other system can be named, but not used, here.
                let class = if path.class == "WindowsPath" { "PureWindowsPath" } else { path.class };
                self.class("pathlib", class)?.call1(PyTuple::new(py, &path.parts)?)?
            }
            Value::Namespace(namespace) => {
                let (module, name) = namespace.class.split_once('.').unwrap_or(("types", "SimpleNamespace"));
                let made = self.class(module, name)?.call0()?;
                self.fill(&made.getattr("__dict__")?, &namespace.attributes)?;
                made
            }
            Value::Object(object) => self.object(object)?,
            Value::Array(array) => self.array(array, limits)?,
            Value::Scalar(scalar) => self.array(scalar, limits)?.get_item(PyTuple::empty(py))?,
            other => return Err(PyTypeError::new_err(format!("a value of kind {}", other.kind()))),
        })
    }

    fn library_dict(&self, class: &DictClass, pairs: &Pairs) -> PyResult<Bound<'py, PyAny>> {
        let made = match class {
            DictClass::Dict => return self.dict(pairs),
            DictClass::OrderedDict => self.class("collections", "OrderedDict")?.call0()?,
            DictClass::Counter => self.class("collections", "Counter")?.call0()?,
            DictClass::DefaultDict(None) => self.class("collections", "defaultdict")?.call0()?,
            DictClass::DefaultDict(Some(factory)) => {
                self.class("collections", "defaultdict")?.call1((self.class("builtins", factory)?,))?
            }
        };
        self.fill(&made, pairs)?;
        Ok(made)
    }

    fn object(&self, object: &Object) -> PyResult<Bound<'py, PyAny>> {
        let args = PyTuple::new(self.py, self.items(&object.args)?)?;
        let attributes = self.dict(&object.attributes)?;
        if let Some(items) = &object.items {
            let class = self.class("reweft.config", "ConfigDict")?;
            return class.call1((&object.class, args, attributes, self.dict(items)?));
        }
        let elements = PyList::new(self.py, self.items(object.elements.as_deref().unwrap_or_default())?)?;
        self.class("reweft.config", "ConfigObject")?.call1((&object.class, args, attributes, elements))
    }

    fn time(&self, time: &Time) -> PyResult<Bound<'py, PyAny>> {
        match time {
            Time::Date(year, month, day) => self.class("datetime", "date")?.call1((year, month, day)),
            Time::Delta(days, seconds, microseconds) => self.delta((*days, *seconds, *microseconds)),
            Time::Clock(clock) => {
                let ((hour, minute, second), (options, zone)) = (clock.hms, self.zone(clock)?);
                let args = (hour, minute, second, clock.microsecond, zone);
                self.class("datetime", "time")?.call(args, Some(&options))
            }
            Time::DateTime(year, month, day, clock) => {
                let ((hour, minute, second), (options, zone)) = (clock.hms, self.zone(clock)?);
                let args = (year, month, day, hour, minute, second, clock.microsecond, zone);
                self.class("datetime", "datetime")?.call(args, Some(&options))
            }
        }
    }

    fn delta(&self, (days, seconds, microseconds): (i64, i64, i64)) -> PyResult<Bound<'py, PyAny>> {
        self.class("datetime", "timedelta")?.call1((days, seconds, microseconds))
    }

    /// `fold` as a keyword, and the zone.
    fn zone(&self, clock: &Clock) -> PyResult<(Bound<'py, PyDict>, Option<Bound<'py, PyAny>>)> {
        let options = PyDict::new(self.py);
        options.set_item("fold", u8::from(clock.fold))?;
        let zone = match clock.offset {
            Some(offset) => Some(self.class("datetime", "timezone")?.call1((self.delta(offset)?,))?),
            None => None,
        };
        Ok((options, zone))
    }

    /// An array of its own memory, in the layout of the file and the machine's byte order.
    fn array(&mut self, array: &Array, limits: &Limits) -> PyResult<Bound<'py, PyAny>> {
        let py = self.py;
        let numpy = py.import("numpy")?;
        let dtype = numpy.getattr("dtype")?.call1((array.dtype(),))?;
        let shape = PyTuple::new(py, &array.shape)?;
        match &array.elements {
            Elements::Objects(items) => {
                let made = numpy.getattr("empty")?.call1((shape, dtype))?;
                let flat = made.getattr("flat")?;
                for (place, id) in items.iter().enumerate() {
                    flat.set_item(place, self.get(*id)?)?;
                }
                Ok(made)
            }
            Elements::Bytes(bytes) if bytes.is_empty() => numpy.getattr("empty")?.call1((shape, dtype)),
            Elements::Bytes(bytes) => {
                self.nbytes = self.nbytes.saturating_add(bytes.len() as u64);
                if self.nbytes > limits.max_repeated_nbytes {
                    let what =
                        format!("the arrays come to more than max_repeated_nbytes ({})", limits.max_repeated_nbytes);
                    return Err(TooLarge::new_err(what));
                }
                let strides: PyResult<Vec<u64>> = array
                    .strides
                    .iter()
                    .map(|stride| stride.checked_mul(array.itemsize()).ok_or_else(|| TooLarge::new_err("stride")))
                    .collect();
                let options = PyDict::new(py);
                options.set_item("buffer", PyByteArray::new(py, bytes))?;
                options.set_item("strides", PyTuple::new(py, strides?)?)?;
                let made = numpy.getattr("ndarray")?.call((&shape, &dtype), Some(&options))?;
                let native = dtype.call_method1("newbyteorder", ("=",))?;
                if dtype.eq(&native)? { Ok(made) } else { made.call_method1("astype", (native,)) }
            }
        }
    }
}

// Only carries the limit to `explain`.
pyo3::create_exception!(reweft, TooLarge, pyo3::exceptions::PyException);
