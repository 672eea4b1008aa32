//! Pickles whose tensors say what their storages do not hold, in an archive that is sound.

use std::path::Path;
use std::sync::Arc;

use reweft::{Checkpoint, ErrorKind, OpenOptions, Result};

use crate::build::{NO_HOOKS, Record, Tensor, Zip, dict, int, pt, text};

const DATA: &[u8] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    Checkpoint::from_source(Path::new("x.pt"), Arc::new(bytes), &OpenOptions::default())
}

/// Opens an archive with one tensor under the key `w` and the storage `0` of 16 bytes.
fn with(tensor: &Tensor<'_>) -> Result<Checkpoint> {
    open(pt(&dict(&[("w", tensor.opcodes())]), &[("0", DATA)]))
}

fn refusal(tensor: &Tensor<'_>) -> String {
    let error = with(tensor).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("x.pt: "), "{text}");
    format!("{:?} {text}", error.kind())
}

fn refused(tensor: &Tensor<'_>, wanted: &str) {
    let found = refusal(tensor);
    assert!(found.contains(wanted), "{found}");
}

#[test]
fn the_tensor_that_the_lies_are_made_of_is_read() {
    assert_eq!(with(&Tensor::default()).unwrap().read("w").unwrap(), DATA);
}

#[test]
fn class_15_persistent_ids_that_name_no_storage() {
    for key in ["../0", "/etc/passwd", "0/../0", "a/b", "..", ".", "", "a\\b", ".hidden"] {
        refused(&Tensor { key, ..Tensor::default() }, "key leaves the folder of the storages");
    }
    refused(&Tensor { key: "1", ..Tensor::default() }, "no such record");
    refused(&Tensor { class: "torch\nNoStorage", ..Tensor::default() }, "torch.NoStorage is not known");
    let good = Tensor::default().opcodes();
    let swap = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).unwrap();
        let opcodes = [&good[..at], to, &good[at + from.len()..]].concat();
        match open(pt(&dict(&[("w", opcodes)]), &[("0", DATA)])) {
            Ok(checkpoint) => format!("{:?}", checkpoint.unreadable().collect::<Vec<_>>()),
            Err(error) => error.to_string(),
        }
    };
    assert!(swap(&text("storage"), &text("module")).contains("which reweft does not know"));
    assert!(swap(&text("storage"), b"K\x01").contains("names something else than a storage"));
    assert!(swap(&text("0"), b"K\0").contains("key or location is no text"));
    assert!(swap(&text("cpu"), b"N").contains("key or location is no text"));
    assert!(swap(&text("cpu"), b"").contains("is no tuple of 5 or 6"));
    assert!(swap(&text("cpu"), &[text("cpu"), text("x"), text("y")].concat()).contains("persistent id"));
    assert!(swap(&int(4), &text("4")).contains("storage size is str \"4\""));
}

#[test]
fn class_15_a_hundred_thousand_storages() {
    let keys: Vec<String> = (0..100_000).map(|number| number.to_string()).collect();
    let tensors: Vec<(&str, Vec<u8>)> = keys
        .iter()
        .map(|key| (key.as_str(), Tensor { key, numel: 1, size: &[1], ..Tensor::default() }.opcodes()))
        .collect();
    let names: Vec<String> = keys.iter().map(|key| format!("a/data/{key}")).collect();
    let pickle = dict(&tensors);
    let mut records: Vec<(&str, &[u8])> = vec![("a/data.pkl", &pickle), ("a/version", b"3\n")];
    records.extend(names.iter().map(|name| (name.as_str(), DATA[..4].as_ref())));
    let mut zip = Zip::new(&records);
    zip.widen_end(records.len() as u64);
    assert_eq!(open(zip.bytes).unwrap().storages().len(), 100_000);
}

