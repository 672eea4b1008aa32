//! What a fork copies and what it does not, and how many threads an operator takes.
//!
//! A forked child has all memory and one thread. What the others were doing stays half done there, and the threads that
//! libgomp keeps between parallel regions are gone although it counts on them: a region of more than one thread never
//! ends (seen with torch 2.15's libgomp). So a child computes with one thread, and a model that was busy at the fork is refused.

use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use reweft::{Error, ErrorKind, Result};

use crate::torch::Torch;

/// The process that loaded libtorch first; its children are forks.
static ORIGIN: OnceLock<u32> = OnceLock::new();

/// Notes the process that loads libtorch.
pub(crate) fn note_origin() {
    ORIGIN.get_or_init(process::id);
}

/// How many uses of a model there are, and in which process: both in one number, because a child that looks at them one
/// after the other would take its own uses for its parent's. The lower half counts.
#[derive(Debug)]
pub(crate) struct Uses(AtomicU64);

/// A use of a model; it ends when this is dropped.
pub(crate) struct Use<'a> {
    uses: &'a Uses,
    /// The process; to ask for it is a system call.
    process: u32,
}

impl Use<'_> {
    /// Whether this process was forked after libtorch was loaded.
    pub fn is_forked(&self) -> bool {
        ORIGIN.get().is_some_and(|origin| *origin != self.process)
    }
}

impl Uses {
    /// No use, in this process.
    pub fn new() -> Self {
        Self(AtomicU64::new(u64::from(process::id()) << 32))
    }

    /// Begins a use.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] if another thread used the model when this process was forked: its locks are held by nobody.
    pub fn begin(&self) -> Result<Use<'_>> {
        let process = process::id();
        let here = u64::from(process) << 32;
        let mut found = self.0.load(Ordering::Acquire);
        loop {
            let (there, count) = (found & !u64::from(u32::MAX), found & u64::from(u32::MAX));
            if there != here && count > 0 {
                let what = "the process was forked while another thread used the model, which stays busy in the child";
                return Err(
                    Error::new(ErrorKind::Run, what).with_hint("load it again in the child, or fork before it is used")
                );
            }
            match self.0.compare_exchange_weak(found, here | (count + 1), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(Use { uses: self, process }),
                Err(now) => found = now,
            }
        }
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.uses.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The number of threads that operators take on this thread, until this is dropped.
pub(crate) struct Threads<'a> {
    torch: &'a Torch,
    before: i32,
}

impl<'a> Threads<'a> {
    /// Sets the number for this thread, if it is another one.
    ///
    /// # Errors
    /// [`ErrorKind::Run`] if this libtorch does not let it be set.
    pub fn set(torch: &'a Torch, count: i32) -> Result<Option<Self>> {
        let before = torch.num_threads().ok_or_else(|| {
            Error::new(ErrorKind::Run, "this libtorch does not let the number of threads be set; it is needed")
        })?;
        if before == count {
            return Ok(None);
        }
        torch.set_num_threads(count);
        Ok(Some(Self { torch, before }))
    }
}

impl Drop for Threads<'_> {
    fn drop(&mut self) {
        self.torch.set_num_threads(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_of_another_process_are_refused_if_they_had_not_ended() {
        let uses = Uses::new();
        {
            let _first = uses.begin().unwrap();
            let _second = uses.begin().unwrap();
            assert_eq!(uses.0.load(Ordering::Acquire) & u64::from(u32::MAX), 2);
        }
        // As a child finds it.
        let elsewhere = u64::from(process::id() + 1) << 32;
        uses.0.store(elsewhere | 1, Ordering::Release);
        assert_eq!(uses.begin().err().map(|error| error.kind()), Some(ErrorKind::Run));
        uses.0.store(elsewhere, Ordering::Release);
        let first = uses.begin().unwrap();
        assert!(uses.begin().is_ok());
        drop(first);
        assert_eq!(uses.0.load(Ordering::Acquire), u64::from(process::id()) << 32);
    }
}
