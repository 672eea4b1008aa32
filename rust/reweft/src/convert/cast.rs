//! Casts between float dtypes, bit for bit as torch's CPU does them.
//!
//! Every cast goes through the bits of a `float32`, as torch's do; from `float64` that can round twice. Values are
//! rounded to the nearest, ties to even. What lies behind the largest value becomes infinity, or NaN in the two fnuz
//! dtypes, which have no infinity, or the largest value in `float8_e4m3fn`. `float8_e8m0fnu` drops the sign.
//!
//! NaN stays NaN. Its bits are those of torch's vector loop on x86-64. The loop for the last few elements and for strided
//! tensors gives other NaN bits in three casts (`float32` and `float64` to `bfloat16`, `float16` to `float32`), so that
//! torch's own answer depends on where an element lies; here it does not.

use std::sync::LazyLock;

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// Elements that pass through the buffer of `float32` bits at a time; it stays in the first cache.
const CHUNK: usize = 1024;

/// Whether [`cast`] converts from one dtype to the other: any two of `float64`, `float32`, `float16`, `bfloat16` and
/// the five kinds of `float8`, and any dtype to itself.
pub fn can_cast(from: Dtype, to: Dtype) -> bool {
    from == to || from.is_float() && to.is_float()
}

/// Converts elements into a new buffer.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for any pair that [`can_cast`] denies, [`ErrorKind::Format`] for a partial element,
/// [`ErrorKind::Limit`] for a result that no memory can hold.
///
/// # Examples
/// ```
/// use reweft::{Dtype, convert};
///
/// let half = convert::cast(&1.5_f32.to_le_bytes(), Dtype::F32, Dtype::F16)?;
/// assert_eq!(half, 0x3e00_u16.to_le_bytes());
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn cast(bytes: &[u8], from: Dtype, to: Dtype) -> Result<Vec<u8>> {
    let (item, wanted) = itemsizes(from, to)?;
    let nbytes = (bytes.len() / item).checked_mul(wanted);
    let nbytes = nbytes.ok_or_else(|| Error::new(ErrorKind::Limit, "the cast does not fit the address space"))?;
    let mut out = vec![0; nbytes];
    cast_into(bytes, from, to, &mut out)?;
    Ok(out)
}

/// Converts elements into `out`, which must have room for exactly as many. Allocates nothing.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for any pair that [`can_cast`] denies, [`ErrorKind::Format`] for a partial element,
/// [`ErrorKind::Usage`] for an `out` of another length.
pub fn cast_into(bytes: &[u8], from: Dtype, to: Dtype, out: &mut [u8]) -> Result<()> {
    let (item, wanted) = itemsizes(from, to)?;
    if !bytes.len().is_multiple_of(item) {
        return Err(Error::format(format!("{} bytes are no whole number of {from} elements", bytes.len())));
    }
    if (bytes.len() / item).checked_mul(wanted) != Some(out.len()) {
        let what = format!("{} elements of {to} do not fit {} bytes exactly", bytes.len() / item, out.len());
        return Err(Error::new(ErrorKind::Usage, what));
    }
    if from == to {
        out.copy_from_slice(bytes);
        return Ok(());
    }
    let decode = Decode::of(from);
    let encode = Encode::of(from, to);
    let mut bits = [0_u32; CHUNK];
    for (source, target) in bytes.chunks(CHUNK * item).zip(out.chunks_mut(CHUNK * wanted)) {
        let bits = &mut bits[..source.len() / item];
        decode.run(source, bits);
        encode.run(bits, target);
    }
    Ok(())
}

/// Bytes of an element of each dtype, if there is a cast.
fn itemsizes(from: Dtype, to: Dtype) -> Result<(usize, usize)> {
    let size = |dtype: Dtype| dtype.itemsize().and_then(|size| usize::try_from(size).ok());
    match (size(from), size(to)) {
        (Some(item), Some(wanted)) if can_cast(from, to) => Ok((item, wanted)),
        _ => Err(Error::new(ErrorKind::Unsupported, format!("no cast from {from} to {to}"))),
    }
}

/// How elements become `float32` bits.
#[expect(clippy::large_enum_variant, reason = "one lives on the stack for the time of a cast")]
enum Decode {
    F64,
    F32,
    F16,
    BF16,
    Small([u32; 256]),
}

impl Decode {
    fn of(from: Dtype) -> Self {
        match from {
            Dtype::F64 => Self::F64,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::BF16,
            Dtype::F8E8M0 => Self::Small(table(scale_to_single)),
            _ => match Small::of(from) {
                Some(small) => Self::Small(table(|code| small.to_single(code))),
                None => Self::F32,
            },
        }
    }

