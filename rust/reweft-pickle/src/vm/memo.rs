//! The memo: values by number, for later use. A hostile number must not cost memory.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::value::NodeId;

/// Numbers below this are kept densely in any case.
const SLACK: usize = 1024;

/// Picklers count from zero, so a vector serves them. A number far above the count of entries goes
/// to a map instead; the vector thus never exceeds four times the entries plus [`SLACK`].
#[derive(Debug, Default)]
pub(super) struct Memo {
    dense: Vec<Option<NodeId>>,
    sparse: HashMap<u64, NodeId>,
    len: usize,
}

impl Memo {
    /// Number of entries, which is the number that MEMOIZE uses next.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The dense part first: an entry moves there when its number is written again after the vector
    /// grew.
    #[inline]
    pub fn get(&self, index: u64) -> Result<NodeId> {
        let dense = usize::try_from(index).ok().and_then(|index| self.dense.get(index).copied().flatten());
        dense
            .or_else(|| self.sparse.get(&index).copied())
            .ok_or_else(|| Error::new(ErrorKind::Memo, format!("index {index} was never written")))
    }

    #[inline]
    pub fn put(&mut self, index: u64, id: NodeId, max_memo: usize) -> Result<()> {
        let before = match usize::try_from(index) {
            Ok(dense) if dense < self.len.saturating_mul(4).saturating_add(SLACK) => self.put_dense(dense, id),
            _ => self.sparse.insert(index, id),
        };
        if before.is_none() {
            self.len = self.len.saturating_add(1);
        }
        if self.len > max_memo {
            return Err(Error::new(ErrorKind::Limit, format!("max_memo ({max_memo}) entries are exceeded")));
        }
        Ok(())
    }

    /// Writes the entry and gives the one that it replaces, wherever that was.
    #[inline]
    fn put_dense(&mut self, index: usize, id: NodeId) -> Option<NodeId> {
        if index == self.dense.len() {
            self.dense.push(None);
        } else if index > self.dense.len() {
            self.dense.resize(index.saturating_add(1), None);
        }
        let before = self.dense.get_mut(index).and_then(|entry| entry.replace(id));
        if before.is_none() && !self.sparse.is_empty() {
            return self.sparse.remove(&(index as u64));
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_numbers_cost_no_memory_and_near_ones_win_over_them() {
        let (mut memo, a, b) = (Memo::default(), NodeId::TRUE, NodeId::FALSE);
        for index in [u64::from(u32::MAX), u64::MAX, 2000] {
            memo.put(index, a, 100).unwrap();
        }
        assert!(memo.dense.is_empty());
        for index in 0..1000 {
            memo.put(index, b, 2000).unwrap();
        }
        memo.put(2000, b, 2000).unwrap();
        assert_eq!((memo.get(2000).unwrap(), memo.get(u64::MAX).unwrap(), memo.len()), (b, a, 1003));
        assert!(memo.dense.len() < 4 * 1003 + SLACK);
        assert_eq!(memo.get(1500).unwrap_err().kind(), ErrorKind::Memo);
    }
}