#[test]
fn class_17_numbers_that_overflow() {
    refused(&Tensor { numel: i64::MAX, ..Tensor::default() }, "storage takes 2^64 bytes");
    refused(&Tensor { numel: 1 << 62, ..Tensor::default() }, "storage takes 2^64 bytes");
    refused(&Tensor { numel: -1, ..Tensor::default() }, "storage size is int -1");
    refused(&Tensor { numel: i64::MIN, ..Tensor::default() }, "storage size is int");
    refused(&Tensor { size: &[1 << 62, 4], stride: &[0, 0], ..Tensor::default() }, "overflows");
    refused(&Tensor { size: &[i64::MAX, i64::MAX, 2], stride: &[0, 0, 0], ..Tensor::default() }, "overflows");
    let huge = [b"\x8a\x09".as_slice(), &[0xff; 8], &[0]].concat();
    let opcodes = dict(&[("w", Tensor::default().opcodes())]);
    let at = opcodes.windows(10).position(|window| window == int(4)).unwrap();
    let changed = [&opcodes[..at], &huge, &opcodes[at + 10..]].concat();
    assert!(open(pt(&changed, &[("0", DATA)])).unwrap_err().to_string().contains("storage size is int"));
}

#[test]
fn class_18_records_shorter_or_longer_than_their_storage() {
    for numel in [0, 3, 5, 1 << 40] {
        let wanted = format!("record has 16 bytes, storage needs {}", 4 * numel);
        refused(&Tensor { numel, size: &[0], ..Tensor::default() }, &wanted);
    }
}

#[test]
fn class_19_windows_behind_their_storage() {
    let wrong: &[(i64, &[i64], &[i64], &str)] = &[
        (0, &[5], &[1], "needs 20 bytes, storage has 16"),
        (1, &[4], &[1], "needs 20 bytes, storage has 16"),
        (4, &[1], &[1], "needs 20 bytes, storage has 16"),
        (0, &[2, 2], &[3, 1], "needs 20 bytes, storage has 16"),
        (i64::MAX, &[1], &[1], "overflows"),
        (-1, &[1], &[1], "storage offset is int -1"),
        (0, &[-1], &[1], "size is int -1"),
        (0, &[2], &[-1], "stride is int -1"),
        (0, &[3], &[i64::MAX], "overflows"),
        (0, &[1 << 32, 1 << 31], &[1 << 31, 1], "overflows"),
        (0, &[4], &[1, 1], "1 sizes and 2 strides"),
        (0, &[2, 2], &[1], "2 sizes and 1 strides"),
    ];
    for (storage_offset, size, stride, wanted) in wrong {
        refused(&Tensor { storage_offset: *storage_offset, size, stride, ..Tensor::default() }, wanted);
    }
    let deep = [1; 65];
    refused(&Tensor { size: &deep, stride: &deep, ..Tensor::default() }, "at most 64");
    assert!(with(&Tensor { size: &deep[1..], stride: &deep[1..], ..Tensor::default() }).is_ok());
    // What has no elements lies nowhere.
    let none = Tensor { storage_offset: 99, size: &[0, 7], stride: &[7, 1], ..Tensor::default() };
    assert_eq!(with(&none).unwrap().read("w").unwrap(), b"");
}

#[test]
fn class_19_an_empty_tensor_is_read_however_its_storage_is_packed() {
    let pickle = dict(&[("w", Tensor { numel: 0, size: &[0], ..Tensor::default() }.opcodes())]);
    let unknown = Record { method: 2048, ..Record::new("a/data/0", b"") };
    let zip = Zip::of(&[Record::new("a/data.pkl", &pickle), unknown, Record::new("a/version", b"3\n")]);
    assert_eq!(open(zip.bytes).unwrap().read("w").unwrap(), b"");
}

#[test]
fn class_20_a_few_bytes_expanded_to_a_terabyte() {
    let checkpoint = with(&Tensor { size: &[1 << 38], stride: &[0], ..Tensor::default() }).unwrap();
    assert_eq!(checkpoint.get("w").unwrap().nbytes(), 1 << 40);
    let error = checkpoint.read("w").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().contains("max_repeated_nbytes is 1073741824"), "{error}");
    let small = with(&Tensor { size: &[3], stride: &[0], storage_offset: 1, ..Tensor::default() }).unwrap();
    assert_eq!(small.read("w").unwrap(), DATA[4..8].repeat(3));
}

