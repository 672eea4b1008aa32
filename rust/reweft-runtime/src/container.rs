//! A container: instances of one compiled program over two sets of weights, one serving and one spare.

mod handles;

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::fmt;
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reweft::Dtype;

use self::handles::Handles;
use crate::binding::{Binding, Constant, ConstantKind, Weights};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::gate::{self, Gate};
use crate::library::{Library, Pair, RawContainer};
use crate::proxy::{self, Operators, Proxy};
use crate::symbols::Function;
use crate::tensor::Tensor;
use crate::torch::{RawTensor, Torch, text};

/// Names listed in a message about missing constants.
const NAMES_SHOWN: usize = 5;

/// A compiled program that runs and takes new weights while it runs.
///
/// It may be shared between threads: up to `replicas` calls run at the same time and further ones wait. One
/// refit happens at a time, beside the calls; it waits for the calls in flight only for the swap itself, and
/// calls that arrive meanwhile wait for the swap. Every call reads one set of weights from start to end.
///
/// Intra-operator threads are libtorch's: with several calling threads, `OMP_NUM_THREADS=1` is what scales.
pub struct Container {
    raw: NonNull<c_void>,
    torch: Torch,
    library: Library,
    device: Device,
    constants: Vec<Constant>,
    c_names: Vec<CString>,
    by_name: HashMap<String, usize>,
    input_names: Vec<String>,
    output_names: Vec<String>,
    /// Held by the one call at a time of a single-threaded container; others have none.
    alone: Option<Mutex<()>>,
    /// Calls enter, a swap closes it. Taken after `refit`, never before.
    gate: Gate,
    /// One refit or extraction at a time.
    refit: Mutex<Refit>,
    /// The weights that calls read. Replaced only while the gate is closed.
    active: Mutex<Active>,
    filled: AtomicBool,
    /// Boxed: the library is given its address.
    proxy: Option<Box<Proxy>>,
}

/// What one refit leaves to the next.
#[derive(Default)]
struct Refit {
    /// The weights of before, where the device may be reading them yet.
    retired: Option<Arc<Weights>>,
    handles: Handles,
}

/// The weights in use.
#[derive(Default)]
struct Active {
    weights: Arc<Weights>,
    /// Whether they are the container's own copy of weights from inside the library.
    own: bool,
}

/// A call that is inside: until it is dropped, the container keeps its weights.
pub(crate) struct Pass<'a> {
    container: &'a Container,
    _inside: gate::Shared<'a>,
}

// SAFETY: the library's functions may be called from any thread, and together as this type calls them: `Run`
// takes an instance from a locked pool, and `RunSingleThreaded` is behind `alone`; the update of the
// spare set and all that reads its tables are behind `refit`; the swap is behind the gate.
unsafe impl Send for Container {}
// SAFETY: the same.
unsafe impl Sync for Container {}

impl Container {
    /// Creates `replicas` instances of the program on `device`.
    ///
    /// Weights inside the library are copied to memory of the container's own; a library without them gives a
    /// container that must be filled by [`Container::refit`] before it runs. Constants are shared by all
    /// instances; what a call allocates is not. `single_threaded` bypasses the pool, which saves 0.2 microseconds a
    /// call; calls then run one after the other, whatever `replicas` is.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for no replicas, and for `single_threaded` with constants folded at run time (their
    /// folding needs the pool of instances). [`ErrorKind::Call`] if the library refuses, such as for a device it
    /// was not compiled for. [`ErrorKind::Symbol`] if it lacks a function that is needed.
    pub fn open(
        torch: &Torch,
        library: &Library,
        device: Device,
        replicas: usize,
        single_threaded: bool,
    ) -> Result<Self> {
        if replicas == 0 {
            return Err(Error::usage("replicas: found 0, want 1 or more"));
        }
        if single_threaded {
            let run = library.functions().run_single_threaded.as_ref();
            library.need(run, "AOTInductorModelContainerRunSingleThreaded")?;
        }
        let raw = create(library, device, replicas)?;
        let mut this = Self {
            raw,
            torch: torch.clone(),
            library: library.clone(),
            device,
            constants: Vec::new(),
            c_names: Vec::new(),
            by_name: HashMap::new(),
            input_names: Vec::new(),
            output_names: Vec::new(),
            alone: single_threaded.then(Mutex::default),
            gate: Gate::default(),
            refit: Mutex::default(),
            active: Mutex::default(),
            filled: AtomicBool::new(false),
            proxy: None,
        };
        // From here on dropping `this` deletes the container, whatever fails.
        this.read_tables()?;
        if this.folds() && single_threaded {
            return Err(Error::usage("single-threaded: the program folds constants at run time"));
        }
        this.adopt_own_weights()?;
        Ok(this)
    }

