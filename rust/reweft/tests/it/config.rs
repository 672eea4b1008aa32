//! Configs: into types of serde and into JSON.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use reweft::config::Config;
use reweft::{ErrorKind, Limits, OpenOptions, load_config};
use serde::Deserialize;

use crate::fixture;

fn options(key: &str) -> OpenOptions {
    OpenOptions { top_level_key: (!key.is_empty()).then(|| key.to_owned()), ..OpenOptions::default() }
}

/// A pickle of protocol 2 around opcodes.
fn open(opcodes: &[u8]) -> reweft::Result<Config> {
    let bytes = [b"\x80\x02", opcodes, b"."].concat();
    Config::from_source(Path::new("x.pkl"), Arc::new(bytes), &OpenOptions::default())
}

fn read<T: serde::de::DeserializeOwned>(opcodes: &[u8]) -> reweft::Result<T> {
    open(opcodes)?.deserialize(&OpenOptions::default())
}

/// `{"a": ...}`
fn a(opcodes: &[u8]) -> Vec<u8> {
    [b"}X\x01\0\0\0a", opcodes, b"s"].concat()
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Scheduler {
    Constant,
    Cosine { warmup: u32, floor: f64 },
    Step(u32, f64),
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Settings {
    n_head: usize,
    lr: f64,
    momentum: f32,
    name: String,
    layers: Vec<u16>,
    betas: (f64, f64),
    table: HashMap<String, String>,
    counts: BTreeMap<i64, String>,
    absent: Option<u8>,
    there: Option<u8>,
    #[serde(default)]
    missing: u8,
    big: i128,
    bytes: Vec<u8>,
    dtype: String,
    device: String,
    path: std::path::PathBuf,
    matrix: Vec<Vec<f32>>,
    scalar: i32,
    complex: (f64, f64),
    schedulers: Vec<Scheduler>,
    args: Args,
    color: u8,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Args {
    batch: u32,
}

#[test]
fn a_config_of_every_kind_becomes_a_struct() {
    for file in ["checkpoints/config.pt", "checkpoints/config_legacy.pt"] {
        let settings: Settings = load_config(&fixture(file), &options("my_config")).unwrap();
        assert_eq!((settings.n_head, settings.lr, settings.name.as_str()), (2, 0.1, "net"));
        assert!((settings.momentum - 0.9).abs() < 1e-7);
        assert_eq!((&settings.layers[..], settings.betas), (&[64, 128][..], (0.5, 1.0)));
        assert_eq!((settings.table["k"].as_str(), settings.counts[&-1].as_str()), ("v", "minus"));
        assert_eq!((settings.absent, settings.there, settings.missing), (None, Some(3), 0));
        assert_eq!((settings.big, settings.bytes.as_slice()), (-(1 << 100), &[0, 255][..]));
        assert_eq!((settings.dtype.as_str(), settings.device.as_str()), ("torch.bfloat16", "cuda:1"));
        assert_eq!((settings.path.as_path(), settings.scalar), (Path::new("/data/run"), -3));
        assert_eq!((settings.matrix, settings.complex), (vec![vec![0.0, 1.0], vec![2.0, 3.0]], (0.0, 1.0)));
        let cosine = Scheduler::Cosine { warmup: 10, floor: 0.0 };
        assert_eq!(settings.schedulers, [Scheduler::Constant, cosine, Scheduler::Step(5, 0.5)]);
        assert_eq!((settings.args, settings.color), (Args { batch: 32 }, 1));
    }
}

#[test]
fn what_does_not_fit_names_its_path() {
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read to fail")]
    struct One {
        a: u8,
    }
    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only read to fail")]
    struct Outer {
        a: Vec<One>,
    }
    let cases: [(&[u8], &str, &str); 6] = [
        (b"]}(X\x01\0\0\0aM\x2c\x01ua", "a.0.a", "300"),
        (b"]}(X\x01\0\0\0aG\x3f\xf0\0\0\0\0\0\0ua", "a.0.a", "floating point"),
        (b"](}(X\x01\0\0\0aK\x01u}(X\x01\0\0\0aK\x01X\x01\0\0\0bK\x01ue", "a.1.b", "unknown field `b`"),
        (b"]}a", "a.0", "missing field `a`"),
        (b"K\x01", "a", "invalid type"),
        (b"]Na", "a.0", "invalid type"),
    ];
    for (opcodes, path, what) in cases {
        let error = read::<Outer>(&a(opcodes)).unwrap_err();
        assert_eq!((error.kind(), error.key()), (ErrorKind::Mismatch, Some(path)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
    let error =
        load_config::<HashMap<String, u8>>(&fixture("checkpoints/config.pt"), &options("my_config")).unwrap_err();
    assert!(error.to_string().contains("config.pt: \"my_config.lr\""), "{error}");
}

#[test]
fn numbers_change_only_where_nothing_is_lost() {
    assert_eq!(read::<f64>(b"K\x03").unwrap().to_bits(), 3.0_f64.to_bits());
    assert_eq!(read::<f64>(b"\x8a\x07\0\0\0\0\0\0\x20").unwrap().to_bits(), 9_007_199_254_740_992.0_f64.to_bits());
    for odd in [
        &b"\x8a\x07\x01\0\0\0\0\0\x20"[..],
        b"\x8a\x11\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0",
    ] {
        assert_eq!(read::<f64>(odd).unwrap_err().kind(), ErrorKind::Mismatch);
    }
    assert_eq!(read::<f32>(b"G\x3f\xb9\x99\x99\x99\x99\x99\x9a").unwrap().to_bits(), 0.1_f32.to_bits());
    assert!(read::<f32>(b"G\x7f\xef\xff\xff\xff\xff\xff\xff").is_err(), "larger than any f32");
    assert!(read::<f32>(b"G\x7f\xf0\0\0\0\0\0\0").unwrap().is_infinite());
    assert!(read::<u8>(b"G\x40\x08\0\0\0\0\0\0").is_err(), "a float is no int");
    assert!(read::<u8>(b"\x88").is_err(), "a bool is no int");
    assert!(read::<bool>(b"K\x01").is_err());
    assert!(read::<f64>(b"\x88").is_err());
    assert_eq!(
        read::<u128>(b"\x8a\x11\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0").unwrap(),
        u128::MAX
    );
    assert_eq!(read::<u64>(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0").unwrap(), u64::MAX);
    let error =
        read::<u128>(b"\x8a\x11\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01").unwrap_err();
    assert!(error.to_string().contains("more than 128 bits"), "{error}");
}

#[test]
fn depth_and_sharing_are_bounded() {
    let deep = |levels: usize| [vec![b']'; levels], vec![b'a'; levels - 1]].concat();
    assert!(read::<serde_json::Value>(&deep(128)).is_ok());
    let error = read::<serde_json::Value>(&deep(1_000_000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().contains("max_config_depth"), "{error}");
    // [[[...]]] with each list ten times in the next.
    let mut laughs = b"]q\0K\x01a".to_vec();
    for level in 0..60_u8 {
        let get = [[b'h', level]; 10].concat();
        laughs.extend([&b"0]q"[..], &[level + 1], b"(", &get, b"e"].concat());
    }
    let limits = Limits { max_config_nodes: 100_000, ..Limits::default() };
    let options = OpenOptions { limits, ..OpenOptions::default() };
    let config = open(&laughs).unwrap();
    for error in [config.deserialize::<serde_json::Value>(&options).unwrap_err(), config.to_json(&options).unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::Limit);
        assert!(error.to_string().contains("max_config_nodes"), "{error}");
    }
    let limits = Limits { max_config_depth: 200, ..Limits::default() };
    let options = OpenOptions { limits, ..OpenOptions::default() };
    assert!(open(&deep(190)).unwrap().deserialize::<serde_json::Value>(&options).is_ok());
}

fn json(opcodes: &[u8]) -> String {
    let text = open(opcodes).unwrap().to_json(&OpenOptions::default()).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn json_says_what_it_has_no_form_for_with_a_name() {
    assert_eq!(json(b"(K\x01\x88Nt"), "[ 1, true, null ]");
    assert_eq!(json(b"]"), "[]");
    assert_eq!(json(b"}"), "{}");
    assert_eq!(json(b"](]}e"), "[ [], {} ]");
    assert_eq!(json(b"G\x7f\xf8\0\0\0\0\0\0"), r#"{ "$float": "nan" }"#);
    assert_eq!(json(b"](G\x80\0\0\0\0\0\0\0G\xff\xf0\0\0\0\0\0\0e"), r#"[ -0.0, { "$float": "-inf" } ]"#);
    assert_eq!(json(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0"), "18446744073709551615");
    assert_eq!(json(b"c__builtin__\nxrange\nK\0K\x05K\x01\x87R"), r#"{ "$range": [ 0, 5, 1 ] }"#);
    assert_eq!(
        json(b"c__builtin__\ncomplex\nG\0\0\0\0\0\0\0\0G?\xf0\0\0\0\0\0\0\x86R"),
        r#"{ "$complex": [ 0.0, 1.0 ] }"#
    );
    assert_eq!(json(b"c__main__\nNet\n)\x81}X\x01\0\0\0aK\x01sb"), r#"{ "$class": "__main__.Net", "a": 1 }"#);
    assert_eq!(json(b"c__main__\nColor\nK\x01\x85R"), r#"{ "$class": "__main__.Color", "$args": [ 1 ] }"#);
    assert_eq!(json(b"c__main__\nNet\n"), r#"{ "$name": "__main__.Net" }"#);
    assert_eq!(json(b"}(K\x01K\x02X\x01\0\0\0aK\x03u"), r#"{ "1": 2, "a": 3 }"#);
    assert_eq!(json(b"X\x03\0\0\0a\"\n"), r#""a\"\n""#);
}

#[test]
fn json_refuses_by_path_what_it_cannot_say() {
    let cases: [(&[u8], &str, ErrorKind); 6] = [
        (b"X\x03\0\0\0\xed\xa0\x80", "lone surrogates", ErrorKind::Unsupported),
        (b"})K\x01s", "a tuple as a key", ErrorKind::Unsupported),
        (b"}G\0\0\0\0\0\0\0\0K\x01s", "a float as a key", ErrorKind::Unsupported),
        (b"}(K\x01K\x02X\x01\0\0\x001K\x03u", "both become the key", ErrorKind::KeyCollision),
        (b"}X\x06\0\0\0$floatK\x01s", "keeps for itself", ErrorKind::Unsupported),
        (b"}\x88K\x01s", "a bool as a key", ErrorKind::Unsupported),
    ];
    for (opcodes, what, kind) in cases {
        let error = open(&a(opcodes)).unwrap().to_json(&OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.key().is_some_and(|key| key.starts_with('a')), "{error}");
    }
}

#[test]
fn json_of_a_million_levels_is_linear() {
    let deep = [vec![b']'; 1_000_000], vec![b'a'; 999_999]].concat();
    let text = open(&deep).unwrap().to_json(&OpenOptions::default()).unwrap();
    assert!(text.len() < 200_000_000, "{}", text.len());
}

#[test]
fn the_tar_format_has_values_too() {
    let path = fixture("checkpoints/tar_of_2016.pt");
    assert_eq!(load_config::<u8>(&path, &options("epoch")).unwrap(), 3);
    let error = load_config::<u8>(&path, &options("net")).unwrap_err();
    assert_eq!((error.kind(), error.key()), (ErrorKind::Unsupported, Some("net.w")));
}

#[test]
fn memory_and_file_agree() {
    let path = fixture("checkpoints/config.pt");
    let bytes = Arc::new(std::fs::read(&path).unwrap());
    let options = options("my_config");
    let file = Config::open(&path, &options).unwrap().to_json(&options).unwrap();
    let memory = Config::from_source(Path::new("memory"), bytes, &options).unwrap().to_json(&options).unwrap();
    assert_eq!(file, memory);
}
