//! The one mapping from engine errors to the classes of `reweft.errors`.

use pyo3::prelude::*;
use reweft::ErrorKind;

/// Engine errors on their way to Python.
pub type Result<T> = std::result::Result<T, Error>;

/// An engine error that becomes an exception of `reweft.errors`.
pub struct Error(reweft::Error);

impl From<reweft::Error> for Error {
    fn from(error: reweft::Error) -> Self {
        Self(error)
    }
}

const fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Io => "IoError",
        ErrorKind::Format => "FormatError",
        ErrorKind::Unsupported => "UnsupportedError",
        ErrorKind::Limit => "LimitError",
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::KeyCollision => "KeyCollisionError",
        ErrorKind::Mismatch => "MismatchError",
        ErrorKind::Run => "RunError",
        _ => "UsageError",
    }
}

impl From<Error> for PyErr {
    fn from(Error(error): Error) -> Self {
        Python::attach(|py| to_python(py, &error).unwrap_or_else(|failed| failed))
    }
}

fn to_python(py: Python<'_>, error: &reweft::Error) -> PyResult<PyErr> {
    let class = py.import("reweft.errors")?.getattr(class_name(error.kind()))?;
    let value = class.call1((error.to_string(),))?;
    value.setattr("path", error.path())?;
    value.setattr("record", error.record())?;
    value.setattr("byte_offset", error.byte_offset())?;
    value.setattr("key", error.key())?;
    value.setattr("hint", error.hint())?;
    Ok(PyErr::from_value(value))
}
