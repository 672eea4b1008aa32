//! A model: a package on disk, its compiled program in this process, and the weights it runs on.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reweft::artifact::manifest::{Batching, Expected, Input, Manifest, Signature, Size};
use reweft::artifact::{Slot, weights_version};
use reweft::parallel::{self, Progressed};
use reweft::plan::{Allow, Finding, Given, Plan, Running, plan_running};
use reweft::source::Access;
use reweft::write::{self, RefitReport};
use reweft::{Artifact, Checkpoint, Dtype, Error, ErrorKind, Limits, Result};
use serde::Serialize;

use crate::binding::Binding;
use crate::cache::open_library;
use crate::device::Device;
use crate::host;
use crate::library::Library;
use crate::permits::Interrupted;
use crate::process::{Threads, Use, Uses};
use crate::proxy::{self, OpenOperators};
use crate::serving::Serving;
use crate::slots::{Filled, Held, Lending, Spare, fill, info, no_weights, packaged};
use crate::tensor::{Tensor, contiguous_strides};
use crate::torch::Torch;

/// How a package is opened to run.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Calls that may run at the same time; they share the weights.
    pub replicas: usize,
    /// Path of `libtorch_cpu.so`; `None` takes the one that is loaded in this process.
    pub libtorch: Option<PathBuf>,
    /// Weights to run on instead of those in the package, which are then neither read nor bound; a package that was stripped
    /// has none. [`Model::load_report`] says what was done.
    pub weights: Option<Arc<Checkpoint>>,
    /// How `weights` are taken.
    pub refit: RefitOptions,
    /// Calls follow one another and go around the pool of replicas, which saves 0.2 microseconds a call.
    pub single_threaded: bool,
    /// Threads that an operator takes within a call; `None` leaves it to libtorch. Set on the calling thread for the time
    /// of the call.
    pub threads: Option<NonZero<u16>>,
    /// The kind of device that the program must be for; `None` takes what it is for.
    pub device: Option<Device>,
    /// Keep the memory of copied weights that were replaced, for the next copy. Twice the memory; a copy then takes as long as
    /// the bytes do, while new pages cost several times that.
    pub standby: bool,
    /// Makes the operators that the program leaves to its host; without it, programs with such are refused.
    pub operators: Option<OpenOperators>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            replicas: 1,
            libtorch: None,
            weights: None,
            refit: RefitOptions::default(),
            single_threaded: false,
            threads: None,
            device: None,
            standby: false,
            operators: None,
        }
    }
}

/// How a live refit takes new weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct RefitOptions {
    /// What may differ.
    pub allow: Allow,
    /// Which tensors in memory are used where they are, if dtype, layout and alignment are the slot's; the others are
    /// copied, and a notice names them.
    ///
    /// Whoever lends keeps the memory in its place until the model has other weights. What he writes there, calls see at
    /// once, also in the middle of a call. It stays allocated as long as the checkpoint's sources keep it so; the model
    /// holds those.
    pub lending: Lending,
    /// Leave slots that the program writes to as they are, whatever the checkpoint has for them.
    pub keep_written: bool,
    /// What the checkpoint has: rows are what [`Model::state`] gives for a model whose slots are
    /// [made in the same way](Model::has_rows_of).
    pub given: Given,
}

impl From<Allow> for RefitOptions {
    fn from(allow: Allow) -> Self {
        Self { allow, ..Self::default() }
    }
}

/// What a live refit did.
#[derive(Clone, Debug, Serialize)]
pub struct LiveReport {
    /// Slots that keys filled.
    pub slots: usize,
    /// Slots that kept their bytes.
    pub kept: Vec<String>,
    /// Bytes of the filled slots.
    pub nbytes: u64,
    /// Of these, bytes that were copied: from memory, for another layout or dtype, for buffers the program writes to.
    /// The others are used where the mapped file, or whoever lent them, has them.
    pub nbytes_copied: u64,
    /// Notices of plan and checkpoint, and of what was to be shared and could not.
    pub notices: Vec<String>,
}