    fn run(&self, source: &[u8], bits: &mut [u32]) {
        match self {
            Self::F64 => each(source, bits, |item| narrow(u64::from_le_bytes(item))),
            Self::F32 => each(source, bits, u32::from_le_bytes),
            Self::F16 => each(source, bits, |item| half_to_single(u16::from_le_bytes(item))),
            Self::BF16 => each(source, bits, |item| u32::from(u16::from_le_bytes(item)) << 16),
            Self::Small(table) => each(source, bits, |[code]| table[usize::from(code)]),
        }
    }
}

/// How `float32` bits become elements.
enum Encode {
    F64,
    F32,
    F16,
    /// With the bits of NaN.
    BF16(u16),
    /// By the upper half of the bits.
    Small(&'static [u8; 1 << 16]),
}

impl Encode {
    fn of(from: Dtype, to: Dtype) -> Self {
        match to {
            Dtype::F64 => Self::F64,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::BF16(if matches!(from, Dtype::F32 | Dtype::F64) { 0xffff } else { 0x7fc0 }),
            Dtype::F8E4M3 => Self::Small(&E4M3),
            Dtype::F8E5M2 => Self::Small(&E5M2),
            Dtype::F8E4M3Fnuz => Self::Small(&E4M3_FNUZ),
            Dtype::F8E5M2Fnuz => Self::Small(&E5M2_FNUZ),
            Dtype::F8E8M0 => Self::Small(&E8M0),
            _ => Self::F32,
        }
    }

    fn run(&self, bits: &[u32], target: &mut [u8]) {
        match self {
            Self::F64 => fill(bits, target, |bits| widen(bits).to_le_bytes()),
            Self::F32 => fill(bits, target, u32::to_le_bytes),
            Self::F16 => fill(bits, target, |bits| single_to_half(bits).to_le_bytes()),
            Self::BF16(nan) => fill(bits, target, |bits| single_to_brain(bits, *nan).to_le_bytes()),
            Self::Small(table) => fill(bits, target, |bits| [table[upper_half(bits)]]),
        }
    }
}

/// Maps elements of `N` bytes to bits; the compiler makes a vector loop of it.
fn each<const N: usize>(source: &[u8], bits: &mut [u32], convert: impl Fn([u8; N]) -> u32) {
    for (item, bits) in source.as_chunks().0.iter().zip(bits) {
        *bits = convert(*item);
    }
}

/// Maps bits to elements of `N` bytes.
fn fill<const N: usize>(bits: &[u32], target: &mut [u8], convert: impl Fn(u32) -> [u8; N]) {
    for (bits, item) in bits.iter().zip(target.as_chunks_mut().0) {
        *item = convert(*bits);
    }
}

const SIGN: u32 = 1 << 31;
const INFINITY: u32 = 0x7f80_0000;
/// The highest bit of the significand, which a processor sets in every NaN that it converts.
const QUIET: u32 = 1 << 22;

/// `float64` to `float32`. NaN keeps its sign and its highest bits.
#[expect(clippy::cast_possible_truncation, reason = "rounding is what the caller asked for")]
fn narrow(bits: u64) -> u32 {
    let value = f64::from_bits(bits);
    let nan = ((bits >> 32) as u32 & SIGN) | INFINITY | QUIET | ((bits >> 29) as u32 & (QUIET - 1));
    if value.is_nan() { nan } else { (value as f32).to_bits() }
}

/// `float32` to `float64`, which loses nothing.
fn widen(bits: u32) -> u64 {
    let value = f32::from_bits(bits);
    let nan = (u64::from(bits & SIGN) << 32) | (0x7ff8 << 48) | (u64::from(bits & (QUIET - 1)) << 29);
    if value.is_nan() { nan } else { f64::from(value).to_bits() }
}

/// `float16` to `float32`, which loses nothing.
fn half_to_single(half: u16) -> u32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff) << 13;
    // Read as float32, the number is 2^-112 of what it was, whether denormal or not.
    let number = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = magnitude | INFINITY | if magnitude > 0x7c00 << 13 { QUIET } else { 0 };
    sign | if magnitude >= 0x7c00 << 13 { special } else { number }
}

/// `float32` to `float16`.
#[expect(clippy::cast_possible_truncation, reason = "every branch leaves 16 bits")]
fn single_to_half(bits: u32) -> u16 {
    /// 0.5 has the exponent at which the last bit of the significand is worth the smallest denormal of `float16`.
    const DENORMAL: u32 = 126 << 23;
    let sign = (bits & SIGN) >> 16;
    let magnitude = bits & !SIGN;
    let nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    let denormal = (f32::from_bits(magnitude) + f32::from_bits(DENORMAL)).to_bits().wrapping_sub(DENORMAL);
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let finite = if magnitude < (127 - 14) << 23 { denormal } else { normal.min(0x7c00) };
    let half = if magnitude > INFINITY { nan } else { finite };
    (sign | half) as u16
}

