//! The defects of hostile streams, numbered as in the project's list of hostile inputs.

use super::tests::{kind, parse};
use crate::{DumpLimits, ErrorKind, Limits, Pickle, Value, disassemble, dump};

/// More than any stack could nest.
const DEEP: usize = 1_000_000;

fn dump_all(pickle: &Pickle<'_>) -> String {
    let mut text = String::new();
    dump(pickle, &DumpLimits { max_nodes: usize::MAX, max_depth: usize::MAX }, &mut text).unwrap();
    text
}

fn message(bytes: &[u8]) -> String {
    Pickle::parse(bytes, &Limits::default()).unwrap_err().to_string()
}

#[test]
fn class_1_unknown_callables_are_inert() {
    let pickle = parse(b"cos\nsystem\n(U\x02lstRcposix\nsystem\n)R\x30.");
    let ((module, name), _) = pickle.as_call(pickle.root()).unwrap();
    assert_eq!((module, name), ("os", "system"));
    assert_eq!(pickle.globals().count(), 2, "the discarded call is still listed");
}

#[test]
fn class_2_a_broken_tail_fails_the_whole_pickle() {
    assert_eq!(kind(b"cos\nsystem\n(U\x02lstR0"), ErrorKind::Truncated);
    assert_eq!(kind(b"(NN1N\xff"), ErrorKind::UnknownOpcode);
}

#[test]
fn class_3_a_memo_bomb_is_linear() {
    // Thirty levels of pairs of the level before: 2^30 leaves in 120 bytes.
    let levels = 30;
    let mut memo = b"\x80\x02(]q\0".to_vec();
    let mut dup = b"\x80\x02]".to_vec();
    for level in 0..levels {
        memo.extend([b'h', level, b'h', level, 0x86, b'q', level + 1]);
        dup.extend(b"2\x86");
    }
    memo.extend([b'1', b'h', levels, b'.']);
    dup.push(b'.');
    for bytes in [memo, dup] {
        let pickle = parse(&bytes);
        assert!(pickle.nodes().count() < 40);
        assert!(dump_all(&pickle).lines().count() < 70);
    }
}

#[test]
fn class_4_far_memo_numbers_cost_nothing() {
    let pickle = parse(
        b"(K\x07r\xff\xff\xff\xffp18446744073709551615\np70000\n0j\xff\xff\xff\xffg70000\ng18446744073709551615\nt.",
    );
    let items = pickle.as_tuple(pickle.root()).unwrap();
    assert!(items.iter().all(|&id| pickle.as_i64(id) == Some(7)));
    for index in ["-1", "x", "", "18446744073709551616", "1.0"] {
        assert_eq!(kind(format!("Np{index}\n.").as_bytes()), ErrorKind::Memo, "{index}");
        assert_eq!(kind(format!("Ng{index}\n.").as_bytes()), ErrorKind::Memo, "{index}");
    }
    let limits = Limits { max_memo: 1, ..Limits::default() };
    let error = Pickle::parse(b"Nq\0q\0q\x01.", &limits).unwrap_err();
    assert_eq!(error.to_string(), "at 0x5: BINPUT: max_memo (1) entries are exceeded");
}

#[test]
fn class_5_stack_and_memo_misuse() {
    assert_eq!(message(b"h\x05."), "at 0x0: BINGET: index 5 was never written");
    assert_eq!(kind(b"."), ErrorKind::StackUnderflow);
    assert_eq!(kind(b"t."), ErrorKind::StackUnderflow);
    assert_eq!(kind(b"NN."), ErrorKind::StackLeftover);
    assert_eq!(kind(b"(N."), ErrorKind::StackLeftover);
    assert_eq!(kind(b"N(."), ErrorKind::StackUnderflow);
    for bytes in [b"0." as &[u8], b"1.", b"2.", b"a.", b"]a.", b"s.", b"}Ns.", b"R.", b"NR.", b"b.", b"Q.", b"q\0."] {
        assert_eq!(kind(bytes), ErrorKind::StackUnderflow, "{}", bytes.escape_ascii());
    }
    // Nothing reaches below a mark.
    for bytes in [b"N(q\0." as &[u8], b"N(2.", b"](Na.", b"}N(Ns.", b"(Ne.", b"(NNu.", b"((NNu.", b"](((e.", b"(o."] {
        assert_eq!(kind(bytes), ErrorKind::StackUnderflow, "{}", bytes.escape_ascii());
    }
    assert_eq!(kind(b"\x80\x02N(\x85."), ErrorKind::StackUnderflow);
    assert_eq!(kind(b"\x80\x04\x93."), ErrorKind::StackUnderflow);
    assert_eq!(message(b"}(NNNu."), "at 0x5: SETITEMS: the last key has no value");
    assert_eq!(kind(b"(NNNd."), ErrorKind::StackUnderflow);
}

