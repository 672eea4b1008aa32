//! Where the bytes of slots are: in a file, in memory of the model's own, or in memory that somebody lent.

use std::any::Any;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use reweft::artifact::{Slot, manifest};
use reweft::checkpoint::Format;
use reweft::plan::{Plan, Refill};
use reweft::recipe::Recipe;
use reweft::source::{self, Source, Window, to_usize};
use reweft::{Artifact, Checkpoint, Error, ErrorKind, Result, TensorInfo, parallel};

use crate::memory::Lines;

/// Copies of fewer bytes are made by one thread: to begin another takes as long.
const SEVERAL_THREADS_NBYTES: u64 = 4 << 20;
/// Names listed in a message about slots.
const NAMES_SHOWN: usize = 5;

/// A slot's bytes, and their hash once somebody asked for it. Clones share both.
#[derive(Clone)]
pub(crate) struct Held {
    pub place: Place,
    hash: Arc<OnceLock<String>>,
    /// The hash that the package's manifest states, if the bytes are the package's.
    stated: Option<Arc<str>>,
}

/// The bytes a slot runs on.
#[derive(Clone)]
pub(crate) enum Place {
    /// Nowhere: the file was stripped of them, and nobody has given them yet.
    Absent,
    /// In a file or in memory that nobody writes to.
    Shared(Source, u64),
    /// Owned by the model; the program may write to it.
    Own(Arc<Lines>),
    /// In memory whose owner may write to it.
    Lent(Source, u64),
}

impl From<Place> for Held {
    fn from(place: Place) -> Self {
        Self { place, hash: Arc::default(), stated: None }
    }
}

impl Held {
    pub fn is_absent(&self) -> bool {
        matches!(self.place, Place::Absent)
    }

    /// The bytes of their own, for a slot that the program writes to. The caller knows that no call is writing.
    pub fn copy(&self) -> Self {
        match &self.place {
            Place::Own(lines) => Place::Own(Arc::new(lines.copy())).into(),
            _ => self.clone(),
        }
    }

    /// Address of the slot's bytes, and what keeps them there.
    pub fn locate(&self, slot: &Slot) -> Result<(*mut c_void, Arc<dyn Any + Send + Sync>)> {
        self.place.locate(slot)
    }

    /// The bytes, for reading: shared where they do not change, else copied. The caller knows that no call is writing.
    pub fn source(&self, slot: &Slot) -> Result<Source> {
        Ok(match &self.place {
            Place::Absent => return Err(no_weights([slot])),
            Place::Own(lines) if slot.mutated => Arc::new(lines.copy()),
            Place::Own(lines) => window(Arc::clone(lines) as Source, 0, slot.nbytes)?,
            Place::Shared(source, byte_offset) => window(Arc::clone(source), *byte_offset, slot.nbytes)?,
            Place::Lent(..) => {
                let (ptr, _keep) = self.locate(slot)?;
                // SAFETY: `locate` gave the address of that many bytes, which `self` keeps. Their owner may be writing to
                // them, so no reference to them is made; a torn element is a wrong number and no invalid value.
                Arc::new(unsafe { Lines::copy_from(ptr, to_usize(slot.nbytes)?) })
            }
        })
    }

    /// Hash of the bytes in the slot's layout, as manifests state it. Computed once, but for bytes that are lent.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if the manifest states another one; those of [`source`](Self::source).
    pub fn hash(&self, slot: &Slot) -> Result<String> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash.clone());
        }
        let source = self.source(slot)?;
        let found = match source.as_slice() {
            Some(bytes) => manifest::hash(bytes),
            None => manifest::hash(&source::read_vec(&*source, 0, slot.nbytes)?),
        };
        if let Some(stated) = self.stated.as_deref().filter(|stated| *stated != found) {
            let what = format!("the weights hash to {found}, the manifest states {stated}");
            let hint = "something other than reweft wrote them; reweft refit with the right weights states new hashes";
            return Err(Error::format(what).of_key(&slot.name).with_hint(hint));
        }
        if matches!(self.place, Place::Lent(..)) {
            return Ok(found);
        }
        Ok(self.hash.get_or_init(|| found).clone())
    }
}

