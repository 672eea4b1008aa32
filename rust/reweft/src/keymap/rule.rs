//! Rules: each changes the list of names and recipes that the one before left.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::LazyLock;

use indexmap::IndexMap;
use regex::{Captures, Regex};

use super::compile;
use crate::error::{Error, ErrorKind, Result};
use crate::recipe::{Recipe, Step};

/// `$name`, `${name}` or `$$` in a replacement, split as the regex crate splits it.
static REFERENCE: LazyLock<Result<Regex, regex::Error>> =
    LazyLock::new(|| Regex::new(r"\$(?:(\$)|\{([^}]*)\}|([0-9A-Za-z_]+))"));

/// A tensor under its name of the moment.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub name: String,
    pub recipe: Recipe,
}

/// One step of a key map.
#[derive(Clone, Debug)]
pub struct Rule(Action);

#[derive(Clone, Debug)]
enum Action {
    Rename { pattern: Regex, to: String },
    StripPrefix(String),
    AddPrefix(String),
    Select(Regex),
    Drop(Regex),
    Renumber { pattern: Option<Regex>, except: Vec<Regex> },
    Change { pattern: Regex, step: Step },
    Split { pattern: Regex, dim: i64, sizes: Sizes, into: Vec<String> },
    Concat { patterns: Vec<Regex>, dim: i64, into: String },
}

/// How a tensor is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Into as many equal parts as there are names.
    Equal,
    /// Into parts of these sizes, one for each name.
    Given(Vec<u64>),
}

impl Rule {
    /// Replaces every match of `pattern` in a name. `replacement` uses `$1`, `${1}` and `${name}` for groups and `$$`
    /// for a dollar sign.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile, or a replacement that names a group the pattern does
    /// not have: the regex crate would put nothing in its place, and `$1_x` means the group `1_x`.
    pub fn new(pattern: &str, replacement: &str) -> Result<Self> {
        let pattern = compile(pattern)?;
        check_references(&pattern, replacement)?;
        Ok(Self(Action::Rename { pattern, to: replacement.to_owned() }))
    }

    /// Parses `REGEX=REPLACEMENT`, split at the last `=`: names hold no `=`, patterns may.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`ErrorKind::Usage`] if there is no `=`.
    ///
    /// # Examples
    /// ```
    /// let keys = reweft::KeyMap::new().rule(reweft::Rule::parse(r"^module\.(.*)$=$1")?);
    /// assert!(keys.apply(["module.fc.weight"])?.tensors.contains_key("fc.weight"));
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn parse(text: &str) -> Result<Self> {
        let Some((pattern, replacement)) = text.rsplit_once('=') else {
            return Err(Error::new(ErrorKind::Usage, format!("{text:?} is not of the form REGEX=REPLACEMENT"))
                .with_hint(r"for example '^module\.(.*)$=$1'"));
        };
        Self::new(pattern, replacement)
    }

    /// Takes literal text off the front of names that begin with it.
    pub fn strip_prefix(prefix: impl Into<String>) -> Self {
        Self(Action::StripPrefix(prefix.into()))
    }

    /// Puts literal text before every name.
    pub fn add_prefix(prefix: impl Into<String>) -> Self {
        Self(Action::AddPrefix(prefix.into()))
    }

    /// Keeps only names that match.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile.
    pub fn select(pattern: &str) -> Result<Self> {
        Ok(Self(Action::Select(compile(pattern)?)))
    }

    /// Drops names that match.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile.
    pub fn drop(pattern: &str) -> Result<Self> {
        Ok(Self(Action::Drop(compile(pattern)?)))
    }

    /// Closes gaps in indexes: `fc.0`, `fc.2`, `fc.5` become `fc.0`, `fc.1`, `fc.2`, each group of names with the same
    /// text before the index on its own. Without a pattern every part of a name that is a number is an index; a pattern
    /// has one group, which is the index. Names that match one of `except` keep theirs and take no part.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile or has not one group.
    pub fn renumber(pattern: Option<&str>, except: &[&str]) -> Result<Self> {
        let pattern = pattern.map(compile).transpose()?;
        if let Some(pattern) = pattern.as_ref().filter(|pattern| pattern.captures_len() != 2) {
            let what =
                format!("pattern {pattern} has {} groups, wanted one around the index", pattern.captures_len() - 1);
            return Err(Error::new(ErrorKind::Usage, what).with_hint(r"for example '^layers\.(\d+)\.'"));
        }
        let except = except.iter().map(|pattern| compile(pattern)).collect::<Result<_>>()?;
        Ok(Self(Action::Renumber { pattern, except }))
    }

