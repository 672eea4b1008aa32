//! `.npy` files: one array each, as `numpy.save` writes them (numpy's NEP 1).
//!
//! What goes into a program that runs without Python, and what comes out. Arrays inside pickles and archives are the
//! checkpoint readers' matter.

use std::path::Path;
use std::sync::LazyLock;

use regex::bytes::Regex;

use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{self, Access, ReadAt};
use crate::tensor::{contiguous, describe, numel};
use crate::write::AtomicFile;
use crate::write::npy_lead;

/// What every file begins with; a byte each for major and minor version follow.
const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header that is read. numpy's is 118 bytes for any array of numbers.
const MAX_HEADER_NBYTES: u64 = 1 << 16;
/// Most dimensions that numpy and torch have.
const MAX_DIMS: usize = 64;

/// The dict of a header, in the one form in which numpy writes it.
static HEADER: LazyLock<Result<Regex, regex::Error>> = LazyLock::new(|| {
    Regex::new(
        r"(?-u)^\{'descr': '([<>|=])([a-z][0-9]{1,3})', 'fortran_order': (True|False), 'shape': \(((?:[0-9]+,? ?)*)\), \}[ \n]*$",
    )
});

/// An array in memory: row-major, in the byte order of the host.
///
/// ```
/// use reweft::{Dtype, npy::Array};
/// let array = Array { dtype: Dtype::U8, shape: vec![2, 3], bytes: vec![0; 6] };
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("x.npy");
/// array.write(&path)?;
/// assert_eq!(Array::read(&path)?, array);
/// # Ok::<(), reweft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// The type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// The elements, last dimension fastest.
    pub bytes: Vec<u8>,
}

impl Array {
    /// Reads a file. Arrays in Fortran's order and of the other byte order are rearranged.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a damaged file, [`ErrorKind::Unsupported`] for elements that no dtype stands for (texts,
    /// dates, objects, records), [`ErrorKind::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let source = source::open(path, Access::Read)?;
        read(&*source).map_err(|error| error.in_file(path))
    }

    /// Writes the file that `numpy.save` would write; it appears whole or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if numpy has no such dtype, [`ErrorKind::Usage`] if bytes and shape contradict each other,
    /// [`ErrorKind::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let in_file = |error: Error| error.in_file(path);
        if self.dtype.nbytes(numel(&self.shape).unwrap_or(u64::MAX)) != Some(self.bytes.len() as u64) {
            let what = format!("{} of {} bytes", describe(self.dtype, &self.shape), self.bytes.len());
            return Err(in_file(Error::new(ErrorKind::Usage, what)));
        }
        let lead = npy_lead(self.dtype, &self.shape).map_err(in_file)?;
        let file = AtomicFile::create(path)?;
        file.write_at(&lead, 0)?;
        // Files are little-endian, and so is every host that torch runs on.
        file.write_at(&self.bytes, lead.len() as u64)?;
        file.commit()
    }
}

fn read(source: &dyn ReadAt) -> Result<Array> {
    let (start, header) = header(source)?;
    let bad = || {
        let text = String::from_utf8_lossy(&header);
        Error::new(ErrorKind::Unsupported, format!("numpy header {:?} is not that of an array of numbers", text.trim()))
    };
    let fields = HEADER.as_ref().ok().and_then(|pattern| pattern.captures(&header)).ok_or_else(bad)?;
    let field = |number: usize| fields.get(number).map_or(&b""[..], |field| field.as_bytes());
    let text = |number: usize| std::str::from_utf8(field(number)).unwrap_or_default();
    let dtype = Dtype::ALL.iter().copied().find(|dtype| dtype.numpy() == Some(text(2))).ok_or_else(bad)?;
    let shape: Option<Vec<u64>> =
        text(4).split([',', ' ']).filter(|size| !size.is_empty()).map(|size| size.parse().ok()).collect();
    let shape = shape.filter(|shape| shape.len() <= MAX_DIMS).ok_or_else(bad)?;
    let wanted = numel(&shape).and_then(|numel| dtype.nbytes(numel));
    let found = source.len() - start;
    if wanted != Some(found) {
        let what = format!("{} with {found} bytes", describe(dtype, &shape));
        return Err(Error::format(what).at(start));
    }
    let mut bytes = source::read_vec(source, start, found)?;
    if field(1) == b">" {
        bytes.chunks_exact_mut(dtype.swap_unit()).for_each(<[u8]>::reverse);
    }
    if field(3) == b"True" {
        let itemsize = source::to_usize(dtype.itemsize().unwrap_or(1))?;
        let mut strides = contiguous(&shape.iter().rev().copied().collect::<Vec<_>>());
        strides.reverse();
        bytes = convert::to_contiguous(itemsize, &shape, &strides, &bytes)?.into_owned();
    }
    Ok(Array { dtype, shape, bytes })
}

