//! Archives that lie, one lie at a time: whatever two readers could understand differently is an error.

use std::sync::Arc;

use reweft::container::zip::Archive;
use reweft::source::ReadAt;
use reweft::{Error, Result};

use crate::build::{Record, Zip};

const RECORDS: &[(&str, &[u8])] = &[("a/data.pkl", b"\x80\x02}."), ("a/data/0", b"0123456789"), ("a/version", b"3\n")];

/// Opens an archive and reads every record of it.
fn read(bytes: Vec<u8>) -> Result<Vec<(String, Vec<u8>)>> {
    let archive = Archive::open(Arc::new(bytes))?;
    archive.entries().keys().map(|name| Ok((name.clone(), archive.read(name)?))).collect()
}

fn refusal(bytes: Vec<u8>) -> String {
    match read(bytes) {
        Ok(records) => format!("accepted with {} records", records.len()),
        Err(error) => error.to_string(),
    }
}

/// What is wrong, words of the error, and the change to a good archive.
type Lie = (&'static str, &'static str, fn(&mut Zip));

/// Checks that each change to a good archive is refused in the words given.
fn refused(lies: &[Lie]) {
    let good = Zip::new(RECORDS);
    assert_eq!(read(good.bytes.clone()).unwrap().len(), 3);
    for (what, wanted, lie) in lies {
        let mut zip = good.clone();
        lie(&mut zip);
        let found = refusal(zip.bytes);
        assert!(found.contains(wanted), "{what}: {found}");
    }
}

#[test]
fn class_30_bytes_around_the_archive_and_ends_that_are_none() {
    refused(&[
        ("bytes before", "does not end where the end records begin", |zip| zip.insert(0, b"x")),
        ("a signature before", "does not end where the end records begin", |zip| zip.insert(0, b"PK\x03\x04")),
        ("bytes behind", "1 bytes stand behind the archive", |zip| zip.bytes.push(0)),
        ("cut off", "no end record", |zip| zip.bytes.truncate(zip.end)),
        ("another disk", "split over several files", |zip| zip.put(zip.end + 4, &[1])),
        ("directory on another disk", "split over several files", |zip| zip.put(zip.end + 6, &[1])),
        ("entries on another disk", "split over several files", |zip| zip.put(zip.end + 8, &[2])),
        ("record on another disk", "on another disk", |zip| zip.put(zip.central[1] + 34, &[1])),
        ("end record in the comment", "two end records", |zip| {
            let end = zip.bytes[zip.end..].to_vec();
            zip.bytes.extend(end);
            zip.put(zip.end + 20, &[22, 0]);
        }),
        ("archive in the comment", "two end records", |zip| {
            let inner = zip.bytes.clone();
            zip.bytes.extend(&inner);
            zip.put(zip.end + 20, &u16::try_from(inner.len()).unwrap().to_le_bytes());
        }),
        ("locator without a record", "locator does not point at the record before it", |zip| {
            zip.insert(zip.end, b"PK\x06\x07\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0");
        }),
        ("locator that points elsewhere", "locator does not point at the record before it", |zip| {
            zip.widen_end(3);
            zip.put(zip.end - 12, &[0]);
        }),
        ("locator of three disks", "locator does not point at the record before it", |zip| {
            zip.widen_end(3);
            zip.put(zip.end - 4, &[3]);
        }),
        ("no record where the locator points", "zip64 end record is not understood", |zip| {
            zip.widen_end(3);
            zip.put(zip.end - 76, b"XX");
        }),
        ("zip64 end record of another size", "zip64 end record is not understood", |zip| {
            zip.widen_end(3);
            zip.put(zip.end - 72, &[45]);
        }),
    ]);
}

