//! safetensors: what the format's own crate accepts is read alike, or refused by a rule of the list below.

use reweft::{Checkpoint, Dtype};
use safetensors::SafeTensors;

use crate::sources::{agree, options};

/// Texts of the errors that we raise where the crate is silent, each with its reason in the format's description.
const STRICTER: &[&str] = &[
    // "Duplicate keys are disallowed"; the crate keeps the last.
    "is there twice",
    // Only the three fields are described; the crate skips others.
    "unknown field",
    // "The header data MUST begin with a { character"; the crate skips white space, so that we see no safetensors.
    "this is no checkpoint",
    // Torch has no tensor of more dimensions.
    "at most 64",
    // A tensor of no elements whose other sizes overflow; nothing could be said of its strides.
    "overflow",
];

pub(crate) fn body(bytes: &[u8]) {
    let ours = agree(bytes, &options());
    let Ok(theirs) = SafeTensors::deserialize(bytes) else {
        // What we accept as safetensors, they accept.
        assert!(!ours.is_ok_and(|checkpoint| checkpoint.format().name() == "safetensors"), "only we accept it");
        return;
    };
    match ours {
        Ok(ours) => same(&ours, &theirs),
        Err(error) => assert!(STRICTER.iter().any(|rule| error.contains(rule)), "only they accept it: {error}"),
    }
}

fn same(ours: &Checkpoint, theirs: &SafeTensors<'_>) {
    assert_eq!((ours.format().name(), ours.len()), ("safetensors", theirs.len()));
    for (name, view) in theirs.iter() {
        let info = ours.get(name).unwrap();
        let shape: Vec<u64> = view.shape().iter().map(|size| *size as u64).collect();
        assert_eq!(info.shape, shape, "{name:?}");
        assert_eq!(Some(info.dtype), Dtype::from_safetensors(&view.dtype().to_string()), "{name:?}");
        assert_eq!(ours.read(name).unwrap(), view.data(), "{name:?}");
    }
}
