//! Reading and converting checkpoints.

use std::path::Path;

use reweft::source::Access;
use reweft::write::{ConvertOptions, Shared, convert};
use reweft::{Checkpoint, Dtype, ErrorKind, KeyMap, OpenOptions, Rule};

use crate::fixture;

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&fixture(name), &OpenOptions::default()).unwrap()
}

fn shared(shared: Shared) -> ConvertOptions {
    ConvertOptions { shared, ..ConvertOptions::default() }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect()
}

#[test]
fn layouts_are_kept_and_read_in_row_major_order() {
    let checkpoint = open("checkpoints/state_dict.pt");
    let transposed = checkpoint.get("transposed").unwrap();
    assert_eq!((&transposed.shape[..], &transposed.strides[..]), (&[6, 4][..], &[1, 6][..]));
    assert_eq!(floats(&checkpoint.read("transposed").unwrap())[..5], [0.0, 6.0, 12.0, 18.0, 1.0]);
    let slice = checkpoint.get("slice").unwrap();
    assert_eq!((slice.storage_offset, &slice.strides[..]), (8, &[6, 1][..]));
    assert_eq!(floats(&checkpoint.read("slice").unwrap()), [8.0, 9.0, 10.0, 14.0, 15.0, 16.0]);
    assert_eq!(floats(&checkpoint.read("expanded").unwrap()), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    let in_order: Vec<f32> = (0..24_u8).map(f32::from).collect();
    assert_eq!(floats(&checkpoint.read("channels_last").unwrap()), in_order);
    assert!(checkpoint.read("empty").unwrap().is_empty());
    assert_eq!(checkpoint.read("scalar").unwrap(), 7_i64.to_le_bytes());
}

#[test]
fn shared_storages_are_one_storage() {
    let checkpoint = open("checkpoints/state_dict.pt");
    let storage = |key: &str| checkpoint.get(key).unwrap().storage;
    assert_eq!(storage("plain"), storage("transposed"));
    assert_eq!(storage("plain"), storage("slice"));
    assert_eq!(checkpoint.get("tied.a").unwrap(), checkpoint.get("tied.b").unwrap());
    assert_ne!(storage("plain"), storage("half"));
}

#[test]
fn dtypes_without_a_storage_class_are_read() {
    let checkpoint = open("checkpoints/state_dict.pt");
    let dtype = |key: &str| checkpoint.get(key).unwrap().dtype;
    assert_eq!([dtype("uint16"), dtype("float8"), dtype("bfloat16")], [Dtype::U16, Dtype::F8E4M3, Dtype::BF16]);
    assert_eq!(checkpoint.read("uint16").unwrap(), [1, 0, 255, 255]);
}

#[test]
fn mapped_read_and_memory_agree() {
    let path = fixture("checkpoints/state_dict.pt");
    let bytes = std::sync::Arc::new(std::fs::read(&path).unwrap());
    let options = OpenOptions::default();
    let mapped = OpenOptions { access: Access::Map, ..OpenOptions::default() };
    let files = [
        Checkpoint::open(&path, &options).unwrap(),
        Checkpoint::open(&path, &mapped).unwrap(),
        Checkpoint::from_source(Path::new("bytes"), bytes, &options).unwrap(),
    ];
    for key in files[0].keys() {
        let read: Vec<Vec<u8>> = files.iter().map(|file| file.read(key).unwrap()).collect();
        assert!(read.windows(2).all(|pair| pair[0] == pair[1]), "{key}");
    }
}

#[test]
fn the_legacy_stream_reads_as_the_zip_archive() {
    let (zip, legacy) = (open("checkpoints/state_dict.pt"), open("checkpoints/legacy.pt"));
    assert_eq!(legacy.format().name(), "torch legacy");
    assert!(zip.keys().eq(legacy.keys()));
    for key in zip.keys() {
        assert_eq!(zip.read(key).unwrap(), legacy.read(key).unwrap(), "{key}");
        assert_eq!(zip.get(key).unwrap().strides, legacy.get(key).unwrap().strides, "{key}");
    }
}

#[test]
fn top_level_key_and_rules_lead_to_the_weights() {
    let options = OpenOptions { top_level_key: Some("model_state_dict".into()), ..OpenOptions::default() };
    let keys = KeyMap::new().rule(Rule::new(r"^module\.", "").unwrap());
    let checkpoint = Checkpoint::open(&fixture("checkpoints/training.pt"), &options).unwrap().rekey(&keys).unwrap();
    let names: Vec<&str> = checkpoint.keys().collect();
    assert_eq!(names[..2], ["0.weight", "0.bias"]);
    let options = OpenOptions { top_level_key: Some("model_state".into()), ..OpenOptions::default() };
    let error = Checkpoint::open(&fixture("checkpoints/training.pt"), &options).unwrap_err();
    assert_eq!((error.kind(), error.hint()), (ErrorKind::NotFound, Some("did you mean \"model_state_dict\"?")));
}

#[test]
fn a_rule_that_matches_nothing_is_noticed() {
    let keys = KeyMap::new().rule(Rule::new("^nothing", "").unwrap());
    let checkpoint = open("checkpoints/fc.pt").rekey(&keys).unwrap();
    assert_eq!(checkpoint.notices(), ["rule \"^nothing\" matched no key"]);
}

#[test]
fn tensors_in_an_unknown_object_are_named_and_refused() {
    let checkpoint = open("checkpoints/unknown_class.pt");
    assert_eq!(checkpoint.unknown_globals()[0], "__main__.Unknown");
    let unreadable: Vec<&str> = checkpoint.unreadable().map(|(key, _)| key).collect();
    assert_eq!(unreadable, ["y"], "the other object holds no tensor, and the module is read by its state");
    assert!(checkpoint.get("m.weight").is_ok());
    let error = checkpoint.get("y").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.safetensors");
    assert!(convert(&checkpoint, &out, &shared(Shared::Error), &mut |_, _| ()).is_err());
    assert!(!out.exists());
}

#[test]
fn a_missing_crc_is_noticed_and_the_bytes_are_read() {
    let checkpoint = open("checkpoints/no_crc.pt");
    assert!(checkpoint.notices()[0].contains("no CRC"), "{:?}", checkpoint.notices());
    assert_eq!(floats(&checkpoint.read("a").unwrap()), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn shared_tensors_need_a_choice() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.safetensors");
    let keys = KeyMap::new().select("^tied").unwrap();
    let checkpoint = open("checkpoints/state_dict.pt").rekey(&keys).unwrap();
    let error = convert(&checkpoint, &out, &shared(Shared::Error), &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("\"tied.a\" and \"tied.b\""), "{error}");
    let report = convert(&checkpoint, &out, &shared(Shared::DropAliases), &mut |_, _| ()).unwrap();
    assert_eq!((report.tensors, &report.dropped_aliases["tied.b"]), (1, &"tied.a".to_owned()));
    let report = convert(&checkpoint, &out, &shared(Shared::Duplicate), &mut |_, _| ()).unwrap();
    assert_eq!(report.tensors, 2);
    let all = open("checkpoints/state_dict.pt");
    let error = convert(&all, &out, &shared(Shared::DropAliases), &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("share bytes"), "overlapping views are no aliases: {error}");
}

#[test]
fn converting_safetensors_again_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["1", "2"].map(|name| folder.path().join(name).with_extension("safetensors"));
    let checkpoint = open("checkpoints/state_dict.pt");
    let report = convert(&checkpoint, &first, &shared(Shared::Duplicate), &mut |_, _| ()).unwrap();
    assert_eq!(report.tensors, checkpoint.len());
    let again = Checkpoint::open(&first, &OpenOptions::default()).unwrap();
    for key in checkpoint.keys() {
        assert_eq!(again.read(key).unwrap(), checkpoint.read(key).unwrap(), "{key}");
    }
    convert(&again, &second, &shared(Shared::Error), &mut |_, _| ()).unwrap();
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    let error = convert(&again, &first, &shared(Shared::Error), &mut |_, _| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "over its own source");
}
