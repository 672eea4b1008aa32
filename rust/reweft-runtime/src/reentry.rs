//! What runs on a thread, so that whoever would wait for its own end is refused.
//!
//! A refit waits for the calls that run, and a call for a replica. From inside a call, as an operator or a finalizer that is
//! somebody else's code may try it, neither would ever end.

use std::cell::RefCell;
use std::marker::PhantomData;

thread_local! {
    /// Addresses of what runs here, the outermost first; a call of one model may run another.
    static RUNNING: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Notes that something runs on this thread, until this is dropped. Stays on its thread.
pub(crate) struct Here(PhantomData<*const ()>);

impl Here {
    /// `what` stays where it is meanwhile, because somebody has borrowed it.
    pub fn enter<T>(what: &T) -> Self {
        RUNNING.with_borrow_mut(|running| running.push(address(what)));
        Self(PhantomData)
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        // Notes end in the reverse of their order, as scopes do.
        RUNNING.with_borrow_mut(Vec::pop);
    }
}

/// Whether `what` runs on this thread.
pub(crate) fn is_here<T>(what: &T) -> bool {
    RUNNING.with_borrow(|running| running.contains(&address(what)))
}

fn address<T>(what: &T) -> usize {
    std::ptr::from_ref(what).addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_is_known_on_its_thread_until_it_ends() {
        let (one, other) = (1_u8, 2_u8);
        assert!(!is_here(&one));
        {
            let _one = Here::enter(&one);
            {
                let _other = Here::enter(&other);
                let _again = Here::enter(&one);
                assert!(is_here(&one) && is_here(&other));
            }
            assert!(is_here(&one) && !is_here(&other));
            std::thread::scope(|scope| scope.spawn(|| assert!(!is_here(&one))).join().unwrap());
        }
        assert!(!is_here(&one));
    }
}
