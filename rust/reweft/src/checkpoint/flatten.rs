//! From the containers of a pickle to dotted keys, without recursion.
//!
//! Dicts and their kin, lists and tuples are walked; a value that is neither one of them nor a tensor is listed by
//! path, so that nothing disappears without a word. A container that is saved under two keys is read under both.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use reweft_pickle::{NodeId, Pickle, Value as Node};
use serde::Serialize;

use super::budget::Budget;
use super::globals::is_tensor;
use super::module;
use super::numpy;
use super::rebuild::{Part, Rebuild, Rebuilt};
use super::{Item, Items, OpenOptions, torchscript};
use crate::error::{Error, ErrorKind, Result};
use crate::keymap::suggest;

/// The key of a file that holds one tensor and no container.
const BARE_TENSOR: &str = "tensor";
/// What a value costs of the budget, beside its path: a key and a tensor's metadata take some hundred bytes.
const VALUE_COST: u64 = 64;

/// Something in a checkpoint that is no tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// Dotted path; empty if the file holds nothing else.
    pub path: String,
    /// What it is, cut short: `int 3`, `list of 2`.
    pub what: String,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.path, self.what)
    }
}

/// Tensors by key, and all that is left.
pub(super) struct Flat {
    pub items: Items,
    pub values: Vec<Value>,
}

/// A container that is being walked.
struct Frame<'p> {
    id: NodeId,
    children: std::vec::IntoIter<(Cow<'p, str>, Part)>,
    /// Length of the path before this container.
    path_nbytes: usize,
}

pub(super) fn flatten(pickle: &Pickle<'_>, rebuild: &mut Rebuild<'_>, options: &OpenOptions) -> Result<Flat> {
    let root = match &options.top_level_key {
        Some(key) => descend(pickle, key)?,
        None => pickle.root(),
    };
    let flat = flatten_all(pickle, rebuild, options, &[(String::new(), root)])?;
    if options.top_level_key.is_some() && flat.items.is_empty() {
        let what = format!("the top-level key leads to {}, which holds no tensor", pickle.describe(root));
        return Err(Error::new(ErrorKind::NotFound, what).of_key(options.top_level_key.clone().unwrap_or_default()));
    }
    Ok(flat)
}

/// Flattens several values of a pickle; the paths of what a value holds begin with the text beside it, which may be
/// empty. The limits are for all of them together.
pub(super) fn flatten_all(
    pickle: &Pickle<'_>,
    rebuild: &mut Rebuild<'_>,
    options: &OpenOptions,
    roots: &[(String, NodeId)],
) -> Result<Flat> {
    rebuild.check_unchanged()?;
    let expected = rebuild.saved.places.expected_storages();
    let items = Items::with_capacity_and_hasher(expected, foldhash::quality::RandomState::default());
    let mut walk = Walk {
        pickle,
        options,
        budget: Budget::new(pickle, &options.limits),
        flat: Flat { items, values: Vec::new() },
        open: HashSet::new(),
        holds_tensor: None,
        path: String::new(),
        leaves: 0,
    };
    for (path, root) in roots {
        walk.run(rebuild, *root, path)?;
    }
    Ok(walk.flat)
}

struct Walk<'a> {
    pickle: &'a Pickle<'a>,
    options: &'a OpenOptions,
    budget: Budget,
    flat: Flat,
    /// Containers that the path leads through.
    open: HashSet<NodeId>,
    /// Nodes from which a tensor can be reached, by index; made when an unknown object is met.
    holds_tensor: Option<Vec<bool>>,
    path: String,
    leaves: usize,
}

impl<'a> Walk<'a> {
    /// Walks all that can be reached from one value.
    fn run(&mut self, rebuild: &mut Rebuild<'_>, root: NodeId, path: &str) -> Result<()> {
        path.clone_into(&mut self.path);
        let mut stack = Vec::new();
        stack.extend(self.enter(rebuild, root, path.len())?);
        loop {
            let nested = stack.len() > 1 || !self.path.is_empty();
            let Some(frame) = stack.last_mut() else { return Ok(()) };
            let before = self.path.len();
            let Some((name, part)) = frame.children.next() else {
                self.path.truncate(frame.path_nbytes);
                self.open.remove(&frame.id);
                stack.pop();
                continue;
            };
            // Not asked of the path: an empty text is a key like any other.
            if nested {
                self.path.push('.');
            }
            self.path.push_str(&name);
            let entered = match part {
                Part::Node(id) => self.enter(rebuild, id, before)?,
                Part::Item(item) => self.keep(*item).map(|()| None)?,
                Part::Note(what) => {
                    self.note(what.0);
                    None
                }
            };
            match entered {
                Some(frame) => stack.push(frame),
                None => self.path.truncate(before),
            }
        }
    }

