//! Real pickles: `python3` runs `make.py`, which writes values at every protocol together with what
//! they hold.

// Clippy grants these to `#[test]` functions only, not to what they call.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fmt::Write;
use std::process::Command;
use std::sync::OnceLock;

use reweft_pickle::{DumpLimits, How, Limits, NodeId, Pickle, Value, disassemble, dump, python3_name};

/// The records of `make.py` of one kind, or `None` if there is no Python to run it.
fn records(kind: &str) -> Option<Vec<Vec<&'static str>>> {
    static OUTPUT: OnceLock<Option<String>> = OnceLock::new();
    let output = OUTPUT.get_or_init(|| {
        let python = Command::new("python3").args(["-c", include_str!("make.py")]).output();
        let Ok(output) = python else {
            eprintln!("skipped: python3 is not on the PATH, so there are no real pickles to read");
            return None;
        };
        assert!(output.status.success(), "make.py: {}", String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8(output.stdout).unwrap())
    });
    let lines = output.as_ref()?.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let records: Vec<_> = lines.filter(|fields| fields[0] == kind).map(|fields| fields[1..].to_vec()).collect();
    assert!(!records.is_empty(), "make.py wrote no {kind}");
    Some(records)
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// What `show` in `make.py` gives for the same value; calls of the few functions that picklers use
/// are understood.
fn show(pickle: &Pickle<'_>, id: NodeId) -> String {
    let items = |ids: &[NodeId]| ids.iter().map(|&id| show(pickle, id) + ",").collect::<String>();
    match pickle.get(id) {
        Value::None => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Int(value) => value.to_string(),
        Value::BigInt(value) => value.to_string(),
        Value::Float(value) => format!("f{}", hex(&value.to_be_bytes())),
        Value::Str(text) => format!("s{}", hex(text.as_bytes())),
        Value::Bytes(bytes) => format!("b{}", hex(bytes)),
        Value::ByteArray(bytes) => format!("B{}", hex(bytes)),
        Value::Tuple(children) => format!("({})", items(pickle.children(*children))),
        Value::List(list) => format!("[{}]", items(list)),
        Value::Dict(_) => format!("{{{}}}", show_pairs(pickle, id)),
        Value::Set(set) => show_set("set", pickle, set),
        Value::FrozenSet(children) => show_set("frozenset", pickle, pickle.children(*children)),
        Value::Global { .. } => {
            let (module, name) = pickle.as_global(id).unwrap();
            format!("<{module}.{name}>")
        }
        Value::Object(_) => show_call(pickle, id),
        other => panic!("make.py writes no {}", other.kind_name()),
    }
}

fn show_pairs(pickle: &Pickle<'_>, id: NodeId) -> String {
    let pairs = pickle.dict(id).unwrap();
    let show_pair = |&(key, value): &_| show(pickle, key) + ":" + &show(pickle, value) + ",";
    pairs.iter().map(show_pair).collect()
}

fn show_set(kind: &str, pickle: &Pickle<'_>, items: &[NodeId]) -> String {
    let mut items: Vec<_> = items.iter().map(|&id| show(pickle, id) + ",").collect();
    items.sort();
    format!("{kind}{{{}}}", items.concat())
}

