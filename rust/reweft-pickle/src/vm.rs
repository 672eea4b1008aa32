//! The interpreter: instructions to values. It calls, imports and resolves nothing; a call becomes
//! an [`Object`](crate::Object) that says what would have been called.

mod memo;

use std::borrow::Cow;

use crate::bigint::{Integer, excerpt};
use crate::cursor::{Decoder, Instruction};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::opcode::Op;
use crate::pickle::Pickle;
use crate::text::{Text, string_literal};
use crate::value::{Children, How, NodeId, Object, Value};
use memo::Memo;

/// Room for a value per this many input bytes is reserved at once: torch writes one per 8 to 15
/// bytes.
const NBYTES_PER_NODE: usize = 8;
/// But no more (32 MiB of address space), as the input may be a whole legacy file that starts with
/// small pickles.
const MAX_RESERVED_NODES: usize = 1 << 20;

struct Machine<'a, 'l> {
    limits: &'l Limits,
    nodes: Vec<Value<'a>>,
    /// The nodes that are globals: readers ask for them first, and a checkpoint has a handful among many nodes.
    globals: Vec<NodeId>,
    /// Calls whose results are filled or given a state, once each.
    filled: Vec<NodeId>,
    pool: Vec<NodeId>,
    stack: Vec<NodeId>,
    /// Stack heights at which a MARK stands.
    marks: Vec<usize>,
    /// The last of `marks`, or 0: nothing below it may be popped.
    fence: usize,
    memo: Memo,
    /// Ints of one byte that occurred; sizes and strides repeat them, two values of five in a
    /// checkpoint.
    small_ints: [Option<NodeId>; 256],
}

/// Reads one pickle from the start of `bytes`.
pub(crate) fn run<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Pickle<'a>> {
    let mut decoder = Decoder::new(bytes);
    let mut machine = Machine::new(limits, bytes.len());
    loop {
        let instruction = decoder.next()?;
        let done = match instruction.entry.op {
            Op::Stop => machine.finish().map(Some),
            _ => machine.step(&instruction).map(|()| None),
        };
        match done {
            Ok(None) => {}
            Ok(Some(root)) => {
                let Machine { nodes, globals, filled, pool, .. } = machine;
                let (protocol, nbytes) = (decoder.protocol(), decoder.byte_offset());
                return Ok(Pickle { nodes, globals, filled, pool, root, protocol, nbytes });
            }
            Err(error) => {
                return Err(error.at(instruction.byte_offset, Some(instruction.entry.name)));
            }
        }
    }
}

impl<'a, 'l> Machine<'a, 'l> {
    fn new(limits: &'l Limits, nbytes: usize) -> Self {
        let expected = (nbytes / NBYTES_PER_NODE).min(MAX_RESERVED_NODES);
        let mut nodes = Vec::with_capacity(expected.saturating_add(4));
        // In the order of the constants of `NodeId`.
        let empty = Children { start: 0, len: 0 };
        nodes.extend([Value::None, Value::Bool(true), Value::Bool(false), Value::Tuple(empty)]);
        Self {
            limits,
            nodes,
            globals: Vec::new(),
            filled: Vec::new(),
            pool: Vec::with_capacity(expected),
            stack: Vec::new(),
            marks: Vec::new(),
            fence: 0,
            memo: Memo::default(),
            small_ints: [None; 256],
        }
    }