#[test]
fn class_31_counts_and_places_of_the_directory() {
    refused(&[
        ("one entry more", "has 3 entries, the end record says 4", |zip| zip.put(zip.end + 8, &[4, 0, 4, 0])),
        ("one entry less", "has 3 entries, the end record says 2", |zip| zip.put(zip.end + 8, &[2, 0, 2, 0])),
        ("as many as numbers go", "the end record says 65535", |zip| zip.put(zip.end + 8, &[0xff; 4])),
        ("2^64-1 entries", "the end record says 18446744073709551615", |zip| zip.widen_end(u64::MAX)),
        ("directory a byte too long", "does not end where", |zip| zip.bytes[zip.end + 12] += 1),
        ("directory a byte too short", "does not end where", |zip| zip.bytes[zip.end + 12] -= 1),
        ("directory of 4 GiB", "does not end where", |zip| zip.put(zip.end + 12, &[0xff; 4])),
        ("directory a byte later", "does not end where", |zip| zip.bytes[zip.end + 16] += 1),
        ("gap before the end record", "does not end where", |zip| zip.insert(zip.end, b"gap")),
        ("gap before the directory", "belong to neither", |zip| {
            zip.insert(zip.central[0], b"gap");
            zip.bytes[zip.end + 3 + 16] += 3;
        }),
        ("gap between two records", "belong to neither", |zip| {
            zip.insert(zip.local[2], b"gap");
            zip.bytes[zip.central[2] + 3 + 42] += 3;
            zip.bytes[zip.end + 3 + 16] += 3;
        }),
        ("directory of something else", "no directory header here", |zip| zip.put(zip.central[1], b"XX")),
        ("name behind the directory", "runs behind the directory", |zip| zip.put(zip.central[2] + 28, &[0xff])),
        ("comment behind the directory", "runs behind the directory", |zip| zip.put(zip.central[2] + 32, &[1])),
    ]);
}

#[test]
fn class_32_local_headers_that_differ() {
    refused(&[
        ("signature", "no local header where the directory says", |zip| zip.put(zip.local[1], b"XX")),
        ("flags", "differ in flags", |zip| zip.put(zip.local[1] + 6, &[2])),
        ("method", "differ in method", |zip| zip.put(zip.local[1] + 8, &[8])),
        ("CRC", "differ in CRC", |zip| zip.bytes[zip.local[1] + 14] ^= 1),
        ("packed size", "differ in size", |zip| zip.bytes[zip.local[1] + 18] += 1),
        ("size", "differ in size", |zip| zip.bytes[zip.local[1] + 22] -= 1),
        ("name", "differ in name", |zip| zip.put(zip.local[1] + 30, b"b")),
        ("length of the name", "differ in name", |zip| zip.bytes[zip.local[1] + 26] -= 1),
        ("length of the extra field", "runs into what follows it", |zip| zip.put(zip.local[1] + 28, &[2])),
        ("mark of a folder", "marked as a folder", |zip| zip.put(zip.central[1] + 38, &[0x10])),
        ("offset", "overlaps what follows it", |zip| zip.bytes[zip.central[1] + 42] -= 1),
    ]);
}

/// A record whose sizes stand behind its data, as `torch.save` writes all of them.
fn deferred(name: &str, data: &[u8], signature: bool, wide: bool) -> Record {
    let mut record = Record { flags: 8, ..Record::new(name, data) };
    if signature {
        record.behind.extend(b"PK\x07\x08");
    }
    record.behind.extend(record.crc.to_le_bytes());
    for _ in 0..2 {
        let nbytes = u64::from(record.nbytes).to_le_bytes();
        record.behind.extend(if wide { &nbytes } else { &nbytes[..4] });
    }
    record
}

#[test]
fn class_33_flags_and_descriptors() {
    for bit in [0, 5, 6, 13] {
        let mut record = Record::new("a/data.pkl", b"N.");
        record.flags = 1 << bit;
        let found = refusal(Zip::of(&[record]).bytes);
        assert!(found.contains("encrypted"), "bit {bit}: {found}");
    }
    for (signature, wide) in [(true, false), (true, true), (false, false), (false, true)] {
        let record = deferred("a/data.pkl", b"N.", signature, wide);
        let nbytes = record.behind.len();
        let good = Zip::of(&[record]);
        assert_eq!(read(good.bytes.clone()).unwrap()[0].1, b"N.", "signature {signature}, wide {wide}");
        let descriptor = good.central[0] - nbytes;
        for at in descriptor..good.central[0] {
            let mut zip = good.clone();
            zip.bytes[at] ^= 1;
            let found = refusal(zip.bytes);
            assert!(found.contains("descriptor and directory differ"), "byte {at} of {signature} {wide}: {found}");
        }
    }
    let mut unannounced = deferred("a/data.pkl", b"N.", true, false);
    unannounced.flags = 0;
    assert!(refusal(Zip::of(&[unannounced]).bytes).contains("belong to neither"));
}

