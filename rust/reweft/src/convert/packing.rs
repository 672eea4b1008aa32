//! Tensors as oneDNN keeps them: dimensions cut into blocks, so that a vector register takes neighbours.
//!
//! The compiler states a layout as the bytes of oneDNN's memory descriptor. It is a *blocked* one: where an element goes
//! is a sum with one term for each dimension. Which layout oneDNN chooses depends on the processor and on the number of
//! threads, so it is not chosen here: new weights are put where the compiled program looks for them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::count_up;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::numel;

/// Most dimensions of a descriptor (`DNNL_MAX_NDIMS`).
const MAX_DIMS: usize = 12;
/// Bytes of a descriptor, as oneDNN 3.x serialises it, with the number of groups of a convolution behind it, which is the
/// first dimension then. What else stands behind the fields are numbers for integers.
const DESCRIPTOR_NBYTES: usize = 772;
/// The kind of layout that has blocks (`dnnl_blocked`).
const BLOCKED: i32 = 2;
/// Places that are computed at a time; they stay in the second cache.
const PLACES: usize = 1 << 15;

/// Where the elements of a tensor stand. Sizes and strides count elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packing {
    /// Elements along each dimension.
    pub dims: Vec<u64>,
    /// The same, rounded up to whole blocks; what is behind a dimension's end is zero.
    pub padded: Vec<u64>,
    /// From one block to the next along each dimension.
    pub strides: Vec<u64>,
    /// The blocks from the outermost to the innermost: the dimension that is cut, and how many of its elements one has.
    pub blocks: Vec<(usize, u64)>,
    /// Bytes of the whole, with what stands behind the last element.
    pub nbytes: u64,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims)?;
        for (number, (dim, size)) in self.blocks.iter().enumerate() {
            // The way oneDNN names layouts: dimensions are a, b, c ...
            let letter = u8::try_from(*dim).map_or('?', |dim| char::from(b'a' + dim.min(25)));
            write!(f, "{}{size}{letter}", if number == 0 { " in blocks " } else { "" })?;
        }
        Ok(())
    }
}

