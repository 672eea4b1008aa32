//! Memory against the size of the input.

use allocation_counter::measure;

/// What a call gave, after checking that it never held more than `limit` bytes at a time.
///
/// Counts the calling thread's allocations only.
pub(crate) fn within<T>(limit: u64, what: &str, call: impl FnOnce() -> T) -> T {
    let mut result = None;
    let held = measure(|| result = Some(call()));
    assert!(held.bytes_max <= limit, "{what} held {} bytes; at most {limit} are allowed", held.bytes_max);
    result.unwrap()
}