    /// Changes tensors whose names match: a [`Step`] that takes one tensor, such as a permutation or a cast.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile, or another kind of step.
    pub fn change(pattern: &str, step: Step) -> Result<Self> {
        let takes_one = matches!(
            step,
            Step::Cast { .. }
                | Step::Permute { .. }
                | Step::Transpose { .. }
                | Step::Reshape { .. }
                | Step::Slice { .. }
                | Step::Chunk { .. }
        );
        if !takes_one {
            return Err(Error::new(ErrorKind::Usage, format!("{step} is no change of one tensor")));
        }
        Ok(Self(Action::Change { pattern: compile(pattern)?, step }))
    }

    /// Cuts tensors whose names match into parts along a dimension; `into` names them, with `$1` for groups.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile, a reference to an absent group, no names, or another
    /// number of sizes than of names.
    pub fn split(pattern: &str, dim: i64, sizes: Sizes, into: &[&str]) -> Result<Self> {
        let pattern = compile(pattern)?;
        for name in into {
            check_references(&pattern, name)?;
        }
        let fits = match &sizes {
            Sizes::Equal => !into.is_empty(),
            Sizes::Given(sizes) => sizes.len() == into.len() && !into.is_empty(),
        };
        if !fits {
            let what = format!("split into {} names needs at least one, and as many sizes if any", into.len());
            return Err(Error::new(ErrorKind::Usage, what));
        }
        Ok(Self(Action::Split { pattern, dim, sizes, into: into.iter().map(|name| (*name).to_owned()).collect() }))
    }

    /// Joins tensors along a dimension, one for each pattern and in their order. What belongs together is what gives
    /// `into` the same text, with `$1` for each pattern's groups.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for fewer than two patterns, one that does not compile, or a reference to an absent group.
    pub fn concat(patterns: &[&str], dim: i64, into: &str) -> Result<Self> {
        if patterns.len() < 2 {
            return Err(Error::new(ErrorKind::Usage, "a join needs two patterns or more"));
        }
        let patterns: Vec<Regex> = patterns.iter().map(|pattern| compile(pattern)).collect::<Result<_>>()?;
        for pattern in &patterns {
            check_references(pattern, into)?;
        }
        Ok(Self(Action::Concat { patterns, dim, into: into.to_owned() }))
    }

    /// Changes the names; gives how many it matched. Dropped names are added to `dropped`.
    pub(super) fn apply_to(&self, named: &mut Vec<Named>, dropped: &mut Vec<String>) -> Result<usize> {
        match &self.0 {
            Action::Rename { pattern, to } => Ok(rename(named, |name| {
                // An owned result means that there was a match.
                match pattern.replace_all(name, to.as_str()) {
                    std::borrow::Cow::Owned(new) => Some(new),
                    std::borrow::Cow::Borrowed(_) => None,
                }
            })),
            Action::StripPrefix(prefix) => {
                Ok(rename(named, |name| name.strip_prefix(prefix.as_str()).map(str::to_owned)))
            }
            Action::AddPrefix(prefix) => Ok(rename(named, |name| Some(format!("{prefix}{name}")))),
            Action::Select(pattern) => Ok(retain(named, dropped, |name| pattern.is_match(name)).0),
            Action::Drop(pattern) => Ok(retain(named, dropped, |name| !pattern.is_match(name)).1),
            Action::Renumber { pattern, except } => Ok(renumber(named, pattern.as_ref(), except)),
            Action::Change { pattern, step } => {
                let matching = named.iter_mut().filter(|named| pattern.is_match(&named.name));
                Ok(matching.map(|named| named.recipe.0.push(step.clone())).count())
            }
            Action::Split { pattern, dim, sizes, into } => Ok(split(named, pattern, *dim, sizes, into)),
            Action::Concat { patterns, dim, into } => concat(named, patterns, *dim, into),
        }
    }
}