impl Place {
    fn locate(&self, slot: &Slot) -> Result<(*mut c_void, Arc<dyn Any + Send + Sync>)> {
        match self {
            Self::Absent => Err(no_weights([slot])),
            Self::Own(lines) => Ok((lines.as_ptr(), Arc::clone(lines) as _)),
            Self::Shared(source, byte_offset) | Self::Lent(source, byte_offset) => {
                let Some(bytes) = source.as_slice() else {
                    return Err(Error::new(ErrorKind::Usage, "weights are not in memory").of_key(&slot.name));
                };
                let bytes = reweft::source::slice(bytes, *byte_offset, slot.nbytes)?;
                Ok((bytes.as_ptr().cast_mut().cast(), Arc::new(Arc::clone(source)) as _))
            }
        }
    }

    /// Whether the bytes begin at a multiple of the element size, as compiled code expects, or of a cache line, as oneDNN
    /// has its own.
    fn is_aligned(&self, slot: &Slot) -> Result<bool> {
        let itemsize = if slot.packed.is_some() { 64 } else { to_usize(slot.dtype.itemsize().unwrap_or(1))? };
        Ok(self.locate(slot)?.0.addr().is_multiple_of(itemsize))
    }
}

/// A range of a source; the source itself if that is all of it, so that weights that go back and forth between models do
/// not gather windows upon windows.
fn window(source: Source, byte_offset: u64, nbytes: u64) -> Result<Source> {
    if byte_offset == 0 && source.len() == nbytes {
        return Ok(source);
    }
    Ok(Arc::new(Window::new(source, byte_offset, nbytes)?))
}

/// A slot's tensor in a storage of that number.
pub(crate) fn info(slot: &Slot, storage: usize) -> TensorInfo {
    let (shape, strides) = (slot.shape.clone(), slot.strides.clone());
    TensorInfo { dtype: slot.dtype, shape, strides, storage, storage_offset: 0 }
}

/// The error for slots that have no bytes.
pub(crate) fn no_weights<'a>(slots: impl IntoIterator<Item = &'a Slot>) -> Error {
    let names: Vec<&str> = slots.into_iter().map(|slot| slot.name.as_str()).collect();
    let shown = names[..names.len().min(NAMES_SHOWN)].join(", ");
    let more = if names.len() > NAMES_SHOWN { ", ..." } else { "" };
    let what = format!("the model has no weights for {} slots: {shown}{more}", names.len());
    Error::new(ErrorKind::Run, what).with_hint("give them with load(path, weights=...), or with replace_weights")
}

/// The package's own weights: shared where they are, but for buffers that the program writes to. Slots that were stripped,
/// and those that `plan` is about to fill, are absent.
///
/// # Errors
/// [`ErrorKind::Format`] for bytes that are damaged; read errors.
pub(crate) fn packaged(artifact: &Artifact, plan: Option<&Plan>) -> Result<Vec<Held>> {
    let slots = artifact.slots();
    let mut kept = vec![true; slots.len()];
    for refill in plan.iter().flat_map(|plan| &plan.refills) {
        if let Some(kept) = kept.get_mut(refill.slot) {
            *kept = false;
        }
    }
    for (kept, slot) in kept.iter_mut().zip(slots) {
        *kept &= !slot.stripped;
    }
    check_kept(artifact, &kept)?;
    let place = |(slot, kept): (&Slot, &bool)| {
        if !*kept {
            return Ok(Place::Absent.into());
        }
        let mut place = Place::Shared(Arc::clone(artifact.source()), artifact.place(slot)?);
        if slot.mutated || artifact.source().as_slice().is_none() || !place.is_aligned(slot)? {
            place = Place::Own(Arc::new(Lines::from_bytes(&artifact.read_slot(slot)?)));
        }
        Ok(Held { stated: slot.hash.as_deref().map(Arc::from), ..place.into() })
    };
    slots.iter().zip(&kept).map(place).collect()
}

