//! What a hostile file may cost: memory within a multiple of its size, time that grows as it does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use allocation_counter::measure;
use reweft::config::Config;
use reweft::{Checkpoint, ErrorKind, Limits, OpenOptions, Result};
use rustix::time::{ClockId, clock_gettime};

use crate::build::{NO_HOOKS, Record, Tensor, Zip, dict, int, pt, text};

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    Checkpoint::from_source(Path::new("x"), Arc::new(bytes), &OpenOptions::default())
}

/// Time that this thread computed, so that a busy machine changes little.
fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap(), u32::try_from(now.tv_nsec).unwrap())
}

/// The least of a few runs, as a checkpoint and as a config, dropping included.
fn cost(bytes: &[u8]) -> Duration {
    let source = Arc::new(bytes.to_vec());
    let run = || {
        let start = thread_time();
        drop(Checkpoint::from_source(Path::new("x"), source.clone(), &OpenOptions::default()));
        drop(Config::from_source(Path::new("x"), source.clone(), &OpenOptions::default()));
        thread_time().saturating_sub(start)
    };
    (0..3).map(|_| run()).min().unwrap()
}

/// Eight times the input may cost eight times the time; the factor of three is for caches and page faults. A quadratic
/// reader would take 64 times as long.
fn is_linear(what: &str, size: usize, make: impl Fn(usize) -> Vec<u8>) {
    let (small, large) = (make(size), make(8 * size));
    assert!(large.len() >= 6 * small.len(), "{what}: the input does not grow");
    let limit = 400 * large.len() as u64 + (8 << 20);
    let (few, mut many) = (cost(&small), Duration::ZERO);
    let held = measure(|| many = cost(&large)).bytes_max;
    assert!(held <= limit, "{what}: holds {held} bytes for {}", large.len());
    assert!(many <= 24 * few + Duration::from_millis(3), "{what}: {few:?}, then {many:?} for eight times the input");
}

/// Opcodes that remember the value on top as number `index`.
fn put(index: u32) -> Vec<u8> {
    [b"r".as_slice(), &index.to_le_bytes()].concat()
}

fn get(index: u32) -> Vec<u8> {
    [b"j".as_slice(), &index.to_le_bytes()].concat()
}

/// A pickle of a list: first `shared` under the memo number 1, then `user` once for each of `count`.
fn shared_by(count: usize, shared: &[u8], user: &[u8]) -> Vec<u8> {
    [b"\x80\x02](".as_slice(), shared, &put(1), &user.repeat(count), b"e."].concat()
}

fn numbers(count: usize) -> Vec<u8> {
    [b"](".as_slice(), &b"K\x07".repeat(count), b"e"].concat()
}

fn pairs(count: usize) -> Vec<u8> {
    let items = (0..count).flat_map(|number| [int(i64::try_from(number).unwrap()), b"N".to_vec()].concat());
    [b"}(".to_vec(), items.collect(), b"u".to_vec()].concat()
}

#[test]
fn class_3_containers_under_many_keys_end_at_a_limit() {
    // Nine levels of ten: a thousand million leaves in 200 bytes.
    let mut pickle = [b"\x80\x02)".to_vec(), put(0)].concat();
    for level in 0..9 {
        pickle.extend([b"0](".to_vec(), get(level).repeat(10), b"e".to_vec(), put(level + 1)].concat());
    }
    pickle.push(b'.');
    for bytes in [pickle.clone(), pt(&pickle, &[])] {
        let mut outcome = None;
        let held = measure(|| outcome = Some(open(bytes)));
        let error = outcome.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
        assert!(error.to_string().contains("max_expansion is 64"), "{error}");
        assert!(held.bytes_max < 16 << 20, "{} bytes for {}", held.bytes_max, pickle.len());
    }
}

#[test]
fn class_3_limits_can_be_raised() {
    let shared = shared_by(5_000, &pairs(100), &get(1));
    let limits = |max_expansion, max_keys| Limits { max_expansion, max_keys, ..Limits::default() };
    let open = |limits: Limits| {
        let options = OpenOptions { limits, ..OpenOptions::default() };
        Checkpoint::from_source(Path::new("x"), Arc::new(shared.clone()), &options)
    };
    let error = |limits| open(limits).unwrap_err().to_string();
    assert!(error(limits(64, 1_000_000)).contains("max_expansion is 64"));
    assert!(
        error(limits(1 << 20, 1_000)).contains("max_keys can be raised")
            || error(limits(1 << 20, 1_000)).contains("max_keys")
    );
    assert_eq!(open(limits(1 << 20, 1_000_000)).unwrap().values().len(), 500_100);
}

