//! How many calls run at the same time.
//!
//! A call that waits does so here, before it has chosen its weights, so that it runs on the newest ones. Calls do not
//! queue among themselves: handing permits on in strict order costs a switch of threads a call. A refit that needs the
//! program to stand still goes before all of them, or two threads that call in a loop would keep it waiting.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// How long a call waits before it asks whether to give up, again and again.
const ASK_AFTER: Duration = Duration::from_millis(100);

/// Whether a call that waits for others is to give up; asked about ten times a second, on the thread of the call, which
/// holds no lock then.
pub type Interrupted<'a> = &'a (dyn Fn() -> bool + Sync);

pub(crate) struct Permits {
    state: Mutex<State>,
    freed: Condvar,
    freed_for_first: Condvar,
}

struct State {
    free: usize,
    /// Calls that wait. Without any, nobody has to be woken, which would cost the system a call.
    waiting: usize,
    /// Who goes before all calls, and waits.
    first: usize,
}

impl State {
    /// Whether a call has to wait.
    fn is_busy(&self) -> bool {
        self.free == 0 || self.first > 0
    }
}

/// The right to run one call, or to know that one less runs.
pub(crate) struct Permit<'a>(&'a Permits);

impl Permits {
    pub fn new(count: usize) -> Self {
        let state = Mutex::new(State { free: count, waiting: 0, first: 0 });
        Self { state, freed: Condvar::new(), freed_for_first: Condvar::new() }
    }

    /// Waits for a permit.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] if it is told to give up.
    pub fn acquire(&self, interrupted: Interrupted<'_>) -> Result<Permit<'_>> {
        let mut state = self.lock();
        while state.is_busy() {
            state.waiting += 1;
            let (found, waited) = self.freed.wait_timeout(state, ASK_AFTER).unwrap_or_else(PoisonError::into_inner);
            state = found;
            state.waiting -= 1;
            // Whoever was woken takes the permit and does not ask, so that no wake-up is lost.
            if waited.timed_out() && state.is_busy() {
                drop(state);
                if interrupted() {
                    return Err(Error::new(ErrorKind::Interrupted, "the call was given up while it waited for others"));
                }
                state = self.lock();
            }
        }
        state.free -= 1;
        Ok(Permit(self))
    }

    /// Takes a permit if one is free and nobody waits to go first.
    pub fn try_acquire(&self) -> Option<Permit<'_>> {
        let mut state = self.lock();
        if state.is_busy() {
            return None;
        }
        state.free -= 1;
        Some(Permit(self))
    }

    /// Waits for a permit before all calls that wait.
    pub fn acquire_first(&self) -> Permit<'_> {
        let mut state = self.lock();
        state.first += 1;
        while state.free == 0 {
            state = self.freed_for_first.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.first -= 1;
        state.free -= 1;
        if state.first == 0 && state.free > 0 {
            self.freed.notify_all();
        }
        Permit(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.free += 1;
        match (state.first, state.waiting) {
            (0, 0) => {}
            (0, _) => self.0.freed.notify_one(),
            _ => self.0.freed_for_first.notify_one(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
    use std::thread;
    use std::time::{Duration, Instant};

    fn acquire(permits: &Permits) -> Permit<'_> {
        permits.acquire(&|| false).unwrap()
    }

    #[test]
    fn a_call_that_waits_can_be_given_up_and_takes_no_permit_with_it() {
        let permits = Permits::new(1);
        let held = acquire(&permits);
        let asked = AtomicUsize::new(0);
        let error = permits.acquire(&|| asked.fetch_add(1, SeqCst) == 2).err().unwrap();
        assert_eq!((error.kind(), asked.load(SeqCst)), (ErrorKind::Interrupted, 3));
        thread::scope(|scope| {
            let first = scope.spawn(|| drop(permits.acquire_first()));
            while permits.lock().first == 0 {
                thread::yield_now();
            }
            assert!(permits.acquire(&|| true).is_err());
            drop(held);
            first.join().unwrap();
        });
        // One that is free is taken without a question.
        drop(permits.acquire(&|| true).unwrap());
        assert_eq!(permits.lock().free, 1);
    }

    #[test]
    fn no_more_run_than_there_are_permits() {
        for count in [1, 3] {
            let (permits, inside, most) = (Permits::new(count), AtomicUsize::new(0), AtomicUsize::new(0));
            thread::scope(|scope| {
                for number in 0..6 {
                    let (permits, inside, most) = (&permits, &inside, &most);
                    scope.spawn(move || {
                        for _ in 0..300 {
                            let _permit = if number == 0 { permits.acquire_first() } else { acquire(permits) };
                            most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                            thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                        }
                    });
                }
            });
            assert!(most.load(SeqCst) <= count);
            assert_eq!(permits.lock().free, count);
        }
    }

    #[test]
    fn one_who_goes_first_is_not_kept_waiting_by_a_loop_of_calls() {
        let (permits, stop) = (Permits::new(1), AtomicBool::new(false));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(SeqCst) {
                        let _permit = acquire(&permits);
                        thread::sleep(Duration::from_micros(200));
                    }
                });
            }
            let start = Instant::now();
            for _ in 0..100 {
                drop(permits.acquire_first());
            }
            stop.store(true, SeqCst);
            // Each waits for at most the one call that runs.
            assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        });
    }
}
