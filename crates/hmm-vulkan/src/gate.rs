//! How unmapping waits for a kernel that runs.
//!
//! ```text
//! launching thread                        whoever unmaps (a block is locked)
//!   begin: begun += 1                       entries = 0
//!   submit; wait for the end                n = begun; return if ended == n
//!   end: ended += 1; wake                   wait until ended >= n, or (stall)
//!                                             until every subgroup is parked
//! ```
//!
//! A dispatch that begins behind the clear finds the entries cleared, so only the one
//! that runs now is waited for. A kernel without checks must not even look at a cleared
//! entry, which would lead it to address 0: there the wait comes first, and the entries
//! are cleared with the lock held that its `begin` needs ([`Gate::clear`]).
//!
//! # Why that ends
//! Whoever waits here holds a block's lock, so nothing that the wait depends on may
//! need the engine:
//! - *The dispatch ends by itself.* A checked kernel returns at its first miss; nobody
//!   waits for a page in it. Its dispatches are cut so that they are short. What the
//!   driver's threads need (stacks, heap, code) is excluded from migration.
//! - *The launching thread notices.* Between `begin` and `end` of a checked or unchecked
//!   dispatch it calls the driver's wait and nothing else: faults are served between
//!   dispatches. A thread that serves faults is never waited for.
//! - *A stalled kernel* is served while it runs, by a thread that may need the very
//!   block that is locked here. So that thread's notice is not waited for: whoever unmaps
//!   looks at the control block itself. A subgroup that has missed parks and stays
//!   parked while `yielding` is set; one that has not ends or misses. When all that are
//!   active are parked, none is between a look at the table and its access, and each
//!   looks again before the next. When the dispatch has ended, none is active.
//!
//! - *Imports are given back* by a thread that does nothing else (`imports.rs`).
//!
//! One thing of the program's the driver does need: the locks of malloc(3). fork(3) has all
//! of them while it waits for the engine to read that it happens, which waits for whoever
//! unmaps. So dispatches that are waited for end before a fork begins, and none begins until
//! it is over ([`Gate::hold`]). A stalled kernel may go on: subgroups run and park without
//! the driver.
//!
//! The driver may hang, and a kernel may run for ever. Both end the process with a
//! message after [`PATIENCE`]: going on would let the device write to memory that is
//! somebody else's by then.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use hmm_sync::{Condvar, Mutex, MutexGuard, Rank};
use hmm_types::PageRange;

use crate::control::Control;
use crate::fatal;
use crate::imports::{Imports, MadeOf};
use crate::pool::Pool;

/// How long an unmapping waits before the process ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long to sleep at a time before looking again; nobody relies on it.
const NAP: Duration = Duration::from_millis(200);
/// The same where nothing is waited for.
const LONG_NAP: Duration = Duration::from_secs(5);
/// How long a dispatch or a fork waits for the other at a time.
const FORK_NAP: Duration = Duration::from_micros(50);
/// Looks at the control block before the processor is yielded.
const SPINS: u32 = 2000;
/// Yields before the thread sleeps.
const YIELDS: u32 = 2000;

/// What a dispatch does about entries that are cleared while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Invocations that meet one return.
    Returns,
    /// They poll, and their subgroup counts as parked.
    Parks,
    /// They follow it to nowhere.
    Unchecked,
}

#[derive(Debug)]
pub(crate) struct State {
    begun: u64,
    ended: u64,
    /// What runs, or ran last.
    manner: Manner,
    /// Unmappings that wait for a stalled kernel.
    yields: u32,
    /// The dispatch that runs has been given up: it keeps its mappings for ever.
    abandoned: bool,
    /// Leaves of the page table that are free.
    pub(crate) pool: Pool,
    /// System memory that the device uses in place.
    pub(crate) imports: Imports,
}

/// Between launches and unmappings of one device.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// There is something to give back, or nothing ever again.
    doomed: Condvar,
    /// How much is imported; to be read without the lock.
    imported: AtomicU64,
    /// Forks under way. Threads of the program write it, so it is under no lock.
    forks: AtomicU32,
    /// A dispatch runs whose end is waited for.
    runs: AtomicBool,
}

impl Gate {
    pub(crate) const fn new(pool: Pool) -> Self {
        Self {
            state: Mutex::new(
                Rank::Device,
                State {
                    begun: 0,
                    ended: 0,
                    manner: Manner::Returns,
                    yields: 0,
                    abandoned: false,
                    pool,
                    imports: Imports::new(),
                },
            ),
            changed: Condvar::new(),
            doomed: Condvar::new(),
            imported: AtomicU64::new(0),
            forks: AtomicU32::new(0),
            runs: AtomicBool::new(false),
        }
    }

    /// A dispatch begins that uses the page table, if `check` says so: no mapping that
    /// it has seen goes before the dispatch has ended.
    pub(crate) fn begin(&self, manner: Manner, check: impl FnOnce() -> bool) -> bool {
        if manner != Manner::Parks {
            self.wait_for_forks();
        }
        let mut state = self.state.lock();
        assert!(state.begun == state.ended, "two dispatches at a time");
        if !check() {
            self.runs.store(false, Ordering::SeqCst);
            return false;
        }
        state.begun += 1;
        state.manner = manner;
        true
    }

