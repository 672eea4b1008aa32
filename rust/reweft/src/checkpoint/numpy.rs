//! numpy arrays, scalars and dtypes in a pickle, read as data.
//!
//! numpy's functions are known by name and never called. What becomes of an array is said in `arrays`, for
//! checkpoints, and in `config`.

use std::borrow::Cow;

use reweft_pickle::{NodeId, Object, Pickle, Value};

use super::rebuild::sizes;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{contiguous, numel};

/// A dtype as numpy pickles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descr {
    /// numpy's letter: `b i u f c` for numbers, `S U` for texts, `M m` for dates, `V` for bytes, `O` for objects.
    pub kind: u8,
    pub itemsize: u64,
    pub big_endian: bool,
    /// `[25s]` for dates; empty for everything else.
    pub unit: String,
    /// The dtype of a tensor with such elements, if there is one.
    pub dtype: Option<Dtype>,
}

impl Descr {
    /// The name that messages use, and numpy reads: `<f4`, `>M8[ns]`.
    pub fn text(&self) -> String {
        let order = match (self.itemsize, self.kind) {
            (_, b'O') => return "object".to_owned(),
            (0 | 1, _) | (_, b'S' | b'V') => '|',
            _ if self.big_endian => '>',
            _ => '<',
        };
        // A text of numpy takes 4 bytes a character.
        let size = if self.kind == b'U' { self.itemsize / 4 } else { self.itemsize };
        format!("{order}{}{size}{}", char::from(self.kind), self.unit)
    }

    /// Whether elements are texts, dates or objects: values, but never weights.
    pub fn is_no_number(&self) -> bool {
        matches!(self.kind, b'S' | b'U' | b'M' | b'm' | b'O')
    }
}

/// An array as it stands in a pickle.
#[derive(Debug)]
pub(crate) struct Array<'p> {
    pub descr: Descr,
    pub shape: Vec<u64>,
    /// In elements.
    pub strides: Vec<u64>,
    pub data: Data<'p>,
    /// The class, if it is another than `numpy.ndarray`.
    pub class: Option<String>,
}

impl Array<'_> {
    /// What messages call it.
    pub fn describe(&self) -> String {
        format!("numpy array of {} {:?}", self.descr.text(), self.shape)
    }
}

/// Bytes as pickles write them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'p> {
    /// As they are.
    Bytes(&'p [u8]),
    /// One character a byte, as protocol 2 does.
    Latin1(&'p str),
    /// The elements of an array of objects.
    Objects(&'p [NodeId]),
}

impl<'p> Data<'p> {
    /// The bytes; copied only where they stand as text. `None` for objects, and for text that is no Latin-1.
    pub fn bytes(self) -> Option<Cow<'p, [u8]>> {
        match self {
            Self::Bytes(bytes) => Some(bytes.into()),
            Self::Latin1(text) => {
                text.chars().map(|char| u8::try_from(char).ok()).collect::<Option<Vec<_>>>().map(Cow::Owned)
            }
            Self::Objects(_) => None,
        }
    }
}

/// Bytes, however the protocol writes them; `None` if a value is something else. A `bytearray` is not meant here.
pub(crate) fn bytes<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Option<Data<'p>> {
    match pickle.get(id) {
        Value::Bytes(bytes) => return Some(Data::Bytes(bytes)),
        Value::ByteStr(bytes) => return Some(Data::Bytes(bytes)),
        _ => {}
    }
    let (name, object) = pickle.as_call(id)?;
    match (name, pickle.as_tuple(object.args)?) {
        (("_codecs", "encode"), [text, encoding]) if is_latin1(pickle, *encoding) => {
            Some(Data::Latin1(pickle.as_str(*text)?))
        }
        (("builtins", "bytes"), []) => Some(Data::Bytes(&[])),
        _ => None,
    }
}

/// The bytes of a `bytearray`, however the protocol writes it.
pub(crate) fn bytearray<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Option<Data<'p>> {
    if let Value::ByteArray(bytes) = pickle.get(id) {
        return Some(Data::Bytes(bytes));
    }
    let (("builtins", "bytearray"), object) = pickle.as_call(id)? else { return None };
    match pickle.as_tuple(object.args)? {
        [] => Some(Data::Bytes(&[])),
        [held] => bytes(pickle, *held),
        [text, encoding] if is_latin1(pickle, *encoding) => Some(Data::Latin1(pickle.as_str(*text)?)),
        _ => None,
    }
}

