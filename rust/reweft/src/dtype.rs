//! The dtypes that checkpoints and artifacts store, as one table.
//!
//! Every name, code and size used anywhere in the project is derived from [`Dtype::ALL`]; there is no second list.
//! Sources: the `c10::ScalarType` enumeration, the storage classes written by `torch.save`, the type strings of
//! `numpy`'s array interface and the dtype names of the safetensors format.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

macro_rules! dtypes {
    ($($variant:ident, $name:literal, $bits:literal, $c10:expr, $export:expr, $class:expr, $safetensors:expr, $numpy:expr;)*) => {
        /// The type of a tensor's elements.
        ///
        /// Sub-byte types count one element per value ([`Dtype::F4`]) or per byte ([`Dtype::F4x2`]), as their format does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Dtype {
            $(#[doc = concat!("`", $name, "`, ", stringify!($bits), " bits an element.")] $variant,)*
        }

        impl Dtype {
            /// Every dtype, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$variant => Row { name: $name, bits: $bits, c10: $c10, export: $export, class: $class, safetensors: $safetensors, numpy: $numpy },)*
                }
            }
        }
    };
}

/// One line of the table.
struct Row {
    name: &'static str,
    bits: u32,
    c10: Option<i32>,
    export: Option<u32>,
    class: Option<&'static str>,
    safetensors: Option<&'static str>,
    numpy: Option<&'static str>,
}

// name in torch, bits an element, c10 code, code in exported programs, torch storage class, safetensors name, numpy kind and size
dtypes! {
    U8,       "uint8",             8,   Some(0),  Some(1),  Some("ByteStorage"),          Some("U8"),         Some("u1");
    I8,       "int8",              8,   Some(1),  Some(2),  Some("CharStorage"),          Some("I8"),         Some("i1");
    I16,      "int16",             16,  Some(2),  Some(3),  Some("ShortStorage"),         Some("I16"),        Some("i2");
    I32,      "int32",             32,  Some(3),  Some(4),  Some("IntStorage"),           Some("I32"),        Some("i4");
    I64,      "int64",             64,  Some(4),  Some(5),  Some("LongStorage"),          Some("I64"),        Some("i8");
    F16,      "float16",           16,  Some(5),  Some(6),  Some("HalfStorage"),          Some("F16"),        Some("f2");
    F32,      "float32",           32,  Some(6),  Some(7),  Some("FloatStorage"),         Some("F32"),        Some("f4");
    F64,      "float64",           64,  Some(7),  Some(8),  Some("DoubleStorage"),        Some("F64"),        Some("f8");
    C32,      "complex32",         32,  Some(8),  Some(9),  None,                         None,               None;
    C64,      "complex64",         64,  Some(9),  Some(10), Some("ComplexFloatStorage"),  Some("C64"),        Some("c8");
    C128,     "complex128",        128, Some(10), Some(11), Some("ComplexDoubleStorage"), None,               Some("c16");
    Bool,     "bool",              8,   Some(11), Some(12), Some("BoolStorage"),          Some("BOOL"),       Some("b1");
    QInt8,    "qint8",             8,   Some(12), None,     Some("QInt8Storage"),         None,               None;
    QUInt8,   "quint8",            8,   Some(13), None,     Some("QUInt8Storage"),        None,               None;
    QInt32,   "qint32",            32,  Some(14), None,     Some("QInt32Storage"),        None,               None;
    BF16,     "bfloat16",          16,  Some(15), Some(13), Some("BFloat16Storage"),      Some("BF16"),       None;
    QUInt4x2, "quint4x2",          8,   Some(16), None,     Some("QUInt4x2Storage"),      None,               None;
    QUInt2x4, "quint2x4",          8,   Some(17), None,     Some("QUInt2x4Storage"),      None,               None;
    Bits1x8,  "bits1x8",           8,   Some(18), None,     None,                         None,               None;
    Bits2x4,  "bits2x4",           8,   Some(19), None,     None,                         None,               None;
    Bits4x2,  "bits4x2",           8,   Some(20), None,     None,                         None,               None;
    Bits8,    "bits8",             8,   Some(21), None,     None,                         None,               None;
    Bits16,   "bits16",            16,  Some(22), None,     None,                         None,               None;
    F8E5M2,   "float8_e5m2",       8,   Some(23), Some(30), None,                         Some("F8_E5M2"),    None;
    F8E4M3,   "float8_e4m3fn",     8,   Some(24), Some(29), None,                         Some("F8_E4M3"),    None;
    F8E5M2Fnuz, "float8_e5m2fnuz", 8,   Some(25), Some(32), None,                         Some("F8_E5M2FNUZ"), None;
    F8E4M3Fnuz, "float8_e4m3fnuz", 8,   Some(26), Some(31), None,                         Some("F8_E4M3FNUZ"), None;
    U16,      "uint16",            16,  Some(27), Some(28), None,                         Some("U16"),        Some("u2");
    U32,      "uint32",            32,  Some(28), Some(34), None,                         Some("U32"),        Some("u4");
    U64,      "uint64",            64,  Some(29), Some(35), None,                         Some("U64"),        Some("u8");
    F8E8M0,   "float8_e8m0fnu",    8,   Some(44), Some(33), None,                         Some("F8_E8M0"),    None;
    F4x2,     "float4_e2m1fn_x2",  8,   Some(45), None,     None,                         None,               None;
    BC32,     "bcomplex32",        32,  Some(46), None,     None,                         None,               None;
    F4,       "float4_e2m1fn",     4,   None,     None,     None,                         Some("F4"),         None;
    F6E2M3,   "float6_e2m3fn",     6,   None,     None,     None,                         Some("F6_E2M3"),    None;
    F6E3M2,   "float6_e3m2fn",     6,   None,     None,     None,                         Some("F6_E3M2"),    None;
}

