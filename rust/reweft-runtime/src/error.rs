//! The error of this crate: what was attempted, what was found, what was wanted.

use std::fmt;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong; [`Error::kind`] returns it for callers that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The dynamic loader could not open a library, or would return another one.
    Library,
    /// A library lacks a function that is needed; the message names it.
    Symbol,
    /// A native function reported failure; the message holds its name and its own words.
    Call,
    /// Weights do not fit the compiled program: names, dtype, size or address. Nothing has changed.
    Mismatch,
    /// The program has constants that were never bound, so it cannot run.
    WeightsMissing,
    /// The caller gave up while the call waited for others.
    Interrupted,
    /// The caller asked for something that cannot be, such as three inputs for two parameters.
    Usage,
}

/// The error of every function in this crate, one pointer wide.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
}

impl Error {
    #[cold]
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(Box::new(Inner { kind, message }))
    }

    #[cold]
    pub(crate) fn mismatch(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Mismatch, message)
    }

    #[cold]
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for reweft::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Mismatch => reweft::ErrorKind::Mismatch,
            ErrorKind::Usage => reweft::ErrorKind::Usage,
            ErrorKind::Library
            | ErrorKind::Symbol
            | ErrorKind::Call
            | ErrorKind::WeightsMissing
            | ErrorKind::Interrupted => reweft::ErrorKind::Run,
        };
        Self::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
