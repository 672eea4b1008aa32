//! The version of a set of weights: one hash over what they are, not over where a file holds them.

use super::Slot;
use super::manifest::hex;

/// Hashes weights: names, dtypes, shapes, strides and the hash of each slot's bytes.
///
/// A row is a slot and the [`hash`](super::manifest::hash) of its bytes in the slot's layout, as manifests state it, so that
/// a package's version follows from its manifest ([`Artifact::weights_version`](super::Artifact::weights_version)). Slots
/// that the program writes to are left out: they hold state. The order of the rows does not matter; equal weights have
/// equal versions, whatever file or memory they came from.
pub fn weights_version<'a>(rows: impl IntoIterator<Item = (&'a Slot, &'a str)>) -> String {
    let row = |(slot, hash): (&Slot, &str)| {
        format!("{}\0{}\0{:?}\0{:?}\0{hash}\n", slot.name, slot.dtype, slot.shape, slot.strides)
    };
    let mut rows: Vec<String> = rows.into_iter().filter(|(slot, _)| !slot.mutated).map(row).collect();
    rows.sort_unstable();
    hex(blake3::hash(rows.concat().as_bytes()))
}
