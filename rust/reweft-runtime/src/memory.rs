//! Memory for weights that the model owns: aligned, and open to a program that writes to it.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::fmt;

use reweft::source::ReadAt;

/// Copies of at least as many bytes go past the caches, which they would only sweep.
const STREAMED_NBYTES: usize = 256 << 10;
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

    /// Copies bytes to the start, past the caches if they are many: `memcpy` reads every line before it writes it, and took
    /// 8 to 9 ms for 50 MB instead of 5 to 7. False, with nothing copied, if there is no room for them.
    #[must_use]
    pub fn fill(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.nbytes {
            return false;
        }
        #[cfg(target_arch = "x86_64")]
        if bytes.len() >= STREAMED_NBYTES && is_x86_feature_detected!("avx") {
            // SAFETY: the processor has AVX, the lines begin at a multiple of 64, have room, and nobody else has them.
            unsafe { stream(bytes, self.as_ptr().cast()) };
            return true;
        }
        self.as_bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        true
    }

    /// How many bytes it holds.
    pub fn nbytes(&self) -> usize {
        self.nbytes
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

/// Copies bytes without leaving them in the caches.
///
/// # Safety
/// `to` is a multiple of 32, and as many bytes may be written there, which nobody else looks at.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[expect(clippy::cast_ptr_alignment, reason = "loads may be unaligned, and stores are aligned as the caller vouches")]
unsafe fn stream(bytes: &[u8], to: *mut u8) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    let (blocks, rest) = bytes.as_chunks::<32>();
    for (number, block) in blocks.iter().enumerate() {
        // SAFETY: a block has 32 bytes, and so has its place, by what the caller vouches for.
        unsafe {
            let value = _mm256_loadu_si256(block.as_ptr().cast::<__m256i>());
            _mm256_stream_si256(to.add(32 * number).cast::<__m256i>(), value);
        }
    }
    // SAFETY: the same for the bytes that are left.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), to.add(32 * blocks.len()), rest.len()) };
    // Such stores are seen in order by other threads only after this.
    _mm_sfence();
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
    fn streamed_bytes_come_back() {
        for nbytes in [STREAMED_NBYTES - 1, STREAMED_NBYTES, STREAMED_NBYTES + 1, STREAMED_NBYTES + 63] {
            let bytes: Vec<u8> = (0..=250).cycle().take(nbytes + 3).collect();
            // From an address that is a multiple of nothing.
            let bytes = &bytes[3..];
            let mut lines = Lines::zeroed(nbytes);
            assert!(lines.fill(bytes));
            assert!(lines.as_slice() == Some(bytes), "{nbytes}");
            assert!(!Lines::zeroed(nbytes - 1).fill(bytes));
        }
    }

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
