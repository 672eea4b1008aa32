//! Serving: two containers of one program, so that no call waits because the weights change.
//!
//! Calls run in one container while the other takes the new weights; then new calls go to the other. The refit waits for
//! the calls that are still in the first, and lets go of the old weights; nobody else waits for them.
//!
//! Locks are taken in the order `Model::live`, permit, `current`, gate, and a permit is never held while `live` is taken.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::binding::Binding;
use crate::container::{Container, Pass};
use crate::device::Device;
use crate::error::Result;
use crate::library::Library;
use crate::permits::{Interrupted, Permit, Permits};
use crate::proxy::Operators;
use crate::reentry::{self, Here};
use crate::tensor::Tensor;
use crate::torch::Torch;

pub(crate) struct Serving {
    torch: Torch,
    library: Library,
    device: Device,
    replicas: usize,
    single_threaded: bool,
    operators: Option<Arc<dyn Operators>>,
    first: Container,
    /// Made by the first replacement: a model that is never refitted needs none.
    second: OnceLock<Container>,
    /// Whether calls go to the second container.
    on_second: Mutex<bool>,
    permits: Permits,
}

impl Serving {
    /// Makes a container without weights.
    ///
    /// # Errors
    /// As [`Container::open`].
    pub fn open(
        torch: &Torch,
        library: &Library,
        device: Device,
        replicas: usize,
        single_threaded: bool,
        operators: Option<Arc<dyn Operators>>,
    ) -> Result<Self> {
        let first = Container::open(torch, library, device, replicas, single_threaded)?;
        let first = first.with_operators(operators.clone());
        Ok(Self {
            torch: torch.clone(),
            library: library.clone(),
            device,
            replicas,
            single_threaded,
            operators,
            first,
            second: OnceLock::new(),
            on_second: Mutex::new(false),
            permits: Permits::new(replicas),
        })
    }

    /// Calls that may run at the same time.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// Whether calls follow one another, without a pool of instances.
    pub fn is_single_threaded(&self) -> bool {
        self.single_threaded
    }

    /// The operators that the program leaves to its host, if there are any.
    pub fn operators(&self) -> Option<Arc<dyn Operators>> {
        self.operators.clone()
    }

    /// What both containers have in common: the program and its signature.
    pub fn program(&self) -> &Container {
        &self.first
    }

    /// Runs the program, when one of `replicas` calls is free, on the weights that are newest then.
    ///
    /// # Errors
    /// As [`Container::run`], and [`Permits::acquire`].
    ///
    /// # Safety
    /// As [`Container::run`].
    pub unsafe fn run(&self, inputs: Vec<Tensor>, interrupted: Interrupted<'_>) -> Result<Vec<Option<Tensor>>> {
        let _permit = self.permits.acquire(interrupted)?;
        let _here = self.note();
        // SAFETY: passed on to the caller.
        unsafe { self.enter().run(inputs) }
    }

    /// Runs the program once for each chunk, all on one set of weights, as many at a time as permits are free. Every thread
    /// that helps calls `prepare` first, and drops what it gives at the end.
    ///
    /// # Errors
    /// As [`run`](Self::run), of the first chunk that failed; chunks that have not begun by then are not run.
    ///
    /// # Safety
    /// As [`Container::run`], for every chunk.
    pub unsafe fn run_chunks<T>(
        &self,
        chunks: Vec<Vec<Tensor>>,
        prepare: &(dyn Fn() -> T + Sync),
        interrupted: Interrupted<'_>,
    ) -> Result<Vec<Vec<Option<Tensor>>>> {
        let _permit = self.permits.acquire(interrupted)?;
        let _here = self.note();
        let helpers: Vec<Permit<'_>> = (1..chunks.len()).map_while(|_| self.permits.try_acquire()).collect();
        let pass = self.enter();
        let outputs: Mutex<Vec<Option<Vec<Option<Tensor>>>>> = Mutex::new(chunks.iter().map(|_| None).collect());
        let (queue, failed) = (Mutex::new(chunks.into_iter().enumerate()), Mutex::new(None));
        let work = || {
            loop {
                let next = lock(&queue).next();
                let Some((number, inputs)) = next.filter(|_| lock(&failed).is_none()) else { return };
                // SAFETY: passed on to the caller.
                match unsafe { pass.run(inputs) } {
                    Ok(made) => lock(&outputs)[number] = Some(made),
                    Err(error) => drop(lock(&failed).get_or_insert(error)),
                }
            }
        };
        std::thread::scope(|scope| {
            for helper in helpers {
                let work = &work;
                scope.spawn(move || {
                    let _permit = helper;
                    let _here = self.note();
                    let _prepared = prepare();
                    work();
                });
            }
            work();
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(outputs.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()),
        }
    }

    /// Notes that a call, or a refit, is on this thread.
    pub fn note(&self) -> Here {
        Here::enter(self)
    }

    /// Whether a call or a refit is on this thread, for which whatever waits for it would wait for ever.
    pub fn is_here(&self) -> bool {
        reentry::is_here(self)
    }

    /// Waits until one call less runs, before all calls that wait. With one replica none runs then.
    pub fn pause(&self) -> Permit<'_> {
        self.permits.acquire_first()
    }

    /// Enters the container that serves. Whoever is in reads one set of weights.
    fn enter(&self) -> Pass<'_> {
        let on_second = self.lock();
        // Entered under the lock: a refit that switches afterwards waits for this call.
        self.side(*on_second).enter()
    }

    /// Replaces all weights. One at a time: the caller holds a lock.
    ///
    /// The old weights are gone when this returns. A program that writes to buffers has one replica, and the caller has
    /// paused it.
    ///
    /// # Errors
    /// As [`Container::refit`]; the old weights then serve on.
    pub fn replace(&self, bindings: Vec<Binding>) -> Result<()> {
        let on_second = *self.lock();
        let serves = self.side(on_second);
        if !serves.is_filled() {
            return serves.refit(bindings);
        }
        let idle = if on_second { &self.first } else { self.second()? };
        idle.refit(bindings)?;
        *self.lock() = !on_second;
        serves.clear();
        Ok(())
    }

    /// The second container, made when it is needed first.
    fn second(&self) -> Result<&Container> {
        if let Some(second) = self.second.get() {
            return Ok(second);
        }
        let second = Container::open(&self.torch, &self.library, self.device, self.replicas, self.single_threaded)?;
        Ok(self.second.get_or_init(|| second.with_operators(self.operators.clone())))
    }

    fn side(&self, on_second: bool) -> &Container {
        self.second.get().filter(|_| on_second).unwrap_or(&self.first)
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        lock(&self.on_second)
    }
}

/// Locks. What these mutexes guard is replaced in one step, so a panic elsewhere leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