    /// Takes a leaf in, or gives the frame of a container to walk.
    fn enter(&mut self, rebuild: &mut Rebuild<'_>, id: NodeId, path_nbytes: usize) -> Result<Option<Frame<'a>>> {
        self.leaves += 1;
        let limits = &self.options.limits;
        if self.leaves > limits.max_keys || self.path.len() > limits.max_key_nbytes {
            let what = format!(
                "more than {} keys or a key of more than {} bytes; max_keys and max_key_nbytes can be raised",
                limits.max_keys, limits.max_key_nbytes
            );
            return Err(Error::new(ErrorKind::Limit, what));
        }
        self.budget.spend(VALUE_COST + self.path.len() as u64)?;
        self.budget.look_at(self.pickle, id)?;
        match rebuild.item(id).map_err(|error| error.of_key(&self.path))? {
            Some(Rebuilt::Item(item)) => return self.keep(item).map(|()| None),
            Some(Rebuilt::Value(what)) => return self.keep_unknown(id, what),
            Some(Rebuilt::With(item, parts)) => {
                self.keep(item)?;
                if self.open.is_empty() && self.path.is_empty() {
                    self.path.push_str(BARE_TENSOR);
                }
                let parts = parts.into_iter().map(|(name, part)| (name.into(), part)).collect();
                return Ok(self.frame(id, parts, path_nbytes));
            }
            Some(Rebuilt::Parts(what, parts)) => {
                self.note(what);
                let parts = parts.into_iter().map(|(name, part)| (name.into(), part)).collect();
                return Ok(self.frame(id, parts, path_nbytes));
            }
            None => {}
        }
        let id = torchscript::value(self.pickle, id);
        if is_plain_list(self.pickle, id) {
            self.note(self.pickle.describe(id));
            return Ok(None);
        }
        if let Some(children) = children(self.pickle, id).map_err(|error| error.of_key(&self.path))? {
            let parts = children.into_iter().map(|(name, id)| (name, Part::Node(id))).collect();
            return Ok(self.frame(id, parts, path_nbytes));
        }
        if let Some(module) = module::state(self.pickle, id) {
            for name in module.left_out {
                let path = if self.path.is_empty() { name } else { format!("{}.{name}", self.path) };
                self.flat.values.push(Value { path, what: "buffer that is no part of the state_dict".to_owned() });
            }
            let parts = module.items.into_iter().map(|(name, id)| (name.into(), Part::Node(id))).collect();
            return Ok(self.frame(id, parts, path_nbytes));
        }
        let what = numpy::describe(self.pickle, id).unwrap_or_else(|| self.pickle.describe(id));
        self.keep_unknown(id, what)
    }

    /// Lists what is neither a tensor nor a container: as unreadable if a tensor is in it.
    fn keep_unknown(&mut self, id: NodeId, what: String) -> Result<Option<Frame<'a>>> {
        if self.reaches_tensor(id) {
            self.keep(Item::Unreadable(format!("it is inside {what}, which reweft does not know")))?;
        } else {
            self.note(what);
        }
        Ok(None)
    }

    /// Starts to walk a container, unless the path leads through it already.
    fn frame(&mut self, id: NodeId, parts: Vec<(Cow<'a, str>, Part)>, path_nbytes: usize) -> Option<Frame<'a>> {
        if !self.open.insert(id) {
            self.note("a reference to a container that encloses it".to_owned());
            return None;
        }
        Some(Frame { id, children: parts.into_iter(), path_nbytes })
    }

    fn keep(&mut self, item: Item) -> Result<()> {
        // Nothing is open only where the root itself is a tensor.
        let key = if self.open.is_empty() && self.path.is_empty() { BARE_TENSOR } else { &self.path };
        match self.flat.items.insert(key.to_owned(), item) {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::KeyCollision, "two tensors have this key").of_key(&self.path)),
        }
    }

    fn note(&mut self, what: String) {
        self.flat.values.push(Value { path: self.path.clone(), what });
    }