    /// It has ended.
    pub(crate) fn end(&self) {
        self.state.lock().ended += 1;
        self.changed.notify_all();
        self.runs.store(false, Ordering::SeqCst);
    }

    fn wait_for_forks(&self) {
        loop {
            self.runs.store(true, Ordering::SeqCst);
            if self.forks.load(Ordering::SeqCst) == 0 {
                return;
            }
            self.runs.store(false, Ordering::SeqCst);
            std::thread::sleep(FORK_NAP);
        }
    }

    /// Before a fork: waits until no dispatch runs whose end is waited for, and lets none
    /// begin. Ends early when `hopeless` says that it never will.
    pub(crate) fn hold(&self, hopeless: impl Fn() -> bool) {
        self.forks.fetch_add(1, Ordering::SeqCst);
        while self.runs.load(Ordering::SeqCst) && !hopeless() {
            std::thread::sleep(FORK_NAP);
        }
    }

    /// After it.
    pub(crate) fn let_go(&self) {
        self.forks.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The dispatch that runs never ends, and nobody is to wait for it.
    pub(crate) fn abandon(&self) {
        self.state.lock().abandoned = true;
        self.changed.notify_all();
    }

    /// Clears entries, when no kernel runs that would follow a cleared one. `None` when
    /// one does that was given up.
    pub(crate) fn clear<R>(&self, clear: impl FnOnce(&mut Imports) -> R) -> Option<R> {
        let mut state = self.state.lock();
        while state.begun != state.ended && state.manner == Manner::Unchecked && !state.abandoned {
            let number = state.begun;
            state = self.wait_for_end(state, number);
        }
        (!state.abandoned).then(|| clear(&mut state.imports))
    }

    /// Has what is imported of a range given back, and waits. Its entries are cleared, and
    /// no kernel is under way that looked at them before.
    pub(crate) fn expel(&self, range: PageRange) {
        let since = Instant::now();
        let mut state = self.state.lock();
        state.imports.doom(range);
        self.doomed.notify_all();
        while state.imports.overlap(range) {
            state = self.changed.wait_timeout(state, NAP);
            if since.elapsed() > PATIENCE && state.imports.overlap(range) {
                fatal::die(STUCK);
            }
        }
    }

    /// What the expelling thread is to give back; `None` when it is to end.
    pub(crate) fn next_doomed(&self) -> Option<MadeOf> {
        let mut state = self.state.lock();
        loop {
            if let Some(doomed) = state.imports.take_doomed() {
                return Some(doomed);
            }
            if state.imports.is_closed() {
                return None;
            }
            state = self.doomed.wait_timeout(state, LONG_NAP);
        }
    }

    /// It has been given back.
    pub(crate) fn expelled(&self, what: MadeOf) {
        let mut state = self.state.lock();
        state.imports.gone(what);
        self.count(&state);
        self.changed.notify_all();
    }

    /// Says how much is imported now.
    pub(crate) fn count(&self, state: &State) {
        let imported = state.imports.len() as u64;
        self.imported.store(imported, Ordering::Relaxed);
    }

    pub(crate) fn imported(&self) -> u64 {
        self.imported.load(Ordering::Relaxed)
    }

    /// Waits until something may have been given back.
    pub(crate) fn wait_for_expelled(&self, state: MutexGuard<'_, State>) {
        drop(self.changed.wait_timeout(state, NAP));
    }

    /// Nothing will be imported any more.
    pub(crate) fn close(&self) {
        self.state.lock().imports.close();
        self.doomed.notify_all();
    }

    /// Waits until no access is under way that looked at the table before the call.
    /// False when nothing ran.
    pub(crate) fn quiesce(&self, control: &Control) -> bool {
        let mut state = self.state.lock();
        if state.begun == state.ended {
            return false;
        }
        let number = state.begun;
        if state.manner != Manner::Parks {
            drop(self.wait_for_end(state, number));
            return true;
        }
        // The counter is kept here: a store is all that every bus can do.
        state.yields += 1;
        control.yielding.store(state.yields, Ordering::SeqCst);
        drop(state);
        self.wait_until_parked(number, control);
        let mut state = self.state.lock();
        state.yields -= 1;
        control.yielding.store(state.yields, Ordering::SeqCst);
        true
    }

    /// Runs `call` when no dispatch runs, and none begins before it returns. `None`
    /// when one runs that its end may depend on the caller.
    pub(crate) fn when_idle<R>(&self, call: impl FnOnce(&mut Pool) -> R) -> Option<R> {
        let mut state = self.state.lock();
        if state.begun != state.ended {
            if state.manner == Manner::Parks {
                return None;
            }
            let number = state.begun;
            state = self.wait_for_end(state, number);
            if state.begun != state.ended {
                return None;
            }
        }
        Some(call(&mut state.pool))
    }

    fn wait_for_end<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        number: u64,
    ) -> MutexGuard<'a, State> {
        let since = Instant::now();
        while state.ended < number && !state.abandoned {
            state = self.changed.wait_timeout(state, NAP);
            if since.elapsed() > PATIENCE && state.ended < number && !state.abandoned {
                fatal::die(STUCK);
            }
        }
        state
    }

    fn wait_until_parked(&self, number: u64, control: &Control) {
        fence(Ordering::SeqCst);
        let since = Instant::now();
        let mut rounds = 0;
        while !control.all_parked() {
            rounds += 1;
            if rounds < SPINS {
                std::hint::spin_loop();
            } else if rounds < SPINS + YIELDS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
                let state = self.state.lock();
                if state.ended >= number || state.abandoned {
                    return;
                }
                if since.elapsed() > PATIENCE {
                    fatal::die(STUCK);
                }
            }
        }
    }
}