/// A compiled program that runs, with weights that can be replaced while it does.
///
/// Weights are used where the package file, or a mapped checkpoint, has them; nothing is copied that need not be.
/// Those files must not be truncated or overwritten meanwhile (see [`Mmap`](reweft::source::Mmap)); replacing them by a
/// rename is safe. It may be shared between threads.
pub struct Model {
    artifact: Arc<Artifact>,
    torch: Torch,
    library: Library,
    serving: Serving,
    device: Device,
    signature: Arc<Signature>,
    inputs: Arc<Vec<InputType>>,
    notices: Vec<String>,
    threads: Option<NonZero<u16>>,
    /// Threads that the code was compiled for, if it says so itself.
    baked_threads: u64,
    uses: Uses,
    /// Where each slot's bytes are, by number of the slot. Locked for the whole of a refit.
    ///
    /// Dropping bytes may take the interpreter lock, so nobody who holds that may wait for this.
    live: Mutex<Vec<Held>>,
    /// Whether the memory of weights that were replaced is kept for the next copies.
    standby: bool,
    /// That memory; none without `standby`. Taken while `live` is locked.
    spare: Mutex<Spare>,
    load_report: Option<LiveReport>,
}

/// What an input must be, parsed once.
struct InputType {
    dtype: Dtype,
    device: Device,
    /// Shape and strides, unless they vary.
    fixed: Option<Expected>,
}

