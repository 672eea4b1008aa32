//! Text for people and for tests: the opcodes of a pickle, and the values that it makes.

use std::collections::HashSet;
use std::fmt;
use std::iter;

use crate::cursor::{Arg, Decoder};
use crate::error::{Error, ErrorKind, Result};
use crate::opcode::Op;
use crate::pickle::{Pickle, quoted};
use crate::value::{NodeId, Object, Value};

/// Lines are indented up to this depth; deeper ones give their depth as a number, or a dump would
/// be quadratic.
const MAX_INDENT: usize = 32;

/// Bounds on a [`dump`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpLimits {
    /// Most values to print, one line each. Default 10,000.
    pub max_nodes: usize,
    /// Deepest level to print; the root is level 0. Default 64.
    pub max_depth: usize,
}

impl Default for DumpLimits {
    fn default() -> Self {
        Self { max_nodes: 10_000, max_depth: 64 }
    }
}

/// Prints the opcodes of the pickle at the start of `bytes`: byte offset, opcode byte, name and
/// argument.
///
/// The columns are those of Python's `pickletools.dis` without its indentation. Values are not
/// made, so a pickle whose stack is wrong is printed too. Returns the number of bytes up to and
/// with STOP. Linear; long arguments are cut.
///
/// # Errors
/// What [`Pickle::parse`] finds wrong with bytes, frames and protocol, after the opcodes before
/// that place have been printed. [`ErrorKind::Output`] if `out` refuses text.
///
/// ```
/// let mut text = String::new();
/// reweft_pickle::disassemble(b"\x80\x02K\x07.", &mut text)?;
/// assert_eq!(text, "    0: \\x80 PROTO      2\n    2: K    BININT1    7\n    4: .    STOP\n");
/// # Ok::<(), reweft_pickle::Error>(())
/// ```
pub fn disassemble(bytes: &[u8], out: &mut impl fmt::Write) -> Result<u64> {
    let mut decoder = Decoder::new(bytes);
    loop {
        let instruction = decoder.next()?;
        let (byte_offset, entry) = (instruction.byte_offset, instruction.entry);
        let byte = (entry.op as u8).escape_ascii().to_string();
        write!(out, "{byte_offset:5}: {byte:4} ")
            .and_then(|()| match instruction.arg {
                Arg::Nothing => writeln!(out, "{}", entry.name),
                arg => writeln!(out, "{:10} {arg}", entry.name),
            })
            .map_err(|_| Error::new(ErrorKind::Output, "the writer refused the text").at(byte_offset, None))?;
        if entry.op == Op::Stop {
            return Ok(decoder.byte_offset() as u64);
        }
    }
}

impl fmt::Display for Arg<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Nothing => Ok(()),
            Arg::Int(value) => write!(f, "{value}"),
            Arg::UInt(value) => write!(f, "{value}"),
            Arg::Float(value) => write!(f, "{value:?}"),
            Arg::Bytes(bytes) => f.write_str(&quoted(None, bytes)),
            Arg::TwoLines(first, second) => {
                write!(f, "{} {}", quoted(None, first), quoted(None, second))
            }
        }
    }
}

/// Prints the values that the root reaches, one per line, indented by depth.
///
/// A container carries its id at its first mention (`list of 2 &7`) and is the id alone at every
/// other one (`&7`), so shared values and loops are visible and cost nothing. Time and output are
/// linear in `limits.max_nodes`.
///
/// # Errors
/// Only those of `out`.
///
/// ```
/// use reweft_pickle::{DumpLimits, Limits, Pickle, dump};
/// let pickle = Pickle::parse(b"](K\x01Ne.", &Limits::default())?;
/// let mut text = String::new();
/// dump(&pickle, &DumpLimits::default(), &mut text).expect("a String takes all text");
/// assert_eq!(text, "list of 2 &4\n  int 1\n  None\n");
/// # Ok::<(), reweft_pickle::Error>(())
/// ```
pub fn dump(pickle: &Pickle<'_>, limits: &DumpLimits, out: &mut impl fmt::Write) -> fmt::Result {
    let root = Edge { label: Label::Item, target: pickle.root() };
    let mut path: Vec<Edges<'_>> = vec![Box::new(iter::once(root))];
    let (mut printed, mut seen) = (0_usize, HashSet::new());
    while let Some(edges) = path.last_mut() {
        let Some(edge) = edges.next() else {
            path.pop();
            continue;
        };
        let depth = path.len().saturating_sub(1);
        if printed == limits.max_nodes {
            return writeln!(out, "... (max_nodes {printed} reached)");
        }
        printed = printed.saturating_add(1);
        indent(depth, out)?;
        edge.label.write(pickle, out)?;
        let target = edge.target;
        if is_leaf(pickle.get(target)) {
            writeln!(out, "{}", pickle.describe(target))?;
        } else if !seen.insert(target) {
            writeln!(out, "{target}")?;
        } else if depth < limits.max_depth {
            writeln!(out, "{} {target}", pickle.describe(target))?;
            path.push(edges_of(pickle, target));
        } else {
            writeln!(out, "{} {target} ... (max_depth {depth} reached)", pickle.describe(target))?;
        }
    }
    Ok(())
}