/// `float32` to `bfloat16`.
fn single_to_brain(bits: u32, nan: u16) -> u16 {
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & !SIGN > INFINITY { nan } else { rounded as u16 }
}

/// The upper half of the bits, odd if the lower half is not zero: enough to round to a `float8` as if all were there,
/// because at least two bits stand behind the last one that is kept.
fn upper_half(bits: u32) -> usize {
    ((bits >> 16) | u32::from(bits & 0xffff != 0)) as usize
}

/// A `float8` with a sign.
struct Small {
    /// Bits of the significand.
    mantissa: u32,
    bias: i32,
    /// The code of the largest value.
    largest: u8,
    /// What a larger value becomes.
    overflow: u8,
    nan: u8,
    /// Whether neither zero nor NaN nor overflow has a sign.
    unsigned_specials: bool,
}

impl Small {
    fn of(dtype: Dtype) -> Option<Self> {
        let (mantissa, bias, largest, overflow, nan, unsigned_specials) = match dtype {
            Dtype::F8E4M3 => (3, 7, 0x7e, 0x7e, 0x7f, false),
            Dtype::F8E5M2 => (2, 15, 0x7b, 0x7c, 0x7f, false),
            Dtype::F8E4M3Fnuz => (3, 8, 0x7f, 0x80, 0x80, true),
            Dtype::F8E5M2Fnuz => (2, 16, 0x7f, 0x80, 0x80, true),
            _ => return None,
        };
        Some(Self { mantissa, bias, largest, overflow, nan, unsigned_specials })
    }

    /// Rounds `float32` bits to a code.
    #[expect(clippy::cast_possible_truncation, reason = "codes have 7 bits beside the sign")]
    fn round(&self, bits: u32) -> u8 {
        let magnitude = bits & !SIGN;
        let code = if magnitude > INFINITY {
            self.nan
        } else {
            let code = self.round_magnitude(magnitude);
            if code > u32::from(self.largest) { self.overflow } else { code as u8 }
        };
        let signed = !self.unsigned_specials || !matches!(code, 0 | 0x80);
        if signed && bits & SIGN != 0 { code | 0x80 } else { code }
    }

    /// Rounds to a code that may be larger than the largest.
    fn round_magnitude(&self, magnitude: u32) -> u32 {
        // The number is `significand * 2^(exponent - 127 - 23)`; float32's own denormals are far below every float8.
        let significand = (magnitude & 0x7f_ffff) | 0x80_0000;
        let exponent = (magnitude >> 23).cast_signed() - 127 + self.bias;
        let shift = 23 - self.mantissa + (1 - exponent).max(0).cast_unsigned();
        if magnitude >> 23 == 0 || shift > 24 {
            return 0;
        }
        let (kept, rest, tie) = (significand >> shift, significand & ((1 << shift) - 1), 1 << (shift - 1));
        let up = rest > tie || rest == tie && kept & 1 == 1;
        // A carry runs from the significand into the exponent, which is just what the code needs.
        kept + u32::from(up) + ((exponent.max(1) - 1).cast_unsigned() << self.mantissa)
    }

    /// The `float32` bits of a code.
    fn to_single(&self, code: u8) -> u32 {
        let sign = u32::from(code & 0x80) << 24;
        if self.unsigned_specials && code == 0x80 {
            return INFINITY | 1;
        }
        let magnitude = u32::from(code & 0x7f);
        if !self.unsigned_specials && magnitude > u32::from(self.largest) {
            let significand = (magnitude << (23 - self.mantissa)) & 0x7f_ffff;
            return sign | INFINITY | significand | if significand == 0 { 0 } else { QUIET };
        }
        // Read as float32, the number is `2^(bias - 127)` of what it is, whether denormal or not.
        let scale = f32::from_bits((254 - self.bias).cast_unsigned() << 23);
        sign | (f32::from_bits(magnitude << (23 - self.mantissa)) * scale).to_bits()
    }
}

/// The `float32` bits of a power of two.
fn scale_to_single(code: u8) -> u32 {
    match code {
        0 => 1 << 22,
        0xff => INFINITY | 1,
        code => u32::from(code) << 23,
    }
}

/// Rounds to a power of two: the code is the exponent of `float32`, and the significand rounds it up.
#[expect(clippy::cast_possible_truncation, reason = "an exponent has 8 bits")]
fn single_to_scale(bits: u32) -> u8 {
    let exponent = (bits >> 23) & 0xff;
    let significand = bits & 0x7f_ffff;
    // A tie goes up: the code below stands for a number that is no even one. But zero stays zero.
    let up = significand > QUIET || significand == QUIET && exponent > 0;
    if exponent == 0xff { 0xff } else { (exponent + u32::from(up)) as u8 }
}