#[test]
fn class_8_nesting_a_million_deep_is_refused_by_its_keys() {
    const DEEP: usize = 1_000_000;
    let lists = [b"\x80\x02".to_vec(), vec![b']'; DEEP], vec![b'a'; DEEP - 1], b".".to_vec()].concat();
    let tuples = [b"\x80\x02N".to_vec(), vec![0x85; DEEP], b".".to_vec()].concat();
    let calls = [b"\x80\x02cm\nf\n".to_vec(), b")R".repeat(DEEP), b".".to_vec()].concat();
    for pickle in [lists, tuples] {
        let error = open(pt(&pickle, &[])).unwrap_err();
        assert!(error.to_string().contains("max_key_nbytes"), "{error}");
    }
    let checkpoint = open(pt(&calls, &[])).unwrap();
    assert_eq!((checkpoint.len(), checkpoint.values().len()), (0, 1));
    drop(format!("{checkpoint:?}"));
}

#[test]
fn class_9_containers_in_themselves_are_walked_once() {
    for pickle in [b"\x80\x02]q\0h\0a.".as_slice(), b"\x80\x02}q\0K\x01h\0s.", b"\x80\x02]q\0(h\0h\0e."] {
        let checkpoint = open(pt(pickle, &[])).unwrap();
        assert!(checkpoint.values().iter().all(|value| value.what.contains("encloses it")));
    }
}

#[test]
fn class_38_a_pickle_that_unpacks_to_very_much() {
    let pickle = [b"\x80\x02".to_vec(), b"N0".repeat(5 << 20), b"N.".to_vec()].concat();
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut encoder, &pickle).unwrap();
    let packed = encoder.finish().unwrap();
    let record = Record { packed, method: 8, ..Record::new("a/data.pkl", &pickle) };
    let bytes = Zip::of(&[record, Record::new("a/version", b"3\n")]).bytes;
    assert!(bytes.len() < 20_000);
    let mut outcome = None;
    let held = measure(|| outcome = Some(open(bytes.clone())));
    let error = outcome.unwrap().unwrap_err().to_string();
    assert!(error.contains("max_inflation is 100") && held.bytes_max < 1 << 20, "{error}, {} bytes", held.bytes_max);
    let limits = Limits { max_inflation: 2000, ..Limits::default() };
    let options = OpenOptions { limits, ..OpenOptions::default() };
    assert!(Checkpoint::from_source(Path::new("x"), Arc::new(bytes), &options).unwrap().is_empty());
}

#[test]
fn class_57_a_million_keys_are_read() {
    let pickle = [b"\x80\x02".to_vec(), pairs(999_999), b".".to_vec()].concat();
    let mut found = None;
    let held = measure(|| found = Some(open(pt(&pickle, &[])).unwrap().values().len()));
    assert_eq!(found, Some(999_999));
    assert!(held.bytes_max < 40 * pickle.len() as u64, "{} bytes for {}", held.bytes_max, pickle.len());
}