impl Packing {
    /// Reads a descriptor of oneDNN, for a row of `nbytes`. Gives the dtype too.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for what is no descriptor; [`ErrorKind::Unsupported`] for one of another version, or of a
    /// layout that is not blocked or that holds more than the tensor.
    pub fn from_descriptor(bytes: &[u8], nbytes: u64) -> Result<(Self, Dtype)> {
        let mut fields = Fields { bytes, at: 0 };
        if bytes.len() != DESCRIPTOR_NBYTES {
            let what = format!("oneDNN descriptor of {} bytes, wanted {DESCRIPTOR_NBYTES}", bytes.len());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let kind = fields.int()?;
        let rank = usize::try_from(fields.int()?).ok().filter(|rank| *rank <= MAX_DIMS);
        let rank = rank.ok_or_else(|| Error::format("oneDNN descriptor of too many dimensions"))?;
        let dims = fields.sizes(rank)?;
        let dtype = fields.int()?;
        fields.int()?;
        let (padded, padding_before) = (fields.sizes(rank)?, fields.sizes(rank)?);
        let first = fields.long()?;
        let format = fields.int()?;
        fields.int()?;
        let strides = fields.sizes(rank)?;
        let count = usize::try_from(fields.int()?).ok().filter(|count| *count <= MAX_DIMS);
        let count = count.ok_or_else(|| Error::format("oneDNN descriptor of too many blocks"))?;
        fields.int()?;
        let (sizes, of) = (fields.sizes(count)?, fields.sizes(count)?);
        let plain = kind == 1 && format == BLOCKED && first == 0 && padding_before.iter().all(|before| *before == 0);
        let rest = fields.rest().split_last_chunk::<4>();
        let more = rest.is_none_or(|(rest, groups)| {
            let groups = u64::from(u32::from_le_bytes(*groups));
            rest.iter().any(|byte| *byte != 0) || !(groups == 1 || dims.first() == Some(&groups))
        });
        if !plain || more {
            let what = "oneDNN keeps it in a layout that is not one of blocks, or with further numbers beside it";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let of = of.into_iter().map(|dim| usize::try_from(dim).unwrap_or(usize::MAX));
        let blocks = of.zip(sizes).collect();
        Ok((Self { dims, padded, strides, blocks, nbytes }, dtype_of(dtype)?))
    }

    /// Refuses a layout that does not fit its bytes, or a tensor of that many elements.
    ///
    /// # Errors
    /// [`ErrorKind::Format`].
    pub fn check(&self, dtype: Dtype, elements: u64) -> Result<()> {
        let rank = self.dims.len();
        let fits = rank <= MAX_DIMS
            && self.blocks.len() <= MAX_DIMS
            && (self.padded.len(), self.strides.len()) == (rank, rank)
            && self.blocks.iter().all(|(dim, size)| *dim < rank && *size > 0)
            && numel(&self.dims) == Some(elements)
            && (0..rank).all(|dim| self.dims[dim] <= self.padded[dim] && self.is_whole(dim));
        // A block of no elements would be divided by.
        let end = if fits { self.end() } else { None };
        let end = end.and_then(|end| dtype.itemsize()?.checked_mul(end));
        if end.is_some_and(|end| end <= self.nbytes) {
            return Ok(());
        }
        Err(Error::format(format!("{self} is no layout of {elements} elements of {dtype} in {} bytes", self.nbytes)))
    }

    /// Whether a dimension has whole blocks.
    fn is_whole(&self, dim: usize) -> bool {
        let mut sizes = self.blocks.iter().filter(|(of, _)| *of == dim).map(|(_, size)| *size);
        let block = sizes.try_fold(1_u64, u64::checked_mul);
        block.is_some_and(|block| self.padded[dim].is_multiple_of(block))
    }

    /// Elements up to the last one, padding included; `None` if that overflows.
    fn end(&self) -> Option<u64> {
        let mut last = 0_u64;
        for dim in 0..self.padded.len() {
            let at = self.padded[dim].checked_sub(1)?;
            last = last.checked_add(self.place(dim, at)?)?;
        }
        last.checked_add(1)
    }

    /// What an index of one dimension adds to the place of an element.
    fn place(&self, dim: usize, index: u64) -> Option<u64> {
        let (mut left, mut inner, mut place) = (index, 1_u64, 0_u64);
        for (of, size) in self.blocks.iter().rev() {
            if *of == dim {
                place = place.checked_add((left % size).checked_mul(inner)?)?;
                left /= size;
            }
            inner = inner.checked_mul(*size)?;
        }
        place.checked_add(left.checked_mul(*self.strides.get(dim)?)?)
    }

    /// Puts elements that are in row-major order where they belong, and zeros everywhere else.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`ErrorKind::Usage`] if `out` is not as long as the layout.
    pub fn pack(&self, dtype: Dtype, elements: &[u8], out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != self.nbytes {
            let what = format!("a layout of {} bytes, room for {}", self.nbytes, out.len());
            return Err(Error::new(ErrorKind::Usage, what));
        }
        let itemsize = dtype.itemsize().unwrap_or(1);
        self.check(dtype, elements.len() as u64 / itemsize)?;
        if elements.len() as u64 != self.nbytes {
            out.fill(0);
        }
        match itemsize {
            1 => self.scatter::<1>(elements, out),
            2 => self.scatter::<2>(elements, out),
            4 => self.scatter::<4>(elements, out),
            8 => self.scatter::<8>(elements, out),
            _ => Err(Error::new(ErrorKind::Unsupported, format!("oneDNN has no {dtype}"))),
        }
    }

    /// The other way round: the elements in row-major order.
    ///
    /// # Errors
    /// As [`pack`](Self::pack).
    pub fn unpack(&self, dtype: Dtype, bytes: &[u8], elements: &mut [u8]) -> Result<()> {
        let itemsize = dtype.itemsize().unwrap_or(1);
        self.check(dtype, elements.len() as u64 / itemsize)?;
        let short = || Error::new(ErrorKind::Usage, "the layout is longer than its bytes");
        let itemsize = usize::try_from(itemsize).map_err(|_| short())?;
        let mut elements = elements.chunks_exact_mut(itemsize);
        self.for_places(|places| {
            for (place, element) in places.zip(&mut elements) {
                let at = place * itemsize;
                element.copy_from_slice(bytes.get(at..at + itemsize).ok_or_else(short)?);
            }
            Ok(())
        })
    }

    fn scatter<const N: usize>(&self, elements: &[u8], out: &mut [u8]) -> Result<()> {
        let short = || Error::format("the layout is longer than its bytes");
        let (mut elements, (out, _)) = (elements.as_chunks::<N>().0.iter(), out.as_chunks_mut::<N>());
        self.for_places(|places| {
            for (place, element) in places.zip(&mut elements) {
                *out.get_mut(place).ok_or_else(short)? = *element;
            }
            Ok(())
        })
    }

    /// Walks the places of all elements in row-major order, in runs. They are sums of one number for the last dimensions,
    /// which are computed once, and one for the others.
    fn for_places(&self, mut run: impl FnMut(&mut dyn Iterator<Item = usize>) -> Result<()>) -> Result<()> {
        let overflow = || Error::format("the layout overflows");
        let mut inner = vec![0_usize];
        let mut outer = self.dims.len();
        while outer > 0 && self.dims[outer - 1] <= (PLACES / inner.len().max(1)) as u64 {
            outer -= 1;
            inner = self.sums(outer, &inner).ok_or_else(overflow)?;
        }
        if self.dims.contains(&0) {
            return Ok(());
        }
        let mut index = vec![0_u64; outer];
        loop {
            let terms = index.iter().enumerate().map(|(dim, index)| self.place(dim, *index));
            let first =
                terms.sum::<Option<u64>>().and_then(|first| usize::try_from(first).ok()).ok_or_else(overflow)?;
            run(&mut inner.iter().map(|place| first + place))?;
            if !count_up(&mut index, |dim| self.dims[dim]) {
                return Ok(());
            }
        }
    }

    /// The places of one more dimension in front of others.
    fn sums(&self, dim: usize, inner: &[usize]) -> Option<Vec<usize>> {
        let mut sums = Vec::with_capacity(inner.len());
        for index in 0..self.dims[dim] {
            let first = usize::try_from(self.place(dim, index)?).ok()?;
            sums.extend(inner.iter().map(|place| first + place));
        }
        Some(sums)
    }
}

/// Reads a descriptor's fields in their order.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let found = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        self.at += N;
        found.copied().ok_or_else(|| Error::format("oneDNN descriptor ends early"))
    }