#[test]
fn class_21_one_storage_described_in_two_ways() {
    let two = |other: Tensor<'_>| {
        let pickle = dict(&[("a", Tensor::default().opcodes()), ("b", other.opcodes())]);
        open(pt(&pickle, &[("0", DATA)])).map_err(|error| error.to_string())
    };
    let shared = two(Tensor { storage_offset: 1, size: &[3], ..Tensor::default() }).unwrap();
    assert_eq!(shared.storages().len(), 1);
    for other in [
        Tensor { numel: 2, size: &[2], ..Tensor::default() },
        Tensor { class: "torch\nIntStorage", ..Tensor::default() },
        Tensor { class: "torch\nHalfStorage", numel: 8, ..Tensor::default() },
    ] {
        let error = two(other).unwrap_err();
        assert!(error.contains("described in two ways"), "{error}");
    }
}

#[test]
fn class_23_byte_orders() {
    let with = |order: &[u8], class: &str, itemsize: i64| {
        let numel = 16 / itemsize;
        let tensor = Tensor { class, numel, size: &[numel], ..Tensor::default() };
        let pickle = dict(&[("w", tensor.opcodes())]);
        let version = b"3\n".as_slice();
        let records =
            [("a/data.pkl", pickle.as_slice()), ("a/byteorder", order), ("a/data/0", DATA), ("a/version", version)];
        open(Zip::new(&records).bytes).map_err(|error| error.to_string())?.read("w").map_err(|error| error.to_string())
    };
    for (class, unit, itemsize) in [
        ("Byte", 1, 1),
        ("Char", 1, 1),
        ("Bool", 1, 1),
        ("Short", 2, 2),
        ("Half", 2, 2),
        ("BFloat16", 2, 2),
        ("Int", 4, 4),
        ("Float", 4, 4),
        ("Long", 8, 8),
        ("Double", 8, 8),
        ("ComplexFloat", 4, 8),
        ("ComplexDouble", 8, 16),
    ] {
        let class = format!("torch\n{class}Storage");
        let swapped: Vec<u8> = DATA.chunks(unit).flat_map(|part| part.iter().rev()).copied().collect();
        assert_eq!(with(b"little", &class, itemsize).unwrap(), DATA, "{class}");
        assert_eq!(with(b"big", &class, itemsize).unwrap(), swapped, "{class}");
    }
    let long = vec![b'x'; 10 << 20];
    for order in [b"LITTLE".as_slice(), b"", b"big\n", b"middle", &long] {
        let error = with(order, "torch\nFloatStorage", 4).unwrap_err();
        assert!(error.contains("byte order is neither little nor big"), "{error}");
    }
}

#[test]
fn class_24_dtypes_over_untyped_storages() {
    let v3 = |class: &str, dtype: &str, numel: i64, size: i64| {
        let mut opcodes = Tensor { class, numel, size: &[size], ..Tensor::default() }.opcodes();
        let at = opcodes.windows(2).position(|window| window == b"v2").unwrap();
        opcodes[at + 1] = b'3';
        opcodes.truncate(opcodes.len() - 2);
        opcodes.extend([b"ctorch\n".as_slice(), dtype.as_bytes(), b"\ntR"].concat());
        open(pt(&dict(&[("w", opcodes)]), &[("0", DATA)]))
    };
    let untyped = "torch.storage\nUntypedStorage";
    for (dtype, itemsize) in
        [("uint16", 2), ("float8_e4m3fn", 1), ("float4_e2m1fn_x2", 1), ("bits16", 2), ("uint64", 8)]
    {
        let good = v3(untyped, dtype, 16, 16 / itemsize).unwrap();
        assert_eq!(good.read("w").unwrap(), DATA, "{dtype}");
        assert!(v3(untyped, dtype, 16, 16 / itemsize + 1).is_err(), "{dtype}: an element more");
        let record = v3(untyped, dtype, 16 / itemsize, 1);
        assert!(record.is_err() || itemsize == 1, "{dtype}: untyped storages count bytes");
    }
    let unknown = v3(untyped, "float3_e1m1", 16, 1).unwrap();
    assert_eq!(unknown.unreadable().collect::<Vec<_>>(), [("w", "its dtype is not known")]);
    let none = with(&Tensor { class: untyped, numel: 16, size: &[1], rest: NO_HOOKS, ..Tensor::default() });
    assert!(none.unwrap_err().to_string().contains("states no dtype"));
}