/// Compares the bytes of the slots that are used with what the file states of them.
///
/// All weights are in one record with one CRC. Where most of them are about to be replaced, the manifest's hashes of the
/// others are compared instead, which reads only those; if one of them differs, the CRC has the last word, as somebody
/// may have written new weights without knowing of the manifest.
fn check_kept(artifact: &Artifact, kept: &[bool]) -> Result<()> {
    let slots = || artifact.slots().iter().zip(kept).filter(|(_, kept)| **kept).map(|(slot, _)| slot);
    let (used, all) = (nbytes(slots()), nbytes(artifact.slots()));
    if used == 0 {
        return Ok(());
    }
    if used > all / 4 {
        return artifact.check_weights();
    }
    for slot in slots() {
        let found = manifest::hash(&artifact.read_slot(slot)?);
        if slot.hash.as_ref() != Some(&found) {
            return artifact.check_weights();
        }
    }
    Ok(())
}

fn nbytes<'a>(slots: impl IntoIterator<Item = &'a Slot>) -> u64 {
    slots.into_iter().map(|slot| slot.nbytes).sum()
}

/// Memory of weights that were replaced, for the next ones: pages that are new cost several times what is copied into them.
#[derive(Default)]
pub(crate) struct Spare(Vec<Lines>);

impl Spare {
    /// Takes what of a replaced set nobody else has.
    pub fn of(old: Vec<Held>) -> Self {
        let alone = |held: Held| match held.place {
            Place::Own(lines) => Arc::try_unwrap(lines).ok(),
            _ => None,
        };
        Self(old.into_iter().filter_map(alone).collect())
    }

    /// Memory of so many bytes, whatever is in it.
    fn take(&mut self, nbytes: usize) -> Lines {
        match self.0.iter().position(|lines| lines.nbytes() == nbytes) {
            Some(place) => self.0.swap_remove(place),
            None => Lines::zeroed(nbytes),
        }
    }
}

/// Which slots take memory that somebody may write to as if nobody did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lending {
    /// None: what may change is copied.
    #[default]
    Nothing,
    /// Those that the program only reads.
    Read,
    /// All: the program writes into the lender's memory.
    All,
}

/// What was put into slots.
#[derive(Default)]
pub(crate) struct Filled {
    /// Bytes that were copied.
    pub nbytes_copied: u64,
    /// What a lender should know.
    pub notices: Vec<String>,
}

/// Puts a checkpoint's bytes into the slots that a plan names: shared where they can serve as they are, else copied.
///
/// Copies go into `spare` memory where its size fits.
///
/// # Errors
/// [`ErrorKind::Usage`] for a plan of another package; read errors.
pub(crate) fn fill(
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    plan: &Plan,
    lending: Lending,
    spare: &mut Spare,
    slots: &mut [Held],
) -> Result<Filled> {
    let (mut filled, mut rest) = (Filled::default(), Vec::new());
    for refill in &plan.refills {
        let (Some(slot), Some(held)) = (artifact.slots().get(refill.slot), slots.get_mut(refill.slot)) else {
            return Err(Error::new(ErrorKind::Usage, "the plan is of another package").of_key(&refill.name));
        };
        if let Some(place) = shared(checkpoint, slot, refill.recipe.plain_key(), lending)? {
            if matches!(place, Place::Lent(..)) {
                filled.notices.extend(other_tied(checkpoint, slot));
            }
            *held = place.into();
        } else {
            filled.nbytes_copied += slot.nbytes;
            rest.push((refill, slot));
        }
    }
    let places = copies(checkpoint, &rest, filled.nbytes_copied, spare)?;
    for ((refill, _), place) in rest.iter().zip(places) {
        slots[refill.slot] = place.into();
    }
    if lending != Lending::Nothing && !rest.is_empty() {
        let why = "of another dtype, layout or alignment than the slot, or not in memory, or written to by the program";
        let names: Vec<&str> = rest.iter().map(|(_, slot)| slot.name.as_str()).collect();
        filled.notices.push(format!("copied and not shared, because {why}: {}", names.join(", ")));
    }
    Ok(filled)
}