impl Dtype {
    /// The name torch uses, without its `torch.` prefix: `float32`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Bits an element takes; below 8 only for the packed safetensors types.
    pub const fn bits(self) -> u32 {
        self.row().bits
    }

    /// Bytes an element takes, or `None` for types of fewer than 8 bits.
    pub const fn itemsize(self) -> Option<u64> {
        let bits = self.row().bits;
        if bits < 8 { None } else { Some((bits / 8) as u64) }
    }

    /// Bytes that `numel` elements take, or `None` when that overflows or is no whole number of bytes.
    pub fn nbytes(self, numel: u64) -> Option<u64> {
        let bits = numel.checked_mul(u64::from(self.bits()))?;
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// The `c10::ScalarType` code, as AOTInductor's C interface passes it.
    pub const fn c10(self) -> Option<i32> {
        self.row().c10
    }

    /// The code in the configuration of an exported program (`torch._export.serde.schema.ScalarType`), which counts
    /// otherwise than `c10`.
    pub const fn export(self) -> Option<u32> {
        self.row().export
    }

    /// The storage class that `torch.save` names for it (`FloatStorage`), where there is one.
    pub const fn storage_class(self) -> Option<&'static str> {
        self.row().class
    }

    /// Whether elements mean something only together with a scale that the tensor has beside them.
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::QInt8 | Self::QUInt8 | Self::QInt32 | Self::QUInt4x2 | Self::QUInt2x4)
    }

    /// The name in a safetensors header, where the format has one.
    pub const fn safetensors(self) -> Option<&'static str> {
        self.row().safetensors
    }

    /// Kind and size as `numpy` writes them (`f4`), without the byte order; `None` where numpy has no such type.
    pub const fn numpy(self) -> Option<&'static str> {
        self.row().numpy
    }

    /// Bytes that are swapped as one unit in a file of the other byte order: the part size of a complex number.
    pub const fn swap_unit(self) -> usize {
        match self {
            Self::C32 | Self::BC32 => 2,
            Self::C64 => 4,
            Self::C128 => 8,
            other => (other.row().bits / 8) as usize,
        }
    }

    /// Whether values are complex numbers.
    pub const fn is_complex(self) -> bool {
        matches!(self, Self::C32 | Self::C64 | Self::C128)
    }

    /// Whether every element is one real floating-point number of whole bytes.
    pub const fn is_float(self) -> bool {
        matches!(
            self,
            Self::F16
                | Self::F32
                | Self::F64
                | Self::BF16
                | Self::F8E4M3
                | Self::F8E5M2
                | Self::F8E4M3Fnuz
                | Self::F8E5M2Fnuz
                | Self::F8E8M0
        )
    }

    /// Finds a dtype by torch's name, with or without `torch.`; also accepts the usual short forms (`f32`, `bf16`).
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        let long = match name {
            "f16" | "half" => "float16",
            "bf16" => "bfloat16",
            "f32" | "float" => "float32",
            "f64" | "double" => "float64",
            "i8" => "int8",
            "i16" => "int16",
            "i32" => "int32",
            "i64" | "long" => "int64",
            "u8" => "uint8",
            "u16" => "uint16",
            "u32" => "uint32",
            "u64" => "uint64",
            other => other,
        };
        Self::ALL.iter().copied().find(|dtype| dtype.name() == long)
    }

    /// Finds a dtype by the name of the storage class in a pickle (`FloatStorage`).
    ///
    /// `UntypedStorage` has bytes and no dtype of its own: `None`.
    pub fn from_storage_class(class: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.row().class == Some(class))
    }

    /// Finds a dtype by its name in a safetensors header.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.safetensors() == Some(name))
    }

    /// Finds a dtype by its code in an exported program.
    pub fn from_export(code: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.export() == Some(code))
    }

    /// Finds a dtype by its `c10::ScalarType` code.
    pub fn from_c10(code: i32) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.c10() == Some(code))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// By torch's name, without `torch.`.
impl Serialize for Dtype {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        Self::from_name(&name).ok_or_else(|| de::Error::custom(format!("no dtype {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_code_and_name_is_used_once() {
        let mut seen = HashSet::new();
        for dtype in Dtype::ALL {
            assert!(seen.insert(format!("name {}", dtype.name())));
            for (kind, value) in [
                ("c10", dtype.c10().map(|code| code.to_string())),
                ("export", dtype.export().map(|code| code.to_string())),
                ("class", dtype.row().class.map(str::to_owned)),
                ("safetensors", dtype.safetensors().map(str::to_owned)),
                ("numpy", dtype.numpy().map(str::to_owned)),
            ] {
                if let Some(value) = value {
                    assert!(seen.insert(format!("{kind} {value}")), "{kind} {value} twice");
                }
            }
            assert_eq!(Dtype::from_name(dtype.name()), Some(*dtype));
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Dtype::F32.nbytes(3), Some(12));
        assert_eq!(Dtype::F4.nbytes(3), None);
        assert_eq!(Dtype::F6E2M3.nbytes(4), Some(3));
        assert_eq!(Dtype::F64.nbytes(u64::MAX), None);
        assert_eq!(Dtype::F4.itemsize(), None);
    }
}
