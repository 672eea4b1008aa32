//! What a stranger's pickle may cost. The reader is linear in its input anyway; these bound the
//! factor.

/// Bounds on one parse. Each is named in the error that it causes
/// ([`ErrorKind::Limit`](crate::ErrorKind::Limit)).
///
/// ```
/// use reweft_pickle::{ErrorKind, Limits, Pickle};
/// let limits = Limits { max_nodes: 10, ..Limits::default() };
/// let error = Pickle::parse(b"(K\x01K\x02K\x03K\x04K\x05K\x06K\x07K\x08t.", &limits).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Limit);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most values in one pickle, counting four that always exist. A value costs 32 bytes and 4 per
    /// item, an object that is filled after its call about 150; a pickle makes at most one value
    /// per input byte. Default 2^26, which is 2 GiB of values.
    pub max_nodes: u32,
    /// Most digits of an integer written as text (INT, LONG): turning text into a number is
    /// quadratic in them. Default 4300, as in Python. Binary integers (LONG1, LONG4) are borrowed,
    /// whatever their length.
    pub max_int_digits: usize,
    /// Most memo entries. An entry costs 4 bytes, or about 32 if its index is far from its
    /// neighbours. Default 2^26.
    pub max_memo: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_nodes: 1 << 26, max_int_digits: 4300, max_memo: 1 << 26 }
    }
}
