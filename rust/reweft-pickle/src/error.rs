//! The one error type: what was wrong, at which byte, in which opcode.

use std::fmt;

/// The result of everything here that reads a pickle.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of defect was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The input ends inside an opcode, or before STOP.
    Truncated,
    /// A byte that is no opcode stands where an opcode must be.
    UnknownOpcode,
    /// PROTO names an unknown protocol, stands elsewhere than first, or an opcode is newer than the
    /// protocol.
    Protocol,
    /// A frame is longer than the input, overlaps another, ends inside an opcode or reaches beyond
    /// STOP.
    Frame,
    /// An opcode's own argument is malformed: a negative length, a string that is not UTF-8, a
    /// number that is none.
    BadArgument,
    /// A value on the stack is of a kind that the opcode cannot work with.
    BadOperand,
    /// An opcode needs more values, or a MARK, than the stack has.
    StackUnderflow,
    /// STOP was reached with values or marks left over.
    StackLeftover,
    /// A memo index is read that was never written, or is negative.
    Memo,
    /// A field of [`Limits`](crate::Limits) was exceeded; the message names it.
    Limit,
    /// The pickle needs something that a reader of one byte string cannot have, such as out-of-band
    /// buffers.
    Unsupported,
    /// The writer given to [`disassemble`](crate::disassemble) refused text.
    Output,
}

/// Why a pickle was refused, and where.
///
/// One pointer wide, because every step of the reader returns it.
///
/// ```
/// use reweft_pickle::{ErrorKind, Limits, Pickle};
/// let error = Pickle::parse(b"X\x63\0\0\0twelve bytes", &Limits::default()).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Truncated);
/// assert_eq!(error.to_string(), "at 0x0: BINUNICODE: length 99 exceeds the 12 bytes that are left");
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    byte_offset: u64,
    opcode: Option<&'static str>,
    message: String,
}

impl Error {
    #[cold]
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, byte_offset: 0, opcode: None, message: message.into() }))
    }

    /// Names the place; called once, by the loop that knows which opcode runs.
    #[cold]
    pub(crate) fn at(mut self, byte_offset: usize, opcode: Option<&'static str>) -> Self {
        self.0.byte_offset = byte_offset as u64;
        self.0.opcode = opcode;
        self
    }

    /// The kind of defect.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Where the opcode at fault starts, in bytes from the start of what was parsed.
    pub fn byte_offset(&self) -> u64 {
        self.0.byte_offset
    }

    /// The name of the opcode at fault, if a known one had been read.
    pub fn opcode(&self) -> Option<&'static str> {
        self.0.opcode
    }

    /// Adds `base` to the byte offset, for a pickle that does not start where its file starts.
    #[must_use]
    pub fn offset_by(mut self, base: u64) -> Self {
        self.0.byte_offset = self.0.byte_offset.saturating_add(base);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {:#x}: ", self.0.byte_offset)?;
        if let Some(opcode) = self.0.opcode {
            write!(f, "{opcode}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, \"{self}\")", self.0.kind)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn names_place_and_opcode() {
        let error = Error::new(ErrorKind::Memo, "index 7 was never written").at(0x1f3, Some("BINGET"));
        assert_eq!(error.to_string(), "at 0x1f3: BINGET: index 7 was never written");
        assert_eq!(error.offset_by(0x1000).byte_offset(), 0x11f3);
    }
}