    /// Gives the program the operators that it leaves to its host, if it leaves any.
    #[must_use]
    pub fn with_operators(mut self, operators: Option<Arc<dyn Operators>>) -> Self {
        self.proxy = operators.map(|operators| Box::new(Proxy::new(&self.torch, operators)));
        self
    }

    fn read_tables(&mut self) -> Result<()> {
        let functions = self.library.functions();
        self.input_names = self.names(&functions.num_inputs, &functions.input_name)?;
        self.output_names = self.names(&functions.num_outputs, &functions.output_name)?;
        let count = self.get(&functions.num_constants)?;
        self.constants = (0..count).map(|row| self.constant(row)).collect::<Result<_>>()?;
        for (row, constant) in self.constants.iter().enumerate() {
            self.by_name.insert(constant.name.clone(), row);
            let c_name = CString::new(constant.name.as_str());
            self.c_names.push(c_name.map_err(|_| Error::usage("constant name with a NUL"))?);
        }
        if self.by_name.len() == self.constants.len() {
            return Ok(());
        }
        Err(Error::mismatch("two constants of the library have one name"))
    }

    /// Reads one row of the table of constants.
    fn constant(&self, row: usize) -> Result<Constant> {
        let functions = self.library.functions();
        let nbytes = self.item(&functions.constant_nbytes, row)?;
        let folded: bool = self.item(&functions.constant_folded, row)?;
        Ok(Constant {
            name: self.name(&functions.constant_name, row)?,
            fqn: self.name(&functions.constant_fqn, row)?,
            dtype: Dtype::from_c10(self.item(&functions.constant_dtype, row)?),
            nbytes: u64::try_from(nbytes).map_err(|_| Error::usage("constant size overflows"))?,
            kind: ConstantKind::from_code(self.item(&functions.constant_kind, row)?),
            folded,
        })
    }

