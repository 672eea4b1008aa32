//! From the keys of a checkpoint to the names a target uses: a selection, then ordered rules.
//!
//! Patterns are Rust `regex`, so matching takes time linear in the key. Two keys on one name are an error. Rules rename,
//! drop, or make tensors of others; nothing here knows a tensor: the result is a name and a recipe for each.

mod rule;
mod text;

use std::path::Path;

use indexmap::IndexMap;
use regex::Regex;
use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::recipe::Recipe;
use rule::Named;
pub use rule::{Rule, Sizes};

/// A selection of keys, and the rules that rename them and make tensors of them.
///
/// A key map is also a TOML file; [`from_toml`](Self::from_toml) says what it holds.
#[derive(Clone, Debug, Default)]
pub struct KeyMap {
    top_level_key: Option<String>,
    select: Vec<Pattern>,
    drop: Vec<Pattern>,
    rules: Vec<Rule>,
}

/// What picks keys: a regex, or a whole key.
#[derive(Clone, Debug)]
enum Pattern {
    Regex(Regex),
    Key(String),
}

impl Pattern {
    fn is_match(&self, key: &str) -> bool {
        match self {
            Self::Regex(regex) => regex.is_match(key),
            Self::Key(exact) => key == exact,
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Regex(regex) => regex.as_str(),
            Self::Key(exact) => exact,
        }
    }
}