    fn reaches_tensor(&mut self, id: NodeId) -> bool {
        let pickle = self.pickle;
        if !matches!(pickle.get(id), Node::Object(_) | Node::Persistent(_) | Node::Set(_) | Node::FrozenSet(_)) {
            return false;
        }
        self.holds_tensor.get_or_insert_with(|| holders(pickle)).get(id.index()).copied().unwrap_or(false)
    }
}

/// Names and values inside a container.
type Children<'p> = Vec<(Cow<'p, str>, NodeId)>;

/// Names and values inside a container; `None` if it is none.
fn children<'p>(pickle: &'p Pickle<'_>, id: NodeId) -> Result<Option<Children<'p>>> {
    let id = torchscript::value(pickle, id);
    if let Some(items) = pickle.as_sequence(id) {
        let numbered = items.iter().enumerate().map(|(number, item)| (number.to_string().into(), *item));
        return Ok(Some(numbered.collect()));
    }
    if !is_dict(pickle, id) {
        return Ok(None);
    }
    let Some(pairs) = pickle.dict(id) else { return Ok(None) };
    let mut named = Vec::with_capacity(pairs.len());
    for (key, value) in pairs.iter() {
        named.push((key_name(pickle, *key, *value)?, *value));
    }
    let mut seen = HashSet::with_capacity_and_hasher(named.len(), foldhash::quality::RandomState::default());
    let twice = |name: &str| Error::new(ErrorKind::KeyCollision, format!("a dict has the key {name:?} twice"));
    if let Some((name, _)) = named.iter().find(|(name, _)| !seen.insert(&**name)) {
        return Err(twice(name));
    }
    // A dict of Python's has one place for 1, True and 1.0.
    let numbers = pairs.iter().filter(|(key, _)| pickle.as_str(*key).is_none());
    let mut values = HashSet::new();
    for (key, _) in numbers {
        if let Some(value) = literal(pickle, *key, Spelling::ByValue, 0)
            && !values.insert(value)
        {
            return Err(twice(&literal(pickle, *key, Spelling::Python, 0).unwrap_or_default()));
        }
    }
    Ok(Some(named))
}

/// How a key is written as text.
#[derive(Clone, Copy)]
enum Spelling {
    /// As Python prints it.
    Python,
    /// So that keys are the same text if Python holds them to be one.
    ByValue,
}

/// A float as Python prints it.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    let text = format!("{value:?}");
    // Python writes a sign and at least two digits behind the `e`.
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

/// The integer that a number is equal to, as text.
fn integer(value: f64) -> Option<String> {
    // Below 2^63 every float without a fraction is one integer.
    let is_integer = value.fract() == 0.0 && value.abs() < 9.2e18;
    is_integer.then(|| format!("{value:.0}").replace("-0", "0"))
}