impl Model {
    /// Opens a package that `reweft.torch.trace` wrote, and binds its weights, or those that the options bring. The library
    /// is unpacked once into the user's [cache](crate::LibraryCache), and opened once in a process, however many packages
    /// hold it.
    ///
    /// Reads all packaged weights once, to compare their CRC, but not those that others take the place of; copies only
    /// buffers that the program writes to. A package that was stripped opens without weights; until [`refit`](Self::refit)
    /// has filled it, what needs them is an error.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a damaged package, [`ErrorKind::Unsupported`] for one that has no manifest (nothing says
    /// which inputs it takes), with operators that it leaves to a host that has none, for a device of another kind than
    /// the process has, or for another machine, processor or torch, in which case none of its code was loaded;
    /// [`ErrorKind::Usage`] for several replicas of a program that writes to buffers; [`ErrorKind::Run`] if the loader or
    /// the program refuses; [`ErrorKind::Mismatch`] if the options' weights do not fit.
    ///
    /// # Safety
    /// Runs native code from the package: `path` must come from somebody you would run a program of.
    pub unsafe fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        let in_file = |error: Error| error.in_file(path);
        let artifact = Artifact::open(path, Access::Map, &Limits::default())?;
        let manifest = check_runnable(&artifact, options).map_err(in_file)?;
        let device = check_device(manifest, options.device).map_err(in_file)?;
        let signature = manifest.signature().clone();
        let inputs = input_types(&signature).map_err(in_file)?;
        let mut notices = host::check(&artifact, manifest).map_err(in_file)?;
        let (live, load_report) = first_weights(&artifact, options)?;
        let torch = match &options.libtorch {
            // SAFETY: the caller vouches for what is opened.
            Some(path) => unsafe { Torch::open(path)? },
            None => Torch::from_process()?,
        };
        notices.extend(host::check_torch(manifest.torch(), torch.abi_version()).map_err(in_file)?);
        let operators = proxy::open(&artifact, &torch, options.operators).map_err(in_file)?;
        // SAFETY: the caller vouches for the package.
        let library = unsafe { unpack_library(&artifact, &torch).map_err(in_file)? };
        let serving = Serving::open(&torch, &library, device, options.replicas, options.single_threaded, operators)?;
        let (threads, baked_threads) = (options.threads, baked_threads(&artifact).map_err(in_file)?);
        if let Some(count) = threads.filter(|count| baked_threads > 1 && u64::from(count.get()) != baked_threads) {
            notices.push(format!(
                "the program's own loops take the {baked_threads} threads that it was compiled for, not {count}"
            ));
        }
        let model = Self {
            artifact: Arc::new(artifact),
            torch,
            library,
            serving,
            device,
            signature: Arc::new(signature),
            inputs: Arc::new(inputs),
            notices,
            threads,
            baked_threads,
            uses: Uses::new(),
            live: Mutex::default(),
            standby: options.standby,
            spare: Mutex::default(),
            load_report,
        };
        model.bind(live, &mut model.live())?;
        Ok(model)
    }

    /// What the options' weights did when the model was opened, if there were any.
    pub fn load_report(&self) -> Option<&LiveReport> {
        self.load_report.as_ref()
    }

    /// Makes a second model of the same program with the same weights, which can then be given others. Copies only buffers
    /// that the program writes to, for which it waits for the running call; costs a container.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] if the program refuses.
    pub fn twin(&self) -> Result<Self> {
        let _use = self.enter()?;
        let (replicas, alone) = (self.serving.replicas(), self.serving.is_single_threaded());
        let operators = self.serving.operators();
        let serving = Serving::open(&self.torch, &self.library, self.device, replicas, alone, operators)?;
        let twin = Self {
            artifact: Arc::clone(&self.artifact),
            torch: self.torch.clone(),
            library: self.library.clone(),
            serving,
            device: self.device,
            signature: Arc::clone(&self.signature),
            inputs: Arc::clone(&self.inputs),
            notices: self.notices.clone(),
            threads: self.threads,
            baked_threads: self.baked_threads,
            uses: Uses::new(),
            live: Mutex::default(),
            standby: self.standby,
            spare: Mutex::default(),
            load_report: self.load_report.clone(),
        };
        twin.bind(self.copied(), &mut twin.live())?;
        Ok(twin)
    }

    /// Takes the weights of a model of the same program, all or none. Copies only buffers that the program writes to.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a model of another package: only [`twin`](Self::twin) makes one of the same;
    /// [`ErrorKind::Run`] if `other` has no weights yet, or the program refuses. The old weights then stay.
    pub fn adopt(&self, other: &Self) -> Result<()> {
        let _use = self.enter()?;
        if !Arc::ptr_eq(&self.artifact, &other.artifact) {
            let what = "the weights are of a model of another package";
            return Err(Error::new(ErrorKind::Usage, what).in_file(self.artifact.path()));
        }
        // Copied before this model is locked: two models that adopt from each other would wait for one another.
        let next = {
            let _use = other.enter()?;
            other.copied()
        };
        let _here = self.serving.note();
        self.check_filled(&next)?;
        self.bind(next, &mut self.live()).map(drop)
    }

    /// The weights in use, with copies of the buffers that the program writes to.
    fn copied(&self) -> Vec<Held> {
        let live = self.live();
        let _still = self.writes().then(|| self.serving.pause());
        let copy = |(held, slot): (&Held, &Slot)| if slot.mutated { held.copy() } else { held.clone() };
        live.iter().zip(self.artifact.slots()).map(copy).collect()
    }

    /// The package that was opened.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// What is not as it was where the program was compiled, and need not matter.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The libtorch it runs on.
    pub fn torch(&self) -> &Torch {
        &self.torch
    }

    /// How the program is called: inputs in call order, and which of their sizes may vary.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// Pytree specifications of inputs and outputs, as JSON that `torch.utils._pytree` wrote.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] if the program does not tell.
    pub fn call_spec(&self) -> Result<(String, String)> {
        Ok(self.serving.program().call_spec()?)
    }

    /// Runs the program. Copies nothing; calls beyond the number of replicas wait.
    ///
    /// A call that is running while the weights are replaced finishes on the old ones; one that starts afterwards uses
    /// the new ones.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] for an input of another dtype, shape, stride or device than the program was compiled for,
    /// which it would not notice; [`ErrorKind::Usage`] for the wrong number of inputs, and from inside a call of this model,
    /// as everything that uses it; [`ErrorKind::Run`] if it fails.
    pub fn run(&self, inputs: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
        self.run_unless(inputs, &|| false)
    }

    /// [`run`](Self::run), which can be given up while it waits for other calls; once it runs, it runs to its end.
    ///
    /// # Errors
    /// As [`run`](Self::run); [`ErrorKind::Run`] if it is given up.
    pub fn run_unless(&self, inputs: Vec<Tensor>, interrupted: Interrupted<'_>) -> Result<Vec<Option<Tensor>>> {
        self.check_inputs(&inputs)?;
        // SAFETY: the inputs have just been checked.
        unsafe { self.run_checked(inputs, interrupted) }
    }

    /// [`run_unless`](Self::run_unless) if the inputs are what the program takes, also where strides mean nothing: of
    /// dimensions with one element or none. `None` if they are not.
    ///
    /// # Errors
    /// As [`run_unless`](Self::run_unless), but for inputs that do not fit.
    pub fn run_fitting(
        &self,
        inputs: Vec<Tensor>,
        interrupted: Interrupted<'_>,
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        if !self.fit(&inputs) {
            return Ok(None);
        }
        // SAFETY: the inputs have just been checked.
        unsafe { self.run_checked(inputs, interrupted) }.map(Some)
    }

    /// # Safety
    /// `inputs` passed `check_inputs`.
    unsafe fn run_checked(&self, inputs: Vec<Tensor>, interrupted: Interrupted<'_>) -> Result<Vec<Option<Tensor>>> {
        let entered = self.enter()?;
        let _threads = self.set_threads(entered.is_forked())?;
        // SAFETY: every input is what the program was compiled for, and a program that writes to buffers has one
        // replica, so that its calls follow one another.
        unsafe { self.serving.run(inputs, interrupted) }.map_err(|error| self.explained(error))
    }

    /// Runs the program once for each chunk, all on one set of weights however often they are replaced meanwhile. Chunks run
    /// at the same time as far as replicas are free, else one after the other.
    ///
    /// # Errors
    /// As [`run`](Self::run), of the first chunk that fails; none has run if an input does not fit.
    pub fn run_chunks(&self, chunks: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Option<Tensor>>>> {
        self.run_chunks_unless(chunks, &|| false)
    }

    /// [`run_chunks`](Self::run_chunks), which can be given up while it waits for other calls.
    ///
    /// # Errors
    /// As [`run_chunks`](Self::run_chunks); [`ErrorKind::Run`] if it is given up.
    pub fn run_chunks_unless(
        &self,
        chunks: Vec<Vec<Tensor>>,
        interrupted: Interrupted<'_>,
    ) -> Result<Vec<Vec<Option<Tensor>>>> {
        chunks.iter().try_for_each(|inputs| self.check_inputs(inputs))?;
        let entered = self.enter()?;
        let forked = entered.is_forked();
        let _threads = self.set_threads(forked)?;
        // Where this thread could set the number, others can.
        let prepare = || self.set_threads(forked).ok().flatten();
        // SAFETY: as in `run`, for the inputs of every chunk.
        unsafe { self.serving.run_chunks(chunks, &prepare, interrupted) }.map_err(|error| self.explained(error))
    }

    /// Whether inputs are what the program takes, to the last stride. Allocates nothing where no sizes vary.
    fn fit(&self, inputs: &[Tensor]) -> bool {
        if inputs.len() != self.inputs.len() {
            return false;
        }
        let Ok(varying) = self.varying(inputs) else { return false };
        inputs.iter().zip(&*self.inputs).enumerate().all(|(number, (tensor, wanted))| {
            let expected = wanted.fixed.as_ref().or_else(|| varying.get(number));
            expected.is_some_and(|expected| is_exactly(tensor, wanted, expected).unwrap_or(false))
        })
    }

    fn check_inputs(&self, inputs: &[Tensor]) -> Result<()> {
        if inputs.len() != self.inputs.len() {
            let what = format!("{} inputs, the program takes {}", inputs.len(), self.inputs.len());
            return Err(Error::new(ErrorKind::Usage, what).in_file(self.artifact.path()));
        }
        let varying = self.varying(inputs)?;
        for (number, (tensor, wanted)) in inputs.iter().zip(&*self.inputs).enumerate() {
            let of_input = |error: Error| match self.signature.inputs.get(number) {
                Some(input) => error.of_key(&input.name),
                None => error,
            };
            let expected = wanted.fixed.as_ref().or_else(|| varying.get(number));
            let checked = check_input(tensor, wanted, expected).map_err(of_input);
            checked.map_err(|error| error.in_file(self.artifact.path()))?;
        }
        Ok(())
    }

    /// What is expected of each input, if sizes vary.
    fn varying(&self, inputs: &[Tensor]) -> Result<Vec<Expected>> {
        if !self.signature.is_dynamic() {
            return Ok(Vec::new());
        }
        let shapes = inputs.iter().map(|tensor| Ok(tensor.shape()?)).collect::<Result<Vec<_>>>()?;
        self.signature.expect(&shapes).map_err(|error| error.in_file(self.artifact.path()))
    }

    /// Names the slots without weights in an error that says there are some.
    fn explained(&self, error: crate::Error) -> Error {
        let missing = error.kind() == crate::ErrorKind::WeightsMissing;
        missing.then(|| self.check_filled(&self.live()).err()).flatten().unwrap_or_else(|| error.into())
    }

    /// Refuses weights of which some are absent.
    fn check_filled(&self, live: &[Held]) -> Result<()> {
        let mut absent = self.artifact.slots().iter().zip(live).filter(|(_, held)| held.is_absent()).peekable();
        if absent.peek().is_none() {
            return Ok(());
        }
        Err(no_weights(absent.map(|(slot, _)| slot)).in_file(self.artifact.path()))
    }

    /// Replaces the weights, all or none, while calls are running.
    ///
    /// Calls do not wait for it, nor for one another because of it; only those of a program that writes to buffers wait
    /// while it switches. This returns when the last call has left the old weights, and their memory is released.
    ///
    /// Tensors of a mapped checkpoint whose layout is the slot's are used where they are, after their CRC was
    /// compared; all others are copied, those in memory too unless they are lent, so that a later edit of them changes
    /// nothing here.
    ///
    /// `options` are what may differ ([`Allow`]), or more ([`RefitOptions`]).
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if the plan has blocking findings; read errors. The old weights then stay.
    pub fn refit(&self, checkpoint: &Checkpoint, options: impl Into<RefitOptions>) -> Result<LiveReport> {
        let options = options.into();
        let _use = self.enter()?;
        // What lets go of lent memory may be somebody else's code.
        let _here = self.serving.note();
        let mut live = self.live();
        let (filled, keep_written) = (self.check_filled(&live).is_ok(), options.keep_written);
        let running = Running { filled, keep_written, given: options.given };
        let planned = plan_running(&self.artifact, checkpoint, options.allow, running)?;
        planned.check()?;
        let mut next = live.clone();
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = fill(&self.artifact, checkpoint, &planned, options.lending, &mut spare, &mut next)?;
        let old = self.bind(next, &mut live)?;
        if self.standby {
            *spare = Spare::of(old);
        }
        Ok(report(&planned, checkpoint, filled))
    }

    /// Whether the slots of another model are the same, made of tensors in the same way, so that it can take their bytes.
    pub fn has_rows_of(&self, other: &Self) -> bool {
        let digest = |model: &Self| Some(model.artifact.manifest()?.folded()?.digest.clone());
        digest(self).is_some() && digest(self) == digest(other)
    }

    /// The weights in use, as a checkpoint under the names that the module has for them, as far as they can be read back
    /// ([`Artifact::read_back`]). Costs as [`state`](Self::state).
    ///
    /// # Errors
    /// As [`state`](Self::state).
    pub fn weights(&self) -> Result<Checkpoint> {
        self.artifact.read_back(&self.state()?)
    }

    /// The weights in use, as a checkpoint under the slots' names. Shares the bytes of the weights and copies the
    /// buffers that the program writes to, for which it waits for the running call, and what was lent.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] for a stripped package that was not filled yet.
    pub fn state(&self) -> Result<Checkpoint> {
        let _use = self.enter()?;
        let live = self.copied();
        self.check_filled(&live)?;
        let (mut sources, mut tensors) = (Vec::with_capacity(live.len()), Vec::with_capacity(live.len()));
        for (slot, held) in self.artifact.slots().iter().zip(&live) {
            tensors.push((slot.name.clone(), info(slot, sources.len())));
            sources.push(held.source(slot)?);
        }
        Ok(Checkpoint::from_memory(Path::new("live weights"), sources, tensors)?.freeze())
    }

    /// A hash of the weights in use: over names, dtypes, shapes and elements, and not over buffers that the program writes to.
    /// Equal for equal weights, whatever they came from, also after others served in between.
    ///
    /// The first call after a refit reads the replaced weights, on a few threads; further ones read nothing, but for memory
    /// that was lent, which is read each time. A refit never computes it.
    ///
    /// Until the first refit it is [`Artifact::weights_version`], which holds the manifest against the weights.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] for a stripped package that was not filled yet; [`ErrorKind::Format`] for weights of the package
    /// that are not those that its manifest states.
    pub fn weights_version(&self) -> Result<String> {
        let _use = self.enter()?;
        let live = self.live().clone();
        self.check_filled(&live)?;
        let slots = self.artifact.slots();
        let hash = |number: usize, _: &Progressed<'_>| {
            if slots[number].mutated { Ok(String::new()) } else { live[number].hash(&slots[number]) }
        };
        let hashes = parallel::run(live.len(), 0, &hash, &mut |_, _| ());
        let hashes = hashes.map_err(|error| error.in_file(self.artifact.path()))?;
        Ok(weights_version(slots.iter().zip(hashes.iter().map(String::as_str))))
    }

    /// Writes the package with the weights in use, or stripped of them ([`write::strip`]), and what it is to say of batch
    /// sizes. Costs a copy of the whole; the file appears whole or not at all.
    ///
    /// # Errors
    /// As [`state`](Self::state), [`write::refit`] and [`write::strip`]; `out` is then as it was.
    pub fn save(&self, out: &Path, inline_weights: bool, batching: Batching) -> Result<RefitReport> {
        let state = self.state()?;
        let saving = Running { given: Given::Saved, ..Running::default() };
        let mut planned = plan_running(&self.artifact, &state, Allow::default(), saving)?;
        planned.batching = Some(batching);
        let refit = |out: &Path| write::refit(&planned, &self.artifact, &state, out, &mut |_, _| ());
        if inline_weights {
            return refit(out);
        }
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed = |error| Error::io("make a temporary folder", error).in_file(folder);
        let folder = tempfile::Builder::new().prefix(".reweft-").tempdir_in(folder).map_err(failed)?;
        let whole = folder.path().join("whole.pt2");
        let report = refit(&whole)?;
        let artifact = Artifact::open(&whole, Access::Map, &Limits::default())?;
        write::strip(&artifact, &[], out, &mut |_, _| ())?;
        Ok(report)
    }

    /// Whether the program writes to buffers. It has one replica then.
    fn writes(&self) -> bool {
        self.artifact.slots().iter().any(|slot| slot.mutated)
    }

    /// Hands a full set of weights to the program and remembers where they are; one that is not full is only remembered.
    /// Gives the set of before, which no call reads any more.
    fn bind(&self, next: Vec<Held>, live: &mut Vec<Held>) -> Result<Vec<Held>> {
        if next.is_empty() || self.check_filled(&next).is_err() {
            return Ok(std::mem::replace(live, next));
        }
        let mut bindings = Vec::with_capacity(next.len());
        for (slot, held) in self.artifact.slots().iter().zip(&next) {
            let (ptr, keep) = held.locate(slot)?;
            let Some(packed) = &slot.packed else {
                let (shape, strides) = (signed(&slot.shape)?, signed(&slot.strides)?);
                // SAFETY: `locate` gave the address of `slot.nbytes` bytes that `keep` owns, and the slot is dense, so that
                // shape and strides, which are those of the compiled program, reach no further. Bytes that are shared are
                // never written, and those that are lent only by who was told what that means; bytes of slots that the
                // program writes to are `Own`, one model's and writable.
                let binding =
                    unsafe { Binding::new(&slot.constant, ptr, shape, strides, slot.dtype, self.device, keep) };
                // A row has the size of the storage that the tensor was a view of when it was compiled.
                bindings.push(binding.in_storage_of(slot.row_nbytes));
                continue;
            };
            let strides = contiguous_strides(&signed(&packed.shape)?);
            // SAFETY: as above, for a slot that the program never writes to. `packing` is what the descriptor says, and
            // `Artifact::open` held it against the bytes of the row.
            let binding = unsafe {
                Binding::new(&slot.constant, ptr, signed(&packed.shape)?, strides, packed.dtype, self.device, keep)
                    .packed_as(&packed.descriptor)
            };
            bindings.push(binding.in_storage_of(slot.row_nbytes));
        }
        // A buffer that is kept is bound to both containers, so no call may be in either while they change.
        let _still = self.writes().then(|| self.serving.pause());
        self.serving.replace(bindings)?;
        Ok(std::mem::replace(live, next))
    }

    /// Begins a use of locks and program.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] from inside a call or a refit of this model: it would wait for that, or for a refit that does.
    fn enter(&self) -> Result<Use<'_>> {
        if self.serving.is_here() {
            let what = "the model is used from inside a call or a refit of its own, for which it would wait for ever";
            let error = Error::new(ErrorKind::Usage, what).in_file(self.artifact.path());
            return Err(error.with_hint("use it when that has returned, or use another model"));
        }
        self.uses.begin().map_err(|error| error.in_file(self.artifact.path()))
    }

    /// Sets the number of threads of a call. A forked process has one: libgomp would wait for threads that are not there.
    fn set_threads(&self, forked: bool) -> Result<Option<Threads<'_>>> {
        let count = match self.threads {
            _ if forked && self.baked_threads > 1 => {
                let baked = self.baked_threads;
                let what = format!(
                    "the program was compiled for {baked} threads, and this process was forked after torch was loaded"
                );
                return Err(Error::new(ErrorKind::Run, what)
                    .in_file(self.artifact.path())
                    .with_hint("start processes with spawn, or trace it with torch.set_num_threads(1)"));
            }
            _ if forked => 1,
            Some(count) => i32::from(count.get().cast_signed()).max(1),
            None => return Ok(None),
        };
        Threads::set(&self.torch, count).map_err(|error| error.in_file(self.artifact.path()))
    }

    fn live(&self) -> MutexGuard<'_, Vec<Held>> {
        // A panic in a refit leaves the old list in place, which is still what the program runs on.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.artifact.path())
            .field("container", self.serving.program())
            .finish_non_exhaustive()
    }
}

