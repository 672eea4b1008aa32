//! A model: a package on disk, its compiled program in this process, and the weights it runs on.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reweft::artifact::Slot;
use reweft::artifact::manifest::{Expected, Input, Manifest, Signature, Size};
use reweft::checkpoint::Format;
use reweft::plan::{Allow, Finding, Plan, plan};
use reweft::source::{Access, Source, Window};
use reweft::{Artifact, Checkpoint, Dtype, Error, ErrorKind, Limits, Result, TensorInfo};
use serde::Serialize;

use crate::binding::Binding;
use crate::cache::open_library;
use crate::device::Device;
use crate::host;
use crate::library::Library;
use crate::memory::Lines;
use crate::serving::Serving;
use crate::tensor::Tensor;
use crate::torch::Torch;

/// How a package is opened to run.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Calls that may run at the same time; they share the weights.
    pub replicas: usize,
    /// Path of `libtorch_cpu.so`; `None` takes the one that is loaded in this process.
    pub libtorch: Option<PathBuf>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { replicas: 1, libtorch: None }
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
    /// The others are used where the checkpoint file has them.
    pub nbytes_copied: u64,
    /// Notices of plan and checkpoint.
    pub notices: Vec<String>,
}

/// A compiled program that runs, with weights that can be replaced while it does.
///
/// Weights are used where the package file, or a mapped checkpoint, has them; nothing is copied that need not be.
/// Those files must not be truncated or overwritten meanwhile (see [`Mmap`](reweft::source::Mmap)); replacing them by a
/// rename is safe. It may be shared between threads.
pub struct Model {
    artifact: Artifact,
    torch: Torch,
    serving: Serving,
    device: Device,
    signature: Signature,
    inputs: Vec<InputType>,
    notices: Vec<String>,
    /// Where each slot's bytes are, by number of the slot. Locked for the whole of a refit.
    live: Mutex<Vec<SlotBytes>>,
}

/// What an input must be, parsed once.
struct InputType {
    dtype: Dtype,
    device: Device,
    /// Shape and strides, unless they vary.
    fixed: Option<Expected>,
}

/// The bytes a slot runs on.
#[derive(Clone)]
enum SlotBytes {
    /// In a file or in memory that nobody writes to.
    Shared(Source, u64),
    /// Owned by the model; the program may write to it.
    Own(Arc<Lines>),
}

impl Model {
    /// Opens a package that `reweft.torch.trace` wrote, and binds its weights. Reads all weight bytes once, to compare
    /// their CRC; copies only buffers that the program writes to. The library is unpacked once into the user's
    /// [cache](crate::LibraryCache), and opened once in a process, however many packages hold it.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for a damaged package, [`ErrorKind::Unsupported`] for one that was stripped or has no manifest
    /// (nothing says which inputs it takes), with operators that need a proxy executor, for a device of another kind than the
    /// process has, or for another machine, processor or torch, in which case none of its code was loaded; [`ErrorKind::Usage`] for several replicas of a program that writes to buffers; [`ErrorKind::Run`]
    /// if the loader or the program refuses.
    ///
    /// # Safety
    /// Runs native code from the package: `path` must come from somebody you would run a program of.
    pub unsafe fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        let in_file = |error: Error| error.in_file(path);
        let artifact = Artifact::open(path, Access::Map, &Limits::default())?;
        artifact.check_whole()?;
        let manifest = check_runnable(&artifact, options).map_err(in_file)?;
        let device = check_device(manifest).map_err(in_file)?;
        let signature = manifest.signature().clone();
        let inputs = input_types(&signature).map_err(in_file)?;
        let mut notices = host::check(&artifact, manifest).map_err(in_file)?;
        if !artifact.slots().is_empty() {
            artifact.check_weights()?;
        }
        let torch = match &options.libtorch {
            // SAFETY: the caller vouches for what is opened.
            Some(path) => unsafe { Torch::open(path)? },
            None => Torch::from_process()?,
        };
        notices.extend(host::check_torch(manifest.torch(), torch.abi_version()).map_err(in_file)?);
        // SAFETY: the caller vouches for the package.
        let library = unsafe { unpack_library(&artifact, &torch).map_err(in_file)? };
        let serving = Serving::open(&torch, &library, device, options.replicas)?;
        let live = packaged_weights(&artifact).map_err(in_file)?;
        let model = Self { artifact, torch, serving, device, signature, inputs, notices, live: Mutex::default() };
        if !live.is_empty() {
            model.bind(live, &mut model.live())?;
        }
        Ok(model)
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
    /// which it would not notice; [`ErrorKind::Usage`] for the wrong number of inputs; [`ErrorKind::Run`] if it fails.
    pub fn run(&self, inputs: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
        if inputs.len() != self.inputs.len() {
            let what = format!("{} inputs, the program takes {}", inputs.len(), self.inputs.len());
            return Err(Error::new(ErrorKind::Usage, what).in_file(self.artifact.path()));
        }
        self.check_inputs(&inputs).map_err(|error| error.in_file(self.artifact.path()))?;
        // SAFETY: every input has just been checked to be what the program was compiled for, and a program that writes
        // to buffers has one replica, so that its calls follow one another.
        Ok(unsafe { self.serving.run(inputs)? })
    }