impl KeyMap {
    /// Keeps every key as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a key map from a TOML file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; as [`from_toml`](Self::from_toml).
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", error).in_file(path))?;
        Self::from_toml(&text).map_err(|error| error.in_file(path))
    }

    /// Reads a key map from TOML text.
    ///
    /// `top_level_key`, `select` and `drop` (regexes), `select_keys` and `drop_keys` (whole keys) see the keys of the
    /// file. Then `[[rules]]` apply in order, each to the names that the one before left. A rule is one of
    ///
    /// | rule | does |
    /// |---|---|
    /// | `rename = 'RE'`, `to = '$1'` | replaces every match in a name |
    /// | `strip_prefix = 'module.'`, `add_prefix = 'net.'` | takes literal text off the front, puts it there |
    /// | `select = 'RE'`, `drop = 'RE'` | keeps or drops names that match |
    /// | `renumber = true` or `'RE'` with one group, `except = ['RE']` | closes gaps in indexes: 0, 2, 5 become 0, 1, 2 |
    /// | `match = 'RE'`, `permute = [1, 0]` | changes the order of dimensions; `transpose = [0, 1]` swaps two |
    /// | `match = 'RE'`, `reshape = [8, -1]` | gives another shape to the same elements in row-major order |
    /// | `match = 'RE'`, `cast = 'bfloat16'` | converts to another dtype, rounding to nearest even |
    /// | `match = 'RE'`, `split = ['$1.q', '$1.k', '$1.v']`, `dim = 0` | cuts into equal parts, or by `sizes = [..]` |
    /// | `concat = ['RE', 'RE']`, `into = '$1.qk'`, `dim = 0` | joins what the patterns match, by the name they all give |
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for text that is no TOML, an unknown or missing field, a pattern that does not compile or a
    /// reference to a group that its pattern lacks.
    ///
    /// # Examples
    /// ```
    /// let keys = reweft::KeyMap::from_toml(r#"
    ///     drop = ['\.num_batches_tracked$']
    ///     [[rules]]
    ///     strip_prefix = "module."
    ///     [[rules]]
    ///     match = '(.*)\.in_proj_weight$'
    ///     split = ['$1.q.weight', '$1.k.weight', '$1.v.weight']
    /// "#)?;
    /// let mapped = keys.apply(["module.attn.in_proj_weight"])?;
    /// assert_eq!(mapped.tensors["attn.k.weight"].to_string(), "module.attn.in_proj_weight | part 1 of 3 along 0");
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn from_toml(text: &str) -> Result<Self> {
        text::from_toml(text)
    }

    /// Reads a key map from JSON with the fields of [`from_toml`](Self::from_toml).
    ///
    /// # Errors
    /// As there.
    pub fn from_json(text: &str) -> Result<Self> {
        text::from_json(text)
    }

    /// Names the container in the file that holds the weights, for whoever opens the checkpoint.
    #[must_use]
    pub fn with_top_level_key(mut self, key: impl Into<String>) -> Self {
        self.top_level_key = Some(key.into());
        self
    }

    /// The container that holds the weights, if the key map names one.
    pub fn top_level_key(&self) -> Option<&str> {
        self.top_level_key.as_deref()
    }

    /// Keeps only keys that match this or another selected pattern. Patterns see keys before any rule and may match
    /// anywhere in them; `^` and `$` anchor.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile.
    pub fn select(mut self, pattern: &str) -> Result<Self> {
        self.select.push(Pattern::Regex(compile(pattern)?));
        Ok(self)
    }

    /// Keeps this key, and others that are selected.
    #[must_use]
    pub fn select_key(mut self, key: &str) -> Self {
        self.select.push(Pattern::Key(key.to_owned()));
        self
    }

    /// Drops keys that match, selected or not. Patterns see keys before any rule.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile.
    pub fn drop(mut self, pattern: &str) -> Result<Self> {
        self.drop.push(Pattern::Regex(compile(pattern)?));
        Ok(self)
    }

    /// Drops this key.
    #[must_use]
    pub fn drop_key(mut self, key: &str) -> Self {
        self.drop.push(Pattern::Key(key.to_owned()));
        self
    }

    /// Adds a rule; rules apply in order, each to the result of the one before.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Whether every key stays as it is.
    pub fn is_identity(&self) -> bool {
        self.select.is_empty() && self.drop.is_empty() && self.rules.is_empty() && self.top_level_key.is_none()
    }

    /// Maps keys to names and recipes, in the order of the keys.
    ///
    /// # Errors
    /// [`ErrorKind::KeyCollision`] naming both recipes if two get one name, [`ErrorKind::NotFound`] if a selection
    /// matches no key or a key that is named does not exist, [`ErrorKind::Usage`] if a rule leaves nothing of a name or
    /// a join lacks a part.
    ///
    /// # Examples
    /// ```
    /// use reweft::{KeyMap, Rule};
    ///
    /// let keys = KeyMap::new().select("^model")?.rule(Rule::new(r"^model\.", "")?);
    /// let mapped = keys.apply(["model.fc.weight", "optimizer.step"])?;
    /// assert_eq!(mapped.tensors["fc.weight"].plain_key(), Some("model.fc.weight"));
    /// assert_eq!(mapped.dropped, ["optimizer.step"]);
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn apply<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> Result<Mapped> {
        let keys: Vec<&str> = keys.into_iter().collect();
        let mut mapped = Mapped::default();
        let mut named = self.pick(&keys, &mut mapped)?;
        for rule in &self.rules {
            let count = rule.apply_to(&mut named, &mut mapped.dropped)?;
            mapped.rules.push((rule.to_string(), count));
        }
        mapped.idle_rules.extend(mapped.rules.iter().filter(|(_, count)| *count == 0).map(|(text, _)| text.clone()));
        mapped.tensors.reserve(named.len());
        for Named { name, recipe } in named {
            // The file itself may have an empty key.
            if name.is_empty() && recipe.plain_key() != Some("") {
                let error = Error::new(ErrorKind::Usage, "the rules leave nothing of this key");
                return Err(error.of_key(recipe.keys().next().unwrap_or_default()));
            }
            if let Some(other) = mapped.tensors.get(&name) {
                let what = format!("{} and {} both become this name", quoted(other), quoted(&recipe));
                return Err(Error::new(ErrorKind::KeyCollision, what)
                    .of_key(name)
                    .with_hint("make the rules tell the two apart, or select one"));
            }
            mapped.tensors.insert(name, recipe);
        }
        Ok(mapped)
    }

    /// The selected keys under their own names.
    fn pick(&self, keys: &[&str], mapped: &mut Mapped) -> Result<Vec<Named>> {
        let mut selected = vec![false; self.select.len()];
        let mut excluded = vec![false; self.drop.len()];
        let mut named = Vec::with_capacity(keys.len());
        for key in keys {
            let keep = self.select.is_empty() | any_match(&self.select, key, &mut selected);
            if keep && !any_match(&self.drop, key, &mut excluded) {
                named.push(Named { name: (*key).to_owned(), recipe: Recipe::leaf(key) });
            } else {
                mapped.dropped.push((*key).to_owned());
            }
        }
        let absent = |pattern: &Pattern, doing: &str| {
            let what = format!("{doing} {:?} matches no key", pattern.text());
            let hint = match pattern {
                Pattern::Key(key) => suggest(key, keys.iter().copied()),
                Pattern::Regex(_) => "it sees keys before any remap; `reweft inspect` lists them".to_owned(),
            };
            Error::new(ErrorKind::NotFound, what).with_hint(hint)
        };
        if let Some(pattern) = unseen(&self.select, &selected).next() {
            return Err(absent(pattern, "selection"));
        }
        // Of keys that are not selected there is nothing to drop, so that is no typing error.
        let idle = unseen(&self.drop, &excluded);
        for pattern in idle.filter(|pattern| !keys.iter().any(|key| pattern.is_match(key))) {
            match pattern {
                Pattern::Key(_) => return Err(absent(pattern, "drop of")),
                Pattern::Regex(regex) => mapped.idle_rules.push(format!("drop {regex}")),
            }
        }
        Ok(named)
    }
}

/// Notes every pattern that matches, and says whether one does.
fn any_match(patterns: &[Pattern], key: &str, seen: &mut [bool]) -> bool {
    let mut any = false;
    for (pattern, seen) in patterns.iter().zip(seen) {
        let matches = pattern.is_match(key);
        *seen |= matches;
        any |= matches;
    }
    any
}

fn unseen<'a, T>(all: &'a [T], seen: &'a [bool]) -> impl Iterator<Item = &'a T> {
    all.iter().zip(seen).filter(|(_, seen)| !**seen).map(|(item, _)| item)
}

