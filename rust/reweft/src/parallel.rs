//! Work in numbered pieces on a few threads.

use std::fmt;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use crate::error::{Error, Result};
use crate::write::Progress;

/// More threads than this wait for memory and not for the processor.
const MAX_THREADS: usize = 4;

/// What is done of a job, told from any of its threads.
pub struct Progressed<'a> {
    done: AtomicU64,
    total: u64,
    stop: AtomicBool,
    tell: Mutex<&'a mut (dyn FnMut(u64, u64) + Send)>,
}

impl fmt::Debug for Progressed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progressed").field("done", &self.done).field("total", &self.total).finish_non_exhaustive()
    }
}

impl Progressed<'_> {
    /// Adds bytes that are done.
    ///
    /// # Errors
    /// If another thread failed: the work is in vain.
    pub fn add(&self, nbytes: u64) -> Result<()> {
        let done = self.done.fetch_add(nbytes, Ordering::Relaxed) + nbytes;
        if let Ok(mut tell) = self.tell.try_lock() {
            tell(done.min(self.total), self.total);
        }
        if self.stop.load(Ordering::Relaxed) { Err(Error::format("stopped")) } else { Ok(()) }
    }
}

/// Does `work` for every number below `count`, each once, in order of their beginning. Gives the results by number.
///
/// # Errors
/// The first one of any piece; the others then end as soon as they can.
///
/// # Examples
/// ```
/// let squares = reweft::parallel::run(4, 0, &|number, _| Ok(number * number), &mut |_, _| ())?;
/// assert_eq!(squares, [0, 1, 4, 9]);
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn run<T: Send>(
    count: usize,
    total: u64,
    work: &(dyn Fn(usize, &Progressed<'_>) -> Result<T> + Sync),
    progress: Progress<'_>,
) -> Result<Vec<T>> {
    let done = Progressed { done: AtomicU64::new(0), total, stop: AtomicBool::new(false), tell: Mutex::new(progress) };
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let results: Mutex<Vec<(usize, T)>> = Mutex::new(Vec::with_capacity(count));
    let take = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || done.stop.load(Ordering::Relaxed) {
                return;
            }
            match work(number, &done) {
                Ok(result) => guard(&results).push((number, result)),
                Err(error) => {
                    // Whoever was first has the error that counts; others were stopped by it.
                    if !done.stop.swap(true, Ordering::Relaxed) {
                        *guard(&failed) = Some(error);
                    }
                }
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS).min(count);
    thread::scope(|scope| {
        // Without further threads this one does everything.
        let others: Vec<_> =
            (1..threads).filter_map(|_| thread::Builder::new().spawn_scoped(scope, take).ok()).collect();
        take();
        drop(others);
    });
    if let Some(error) = guard(&failed).take() {
        return Err(error);
    }
    let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_unstable_by_key(|(number, _)| *number);
    if results.len() != count {
        return Err(Error::format("a thread ended before its work"));
    }
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

fn guard<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