/// The text of a dict's key. What is neither text nor number can name a plain value, but no tensor.
fn key_name<'p>(pickle: &'p Pickle<'_>, key: NodeId, value: NodeId) -> Result<Cow<'p, str>> {
    if let Some(name) = pickle.as_str(key) {
        return Ok(name.into());
    }
    if let Some(name) = literal(pickle, key, Spelling::Python, 0) {
        return Ok(name.into());
    }
    let what = pickle.describe(key);
    if is_tensor(pickle, value) || is_container(pickle, value) {
        let what = format!("a dict has {what} for a key; reweft names tensors by texts, numbers and tuples of them");
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    Ok(what.into())
}

/// The keys that dicts have beside texts, as Python prints them: `True`, `None`, `0.5`, `('a', 0)`.
fn literal(pickle: &Pickle<'_>, key: NodeId, spelling: Spelling, depth: usize) -> Option<String> {
    /// Tuples within tuples; deeper ones are not named.
    const MAX_DEPTH: usize = 4;
    /// Items of a tuple.
    const MAX_ITEMS: usize = 16;
    match (pickle.get(key), spelling) {
        (Node::None, _) => Some("None".to_owned()),
        (Node::Bool(value), Spelling::Python) => Some(if *value { "True" } else { "False" }.to_owned()),
        (Node::Bool(value), Spelling::ByValue) => Some(u8::from(*value).to_string()),
        (Node::Float(value), Spelling::ByValue) if integer(*value).is_some() => integer(*value),
        (Node::Float(value), _) => Some(float(*value)),
        (Node::BigInt(value), _) if value.to_i128().is_some() => Some(value.to_string()),
        (Node::Int(value), _) => Some(value.to_string()),
        (Node::Tuple(items), _) if depth < MAX_DEPTH && items.len() <= MAX_ITEMS => {
            let named = |item: &NodeId| match pickle.as_str(*item) {
                Some(text) => Some(format!("'{text}'")),
                None => literal(pickle, *item, spelling, depth + 1),
            };
            let items = pickle.children(*items).iter().map(named).collect::<Option<Vec<_>>>()?;
            let comma = if items.len() == 1 { "," } else { "" };
            Some(format!("({}{comma})", items.join(", ")))
        }
        _ => None,
    }
}

/// A list or tuple of numbers and texts is one value to a reader, not a line for each.
fn is_plain_list(pickle: &Pickle<'_>, id: NodeId) -> bool {
    let is_plain = |id: &NodeId| {
        matches!(
            pickle.get(*id),
            Node::None | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Str(_) | Node::BigInt(_)
        )
    };
    pickle.as_sequence(id).is_some_and(|items| items.iter().all(is_plain))
}

fn is_container(pickle: &Pickle<'_>, id: NodeId) -> bool {
    pickle.as_sequence(id).is_some() || is_dict(pickle, id)
}

/// Dicts and the classes that are nothing but a dict; an object that merely was filled like one is not known.
fn is_dict(pickle: &Pickle<'_>, id: NodeId) -> bool {
    matches!(pickle.get(id), Node::Dict(_))
        || pickle.as_call(id).is_some_and(|((module, name), _)| {
            module == "collections" && matches!(name, "OrderedDict" | "Counter" | "defaultdict")
                || module == "builtins" && name == "dict"
        })
}

/// Follows a dotted path; where a key itself has dots, the longest one that fits is taken.
fn descend(pickle: &Pickle<'_>, path: &str) -> Result<NodeId> {
    let mut id = pickle.root();
    let mut rest = path;
    loop {
        let names = children(pickle, id)?.unwrap_or_default();
        let fits = |name: &str| rest.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with('.'));
        let best = names.iter().filter(|(name, _)| fits(name).is_some()).max_by_key(|(name, _)| name.len());
        let Some((name, child)) = best else {
            let listed: Vec<&str> = names.iter().map(|(name, _)| &**name).take(20).collect();
            let hint = suggest(rest, names.iter().map(|(name, _)| &**name));
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("no such top-level key; there are: {}", listed.join(", ")),
            )
            .of_key(path)
            .with_hint(hint));
        };
        id = *child;
        rest = rest[name.len()..].strip_prefix('.').unwrap_or_default();
        if rest.is_empty() {
            return Ok(id);
        }
    }
}

/// For every node, whether a tensor can be reached from it: one pass over all links, backwards from the tensors.
fn holders(pickle: &Pickle<'_>) -> Vec<bool> {
    let mut users: Vec<Vec<usize>> = Vec::new();
    let mut holds = Vec::new();
    let mut queue = Vec::new();
    for (id, node) in pickle.nodes() {
        let index = id.index();
        holds.resize(holds.len().max(index + 1), false);
        for link in links(pickle, node) {
            users.resize_with(users.len().max(link.index() + 1), Vec::new);
            users[link.index()].push(index);
        }
        if is_tensor(pickle, id) {
            queue.push(index);
        }
    }
    while let Some(index) = queue.pop() {
        if !std::mem::replace(&mut holds[index], true)
            && let Some(users) = users.get(index)
        {
            queue.extend(users);
        }
    }
    holds
}

/// Every value that a value mentions.
fn links(pickle: &Pickle<'_>, node: &Node<'_>) -> Vec<NodeId> {
    match node {
        Node::Tuple(items) | Node::FrozenSet(items) => pickle.children(*items).to_vec(),
        Node::List(items) | Node::Set(items) => items.clone(),
        Node::Dict(pairs) => pairs.iter().flat_map(|(key, value)| [*key, *value]).collect(),
        Node::Persistent(id) => vec![*id],
        Node::Object(object) => {
            let pairs = object.dict_items().iter().flat_map(|(key, value)| [*key, *value]);
            let one = [object.callable, object.args].into_iter().chain(object.kwargs);
            let many = object.state().iter().chain(object.list_items()).chain(object.set_items()).copied();
            one.chain(many).chain(pairs).collect()
        }
        _ => Vec::new(),
    }
}