/// As a report names it: a renaming by its pattern alone.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Action::Rename { pattern, .. } => write!(f, "{pattern}"),
            Action::StripPrefix(prefix) => write!(f, "strip_prefix {prefix}"),
            Action::AddPrefix(prefix) => write!(f, "add_prefix {prefix}"),
            Action::Select(pattern) => write!(f, "select {pattern}"),
            Action::Drop(pattern) => write!(f, "drop {pattern}"),
            Action::Renumber { pattern: Some(pattern), .. } => write!(f, "renumber {pattern}"),
            Action::Renumber { pattern: None, .. } => f.write_str("renumber"),
            Action::Change { pattern, step } => write!(f, "{pattern}: {step}"),
            Action::Split { pattern, into, .. } => write!(f, "{pattern}: split into {}", into.join(", ")),
            Action::Concat { into, .. } => write!(f, "concat into {into}"),
        }
    }
}

fn check_references(pattern: &Regex, replacement: &str) -> Result<()> {
    let reference = REFERENCE.as_ref().map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?;
    for found in reference.captures_iter(replacement) {
        let Some(group) = found.get(2).or_else(|| found.get(3)) else { continue };
        let exists = match group.as_str().parse::<usize>() {
            Ok(number) => number < pattern.captures_len(),
            Err(_) => pattern.capture_names().flatten().any(|name| name == group.as_str()),
        };
        if !exists {
            let what = format!("replacement {replacement:?} uses group {:?}, which {pattern} lacks", group.as_str());
            return Err(Error::new(ErrorKind::Usage, what).with_hint("write ${1} where text follows the number"));
        }
    }
    Ok(())
}

/// Gives new names where `new` has one; counts them.
fn rename(named: &mut [Named], new: impl Fn(&str) -> Option<String>) -> usize {
    let mut count = 0;
    for tensor in named {
        if let Some(name) = new(&tensor.name) {
            tensor.name = name;
            count += 1;
        }
    }
    count
}

/// Counts what was kept and what was dropped.
fn retain(named: &mut Vec<Named>, dropped: &mut Vec<String>, keep: impl Fn(&str) -> bool) -> (usize, usize) {
    let before = dropped.len();
    named.retain_mut(|tensor| {
        let kept = keep(&tensor.name);
        if !kept {
            dropped.push(std::mem::take(&mut tensor.name));
        }
        kept
    });
    (named.len(), dropped.len() - before)
}

/// Replaces the match by a template; groups as in a replacement.
fn expand(captures: &Captures<'_>, template: &str) -> String {
    let mut name = String::new();
    captures.expand(template, &mut name);
    name
}

fn split(named: &mut Vec<Named>, pattern: &Regex, dim: i64, sizes: &Sizes, into: &[String]) -> usize {
    let mut count = 0;
    let mut after = Vec::with_capacity(named.len());
    for tensor in named.drain(..) {
        let Some(captures) = pattern.captures(&tensor.name) else {
            after.push(tensor);
            continue;
        };
        count += 1;
        let mut start = 0;
        for (number, template) in into.iter().enumerate() {
            let step = match sizes {
                Sizes::Equal => Step::Chunk { dim, index: number as u64, of: into.len() as u64 },
                Sizes::Given(sizes) => {
                    let length = sizes.get(number).copied().unwrap_or(0);
                    let step = Step::Slice { dim, start, length };
                    start = start.saturating_add(length);
                    step
                }
            };
            let mut recipe = tensor.recipe.clone();
            recipe.0.push(step);
            after.push(Named { name: expand(&captures, template), recipe });
        }
    }
    *named = after;
    count
}

