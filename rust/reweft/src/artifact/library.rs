//! Weights inside a compiled library: where AOTInductor puts them in the ELF file.
//!
//! The symbol `_binary_constants_bin_start` stands at the rows themselves, or, if the rows are appended behind the ELF
//! file (`force_mmap_weights`, and by itself above 2 GB), at two numbers of 64 bits: their size with 8 bytes of magic
//! behind them, and that magic. Checked against libraries of torch 2.15.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, ReadCache};

use crate::error::{Error, ErrorKind, Result};
use crate::source::{ReadAt, Source};

const START: &str = "_binary_constants_bin_start";
const END: &str = "_binary_constants_bin_end";
/// The sections that weights are put into.
const SECTIONS: [&str; 2] = [".lrodata", ".ldata"];
/// Appended rows start at a multiple of this.
const APPENDED_ALIGNMENT: u64 = 16384;
/// The numbers at the symbol, and the magic behind appended rows.
const HEAD_NBYTES: u64 = 16;
const MAGIC_NBYTES: u64 = 8;

/// Whether the source begins like an ELF file. Reads 4 bytes.
pub(super) fn detect(source: &dyn ReadAt) -> bool {
    let mut head = [0; 4];
    source.read_exact_at(0, &mut head).is_ok() && head == *b"\x7fELF"
}

/// The range of a library that holds its rows, which take `nbytes`; `None` if it was built without them. Reads the ELF
/// headers and symbols.
///
/// # Errors
/// [`ErrorKind::Format`] if library and rows contradict each other.
pub(super) fn find_rows(library: &Source, nbytes: u64) -> Result<Option<Range<u64>>> {
    let Some(symbol) = find_symbol(library)? else { return Ok(None) };
    let held = symbol.end - symbol.start;
    // Rows are padded, and what is behind the last of them may be.
    if nbytes > 0 && held >= nbytes && held - nbytes < 64 {
        return Ok(Some(symbol.start..symbol.start + nbytes));
    }
    // What stands there if the weights were left out (`package_constants_in_so=False`).
    if held == 1 {
        return Ok(None);
    }
    if held != HEAD_NBYTES {
        let what = format!("the program's rows take {nbytes} bytes, the library holds {held}");
        return Err(Error::format(what));
    }
    let number = |at| {
        let mut bytes = [0; 8];
        library.read_exact_at(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
    };
    let (size, magic) = (number(symbol.start)?, number(symbol.start + 8)?);
    let start = library.len().checked_sub(size);
    let starts_right = start.filter(|start| start.is_multiple_of(APPENDED_ALIGNMENT) && *start >= symbol.end);
    match starts_right {
        Some(start) if size == nbytes + MAGIC_NBYTES && number(library.len() - MAGIC_NBYTES)? == magic => {
            Ok(Some(start..start + nbytes))
        }
        _ => Err(Error::format(format!(
            "the library says that {size} bytes of weights are appended to it; the program's rows take {nbytes}"
        ))),
    }
}

/// The bytes between the two symbols, as a range of the file.
fn find_symbol(library: &Source) -> Result<Option<Range<u64>>> {
    let bad = |error: object::Error| Error::format(format!("ELF: {error}"));
    let cache = ReadCache::new(Seeking { source: library, at: 0 });
    let file = ElfFile64::<object::Endianness, _>::parse(&cache).map_err(bad)?;
    // Which of the two tables has them depends on how the library was linked.
    let find = |name: &str| file.dynamic_symbols().chain(file.symbols()).find(|symbol| symbol.name() == Ok(name));
    let Some(start) = find(START).filter(|symbol| !symbol.is_undefined()) else {
        // Large data is what only weights are; without its name nothing says where they begin.
        let mut sections = file.sections();
        if sections.any(|section| section.name().is_ok_and(|name| SECTIONS.contains(&name))) {
            let what = format!("the library holds weights, but was stripped of the symbol {START}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        return Ok(None);
    };
    let end = find(END).ok_or_else(|| Error::format(format!("the library has {START}, but no {END}")))?;
    let (start, end) = (start.address(), end.address());
    for section in file.sections() {
        let Some((offset, nbytes)) = section.file_range() else { continue };
        let within = |address: u64| address.checked_sub(section.address()).filter(|distance| *distance <= nbytes);
        if let (Some(first), Some(last)) = (within(start), within(end))
            && first < nbytes
        {
            let range = offset.checked_add(first).zip(offset.checked_add(last));
            let range = range.filter(|(first, last)| first <= last && *last <= library.len());
            let (first, last) = range.ok_or_else(|| Error::format("a section of the library leaves the file"))?;
            return Ok(Some(first..last));
        }
    }
    Err(Error::new(ErrorKind::Format, format!("{START} lies in no section of the library")))
}

/// A source with a position, as the ELF reader wants it.
#[derive(Debug)]
struct Seeking<'a> {
    source: &'a Source,
    at: u64,
}

impl Read for Seeking<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.source.len().saturating_sub(self.at)).unwrap_or(usize::MAX);
        let count = out.len().min(left);
        self.source.read_exact_at(self.at, &mut out[..count]).map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Seeking<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(distance) => self.source.len().checked_add_signed(distance),
            SeekFrom::Current(distance) => self.at.checked_add_signed(distance),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
