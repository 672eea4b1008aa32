//! From the keys of a checkpoint to the names a target uses: a selection, then ordered regex rules.
//!
//! Patterns are Rust `regex`, so matching takes time linear in the key. Two keys on one name are an error.

use std::sync::LazyLock;

use indexmap::IndexMap;
use regex::Regex;
use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};

/// `$name`, `${name}` or `$$` in a replacement, split as the regex crate splits it.
static REFERENCE: LazyLock<Result<Regex, regex::Error>> =
    LazyLock::new(|| Regex::new(r"\$(?:(\$)|\{([^}]*)\}|([0-9A-Za-z_]+))"));

/// One step of renaming: every match of `pattern` in a key becomes `replacement`.
#[derive(Clone, Debug)]
pub struct Rule {
    pattern: Regex,
    replacement: String,
}

impl Rule {
    /// Compiles a rule. `replacement` uses `$1`, `${1}` and `${name}` for groups and `$$` for a dollar sign.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile, or a replacement that names a group the pattern does
    /// not have: the regex crate would put nothing in its place, and `$1_x` means the group `1_x`.
    pub fn new(pattern: &str, replacement: &str) -> Result<Self> {
        let pattern = compile(pattern)?;
        let reference = REFERENCE.as_ref().map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?;
        for found in reference.captures_iter(replacement) {
            let Some(group) = found.get(2).or_else(|| found.get(3)) else { continue };
            let exists = match group.as_str().parse::<usize>() {
                Ok(number) => number < pattern.captures_len(),
                Err(_) => pattern.capture_names().flatten().any(|name| name == group.as_str()),
            };
            if !exists {
                let what =
                    format!("replacement {replacement:?} uses group {:?}, which {pattern} lacks", group.as_str());
                return Err(Error::new(ErrorKind::Usage, what).with_hint("write ${1} where text follows the number"));
            }
        }
        Ok(Self { pattern, replacement: replacement.to_owned() })
    }

    /// Parses `REGEX=REPLACEMENT`, split at the last `=`: names hold no `=`, patterns may.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`ErrorKind::Usage`] if there is no `=`.
    ///
    /// # Examples
    /// ```
    /// let rule = reweft::Rule::parse(r"^module\.(.*)$=$1")?;
    /// assert_eq!(rule.apply("module.fc.weight"), "fc.weight");
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn parse(text: &str) -> Result<Self> {
        let Some((pattern, replacement)) = text.rsplit_once('=') else {
            return Err(Error::new(ErrorKind::Usage, format!("{text:?} is not of the form REGEX=REPLACEMENT"))
                .with_hint(r"for example '^module\.(.*)$=$1'"));
        };
        Self::new(pattern, replacement)
    }

    /// Renames one key; a key without a match stays as it is.
    pub fn apply(&self, key: &str) -> String {
        self.pattern.replace_all(key, self.replacement.as_str()).into_owned()
    }
}

/// A selection of keys and the rules that rename them.
#[derive(Clone, Debug, Default)]
pub struct KeyMap {
    select: Vec<Regex>,
    rules: Vec<Rule>,
}

impl KeyMap {
    /// Keeps every key as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps only keys that match this or another selected pattern. Patterns see keys before any rule and may match
    /// anywhere in them; `^` and `$` anchor.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a pattern that does not compile.
    pub fn select(mut self, pattern: &str) -> Result<Self> {
        self.select.push(compile(pattern)?);
        Ok(self)
    }

    /// Adds a rule; rules apply in order, each to the result of the one before.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Whether every key is kept as it is.
    pub fn is_identity(&self) -> bool {
        self.select.is_empty() && self.rules.is_empty()
    }

    /// Maps keys to names, in the order of the keys.
    ///
    /// # Errors
    /// [`ErrorKind::KeyCollision`] naming both keys if two get one name, [`ErrorKind::NotFound`] if a selection matches
    /// no key, [`ErrorKind::Usage`] if a rule leaves nothing of a key.
    ///
    /// # Examples
    /// ```
    /// use reweft::{KeyMap, Rule};
    ///
    /// let keys = KeyMap::new().select("^model")?.rule(Rule::new(r"^model\.", "")?);
    /// let mapped = keys.apply(["model.fc.weight", "optimizer.step"])?;
    /// assert_eq!(mapped.names["model.fc.weight"], "fc.weight");
    /// assert_eq!(mapped.dropped, ["optimizer.step"]);
    /// # Ok::<(), reweft::Error>(())
    /// ```
    pub fn apply<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> Result<Mapped> {
        let mut mapped = Mapped::default();
        let mut owners: IndexMap<String, String> = IndexMap::new();
        let mut selected = vec![false; self.select.len()];
        let mut matched = vec![false; self.rules.len()];
        for key in keys {
            if !self.is_selected(key, &mut selected) {
                mapped.dropped.push(key.to_owned());
                continue;
            }
            let name = self.rename(key, &mut matched)?;
            if let Some(other) = owners.insert(name.clone(), key.to_owned()) {
                return Err(Error::new(
                    ErrorKind::KeyCollision,
                    format!("{other:?} and {key:?} both become this name"),
                )
                .of_key(name)
                .with_hint("make the rules tell the two apart, or select one"));
            }
            mapped.names.insert(key.to_owned(), name);
        }
        if let Some(pattern) = unused(&self.select, &selected).next() {
            return Err(Error::new(ErrorKind::NotFound, format!("selection {:?} matches no key", pattern.as_str())));
        }
        mapped.idle_rules = unused(&self.rules, &matched).map(|rule| rule.pattern.to_string()).collect();
        Ok(mapped)
    }

    fn is_selected(&self, key: &str, selected: &mut [bool]) -> bool {
        let mut any = self.select.is_empty();
        for (pattern, seen) in self.select.iter().zip(selected) {
            let matches = pattern.is_match(key);
            *seen |= matches;
            any |= matches;
        }
        any
    }

    fn rename(&self, key: &str, matched: &mut [bool]) -> Result<String> {
        let mut name = key.to_owned();
        for (rule, seen) in self.rules.iter().zip(matched) {
            if rule.pattern.is_match(&name) {
                *seen = true;
                name = rule.apply(&name);
            }
        }
        if name.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "the rules leave nothing of this key").of_key(key));
        }
        Ok(name)
    }
}

/// What a [`KeyMap`] did to a list of keys.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Mapped {
    /// Name by key, for every selected key, in the order of the keys.
    pub names: IndexMap<String, String>,
    /// Keys that no selection matched.
    pub dropped: Vec<String>,
    /// Patterns of rules that matched nothing; often a typing error, so reports show them.
    pub idle_rules: Vec<String>,
}

fn unused<'a, T>(all: &'a [T], seen: &'a [bool]) -> impl Iterator<Item = &'a T> {
    all.iter().zip(seen).filter(|(_, seen)| !**seen).map(|(item, _)| item)
}

fn compile(pattern: &str) -> Result<Regex> {
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
        assert_eq!(keys.apply(["a.x"]).unwrap().names["a.x"], "c.x");
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
        assert_eq!(Rule::parse("a=b=c").unwrap().apply("a=b"), "c");
    }

    #[test]
    fn suggestions() {
        assert_eq!(suggest("fc.wieght", ["fc.weight", "bias"].into_iter()), "did you mean \"fc.weight\"?");
    }
}