/// Refuses packages whose calls could go wrong without an error.
fn check_runnable<'a>(artifact: &'a Artifact, options: &ModelOptions) -> Result<&'a Manifest> {
    let Some(manifest) = artifact.manifest() else {
        let what = "the package has no manifest, so nothing says which inputs it takes";
        return Err(Error::new(ErrorKind::Unsupported, what)
            .with_hint("compile with reweft.torch.trace; torch's own aoti_load_package runs it unchecked"));
    };
    if let Some(slot) = artifact.slots().iter().find(|slot| slot.obstacle().is_some()) {
        let what = format!("slot cannot be bound: {}", slot.obstacle().unwrap_or_default());
        return Err(Error::new(ErrorKind::Unsupported, what).of_key(&slot.name));
    }
    if options.replicas > 1
        && let Some(slot) = artifact.slots().iter().find(|slot| slot.mutated)
    {
        let what = format!("the program writes to this buffer, which {} replicas would share", options.replicas);
        return Err(Error::new(ErrorKind::Usage, what).of_key(&slot.name).with_hint("open it with one replica"));
    }
    Ok(manifest)
}

/// Weights are bound where the host has them, so the program's device must be one that reads host memory.
fn check_device(manifest: &Manifest, wanted: Option<Device>) -> Result<Device> {
    let device: Device = manifest.device().parse()?;
    if let Some(wanted) = wanted.filter(|wanted| wanted.kind != device.kind) {
        let what = format!("device is {wanted}, the program was compiled for {device}");
        return Err(Error::new(ErrorKind::Usage, what).with_hint("trace it again on that device"));
    }
    if device.is_host() {
        return Ok(device);
    }
    let what = format!("the program is for {device}, on which running is not tested yet");
    Err(Error::new(ErrorKind::Unsupported, what).with_hint("inspect, plan and refit it on disk"))
}