/// Joins groups of tensors; each takes the place of its first part.
fn concat(named: &mut Vec<Named>, patterns: &[Regex], dim: i64, into: &str) -> Result<usize> {
    let mut groups: IndexMap<String, Vec<Option<usize>>> = IndexMap::new();
    for (number, tensor) in named.iter().enumerate() {
        for (place, pattern) in patterns.iter().enumerate() {
            let Some(captures) = pattern.captures(&tensor.name) else { continue };
            let target = expand(&captures, into);
            let parts = groups.entry(target.clone()).or_insert_with(|| vec![None; patterns.len()]);
            if let Some(other) = parts.get_mut(place).and_then(|part| part.replace(number)) {
                let other = named.get(other).map_or("", |other| &other.name);
                let what = format!("{other:?} and {:?} are both the part that {pattern} matches", tensor.name);
                return Err(Error::new(ErrorKind::KeyCollision, what).of_key(target));
            }
        }
    }
    let mut joined: HashMap<usize, Named> = HashMap::new();
    let mut taken = BTreeSet::new();
    for (name, parts) in groups {
        let mut recipe = Recipe(Vec::new());
        for (part, pattern) in parts.iter().zip(patterns) {
            let Some(tensor) = part.and_then(|part| named.get(part)) else {
                let what = format!("no name that {pattern} matches, so a part is missing");
                return Err(Error::new(ErrorKind::NotFound, what).of_key(name));
            };
            recipe.0.extend(tensor.recipe.0.iter().cloned());
        }
        recipe.0.push(Step::Concat { dim, count: patterns.len() });
        let parts: BTreeSet<usize> = parts.into_iter().flatten().collect();
        let first = parts.first().copied().unwrap_or(0);
        if let Some(part) = parts.iter().find(|part| taken.contains(*part)) {
            let part = named.get(*part).map_or("", |part| &part.name);
            return Err(Error::new(ErrorKind::KeyCollision, format!("{part:?} is a part of two joins")).of_key(name));
        }
        taken.extend(parts);
        joined.insert(first, Named { name, recipe });
    }
    let before = std::mem::take(named).into_iter().enumerate();
    *named = before
        .filter_map(|(number, tensor)| joined.remove(&number).or_else(|| (!taken.contains(&number)).then_some(tensor)))
        .collect();
    Ok(taken.len())
}

/// Closes gaps in the indexes of names, from the first index of a name to its last.
fn renumber(named: &mut [Named], pattern: Option<&Regex>, except: &[Regex]) -> usize {
    let takes_part = |name: &str| !except.iter().any(|except| except.is_match(name));
    // By the text before an index, the indexes that occur.
    let mut found: HashMap<&str, BTreeSet<u64>> = HashMap::new();
    for tensor in named.iter().filter(|tensor| takes_part(&tensor.name)) {
        for (start, index) in indexes(&tensor.name, pattern) {
            found.entry(&tensor.name[..start]).or_default().insert(index);
        }
    }
    let place: HashMap<(&str, u64), usize> = found
        .iter()
        .flat_map(|(before, indexes)| indexes.iter().enumerate().map(|(place, index)| ((*before, *index), place)))
        .collect();
    let renumbered: Vec<Option<String>> = named
        .iter()
        .map(|tensor| {
            let places = indexes(&tensor.name, pattern);
            if places.is_empty() || !takes_part(&tensor.name) {
                return None;
            }
            let (mut new, mut end) = (String::new(), 0);
            for (start, index) in places {
                new.push_str(&tensor.name[end..start]);
                new.push_str(&place.get(&(&tensor.name[..start], index)).map_or_else(String::new, usize::to_string));
                end = start + tensor.name[start..].bytes().take_while(u8::is_ascii_digit).count();
            }
            new.push_str(&tensor.name[end..]);
            Some(new)
        })
        .collect();
    let mut count = 0;
    for (tensor, new) in named.iter_mut().zip(renumbered) {
        if let Some(new) = new {
            count += 1;
            tensor.name = new;
        }
    }
    count
}

/// Where the indexes of a name begin, and the indexes: numbers without leading zeros.
fn indexes(name: &str, pattern: Option<&Regex>) -> Vec<(usize, u64)> {
    let number = |text: &str| text.parse::<u64>().ok().filter(|number| number.to_string() == text);
    if let Some(pattern) = pattern {
        let groups = pattern.captures_iter(name).filter_map(|captures| captures.get(1));
        return groups.filter_map(|group| Some((group.start(), number(group.as_str())?))).collect();
    }
    let mut at = 0;
    let mut found = Vec::new();
    for part in name.split('.') {
        found.extend(number(part).map(|index| (at, index)));
        at += part.len() + 1;
    }
    found
}
