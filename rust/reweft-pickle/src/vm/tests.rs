//! Each opcode family, on pickles written by hand. Whole pickles from Python are in `tests/it`.

use crate::{DumpLimits, ErrorKind, How, Limits, Pickle, Value, disassemble, dump};

pub(super) fn parse(bytes: &[u8]) -> Pickle<'_> {
    Pickle::parse(bytes, &Limits::default()).unwrap()
}

pub(super) fn kind(bytes: &[u8]) -> ErrorKind {
    Pickle::parse(bytes, &Limits::default()).unwrap_err().kind()
}

/// The dump without ids, on one line.
fn show(bytes: &[u8]) -> String {
    let mut text = String::new();
    dump(&parse(bytes), &DumpLimits::default(), &mut text).unwrap();
    let words = text.split_whitespace().filter(|word| !word.starts_with('&'));
    words.collect::<Vec<_>>().join(" ")
}

fn check(cases: &[(&[u8], &str)]) {
    for (bytes, expected) in cases {
        assert_eq!(show(bytes), *expected, "{}", bytes.escape_ascii());
    }
}

#[test]
fn scalars() {
    check(&[
        (b"N.", "None"),
        (b"\x80\x02\x88.", "bool True"),
        (b"\x80\x02\x89.", "bool False"),
        (b"I00\n.", "bool False"),
        (b"I01\n.", "bool True"),
        (b"I0\n.", "int 0"),
        (b"I-12\r\n.", "int -12"),
        (b"J\xff\xff\xff\xff.", "int -1"),
        (b"K\xff.", "int 255"),
        (b"M\xff\xff.", "int 65535"),
        (b"L12L\n.", "int 12"),
        (b"L-99999999999999999999L\n.", "int -99999999999999999999"),
        (b"\x80\x02\x8a\0.", "int 0"),
        (b"\x80\x02\x8a\x02\0\x80.", "int -32768"),
        (b"\x80\x02\x8b\x09\0\0\0\0\0\0\0\0\0\0\0\x01.", "int 18446744073709551616"),
        (b"F1e3\n.", "float 1000.0"),
        (b"F-inf\n.", "float -inf"),
        (b"Fnan\n.", "float NaN"),
        (b"G\x3f\xf8\0\0\0\0\0\0.", "float 1.5"),
    ]);
}