/// The largest number of threads that the generated loops state. The compiler writes it into them (`num_threads(2)`) unless
/// it was asked for `cpp.dynamic_threads`.
fn baked_threads(artifact: &Artifact) -> Result<u64> {
    let Some((archive, model)) = artifact.package() else { return Ok(1) };
    let folder = model.source.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut most = 1;
    for name in archive.entries().keys().filter(|name| name.starts_with(folder) && name.strip_suffix(".cpp").is_some())
    {
        let source = archive.read(name)?;
        for after in String::from_utf8_lossy(&source).split("num_threads(").skip(1) {
            let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
            most = most.max(digits.parse().unwrap_or(1));
        }
    }
    Ok(most)
}

fn input_types(signature: &Signature) -> Result<Vec<InputType>> {
    // Without sizes that vary, what is expected does not depend on what is found.
    let fixed = |input: &Input| {
        let numbers = |sizes: &[Size]| sizes.iter().map(|size| size.evaluate(&HashMap::new())).collect::<Result<_>>();
        Ok::<_, Error>(Expected { shape: numbers(&input.shape)?, strides: numbers(&input.strides)? })
    };
    let parse = |input: &Input| {
        let dtype = Dtype::from_name(&input.dtype)
            .ok_or_else(|| Error::format(format!("input of dtype {:?}, which is not known", input.dtype)))?;
        let fixed = if signature.is_dynamic() { None } else { Some(fixed(input)?) };
        Ok(InputType { dtype, device: input.device.parse()?, fixed })
    };
    signature.inputs.iter().map(|input| parse(input).map_err(|error: Error| error.of_key(&input.name))).collect()
}