fn indent(depth: usize, out: &mut impl fmt::Write) -> fmt::Result {
    write!(out, "{:1$}", "", depth.min(MAX_INDENT).saturating_mul(2))?;
    if depth > MAX_INDENT { write!(out, "({depth}) ") } else { Ok(()) }
}

/// From a container to a value in it.
struct Edge {
    label: Label,
    target: NodeId,
}

type Edges<'p> = Box<dyn Iterator<Item = Edge> + 'p>;

enum Label {
    Item,
    /// The value under a key that fits the line.
    Key(NodeId),
    Field(&'static str),
}

impl Label {
    fn write(&self, pickle: &Pickle<'_>, out: &mut impl fmt::Write) -> fmt::Result {
        match *self {
            Label::Item => Ok(()),
            Label::Field(name) => write!(out, "{name}: "),
            Label::Key(key) => match pickle.get(key) {
                Value::Str(text) => write!(out, "{}: ", quoted(text.as_str(), text.as_bytes())),
                Value::ByteStr(bytes) => write!(out, "{}: ", quoted(None, bytes)),
                _ => write!(out, "{}: ", pickle.describe(key)),
            },
        }
    }
}

fn is_leaf(value: &Value<'_>) -> bool {
    match value {
        Value::Tuple(items) => items.is_empty(),
        Value::List(_)
        | Value::Dict(_)
        | Value::Set(_)
        | Value::FrozenSet(_)
        | Value::Persistent(_)
        | Value::Object(_) => false,
        _ => true,
    }
}

fn edges_of<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Edges<'p> {
    match pickle.get(id) {
        Value::Tuple(children) | Value::FrozenSet(children) => Box::new(items("", pickle.children(*children))),
        Value::List(list) | Value::Set(list) => Box::new(items("", list)),
        Value::Dict(dict) => Box::new(dict.iter().flat_map(|&pair| pair_edges(pickle, pair))),
        Value::Persistent(pid) => Box::new(iter::once(Edge { label: Label::Field("id"), target: *pid })),
        Value::Object(object) => Box::new(object_edges(pickle, object)),
        _ => Box::new(iter::empty()),
    }
}

fn items<'p>(field: &'static str, items: &'p [NodeId]) -> impl Iterator<Item = Edge> + 'p {
    items.iter().map(move |&target| {
        let label = if field.is_empty() { Label::Item } else { Label::Field(field) };
        Edge { label, target }
    })
}

/// One edge if the key fits the line of its value, else one for each.
fn pair_edges(pickle: &Pickle<'_>, (key, value): (NodeId, NodeId)) -> impl Iterator<Item = Edge> + use<> {
    let (first, label) = if is_leaf(pickle.get(key)) {
        (None, Label::Key(key))
    } else {
        (Some(Edge { label: Label::Field("key"), target: key }), Label::Field("value"))
    };
    first.into_iter().chain(iter::once(Edge { label, target: value }))
}

fn object_edges<'p>(pickle: &'p Pickle<'_>, object: &'p Object) -> impl Iterator<Item = Edge> + 'p {
    // The line of the object already names a global.
    let callable = pickle.as_global(object.callable).is_none().then_some(object.callable);
    let fields = [("callable", callable), ("args", Some(object.args)), ("kwargs", object.kwargs)];
    let fields =
        fields.into_iter().filter_map(|(name, target)| Some(Edge { label: Label::Field(name), target: target? }));
    fields
        .chain(items("state", object.state()))
        .chain(items("item", object.list_items()))
        .chain(items("member", object.set_items()))
        .chain(object.dict_items().iter().flat_map(|&pair| pair_edges(pickle, pair)))
}
