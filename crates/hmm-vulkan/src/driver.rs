//! The thread that calls the driver.
//!
//! Drivers allocate from the process heap, start threads, map memory, and are not to be
//! called by a thread that serves a fault. So one thread makes all of the calls (but for
//! the copy queue's), and others give it work. What it and the driver's own threads
//! allocate comes from heaps of theirs, which are excluded from migration
//! (`footprint.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hmm_device::AbortOnUnwind;
use hmm_sync::{Condvar, Mutex, MutexGuard, Rank};

/// How long to sleep at a time before looking again; nobody relies on it.
const NAP: Duration = Duration::from_secs(5);

/// A call without its type. It lives on the stack of whoever waits for its end.
struct Work {
    call: unsafe fn(*mut ()),
    argument: *mut (),
}

// SAFETY: the pointer leads to a `Frame` of a `Send` closure, whose owner waits.
unsafe impl Send for Work {}

struct Frame<F, R> {
    call: Option<F>,
    result: Option<R>,
}

/// # Safety
/// `argument` is a living `Frame<F, R>` that nobody else uses.
unsafe fn carry_out<F: FnOnce() -> R, R>(argument: *mut ()) {
    // SAFETY: the caller's contract.
    let frame = unsafe { &mut *argument.cast::<Frame<F, R>>() };
    if let Some(call) = frame.call.take() {
        frame.result = Some(call());
    }
}

struct State {
    work: Option<Work>,
    next_ticket: u64,
    serving: u64,
    completed: u64,
    closed: bool,
}

/// Where work is handed over: one piece at a time, in the order in which it came. Those
/// who wait are threads that asked, so there is no other bound.
pub(crate) struct Driver {
    state: Mutex<State>,
    /// There is work, or an end of it.
    work: Condvar,
    /// A turn has ended.
    changed: Condvar,
    closing: AtomicBool,
}

impl Driver {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(
                Rank::Queue,
                State {
                    work: None,
                    next_ticket: 0,
                    serving: 0,
                    completed: 0,
                    closed: false,
                },
            ),
            work: Condvar::new(),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
        }
    }

    fn wait_until<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        condition: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !condition(&state) {
            state = self.changed.wait_timeout(state, NAP);
        }
        state
    }

    /// Has the thread carry out a call, and waits; `None` when it has ended.
    pub(crate) fn run<R: Send>(&self, call: impl FnOnce() -> R + Send) -> Option<R> {
        hmm_sync::assert_none_held();
        // The thread works on this stack: unwinding meanwhile must not happen.
        let bomb = AbortOnUnwind("waiting for the driver's thread");
        let result = self.run_inner(call);
        bomb.defuse();
        result
    }

    fn run_inner<R: Send, F: FnOnce() -> R + Send>(&self, call: F) -> Option<R> {
        let mut frame = Frame {
            call: Some(call),
            result: None,
        };
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state = self.wait_until(state, |state| state.closed || state.serving == ticket);
        if state.closed {
            return None;
        }
        state.work = Some(Work {
            call: carry_out::<F, R>,
            argument: (&raw mut frame).cast(),
        });
        self.work.notify_all();
        state = self.wait_until(state, |state| state.completed > ticket);
        state.serving += 1;
        self.changed.notify_all();
        drop(state);
        frame.result
    }

    /// Body of the thread.
    pub(crate) fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(Work { call, argument }) = state.work.take() {
                drop(state);
                // SAFETY: whoever handed it over waits until it is counted as completed.
                unsafe { call(argument) };
                state = self.state.lock();
                state.completed += 1;
                self.changed.notify_all();
            } else if state.closed {
                break;
            } else {
                state = self.work.wait_timeout(state, NAP);
            }
        }
    }

    /// Whether work under way should come to an end.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Work under way should come to an end; the last piece can still be handed over.
    pub(crate) fn begin_closing(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// No work begins any more, and the thread ends when the current one has.
    pub(crate) fn close(&self) {
        self.begin_closing();
        self.state.lock().closed = true;
        self.work.notify_all();
        self.changed.notify_all();
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_many_threads_is_done_one_by_one() {
        let driver = Driver::new();
        let mut total = 0u64;
        std::thread::scope(|scope| {
            scope.spawn(|| driver.serve());
            let sum = Mutex::new(Rank::Queue, &mut total);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..100 {
                            let done = driver.run(|| {
                                **sum.lock() += 1;
                                7
                            });
                            assert_eq!(done, Some(7));
                        }
                    });
                }
            });
            driver.close();
            assert_eq!(driver.run(|| ()), None);
        });
        assert_eq!(total, 400);
    }
}