/// Whether a tensor is what is expected, also where strides mean nothing.
fn is_exactly(tensor: &Tensor, wanted: &InputType, expected: &Expected) -> Result<bool> {
    Ok(tensor.dtype()? == wanted.dtype
        && tensor.with_shape(|shape| shape == expected.shape)?
        && tensor.with_strides_of(|strides| strides == expected.strides)?
        && tensor.device()?.kind == wanted.device.kind)
}

fn check_input(tensor: &Tensor, wanted: &InputType, expected: Option<&Expected>) -> Result<()> {
    let (dtype, shape, strides, device) = (tensor.dtype()?, tensor.shape()?, tensor.strides()?, tensor.device()?);
    let differs = |what: &str, found: String, wanted: String| {
        Err(Error::new(ErrorKind::Mismatch, format!("input has {what} {found}, the program takes {wanted}")))
    };
    let Some(expected) = expected else { return Err(Error::new(ErrorKind::Usage, "an input too many")) };
    if dtype != wanted.dtype {
        return differs("dtype", dtype.to_string(), wanted.dtype.to_string());
    }
    if shape != expected.shape {
        return differs("shape", format!("{shape:?}"), format!("{:?}", expected.shape));
    }
    if device.kind != wanted.device.kind {
        return differs("device", device.to_string(), wanted.device.to_string());
    }
    let counts = |dim: &usize| shape[*dim] > 1 && !shape.contains(&0);
    if (0..shape.len()).filter(counts).any(|dim| strides[dim] != expected.strides[dim]) {
        return differs("strides", format!("{strides:?}"), format!("{:?}", expected.strides));
    }
    Ok(())
}

