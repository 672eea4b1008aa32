//! Integers that do not fit 64 bits, and integers written as text.

use std::borrow::Cow;
use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// Above this many bytes `Display` writes hexadecimal, which is linear; decimal is quadratic. 2048
/// bytes are 4932 digits, so all that [`Limits::max_int_digits`](crate::Limits) lets in by default
/// prints as it was written.
const MAX_DECIMAL_NBYTES: usize = 2048;

/// Decimal digits per step of a conversion: the most that fit a 32-bit limb.
const CHUNK: usize = 9;
const CHUNK_VALUE: u64 = 1_000_000_000;

/// An integer outside the range of `i64`. Borrows from the pickle unless it was written as text.
#[derive(Clone, PartialEq, Eq)]
pub struct BigInt<'a>(Cow<'a, [u8]>);

/// An integer as the pickle gives it: small ones are the rule.
pub(crate) enum Integer<'a> {
    Small(i64),
    Big(BigInt<'a>),
}

impl BigInt<'_> {
    /// The bytes: little-endian two's complement, without needless sign bytes, so at least nine.
    pub fn to_le_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The same number, owned.
    pub fn to_static(&self) -> BigInt<'static> {
        BigInt(Cow::Owned(self.0.to_vec()))
    }

    /// Whether it is below zero.
    pub fn is_negative(&self) -> bool {
        is_negative(&self.0)
    }

    /// The value, if it fits 128 bits.
    pub fn to_i128(&self) -> Option<i128> {
        let mut bytes = [if self.is_negative() { 0xff } else { 0 }; 16];
        bytes.get_mut(..self.0.len())?.copy_from_slice(&self.0);
        Some(i128::from_le_bytes(bytes))
    }

    /// The absolute value as little-endian 32-bit limbs.
    fn magnitude(&self) -> Vec<u32> {
        let mut bytes = self.0.to_vec();
        if self.is_negative() {
            negate(&mut bytes);
        }
        bytes.chunks(4).map(limb).collect()
    }
}

/// Decimal up to 2048 bytes (quadratic, at most some 10^5 steps), hexadecimal above.
impl fmt::Display for BigInt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut limbs = self.magnitude();
        if self.is_negative() {
            f.write_str("-")?;
        }
        if self.0.len() > MAX_DECIMAL_NBYTES {
            f.write_str("0x")?;
            return limbs.iter().rev().try_for_each(|limb| write!(f, "{limb:08x}"));
        }
        let mut chunks = Vec::new();
        while !limbs.is_empty() {
            chunks.push(divide(&mut limbs));
        }
        let mut chunks = chunks.iter().rev();
        chunks.next().map_or(Ok(()), |first| write!(f, "{first}"))?;
        chunks.try_for_each(|chunk| write!(f, "{chunk:09}"))
    }
}

impl fmt::Debug for BigInt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'a> Integer<'a> {
    /// Reads the bytes of LONG1 and LONG4; none at all mean zero.
    pub fn from_le_bytes(bytes: &'a [u8]) -> Self {
        let bytes = without_sign_bytes(bytes);
        match small(bytes) {
            Some(value) => Self::Small(value),
            None => Self::Big(BigInt(Cow::Borrowed(bytes))),
        }
    }

    /// Reads the decimal text of INT and LONG, with an optional sign and white space around as
    /// Python allows.
    ///
    /// Python would also take `0x10` or `1_000` here, but no pickler writes them.
    pub fn from_decimal(text: &[u8], max_int_digits: usize) -> Result<Self> {
        let text = text.trim_ascii();
        let (negative, digits) = match text {
            [b'-', digits @ ..] => (true, digits),
            [b'+', digits @ ..] | digits => (false, digits),
        };
        if digits.len() > max_int_digits {
            let message = format!("{} digits exceed max_int_digits ({max_int_digits})", digits.len());
            return Err(Error::new(ErrorKind::Limit, message));
        }
        // Python's two unpicklers disagree on a leading zero (octal or an error), so it is refused.
        let octal = matches!(digits, [b'0', rest @ ..] if rest.iter().any(|&digit| digit != b'0'));
        if octal || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            let message = format!("\"{}\" is not a decimal integer", excerpt(text));
            return Err(Error::new(ErrorKind::BadArgument, message));
        }
        Ok(Self::from_digits(negative, digits))
    }

    fn from_digits(negative: bool, digits: &[u8]) -> Self {
        let mut limbs = Vec::new();
        for chunk in digits.chunks(CHUNK) {
            let (scale, value) = chunk.iter().fold((1_u64, 0_u64), |(scale, value), digit| {
                (scale.wrapping_mul(10), value.wrapping_mul(10).wrapping_add(u64::from(digit & 0x0f)))
            });
            multiply_add(&mut limbs, scale, value);
        }
        let mut bytes: Vec<u8> = limbs.iter().flat_map(|limb| limb.to_le_bytes()).chain([0]).collect();
        if negative {
            negate(&mut bytes);
        }
        bytes.truncate(without_sign_bytes(&bytes).len());
        match small(&bytes) {
            Some(value) => Self::Small(value),
            None => Self::Big(BigInt(Cow::Owned(bytes))),
        }
    }
}