fn is_latin1(pickle: &Pickle<'_>, id: NodeId) -> bool {
    matches!(pickle.as_str(id), Some("latin1" | "latin-1"))
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

/// The array that a value is, if it is one.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a form or dtype that is not known, [`ErrorKind::Format`] where shape and bytes
/// contradict each other.
pub(crate) fn array<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Result<Option<Array<'p>>> {
    let Some((name, object)) = pickle.as_call(id) else { return Ok(None) };
    let array = match name {
        ("numpy._core.multiarray" | "numpy.core.multiarray", "_reconstruct") => reconstruct(pickle, object)?,
        ("numpy._core.numeric" | "numpy.core.numeric", "_frombuffer") => from_buffer(pickle, object)?,
        _ => return Ok(None),
    };
    let wanted = numel(&array.shape);
    let (found, unit, wanted) = match array.data {
        Data::Bytes(bytes) => (bytes.len(), "bytes", wanted.and_then(|numel| numel.checked_mul(array.descr.itemsize))),
        // Counting characters of a text is a pass over it; whoever decodes it compares.
        Data::Latin1(_) => return Ok(Some(array)),
        Data::Objects(items) => (items.len(), "objects", wanted),
    };
    if wanted != Some(found as u64) {
        return Err(Error::format(format!("{} holds {found} {unit}", array.describe())));
    }
    Ok(Some(array))
}

/// `_reconstruct(class, (0,), b"b")`, then the state `(1, shape, dtype, is_fortran, bytes or list)`.
fn reconstruct<'p>(pickle: &'p Pickle<'_>, object: &'p Object) -> Result<Array<'p>> {
    let bad = |what: &str| unsupported(format!("it is a numpy array {what}"));
    let class = pickle.as_tuple(object.args).and_then(|args| args.first());
    let class = class.and_then(|class| pickle.as_global(*class)).ok_or_else(|| bad("of no class"))?;
    if !(object.list_items().is_empty() && object.dict_items().is_empty() && object.set_items().is_empty()) {
        return Err(bad("that is filled in a way numpy does not"));
    }
    let state = object.state().last().ok_or_else(|| bad("without a state"))?;
    let (shape, dtype, is_fortran, data) = match pickle.as_tuple(*state) {
        Some([version, shape, dtype, is_fortran, data]) if matches!(pickle.as_i64(*version), Some(0 | 1)) => {
            (shape, dtype, is_fortran, data)
        }
        Some([shape, dtype, is_fortran, data]) => (shape, dtype, is_fortran, data),
        _ => return Err(bad(&format!("of class {}.{} with a state of its own", class.0, class.1))),
    };
    let is_fortran = match (pickle.as_bool(*is_fortran), pickle.as_i64(*is_fortran)) {
        (Some(flag), _) => flag,
        (_, Some(number @ 0..=1)) => number == 1,
        _ => return Err(bad("of no known order")),
    };
    let (shape, descr) = (sizes(pickle, *shape, "size")?, descr(pickle, *dtype)?);
    let strides = if is_fortran { fortran(&shape) } else { contiguous(&shape) };
    let data = match pickle.as_list(*data) {
        Some(items) if descr.kind == b'O' => Data::Objects(items),
        _ => bytes(pickle, *data).filter(|_| descr.kind != b'O').ok_or_else(|| bad("without bytes"))?,
    };
    let class = (class != ("numpy", "ndarray")).then(|| format!("{}.{}", class.0, class.1));
    Ok(Array { descr, shape, strides, data, class })
}

