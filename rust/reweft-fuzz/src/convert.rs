//! From anything that opens to every format that is written, and back: the same tensors, or an error and no file.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use reweft::container::zip::Archive;
use reweft::write::{ConvertOptions, ConvertReport, Shared, TargetFormat, convert};
use reweft::{Checkpoint, OpenOptions};
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::pickle::archive_of;
use crate::sources::options;

/// Bytes of tensors that are written of one input; more would only make the fuzzer slow.
const WRITTEN_NBYTES: u64 = 1 << 18;

thread_local! {
    /// The folder that outputs are written to in turn.
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

pub(crate) fn body(bytes: &[u8]) {
    FOLDER.with_borrow_mut(|slot| {
        let folder = slot.get_or_insert_with(|| TempDir::new().unwrap()).path();
        round_trip(bytes.to_vec(), folder);
        round_trip(archive_of(bytes), folder);
    });
}

fn round_trip(bytes: Vec<u8>, folder: &Path) {
    let Ok(checkpoint) = Checkpoint::from_source("x".as_ref(), Arc::new(bytes), &options()) else { return };
    let nbytes = checkpoint.tensors().fold(0, |sum: u64, (_, info)| sum.saturating_add(info.nbytes()));
    if nbytes > WRITTEN_NBYTES {
        return;
    }
    for format in TargetFormat::ALL {
        for shared in [Shared::Duplicate, Shared::DropAliases] {
            let options = ConvertOptions { format: Some(*format), shared, sync: false, ..ConvertOptions::default() };
            write(&checkpoint, &folder.join("out"), &options);
            assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0, "files are left over");
        }
    }
}

fn write(checkpoint: &Checkpoint, out: &Path, options: &ConvertOptions) {
    let Ok(report) = convert(checkpoint, out, options, &mut |_, _| ()) else {
        assert!(!out.exists(), "an error leaves a file");
        return;
    };
    if options.format == Some(TargetFormat::Numpy) {
        compare_arrays(checkpoint, &report, out);
        return std::fs::remove_file(out).unwrap();
    }
    let ours = Checkpoint::open(out, &OpenOptions::default()).unwrap();
    assert_eq!(ours.len(), checkpoint.len() - report.dropped_aliases.len());
    for (key, info) in ours.tensors() {
        let before = checkpoint.get(key).unwrap();
        assert_eq!((before.dtype, &before.shape), (info.dtype, &info.shape), "{key:?}");
        assert_eq!(ours.read(key).unwrap(), checkpoint.read(key).unwrap(), "{key:?}");
    }
    for (alias, kept) in &report.dropped_aliases {
        assert_eq!(checkpoint.read(alias).unwrap(), checkpoint.read(kept).unwrap(), "{alias:?} {kept:?}");
    }
    match options.format {
        Some(TargetFormat::Safetensors) => compare(&ours, &std::fs::read(out).unwrap()),
        Some(TargetFormat::Torch) => assert!(ours.keys().eq(checkpoint.keys()), "the order of keys"),
        _ => {}
    }
    std::fs::remove_file(out).unwrap();
}

/// Each record of an `.npz` ends with the tensor's bytes, which start at a multiple of 64.
fn compare_arrays(checkpoint: &Checkpoint, report: &ConvertReport, out: &Path) {
    let archive = Archive::open(Arc::new(std::fs::read(out).unwrap())).unwrap();
    assert_eq!(archive.entries().len(), report.tensors);
    for key in checkpoint.keys().filter(|key| !report.dropped_aliases.contains_key(*key)) {
        let (record, bytes) = (archive.read(&format!("{key}.npy")).unwrap(), checkpoint.read(key).unwrap());
        let lead = record.len() - bytes.len();
        assert!(record.starts_with(b"\x93NUMPY") && lead.is_multiple_of(64), "{key:?}");
        assert_eq!(record[lead..], bytes, "{key:?}");
    }
}

/// What we read of a safetensors file, its own crate reads too.
fn compare(ours: &Checkpoint, bytes: &[u8]) {
    let theirs = SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for key in ours.keys() {
        assert_eq!(theirs.tensor(key).unwrap().data(), ours.read(key).unwrap(), "{key:?}");
    }
}