/// At most 40 bytes of a text, for a message.
pub(crate) fn excerpt(text: &[u8]) -> String {
    let shown = text.get(..40).unwrap_or(text);
    let more = if shown.len() < text.len() { "..." } else { "" };
    format!("{}{more}", shown.escape_ascii())
}

fn is_negative(bytes: &[u8]) -> bool {
    bytes.last().is_some_and(|last| last & 0x80 != 0)
}

fn without_sign_bytes(mut bytes: &[u8]) -> &[u8] {
    // A last byte that only repeats the sign of the one before it.
    while let [kept @ .., 0x00 | 0xff] = bytes
        && is_negative(kept) == is_negative(bytes)
    {
        bytes = kept;
    }
    bytes
}

fn small(bytes: &[u8]) -> Option<i64> {
    let mut buffer = [if is_negative(bytes) { 0xff } else { 0 }; 8];
    buffer.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(buffer))
}

fn limb(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |limb, &byte| (limb << 8) | u32::from(byte))
}

/// Two's complement negation in place.
fn negate(bytes: &mut [u8]) {
    let mut carry = true;
    for byte in bytes {
        (*byte, carry) = (!*byte).overflowing_add(u8::from(carry));
    }
}

fn multiply_add(limbs: &mut Vec<u32>, scale: u64, value: u64) {
    let mut carry = value;
    for limb in limbs.iter_mut() {
        carry = u64::from(*limb).wrapping_mul(scale).wrapping_add(carry);
        *limb = low_half(carry);
        carry >>= 32;
    }
    if carry != 0 {
        limbs.push(low_half(carry));
    }
}

/// Divides by [`CHUNK_VALUE`], drops leading zero limbs and gives the remainder.
fn divide(limbs: &mut Vec<u32>) -> u64 {
    let mut remainder = 0_u64;
    for limb in limbs.iter_mut().rev() {
        let dividend = (remainder << 32) | u64::from(*limb);
        *limb = low_half(dividend / CHUNK_VALUE);
        remainder = dividend % CHUNK_VALUE;
    }
    while limbs.last() == Some(&0) {
        limbs.pop();
    }
    remainder
}

fn low_half(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decimal(text: &str) -> String {
        match Integer::from_decimal(text.as_bytes(), 4300).unwrap() {
            Integer::Small(value) => format!("small {value}"),
            Integer::Big(value) => format!("big {value}"),
        }
    }

    #[test]
    fn text_round_trips_at_the_edges() {
        for small in ["0", "-1", "127", "128", "-128", "9223372036854775807", "-9223372036854775808"] {
            assert_eq!(decimal(small), format!("small {small}"));
        }
        for big in ["9223372036854775808", "-9223372036854775809", "18446744073709551616", "1000000000000000000000"] {
            assert_eq!(decimal(big), format!("big {big}"));
        }
        let nines = "9".repeat(4300);
        assert_eq!(decimal(&nines), format!("big {nines}"));
        assert_eq!(decimal(" +12\r"), "small 12");
        assert_eq!(decimal("000"), "small 0");
    }

    #[test]
    fn text_that_is_no_number_is_refused() {
        for text in ["", "-", "1a", "010", "-07", "0x10", "1_0", "--1", "1.0"] {
            let error = Integer::from_decimal(text.as_bytes(), 4300).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::BadArgument, "{text:?}");
        }
        let error = Integer::from_decimal(&[b'1'; 4301], 4300).err().unwrap();
        assert_eq!(error.to_string(), "at 0x0: 4301 digits exceed max_int_digits (4300)");
    }

    #[test]
    fn bytes_are_stripped_to_the_sign() {
        for (bytes, value) in
            [(&[][..], 0), (&[0xff; 12], -1), (&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0], 128), (&[0x80, 0xff], -128)]
        {
            assert!(matches!(Integer::from_le_bytes(bytes), Integer::Small(got) if got == value), "{bytes:?}");
        }
        let Integer::Big(big) = Integer::from_le_bytes(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0]) else { panic!("small") };
        assert_eq!((big.to_i128(), big.to_le_bytes().len()), (Some(1 << 63), 9));
        let Integer::Big(big) = Integer::from_le_bytes(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xfe]) else { panic!("small") };
        assert_eq!(big.to_string(), big.to_i128().unwrap().to_string());
        assert!(big.is_negative());
    }

    #[test]
    fn long_integers_print_as_hex_in_linear_time() {
        let bytes = vec![0x11; 1 << 20];
        let Integer::Big(big) = Integer::from_le_bytes(&bytes) else { panic!("small") };
        let text = big.to_string();
        assert_eq!((&text[..6], text.len(), big.to_i128()), ("0x1111", 2 + (2 << 20), None));
    }
}