/// `_frombuffer(buffer, dtype, shape, order[, axes])` of protocol 5.
fn from_buffer<'p>(pickle: &'p Pickle<'_>, object: &'p Object) -> Result<Array<'p>> {
    let bad = || unsupported("it is a numpy array made from a buffer in a way that is not known");
    let Some([buffer, dtype, shape, order, axes @ ..]) = pickle.as_tuple(object.args) else { return Err(bad()) };
    let (shape, descr) = (sizes(pickle, *shape, "size")?, descr(pickle, *dtype)?);
    let data = bytes(pickle, *buffer).or_else(|| bytearray(pickle, *buffer)).ok_or_else(bad)?;
    let (shape, strides) = match (pickle.as_str(*order), axes) {
        (Some("C"), [] | [_]) => (shape.clone(), contiguous(&shape)),
        (Some("F"), [] | [_]) => (shape.clone(), fortran(&shape)),
        (Some("K"), [axes]) => {
            let axes = sizes(pickle, *axes, "axis")?;
            permuted(&shape, &axes).ok_or_else(|| Error::format(format!("axes {axes:?} of shape {shape:?}")))?
        }
        _ => return Err(bad()),
    };
    // Whatever was done to the object afterwards is not numpy's doing.
    if object.state().is_empty() && object.list_items().is_empty() && object.dict_items().is_empty() {
        return Ok(Array { descr, shape, strides, data, class: None });
    }
    Err(bad())
}

/// Shape and strides after `reshape(shape).transpose(axes)`; `None` if the axes are no permutation.
fn permuted(shape: &[u64], axes: &[u64]) -> Option<(Vec<u64>, Vec<u64>)> {
    let strides = contiguous(shape);
    let mut seen = vec![false; shape.len()];
    let mut dims = Vec::with_capacity(shape.len());
    for axis in axes {
        let axis = usize::try_from(*axis).ok()?;
        let was = std::mem::replace(seen.get_mut(axis)?, true);
        dims.push((!was).then_some((*shape.get(axis)?, *strides.get(axis)?))?);
    }
    (dims.len() == shape.len()).then(|| dims.into_iter().unzip())
}

/// Strides of the column-major layout.
fn fortran(shape: &[u64]) -> Vec<u64> {
    let reversed: Vec<u64> = shape.iter().rev().copied().collect();
    let mut strides = contiguous(&reversed);
    strides.reverse();
    strides
}

/// `numpy.dtype("f4", False, True)`, then the state `(3, "<", subarray, names, fields, itemsize, alignment, flags)`.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for what is no plain dtype, with its name or its fields.
pub(crate) fn descr(pickle: &Pickle<'_>, id: NodeId) -> Result<Descr> {
    let bad = |what: String| unsupported(format!("its numpy dtype {what}"));
    let Some((("numpy", "dtype"), object)) = pickle.as_call(id) else {
        return Err(bad(format!("is {}", pickle.describe(id))));
    };
    let first = pickle.as_tuple(object.args).and_then(|args| args.first().copied());
    let first = first.ok_or_else(|| bad("has no name".to_owned()))?;
    let mut descr = if let Some(("ml_dtypes", name)) = pickle.as_global(first) {
        extension(name).ok_or_else(|| bad(format!("is ml_dtypes.{name}")))?
    } else {
        let text = pickle.as_str(first).ok_or_else(|| bad(format!("is {}", pickle.describe(first))))?;
        parse(text).ok_or_else(|| bad(format!("is {text:?}")))?
    };
    let Some(state) = object.state().last() else { return Ok(known(descr)) };
    let Some([version, order, subarray, names, fields, itemsize, _, _, rest @ ..]) = pickle.as_tuple(*state) else {
        return Err(bad("has a state that is not known".to_owned()));
    };
    if !matches!(pickle.as_i64(*version), Some(3 | 4)) {
        return Err(bad(format!("has a state of version {}", pickle.describe(*version))));
    }
    if let Some(names) = pickle.as_sequence(*names) {
        let names: Vec<&str> = names.iter().take(8).filter_map(|name| pickle.as_str(*name)).collect();
        return Err(bad(format!("is structured, with the fields {}", names.join(", "))));
    }
    if [subarray, names, fields].iter().any(|id| !matches!(pickle.get(**id), Value::None)) {
        return Err(bad("is structured".to_owned()));
    }
    // The order of the machine that reads, `=`, is little-endian wherever this runs.
    descr.big_endian = match pickle.as_str(*order) {
        Some(">") => true,
        Some("<" | "|" | "=") => false,
        _ => return Err(bad(format!("has the byte order {}", pickle.describe(*order)))),
    };
    if let (b'S' | b'U' | b'V', Some(nbytes)) = (descr.kind, pickle.as_i64(*itemsize))
        && let Ok(nbytes) = u64::try_from(nbytes)
    {
        descr.itemsize = nbytes;
    }
    if let b'M' | b'm' = descr.kind {
        descr.unit = rest.first().and_then(|id| unit(pickle, *id)).ok_or_else(|| bad("has no unit".to_owned()))?;
    }
    Ok(known(descr))
}

