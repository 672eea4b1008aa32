//! A first-come, first-served gate: calls pass together, a swap passes alone.
//!
//! The container has a lock of its own, but glibc's prefers readers: two threads that call in a loop keep a
//! swap waiting without bound. `std::sync::RwLock` promises no order at all. Here everyone takes a ticket, so
//! a swap waits for the calls in front of it and nothing else, and a loop of swaps cannot shut calls out.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    /// The ticket the next arrival takes.
    next: u64,
    /// The ticket whose turn it is.
    serving: u64,
    /// Calls that are inside.
    inside: usize,
}

/// Passage for a call, together with others.
pub(crate) struct Shared<'a>(&'a Gate);

/// Passage for a swap, alone.
pub(crate) struct Exclusive<'a>(&'a Gate);

impl Gate {
    /// Waits for one's turn and enters beside the calls that are inside.
    pub fn enter(&self) -> Shared<'_> {
        let mut state = self.turn(|_| true);
        state.serving += 1;
        state.inside += 1;
        self.wake(&state);
        Shared(self)
    }

    /// Waits for one's turn and for the calls that are inside; whoever arrives meanwhile waits behind.
    pub fn close(&self) -> Exclusive<'_> {
        let _alone = self.turn(|state| state.inside == 0);
        Exclusive(self)
    }

    fn turn(&self, ready: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let ticket = state.next;
        state.next += 1;
        while !(state.serving == ticket && ready(&state)) {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn wake(&self, state: &State) {
        if state.next != state.serving {
            self.moved.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        if state.inside == 0 {
            self.0.wake(&state);
        }
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.serving += 1;
        self.0.wake(&state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
    use std::thread;

    #[test]
    fn a_swap_is_alone_and_neither_side_starves() {
        let (gate, stop) = (Gate::default(), AtomicBool::new(false));
        let (inside, calls) = (AtomicI64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(SeqCst) {
                        let _pass = gate.enter();
                        assert!(inside.fetch_add(1, SeqCst) >= 0);
                        calls.fetch_add(1, SeqCst);
                        inside.fetch_sub(1, SeqCst);
                    }
                });
            }
            for _ in 0..2000 {
                let before = calls.load(SeqCst);
                {
                    let _alone = gate.close();
                    assert_eq!(inside.swap(-100, SeqCst), 0);
                    thread::yield_now();
                    assert_eq!(inside.swap(0, SeqCst), -100);
                }
                while calls.load(SeqCst) == before {
                    thread::yield_now();
                }
            }
            stop.store(true, SeqCst);
        });
    }
}