    /// Notes the weights that the library brought, if it brought all of them.
    fn adopt_own_weights(&self) -> Result<()> {
        let wanted = self.constants.iter().filter(|constant| !constant.folded).count();
        let own = match self.library.functions().extract {
            Some(_) => self.entries()?,
            None => Vec::new(),
        };
        let tensors: Vec<Tensor> = own.into_iter().map(|(_, tensor)| tensor).collect();
        if tensors.len() == wanted {
            *self.active() = Active { weights: Arc::new(Weights::inside(&tensors)), own: true };
            self.filled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The constants of the program in the order of its table, folded ones included.
    pub fn constants(&self) -> &[Constant] {
        &self.constants
    }

    /// How many tensors a call takes.
    pub fn num_inputs(&self) -> usize {
        self.input_names.len()
    }

    /// How many tensors a call returns, absent ones included.
    pub fn num_outputs(&self) -> usize {
        self.output_names.len()
    }

    /// Names of the inputs in the compiled code (`arg18_1`).
    pub fn input_names(&self) -> &[String] {
        &self.input_names
    }

    /// Names of the outputs in the compiled code (`output0`).
    pub fn output_names(&self) -> &[String] {
        &self.output_names
    }

    /// The device the program runs on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether every constant has bytes, so that the program may run.
    ///
    /// True from the start for a library with its weights inside, provided it exports
    /// `AOTInductorModelContainerExtractConstantsMapEntries` to tell (torch 2.13 does).
    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Whether constants are computed at run time from others.
    fn folds(&self) -> bool {
        self.constants.iter().any(|constant| constant.folded)
    }

    /// How inputs and outputs nest: two texts of torch's pytree JSON, for inputs and for outputs.
    ///
    /// # Errors
    /// [`ErrorKind::Symbol`] if the library does not export it; [`ErrorKind::Call`] if it refuses.
    pub fn call_spec(&self) -> Result<(String, String)> {
        let spec = self.library.functions().call_spec.as_ref();
        let spec = self.library.need(spec, "AOTInductorModelContainerGetCallSpec")?;
        let (mut input, mut output) = (null(), null());
        // SAFETY: the container is live (invariant of the type) and both are writable.
        let status = unsafe { (spec.call)(self.raw(), &raw mut input, &raw mut output) };
        self.library.check(spec, status)?;
        // SAFETY: strings that live as long as the container.
        Ok(unsafe { (text(input).unwrap_or_default(), text(output).unwrap_or_default()) })
    }

    /// Replaces all weights at once. Copies no byte of them.
    ///
    /// The spare set is filled beside the calls; then the gate closes, calls in flight end, the sets swap, and
    /// constants that the program folds at run time are computed from the new weights. Calls that start later
    /// read the new weights only. What the old bindings kept alive is dropped before this returns, except on
    /// devices that run behind the caller's back: there it is held until the next refit, and the
    /// caller makes sure that work issued before one refit has finished before the next.
    ///
    /// A constant the program writes to starts from the bytes bound now and is written in place, so bind
    /// fresh private bytes to reset it, or the same memory again to carry its value over.
    ///
    /// Cost: time linear in the number of constants (measured: 8 microseconds for 17 on an idle container), the
    /// wait for calls in flight, and the folding if any. The first refit of a library binds its constants twice more.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] unless every constant that is not folded has exactly one binding of its dtype and
    /// size at an aligned address. [`ErrorKind::Call`] if the library refuses, such as for a constant on another
    /// device, or if folding fails. After an error the weights of before serve on, and the new ones are dropped.
    pub fn refit(&self, bindings: Vec<Binding>) -> Result<()> {
        let rows = self.check(&bindings)?;
        let tensors = bindings.iter().map(|binding| binding.tensor(&self.torch));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let pair =
            |(row, tensor): (&usize, &Tensor)| Pair { name: self.c_names[*row].as_ptr(), tensor: tensor.as_raw() };
        let pairs: Vec<Pair> = rows.iter().zip(&tensors).map(pair).collect();

        let mut refit = lock(&self.refit);
        self.update(&pairs, &mut refit.handles)?;
        let old = self.activate(Weights::bound(bindings), &mut refit.handles)?;
        if old.own {
            self.free_spare();
        }
        let asynchronous = !self.device.is_host();
        let finished = if asynchronous { refit.retired.replace(old.weights) } else { Some(old.weights) };
        // What bindings keep is dropped outside our lock, as it is the caller's code that runs then.
        drop(refit);
        drop(finished);
        Ok(())
    }

    /// Makes the spare set the active one and returns what was active, which no call reads any more.
    fn activate(&self, weights: Weights, handles: &mut Handles) -> Result<Active> {
        let _alone = self.gate.close();
        self.swap(handles)?;
        if let Err(error) = self.fold() {
            // The set of before is as it was, folded constants included: it only has to be swapped back.
            if self.swap(handles).is_err() {
                self.filled.store(false, Ordering::Release);
            }
            return Err(error);
        }
        self.filled.store(true, Ordering::Release);
        let new = Active { weights: Arc::new(weights), own: false };
        Ok(std::mem::replace(&mut *self.active(), new))
    }

    /// Swaps the sets. The gate is closed.
    fn swap(&self, handles: &mut Handles) -> Result<()> {
        let swap = &self.library.functions().swap;
        // SAFETY: the container is live (invariant of the type).
        self.library.check(swap, unsafe { (swap.call)(self.raw()) })?;
        handles.swap();
        Ok(())
    }

    /// Computes the folded constants of the active set. The gate is closed.
    ///
    /// The library can fold the spare set beside the calls, but then it copies constants of kind
    /// `TensorConstant` over from the active set, undoing the update, and if folding fails it leaves one
    /// instance on the spare set (read in torch 2.15, `model_container.h`). Hence after the swap.
    fn fold(&self) -> Result<()> {
        if !self.folds() {
            return Ok(());
        }
        let fold = self.library.functions().fold.as_ref();
        let fold = self.library.need(fold, "AOTInductorModelContainerRunConstantFolding")?;
        // SAFETY: the container is live, all constants are bound, and the gate keeps calls out.
        let status = unsafe { (fold.call)(self.raw(), false, null_mut(), self.proxy()) };
        self.check_call(fold, status)
    }

    /// Gives back the container's own copy of the weights, now that no call reads it. Saves memory, so a
    /// failure does not matter.
    fn free_spare(&self) {
        // Freeing leaves empty handles at folded constants, which the next update would look into.
        let free = self.library.functions().free_inactive.as_ref();
        if let Some(free) = free.filter(|_| self.device.is_host() && !self.folds()) {
            // SAFETY: the container is live and `refit` is locked. The spare set's handles now dangle; the
            // next update replaces all of them before anything reads them.
            unsafe { (free.call)(self.raw()) };
        }
    }

    /// Checks that `bindings` are a full set; returns the row of each.
    fn check(&self, bindings: &[Binding]) -> Result<Vec<usize>> {
        let mut rows = Vec::with_capacity(bindings.len());
        let mut bound = vec![false; self.constants.len()];
        for binding in bindings {
            // The library ignores names it does not know.
            let name = binding.name();
            let row = *self.by_name.get(name).ok_or_else(|| {
                Error::mismatch(format!("binding \"{name}\": the program has no constant of that name"))
            })?;
            binding.check(&self.constants[row])?;
            if std::mem::replace(&mut bound[row], true) {
                return Err(Error::mismatch(format!("constant \"{name}\": found two bindings, want one")));
            }
            rows.push(row);
        }
        let missing = self.constants.iter().zip(&bound).filter(|(row, bound)| !row.folded && !**bound);
        let missing: Vec<&str> = missing.map(|(row, _)| row.name.as_str()).collect();
        if missing.is_empty() {
            return Ok(rows);
        }
        let shown = missing[..missing.len().min(NAMES_SHOWN)].join(", ");
        let more = if missing.len() > NAMES_SHOWN { ", ..." } else { "" };
        Err(Error::mismatch(format!("{} constants have no binding: {shown}{more}", missing.len())))
    }

    /// Runs the program. The library takes the inputs; they are deleted when it is done with them.
    ///
    /// An output is `None` where the program returns none. Outputs are the caller's and share no memory with the
    /// weights; they may share it with inputs and with one another, as the program says. On devices
    /// other than the host the work goes to the default stream and this returns before it is done.
    ///
    /// Programs with operators that need a proxy executor fail at the operator, unless
    /// [`with_operators`](Self::with_operators) gave some. The library also prints its errors on stderr.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for the wrong number of inputs and [`ErrorKind::WeightsMissing`] for a container
    /// never filled; the program is not called. [`ErrorKind::Call`] if it fails. The inputs are gone in any case.
    ///
    /// # Safety
    /// Each input has the dtype, shape, strides and device the program was compiled for, within the ranges of
    /// its dynamic dimensions. The library looks at none of them unless `AOTI_RUNTIME_CHECK_INPUTS=1` is in
    /// the environment before its first call: it indexes memory by the numbers it was compiled with.
    /// A program that writes to a buffer has one replica, or is called by one thread at a time.
    pub unsafe fn run(&self, inputs: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
        // SAFETY: passed on to the caller.
        unsafe { self.enter().run(inputs) }
    }

    /// Waits for a refit that is swapping, if there is one.
    pub(crate) fn enter(&self) -> Pass<'_> {
        Pass { container: self, _inside: self.gate.enter() }
    }

    /// Waits for the calls inside and lets go of all weights. The container must be refitted before it runs again.
    ///
    /// What the bindings kept alive is dropped before this returns, with the exception that [`Container::refit`] makes.
    /// The library keeps handles to memory that may be gone; it reads none of them, as it is not called unfilled.
    pub(crate) fn clear(&self) {
        let mut refit = lock(&self.refit);
        let old = {
            let _alone = self.gate.close();
            self.filled.store(false, Ordering::Release);
            std::mem::take(&mut *self.active())
        };
        let finished = if self.device.is_host() { Some(old.weights) } else { refit.retired.replace(old.weights) };
        drop(refit);
        drop(finished);
    }

    /// # Safety
    /// As [`Container::run`], inside the gate, and with `alone` held where there is one.
    unsafe fn call(&self, inputs: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
        if !self.is_filled() {
            let message = "the program has constants without bytes; refit it before it runs";
            return Err(Error::new(ErrorKind::WeightsMissing, message));
        }
        let functions = self.library.functions();
        let single = functions.run_single_threaded.as_ref().filter(|_| self.alone.is_some());
        let run = single.unwrap_or(&functions.run);
        let mut handles: Vec<RawTensor> = inputs.into_iter().map(Tensor::into_raw).collect();
        let mut outputs: Vec<RawTensor> = vec![null_mut(); self.num_outputs()];
        let (input, output) = (handles.as_mut_ptr(), outputs.as_mut_ptr());
        // SAFETY: the container is live and filled, both arrays have the lengths given (the library checks
        // these itself), and the caller vouches for the inputs. Null is the default stream; the proxy is
        // live as long as the container.
        let status =
            unsafe { (run.call)(self.raw(), input, handles.len(), output, outputs.len(), null_mut(), self.proxy()) };
        let status = self.check_call(run, status);
        // The library puts null where it took a handle; what it failed to take is still ours to delete.
        // SAFETY: for both, the handles left in the arrays are live and nobody else's.
        drop(unsafe { self.adopt(&handles) });
        // SAFETY: the same; a call that failed may have written some of its outputs.
        let outputs = unsafe { self.adopt(&outputs) };
        status?;
        self.detached(outputs?)
    }

    /// Takes ownership of handles. A program that returns one tensor twice writes one handle twice.
    ///
    /// # Safety
    /// Every handle is null or live, and nobody else's.
    unsafe fn adopt(&self, handles: &[RawTensor]) -> Result<Vec<Option<Tensor>>> {
        let mut tensors: Vec<Option<Tensor>> = Vec::with_capacity(handles.len());
        let mut failure = None;
        for (position, &raw) in handles.iter().enumerate() {
            let first = handles[..position].iter().position(|&other| other == raw);
            let tensor = match first.and_then(|first| tensors[first].as_ref()) {
                _ if raw.is_null() => None,
                Some(tensor) => Some(tensor.try_clone()),
                // SAFETY: the first time this handle is met; the caller vouches for it.
                None => Some(unsafe { Tensor::from_raw(&self.torch, raw) }),
            };
            // After a failure the rest is still adopted, so that it is deleted.
            tensors.push(tensor.and_then(|tensor| tensor.map_err(|error| failure = Some(error)).ok()));
        }
        failure.map_or(Ok(tensors), Err)
    }

    /// Copies outputs that are views of weights: those may be gone before the output is. The compiler copies
    /// constants it returns, but an operator's own view of one gets through.
    fn detached(&self, mut outputs: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let weights = Arc::clone(&self.active().weights);
        for output in outputs.iter_mut().flatten() {
            if output.data_ptr().is_ok_and(|ptr| weights.contain(ptr)) {
                *output = output.try_copy()?;
            }
        }
        Ok(outputs)
    }

    /// Copies the weights in use, by their names in the source; folded constants are not among them.
    ///
    /// Calls and refits wait meanwhile, so that a buffer the program writes to is not caught half written. Cost:
    /// reads and allocates all bytes.
    ///
    /// # Errors
    /// [`ErrorKind::WeightsMissing`] for a container never filled, [`ErrorKind::Symbol`] if the library does
    /// not export the function, [`ErrorKind::Call`] if it refuses or memory runs out.
    pub fn extract(&self) -> Result<Vec<(String, Tensor)>> {
        let _refit = lock(&self.refit);
        let _alone = self.gate.close();
        if !self.is_filled() {
            return Err(Error::new(ErrorKind::WeightsMissing, "no weights to extract; refit first"));
        }
        let entries = self.entries()?.into_iter();
        entries.map(|(fqn, tensor)| Ok((fqn, tensor.try_copy()?))).collect()
    }

    /// The tensors of the active set, sharing its memory. Nobody else is in the gate, or knows of `self` yet.
    fn entries(&self) -> Result<Vec<(String, Tensor)>> {
        let entry = |pair: &Pair| {
            // SAFETY: the name lives as long as the entries.
            let fqn = unsafe { text(pair.name) }.unwrap_or_default();
            // SAFETY: the handle is live.
            Ok((fqn, unsafe { Tensor::share(&self.torch, pair.tensor)? }))
        };
        self.pairs(false)?.iter().map(entry).collect()
    }

    /// The library's names and handles of one set; folded constants are not among them. `refit` is locked, or nobody else
    /// knows of `self` yet.
    fn pairs(&self, spare: bool) -> Result<&[Pair]> {
        let extract = self.library.functions().extract.as_ref();
        let extract = self.library.need(extract, "AOTInductorModelContainerExtractConstantsMapEntries")?;
        let (mut first, mut count) = (null(), 0);
        // SAFETY: the container is live (invariant of the type) and both are writable.
        let status = unsafe { (extract.call)(self.raw(), &raw mut first, &raw mut count, spare) };
        self.library.check(extract, status)?;
        if count == 0 || first.is_null() {
            return Ok(&[]);
        }
        // SAFETY: `count` entries that live until the next such call, which `refit` keeps away.
        Ok(unsafe { std::slice::from_raw_parts(first, count) })
    }

    /// Turns the status of a call that may have run operators of the host into a result.
    fn check_call<F>(&self, function: &Function<F>, status: i32) -> Result<()> {
        let failure = proxy::take_failure();
        if status == 0 { Ok(()) } else { failure.map_or_else(|| self.library.check(function, status), Err) }
    }

    fn proxy(&self) -> *mut c_void {
        self.proxy.as_ref().map_or(null_mut(), |proxy| proxy.as_raw())
    }

    fn raw(&self) -> RawContainer {
        self.raw.as_ptr()
    }

    fn active(&self) -> MutexGuard<'_, Active> {
        lock(&self.active)
    }