fn quoted(recipe: &Recipe) -> String {
    recipe.plain_key().map_or_else(|| format!("{:?}", recipe.to_string()), |key| format!("{key:?}"))
}

/// What a [`KeyMap`] did to a list of keys.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Mapped {
    /// Recipe by name, in the order of the keys; a plain one is the key that has this name now.
    pub tensors: IndexMap<String, Recipe>,
    /// Keys that were not selected, or dropped by a rule; names of the moment for the latter.
    pub dropped: Vec<String>,
    /// Every rule as text, and how many names it matched.
    pub rules: Vec<(String, usize)>,
    /// Rules that matched nothing; often a typing error, so reports show them.
    pub idle_rules: Vec<String>,
}

impl Mapped {
    /// Key and name of tensors that only have another name now.
    pub fn renamed(&self) -> impl Iterator<Item = (&str, &str)> {
        let plain = self.tensors.iter().filter_map(|(name, recipe)| Some((recipe.plain_key()?, name.as_str())));
        plain.filter(|(key, name)| key != name)
    }

    /// Name and recipe of tensors that operations made.
    pub fn made(&self) -> impl Iterator<Item = (&str, &Recipe)> {
        let all = self.tensors.iter().map(|(name, recipe)| (name.as_str(), recipe));
        all.filter(|(_, recipe)| recipe.plain_key().is_none())
    }

    /// What lacks and what is left over of the names that a target wants.
    pub fn compare<'a>(&'a self, wanted: impl IntoIterator<Item = &'a str>) -> Comparison<'a> {
        let wanted: indexmap::IndexSet<&str> = wanted.into_iter().collect();
        Comparison {
            missing: wanted.iter().copied().filter(|name| !self.tensors.contains_key(*name)).collect(),
            unused: self.tensors.keys().map(String::as_str).filter(|name| !wanted.contains(name)).collect(),
        }
    }
}

/// Names of a target beside names of a key map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison<'a> {
    /// Wanted, and not there.
    pub missing: Vec<&'a str>,
    /// There, and not wanted.
    pub unused: Vec<&'a str>,
}

pub(crate) fn compile(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|error| Error::new(ErrorKind::Usage, format!("pattern {pattern:?}: {error}")))
}

/// A hint for a name that does not exist: the nearest of those that do, by Jaro-Winkler similarity.
pub(crate) fn suggest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    /// Below this, a suggestion confuses more than it helps.
    const LEAST: f64 = 0.75;
    let best = names
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .filter(|(score, _)| *score >= LEAST)
        .max_by(|left, right| left.0.total_cmp(&right.0));
    match best {
        Some((_, name)) => format!("did you mean {name:?}?"),
        None => "`reweft inspect` lists the keys".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(rules: &[(&str, &str)]) -> KeyMap {
        rules.iter().fold(KeyMap::new(), |map, (from, to)| map.rule(Rule::new(from, to).unwrap()))
    }

    #[test]
    fn rules_apply_in_order_to_the_result_before() {
        let keys = rules(&[("^a", "b"), ("^b", "c")]);
        assert_eq!(keys.apply(["a.x"]).unwrap().tensors["c.x"].plain_key(), Some("a.x"));
    }

    #[test]
    fn collision_names_both_keys() {
        let error = rules(&[(r"^(a|b)\.", "")]).apply(["a.x", "b.x"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::KeyCollision);
        assert!(error.to_string().contains("\"a.x\" and \"b.x\""), "{error}");
    }

    #[test]
    fn replacement_that_names_an_absent_group_is_refused() {
        assert!(Rule::new(r"^(\w+)\.", "$1_x").unwrap_err().hint().unwrap().contains("${1}"));
        assert!(Rule::new(r"^(\w+)\.", "$2").is_err());
        assert!(Rule::new(r"^(\w+)\.", "${1}_x $$2").is_ok());
        assert!(Rule::new(r"^(?P<head>\w+)\.", "$head").is_ok());
    }

    #[test]
    fn selection_that_matches_nothing_is_an_error_and_an_idle_rule_is_reported() {
        let keys = KeyMap::new().select("^nope").unwrap();
        assert_eq!(keys.apply(["a"]).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(rules(&[("^zzz", "")]).apply(["a"]).unwrap().idle_rules, ["^zzz"]);
    }

    #[test]
    fn empty_name_and_bad_patterns_are_errors() {
        assert!(rules(&[("^a$", "")]).apply(["a"]).is_err());
        assert!(Rule::parse("nothing").is_err());
        assert!(Rule::parse("(=x").is_err());
        let keys = KeyMap::new().rule(Rule::parse("a=b=c").unwrap());
        assert!(keys.apply(["a=b"]).unwrap().tensors.contains_key("c"));
    }

    #[test]
    fn suggestions() {
        assert_eq!(suggest("fc.wieght", ["fc.weight", "bias"].into_iter()), "did you mean \"fc.weight\"?");
    }
}