fn show_call(pickle: &Pickle<'_>, id: NodeId) -> String {
    let ((module, name), object) = pickle.as_call(id).unwrap();
    let args = pickle.as_tuple(object.args).unwrap();
    let latin1 = |id| pickle.as_str(id).unwrap().chars().map(|c| u8::try_from(c).unwrap()).collect::<Vec<_>>();
    match (module, name, args) {
        ("_codecs", "encode", &[text, _]) => format!("b{}", hex(&latin1(text))),
        ("builtins", "bytes", []) => "b".to_owned(),
        ("builtins", "bytearray", []) => "B".to_owned(),
        ("builtins", "bytearray", &[bytes]) => show(pickle, bytes).replacen('b', "B", 1),
        ("builtins", "bytearray", &[text, _]) => format!("B{}", hex(&latin1(text))),
        ("builtins", "complex", &[re, im]) => format!("c{}{}", show(pickle, re), show(pickle, im)),
        ("builtins", "set" | "frozenset", &[items]) => show_set(name, pickle, pickle.as_list(items).unwrap()),
        ("builtins", "getattr", _) => panic!("no nested classes are written"),
        ("collections", "OrderedDict" | "Counter" | "defaultdict", _) | ("__main__", "DictLike", _) => {
            format!("{name}{{{}}}", show_pairs(pickle, id))
        }
        // Protocols 0 and 1: the class, its built-in base and the base's value.
        ("copyreg", "_reconstructor", &[class, _, base]) => match pickle.as_global(class).unwrap().1 {
            "DictLike" => format!("DictLike{}", show(pickle, base)),
            class => class.to_owned() + &object.state().iter().map(|&state| show(pickle, state)).collect::<String>(),
        },
        ("__main__", "Plain", []) => {
            assert_eq!(object.how, How::NewObj);
            name.to_owned() + &object.state().iter().map(|&state| show(pickle, state)).collect::<String>()
        }
        other => panic!("make.py writes no {other:?}"),
    }
}

#[test]
fn values_of_every_protocol_are_read_as_python_wrote_them() {
    for record in records("value").unwrap_or_default() {
        let &[name, protocol, data, expected] = record.as_slice() else { panic!("{record:?}") };
        let bytes = unhex(data);
        let pickle = Pickle::parse(&bytes, &Limits::default()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(pickle.nbytes(), bytes.len());
        assert_eq!(pickle.protocol(), protocol.parse::<u8>().map(|p| if p < 2 { 0 } else { p }).unwrap());
        dump(&pickle, &DumpLimits::default(), &mut String::new()).unwrap();
        if !["?", "loop"].contains(&expected) {
            assert_eq!(show(&pickle, pickle.root()), expected, "{name} at protocol {protocol}");
        }
    }
}

#[test]
fn identity_and_loops_survive() {
    for record in records("value").unwrap_or_default() {
        let bytes = unhex(record[2]);
        let pickle = Pickle::parse(&bytes, &Limits::default()).unwrap();
        let root = pickle.root();
        match record[0] {
            "loop list" => assert_eq!(pickle.as_list(root), Some(&[root][..])),
            "loop dict" => assert_eq!(pickle.dict(root).unwrap()[0].1, root),
            "loop state" => {
                let state = pickle.as_object(root).unwrap().state();
                assert_eq!(pickle.dict(state[0]).unwrap()[0].1, root);
            }
            "shared" => {
                let items = pickle.as_list(root).unwrap();
                assert_eq!(items[0], items[1]);
                assert_eq!(pickle.as_tuple(items[2]), Some(&items[..1]));
            }
            _ => {}
        }
    }
}

#[test]
fn the_disassembly_is_that_of_pickletools() {
    for record in records("opcodes").unwrap_or_default() {
        let mut text = String::new();
        let bytes = unhex(record[0]);
        let nbytes = disassemble(&bytes, &mut text).unwrap();
        assert_eq!(nbytes, bytes.len() as u64);
        let ours = text.lines().map(|line| {
            let (byte_offset, rest) = line.split_once(": ").unwrap();
            format!("{}:{}", byte_offset.trim(), rest[4..].split_whitespace().next().unwrap())
        });
        assert_eq!(ours.collect::<Vec<_>>().join(" "), record[1]);
    }
}

#[test]
fn python_2_names_are_those_of_pickle() {
    for record in records("name").unwrap_or_default() {
        let &[module, name, new_module, new_name] = record.as_slice() else { panic!("{record:?}") };
        assert_eq!(python3_name(module, name), (new_module, new_name));
    }
}