/// Finds the tensor's dtype.
fn known(mut descr: Descr) -> Descr {
    if descr.dtype.is_none() && descr.kind != b'O' {
        let name = format!("{}{}", char::from(descr.kind), descr.itemsize);
        descr.dtype = Dtype::ALL.iter().copied().find(|dtype| dtype.numpy() == Some(name.as_str()));
    }
    descr
}

/// Reads `f4`, `<f4` or `U12`.
fn parse(text: &str) -> Option<Descr> {
    let (big_endian, text) = match text.strip_prefix('>') {
        Some(rest) => (true, rest),
        None => (false, text.trim_start_matches(['<', '|', '='])),
    };
    let (kind, size) = (*text.as_bytes().first()?, text.get(1..)?);
    if !b"biufcSUVOMm".contains(&kind) {
        return None;
    }
    let size: u64 = size.parse().ok()?;
    let itemsize = if kind == b'U' { size.checked_mul(4)? } else { size };
    Some(Descr { kind, itemsize, big_endian, unit: String::new(), dtype: None })
}

/// The float types that numpy lacks and the package `ml_dtypes` adds.
fn extension(name: &str) -> Option<Descr> {
    let dtype = Dtype::from_name(name).filter(|dtype| dtype.name() == name && dtype.numpy().is_none())?;
    let itemsize = dtype.itemsize()?;
    Some(Descr { kind: b'V', itemsize, big_endian: false, unit: String::new(), dtype: Some(dtype) })
}

/// `(metadata, (unit, count, divisor, events))` as numpy spells it: `[25s]`.
fn unit(pickle: &Pickle<'_>, id: NodeId) -> Option<String> {
    let [_, unit] = pickle.as_tuple(id)? else { return None };
    let [name, count, divisor, ..] = pickle.as_tuple(*unit)? else { return None };
    let name = match bytes(pickle, *name) {
        Some(name) => String::from_utf8(name.bytes()?.into_owned()).ok()?,
        None => pickle.as_str(*name)?.to_owned(),
    };
    match (name.as_str(), pickle.as_i64(*count)?, pickle.as_i64(*divisor)?) {
        ("generic", _, _) => Some(String::new()),
        (name, 1, 1) => Some(format!("[{name}]")),
        (name, count, 1) => Some(format!("[{count}{name}]")),
        _ => None,
    }
}

/// A scalar: its dtype and its bytes.
pub(crate) struct Scalar<'p> {
    pub descr: Descr,
    pub bytes: Cow<'p, [u8]>,
}

/// `scalar(dtype, bytes)`, if a value is one.
///
/// # Errors
/// As [`array`].
pub(crate) fn scalar<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Result<Option<Scalar<'p>>> {
    let Some((("numpy._core.multiarray" | "numpy.core.multiarray", "scalar"), object)) = pickle.as_call(id) else {
        return Ok(None);
    };
    let Some([dtype, data]) = pickle.as_tuple(object.args) else {
        return Err(unsupported("it is a numpy scalar without a value"));
    };
    let descr = descr(pickle, *dtype)?;
    let bytes = bytes(pickle, *data).filter(|_| descr.kind != b'O').and_then(Data::bytes);
    let bytes = bytes.ok_or_else(|| unsupported(format!("it is a numpy scalar of {} without bytes", descr.text())))?;
    if bytes.len() as u64 != descr.itemsize {
        return Err(Error::format(format!("numpy scalar of {} holds {} bytes", descr.text(), bytes.len())));
    }
    Ok(Some(Scalar { descr, bytes }))
}

/// A number of any dtype that has an exact Rust form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Number {
    Bool(bool),
    Int(i128),
    Float(f64),
    Complex(f64, f64),
}

