//! Damaged and hostile files: an error that says what, and the same one from every kind of source.

use std::path::Path;
use std::sync::Arc;

use reweft::source::Access;
use reweft::{Artifact, Checkpoint, ErrorKind, Limits, OpenOptions, Result};

use crate::fixture;

fn outcome(result: Result<Checkpoint>) -> String {
    match result {
        Ok(checkpoint) => format!("{} keys", checkpoint.len()),
        Err(error) => format!("{:?} {}", error.kind(), error.message()),
    }
}

#[test]
fn memory_read_and_mapped_agree_on_every_fixture_error_included() {
    for folder in ["hostile", "checkpoints", "packages"] {
        for entry in std::fs::read_dir(fixture(folder)).unwrap() {
            let path = entry.unwrap().path();
            let bytes = Arc::new(std::fs::read(&path).unwrap());
            let [read, mapped] = [Access::Read, Access::Map]
                .map(|access| outcome(Checkpoint::open(&path, &OpenOptions { access, ..OpenOptions::default() })));
            let memory = outcome(Checkpoint::from_source(&path, bytes, &OpenOptions::default()));
            assert_eq!(read, mapped);
            assert_eq!(read, memory);
        }
    }
}

#[test]
fn every_truncation_is_an_error_or_a_wrong_crc_never_a_panic() {
    for name in ["checkpoints/state_dict.pt", "checkpoints/no_crc.pt"] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        for len in 0..bytes.len() {
            let source = Arc::new(bytes[..len].to_vec());
            let result = Checkpoint::from_source(Path::new("cut"), source, &OpenOptions::default());
            assert!(result.is_err(), "{name} cut to {len} bytes is accepted");
        }
    }
}

#[test]
fn every_flipped_byte_is_found_or_harmless() {
    let bytes = std::fs::read(fixture("checkpoints/fc.pt")).unwrap();
    let good = read_all(bytes.clone()).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        if let Ok(found) = read_all(damaged) {
            assert_eq!(found, good, "byte {at:#x} changes a weight without an error");
        }
    }
}

type Weights = Vec<(String, Vec<u64>, Vec<u8>)>;

fn read_all(bytes: Vec<u8>) -> Result<Weights> {
    let checkpoint = Checkpoint::from_source(Path::new("x"), Arc::new(bytes), &OpenOptions::default())?;
    checkpoint.check_readable()?;
    let read = |key: &str| Ok((key.to_owned(), checkpoint.get(key)?.shape.clone(), checkpoint.read(key)?));
    checkpoint.keys().map(read).collect()
}

#[test]
fn a_limit_is_named_and_can_be_raised() {
    let limits = Limits { max_keys: 3, ..Limits::default() };
    let options = OpenOptions { limits, ..OpenOptions::default() };
    let error = Checkpoint::open(&fixture("checkpoints/training.pt"), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().contains("max_keys"), "{error}");
}

#[test]
fn what_holds_no_weights_is_no_artifact_and_a_package_no_checkpoint() {
    let error = Artifact::open(&fixture("MANIFEST"), Access::Read, &Limits::default()).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    let error = Checkpoint::open(&fixture("packages/plain.pt2"), &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("not a checkpoint"), "{error}");
}

#[test]
fn an_index_in_memory_opens_no_files() {
    let path = fixture("shards/model.safetensors.index.json");
    assert_eq!(Checkpoint::open(&path, &OpenOptions::default()).unwrap().len(), 2);
    let bytes = Arc::new(std::fs::read(&path).unwrap());
    let error = Checkpoint::from_source(&path, bytes, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("has no folder"), "{error}");
}

#[test]
fn every_truncated_index_is_an_error() {
    let bytes = std::fs::read(fixture("shards/model.safetensors.index.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.index.json");
    for len in 0..bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        assert!(Checkpoint::open(&path, &OpenOptions::default()).is_err(), "cut to {len} bytes");
    }
}
