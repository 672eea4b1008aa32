//! Writing pickles of protocol 2, opcode by opcode.

use crate::error::{Error, ErrorKind, Result};
use crate::opcode::{Op, lookup};

/// Writes one pickle as Python's pickler would: the caller names the values in order, the writer
/// chooses the shortest opcode and numbers what is put into the memo.
///
/// The stack is not checked: a caller that leaves the stack in disorder makes a pickle that
/// [`Pickle::parse`](crate::Pickle::parse) refuses.
///
/// ```
/// use reweft_pickle::{Limits, Pickle, Writer};
///
/// let mut writer = Writer::new();
/// writer.empty_dict();
/// writer.put();
/// writer.text("epoch")?;
/// writer.put();
/// writer.int(3);
/// writer.set_item();
/// let bytes = writer.finish();
/// assert_eq!(bytes, b"\x80\x02}q\0X\x05\0\0\0epochq\x01K\x03s.");
/// assert!(Pickle::parse(&bytes, &Limits::default()).is_ok());
/// # Ok::<(), reweft_pickle::Error>(())
/// ```
#[derive(Debug)]
pub struct Writer {
    out: Vec<u8>,
    memo: u32,
}

/// A value in the memo of the [`Writer`] that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memoized(u32);

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// Begins a pickle.
    pub fn new() -> Self {
        Self { out: vec![Op::Proto as u8, 2], memo: 0 }
    }

    /// Ends the pickle, whose value is the one on the stack.
    pub fn finish(mut self) -> Vec<u8> {
        self.op(Op::Stop);
        self.out
    }

    fn op(&mut self, op: Op) {
        self.out.push(op as u8);
    }

    /// An opcode with a number of one byte, or another with one of four.
    fn op_u8_or_u32(&mut self, short: Op, long: Op, value: u32) {
        if let Ok(byte) = u8::try_from(value) {
            self.out.extend([short as u8, byte]);
        } else {
            self.op(long);
            self.out.extend(value.to_le_bytes());
        }
    }

    /// Puts the value on the stack into the memo, under the next number.
    pub fn put(&mut self) -> Memoized {
        let memoized = Memoized(self.memo);
        self.op_u8_or_u32(Op::BinPut, Op::LongBinPut, self.memo);
        self.memo = self.memo.saturating_add(1);
        memoized
    }

    /// The value from the memo, the same object.
    pub fn get(&mut self, memoized: Memoized) {
        self.op_u8_or_u32(Op::BinGet, Op::LongBinGet, memoized.0);
    }

    /// A class or function by name.
    ///
    /// # Errors
    /// [`ErrorKind::BadArgument`] for a name with a newline, which would end it.
    pub fn global(&mut self, module: &str, name: &str) -> Result<()> {
        if module.contains('\n') || name.contains('\n') {
            return Err(self.refused(Op::Global, "a name has a newline in it"));
        }
        self.op(Op::Global);
        for part in [module, "\n", name, "\n"] {
            self.out.extend(part.as_bytes());
        }
        Ok(())
    }

    /// A text.
    ///
    /// # Errors
    /// [`ErrorKind::BadArgument`] for one of 4 GiB or more, which protocol 2 cannot say.
    pub fn text(&mut self, text: &str) -> Result<()> {
        let nbytes = u32::try_from(text.len()).map_err(|_| self.refused(Op::BinUnicode, "a text takes 4 GiB"))?;
        self.op(Op::BinUnicode);
        self.out.extend(nbytes.to_le_bytes());
        self.out.extend(text.as_bytes());
        Ok(())
    }

    fn refused(&self, op: Op, what: &str) -> Error {
        Error::new(ErrorKind::BadArgument, what).at(self.out.len(), lookup(op as u8).map(|entry| entry.name))
    }

    /// A number from 0.
    pub fn int(&mut self, value: u64) {
        if let Ok(byte) = u8::try_from(value) {
            self.out.extend([Op::BinInt1 as u8, byte]);
        } else if let Ok(short) = u16::try_from(value) {
            self.op(Op::BinInt2);
            self.out.extend(short.to_le_bytes());
        } else if let Ok(int) = i32::try_from(value) {
            self.op(Op::BinInt);
            self.out.extend(int.to_le_bytes());
        } else {
            // Two's complement with a sign bit, so 1 to 9 bytes; these values need at least 4.
            let bytes = i128::from(value).to_le_bytes();
            let nbytes = 64_u32.saturating_sub(value.leading_zeros()) / 8;
            let nbytes = u8::try_from(nbytes).unwrap_or(8).saturating_add(1);
            self.out.extend([Op::Long1 as u8, nbytes]);
            self.out.extend(bytes.iter().take(usize::from(nbytes)));
        }
    }

    /// True or false.
    pub fn bool(&mut self, value: bool) {
        self.op(if value { Op::NewTrue } else { Op::NewFalse });
    }

    /// A mark, for [`tuple`](Self::tuple) and [`set_items`](Self::set_items).
    pub fn mark(&mut self) {
        self.op(Op::Mark);
    }

    /// The empty tuple.
    pub fn empty_tuple(&mut self) {
        self.op(Op::EmptyTuple);
    }

    /// A tuple of the last 1 to 3 values on the stack, or of those behind the mark if there are more.
    pub fn tuple(&mut self, len: usize) {
        self.op(match len {
            1 => Op::Tuple1,
            2 => Op::Tuple2,
            3 => Op::Tuple3,
            _ => Op::Tuple,
        });
    }

    /// A new dict.
    pub fn empty_dict(&mut self) {
        self.op(Op::EmptyDict);
    }

    /// Puts the key and value on the stack into the dict below them.
    pub fn set_item(&mut self) {
        self.op(Op::SetItem);
    }

    /// Puts the keys and values behind the mark into the dict below it.
    pub fn set_items(&mut self) {
        self.op(Op::SetItems);
    }

    /// Calls the function below the tuple of its arguments.
    pub fn reduce(&mut self) {
        self.op(Op::Reduce);
    }

    /// The object that the value on the stack is the persistent id of.
    pub fn persistent(&mut self) {
        self.op(Op::BinPersId);
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::{Limits, Pickle, Value};

    #[test]
    fn numbers_are_read_back_and_as_short_as_pythons() {
        // (value, bytes that Python 3 writes for it between PROTO and STOP)
        let cases: [(u64, &[u8]); 13] = [
            (0, b"K\0"),
            (255, b"K\xff"),
            (256, b"M\0\x01"),
            (65535, b"M\xff\xff"),
            (65536, b"J\0\0\x01\0"),
            (0x7fff_ffff, b"J\xff\xff\xff\x7f"),
            (0x8000_0000, b"\x8a\x05\0\0\0\x80\0"),
            (0xffff_ffff, b"\x8a\x05\xff\xff\xff\xff\0"),
            (0x1_0000_0000, b"\x8a\x05\0\0\0\0\x01"),
            (0x7f_ffff_ffff, b"\x8a\x05\xff\xff\xff\xff\x7f"),
            (0x80_0000_0000, b"\x8a\x06\0\0\0\0\x80\0"),
            (0x7fff_ffff_ffff_ffff, b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),
            (u64::MAX, b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0"),
        ];
        for (value, wanted) in cases {
            let mut writer = Writer::new();
            writer.int(value);
            let bytes = writer.finish();
            assert_eq!(bytes, [b"\x80\x02", wanted, b"."].concat(), "{value}");
            let pickle = Pickle::parse(&bytes, &Limits::default()).unwrap();
            let wanted = i64::try_from(value).ok();
            assert_eq!(pickle.as_i64(pickle.root()), wanted, "{value}");
        }
    }

    #[test]
    fn a_long_memo_and_all_tuples() {
        let mut writer = Writer::new();
        writer.mark();
        let mut first = None;
        for number in 0..300 {
            writer.text(&format!("ключ {number}")).unwrap();
            let put = writer.put();
            first.get_or_insert(put);
            assert_eq!(put, Memoized(number));
        }
        writer.get(first.unwrap());
        writer.get(Memoized(299));
        writer.empty_tuple();
        writer.tuple(1);
        writer.bool(true);
        writer.bool(false);
        writer.tuple(2);
        writer.global("torch", "uint16").unwrap();
        assert!(writer.global("os\nsystem", "x").is_err());
        writer.int(7);
        writer.tuple(1);
        writer.reduce();
        writer.tuple(99);
        let bytes = writer.finish();
        let pickle = Pickle::parse(&bytes, &Limits::default()).unwrap();
        let items = pickle.as_tuple(pickle.root()).unwrap();
        assert_eq!(items.len(), 305);
        assert_eq!(pickle.as_str(items[300]), Some("ключ 0"));
        assert_eq!(items[301], items[299]);
        assert!(matches!(pickle.get(items[304]), Value::Object(_)));
    }
}
