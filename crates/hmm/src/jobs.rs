//! Requests on their way from the program's threads to the engine's.
//!
//! The engine's descriptors belong to its own threads, so the program's threads
//! hand requests over: a bounded table of slots in engine memory. A slot is
//! free, waiting, running, or done.

use std::time::Duration;

use hmm_core::{Destination, MigrationReport};
use hmm_sync::{Condvar, Mutex, Rank};
use hmm_types::{DeviceId, PageRange};

use crate::host::Host;
use crate::{Error, Report};

/// Requests that can wait or run at a time.
pub(crate) const JOB_SLOTS: usize = 256;
/// How long to sleep before looking again; notifications come sooner.
const RECHECK: Duration = Duration::from_secs(1);

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Migrate(PageRange, Destination),
    Exclusive(PageRange, DeviceId),
    RemoveDevice(DeviceId),
    ShutDown,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Outcome {
    Report(MigrationReport),
    /// Whether nothing was left behind.
    Clean(bool),
}

#[derive(Debug)]
enum Slot {
    Free,
    Waiting(Request),
    /// Waiting, and nobody will ask for the outcome.
    Orphaned(Request),
    Running,
    /// Nobody will ask for the outcome.
    Abandoned,
    Done(Outcome),
}

#[derive(Debug)]
struct State {
    slots: [Slot; JOB_SLOTS],
    /// Waiting slots in the order in which they came: a ring.
    order: [usize; JOB_SLOTS],
    head: usize,
    waiting: usize,
    closed: bool,
}

/// The table of requests.
#[derive(Debug)]
pub(crate) struct Jobs {
    state: Mutex<State>,
    arrived: Condvar,
    ended: Condvar,
}

impl Jobs {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(
                Rank::Queue,
                State {
                    slots: [const { Slot::Free }; JOB_SLOTS],
                    order: [0; JOB_SLOTS],
                    head: 0,
                    waiting: 0,
                    closed: false,
                },
            ),
            arrived: Condvar::new(),
            ended: Condvar::new(),
        }
    }

    /// Hands a request over; its number, to wait for it.
    pub(crate) fn submit(&self, request: Request) -> Result<usize, Error> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::ShuttingDown);
        }
        let free = state
            .slots
            .iter()
            .position(|slot| matches!(slot, Slot::Free));
        let number = free.ok_or(Error::QueueFull { limit: JOB_SLOTS })?;
        state.slots[number] = Slot::Waiting(request);
        let at = (state.head + state.waiting) % JOB_SLOTS;
        state.order[at] = number;
        state.waiting += 1;
        drop(state);
        self.arrived.notify_one();
        Ok(number)
    }

    /// Waits until a request has ended.
    pub(crate) fn wait(&self, number: usize) -> Outcome {
        let mut state = self.state.lock();
        loop {
            if matches!(state.slots[number], Slot::Done(_)) {
                match std::mem::replace(&mut state.slots[number], Slot::Free) {
                    Slot::Done(outcome) => return outcome,
                    _ => unreachable!("looked at a line above"),
                }
            }
            state = self.ended.wait_timeout(state, RECHECK);
        }
    }

    pub(crate) fn is_done(&self, number: usize) -> bool {
        matches!(self.state.lock().slots[number], Slot::Done(_))
    }

    /// Nobody will wait for this request.
    pub(crate) fn abandon(&self, number: usize) {
        let mut state = self.state.lock();
        let slot = &mut state.slots[number];
        let ended = match slot {
            Slot::Done(_) => true,
            Slot::Running => {
                *slot = Slot::Abandoned;
                false
            }
            // It is still carried out: a prefetch that nobody waits for is one.
            Slot::Waiting(request) => {
                *slot = Slot::Orphaned(*request);
                false
            }
            Slot::Free | Slot::Orphaned(_) | Slot::Abandoned => false,
        };
        if ended {
            drop(std::mem::replace(slot, Slot::Free));
        }
    }

    /// The next request, or `None` after `patience` or when the table closed.
    pub(crate) fn next(&self, patience: Duration) -> Option<(usize, Request)> {
        let mut state = self.state.lock();
        if state.waiting == 0 && !state.closed {
            state = self.arrived.wait_timeout(state, patience);
        }
        if state.waiting == 0 {
            return None;
        }
        let number = state.order[state.head];
        state.head = (state.head + 1) % JOB_SLOTS;
        state.waiting -= 1;
        match std::mem::replace(&mut state.slots[number], Slot::Running) {
            Slot::Waiting(request) => Some((number, request)),
            Slot::Orphaned(request) => {
                state.slots[number] = Slot::Abandoned;
                Some((number, request))
            }
            other => unreachable!("a slot in the ring is {other:?}"),
        }
    }

    pub(crate) fn finish(&self, number: usize, outcome: Outcome) {
        let mut state = self.state.lock();
        let slot = &mut state.slots[number];
        *slot = match slot {
            Slot::Abandoned => Slot::Free,
            _ => Slot::Done(outcome),
        };
        drop(state);
        self.ended.notify_all();
    }

    /// Refuses further requests; those that came before are still carried out.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.arrived.notify_all();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Has idle workers look around.
    pub(crate) fn nudge(&self) {
        self.arrived.notify_one();
    }
}

/// A migration that was started and runs by itself.
///
/// Dropping it lets it run on.
///
/// ```
/// # let hmm = hmm::Hmm::open()?;
/// # let device = hmm.add_software_device(hmm::SoftwareOptions::new(hmm::ByteCount::mib(8)))?;
/// let mut data = vec![7u8; 1 << 20];
/// let prefetch = hmm.prefetch(&mut data[..], device.id())?;
/// // ... something else meanwhile ...
/// let report = prefetch.wait();
/// assert!(report.is_complete());
/// # hmm.shutdown()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Prefetch {
    host: &'static Host,
    number: Option<usize>,
}

impl Prefetch {
    pub(crate) const fn new(host: &'static Host, number: Option<usize>) -> Self {
        Self { host, number }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.number
            .is_none_or(|number| self.host.jobs.is_done(number))
    }

    /// Waits until it has ended, and says what it did. A range without a whole
    /// page did nothing.
    #[must_use]
    pub fn wait(mut self) -> Report {
        match self.number.take().map(|number| self.host.jobs.wait(number)) {
            Some(Outcome::Report(report)) => Report::of(&report),
            _ => Report::default(),
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if let Some(number) = self.number
            && self.host.is_own_process()
        {
            self.host.jobs.abandon(number);
        }
    }
}