#[test]
fn the_magic_number_of_legacy_torch_files() {
    let pickle = parse(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.");
    let Value::BigInt(magic) = pickle.get(pickle.root()) else { panic!("not big") };
    assert_eq!(magic.to_i128(), Some(0x1950_a86a_20f9_469c_fc6c));
}

#[test]
fn strings_and_bytes() {
    check(&[
        (b"S'a\\n\\x41'\n.", "Python 2 str \"a\\nA\""),
        (b"T\x02\0\0\0\xff\x00.", "Python 2 str \"\\xff\\x00\""),
        (b"U\x01x.", "Python 2 str \"x\""),
        (b"V\\u20ac\n.", "str \"\u{20ac}\""),
        (b"X\x03\0\0\0\xe2\x82\xac.", "str \"\u{20ac}\""),
        (b"\x80\x04\x8c\x01x.", "str \"x\""),
        (b"\x80\x04\x8d\x01\0\0\0\0\0\0\0x.", "str \"x\""),
        (b"\x80\x03B\x01\0\0\0x.", "bytes \"x\""),
        (b"\x80\x03C\x01\xff.", "bytes \"\\xff\""),
        (b"\x80\x04\x8e\x01\0\0\0\0\0\0\0x.", "bytes \"x\""),
        (b"\x80\x05\x96\x01\0\0\0\0\0\0\0x.", "bytearray \"x\""),
    ]);
    assert_eq!(kind(b"\x80\x05\x97."), ErrorKind::Unsupported);
    assert_eq!(kind(b"\x80\x05N\x98."), ErrorKind::Unsupported);
}

#[test]
fn containers() {
    check(&[
        (b").", "tuple of 0"),
        (b"(t.", "tuple of 0"),
        (b"(K\x01K\x02t.", "tuple of 2 int 1 int 2"),
        (b"\x80\x02K\x01\x85.", "tuple of 1 int 1"),
        (b"\x80\x02K\x01N\x86.", "tuple of 2 int 1 None"),
        (b"\x80\x02K\x01NN\x87.", "tuple of 3 int 1 None None"),
        (b"(K\x01l.", "list of 1 int 1"),
        (b"]K\x01a(K\x02K\x03e.", "list of 3 int 1 int 2 int 3"),
        (b"(K\x01K\x02d.", "dict of 1 int 1: int 2"),
        (b"}K\x01Ns(K\x01K\x03u.", "dict of 2 int 1: None int 1: int 3"),
        (b"}]Ns.", "dict of 1 key: list of 0 value: None"),
        (b"\x80\x04\x8f(K\x01K\x01\x90.", "set of 2 int 1 int 1"),
        (b"\x80\x04(K\x01\x91.", "frozenset of 1 int 1"),
    ]);
}

#[test]
fn stack_and_memo() {
    check(&[
        (b"K\x01K\x020.", "int 1"),
        (b"K\x01(0.", "int 1"),
        (b"K\x01(K\x02K\x031.", "int 1"),
        (b"\x80\x02K\x012\x86.", "tuple of 2 int 1 int 1"),
        (
            b"(K\x05p0\nK\x06q\x01K\x07r\x02\0\0\0g0\nh\x01j\x02\0\0\0t.",
            "tuple of 6 int 5 int 6 int 7 int 5 int 6 int 7",
        ),
        (b"\x80\x04(K\x05\x94K\x06\x94h\0h\x01t.", "tuple of 4 int 5 int 6 int 5 int 6"),
        // MEMOIZE uses the number of entries, not the highest number.
        (b"\x80\x04(K\x05q\x09K\x06\x94h\x01t.", "tuple of 3 int 5 int 6 int 6"),
        // A number written twice holds the later value.
        (b"(K\x05q\0K\x06q\0h\0t.", "tuple of 3 int 5 int 6 int 6"),
    ]);
}

#[test]
fn one_object_is_one_id_and_a_loop_is_a_loop() {
    let pickle = parse(b"]q\0(h\0]h\0e.");
    let items = pickle.as_list(pickle.root()).unwrap();
    assert_eq!((items[0], items[2]), (pickle.root(), pickle.root()));
    assert_ne!(items[1], pickle.root());
    let mut text = String::new();
    dump(&pickle, &DumpLimits::default(), &mut text).unwrap();
    assert_eq!(text, "list of 3 &4\n  &4\n  list of 0 &5\n  &4\n");
}

#[test]
fn globals_and_extensions() {
    check(&[
        (b"ctorch\nfloat32\n.", "global torch.float32"),
        (b"c__builtin__\nunicode\n.", "global builtins.str"),
        (b"\x80\x03c__builtin__\nunicode\n.", "global __builtin__.unicode"),
        (b"\x80\x04\x8c\x01m\x8c\x03A.b\x93.", "global m.A.b"),
        (b"\x80\x02\x82\x07.", "extension 7"),
        (b"\x80\x02\x83\x07\x01.", "extension 263"),
        (b"\x80\x02\x84\x07\0\0\x01.", "extension 16777223"),
    ]);
    let pickle = parse(b"\x80\x02(cm\na\ncm\na\nc__builtin__\nset\ncm\nb\nt.");
    let globals: Vec<_> = pickle.globals().collect();
    assert_eq!(globals, [("m", "a"), ("builtins", "set"), ("m", "b")]);
    assert_eq!(kind(b"c\nx\n."), ErrorKind::BadArgument);
    assert_eq!(kind(b"\x80\x02\x82\0."), ErrorKind::BadArgument);
    assert_eq!(kind(b"\x80\x02\x84\xff\xff\xff\xff."), ErrorKind::BadArgument);
    assert_eq!(kind(b"\x80\x04C\x01m\x8c\x01a\x93."), ErrorKind::BadOperand);
}

#[test]
fn calls_are_recorded_and_not_made() {
    check(&[
        (b"cos\nsystem\n(U\x01xtR.", "result of os.system args: tuple of 1 Python 2 str \"x\""),
        (b"\x80\x02cm\nA\n)\x81.", "m.A object args: tuple of 0"),
        (b"\x80\x04cm\nA\n)}\x92.", "m.A object args: tuple of 0 kwargs: dict of 0"),
        (b"(K\x01im\nA\n.", "m.A object args: tuple of 1 int 1"),
        (b"(cm\nA\nK\x01o.", "m.A object args: tuple of 1 int 1"),
        (b"(cm\nA\no.", "m.A object args: tuple of 0"),
        (b"cm\nA\n)R}bNb.", "result of m.A args: tuple of 0 state: dict of 0 state: None"),
        (
            b"cm\nA\n)RNa(NNeNNs(NNu.",
            "result of m.A args: tuple of 0 item: None item: None item: None None: None None: None",
        ),
        (b"\x80\x04cm\nA\n)R(N\x90.", "result of m.A args: tuple of 0 member: None"),
        (b"\x80\x02\x82\x01)R.", "result of extension callable: extension 1 args: tuple of 0"),
    ]);
    let pickle = parse(b"\x80\x02cm\nA\n)\x81.");
    let ((module, name), object) = pickle.as_call(pickle.root()).unwrap();
    assert_eq!((module, name, object.how, object.kwargs), ("m", "A", How::NewObj, None));
}

#[test]
fn persistent_ids() {
    check(&[
        (b"P12 a\n.", "persistent object with id str id: str \"12 a\""),
        (b"(U\x01xtQ.", "persistent object with id tuple id: tuple of 1 Python 2 str \"x\""),
    ]);
    assert_eq!(kind(b"P\xff\n."), ErrorKind::BadArgument);
}

#[test]
fn dicts_in_all_their_guises() {
    let pairs = |bytes| {
        let pickle = parse(bytes);
        let pairs = pickle.dict(pickle.root())?;
        Some(pairs.iter().map(|&(k, v)| (pickle.as_i64(k).unwrap(), pickle.as_i64(v).unwrap())).collect::<Vec<_>>())
    };
    assert_eq!(pairs(b"}."), Some(vec![]));
    assert_eq!(pairs(b"ccollections\nOrderedDict\n)R."), Some(vec![]));
    assert_eq!(pairs(b"ccollections\nOrderedDict\n)RK\x01K\x02s."), Some(vec![(1, 2)]));
    // Python 2 gives the pairs to the constructor.
    let python2 = b"ccollections\nOrderedDict\n(((K\x01K\x02ll" as &[u8];
    let python2 = [python2, b"tRK\x03K\x04s."].concat();
    let python2: &'static [u8] = python2.leak();
    assert_eq!(pairs(python2), Some(vec![(1, 2), (3, 4)]));
    assert_eq!(pairs(b"ccollections\nCounter\n((K\x01K\x02dtR."), Some(vec![(1, 2)]));
    assert_eq!(pairs(b"ccollections\ndefaultdict\n(c__builtin__\nint\ntRK\x01K\x02s."), Some(vec![(1, 2)]));
    assert_eq!(pairs(b"cm\nA\n)RK\x01K\x02s."), Some(vec![(1, 2)]));
    assert_eq!(pairs(b"cm\nA\n)R."), None);
    assert_eq!(pairs(b"ccollections\nOrderedDict\n(K\x01tR."), None);
    assert_eq!(pairs(b"]."), None);
}

#[test]
fn several_pickles_in_a_row() {
    let stream = b"K\x01.K\x02.tail";
    let first = parse(stream);
    assert_eq!(first.nbytes(), 3);
    let second = parse(&stream[first.nbytes()..]);
    assert_eq!((second.as_i64(second.root()), second.nbytes()), (Some(2), 3));
}

#[test]
fn nothing_is_copied_that_has_no_escape() {
    let bytes = b"(X\x01\0\0\0aVb\nU\x01cS'd'\nt.";
    let pickle = parse(bytes);
    for (&id, text) in pickle.as_tuple(pickle.root()).unwrap().iter().zip(["a", "b", "c", "d"]) {
        let shown = pickle.as_str(id).unwrap();
        assert_eq!(shown, text);
        assert!(bytes.as_ptr_range().contains(&shown.as_ptr()));
    }
}

#[test]
fn every_opcode_is_decoded_and_run_with_the_argument_that_its_row_promises() {
    let bodies = |byte: u8| {
        [vec![b'(', b'N', b'N', byte], vec![byte]].map(|mut bytes| {
            bytes.splice(0..0, [0x80, 5]);
            bytes.extend(b"\x01\0\0\0\0\0\0\0\n\n..");
            bytes
        })
    };
    for byte in 0..=255 {
        for bytes in bodies(byte) {
            if let Err(error) = Pickle::parse(&bytes, &Limits::default()) {
                assert!(!error.to_string().contains("opcode table"), "{error}");
            }
            let _ = disassemble(&bytes, &mut String::new());
        }
    }
}
