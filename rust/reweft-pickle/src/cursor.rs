//! Bytes to instructions: bounds, frames and the declared protocol are checked here, values are
//! not.

use crate::error::{Error, ErrorKind, Result};
use crate::opcode::{ArgKind, Entry, Op, lookup};

/// The newest protocol that exists.
const HIGHEST_PROTOCOL: u8 = 5;

/// An opcode's argument, borrowed from the input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg<'a> {
    Nothing,
    Int(i64),
    UInt(u64),
    Float(f64),
    Bytes(&'a [u8]),
    TwoLines(&'a [u8], &'a [u8]),
}

impl<'a> Arg<'a> {
    #[inline]
    pub fn int(self) -> Result<i64> {
        if let Arg::Int(value) = self { Ok(value) } else { Err(mismatch()) }
    }

    #[inline]
    pub fn float(self) -> Result<f64> {
        if let Arg::Float(value) = self { Ok(value) } else { Err(mismatch()) }
    }

    #[inline]
    pub fn bytes(self) -> Result<&'a [u8]> {
        if let Arg::Bytes(value) = self { Ok(value) } else { Err(mismatch()) }
    }

    pub fn two_lines(self) -> Result<(&'a [u8], &'a [u8])> {
        if let Arg::TwoLines(first, second) = self { Ok((first, second)) } else { Err(mismatch()) }
    }
}

/// Only a slip between the opcode table and the interpreter gets here; a test runs every opcode to
/// exclude it.
#[cold]
fn mismatch() -> Error {
    Error::new(ErrorKind::BadArgument, "the opcode table gives this opcode another kind of argument")
}

/// One decoded opcode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction<'a> {
    pub byte_offset: usize,
    pub entry: &'static Entry,
    pub arg: Arg<'a>,
}

/// Reads instructions from the start of a byte string up to STOP.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    cursor: Cursor<'a>,
    protocol: Option<u8>,
}

impl<'a> Decoder<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { cursor: Cursor { rest: bytes, after_frame: None, nbytes: bytes.len() }, protocol: None }
    }

    /// The declared protocol; 0 without PROTO, as in Python.
    pub fn protocol(&self) -> u8 {
        self.protocol.unwrap_or(0)
    }

    /// Bytes consumed so far.
    pub fn byte_offset(&self) -> usize {
        self.cursor.byte_offset()
    }

    /// The next instruction. The caller stops at [`Op::Stop`].
    #[inline]
    pub fn next(&mut self) -> Result<Instruction<'a>> {
        let cursor = &mut self.cursor;
        cursor.leave_finished_frame();
        let byte_offset = cursor.byte_offset();
        let Some((&byte, rest)) = cursor.rest.split_first() else {
            return Err(Error::new(ErrorKind::Truncated, "the input ends before STOP").at(byte_offset, None));
        };
        cursor.rest = rest;
        let Some(entry) = lookup(byte) else {
            let message = format!("byte {byte:#04x} is not an opcode");
            return Err(Error::new(ErrorKind::UnknownOpcode, message).at(byte_offset, None));
        };
        match self.argument(entry, byte_offset) {
            Ok(arg) => Ok(Instruction { byte_offset, entry, arg }),
            Err(error) => Err(error.at(byte_offset, Some(entry.name))),
        }
    }

    #[inline]
    fn argument(&mut self, entry: &'static Entry, byte_offset: usize) -> Result<Arg<'a>> {
        // Without PROTO the writer used protocol 0 or 1; nothing in the stream tells which.
        if entry.since > self.protocol.unwrap_or(1) && entry.op != Op::Proto {
            return Err(self.too_new(entry));
        }
        let arg = self.cursor.argument(entry.arg)?;
        match (entry.op, arg) {
            (Op::Proto, _) => self.declare(arg.int()?, byte_offset)?,
            (Op::Frame, Arg::UInt(nbytes)) => self.cursor.enter_frame(nbytes)?,
            (Op::Stop, _) => self.cursor.expect_no_frame()?,
            _ => {}
        }
        Ok(arg)
    }

    #[cold]
    fn too_new(&self, entry: &Entry) -> Error {
        let declared = match self.protocol {
            Some(protocol) => format!("the pickle declares protocol {protocol}"),
            None => "the pickle declares no protocol, so at most 1".to_owned(),
        };
        let message = format!("the opcode needs protocol {}, {declared}", entry.since);
        Error::new(ErrorKind::Protocol, message)
    }

    /// PROTO must be the first opcode: every pickler writes it there, and a later one would change
    /// the meaning of names and opcodes already read. Python tolerates it, but no file needs that.
    fn declare(&mut self, protocol: i64, byte_offset: usize) -> Result<()> {
        if byte_offset != 0 {
            return Err(Error::new(ErrorKind::Protocol, "only the first opcode may declare the protocol"));
        }
        match u8::try_from(protocol) {
            Ok(protocol) if protocol <= HIGHEST_PROTOCOL => self.protocol = Some(protocol),
            _ => {
                let message = format!("protocol {protocol} is unknown; the newest is {HIGHEST_PROTOCOL}");
                return Err(Error::new(ErrorKind::Protocol, message));
            }
        }
        Ok(())
    }
}