/// Opens the package's library; where it is unpacked is the cache's matter.
///
/// # Safety
/// As [`Library::open`].
unsafe fn unpack_library(artifact: &Artifact, torch: &Torch) -> Result<Library> {
    let (archive, model) =
        artifact.package().ok_or_else(|| Error::new(ErrorKind::Unsupported, "this is no compiled package"))?;
    // SAFETY: the caller vouches for the package.
    unsafe { open_library(torch, &archive.read(&model.library)?) }
}

/// The weights that a model starts with: those in the package, and those that the options bring.
fn first_weights(artifact: &Artifact, options: &ModelOptions) -> Result<(Vec<Held>, Option<LiveReport>)> {
    let Some(checkpoint) = &options.weights else {
        return Ok((packaged(artifact, None).map_err(|error| error.in_file(artifact.path()))?, None));
    };
    let RefitOptions { allow, keep_written, .. } = options.refit;
    let planned = plan_running(artifact, checkpoint, allow, Running { keep_written, ..Running::default() })?;
    planned.check()?;
    let mut live = packaged(artifact, Some(&planned)).map_err(|error| error.in_file(artifact.path()))?;
    let filled = fill(artifact, checkpoint, &planned, options.refit.lending, &mut Spare::default(), &mut live)?;
    Ok((live, Some(report(&planned, checkpoint, filled))))
}

fn signed(sizes: &[u64]) -> Result<Vec<i64>> {
    let convert = |size: &u64| i64::try_from(*size).map_err(|_| Error::format(format!("size {size} is out of range")));
    sizes.iter().map(convert).collect()
}

fn report(planned: &Plan, checkpoint: &Checkpoint, filled: Filled) -> LiveReport {
    let findings = planned.findings.iter().map(Finding::to_string);
    LiveReport {
        slots: planned.refills.len(),
        kept: planned.kept.clone(),
        nbytes: planned.nbytes(),
        nbytes_copied: filled.nbytes_copied,
        notices: findings.chain(checkpoint.notices().iter().cloned()).chain(filled.notices).collect(),
    }
}