#[test]
fn class_6_lengths_that_lie() {
    assert_eq!(
        message(b"NX\x63\0\0\0twelve bytes"),
        "at 0x1: BINUNICODE: length 99 exceeds the 12 bytes that are left"
    );
    for byte in [b"X" as &[u8], b"B", b"\x8d", b"\x8e", b"\x96", b"C", b"\x8c", b"\x8a", b"U"] {
        let bytes = [b"\x80\x05", byte, &[0xff; 8], b"."].concat();
        assert_eq!(kind(&bytes), ErrorKind::Truncated, "{}", byte.escape_ascii());
    }
    assert_eq!(message(b"T\xff\xff\xff\xff."), "at 0x0: BINSTRING: length -1 is negative");
    assert_eq!(kind(b"\x80\x02\x8b\0\0\0\x80."), ErrorKind::BadArgument);
    assert_eq!(kind(b"\x80\x02\x8b\xff\xff\xff\x7f."), ErrorKind::Truncated);
    for bytes in [b"J\0\0" as &[u8], b"G\0", b"I12", b"cm\n", b"\x80", b"P", b"K", b""] {
        assert_eq!(kind(bytes), ErrorKind::Truncated, "{}", bytes.escape_ascii());
    }
}

#[test]
fn class_7_huge_decimal_integers() {
    for opcode in ["I", "L"] {
        let bytes = format!("{opcode}{}\n.", "9".repeat(1_000_000));
        assert_eq!(kind(bytes.as_bytes()), ErrorKind::Limit);
    }
    let bytes = format!("L{}L\n.", "9".repeat(4300));
    let pickle = parse(bytes.as_bytes());
    assert!(matches!(pickle.get(pickle.root()), Value::BigInt(big) if big.to_string().len() == 4300));
    assert_eq!(pickle.describe(pickle.root()), "int of 1786 bytes");
}

#[test]
fn class_8_nesting_a_million_deep() {
    let tuples = [b"\x80\x02N".to_vec(), vec![0x85; DEEP], b".".to_vec()].concat();
    let lists = [vec![b']'; DEEP], vec![b'a'; DEEP - 1], b".".to_vec()].concat();
    let marks = [vec![b'('; DEEP], vec![b't'; DEEP], b".".to_vec()].concat();
    let calls = [b"\x80\x02cm\nf\n".to_vec(), b")R".repeat(DEEP), b".".to_vec()].concat();
    let persistent = [b"N".to_vec(), vec![b'Q'; DEEP], b".".to_vec()].concat();
    for (bytes, lines) in [(tuples, DEEP + 1), (lists, DEEP), (marks, DEEP), (calls, 2 * DEEP), (persistent, DEEP + 1)]
    {
        let pickle = parse(&bytes);
        let text = dump_all(&pickle);
        assert_eq!(text.lines().count(), lines);
        assert!(text.len() < lines * 200, "the dump is linear");
    }
    let marks = vec![b'('; DEEP];
    assert_eq!(kind(&marks), ErrorKind::Truncated);
    assert!(format!("{:?}", parse(&[vec![b']'; DEEP], vec![b'a'; DEEP - 1], b".".to_vec()].concat())).len() > DEEP);
}

