//! Shard indexes: an input as the index over files that exist, and as a file that an index names.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use reweft::source::Access;
use reweft::{Checkpoint, OpenOptions};
use tempfile::TempDir;

use crate::archive::stored;
use crate::memory::within;
use crate::sources::{OPEN_FACTOR, OPEN_NBYTES, options};

/// A file with the tensors `a` and `b` of one byte each.
const AB: &[u8] =
    br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
/// A pickle of the dict `{"c": tensor of one byte}`.
const C: &[u8] = b"\x80\x02}X\x01\0\0\0cctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nByteStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQK\0K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs.";
/// Keys by the file that an index may put them into.
const HELD: &[(&str, &str)] = &[("a", "ab.safetensors"), ("b", "ab.safetensors"), ("c", "sub/c.bin")];
/// Bytes that the files of the folder add to what opening may hold.
const FILES_NBYTES: u64 = 1 << 16;

thread_local! {
    /// The folder of the index, inside one that it must not leave.
    static OUTER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

pub(crate) fn body(bytes: &[u8]) {
    OUTER.with_borrow_mut(|slot| {
        let outer = slot.get_or_insert_with(furnished).path();
        let folder = outer.join("folder");
        as_index(bytes, &folder);
        as_file(bytes, &folder);
    });
}

/// A folder with two files, and with places that an index must not lead to.
fn furnished() -> TempDir {
    let outer = TempDir::new().unwrap();
    let folder = outer.path().join("folder");
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    let ab = [&(AB.len() as u64).to_le_bytes(), AB, &[1, 2]].concat();
    std::fs::write(folder.join("ab.safetensors"), &ab).unwrap();
    std::fs::write(outer.path().join("secret.safetensors"), &ab).unwrap();
    std::fs::write(folder.join("sub/c.bin"), stored(&[("x/data.pkl", C), ("x/data/0", &[3]), ("x/version", b"3\n")]))
        .unwrap();
    std::os::unix::fs::symlink("../secret.safetensors", folder.join("out")).unwrap();
    outer
}

fn open(path: &Path, access: Access, nbytes: usize) -> Result<Checkpoint, String> {
    let options = OpenOptions { access, ..options() };
    let limit = OPEN_FACTOR * (nbytes as u64 + FILES_NBYTES) + OPEN_NBYTES;
    within(limit, "opening", || Checkpoint::open(path, &options)).map_err(|error| error.to_string())
}

fn read_all(checkpoint: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    checkpoint.tensors().map(|(key, _)| (key.to_owned(), checkpoint.read(key).unwrap())).collect()
}

fn as_index(bytes: &[u8], folder: &Path) {
    let path = folder.join("index.json");
    std::fs::write(&path, bytes).unwrap();
    let [read, mapped] = [Access::Read, Access::Map].map(|access| open(&path, access, bytes.len()));
    assert_eq!(read.as_ref().map(|_| ()).err(), mapped.as_ref().map(|_| ()).err());
    let Ok(checkpoint) = read else { return };
    if checkpoint.format().name() != "shard index" {
        return;
    }
    let found = read_all(&checkpoint);
    assert_eq!(found, read_all(&mapped.unwrap()));
    for (key, bytes) in &found {
        let value = HELD.iter().position(|held| held.0 == key);
        assert_eq!(value.map(|place| vec![u8::try_from(place + 1).unwrap()]).as_ref(), Some(bytes), "{key:?}");
    }
    // Every key leads to the file that holds it, and is there once.
    let index: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert!(map.iter().all(|(key, file)| HELD.iter().any(|held| *held == (key, file.as_str().unwrap()))));
    let keys: BTreeSet<_> = found.iter().map(|(key, _)| key).collect();
    assert_eq!((keys, found.len()), (map.keys().collect(), map.len()));
}

/// The first tensor that the input holds, named by an index, is what it is without one.
fn as_file(bytes: &[u8], folder: &Path) {
    let (file, index) = (folder.join("input.bin"), folder.join("input.json"));
    std::fs::write(&file, bytes).unwrap();
    let Ok(alone) = open(&file, Access::Read, bytes.len()) else { return };
    let Some((key, info)) = alone.tensors().next() else { return };
    let text = serde_json::json!({ "weight_map": { key: "input.bin" } });
    std::fs::write(&index, text.to_string()).unwrap();
    let sharded = match open(&index, Access::Read, bytes.len()) {
        Ok(sharded) => sharded,
        Err(error) => {
            assert_eq!(alone.format().name(), "shard index", "alone it is read: {error}");
            return;
        }
    };
    let found = sharded.get(key).unwrap();
    assert_eq!((found.dtype, &found.shape, &found.strides), (info.dtype, &info.shape, &info.strides));
    if info.nbytes() < 1 << 20 {
        assert_eq!(sharded.read(key).ok(), alone.read(key).ok());
    }
}