    /// Asks for a number.
    fn get(&self, get: &Function<unsafe extern "C-unwind" fn(RawContainer, *mut usize) -> i32>) -> Result<usize> {
        let mut found = 0;
        // SAFETY: the container is live (invariant of the type) and `found` is writable.
        self.library.check(get, unsafe { (get.call)(self.raw(), &raw mut found) })?;
        Ok(found)
    }

    /// Asks for one field of a row.
    fn item<T: Default>(
        &self,
        get: &Function<unsafe extern "C-unwind" fn(RawContainer, usize, *mut T) -> i32>,
        row: usize,
    ) -> Result<T> {
        let mut found = T::default();
        // SAFETY: the container is live (invariant of the type) and `found` is writable; the library checks `row`.
        self.library.check(get, unsafe { (get.call)(self.raw(), row, &raw mut found) })?;
        Ok(found)
    }

    /// Asks for the name of a row.
    fn name(
        &self,
        get: &Function<unsafe extern "C-unwind" fn(RawContainer, usize, *mut *const c_char) -> i32>,
        row: usize,
    ) -> Result<String> {
        let mut found = null();
        // SAFETY: as in `item`.
        self.library.check(get, unsafe { (get.call)(self.raw(), row, &raw mut found) })?;
        // SAFETY: the string lives as long as the container.
        Ok(unsafe { text(found) }.unwrap_or_default())
    }