#[test]
fn class_34_wrong_and_absent_crcs() {
    let mut wrong = Record::new("a/data.pkl", b"N.");
    wrong.crc ^= 1;
    assert!(refusal(Zip::of(&[wrong]).bytes).contains("CRC of the bytes is"));
    let absent = Record { crc: 0, ..Record::new("a/data.pkl", b"N.") };
    let archive = Archive::open(Arc::new(Zip::of(&[absent]).bytes)).unwrap();
    assert!(archive.entries()["a/data.pkl"].crc_is_absent());
    assert_eq!(archive.read("a/data.pkl").unwrap(), b"N.");
}

#[test]
fn class_35_names_that_two_readers_take_for_one() {
    let pair = |left: &str, right: &str| refusal(Zip::new(&[(left, b"1"), (right, b"2")]).bytes);
    assert!(pair("a/data/0", "a/data/0").contains("two records have this name"));
    assert!(pair("a/data/x", "a/data/X").contains("but for the case of letters"));
    assert!(pair("a/DATA.PKL", "a/data.pkl").contains("but for the case of letters"));
    for name in ["a/x\0y", "a\\x", "a/x\ny", "a/x\u{7f}"] {
        assert!(pair("a/x", name).contains("backslash or control character"), "{name:?}");
    }
    // Nothing is unpacked to a disk, so these are two names to everybody.
    assert_eq!(pair("a/e\u{301}", "a/\u{e9}"), "accepted with 2 records");
    assert_eq!(pair("a/x", "a/x."), "accepted with 2 records");
    let mut latin = Zip::new(&[("a/x", b"1")]);
    latin.put(latin.central[0] + 46 + 2, b"\xe9");
    assert!(refusal(latin.bytes).contains("not UTF-8"));
}

#[test]
fn class_36_records_in_each_other() {
    refused(&[
        ("two entries, one header", "overlaps what follows it", |zip| {
            let first = zip.bytes[zip.central[0] + 42..zip.central[0] + 46].to_vec();
            zip.put(zip.central[1] + 42, &first);
        }),
        ("record that reaches into the next", "overlaps what follows it", |zip| {
            zip.put(zip.central[1] + 20, &[11, 0, 0, 0, 11]);
        }),
        ("record that reaches into the directory", "overlaps what follows it", |zip| {
            zip.put(zip.central[2] + 20, &[3, 0, 0, 0, 3]);
        }),
        ("header in another record's data", "overlaps what follows it", |zip| {
            let inside = u32::try_from(zip.local[1] + 40).unwrap();
            zip.put(zip.central[2] + 42, &inside.to_le_bytes());
        }),
        ("header behind the directory", "overlaps what follows it", |zip| {
            let end = u32::try_from(zip.end).unwrap();
            zip.put(zip.central[2] + 42, &end.to_le_bytes());
        }),
        ("nothing at the start", "stand before the archive", |zip| zip.bytes[zip.central[0] + 42] += 1),
    ]);
}

/// A zip64 extra field with these values.
fn wide(values: &[u64]) -> Vec<u8> {
    let mut extra = vec![1, 0, u8::try_from(8 * values.len()).unwrap(), 0];
    extra.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    extra
}

/// Says of a record that its size, its packed size and its header's offset are in the extra field.
fn look_elsewhere(record: Record, extra: Vec<u8>, fields: &[usize]) -> String {
    let mut zip = Zip::of(&[Record { extra, ..record }]);
    for field in fields {
        zip.put(zip.central[0] + field, &[0xff; 4]);
    }
    refusal(zip.bytes)
}