    /// One arm per opcode, in the order of the opcode table.
    #[inline]
    fn step(&mut self, instruction: &Instruction<'a>) -> Result<()> {
        let arg = instruction.arg;
        match instruction.entry.op {
            // The decoder has dealt with these.
            Op::Proto | Op::Frame | Op::Stop => {}

            Op::None => self.stack.push(NodeId::NONE),
            Op::NewTrue => self.stack.push(NodeId::TRUE),
            Op::NewFalse => self.stack.push(NodeId::FALSE),
            Op::Int => self.text_int(arg.bytes()?)?,
            Op::BinInt | Op::BinInt2 => self.push(Value::Int(arg.int()?))?,
            Op::BinInt1 => self.small_int(arg.int()?)?,
            Op::Long => self.text_long(arg.bytes()?)?,
            Op::Long1 | Op::Long4 => self.push_integer(Integer::from_le_bytes(arg.bytes()?))?,
            Op::Float => self.push(Value::Float(text_float(arg.bytes()?)?))?,
            Op::BinFloat => self.push(Value::Float(arg.float()?))?,

            Op::String => self.push(Value::ByteStr(string_literal(arg.bytes()?)?))?,
            Op::BinString | Op::ShortBinString => {
                self.push(Value::ByteStr(Cow::Borrowed(arg.bytes()?)))?;
            }
            Op::Unicode => self.push(Value::Str(Text::from_raw_unicode_escape(arg.bytes()?)?))?,
            Op::BinUnicode | Op::ShortBinUnicode | Op::BinUnicode8 => {
                self.push(Value::Str(Text::from_utf8(arg.bytes()?)?))?;
            }
            Op::BinBytes | Op::ShortBinBytes | Op::BinBytes8 => {
                self.push(Value::Bytes(arg.bytes()?))?;
            }
            Op::ByteArray8 => self.push(Value::ByteArray(arg.bytes()?))?,
            Op::NextBuffer | Op::ReadonlyBuffer => return Err(out_of_band()),

            Op::EmptyTuple => self.stack.push(NodeId::EMPTY_TUPLE),
            Op::Tuple1 => self.push_tuple(self.top(1)?)?,
            Op::Tuple2 => self.push_tuple(self.top(2)?)?,
            Op::Tuple3 => self.push_tuple(self.top(3)?)?,
            Op::Tuple => {
                let start = self.pop_mark()?;
                self.push_tuple(start)?;
            }
            Op::EmptyList => self.push(Value::List(Vec::new()))?,
            Op::List => {
                let start = self.pop_mark()?;
                let items = self.stack.split_off(start);
                self.push(Value::List(items))?;
            }
            Op::Append => self.append_items(self.top(1)?)?,
            Op::Appends => {
                let start = self.pop_mark()?;
                self.append_items(start)?;
            }
            Op::EmptyDict => self.push(Value::Dict(Vec::new()))?,
            Op::Dict => self.dict()?,
            Op::SetItem => self.set_items(self.top(2)?)?,
            Op::SetItems => {
                let start = self.pop_mark()?;
                self.set_items(start)?;
            }
            Op::EmptySet => self.push(Value::Set(Vec::new()))?,
            Op::AddItems => self.add_items()?,
            Op::FrozenSet => {
                let start = self.pop_mark()?;
                let children = self.children(start)?;
                self.push(Value::FrozenSet(children))?;
            }

            Op::Mark => self.mark(),
            Op::Pop => self.pop_value_or_mark()?,
            Op::PopMark => {
                let start = self.pop_mark()?;
                self.stack.truncate(start);
            }
            Op::Dup => {
                let id = self.peek()?;
                self.stack.push(id);
            }
            Op::Get => self.get(memo_index(arg.bytes()?)?)?,
            Op::BinGet | Op::LongBinGet => self.get(arg.int()?.cast_unsigned())?,
            Op::Put => self.put(memo_index(arg.bytes()?)?)?,
            Op::BinPut | Op::LongBinPut => self.put(arg.int()?.cast_unsigned())?,
            Op::Memoize => self.put(self.memo.len() as u64)?,

            Op::Global => {
                let (module, name) = arg.two_lines()?;
                let global = self.global(module, name)?;
                self.stack.push(global);
            }
            Op::StackGlobal => self.stack_global()?,
            Op::Ext1 | Op::Ext2 | Op::Ext4 => {
                self.push(Value::Extension(extension_code(arg.int()?)?))?;
            }
            Op::Reduce => self.call(How::Reduce)?,
            Op::NewObj => self.call(How::NewObj)?,
            Op::NewObjEx => self.call(How::NewObjEx)?,
            Op::Inst => self.inst(arg.two_lines()?)?,
            Op::Obj => self.obj()?,
            Op::Build => self.build()?,
            Op::PersId => {
                let pid = self.add(Value::Str(Text::from_ascii(arg.bytes()?)?))?;
                self.push(Value::Persistent(pid))?;
            }
            Op::BinPersId => {
                let pid = self.pop()?;
                self.push(Value::Persistent(pid))?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<NodeId> {
        let root = self.pop()?;
        match (self.stack.len(), self.marks.len()) {
            (0, 0) => Ok(root),
            (values, marks) => {
                let message = format!("{values} values and {marks} marks are left on the stack");
                Err(Error::new(ErrorKind::StackLeftover, message))
            }
        }
    }

    // Arena and stack.

    #[inline]
    fn add(&mut self, value: Value<'a>) -> Result<NodeId> {
        match u32::try_from(self.nodes.len()) {
            Ok(index) if index < self.limits.max_nodes => {
                self.nodes.push(value);
                Ok(NodeId::from_index(index))
            }
            _ => Err(Error::new(ErrorKind::Limit, format!("max_nodes ({}) values exist", self.limits.max_nodes))),
        }
    }

    #[inline]
    fn push(&mut self, value: Value<'a>) -> Result<()> {
        let id = self.add(value)?;
        self.stack.push(id);
        Ok(())
    }

    #[inline]
    fn pop(&mut self) -> Result<NodeId> {
        match self.stack.pop() {
            Some(id) if self.stack.len() >= self.fence => Ok(id),
            _ => Err(self.underflow(1)),
        }
    }

    #[inline]
    fn peek(&self) -> Result<NodeId> {
        let start = self.top(1)?;
        self.stack.get(start).copied().ok_or_else(|| self.underflow(1))
    }

    /// Where the top `count` values start.
    #[inline]
    fn top(&self, count: usize) -> Result<usize> {
        match self.stack.len().checked_sub(count) {
            Some(start) if start >= self.fence => Ok(start),
            _ => Err(self.underflow(count)),
        }
    }

    #[cold]
    fn underflow(&self, count: usize) -> Error {
        let place = if self.marks.is_empty() { "on the stack" } else { "on the stack above the last mark" };
        let values = if count == 1 { "a value" } else { "values" };
        Error::new(ErrorKind::StackUnderflow, format!("needs {values} {place}, where too few are left"))
    }

    /// The values from `start` on and the container below them, which takes them.
    #[inline]
    fn container(&mut self, start: usize) -> Result<(&mut Value<'a>, &[NodeId])> {
        let (below, items) = self.stack.split_at_checked(start).unwrap_or_default();
        let container = below.get(self.fence..).and_then(<[NodeId]>::last);
        match container.and_then(|id| Some((id, self.nodes.get_mut(id.index())?))) {
            Some((id, value)) => {
                if matches!(value, Value::Object(object) if !object.is_filled()) {
                    self.filled.push(*id);
                }
                Ok((value, items))
            }
            None => Err(Error::new(ErrorKind::StackUnderflow, "no container is below the values")),
        }
    }

    fn value(&self, id: NodeId) -> &Value<'a> {
        self.nodes.get(id.index()).unwrap_or(&Value::None)
    }

    // Marks.

    #[inline]
    fn mark(&mut self) {
        self.fence = self.stack.len();
        self.marks.push(self.fence);
    }

    /// Removes the last mark and gives the stack height at which it stood.
    #[inline]
    fn pop_mark(&mut self) -> Result<usize> {
        let start = self.marks.pop().ok_or_else(|| Error::new(ErrorKind::StackUnderflow, "no MARK is open"))?;
        self.fence = self.marks.last().copied().unwrap_or(0);
        Ok(start)
    }

    /// POP takes a mark away if that is what is on top.
    fn pop_value_or_mark(&mut self) -> Result<()> {
        if !self.marks.is_empty() && self.stack.len() == self.fence {
            return self.pop_mark().map(drop);
        }
        self.pop().map(drop)
    }

    // Scalars.

    #[inline]
    fn small_int(&mut self, value: i64) -> Result<()> {
        let index = usize::try_from(value).unwrap_or(usize::MAX);
        if let Some(Some(id)) = self.small_ints.get(index) {
            self.stack.push(*id);
            return Ok(());
        }
        let id = self.add(Value::Int(value))?;
        self.stack.push(id);
        if let Some(entry) = self.small_ints.get_mut(index) {
            *entry = Some(id);
        }
        Ok(())
    }

    fn push_integer(&mut self, integer: Integer<'a>) -> Result<()> {
        self.push(match integer {
            Integer::Small(value) => Value::Int(value),
            Integer::Big(value) => Value::BigInt(value),
        })
    }

    /// INT. Protocols 0 and 1 have no bool; exactly `00` and `01` stand for them.
    fn text_int(&mut self, text: &'a [u8]) -> Result<()> {
        match text {
            b"00" => self.stack.push(NodeId::FALSE),
            b"01" => self.stack.push(NodeId::TRUE),
            _ => {
                return self.push_integer(Integer::from_decimal(text, self.limits.max_int_digits)?);
            }
        }
        Ok(())
    }

    fn text_long(&mut self, text: &'a [u8]) -> Result<()> {
        let text = text.strip_suffix(b"L").unwrap_or(text);
        self.push_integer(Integer::from_decimal(text, self.limits.max_int_digits)?)
    }

    // Memo.

    #[inline]
    fn get(&mut self, index: u64) -> Result<()> {
        let id = self.memo.get(index)?;
        self.stack.push(id);
        Ok(())
    }

    #[inline]
    fn put(&mut self, index: u64) -> Result<()> {
        let id = self.peek()?;
        self.memo.put(index, id, self.limits.max_memo)
    }

    // Containers.

    /// Moves the values from `start` on from the stack to the pool.
    #[inline]
    fn children(&mut self, start: usize) -> Result<Children> {
        let items = self.stack.get(start..).unwrap_or_default();
        let end = u32::try_from(self.pool.len().saturating_add(items.len()));
        let (Ok(_), Ok(start_in_pool), Ok(len)) = (end, u32::try_from(self.pool.len()), u32::try_from(items.len()))
        else {
            return Err(Error::new(ErrorKind::Limit, "the tuples hold more than 2^32 items"));
        };
        self.pool.extend_from_slice(items);
        self.stack.truncate(start);
        Ok(Children { start: start_in_pool, len })
    }

    #[inline]
    fn tuple(&mut self, start: usize) -> Result<NodeId> {
        match self.children(start)? {
            children if children.is_empty() => Ok(NodeId::EMPTY_TUPLE),
            children => self.add(Value::Tuple(children)),
        }
    }

    #[inline]
    fn push_tuple(&mut self, start: usize) -> Result<()> {
        let id = self.tuple(start)?;
        self.stack.push(id);
        Ok(())
    }

    fn dict(&mut self) -> Result<()> {
        let start = self.pop_mark()?;
        let dict = pairs(self.stack.get(start..).unwrap_or_default())?.collect();
        self.stack.truncate(start);
        self.push(Value::Dict(dict))
    }

    fn append_items(&mut self, start: usize) -> Result<()> {
        match self.container(start)? {
            (Value::List(list), items) => list.extend_from_slice(items),
            (Value::Object(object), items) => object.fill().list_items.extend_from_slice(items),
            (other, _) => return Err(unfit(other, "take list items")),
        }
        self.stack.truncate(start);
        Ok(())
    }

    fn set_items(&mut self, start: usize) -> Result<()> {
        match self.container(start)? {
            (Value::Dict(dict), items) => dict.extend(pairs(items)?),
            (Value::Object(object), items) => object.fill().dict_items.extend(pairs(items)?),
            (other, _) => return Err(unfit(other, "take keys and values")),
        }
        self.stack.truncate(start);
        Ok(())
    }

    fn add_items(&mut self) -> Result<()> {
        let start = self.pop_mark()?;
        match self.container(start)? {
            (Value::Set(set), items) => set.extend_from_slice(items),
            (Value::Object(object), items) => object.fill().set_items.extend_from_slice(items),
            (other, _) => return Err(unfit(other, "take set items")),
        }
        self.stack.truncate(start);
        Ok(())
    }

    // Calls.

    fn global(&mut self, module: &'a [u8], name: &'a [u8]) -> Result<NodeId> {
        let (module, name) = (self.name(module)?, self.name(name)?);
        self.add_global(module, name)
    }

    fn add_global(&mut self, module: NodeId, name: NodeId) -> Result<NodeId> {
        let id = self.add(Value::Global { module, name })?;
        self.globals.push(id);
        Ok(id)
    }

    fn name(&mut self, text: &'a [u8]) -> Result<NodeId> {
        let text = Text::from_utf8(text)?;
        match text.as_str() {
            None => Err(Error::new(ErrorKind::BadArgument, "a module or class name has a lone surrogate")),
            Some("") => Err(Error::new(ErrorKind::BadArgument, "a module or class name is empty")),
            Some(_) => self.add(Value::Str(text)),
        }
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        for id in [module, name] {
            match self.value(id) {
                Value::Str(text) if text.as_str().is_some_and(|text| !text.is_empty()) => {}
                other => return Err(unfit(other, "be a module or class name")),
            }
        }
        let id = self.add_global(module, name)?;
        self.stack.push(id);
        Ok(())
    }

    /// REDUCE, NEWOBJ and `NEWOBJ_EX`. Nothing is looked up, so an unknown callable is as good as a
    /// known one.
    fn call(&mut self, how: How) -> Result<()> {
        let kwargs = if how == How::NewObjEx { Some(self.pop()?) } else { None };
        let (args, callable) = (self.pop()?, self.pop()?);
        self.expect_callable(callable)?;
        // A subclass of tuple or dict arrives as an object.
        match self.value(args) {
            Value::Tuple(_) | Value::Object(_) | Value::Persistent(_) => {}
            other => return Err(unfit(other, "be the arguments of a call")),
        }
        match kwargs.map(|kwargs| self.value(kwargs)) {
            None | Some(Value::Dict(_) | Value::Object(_) | Value::Persistent(_)) => {}
            Some(other) => return Err(unfit(other, "be the keyword arguments of a call")),
        }
        self.push(Value::Object(Object::new(how, callable, args, kwargs)))
    }

    fn expect_callable(&self, id: NodeId) -> Result<()> {
        match self.value(id) {
            Value::Global { .. } | Value::Object(_) | Value::Persistent(_) | Value::Extension(_) => Ok(()),
            other => Err(unfit(other, "be called")),
        }
    }

    fn inst(&mut self, (module, name): (&'a [u8], &'a [u8])) -> Result<()> {
        let start = self.pop_mark()?;
        let args = self.tuple(start)?;
        let callable = self.global(module, name)?;
        self.push(Value::Object(Object::new(How::Inst, callable, args, None)))
    }

    /// The stack holds, above the mark, the class and then its arguments.
    fn obj(&mut self) -> Result<()> {
        let start = self.pop_mark()?;
        let callable = self.stack.get(start).copied().ok_or_else(|| self.underflow(1))?;
        self.expect_callable(callable)?;
        let args = self.tuple(start.saturating_add(1))?;
        self.stack.truncate(start);
        self.push(Value::Object(Object::new(How::Obj, callable, args, None)))
    }

    fn build(&mut self) -> Result<()> {
        let start = self.top(1)?;
        match self.container(start)? {
            (Value::Object(object), items) => object.fill().state.extend_from_slice(items),
            (other, _) => return Err(unfit(other, "take a state")),
        }
        self.stack.truncate(start);
        Ok(())
    }
}

#[cold]
fn unfit(value: &Value<'_>, what: &str) -> Error {
    Error::new(ErrorKind::BadOperand, format!("a value of kind {} cannot {what}", value.kind_name()))
}

#[cold]
fn out_of_band() -> Error {
    Error::new(ErrorKind::Unsupported, "out-of-band buffers are not supported")
}

/// Keys and values in turn; one left over is an error.
fn pairs(items: &[NodeId]) -> Result<impl Iterator<Item = (NodeId, NodeId)>> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value))),
        _ => Err(Error::new(ErrorKind::StackUnderflow, "the last key has no value")),
    }
}

fn text_float(text: &[u8]) -> Result<f64> {
    let number = str::from_utf8(text.trim_ascii()).ok().and_then(|text| text.parse().ok());
    let message = || format!("\"{}\" is not a number", excerpt(text));
    number.ok_or_else(|| Error::new(ErrorKind::BadArgument, message()))
}

/// The argument of GET and PUT: a text of any length and sign.
fn memo_index(text: &[u8]) -> Result<u64> {
    let number = str::from_utf8(text.trim_ascii()).ok().and_then(|text| text.parse().ok());
    let message = || format!("\"{}\" is not a memo index", excerpt(text));
    number.ok_or_else(|| Error::new(ErrorKind::Memo, message()))
}

fn extension_code(code: i64) -> Result<u32> {
    match u32::try_from(code) {
        Ok(code) if code > 0 => Ok(code),
        _ => Err(Error::new(ErrorKind::BadArgument, format!("extension code {code} is not positive"))),
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests;

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod hostile_tests;
