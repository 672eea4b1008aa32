//! Key maps as TOML or JSON.

use serde::Deserialize;

use super::{KeyMap, Rule, Sizes};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::recipe::Step;

pub(super) fn from_toml(text: &str) -> Result<KeyMap> {
    let parsed: KeyMapText = toml::from_str(text).map_err(|error| malformed(&error.to_string()))?;
    parsed.build()
}

pub(super) fn from_json(text: &str) -> Result<KeyMap> {
    let parsed: KeyMapText = serde_json::from_str(text).map_err(|error| malformed(&error.to_string()))?;
    parsed.build()
}

fn malformed(why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("key map: {}", why.trim_end()))
}

/// One text, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Default for Texts {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Texts {
    fn as_strs(&self) -> Vec<&str> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts.iter().map(String::as_str).collect(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyMapText {
    top_level_key: Option<String>,
    #[serde(default)]
    select: Texts,
    #[serde(default)]
    select_keys: Texts,
    #[serde(default)]
    drop: Texts,
    #[serde(default)]
    drop_keys: Texts,
    #[serde(default)]
    rules: Vec<RuleText>,
}

impl KeyMapText {
    fn build(self) -> Result<KeyMap> {
        let mut keys = KeyMap { top_level_key: self.top_level_key, ..KeyMap::default() };
        for pattern in self.select.as_strs() {
            keys = keys.select(pattern)?;
        }
        for pattern in self.drop.as_strs() {
            keys = keys.drop(pattern)?;
        }
        keys = self.select_keys.as_strs().into_iter().fold(keys, KeyMap::select_key);
        keys = self.drop_keys.as_strs().into_iter().fold(keys, KeyMap::drop_key);
        for (number, rule) in self.rules.into_iter().enumerate() {
            let rule = rule.build().map_err(|error| {
                let hint = error.hint().map(str::to_owned);
                let error = Error::new(error.kind(), format!("key map: rule {}: {}", number + 1, error.message()));
                match hint {
                    Some(hint) => error.with_hint(hint),
                    None => error,
                }
            })?;
            keys = keys.rule(rule);
        }
        Ok(keys)
    }
}

/// All fields that a rule can have; which of them are there says what it does.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RuleText {
    rename: Option<String>,
    to: Option<String>,
    strip_prefix: Option<String>,
    add_prefix: Option<String>,
    select: Option<String>,
    drop: Option<String>,
    renumber: Option<Renumber>,
    except: Option<Texts>,
    r#match: Option<String>,
    cast: Option<String>,
    permute: Option<Vec<i64>>,
    transpose: Option<[i64; 2]>,
    reshape: Option<Vec<i64>>,
    split: Option<Vec<String>>,
    sizes: Option<Vec<u64>>,
    concat: Option<Vec<String>>,
    into: Option<String>,
    dim: Option<i64>,
}

/// `true`, or the pattern around an index.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Renumber {
    All(bool),
    Pattern(String),
}

impl RuleText {
    /// One arm for each kind of rule: the fields that it takes, and no other.
    fn build(self) -> Result<Rule> {
        let fields = self.fields();
        match self {
            Self { rename: Some(pattern), to: Some(to), .. } => {
                only(&fields, &["rename", "to"])?;
                Rule::new(&pattern, &to)
            }
            Self { strip_prefix: Some(prefix), .. } => {
                only(&fields, &["strip_prefix"])?;
                Ok(Rule::strip_prefix(prefix))
            }
            Self { add_prefix: Some(prefix), .. } => {
                only(&fields, &["add_prefix"])?;
                Ok(Rule::add_prefix(prefix))
            }
            Self { select: Some(pattern), .. } => {
                only(&fields, &["select"])?;
                Rule::select(&pattern)
            }
            Self { drop: Some(pattern), .. } => {
                only(&fields, &["drop"])?;
                Rule::drop(&pattern)
            }
            Self { renumber: Some(renumber), except, .. } => {
                only(&fields, &["renumber", "except"])?;
                let except = except.unwrap_or_default();
                match renumber {
                    Renumber::All(true) => Rule::renumber(None, &except.as_strs()),
                    Renumber::Pattern(pattern) => Rule::renumber(Some(&pattern), &except.as_strs()),
                    Renumber::All(false) => Err(Error::new(ErrorKind::Usage, "renumber = false says nothing")),
                }
            }
            Self { concat: Some(patterns), into: Some(into), dim, .. } => {
                only(&fields, &["concat", "into", "dim"])?;
                let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
                Rule::concat(&patterns, dim.unwrap_or(0), &into)
            }
            Self { r#match: Some(pattern), split: Some(into), sizes, dim, .. } => {
                only(&fields, &["match", "split", "sizes", "dim"])?;
                let into: Vec<&str> = into.iter().map(String::as_str).collect();
                Rule::split(&pattern, dim.unwrap_or(0), sizes.map_or(Sizes::Equal, Sizes::Given), &into)
            }
            Self { r#match: Some(pattern), cast, permute, transpose, reshape, .. } => {
                let step = match (cast, permute, transpose, reshape) {
                    (Some(to), None, None, None) => Step::Cast { from: None, to: dtype(&to)? },
                    (None, Some(dims), None, None) => Step::Permute { dims },
                    (None, None, Some(dims), None) => Step::Transpose { dims },
                    (None, None, None, Some(shape)) => Step::Reshape { shape },
                    _ => return Err(no_action(&fields)),
                };
                only(&fields, &["match", "cast", "permute", "transpose", "reshape"])?;
                Rule::change(&pattern, step)
            }
            _ => Err(no_action(&fields)),
        }
    }

    /// Names of the fields that are there.
    fn fields(&self) -> Vec<&'static str> {
        let all = [
            ("rename", self.rename.is_some()),
            ("to", self.to.is_some()),
            ("strip_prefix", self.strip_prefix.is_some()),
            ("add_prefix", self.add_prefix.is_some()),
            ("select", self.select.is_some()),
            ("drop", self.drop.is_some()),
            ("renumber", self.renumber.is_some()),
            ("except", self.except.is_some()),
            ("match", self.r#match.is_some()),
            ("cast", self.cast.is_some()),
            ("permute", self.permute.is_some()),
            ("transpose", self.transpose.is_some()),
            ("reshape", self.reshape.is_some()),
            ("split", self.split.is_some()),
            ("sizes", self.sizes.is_some()),
            ("concat", self.concat.is_some()),
            ("into", self.into.is_some()),
            ("dim", self.dim.is_some()),
        ];
        all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }
}

/// Refuses fields that this kind of rule does not take: they would be ignored.
fn only(fields: &[&str], allowed: &[&str]) -> Result<()> {
    match fields.iter().find(|field| !allowed.contains(field)) {
        None => Ok(()),
        Some(field) => {
            let what = format!("{field:?} does not belong to a rule with {:?}", allowed.first().unwrap_or(&""));
            Err(Error::new(ErrorKind::Usage, what).with_hint("one rule does one thing; make two of it"))
        }
    }
}

fn no_action(fields: &[&str]) -> Error {
    Error::new(ErrorKind::Usage, format!("the fields {} are no rule", fields.join(", "))).with_hint(
        "a rule is one of: rename and to; strip_prefix; add_prefix; select; drop; renumber; match with cast, permute, \
         transpose, reshape or split; concat and into",
    )
}

fn dtype(name: &str) -> Result<Dtype> {
    Dtype::from_name(name).ok_or_else(|| Error::new(ErrorKind::Usage, format!("no dtype {name:?}")))
}