/// Reads one element; `None` for dtypes of less than 16 bits that are no integers.
pub(crate) fn number(dtype: Dtype, big_endian: bool, bytes: &[u8]) -> Option<Number> {
    let mut native = [0; 16];
    let native = native.get_mut(..bytes.len())?;
    native.copy_from_slice(bytes);
    if big_endian {
        native.chunks_exact_mut(dtype.swap_unit().max(1)).for_each(<[u8]>::reverse);
    }
    let half = native.len() / 2;
    Some(match dtype {
        Dtype::Bool => Number::Bool(*native.first()? != 0),
        Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => {
            let mut wide = [0; 16];
            wide.get_mut(..native.len())?.copy_from_slice(native);
            Number::Int(i128::from_le_bytes(wide))
        }
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => {
            let mut wide = [if native.last()? & 0x80 == 0 { 0 } else { 0xff }; 16];
            wide.get_mut(..native.len())?.copy_from_slice(native);
            Number::Int(i128::from_le_bytes(wide))
        }
        Dtype::F16 | Dtype::BF16 => {
            let wide = convert::cast(native, dtype, Dtype::F64).ok()?;
            Number::Float(f64::from_le_bytes(wide.try_into().ok()?))
        }
        Dtype::F32 => Number::Float(f32::from_le_bytes((&*native).try_into().ok()?).into()),
        Dtype::F64 => Number::Float(f64::from_le_bytes((&*native).try_into().ok()?)),
        Dtype::C64 | Dtype::C128 => {
            let part = if dtype == Dtype::C64 { Dtype::F32 } else { Dtype::F64 };
            match (number(part, false, native.get(..half)?)?, number(part, false, native.get(half..)?)?) {
                (Number::Float(re), Number::Float(im)) => Number::Complex(re, im),
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// Whether a call of numpy's that makes an array makes a tensor; true for every other call.
pub(super) fn is_tensor(pickle: &Pickle<'_>, id: NodeId) -> bool {
    match array(pickle, id) {
        Ok(Some(array)) => !array.descr.is_no_number(),
        Ok(None) | Err(_) => true,
    }
}

/// What a numpy scalar is, for a list: `numpy float64 0.5`.
pub(super) fn describe(pickle: &Pickle<'_>, id: NodeId) -> Option<String> {
    let Scalar { descr, bytes } = scalar(pickle, id).ok()??;
    let number = descr.dtype.and_then(|dtype| Some((dtype, number(dtype, descr.big_endian, &bytes)?)));
    Some(match number {
        Some((dtype, Number::Bool(value))) => format!("numpy {dtype} {}", if value { "True" } else { "False" }),
        Some((dtype, Number::Int(value))) => format!("numpy {dtype} {value}"),
        Some((dtype, Number::Float(value))) => format!("numpy {dtype} {value:?}"),
        Some((dtype, Number::Complex(re, im))) => format!("numpy {dtype} ({re:?}, {im:?})"),
        None => format!("numpy scalar of {}", descr.text()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_spelled_as_numpy_reads_them() {
        for text in ["|b1", "<f4", "<i8", "<U3", "|S5", "|V8"] {
            assert_eq!(parse(text).unwrap().text(), text);
        }
        assert_eq!(parse(">c16").unwrap().text(), ">c16");
        assert!(["", "f", "x4", "f4x", "U99999999999999999999", "é4"].into_iter().all(|text| parse(text).is_none()));
    }

    #[test]
    fn permutations_are_checked() {
        assert_eq!(permuted(&[2, 3, 4], &[2, 0, 1]).unwrap(), (vec![4, 2, 3], vec![1, 12, 4]));
        assert!(permuted(&[2, 3], &[0, 0]).is_none());
        assert!(permuted(&[2, 3], &[0]).is_none());
        assert!(permuted(&[2, 3], &[0, 2]).is_none());
        assert_eq!(fortran(&[2, 3, 4]), [1, 2, 6]);
    }

    #[test]
    fn numbers_of_either_order() {
        assert_eq!(number(Dtype::I16, true, &[0xff, 0xfe]), Some(Number::Int(-2)));
        assert_eq!(number(Dtype::U64, false, &[0xff; 8]), Some(Number::Int(u64::MAX.into())));
        assert_eq!(number(Dtype::F16, true, &[0x3c, 0]), Some(Number::Float(1.0)));
        assert_eq!(number(Dtype::C64, true, &[0x3f, 0x80, 0, 0, 0xc0, 0, 0, 0]), Some(Number::Complex(1.0, -2.0)));
        assert_eq!(number(Dtype::F8E4M3, false, &[0]), None);
        assert_eq!(number(Dtype::F32, false, &[0; 3]), None);
    }
}
