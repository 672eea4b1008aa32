//! Replays the seeds of every target, and all fixtures, through the bodies.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use reweft_fuzz::{TARGETS, run};

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

fn replay(target: &str, path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let name = path.display().to_string();
    let done = std::panic::catch_unwind(|| run(target, &bytes));
    assert!(done.is_ok(), "target {target}, file {name}");
}

#[test]
fn every_seed_keeps_the_promises() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/seeds");
    for target in TARGETS {
        let found = files(&seeds.join(target.name));
        assert!(found.len() >= 3, "target {} has {} seeds", target.name, found.len());
        for path in &found {
            replay(target.name, path);
        }
    }
    let nbytes: u64 = files(&seeds).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(nbytes <= 300 << 10, "seeds take {nbytes} bytes");
}

#[test]
fn every_fixture_keeps_the_promises_in_every_target() {
    let fixtures = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures"));
    assert!(fixtures.len() > 30);
    for path in fixtures {
        for target in TARGETS {
            replay(target.name, &path);
        }
    }
}

#[test]
fn every_target_has_a_shell() {
    let shells = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut found: Vec<_> = files(&shells).iter().map(|path| path.file_stem().unwrap().to_owned()).collect();
    let mut wanted: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    found.sort();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
}