const STUCK: &str = "hmm-vulkan: a kernel did not let go of a page within a minute; its memory \
                     cannot be used safely, so the process ends\n";

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn gate() -> Gate {
        Gate::new(Pool::new(4))
    }

    #[test]
    fn nothing_is_waited_for_when_nothing_runs() {
        let (gate, control) = (gate(), Control::default());
        assert!(!gate.quiesce(&control));
        assert!(gate.begin(Manner::Returns, || true));
        gate.end();
        assert!(!gate.quiesce(&control));
        assert!(!gate.begin(Manner::Returns, || false));
        assert!(!gate.quiesce(&control));
    }

    #[test]
    fn the_dispatch_that_runs_is_waited_for() {
        let (gate, control) = (gate(), Control::default());
        let ended = AtomicBool::new(false);
        gate.begin(Manner::Returns, || true);
        std::thread::scope(|scope| {
            let unmap = scope.spawn(|| {
                assert!(gate.quiesce(&control));
                assert!(ended.load(Ordering::SeqCst), "unmapping did not wait");
            });
            std::thread::sleep(Duration::from_millis(50));
            ended.store(true, Ordering::SeqCst);
            gate.end();
            unmap.join().unwrap();
        });
    }

    #[test]
    fn a_parked_kernel_is_not_waited_for_and_stays_parked() {
        let (gate, control) = (gate(), Control::default());
        control.subgroups.store(2 | 1 << 32, Ordering::SeqCst);
        gate.begin(Manner::Parks, || true);
        let parked = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let unmap = scope.spawn(|| {
                assert!(gate.quiesce(&control));
                assert!(parked.load(Ordering::SeqCst), "unmapping did not wait");
            });
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(control.yielding.load(Ordering::SeqCst), 1);
            parked.store(true, Ordering::SeqCst);
            control.subgroups.store(2 | 2 << 32, Ordering::SeqCst);
            unmap.join().unwrap();
        });
        assert_eq!(control.yielding.load(Ordering::SeqCst), 0);
        assert!(gate.when_idle(|_| ()).is_none());
        gate.end();
        assert!(gate.when_idle(|_| ()).is_some());
    }

    #[test]
    fn a_fork_and_a_dispatch_wait_for_each_other() {
        let gate = gate();
        let (ended, over) = (AtomicBool::new(false), AtomicBool::new(false));
        gate.begin(Manner::Returns, || true);
        std::thread::scope(|scope| {
            let fork = scope.spawn(|| {
                gate.hold(|| false);
                assert!(ended.load(Ordering::SeqCst), "the fork did not wait");
                std::thread::sleep(Duration::from_millis(50));
                over.store(true, Ordering::SeqCst);
                gate.let_go();
            });
            std::thread::sleep(Duration::from_millis(50));
            ended.store(true, Ordering::SeqCst);
            gate.end();
            while gate.forks.load(Ordering::SeqCst) > 0 && gate.runs.load(Ordering::SeqCst) {}
            if !over.load(Ordering::SeqCst) {
                // One that parks does not wait.
                gate.begin(Manner::Parks, || true);
                gate.end();
            }
            assert!(gate.begin(Manner::Unchecked, || true));
            assert!(over.load(Ordering::SeqCst), "the dispatch did not wait");
            gate.end();
            fork.join().unwrap();
        });
        // One that cannot begin is not waited for, nor one that never ends.
        gate.begin(Manner::Returns, || false);
        gate.hold(|| false);
        gate.let_go();
        gate.begin(Manner::Returns, || true);
        gate.hold(|| true);
        gate.let_go();
        gate.end();
    }

    #[test]
    fn entries_stay_under_a_kernel_without_checks() {
        let gate = gate();
        let ended = AtomicBool::new(false);
        gate.begin(Manner::Unchecked, || true);
        std::thread::scope(|scope| {
            let unmap = scope.spawn(|| gate.clear(|_| ended.load(Ordering::SeqCst)).unwrap());
            std::thread::sleep(Duration::from_millis(50));
            ended.store(true, Ordering::SeqCst);
            gate.end();
            assert!(unmap.join().unwrap(), "cleared while the kernel ran");
        });
        gate.begin(Manner::Returns, || true);
        assert_eq!(
            gate.clear(|_| true),
            Some(true),
            "a kernel that checks is no hindrance"
        );
        gate.end();
    }
}
