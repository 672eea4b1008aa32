//! Memory for weights that the model owns: aligned, and open to a program that writes to it.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::fmt;

use reweft::source::ReadAt;

/// Bytes of a line; rows of compiled programs are aligned to this.
const LINE_NBYTES: usize = 64;

#[repr(C, align(64))]
struct Line([u8; LINE_NBYTES]);

/// Zero-padded bytes, aligned to 64.
///
/// A compiled program may write to them through [`as_ptr`](Self::as_ptr). Whoever reads them back must know that it
/// does not, or that no call is running.
pub struct Lines {
    lines: Box<[UnsafeCell<Line>]>,
    nbytes: usize,
}

// SAFETY: a plain block of bytes; who may write when is the contract of the type.
unsafe impl Send for Lines {}
// SAFETY: as above. Slots that the program writes to are read only while no call runs.
unsafe impl Sync for Lines {}

impl Lines {
    /// Copies bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut lines = Self::zeroed(bytes.len());
        lines.as_bytes_mut().copy_from_slice(bytes);
        lines
    }

    /// Copies bytes that others may be writing to meanwhile: no reference to them is made.
    ///
    /// # Safety
    /// `nbytes` bytes may be read from `ptr`.
    pub unsafe fn copy_from(ptr: *const c_void, nbytes: usize) -> Self {
        let lines = Self::zeroed(nbytes);
        // SAFETY: the caller vouches for the source; the lines are at least as long, and new.
        unsafe { std::ptr::copy_nonoverlapping(ptr.cast::<u8>(), lines.as_ptr().cast::<u8>(), nbytes) };
        lines
    }

    /// Makes room for `nbytes` bytes, all zero.
    pub fn zeroed(nbytes: usize) -> Self {
        // One line more than is filled, so that there is always one.
        let lines = Box::new_zeroed_slice(nbytes / LINE_NBYTES + 1);
        // SAFETY: a line is an array of bytes, for which zeros are a value.
        Self { lines: unsafe { lines.assume_init() }, nbytes }
    }

    /// Copies the bytes; the caller knows that no call is writing to them.
    pub fn copy(&self) -> Self {
        Self::from_bytes(self.as_bytes())
    }

    /// The bytes, for the one who holds them alone.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the lines are contiguous, longer than `nbytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast(), self.nbytes) }
    }

    /// Address of the first byte. There is always a line, so it is never dangling.
    pub fn as_ptr(&self) -> *mut c_void {
        self.lines.as_ptr().cast_mut().cast()
    }

    fn as_bytes(&self) -> &[u8] {
        // SAFETY: `nbytes` bytes were copied to the start of the lines, which are contiguous and live as long as `self`.
        // By the contract of the type nobody writes to them now.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.nbytes) }
    }
}

impl ReadAt for Lines {
    fn len(&self) -> u64 {
        self.nbytes as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> reweft::Result<()> {
        out.copy_from_slice(reweft::source::slice(self.as_bytes(), byte_offset, out.len() as u64)?);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.as_bytes())
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lines({} bytes)", self.nbytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_are_aligned() {
        for nbytes in [0, 1, 63, 64, 65, 200] {
            let bytes: Vec<u8> = (0..nbytes).collect();
            let lines = Lines::from_bytes(&bytes);
            assert_eq!(lines.as_slice(), Some(&bytes[..]));
            assert!(lines.as_ptr().addr().is_multiple_of(LINE_NBYTES) && !lines.as_ptr().is_null());
        }
    }
}