/// Where the elements start, and the text before them.
fn header(source: &dyn ReadAt) -> Result<(u64, Vec<u8>)> {
    let mut start = [0; 8];
    let short = || Error::format("no .npy file: it does not begin as numpy.save begins one");
    source.read_exact_at(0, &mut start).map_err(|_| short())?;
    let [magic @ .., major, minor] = start;
    if magic != *MAGIC {
        return Err(short());
    }
    let (at, nbytes) = match (major, minor) {
        (1, 0) => {
            let mut length = [0; 2];
            source.read_exact_at(8, &mut length)?;
            (10, u64::from(u16::from_le_bytes(length)))
        }
        (2 | 3, 0) => {
            let mut length = [0; 4];
            source.read_exact_at(8, &mut length)?;
            (12, u64::from(u32::from_le_bytes(length)))
        }
        _ => return Err(Error::new(ErrorKind::Unsupported, format!("version {major}.{minor} of the .npy format"))),
    };
    if nbytes > MAX_HEADER_NBYTES {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("numpy header of {nbytes} bytes, at most {MAX_HEADER_NBYTES}"),
        ));
    }
    Ok((at + nbytes, source::read_vec(source, at, nbytes)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, dict: &str, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(dict.len()).unwrap();
        let length =
            if version == 1 { length.to_le_bytes().to_vec() } else { u32::from(length).to_le_bytes().to_vec() };
        [&MAGIC[..], &[version, 0], &length, dict.as_bytes(), data].concat()
    }

    fn dict(descr: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}   \n")
    }

    fn parse(bytes: Vec<u8>) -> Result<Array> {
        let source: crate::source::Source = std::sync::Arc::new(bytes);
        read(&*source)
    }

    #[test]
    fn orders_and_versions_are_read_alike() {
        let wanted = Array { dtype: Dtype::I16, shape: vec![2, 3], bytes: vec![0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0] };
        assert_eq!(parse(file(1, &dict("<i2", "False", "(2, 3)"), &wanted.bytes)).unwrap(), wanted);
        assert_eq!(parse(file(3, &dict("<i2", "False", "(2, 3)"), &wanted.bytes)).unwrap(), wanted);
        let big = [0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5];
        assert_eq!(parse(file(2, &dict(">i2", "False", "(2, 3)"), &big)).unwrap(), wanted);
        let columns = [0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0];
        assert_eq!(parse(file(1, &dict("<i2", "True", "(2, 3)"), &columns)).unwrap(), wanted);
        assert_eq!(parse(file(1, &dict("|u1", "False", "()"), &[7])).unwrap().shape, [0_u64; 0]);
        assert_eq!(parse(file(1, &dict("|b1", "False", "(1,)"), &[1])).unwrap().shape, [1]);
        assert_eq!(parse(file(1, &dict("<f4", "False", "(3, 0)"), &[])).unwrap().shape, [3, 0]);
    }

    #[test]
    fn anything_else_is_refused() {
        let kind = |bytes: Vec<u8>| parse(bytes).map(|_| ()).unwrap_err().kind();
        assert_eq!(kind(b"PK\x03\x04".to_vec()), ErrorKind::Format);
        assert_eq!(kind(MAGIC.to_vec()), ErrorKind::Format);
        assert_eq!(kind(file(4, &dict("<f4", "False", "()"), &[0; 4])), ErrorKind::Unsupported);
        for descr in ["|O8", "<U5", "<M8[ns]", "|V8", "f4", "<f16"] {
            assert_eq!(kind(file(1, &dict(descr, "False", "(1,)"), &[0; 8])), ErrorKind::Unsupported, "{descr}");
        }
        for shape in ["(1, -1)", "1", "(99999999999999999999,)"] {
            assert_eq!(kind(file(1, &dict("<f4", "False", shape), &[0; 4])), ErrorKind::Unsupported, "{shape}");
        }
        for (shape, nbytes) in [("(2,)", 7), ("(2,)", 9), ("(4294967296, 4294967296)", 0)] {
            assert_eq!(kind(file(1, &dict("<f4", "False", shape), &vec![0; nbytes])), ErrorKind::Format, "{shape}");
        }
        let mut cut = file(1, &dict("<f4", "False", "()"), &[0; 4]);
        cut.truncate(30);
        assert_eq!(kind(cut), ErrorKind::Format);
    }
}