#[test]
fn class_37_numbers_of_64_bits() {
    let record = || Record::new("a/data.pkl", b"N.");
    let found = |extra, fields: &[usize]| look_elsewhere(record(), extra, fields);
    assert_eq!(found(wide(&[2, 2, 0]), &[24, 20, 42]), "accepted with 1 records");
    assert_eq!(found(wide(&[2]), &[24]), "accepted with 1 records");
    assert!(found(Vec::new(), &[24]).contains("announced, but absent"));
    assert!(found(wide(&[2]), &[24, 20]).contains("announced, but absent"));
    assert!(found(wide(&[2]), &[]).contains("8 bytes that nothing points to"));
    assert!(found(wide(&[2, 2]), &[24]).contains("8 bytes that nothing points to"));
    assert!(found([wide(&[2]), wide(&[2])].concat(), &[24]).contains("two zip64 extra fields"));
    assert!(found(vec![1, 0, 9, 0, 1], &[24]).contains("runs behind its header"));
    for lie in [3, u64::MAX, 1 << 63, u64::from(u32::MAX)] {
        assert!(found(wide(&[lie]), &[24]).contains("its packing cannot do"), "{lie}");
        assert!(found(wide(&[lie, lie]), &[24, 20]).contains("overlaps what follows it"), "{lie}");
        assert!(found(wide(&[lie]), &[42]).contains("before the archive"), "{lie}");
    }
    // The same in the local header, which a reader that streams believes.
    let local = |extra: Vec<u8>, fields: &[usize]| {
        let mut zip = Zip::of(&[Record { local_extra: extra, ..record() }]);
        for field in fields {
            zip.put(zip.local[0] + field, &[0xff; 4]);
        }
        refusal(zip.bytes)
    };
    assert_eq!(local(wide(&[2, 2]), &[22, 18]), "accepted with 1 records");
    assert!(local(wide(&[3, 2]), &[22, 18]).contains("differ in size"));
    assert!(local(wide(&[2, u64::MAX]), &[22, 18]).contains("differ in size"));
    assert!(local(Vec::new(), &[22]).contains("announced, but absent"));
    assert!(local(wide(&[2]), &[22, 18]).contains("announced, but absent"));
    let mut differ = Zip::new(RECORDS);
    differ.widen_end(3);
    differ.put(differ.end + 8, &[2, 0, 2, 0]);
    assert!(refusal(differ.bytes).contains("the two end records differ"));
}

#[test]
fn class_37_more_entries_than_16_bits_count() {
    let names: Vec<String> = (0..70_000).map(|number| format!("a/data/{number}")).collect();
    let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"1".as_slice())).collect();
    let mut zip = Zip::new(&records);
    let narrow = refusal(zip.bytes.clone());
    assert!(narrow.contains("has 70000 entries, the end record says 65535"), "{narrow}");
    zip.widen_end(70_000);
    assert_eq!(read(zip.bytes).unwrap().len(), 70_000);
}

/// A file with a hole of zeros, so that sizes above 4 GiB need no disk.
#[derive(Debug)]
struct Holed {
    head: Vec<u8>,
    hole: u64,
    tail: Vec<u8>,
}

impl ReadAt for Holed {
    fn len(&self) -> u64 {
        self.head.len() as u64 + self.hole + self.tail.len() as u64
    }

    fn read_exact_at(&self, byte_offset: u64, out: &mut [u8]) -> Result<()> {
        let tail = self.head.len() as u64 + self.hole;
        for (at, byte) in (byte_offset..).zip(out) {
            let place = match at.checked_sub(tail) {
                Some(at) => self.tail.get(usize::try_from(at).unwrap()),
                None => self.head.get(usize::try_from(at).unwrap()).or(Some(&0)),
            };
            *byte = *place.ok_or_else(|| Error::format("behind the end"))?;
        }
        Ok(())
    }
}