#[test]
fn class_9_loops() {
    let own_item = parse(b"]q\0h\0a.");
    assert_eq!(dump_all(&own_item), "list of 1 &4\n  &4\n");
    let own_value = parse(b"}q\0K\x01h\0s.");
    assert_eq!(dump_all(&own_value), "dict of 1 &4\n  int 1: &4\n");
    let own_state = parse(b"cm\nA\n)Rq\0h\0b.");
    assert_eq!(dump_all(&own_state).lines().count(), 3);
    // A tuple that holds a list that holds the tuple, as pickle writes it.
    let through_tuple = parse(b"\x80\x02]q\0h\0\x85q\x01a0h\x01.");
    assert_eq!(through_tuple.as_tuple(through_tuple.root()).map(<[_]>::len), Some(1));
    let own_key = parse(b"}q\0h\0Ns.");
    assert_eq!(dump_all(&own_key), "dict of 1 &4\n  key: &4\n  value: None\n");
}

#[test]
fn class_10_keys_are_data() {
    let pickle = parse(b"}(]NFnan\nNK\x01NK\x01Nu.");
    assert_eq!(pickle.dict(pickle.root()).unwrap().len(), 4);
}

#[test]
fn class_11_frames() {
    let frame = |length: u64, body: &[u8]| [b"\x80\x04\x95", &length.to_le_bytes()[..], body].concat();
    let pickle = |bytes: &[u8]| Pickle::parse(bytes, &Limits::default()).map(|pickle| pickle.nbytes());
    assert_eq!(pickle(&frame(2, b"N.tail")).unwrap(), 13);
    // Opcodes may stand outside frames, and a frame may be empty.
    assert_eq!(pickle(&frame(0, b"N.")).unwrap(), 13);
    assert_eq!(pickle(&frame(1, b"NK\x01\x86.")).unwrap(), 16);
    assert_eq!(pickle(&frame(1, &[b"N\x95", &3_u64.to_le_bytes()[..], b"N\x86."].concat())).unwrap(), 24);
    for (what, bytes) in [
        ("longer than the input", frame(3, b"N.")),
        ("as long as numbers go", frame(u64::MAX, b"N.")),
        ("goes on after STOP", frame(4, b"N.xx")),
        ("ends inside an argument", frame(2, b"J\x01\0\0\0.")),
        ("ends inside a string", frame(4, b"\x8c\x05abcde.")),
        ("ends inside a line", frame(2, b"I1\n.")),
        ("holds a frame", frame(12, &[b"N\x95", &1_u64.to_le_bytes()[..], b"N\x86."].concat())),
    ] {
        assert_eq!(kind(&bytes), ErrorKind::Frame, "{what}");
    }
    assert_eq!(
        message(&frame(4, b"\x8c\x05abcde.")),
        "at 0xb: SHORT_BINUNICODE: length 5 exceeds the 2 bytes left in the frame"
    );
    assert_eq!(kind(&frame(1, b"N")), ErrorKind::Truncated);
}

#[test]
fn class_12_protocols() {
    assert_eq!(message(b"\x80\x06N."), "at 0x0: PROTO: protocol 6 is unknown; the newest is 5");
    assert_eq!(kind(b"N0\x80\x02N."), ErrorKind::Protocol);
    assert_eq!(kind(b"\x80\x02\x80\x02N."), ErrorKind::Protocol);
    assert_eq!(
        message(b"\x80\x03\x8c\x01x."),
        "at 0x2: SHORT_BINUNICODE: the opcode needs protocol 4, the pickle declares protocol 3"
    );
    assert_eq!(kind(b"\x88."), ErrorKind::Protocol);
    assert_eq!(kind(b"\x80\x01\x88."), ErrorKind::Protocol);
    assert_eq!(kind(b"\x80\x02N"), ErrorKind::Truncated);
    assert_eq!(message(b"\x80\x02N\xfe."), "at 0x3: byte 0xfe is not an opcode");
}

