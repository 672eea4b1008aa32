//! Strings: UTF-8 with lone surrogates, and the two escape syntaxes of protocol 0.

use std::borrow::Cow;
use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// A Python 3 string. Nearly always valid UTF-8; Python also allows lone surrogates, which UTF-8
/// does not.
///
/// Borrows from the pickle unless an escape of protocol 0 had to be resolved.
#[derive(Clone, PartialEq, Eq)]
pub struct Text<'a>(Repr<'a>);

#[derive(Clone, PartialEq, Eq)]
enum Repr<'a> {
    Borrowed(&'a str),
    Owned(Box<str>),
    Surrogates(Cow<'a, [u8]>),
}

impl<'a> Text<'a> {
    /// The string, or `None` if it holds a lone surrogate. Costs nothing: validity was found out
    /// when parsing.
    pub fn as_str(&self) -> Option<&str> {
        match &self.0 {
            Repr::Borrowed(text) => Some(text),
            Repr::Owned(text) => Some(text),
            Repr::Surrogates(_) => None,
        }
    }

    /// The bytes of `str.encode("utf-8", "surrogatepass")`.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Repr::Borrowed(text) => text.as_bytes(),
            Repr::Owned(text) => text.as_bytes(),
            Repr::Surrogates(bytes) => bytes,
        }
    }

    /// Decodes `bytes.decode("utf-8", "surrogatepass")`.
    #[inline]
    pub(crate) fn from_utf8(bytes: &'a [u8]) -> Result<Self> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Self(Repr::Borrowed(text))),
            Err(_) => Self::with_surrogates(bytes),
        }
    }

    /// Decodes `bytes.decode("raw-unicode-escape")`: Latin-1, with `\uXXXX` and `\UXXXXXXXX`.
    pub(crate) fn from_raw_unicode_escape(bytes: &'a [u8]) -> Result<Self> {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.is_ascii() && !text.contains('\\') => Ok(Self(Repr::Borrowed(text))),
            _ => raw_unicode_escape(bytes).map(Self::owned),
        }
    }

    /// Like [`Text::from_utf8`], for the ASCII-only names and ids of protocol 0.
    pub(crate) fn from_ascii(bytes: &'a [u8]) -> Result<Self> {
        if bytes.is_ascii() { Self::from_utf8(bytes) } else { Err(bad("the text is not ASCII")) }
    }

    fn owned(bytes: Vec<u8>) -> Self {
        Self(match String::from_utf8(bytes) {
            Ok(text) => Repr::Owned(text.into_boxed_str()),
            Err(error) => Repr::Surrogates(Cow::Owned(error.into_bytes())),
        })
    }

    #[cold]
    fn with_surrogates(bytes: &'a [u8]) -> Result<Self> {
        let mut rest = bytes;
        while let Err(error) = std::str::from_utf8(rest) {
            let damaged = rest.get(error.valid_up_to()..).unwrap_or_default();
            let [0xed, 0xa0..=0xbf, 0x80..=0xbf, after @ ..] = damaged else {
                let at = bytes.len().saturating_sub(damaged.len());
                return Err(bad(format!("the text is not UTF-8 at its byte {at}")));
            };
            rest = after;
        }
        Ok(Self(Repr::Surrogates(Cow::Borrowed(bytes))))
    }
}

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_str() {
            Some(text) => write!(f, "{text:?}"),
            None => write!(f, "\"{}\"", self.as_bytes().escape_ascii()),
        }
    }
}

#[cold]
fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadArgument, message)
}

fn raw_unicode_escape(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&byte, after)) = rest.split_first() {
        rest = match (byte, after) {
            (b'\\', [b'u', digits @ ..]) => push_hex(&mut out, digits, 4)?,
            (b'\\', [b'U', digits @ ..]) => push_hex(&mut out, digits, 8)?,
            // A backslash takes the byte after it along, so that `\\u0041` stays as it is.
            (b'\\', [other, after @ ..]) => {
                out.push(b'\\');
                push_code_point(&mut out, u32::from(*other))?;
                after
            }
            _ => {
                push_code_point(&mut out, u32::from(byte))?;
                after
            }
        };
    }
    Ok(out)
}

fn push_hex<'d>(out: &mut Vec<u8>, digits: &'d [u8], count: usize) -> Result<&'d [u8]> {
    let (digits, rest) = digits.split_at_checked(count).ok_or_else(|| bad("a \\u escape is cut short"))?;
    push_code_point(out, hex(digits).ok_or_else(|| bad("a \\u escape has other than hex digits"))?)?;
    Ok(rest)
}

/// The value of at most eight hex digits.
fn hex(digits: &[u8]) -> Option<u32> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    digits.iter().try_fold(0_u32, |value, &byte| Some(value.wrapping_shl(4) | digit(byte)?))
}

