//! Findings: what a plan has to say, as data and as one line of text.

use std::fmt;

use serde::Serialize;

use crate::artifact::Slot;
use crate::tensor::{TensorInfo, describe};

const TRACE_AGAIN: &str = "trace the module again without that option for a package that takes other weights";

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FindingKind {
    /// A slot for which the checkpoint has no key.
    Missing,
    /// A key for which the artifact has no slot.
    Unused,
    /// A key whose tensor the compiled program never reads.
    NotRead,
    /// A key that has no slot of its own because it has the bytes of another, which has.
    Alias,
    /// A key whose tensor the compiler put into the code.
    Baked,
    /// A slot whose bytes are not simply a tensor's, or cannot be reached.
    Unrefittable,
    /// A key whose tensor this version cannot read.
    Unreadable,
    /// Shapes differ.
    Shape,
    /// Dtypes differ.
    Dtype,
    /// Names of one slot with different values.
    Tied,
    /// A package that takes no new weights.
    Immutable,
    /// A key whose bytes are not the slot's, for a package that takes no others.
    Identical,
    /// Bytes of slot and key differ; only `verify` looks.
    Value,
}

/// One thing to know before a refit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The class of finding.
    pub kind: FindingKind,
    /// Whether it stops a refit.
    pub blocking: bool,
    /// Name of the slot, if it is about one.
    pub slot: Option<String>,
    /// The key, if it is about one.
    pub key: Option<String>,
    /// What it says.
    pub what: String,
    /// Dtype and shape in the checkpoint, or what else is not as it should be.
    pub found: Option<String>,
    /// Dtype and shape of the slot, or what else there should be.
    pub wanted: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Finding {
    pub(super) fn new(kind: FindingKind, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { kind, blocking: true, slot: None, key: None, what, found: None, wanted: None, hint: None }
    }

    /// A package that takes no new weights, and how many slots were to be filled.
    pub(super) fn immutable(first: &Slot, count: usize) -> Self {
        let what = "the package was traced with immutable_weights, so its weights cannot be replaced";
        let (found, wanted) = (Some(format!("keys for {count} slots")), Some("none".to_owned()));
        Self { found, wanted, ..Self::new(FindingKind::Immutable, what) }.slot(first).hint(TRACE_AGAIN)
    }

    /// A key whose bytes are not those that the package states, by their hashes.
    pub(super) fn not_identical(slot: &Slot, key: &str, found: String, wanted: String) -> Self {
        let what = "the bytes differ, and the package was traced with identical_weights, so it takes no others";
        let finding = Self::new(FindingKind::Identical, what).slot(slot).key(key).hint(TRACE_AGAIN);
        Self { found: Some(found), wanted: Some(wanted), ..finding }
    }

    /// Whether it says what the package allows, and nothing of the bytes.
    pub(crate) fn is_rule(&self) -> bool {
        matches!(self.kind, FindingKind::Immutable | FindingKind::Identical)
    }

    /// Bytes that are not what they should be; made by `verify`.
    pub(crate) fn value(slot: &Slot, what: impl Into<String>) -> Self {
        Self::new(FindingKind::Value, what).slot(slot)
    }

    pub(super) fn slot(mut self, slot: &Slot) -> Self {
        self.slot = Some(slot.name.clone());
        self
    }

    pub(super) fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    pub(super) fn found(mut self, info: &TensorInfo) -> Self {
        self.found = Some(describe(info.dtype, &info.shape));
        self
    }

    pub(super) fn wanted(mut self, slot: &Slot) -> Self {
        self.wanted = Some(describe(slot.dtype, &slot.shape));
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Turns the finding into a notice.
    pub(super) fn allowed(mut self, why: &str) -> Self {
        self.blocking = false;
        self.what = format!("{}; {why}", self.what);
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.slot, &self.key) {
            (Some(slot), Some(key)) if slot != key => write!(f, "slot {slot:?}, key {key:?}: ")?,
            (Some(slot), _) => write!(f, "slot {slot:?}: ")?,
            (None, Some(key)) => write!(f, "key {key:?}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.what)?;
        if let Some(found) = &self.found {
            write!(f, ", found {found}")?;
        }
        if let Some(wanted) = &self.wanted {
            write!(f, ", wanted {wanted}")?;
        }
        Ok(())
    }
}
