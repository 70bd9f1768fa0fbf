//! Launches: a kernel over a range of indices, and what came of it.
//!
//! One kernel runs on a device at a time; launches of several threads wait for
//! their turn, first come first served. The number of waiting launches is the
//! number of threads that launch, so the queue needs no bound of its own. A
//! launch holds no lock of the engine while it waits.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hmm_device::AbortOnUnwind;
use hmm_hal::DeviceFaultError;
use hmm_sync::{Condvar, Mutex, MutexGuard, Rank};

use crate::{Context, KernelError, LaunchError};

/// How long to sleep at a time before looking again; nobody relies on it.
const NAP: Duration = Duration::from_secs(5);

/// What a launch did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchReport {
    /// Indices that the kernel ran for.
    pub groups: usize,
    /// Workers that took part.
    pub workers: usize,
    /// Faults handed to the engine.
    pub faults: u64,
    /// Faults that were answered with "wait and look again".
    pub retries: u64,
    /// Accesses for which a worker had to walk the page table.
    pub tlb_misses: u64,
    /// Accesses to system memory in place.
    pub in_place: u64,
    /// Accesses done in place because their page would not stay on the device.
    pub thrash_in_place: u64,
    /// Time from the launch's turn to its end.
    pub elapsed: Duration,
}

/// A kernel without its type. It lives on the stack of whoever launches, who
/// does not go on before all workers are done with it.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    drive: unsafe fn(*const (), &Context, &Board),
    kernel: *const (),
}

// SAFETY: the pointer leads to a kernel that is `Sync` (see `Job::new`), and is
// only used while its owner waits.
unsafe impl Send for Job {}

impl Job {
    /// The job of running `kernel`, which must stay where it is until all
    /// workers are done.
    pub(crate) fn new<K>(kernel: &K) -> Self
    where
        K: Fn(&Context, usize) -> Result<(), KernelError> + Sync,
    {
        Self {
            drive: drive::<K>,
            kernel: std::ptr::from_ref(kernel).cast(),
        }
    }

    /// Runs the kernel for indices of the board until none is left.
    ///
    /// # Safety
    /// Whoever made the job still waits in [`Board::run`].
    pub(crate) unsafe fn drive(self, context: &Context, board: &Board) {
        // SAFETY: `new` paired the function with a kernel of its type, which is
        // still there (the caller's contract).
        unsafe { (self.drive)(self.kernel, context, board) }
    }
}

/// # Safety
/// `kernel` points to a living `K`.
unsafe fn drive<K>(kernel: *const (), context: &Context, board: &Board)
where
    K: Fn(&Context, usize) -> Result<(), KernelError> + Sync,
{
    // SAFETY: the caller's contract; shared by workers, which `Sync` allows.
    let kernel = unsafe { &*kernel.cast::<K>() };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        while let Some(index) = board.next_index() {
            context.set_index(index);
            kernel(context, index)?;
        }
        Ok(())
    }));
    let index = context.index();
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => board.fail(LaunchError::Kernel { index, error }),
        Err(payload) => {
            let message = if let Some(text) = payload.downcast_ref::<&str>() {
                (*text).to_owned()
            } else if let Some(text) = payload.downcast_ref::<String>() {
                text.clone()
            } else {
                "(no message)".to_owned()
            };
            board.fail(LaunchError::Panicked { index, message });
        }
    }
}

struct State {
    closed: bool,
    started: usize,
    next_ticket: u64,
    serving: u64,
    job: Option<Job>,
    unclaimed: usize,
    unfinished: usize,
    failure: Option<LaunchError>,
}

/// Where launches and workers meet.
pub(crate) struct Board {
    state: Mutex<State>,
    /// There is a job to claim, or the device closes.
    work: Condvar,
    /// A job has ended, a worker has started, or the device closes.
    changed: Condvar,
    next: AtomicUsize,
    groups: AtomicUsize,
    stop: AtomicBool,
}

impl Board {
    /// No workers, no launches.
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(
                Rank::Queue,
                State {
                    closed: false,
                    started: 0,
                    next_ticket: 0,
                    serving: 0,
                    job: None,
                    unclaimed: 0,
                    unfinished: 0,
                    failure: None,
                },
            ),
            work: Condvar::new(),
            changed: Condvar::new(),
            next: AtomicUsize::new(0),
            groups: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
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

    /// Waits for its turn, runs a job on `workers` workers, and waits for its
    /// end. `turn` is called when the turn has come.
    pub(crate) fn run(
        &self,
        job: Job,
        groups: usize,
        workers: usize,
        turn: impl FnOnce(),
    ) -> Result<(), LaunchError> {
        hmm_sync::assert_none_held();
        // The kernel lives on this stack: going on while workers use it, even
        // by unwinding, must not happen.
        let bomb = AbortOnUnwind("waiting for a kernel");
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state = self.wait_until(state, |state| state.closed || state.serving == ticket);
        if state.closed {
            drop(state);
            bomb.defuse();
            return Err(LaunchError::Closed);
        }
        turn();
        self.next.store(0, Ordering::Relaxed);
        self.groups.store(groups, Ordering::Relaxed);
        self.stop.store(false, Ordering::Relaxed);
        state.job = Some(job);
        state.unclaimed = workers;
        state.unfinished = workers;
        self.work.notify_all();
        state = self.wait_until(state, |state| state.unfinished == 0);
        state.job = None;
        state.serving += 1;
        let mut failure = state.failure.take();
        let ended_by_closing = match &failure {
            // It was stopped before all indices had their turn.
            None => self.stop.load(Ordering::Relaxed),
            Some(LaunchError::Kernel { error, .. }) => matches!(
                error,
                KernelError::Fault(DeviceFaultError::ShuttingDown | DeviceFaultError::DeviceLost)
            ),
            Some(_) => false,
        };
        if state.closed && ended_by_closing {
            failure = Some(LaunchError::Closed);
        }
        self.changed.notify_all();
        drop(state);
        bomb.defuse();
        failure.map_or(Ok(()), Err)
    }

    /// The next index to work on, until there is none or the job is stopped.
    fn next_index(&self) -> Option<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.groups.load(Ordering::Relaxed)).then_some(index)
    }

    /// Stops the job; the first failure is the one that is reported.
    pub(crate) fn fail(&self, failure: LaunchError) {
        self.stop();
        let mut state = self.state.lock();
        let second = if state.failure.is_none() {
            state.failure.replace(failure)
        } else {
            Some(failure)
        };
        drop(state);
        drop(second);
    }

    /// Has no further index of the current job run.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// A worker waits for a job; `None` when the device closes.
    pub(crate) fn claim(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.unclaimed > 0 {
                state.unclaimed -= 1;
                return state.job;
            }
            if state.closed {
                return None;
            }
            state = self.work.wait_timeout(state, NAP);
        }
    }

    /// A worker is done with the job that it claimed.
    pub(crate) fn finish(&self) {
        let mut state = self.state.lock();
        state.unfinished -= 1;
        if state.unfinished == 0 {
            self.changed.notify_all();
        }
    }

    /// A worker has started.
    pub(crate) fn started(&self) {
        self.state.lock().started += 1;
        self.changed.notify_all();
    }

    /// Waits until this many workers have started.
    pub(crate) fn wait_for_workers(&self, workers: usize) {
        drop(self.wait_until(self.state.lock(), |state| state.started == workers));
    }

    /// No launch begins any more, and workers end when the current one has.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.stop();
        self.work.notify_all();
        self.changed.notify_all();
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}