/// Checked reads. Inside a frame `rest` ends with the frame, so no argument can cross its end.
#[derive(Debug)]
struct Cursor<'a> {
    rest: &'a [u8],
    after_frame: Option<&'a [u8]>,
    nbytes: usize,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn byte_offset(&self) -> usize {
        let left = self.rest.len().saturating_add(self.after_frame.map_or(0, <[u8]>::len));
        self.nbytes.saturating_sub(left)
    }

    #[inline]
    fn leave_finished_frame(&mut self) {
        if self.rest.is_empty()
            && let Some(after) = self.after_frame.take()
        {
            self.rest = after;
        }
    }

    fn enter_frame(&mut self, nbytes: u64) -> Result<()> {
        if self.after_frame.is_some() && !self.rest.is_empty() {
            return Err(Error::new(ErrorKind::Frame, "a frame starts inside another frame"));
        }
        self.leave_finished_frame();
        let split = usize::try_from(nbytes).ok().and_then(|nbytes| self.rest.split_at_checked(nbytes));
        let Some((frame, after)) = split else {
            let message = format!("frame of {nbytes} bytes exceeds the {} bytes that are left", self.rest.len());
            return Err(Error::new(ErrorKind::Frame, message));
        };
        self.rest = frame;
        self.after_frame = Some(after);
        Ok(())
    }

    /// A frame that goes on after STOP would make a reader of files consume bytes that a reader of
    /// memory leaves.
    fn expect_no_frame(&self) -> Result<()> {
        if self.after_frame.is_some() && !self.rest.is_empty() {
            let message = format!("the frame goes on for {} bytes after STOP", self.rest.len());
            return Err(Error::new(ErrorKind::Frame, message));
        }
        Ok(())
    }

    #[cold]
    fn short(&self, what: &str) -> Error {
        let left = self.rest.len();
        match self.after_frame {
            Some(_) => Error::new(ErrorKind::Frame, format!("{what} exceeds the {left} bytes left in the frame")),
            None => Error::new(ErrorKind::Truncated, format!("{what} exceeds the {left} bytes that are left")),
        }
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((array, rest)) = self.rest.split_first_chunk() else {
            return Err(self.short(&format!("an argument of {N} bytes")));
        };
        self.rest = rest;
        Ok(*array)
    }

    #[inline]
    fn take(&mut self, nbytes: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(nbytes).ok().and_then(|nbytes| self.rest.split_at_checked(nbytes));
        let Some((taken, rest)) = split else {
            return Err(self.short(&format!("length {nbytes}")));
        };
        self.rest = rest;
        Ok(taken)
    }

    /// The text before the next newline, which is consumed and left out.
    fn line(&mut self) -> Result<&'a [u8]> {
        let newline = self.rest.iter().position(|&byte| byte == b'\n');
        match newline.and_then(|newline| self.rest.split_at_checked(newline)) {
            Some((line, [_, rest @ ..])) => {
                self.rest = rest;
                Ok(line)
            }
            _ => Err(self.short("a line without a newline")),
        }
    }

    fn signed_length(&mut self) -> Result<u64> {
        let length = i32::from_le_bytes(self.array()?);
        u64::try_from(length).map_err(|_| Error::new(ErrorKind::BadArgument, format!("length {length} is negative")))
    }

    #[inline]
    fn argument(&mut self, kind: ArgKind) -> Result<Arg<'a>> {
        Ok(match kind {
            ArgKind::Nothing => Arg::Nothing,
            ArgKind::U8 => Arg::Int(u8::from_le_bytes(self.array()?).into()),
            ArgKind::U16 => Arg::Int(u16::from_le_bytes(self.array()?).into()),
            ArgKind::U32 => Arg::Int(u32::from_le_bytes(self.array()?).into()),
            ArgKind::I32 => Arg::Int(i32::from_le_bytes(self.array()?).into()),
            ArgKind::U64 => Arg::UInt(u64::from_le_bytes(self.array()?)),
            ArgKind::F64 => Arg::Float(f64::from_be_bytes(self.array()?)),
            ArgKind::Line => Arg::Bytes(self.line()?),
            ArgKind::TwoLines => Arg::TwoLines(self.line()?, self.line()?),
            ArgKind::Bytes1 => {
                let nbytes = u8::from_le_bytes(self.array()?);
                Arg::Bytes(self.take(nbytes.into())?)
            }
            ArgKind::Bytes4 => {
                let nbytes = u32::from_le_bytes(self.array()?);
                Arg::Bytes(self.take(nbytes.into())?)
            }
            ArgKind::BytesI4 => {
                let nbytes = self.signed_length()?;
                Arg::Bytes(self.take(nbytes)?)
            }
            ArgKind::Bytes8 => {
                let nbytes = u64::from_le_bytes(self.array()?);
                Arg::Bytes(self.take(nbytes)?)
            }
        })
    }
}
