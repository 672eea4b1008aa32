//! The one error type of the engine.
//!
//! The layer that knows a fact adds it: a reader the byte offset, a checkpoint the file and the key. A message says
//! what, where, found and wanted: `model.pt: "fc.weight": data/7 at 0x1f3: record has 1024 bytes, tensor needs 4096`.

use std::fmt;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what to do about it.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    record: Option<String>,
    byte_offset: Option<u64>,
    key: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The class of an [`Error`]; callers branch on this, people read the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused: open, read, write, sync or rename.
    Io,
    /// The file is damaged, truncated or contradicts itself.
    Format,
    /// The file is sound, but this version does not handle what it holds.
    Unsupported,
    /// A named limit was reached; the caller may raise it.
    Limit,
    /// A key, slot or record of that name does not exist.
    NotFound,
    /// Two keys were mapped to one name.
    KeyCollision,
    /// Checkpoint and artifact do not fit each other; nothing was written.
    Mismatch,
    /// The loader refused a compiled program, or the program failed.
    Run,
    /// The caller's arguments contradict each other or are malformed.
    Usage,
}

impl Error {
    /// Makes an error of `kind` that says `what`.
    #[cold]
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            what: what.into(),
            path: None,
            record: None,
            byte_offset: None,
            key: None,
            hint: None,
            source: None,
        }))
    }

    /// A damaged or contradictory file.
    #[cold]
    pub fn format(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Format, what)
    }

    /// A failed system call: `doing` names it (`"read"`, `"rename"`).
    #[cold]
    pub fn io(doing: &str, source: std::io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, format!("{doing}: {source}"));
        error.0.source = Some(Box::new(source));
        error
    }

    /// Adds the file, unless a deeper layer named one.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Adds the record of the archive, unless a deeper layer named one.
    #[must_use]
    pub fn in_record(mut self, record: impl Into<String>) -> Self {
        self.0.record.get_or_insert_with(|| record.into());
        self
    }

    /// Adds the byte offset: absolute in the record if one is named, else in the file.
    #[must_use]
    pub fn at(mut self, byte_offset: u64) -> Self {
        self.0.byte_offset.get_or_insert(byte_offset);
        self
    }

    /// Adds the key or slot.
    #[must_use]
    pub fn of_key(mut self, key: impl Into<String>) -> Self {
        let key = key.into();
        // The root of a file has no key to name.
        if !key.is_empty() {
            self.0.key.get_or_insert(key);
        }
        self
    }

    /// Adds advice; it is printed on a line of its own.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file, if known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset, if known: in [`record`](Self::record) if that is named, else in the file.
    pub fn byte_offset(&self) -> Option<u64> {
        self.0.byte_offset
    }

    /// The record inside the archive, if known.
    pub fn record(&self) -> Option<&str> {
        self.0.record.as_deref()
    }

    /// The key or slot, if known.
    pub fn key(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// The advice, if there is any.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The message on one line, without the hint.
    pub fn message(&self) -> String {
        let inner = &self.0;
        let mut parts = Vec::new();
        if let Some(path) = &inner.path {
            parts.push(path.display().to_string());
        }
        if let Some(key) = &inner.key {
            parts.push(format!("{key:?}"));
        }
        match (&inner.record, inner.byte_offset) {
            (Some(record), Some(at)) => parts.push(format!("{record} at {at:#x}")),
            (Some(record), None) => parts.push(record.clone()),
            (None, Some(at)) => parts.push(format!("at {at:#x}")),
            (None, None) => {}
        }
        parts.push(inner.what.clone());
        parts.join(": ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())?;
        if let Some(hint) = self.hint() {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<reweft_pickle::Error> for Error {
    fn from(error: reweft_pickle::Error) -> Self {
        let kind = match error.kind() {
            reweft_pickle::ErrorKind::Limit => ErrorKind::Limit,
            reweft_pickle::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Format,
        };
        // The pickle's own message begins with its offset, which stays the offset within the record.
        Self::new(kind, format!("pickle {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_file_key_record_and_offset() {
        let error = Error::format("record has 4 bytes, tensor needs 8")
            .at(0x10)
            .in_record("data/0")
            .of_key("fc.weight")
            .in_file("m.pt")
            .with_hint("download it again");
        assert_eq!(
            error.to_string(),
            "m.pt: \"fc.weight\": data/0 at 0x10: record has 4 bytes, tensor needs 8\nhint: download it again"
        );
    }

    #[test]
    fn deeper_context_wins() {
        let error = Error::format("x").in_file("inner").in_file("outer");
        assert_eq!(error.path(), Some(Path::new("inner")));
    }

    #[test]
    fn error_is_one_pointer() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