static E4M3: LazyLock<Box<[u8; 1 << 16]>> = LazyLock::new(|| by_upper_half(Dtype::F8E4M3));
static E5M2: LazyLock<Box<[u8; 1 << 16]>> = LazyLock::new(|| by_upper_half(Dtype::F8E5M2));
static E4M3_FNUZ: LazyLock<Box<[u8; 1 << 16]>> = LazyLock::new(|| by_upper_half(Dtype::F8E4M3Fnuz));
static E5M2_FNUZ: LazyLock<Box<[u8; 1 << 16]>> = LazyLock::new(|| by_upper_half(Dtype::F8E5M2Fnuz));
static E8M0: LazyLock<Box<[u8; 1 << 16]>> = LazyLock::new(|| by_upper_half(Dtype::F8E8M0));

/// The code for every upper half of `float32` bits.
#[expect(clippy::large_stack_arrays, reason = "64 KiB on their way to the heap, once per dtype")]
fn by_upper_half(dtype: Dtype) -> Box<[u8; 1 << 16]> {
    let small = Small::of(dtype);
    let round = |bits| small.as_ref().map_or_else(|| single_to_scale(bits), |small| small.round(bits));
    let mut table = Box::new([0; 1 << 16]);
    for (code, upper) in table.iter_mut().zip(0_u32..) {
        *code = round(upper << 16);
    }
    table
}

fn table(convert: impl Fn(u8) -> u32) -> [u32; 256] {
    let mut table = [0; 256];
    for (bits, code) in table.iter_mut().zip(0..=u8::MAX) {
        *bits = convert(code);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    // Equality with torch over all inputs is shown in tests/parity/test_casts.py.

    const FLOATS: [Dtype; 9] = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::F8E4M3,
        Dtype::F8E5M2,
        Dtype::F8E4M3Fnuz,
        Dtype::F8E5M2Fnuz,
        Dtype::F8E8M0,
    ];

    fn one(value: f32, to: Dtype) -> u64 {
        let bytes = cast(&value.to_le_bytes(), Dtype::F32, to).unwrap();
        bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte))
    }

    #[test]
    fn ties_go_to_even_and_overflow_to_what_the_dtype_has() {
        assert_eq!(one(1.0 + 1.0 / 2048.0, Dtype::F16), 0x3c00);
        assert_eq!(one(1.0 + 3.0 / 2048.0, Dtype::F16), 0x3c02);
        assert_eq!(one(65520.0, Dtype::F16), 0x7c00);
        assert_eq!(one(65519.0, Dtype::F16), 0x7bff);
        assert_eq!(one(-1e-8, Dtype::F16), 0x8000);
        let overflow = [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::F8E4M3Fnuz, Dtype::F8E5M2Fnuz].map(|to| one(-1e9, to));
        assert_eq!(overflow, [0xfe, 0xfc, 0x80, 0x80]);
        assert_eq!((one(1.5, Dtype::F8E8M0), one(-1.4, Dtype::F8E8M0)), (0x80, 0x7f));
    }

    #[test]
    fn there_and_back_loses_nothing_in_a_wider_dtype() {
        let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (narrow, wide) in [(Dtype::F16, Dtype::F32), (Dtype::F16, Dtype::F64), (Dtype::F8E4M3, Dtype::F32)] {
            let back = cast(&cast(&halves, narrow, wide).unwrap(), wide, narrow).unwrap();
            let differ = halves.chunks(2).zip(back.chunks(2)).filter(|(a, b)| a != b).count();
            // A signalling NaN comes back quiet.
            assert_eq!(differ, if narrow == Dtype::F16 { 2 * 511 } else { 0 }, "{narrow} {wide}");
        }
    }

    #[test]
    fn lengths_are_checked_and_chunks_meet() {
        for from in FLOATS {
            for to in FLOATS {
                let (item, wanted) = itemsizes(from, to).unwrap();
                for numel in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
                    let bytes: Vec<u8> = (0..251).cycle().take(numel * item).collect();
                    let whole = cast(&bytes, from, to).unwrap();
                    let single: Vec<u8> = bytes.chunks(item).flat_map(|item| cast(item, from, to).unwrap()).collect();
                    assert_eq!((whole.len(), &whole), (numel * wanted, &single), "{from} {to}");
                }
                assert_eq!(cast_into(&[0; 8], from, to, &mut [0; 99]).unwrap_err().kind(), ErrorKind::Usage);
            }
        }
        assert_eq!(cast(&[0; 3], Dtype::F32, Dtype::F16).unwrap_err().kind(), ErrorKind::Format);
        assert_eq!(cast(&[0; 4], Dtype::F32, Dtype::I32).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(cast(&[7; 4], Dtype::I32, Dtype::I32).unwrap(), [7; 4]);
        assert_eq!(cast(&[7], Dtype::F4, Dtype::F4).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