/// Makes the bytes of slots, on several threads if they are many: one alone does not use all of the memory's speed.
fn copies(checkpoint: &Checkpoint, slots: &[(&Refill, &Slot)], nbytes: u64, spare: &mut Spare) -> Result<Vec<Place>> {
    // Allocated by this thread: the allocator keeps what others allocate apart, and gives it back each time.
    let memory = slots.iter().map(|(_, slot)| Ok(Mutex::new(spare.take(to_usize(slot.nbytes)?))));
    let memory: Vec<Mutex<Lines>> = memory.collect::<Result<_>>()?;
    let copy = |number: usize| {
        let (refill, slot) = slots[number];
        let mut lines = memory[number].lock().unwrap_or_else(PoisonError::into_inner);
        copy_into(&mut lines, checkpoint, slot, &refill.recipe)
    };
    if nbytes < SEVERAL_THREADS_NBYTES {
        (0..slots.len()).try_for_each(copy)?;
    } else {
        parallel::run(slots.len(), nbytes, &|number, _| copy(number), &mut |_, _| ())?;
    }
    let own = |lines: Mutex<Lines>| Place::Own(Arc::new(lines.into_inner().unwrap_or_else(PoisonError::into_inner)));
    Ok(memory.into_iter().map(own).collect())
}

/// The checkpoint's own bytes for a slot, if they can serve as they are: mapped or in memory, in the slot's layout.
fn shared(checkpoint: &Checkpoint, slot: &Slot, key: Option<&str>, lending: Lending) -> Result<Option<Place>> {
    let may_change = checkpoint.format() == Format::Memory && !checkpoint.is_frozen();
    let serves = match lending {
        Lending::Nothing => !slot.mutated && !may_change,
        Lending::Read => !slot.mutated,
        // The program writes to nothing but memory of a caller who asked for that.
        Lending::All => !slot.mutated || may_change,
    };
    let Some(key) = key.filter(|_| serves) else { return Ok(None) };
    let Some((source, start)) = in_memory(checkpoint, key)? else { return Ok(None) };
    let place = if may_change { Place::Lent(source, start) } else { Place::Shared(source, start) };
    Ok(place.is_aligned(slot)?.then_some(place))
}

/// Where a key's bytes are in memory, if they are.
fn in_memory(checkpoint: &Checkpoint, key: &str) -> Result<Option<(Source, u64)>> {
    let info = checkpoint.get(key)?;
    let in_place = |error: Error| error.of_key(key).in_file(checkpoint.file_of(info));
    let storage = checkpoint.storage_of(info).map_err(in_place)?;
    if storage.as_slice().map_err(in_place)?.is_none() {
        return Ok(None);
    }
    let Some((source, start)) = storage.locate().map_err(in_place)? else { return Ok(None) };
    let (first, _) = info.window(storage.nbytes)?;
    Ok(Some((Arc::clone(source), start + first)))
}

/// Makes a slot's bytes in memory of the model's own.
fn copy_into(lines: &mut Lines, checkpoint: &Checkpoint, slot: &Slot, recipe: &Recipe) -> Result<()> {
    let there = recipe.plain_key().map(|key| in_memory(checkpoint, key)).transpose()?.flatten();
    let there = there.map(|(source, start)| window(source, start, slot.nbytes)).transpose()?;
    let bytes = there.as_ref().and_then(|source| source.as_slice());
    if !bytes.is_some_and(|bytes| lines.fill(bytes)) {
        recipe.evaluate_into(checkpoint, lines.as_bytes_mut())?;
    }
    Ok(())
}

/// Says which of two lent tensors of one slot is used, if they are two.
fn other_tied(checkpoint: &Checkpoint, slot: &Slot) -> Option<String> {
    let mut names = slot.names().filter(|name| checkpoint.contains(name));
    let first = names.next()?;
    let other = names.find(|name| checkpoint.get(name).ok() != checkpoint.get(first).ok())?;
    Some(format!("{first:?} and {other:?} share a slot, but are two tensors: only {first:?} is shared"))
}
