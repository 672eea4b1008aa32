//! What a freezing compiler made of weights: the recipe of each slot whose bytes are no tensor's own.
//!
//! `trace` records the recipes; they are data from a file like any other here, so they are held against the program's rows,
//! against the tensors that they name and against limits before anybody follows them.

use serde::{Deserialize, Serialize};

use super::manifest::hash;
use super::{Slot, SlotKind};
use crate::checkpoint::infer;
use crate::convert::Packing;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::recipe::{Recipe, Step};
use crate::tensor::{contiguous, numel};

/// Steps of one recipe. Those that compilers make have tens.
const MAX_STEPS: usize = 1000;
/// Bytes that following a recipe may make, for each byte of its tensors and of its slot.
const MAX_EXPANSION: u64 = 64;

/// A tensor as the program sees it where its bytes are packed for oneDNN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// oneDNN's memory descriptor, as the program states it.
    pub descriptor: Vec<u8>,
    /// What it says.
    pub packing: Packing,
}

/// What the manifest of a frozen package states of its weights as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Folded {
    /// Which of its vector functions torch used when it folded: `AVX512`.
    pub capability: String,
    /// Whether the code was generated a second time, from other weights, and was the same.
    pub compared: bool,
    /// The tensors that recipes name and that no slot holds as they are.
    pub originals: Vec<Original>,
    /// Hash of the originals and of all recipes, so that an edit of one is noticed.
    pub digest: String,
}

/// A tensor of the module that went into slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Original {
    /// Every name it has in the module, in registration order.
    pub names: Vec<String>,
    /// Whether a state_dict has it.
    pub persistent: bool,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// The hash of its bytes in row-major order, if it is a part of the program: no state_dict has it, so rows were made
    /// with the value that it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<String>,
}

impl Original {
    /// The tensor in the form that plans match keys with. It has no bytes here.
    fn as_slot(&self) -> Result<Slot> {
        let nbytes = numel(&self.shape).and_then(|numel| self.dtype.nbytes(numel));
        let (Some(nbytes), Some((name, aliases))) = (nbytes, self.names.split_first()) else {
            return Err(Error::format("a tensor of the module has no name, or 2^64 bytes"));
        };
        Ok(Slot {
            name: name.clone(),
            aliases: aliases.to_vec(),
            constant: String::new(),
            kind: SlotKind::Tensor,
            persistent: self.persistent,
            mutated: false,
            dtype: self.dtype,
            shape: self.shape.clone(),
            strides: contiguous(&self.shape),
            region: None,
            byte_offset: 0,
            nbytes,
            row_nbytes: nbytes,
            copies: Vec::new(),
            hash: self.fixed.clone(),
            blocked: None,
            stripped: false,
            recipe: None,
            packed: None,
        })
    }
}

/// The hash of everything that says how slots are made.
pub(super) fn digest<'a>(
    originals: &[Original],
    recipes: impl Iterator<Item = (&'a str, &'a Recipe)>,
) -> Result<String> {
    let all: (&[Original], Vec<_>) = (originals, recipes.collect());
    let bytes = serde_json::to_vec(&all).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?;
    Ok(hash(&bytes))
}

/// The tensors that went into slots, after all recipes were held against them and against the slots that they make.
///
/// # Errors
/// [`ErrorKind::Format`] for a recipe that makes something else, or too much; [`ErrorKind::Usage`] for steps that do not
/// fit their tensors.
pub(super) fn originals(folded: &Folded, slots: &mut [Slot]) -> Result<Vec<Slot>> {
    let found = folded.originals.iter().map(Original::as_slot).collect::<Result<Vec<_>>>()?;
    let recipes = slots.iter().filter_map(|slot| Some((slot.name.as_str(), slot.recipe.as_ref()?)));
    if digest(&folded.originals, recipes)? != folded.digest {
        return Err(Error::format("the recipes are not those that the manifest was sealed with"));
    }
    let plain: Vec<Slot> = slots.iter().filter(|slot| slot.recipe.is_none()).cloned().collect();
    for slot in slots.iter_mut().filter(|slot| slot.recipe.is_some()) {
        let named = |key: &str| plain.iter().chain(&found).find(|of| of.name == key);
        check(slot, named).map_err(|error| error.of_key(&slot.name))?;
        slot.blocked = None;
    }
    Ok(found)
}

/// Refuses a recipe that does not make the slot.
fn check<'a>(slot: &Slot, named: impl Fn(&str) -> Option<&'a Slot>) -> Result<()> {
    let Some(recipe) = &slot.recipe else { return Ok(()) };
    if recipe.0.len() > MAX_STEPS {
        return Err(Error::new(ErrorKind::Limit, format!("recipe of {} steps, limit {MAX_STEPS}", recipe.0.len())));
    }
    if recipe.0.iter().any(|step| matches!(step, Step::Restride { .. })) {
        return Err(Error::format("the recipe states strides, which are the slot's to state"));
    }
    let packing = match recipe.0.last() {
        Some(Step::Pack(packing)) => Some(packing),
        _ => None,
    };
    if packing != slot.packed.as_ref().map(|packed| &packed.packing) {
        return Err(Error::format("the program keeps it in another layout than the recipe"));
    }
    let leaf = |key: &str| {
        let of = named(key).ok_or_else(|| Error::format("no tensor of the module has this name").of_key(key))?;
        Ok((of.dtype, of.shape.clone()))
    };
    let made = infer(recipe, leaf)?;
    if (made.dtype, &made.shape) != (slot.dtype, &slot.shape) {
        let what =
            format!("the recipe makes {} {:?}, the slot is {} {:?}", made.dtype, made.shape, slot.dtype, slot.shape);
        return Err(Error::format(what));
    }
    let read: u64 = recipe.keys().filter_map(&named).map(|of| of.nbytes).fold(slot.nbytes, u64::saturating_add);
    if made.nbytes / MAX_EXPANSION > read {
        let what = format!("the recipe makes {} bytes for a slot of {}", made.nbytes, slot.nbytes);
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(())
}