    fn check_inputs(&self, inputs: &[Tensor]) -> Result<()> {
        let varying = if self.signature.is_dynamic() {
            let shapes = inputs.iter().map(|tensor| Ok(tensor.shape()?)).collect::<Result<Vec<_>>>()?;
            self.signature.expect(&shapes)?
        } else {
            Vec::new()
        };
        for (number, (tensor, wanted)) in inputs.iter().zip(&self.inputs).enumerate() {
            let of_input = |error: Error| match self.signature.inputs.get(number) {
                Some(input) => error.of_key(&input.name),
                None => error,
            };
            let expected = wanted.fixed.as_ref().or_else(|| varying.get(number));
            check_input(tensor, wanted, expected).map_err(of_input)?;
        }
        Ok(())
    }

    /// Replaces the weights, all or none, while calls are running.
    ///
    /// Calls do not wait for it, nor for one another because of it; only those of a program that writes to buffers wait
    /// while it switches. This returns when the last call has left the old weights, and their memory is released.
    ///
    /// Tensors of a mapped checkpoint whose layout is the slot's are used where they are, after their CRC was
    /// compared; all others are copied, those in memory always, so that a later edit of them changes nothing here.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if the plan has blocking findings; read errors. The old weights then stay.
    pub fn refit(&self, checkpoint: &Checkpoint, allow: Allow) -> Result<LiveReport> {
        let planned = plan(&self.artifact, checkpoint, allow)?;
        planned.check()?;
        let mut live = self.live();
        let mut next = live.clone();
        let mut nbytes_copied = 0;
        for refill in &planned.refills {
            let (Some(slot), Some(place)) = (self.artifact.slots().get(refill.slot), next.get_mut(refill.slot)) else {
                return Err(Error::new(ErrorKind::Usage, "the plan is of another package").of_key(&refill.name));
            };
            *place = if let Some(bytes) = shared_bytes(checkpoint, slot, refill.recipe.plain_key())? {
                bytes
            } else {
                nbytes_copied += slot.nbytes;
                let mut lines = Lines::zeroed(reweft::source::to_usize(slot.nbytes)?);
                refill.recipe.evaluate_into(checkpoint, lines.as_bytes_mut())?;
                SlotBytes::Own(Arc::new(lines))
            };
        }
        if !next.is_empty() {
            self.bind(next, &mut live)?;
        }
        Ok(report(&planned, checkpoint, nbytes_copied))
    }