#[test]
fn class_37_sizes_around_4_gib() {
    for nbytes in (1_u64 << 32) - 3..(1 << 32) + 3 {
        // Sizes that fit 32 bits but are all ones mean "look elsewhere" as well.
        let is_wide = nbytes >= u64::from(u32::MAX);
        let extra = if is_wide { wide(&[nbytes, nbytes]) } else { Vec::new() };
        let mut zip =
            Zip::of(&[Record { crc: 0, extra: extra.clone(), local_extra: extra, ..Record::new("a/big", b"") }]);
        let size = if is_wide { u32::MAX } else { u32::try_from(nbytes).unwrap() };
        for at in [zip.local[0] + 18, zip.local[0] + 22, zip.central[0] + 20, zip.central[0] + 24] {
            zip.put(at, &size.to_le_bytes());
        }
        let directory = zip.central[0];
        zip.widen_end(1);
        // The 64-bit end record and its locator move with the directory.
        let (record, locator) = (zip.end - 76, zip.end - 20);
        zip.put(record + 48, &(directory as u64 + nbytes).to_le_bytes());
        zip.put(locator + 8, &(record as u64 + nbytes).to_le_bytes());
        let tail = zip.bytes.split_off(directory);
        let archive = Archive::open(Arc::new(Holed { head: zip.bytes, hole: nbytes, tail })).unwrap();
        let place = archive.place("a/big").unwrap();
        assert_eq!((place.data.start, place.data.end), (directory as u64, directory as u64 + nbytes), "{nbytes}");
    }
}

#[test]
fn class_38_deflated_records_that_lie() {
    let deflate = |data: &[u8]| {
        use std::io::Write;
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    let data = vec![7; 10_000];
    let record = |nbytes: usize| Record {
        packed: deflate(&data),
        nbytes: u32::try_from(nbytes).unwrap(),
        method: 8,
        ..Record::new("a/data.pkl", &data)
    };
    assert_eq!(read(Zip::of(&[record(10_000)]).bytes).unwrap()[0].1, data);
    assert!(refusal(Zip::of(&[record(9_999)]).bytes).contains("unpacks to more bytes"));
    assert!(refusal(Zip::of(&[record(10_001)]).bytes).contains("unpacks to 10000 bytes"));
    // No deflated record holds so much: a reader that believes the number reserves gigabytes.
    assert!(refusal(Zip::of(&[record(4_000_000_000)]).bytes).contains("its packing cannot do"));
    let mut cut = record(10_000);
    cut.packed.truncate(cut.packed.len() / 2);
    assert!(refusal(Zip::of(&[cut]).bytes).contains("deflated record"));
    assert!(refusal(Zip::of(&[Record { packed: vec![0xff; 20], ..record(100) }]).bytes).contains("deflated record"));
    let mut more = record(10_000);
    more.packed.push(0);
    assert!(refusal(Zip::of(&[more]).bytes).contains("1 bytes stand behind the deflated record's end"));
    let other = Record { method: 12, ..Record::new("a/data.pkl", b"N.") };
    assert!(refusal(Zip::of(&[other]).bytes).contains("zip method 12"));
}

#[test]
fn class_39_names_that_leave_the_archive() {
    for name in ["", "/x", "/", "../x", "a/../x", "a/..", "./x", "a//x", "a/./x"] {
        assert!(refusal(Zip::new(&[(name, b"1")]).bytes).contains("record name"), "{name:?}");
    }
    assert!(refusal(Zip::new(&[("C:/x", b"1")]).bytes).contains("begins with a drive"));
    let roots = |names: &[&str]| {
        let records: Vec<(&str, &[u8])> = names.iter().map(|name| (*name, b"1".as_slice())).collect();
        Archive::open(Arc::new(Zip::new(&records).bytes)).unwrap().root().map(str::to_owned).map_err(|e| e.to_string())
    };
    assert_eq!(roots(&["a/x", "a/y/z"]).unwrap(), "a");
    assert!(roots(&["a/x", "b/x"]).unwrap_err().contains("outside the folder"));
    assert!(roots(&["a/x", "ab/x"]).unwrap_err().contains("outside the folder"));
    assert!(roots(&["x", "a/x"]).unwrap_err().contains("do not lie in a folder"));
    assert!(roots(&["a/x", "a"]).unwrap_err().contains("outside the folder"));
}

#[test]
fn class_41_padding_in_extra_fields_is_no_gap() {
    let padding = [b"FB".as_slice(), &[20, 0], &[b'Z'; 20]].concat();
    let padded = Record { local_extra: padding.clone(), ..Record::new("a/data.pkl", b"N.") };
    let archive = Archive::open(Arc::new(Zip::of(&[padded]).bytes)).unwrap();
    let place = archive.place("a/data.pkl").unwrap();
    assert_eq!(place.data, 30 + 10 + 24..30 + 10 + 24 + 2);
}