    fn names(
        &self,
        count: &Function<unsafe extern "C-unwind" fn(RawContainer, *mut usize) -> i32>,
        name: &Function<unsafe extern "C-unwind" fn(RawContainer, usize, *mut *const c_char) -> i32>,
    ) -> Result<Vec<String>> {
        (0..self.get(count)?).map(|row| self.name(name, row)).collect()
    }
}

impl Pass<'_> {
    /// Runs the program as [`Container::run`] does.
    ///
    /// # Errors
    /// As [`Container::run`].
    ///
    /// # Safety
    /// As [`Container::run`].
    pub unsafe fn run(&self, inputs: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
        let (found, wanted) = (inputs.len(), self.container.num_inputs());
        if found != wanted {
            return Err(Error::usage(format!("inputs: found {found}, want {wanted}")));
        }
        // The gate could do this too, but handing it on in strict order costs a switch of threads a call.
        let _alone = self.container.alone.as_ref().map(lock);
        // SAFETY: passed on to the caller; inside the gate, and alone where that is asked for.
        unsafe { self.container.call(inputs) }
    }
}

/// Locks. What these mutexes guard is replaced in one step, so a panic elsewhere leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn create(library: &Library, device: Device, replicas: usize) -> Result<NonNull<c_void>> {
    let create = &library.functions().create;
    let c_text = |text: String| CString::new(text).map_err(|_| Error::usage("path of the library: found a NUL"));
    let device = c_text(device.to_string())?;
    // Kernels of other devices are unpacked beside the library.
    let folder = library.path().parent().unwrap_or(library.path()).to_string_lossy();
    let folder = c_text(folder.into_owned())?;
    let mut raw = null_mut();
    // SAFETY: `raw` is writable and both strings live through the call.
    let status = unsafe { (create.call)(&raw mut raw, replicas, device.as_ptr(), folder.as_ptr()) };
    library.check(create, status)?;
    NonNull::new(raw).ok_or_else(|| Error::new(ErrorKind::Call, format!("{}: no container", create.name)))
}

impl Drop for Container {
    fn drop(&mut self) {
        // The weights are dropped after this, with the fields, and handles that the library forgets.
        // SAFETY: the container is live and ours, and no call is inside: those borrow `self`.
        unsafe { (self.library.functions().delete.call)(self.raw()) };
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container")
            .field("library", &self.library)
            .field("device", &self.device)
            .field("constants", &self.constants.len())
            .field("filled", &self.is_filled())
            .finish_non_exhaustive()
    }
}