    /// The weights in use, as a checkpoint under the slots' names. Shares the bytes of the weights and copies the
    /// buffers that the program writes to, for which it waits for the running call.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if a file has become shorter than its weights.
    pub fn state(&self) -> Result<Checkpoint> {
        let live = self.live();
        let _still = self.writes().then(|| self.serving.pause());
        let mut sources: Vec<Source> = Vec::with_capacity(live.len());
        let mut tensors = Vec::with_capacity(live.len());
        for (number, (slot, bytes)) in self.artifact.slots().iter().zip(&*live).enumerate() {
            let source: Source = match bytes {
                SlotBytes::Own(lines) if slot.mutated => Arc::new(lines.copy()),
                SlotBytes::Own(lines) => Arc::new(Window::new(Arc::clone(lines) as Source, 0, slot.nbytes)?),
                SlotBytes::Shared(source, byte_offset) => {
                    Arc::new(Window::new(Arc::clone(source), *byte_offset, slot.nbytes)?)
                }
            };
            let (shape, strides) = (slot.shape.clone(), slot.strides.clone());
            sources.push(source);
            let info = TensorInfo { dtype: slot.dtype, shape, strides, storage: number, storage_offset: 0 };
            tensors.push((slot.name.clone(), info));
        }
        Checkpoint::from_memory(Path::new("live weights"), sources, tensors)
    }

    /// Whether the program writes to buffers. It has one replica then.
    fn writes(&self) -> bool {
        self.artifact.slots().iter().any(|slot| slot.mutated)
    }

    /// Hands a full set of weights to the program and remembers where they are.
    fn bind(&self, next: Vec<SlotBytes>, live: &mut Vec<SlotBytes>) -> Result<()> {
        let mut bindings = Vec::with_capacity(next.len());
        for (slot, bytes) in self.artifact.slots().iter().zip(&next) {
            let (shape, strides) = (signed(&slot.shape)?, signed(&slot.strides)?);
            let (ptr, keep) = bytes.locate(slot)?;
            // SAFETY: `locate` gave the address of `slot.nbytes` bytes that `keep` owns, and the slot is dense, so that
            // shape and strides, which are those of the compiled program, reach no further. Bytes that are shared are
            // never written; bytes of slots that the program writes to are `Own`, one binding's and writable.
            let binding = unsafe { Binding::new(&slot.constant, ptr, shape, strides, slot.dtype, self.device, keep) };
            // A row has the size of the storage that the tensor was a view of when it was compiled.
            bindings.push(binding.in_storage_of(slot.row_nbytes));
        }
        // A buffer that is kept is bound to both containers, so no call may be in either while they change.
        let _still = self.writes().then(|| self.serving.pause());
        self.serving.replace(bindings)?;
        *live = next;
        Ok(())
    }