#[test]
fn class_13_names_are_lossless_or_refused() {
    assert_eq!(parse(b"ca\0b\nc d\n.").globals().next(), Some(("a\0b", "c d")));
    assert_eq!(kind(b"c\xff\nx\n."), ErrorKind::BadArgument);
    assert_eq!(kind(b"c\xed\xa0\x80\nx\n."), ErrorKind::BadArgument);
    assert_eq!(kind(b"X\x01\0\0\0\xff."), ErrorKind::BadArgument);
    assert_eq!(kind(b"\x80\x04V\\ud800\n\x8c\x01x\x93."), ErrorKind::BadOperand);
    let newline = parse(b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.");
    assert_eq!(newline.globals().next(), Some(("a\nb", "c")));
    let python2 = parse(b"U\x02\xe4\x80.");
    assert_eq!((python2.as_str(python2.root()), python2.as_bytes(python2.root())), (None, Some(&b"\xe4\x80"[..])));
}

#[test]
fn class_14_filling_what_cannot_be_filled() {
    assert_eq!(message(b")Na."), "at 0x2: APPEND: a value of kind tuple cannot take list items");
    for container in [b")" as &[u8], b"K\x01", b"N", b"X\x01\0\0\0x", b"cm\nx\n", b"Pid\n"] {
        for fill in [b"Na" as &[u8], b"(Ne", b"NNs", b"(NNu", b"(N\x90", b"}b"] {
            let bytes = [b"\x80\x04", container, fill, b"."].concat();
            assert_eq!(kind(&bytes), ErrorKind::BadOperand, "{}", bytes.escape_ascii());
        }
    }
    for bytes in
        [b"]NNs." as &[u8], b"}Na.", b"]}b.", b"}}b.", b"\x80\x04\x8fNa.", b"\x80\x04\x8f}b.", b"\x80\x04](N\x90."]
    {
        assert_eq!(kind(bytes), ErrorKind::BadOperand, "{}", bytes.escape_ascii());
    }
    for bytes in [
        b"N)R." as &[u8],
        b"cm\nf\nNR.",
        b"cm\nf\n]R.",
        b"(No.",
        b"\x80\x04cm\nf\n)N\x92.",
        b"\x80\x02X\x01\0\0\0x)\x81.",
    ] {
        assert_eq!(kind(bytes), ErrorKind::BadOperand, "{}", bytes.escape_ascii());
    }
}

#[test]
fn class_15_persistent_ids_of_any_kind_and_number_are_data() {
    let many = [b"(".to_vec(), b"K\x01Q".repeat(DEEP), b"t.".to_vec()].concat();
    let pickle = parse(&many);
    assert_eq!(pickle.as_tuple(pickle.root()).map(<[_]>::len), Some(DEEP));
}

#[test]
fn class_16_quadratic_traps() {
    // Every trap twice, the second time twice as large: what is kept may at most double (and a
    // bit).
    let traps: [fn(usize) -> Vec<u8>; 6] = [
        |n| [b"]".to_vec(), b"Na".repeat(n), b".".to_vec()].concat(),
        |n| [b"cm\nf\n)R".to_vec(), b"NNs".repeat(n), b".".to_vec()].concat(),
        |n| [b"N".to_vec(), b"(((111".repeat(n), b".".to_vec()].concat(),
        |n| [b"N".to_vec(), b"q\x01h\x010".repeat(n), b".".to_vec()].concat(),
        |n| [b"(".to_vec(), b"N2".repeat(n), b"t(1.".to_vec()].concat(),
        // One long name mentioned often: neither copied nor hashed at every mention.
        |n| {
            let name = [b"\x80\x04V\\u0061".to_vec(), vec![b'x'; n], b"\nq\x000(".to_vec()].concat();
            [name, b"h\0h\0\x93".repeat(n / 5), b"l.".to_vec()].concat()
        },
    ];
    for (trap, make) in traps.into_iter().enumerate() {
        let [once, twice] = [200_000, 400_000].map(|n| {
            let bytes = make(n);
            let pickle = parse(&bytes);
            assert!(pickle.globals().count() <= 1);
            pickle.nodes().count() + pickle.pool_len()
        });
        assert!(twice <= 2 * once + 16, "trap {trap}: {once} then {twice}");
    }
}

#[test]
fn nodes_are_limited_by_name() {
    let limits = Limits { max_nodes: 6, ..Limits::default() };
    assert!(Pickle::parse(b"(K\x01K\x01K\x01l.", &limits).is_ok());
    let error = Pickle::parse(b"(K\x01K\x02l.", &limits).unwrap_err();
    assert_eq!(error.to_string(), "at 0x5: LIST: max_nodes (6) values exist");
}

#[test]
fn dumps_are_bounded() {
    let mut text = String::new();
    let limits = DumpLimits { max_nodes: 3, max_depth: 1 };
    dump(&parse(b"((K\x01tNNNt."), &limits, &mut text).unwrap();
    assert_eq!(text, "tuple of 4 &6\n  tuple of 1 &5 ... (max_depth 1 reached)\n  None\n... (max_nodes 3 reached)\n");
    let long = [b"X\xe8\x03\0\0".to_vec(), vec![b'x'; 1000], b".".to_vec()].concat();
    let pickle = parse(&long);
    assert_eq!(pickle.describe(pickle.root()), format!("str \"{}\"... (1000 bytes)", "x".repeat(60)));
}

/// Marsaglia's xorshift: deterministic, so that a failure can be repeated.
struct XorShift(u64);

impl XorShift {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % below.max(1)
    }
}

