//! Tensors that are no window of a file as they are: strided, of the other byte order, packed, or made of others.

use super::super::slabs::{SLAB_NBYTES, Slabs};
use super::{Job, Piece};
use crate::error::Result;
use crate::source::to_usize;

/// Memory that is used for slab after slab.
#[derive(Default)]
pub(super) struct Buffers(Vec<u8>);

impl Job<'_> {
    /// Writes a piece; gives the CRC of its bytes, or 0 if nobody wants it.
    pub(super) fn stream(
        &self,
        piece: &Piece<'_>,
        buffers: &mut Buffers,
        progress: &mut dyn FnMut(u64),
    ) -> Result<u32> {
        let checkpoint = self.checkpoint;
        checkpoint.storages().check_repeats(piece.info)?;
        let slabs = Slabs::of(piece.info, checkpoint.storage_of(piece.info)?)?;
        let mut hasher = crc32fast::Hasher::new();
        let mut at = piece.at;
        for slab in slabs {
            let bytes = &mut buffers.0;
            bytes.resize(to_usize(slab.nbytes())?, 0);
            checkpoint.read_view(&slab, bytes)?;
            if piece.record.is_some() {
                hasher.update(bytes);
            }
            self.out.write_at(bytes, at)?;
            progress(bytes.len() as u64);
            at += bytes.len() as u64;
            if bytes.capacity() as u64 > SLAB_NBYTES {
                // Only for a tensor that had to be held whole.
                *bytes = Vec::new();
            }
        }
        Ok(if piece.record.is_some() { hasher.finalize() } else { 0 })
    }
}