    fn int(&mut self) -> Result<i32> {
        self.take().map(i32::from_le_bytes)
    }

    fn long(&mut self) -> Result<i64> {
        self.take().map(i64::from_le_bytes)
    }

    /// An array of as many sizes as there can be dimensions, of which so many count.
    fn sizes(&mut self, count: usize) -> Result<Vec<u64>> {
        let all = (0..MAX_DIMS).map(|_| self.long()).collect::<Result<Vec<_>>>()?;
        let size = |size: &i64| u64::try_from(*size).map_err(|_| Error::format("oneDNN descriptor of a negative size"));
        all.iter().take(count).map(size).collect()
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

/// The dtype of oneDNN's number (`dnnl_data_type_t`).
fn dtype_of(code: i32) -> Result<Dtype> {
    Ok(match code {
        1 => Dtype::F16,
        2 => Dtype::BF16,
        3 => Dtype::F32,
        4 => Dtype::I32,
        5 => Dtype::I8,
        6 => Dtype::U8,
        7 => Dtype::F64,
        _ => return Err(Error::new(ErrorKind::Unsupported, format!("oneDNN dtype {code} is not known"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 5 by 3 elements in blocks of 4 rows and, within those, of 2 columns.
    fn packing() -> Packing {
        let blocks = vec![(0, 4), (1, 2)];
        Packing { dims: vec![5, 3], padded: vec![8, 4], strides: vec![16, 8], blocks, nbytes: 64 }
    }

    #[test]
    fn elements_go_into_blocks_and_padding_is_zero() {
        let elements: Vec<u8> = (1..=15_u8).flat_map(|value| u16::from(value).to_ne_bytes()).collect();
        let mut out = vec![9; 64];
        packing().pack(Dtype::F16, &elements, &mut out).unwrap();
        let values: Vec<u16> = out.chunks(2).map(|value| u16::from_ne_bytes([value[0], value[1]])).collect();
        let rows =
            [1, 2, 4, 5, 7, 8, 10, 11, 3, 0, 6, 0, 9, 0, 12, 0, 13, 14, 0, 0, 0, 0, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(values, rows);
        let mut back = vec![0; 30];
        packing().unpack(Dtype::F16, &out, &mut back).unwrap();
        assert_eq!(back, elements);
    }

    #[test]
    fn layouts_that_lie_are_refused() {
        packing().check(Dtype::F16, 15).unwrap();
        let edits: [fn(&mut Packing); 8] = [
            |packing| packing.nbytes = 62,
            |packing| packing.dims[0] = 9,
            |packing| packing.padded[0] = 6,
            |packing| packing.strides[1] = u64::MAX,
            |packing| packing.blocks[0].0 = 2,
            |packing| packing.blocks[0].1 = 0,
            |packing| packing.strides.truncate(1),
            |packing| packing.blocks = vec![(0, 1 << 40); 3],
        ];
        for edit in edits {
            let mut packing = packing();
            edit(&mut packing);
            assert!(packing.check(Dtype::F16, 15).is_err(), "{packing:?}");
        }
        assert!(packing().check(Dtype::F64, 15).is_err(), "too wide");
    }

    #[test]
    fn what_is_no_descriptor_is_refused() {
        for bytes in [vec![], vec![0; 771], vec![0; 772], vec![255; 772], vec![1; 772]] {
            assert!(Packing::from_descriptor(&bytes, 64).is_err());
        }
    }
}