    fn live(&self) -> MutexGuard<'_, Vec<SlotBytes>> {
        // A panic in a refit leaves the old list in place, which is still what the program runs on.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotBytes {
    /// Address of the slot's bytes, and what keeps them there.
    fn locate(&self, slot: &Slot) -> Result<(*mut c_void, Arc<dyn std::any::Any + Send + Sync>)> {
        match self {
            Self::Own(lines) => Ok((lines.as_ptr(), Arc::clone(lines) as _)),
            Self::Shared(source, byte_offset) => {
                let Some(bytes) = source.as_slice() else {
                    return Err(Error::new(ErrorKind::Usage, "weights are not in memory").of_key(&slot.name));
                };
                let bytes = reweft::source::slice(bytes, *byte_offset, slot.nbytes)?;
                Ok((bytes.as_ptr().cast_mut().cast(), Arc::new(Arc::clone(source)) as _))
            }
        }
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
    if artifact.program().is_some_and(|program| program.models().iter().any(|model| model.extern_nodes.is_some())) {
        let what = "the program has operators that need a proxy executor, which is not supported yet";
        return Err(Error::new(ErrorKind::Unsupported, what).with_hint("torch's own aoti_load_package runs it"));
    }
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
fn check_device(manifest: &Manifest) -> Result<Device> {
    let device: Device = manifest.device().parse()?;
    if device.is_host() {
        return Ok(device);
    }
    let what = format!("the program is for {device}, on which running is not tested yet");
    Err(Error::new(ErrorKind::Unsupported, what).with_hint("inspect, plan and refit it on disk"))
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
    let counts = |dim: &usize| shape[*dim] > 1;
    if !shape.contains(&0) && (0..shape.len()).filter(counts).any(|dim| strides[dim] != expected.strides[dim]) {
        return differs("strides", format!("{strides:?}"), format!("{:?}", expected.strides));
    }
    Ok(())
}

/// Opens the package's library; where it is unpacked is the cache's matter.
///
/// # Safety
/// As [`Library::open`].
unsafe fn unpack_library(artifact: &Artifact, torch: &Torch) -> Result<Library> {
    let program = artifact.program().and_then(|program| Some((program.archive()?, program.models().first()?)));
    let (archive, model) = program.ok_or_else(|| Error::new(ErrorKind::Unsupported, "this is no compiled package"))?;
    // SAFETY: the caller vouches for the package.
    unsafe { open_library(torch, &archive.read(&model.library)?) }
}

/// The package's own weights: shared where they are, but for buffers that the program writes to.
fn packaged_weights(artifact: &Artifact) -> Result<Vec<SlotBytes>> {
    if artifact.slots().is_empty() {
        return Ok(Vec::new());
    }
    let place = |slot: &Slot| {
        let bytes = SlotBytes::Shared(Arc::clone(artifact.source()), artifact.place(slot)?);
        if slot.mutated || !is_aligned(&bytes, slot)? {
            return Ok(SlotBytes::Own(Arc::new(Lines::from_bytes(&artifact.read_slot(slot)?))));
        }
        Ok(bytes)
    };
    artifact.slots().iter().map(place).collect()
}

/// The checkpoint's own bytes for a slot, if they can serve as they are: mapped from a file, in the slot's layout.
fn shared_bytes(checkpoint: &Checkpoint, slot: &Slot, key: Option<&str>) -> Result<Option<SlotBytes>> {
    let Some(key) = key.filter(|_| !slot.mutated && checkpoint.format() != Format::Memory) else {
        return Ok(None);
    };
    let info = checkpoint.get(key)?;
    let in_place = |error: Error| error.of_key(key).in_file(checkpoint.file_of(info));
    let storage = checkpoint.storage_of(info).map_err(in_place)?;
    if storage.as_slice().map_err(in_place)?.is_none() {
        return Ok(None);
    }
    let Some((source, start)) = storage.locate().map_err(in_place)? else { return Ok(None) };
    let (first, _) = info.window(storage.nbytes)?;
    let bytes = SlotBytes::Shared(Arc::clone(source), start + first);
    Ok(is_aligned(&bytes, slot)?.then_some(bytes))
}

/// Whether the bytes begin at a multiple of the element size, as compiled code expects.
fn is_aligned(bytes: &SlotBytes, slot: &Slot) -> Result<bool> {
    let itemsize = reweft::source::to_usize(slot.dtype.itemsize().unwrap_or(1))?;
    Ok(bytes.locate(slot)?.0.addr().is_multiple_of(itemsize))
}

fn signed(sizes: &[u64]) -> Result<Vec<i64>> {
    let convert = |size: &u64| i64::try_from(*size).map_err(|_| Error::format(format!("size {size} is out of range")));
    sizes.iter().map(convert).collect()
}

fn report(planned: &Plan, checkpoint: &Checkpoint, nbytes_copied: u64) -> LiveReport {
    let findings = planned.findings.iter().map(Finding::to_string);
    LiveReport {
        slots: planned.refills.len(),
        kept: planned.kept.clone(),
        nbytes: planned.nbytes(),
        nbytes_copied,
        notices: findings.chain(checkpoint.notices().iter().cloned()).collect(),
    }
}