#[test]
fn class_16_time_grows_as_the_pickle_does() {
    let tensor = |rest: &[u8]| Tensor { rest, ..Tensor::default() }.opcodes();
    let archive = |pickle: &[u8]| pt(pickle, &[("0", &[0; 16])]);
    is_linear("a list of numbers in n places", 4_000, |n| shared_by(n, &numbers(n), &get(1)));
    is_linear("a dict in n places", 4_000, |n| shared_by(n, &pairs(n), &get(1)));
    is_linear("hooks of n pairs for n tensors", 1_000, |n| {
        let hooks = [b"ccollections\nOrderedDict\n(](".to_vec(), b"](NNe".repeat(n), b"etR".to_vec()].concat();
        archive(&shared_by(n, &hooks, &tensor(&get(1))))
    });
    is_linear("an object of n states of n pairs", 2_000, |n| {
        shared_by(1, &pairs(n), &[b"cm\nA\n)R".to_vec(), [get(1), b"b".to_vec()].concat().repeat(n)].concat())
    });
    is_linear("n parameters around one tensor with n hooks", 1_000, |n| {
        let hooks = [b"ccollections\nOrderedDict\n(](".to_vec(), b"](NNe".repeat(n), b"etR".to_vec()].concat();
        let call = tensor(&[NO_HOOKS, &hooks].concat());
        archive(&shared_by(
            n,
            &call,
            &[b"ctorch._utils\n_rebuild_parameter\n(", get(1).as_slice(), b"\x89NtR"].concat(),
        ))
    });
    is_linear("n dicts made of one list of n pairs", 2_000, |n| {
        let pairs = [b"](".to_vec(), b"](NNe".repeat(n), b"e".to_vec()].concat();
        shared_by(n, &pairs, &[b"ccollections\nOrderedDict\n(", get(1).as_slice(), b"tR"].concat())
    });
    is_linear("n objects with n arguments", 4_000, |n| {
        let args = [b"(".to_vec(), b"K\x07".repeat(n), b"t".to_vec()].concat();
        shared_by(n, &args, &[b"cm\nA\n", get(1).as_slice(), b"R"].concat())
    });
    is_linear("n arrays of n objects", 2_000, |n| {
        let array = [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR(K\x01(".to_vec(),
            [int(i64::try_from(n).unwrap()), b"tcnumpy\ndtype\n(U\x02O8K\0K\x01tR\x89".to_vec(), get(1)].concat(),
            b"tb".to_vec(),
        ];
        shared_by(n, &numbers(n), &array.concat())
    });
    is_linear("n modules that share a set of n names", 2_000, |n| {
        let names = [b"c__builtin__\nset\n(](".to_vec(), text("x").repeat(n), b"etR".to_vec()].concat();
        let group = |name: &str| [text(name), b"}".to_vec()].concat();
        let state = [
            [b"}(".to_vec(), group("_parameters"), group("_buffers"), group("_modules")].concat(),
            [text("_non_persistent_buffers_set"), get(1), b"u".to_vec()].concat(),
        ];
        shared_by(n, &names, &[b"cm\nA\n)R".to_vec(), state.concat(), b"b".to_vec()].concat())
    });
    is_linear("a quantised tensor of n axes in n places", 2_000, |n| {
        let call = tensor(NO_HOOKS);
        let call = call.strip_prefix(b"ctorch._utils\n_rebuild_tensor_v2\n(").unwrap();
        let call = call.strip_suffix(b"tR").unwrap();
        let scheme = [b"(ctorch\nper_channel_affine\nNN".to_vec(), b"K\0".repeat(n), b"t".to_vec()].concat();
        let quantised =
            [b"ctorch._utils\n_rebuild_qtensor\n(".to_vec(), call.to_vec(), get(1), b"tR".to_vec()].concat();
        archive(&shared_by(n, &scheme, &quantised))
    });
    is_linear("n tensors", 1_000, |n| {
        let keys: Vec<String> = (0..n).map(|number| format!("layer.{number}.weight")).collect();
        let items: Vec<_> = keys.iter().map(|key| (key.as_str(), tensor(NO_HOOKS))).collect();
        archive(&dict(&items))
    });
}

#[test]
fn class_42_time_grows_as_the_safetensors_header_does() {
    let file = |header: String, data: &[u8]| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    let rows = |n: usize| {
        let rows = (0..n).map(|number| {
            format!(r#""layer.{number}":{{"dtype":"U8","shape":[1],"data_offsets":[{number},{}]}}"#, number + 1)
        });
        rows.collect::<Vec<_>>().join(",")
    };
    is_linear("n tensors", 2_000, |n| file(format!("{{{}}}", rows(n)), &vec![0; n]));
    is_linear("n tensors in the wrong order of bytes", 2_000, |n| file(format!("{{{}}}", rows(n)), &vec![0; n - 1]));
    is_linear("n lines of metadata", 2_000, |n| {
        let lines: Vec<String> = (0..n).map(|number| format!(r#""{number}":"""#)).collect();
        file(format!(r#"{{"__metadata__":{{{}}}}}"#, lines.join(",")), &[])
    });
    is_linear("n dimensions", 20_000, |n| {
        let shape = vec!["1"; n].join(",");
        file(format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,1]}}}}"#), &[0])
    });
    for deep in ["[", "{\"a\":"] {
        let header = format!("{{\"a\":{}", deep.repeat(1_000_000));
        assert_eq!(open(file(header, &[])).unwrap_err().kind(), ErrorKind::Format);
    }
    assert_eq!(open(file(format!("{{{}}}", rows(1_000_000)), &vec![0; 1_000_000])).unwrap().len(), 1_000_000);
}

#[test]
fn class_57_time_grows_as_the_directory_does() {
    is_linear("n records", 1_000, |n| {
        let names: Vec<String> = (0..n).map(|number| format!("a/data/{number}")).collect();
        let mut records: Vec<(&str, &[u8])> = vec![("a/data.pkl", b"\x80\x02}."), ("a/version", b"3\n")];
        records.extend(names.iter().map(|name| (name.as_str(), b"".as_slice())));
        let mut zip = Zip::new(&records);
        zip.widen_end(records.len() as u64);
        zip.bytes
    });
}