#[test]
fn mutated_pickles_never_panic() {
    let seeds: [&[u8]; 5] = [
        b"\x80\x02}q\0(X\x01\0\0\0aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\0\0\0storageq\x03ctorch\nFloatStorage\nq\x04X\x01\0\0\0\x30q\x05X\x03\0\0\0cpuq\x06K\x06tq\x07QK\0K\x02K\x03\x86q\x08K\x03K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\x0du.",
        b"\x80\x05\x95\x32\0\0\0\0\0\0\0](K\x01\x8c\x02hi\x94\x8e\x02\0\0\0\0\0\0\0hi\x96\x02\0\0\0\0\0\0\0yo\x8f(K\x01\x90(K\x02\x91h\0h\0\x93)}\x92}be.",
        b"(dp0\nS'a\\x41'\np1\n(lp2\nI01\naL99999999999999999999L\naF1.5\nasV\\u20ac\np3\n(im\nA\np4\n(dp5\nbsg1\ng2\ns.",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\x8b\x01\0\0\0\x07G\0\0\0\0\0\0\0\0\x87\x82\x01)R.",
        b"(cm\nA\nK\x01o}bPid\n\x32\x30\x86(NN1.",
    ];
    let opcodes = b"().NIJKLMRSTUVXBCFGabcdeghijlopqrstu012}]QP\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98";
    let mut random = XorShift(0x2545_f491_4f6c_dd1d);
    let (mut accepted, limits) = (0, Limits { max_nodes: 1 << 16, ..Limits::default() });
    for round in 0..40_000 {
        let mut bytes = seeds[round % seeds.len()].to_vec();
        for _ in 0..=random.next(4) {
            let at = random.next(bytes.len());
            match random.next(5) {
                0 => bytes[at] = u8::try_from(random.next(256)).unwrap(),
                1 => bytes[at] = opcodes[random.next(opcodes.len())],
                2 => bytes.insert(at, opcodes[random.next(opcodes.len())]),
                3 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(8)),
            }
        }
        let mut text = String::new();
        let decoded = disassemble(&bytes, &mut text);
        if let Ok(pickle) = Pickle::parse(&bytes, &limits) {
            accepted += 1;
            assert_eq!(decoded.unwrap(), pickle.nbytes() as u64);
            dump(&pickle, &DumpLimits::default(), &mut text).unwrap();
            for (id, _) in pickle.nodes() {
                let _ = (pickle.describe(id), pickle.dict(id).is_some());
            }
            assert!(pickle.globals().count() <= pickle.nodes().count());
        }
    }
    assert!(accepted > 1000, "only {accepted} mutations were pickles; the seeds are broken");
}