fn push_code_point(out: &mut Vec<u8>, code_point: u32) -> Result<()> {
    if let Some(c) = char::from_u32(code_point) {
        out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        return Ok(());
    }
    // Not a char, so a surrogate (always lead byte 0xed) or beyond Unicode.
    let Ok(0xd800..=0xdfff) = u16::try_from(code_point) else {
        return Err(bad(format!("code point {code_point:#x} does not exist")));
    };
    let [.., middle, low] = code_point.to_be_bytes();
    let second = 0x80 | ((middle & 0x0f) << 2) | (low >> 6);
    out.extend_from_slice(&[0xed, second, 0x80 | (low & 0x3f)]);
    Ok(())
}

/// Decodes the quoted `repr` of a Python 2 `str` (opcode STRING).
pub(crate) fn string_literal(line: &[u8]) -> Result<Cow<'_, [u8]>> {
    let ([b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"']) = line else {
        return Err(bad("the string is not in quotes"));
    };
    if inner.contains(&b'\\') { string_escapes(inner).map(Cow::Owned) } else { Ok(Cow::Borrowed(inner)) }
}

/// Decodes as `codecs.escape_decode` does, which keeps the backslash of an unknown escape.
fn string_escapes(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'\\' {
            rest = string_escape(&mut out, after)?;
        } else {
            out.push(byte);
        }
    }
    Ok(out)
}

fn string_escape<'b>(out: &mut Vec<u8>, after: &'b [u8]) -> Result<&'b [u8]> {
    let (&byte, rest) = after.split_first().ok_or_else(|| bad("the string ends in a backslash"))?;
    let plain = match byte {
        b'\\' | b'\'' | b'"' => byte,
        b'a' => 0x07,
        b'b' => 0x08,
        b't' => b'\t',
        b'n' => b'\n',
        b'v' => 0x0b,
        b'f' => 0x0c,
        b'r' => b'\r',
        b'0'..=b'7' => return Ok(octal(out, after)),
        b'x' => {
            let digits = rest.split_at_checked(2).and_then(|(digits, rest)| Some((hex(digits)?, rest)));
            let (value, rest) = digits.ok_or_else(|| bad("a \\x escape needs two hex digits"))?;
            out.extend(u8::try_from(value));
            return Ok(rest);
        }
        _ => {
            out.push(b'\\');
            byte
        }
    };
    out.push(plain);
    Ok(rest)
}

/// One to three octal digits; of a value above 0o377 the low byte, as Python does.
fn octal<'b>(out: &mut Vec<u8>, digits: &'b [u8]) -> &'b [u8] {
    let count = digits.iter().take(3).take_while(|byte| matches!(byte, b'0'..=b'7')).count();
    let (digits, rest) = digits.split_at_checked(count).unwrap_or((digits, &[]));
    out.push(digits.iter().fold(0_u8, |value, byte| value.wrapping_shl(3) | (byte & 7)));
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surrogates_pass_and_other_damage_does_not() {
        let lone = Text::from_utf8(b"a\xed\xa0\x80b").unwrap();
        assert_eq!(lone.as_str(), None);
        assert_eq!(lone.as_bytes(), b"a\xed\xa0\x80b");
        assert_eq!(format!("{lone:?}"), "\"a\\xed\\xa0\\x80b\"");
        let error = Text::from_utf8(b"\xed\xa0\x80\xff").unwrap_err();
        assert_eq!(error.to_string(), "at 0x0: the text is not UTF-8 at its byte 3");
        assert!(Text::from_utf8(b"\xed\xa0").is_err());
    }

    #[test]
    fn raw_unicode_escape_resolves_u_and_keeps_other_backslashes() {
        let decode = |bytes| Text::from_raw_unicode_escape(bytes);
        assert_eq!(decode(b"plain").unwrap().as_str(), Some("plain"));
        assert_eq!(decode(b"\\u20ac\xe4\\U0001f600").unwrap().as_str(), Some("\u{20ac}\u{e4}\u{1f600}"));
        assert_eq!(decode(b"\\\\u0041\\n\\").unwrap().as_str(), Some("\\\\u0041\\n\\"));
        assert_eq!(decode(b"\\udbff").unwrap().as_bytes(), b"\xed\xaf\xbf");
        assert_eq!(decode(b"\\ud800\\udfff").unwrap().as_bytes(), b"\xed\xa0\x80\xed\xbf\xbf");
        for broken in [b"\\u12".as_slice(), b"\\u12g4", b"\\U00110000"] {
            assert_eq!(decode(broken).unwrap_err().kind(), ErrorKind::BadArgument);
        }
    }

    #[test]
    fn string_literal_resolves_python_escapes() {
        assert_eq!(*string_literal(b"'it''s'").unwrap(), *b"it''s");
        assert_eq!(
            *string_literal(br#""\a\b\t\n\v\f\r\\\'\"\x41\101\0\777\q""#).unwrap(),
            *b"\x07\x08\t\n\x0b\x0c\r\\'\"AA\0\xff\\q"
        );
        for broken in [b"'".as_slice(), b"", b"abc", b"'abc\"", b"'\\'", b"'\\x4'", b"'\\xg0'"] {
            assert_eq!(string_literal(broken).unwrap_err().kind(), ErrorKind::BadArgument, "{broken:?}");
        }
    }
}
