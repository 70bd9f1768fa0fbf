//! Requests on their way from the program's threads to the engine's.
//!
//! The engine's descriptors belong to its own threads, so the program's threads
//! hand requests over: a bounded table of slots in engine memory. A slot is
//! free, waiting, running, or done.
//!
//! One core moves memory slower than a machine can. So a migration that is
//! waited for is cut into parts, which several workers carry out side by side.
//! What nobody waits for runs on one worker and leaves the others, and the
//! processors, to the program.

use std::time::Duration;

use hmm_core::{Destination, MigrationReport, MirrorEntry};
use hmm_hal::{DeviceFaultError, SpaceError};
use hmm_sync::{Condvar, Mutex, Rank};
use hmm_types::{Access, BLOCK_PAGES, DeviceId, PageRange};

use crate::host::Host;
use crate::{Error, Report};

/// Requests that can wait or run at a time.
pub(crate) const JOB_SLOTS: usize = 256;
/// Parts of one request at most.
pub(crate) const MAX_PARTS: usize = 16;
/// Parts for each worker, so that one who is quicker takes more.
const PARTS_EACH: u64 = 4;
/// How long to sleep before looking again; notifications come sooner.
const RECHECK: Duration = Duration::from_secs(1);

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Migrate {
        range: PageRange,
        /// The whole request, nothing of which makes room for the rest.
        whole: PageRange,
        /// When it was made, as [`Engine::moment`](hmm_core::Engine::moment) has it.
        since: u64,
        to: Destination,
    },
    Exclusive(PageRange, DeviceId),
    Snapshot(PageRange),
    /// Whether a range allows an access.
    Check(PageRange, Access),
    /// Everything comes home from a device, which stays.
    Vacate(DeviceId),
    RemoveDevice(DeviceId),
    ShutDown,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Outcome {
    Report(MigrationReport),
    Checked(Result<(), DeviceFaultError>),
    Entries(Result<hmm_mem::Vec<MirrorEntry>, SpaceError>),
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

impl State {
    /// Takes back what was handed over last.
    fn withdraw(&mut self, numbers: &Numbers) {
        self.waiting -= numbers.iter().count();
        for number in numbers.iter() {
            self.slots[number] = Slot::Free;
        }
    }
}

/// The numbers of a request's parts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Numbers {
    list: [usize; MAX_PARTS],
    len: usize,
}

impl Numbers {
    fn push(&mut self, number: usize) {
        self.list[self.len] = number;
        self.len += 1;
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> {
        self.list[..self.len].iter().copied()
    }
}

/// A migration as requests for up to `workers` workers.
pub(crate) fn in_parts(
    whole: PageRange,
    since: u64,
    to: Destination,
    workers: usize,
) -> impl Iterator<Item = Request> {
    let parts = match workers {
        1 => 1,
        _ => (workers as u64 * PARTS_EACH).min(MAX_PARTS as u64),
    };
    // Parts end where blocks do: two workers want no block at the same time.
    // (Half a block for each of two is slower than one block for one.)
    let first = whole.start().block_floor();
    let pages = whole
        .end()
        .pages_since(first)
        .div_ceil(parts)
        .next_multiple_of(u64::from(BLOCK_PAGES))
        .max(u64::from(BLOCK_PAGES));
    let mut next = whole.start();
    std::iter::from_fn(move || {
        let part = next.pages_since(first) / pages;
        let end = first.plus_pages((part + 1) * pages).min(whole.end());
        let range = (next < end).then(|| PageRange::span(next, end))?;
        next = end;
        Some(Request::Migrate {
            range,
            whole,
            since,
            to,
        })
    })
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

    /// Hands requests over, all of them or none: their numbers, to wait for.
    pub(crate) fn submit(&self, requests: impl Iterator<Item = Request>) -> Result<Numbers, Error> {
        let mut numbers = Numbers::default();
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::ShuttingDown);
        }
        for request in requests {
            let free = state
                .slots
                .iter()
                .position(|slot| matches!(slot, Slot::Free));
            let Some(number) = free else {
                state.withdraw(&numbers);
                return Err(Error::QueueFull { limit: JOB_SLOTS });
            };
            state.slots[number] = Slot::Waiting(request);
            let at = (state.head + state.waiting) % JOB_SLOTS;
            state.order[at] = number;
            state.waiting += 1;
            numbers.push(number);
        }
        drop(state);
        for _ in numbers.iter() {
            self.arrived.notify_one();
        }
        Ok(numbers)
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
    parts: Numbers,
}

impl Prefetch {
    pub(crate) const fn new(host: &'static Host, parts: Numbers) -> Self {
        Self { host, parts }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.parts
            .iter()
            .all(|number| self.host.jobs.is_done(number))
    }

    /// Waits until it has ended, and says what it did. A range without a whole
    /// page did nothing.
    #[must_use]
    pub fn wait(mut self) -> Report {
        let mut report = Report::default();
        for number in std::mem::take(&mut self.parts).iter() {
            if let Outcome::Report(part) = self.host.jobs.wait(number) {
                report.add(&part);
            }
        }
        report
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if self.host.is_own_process() {
            for number in self.parts.iter() {
                self.host.jobs.abandon(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hmm_types::{PageCount, VirtAddr};

    use super::*;

    #[test]
    fn parts_cover_the_request_and_end_where_blocks_do() {
        for (start, pages, workers) in [
            (0x1000, 1, 2),
            (0x1000, 100_000, 8),
            (0x20_0000, 65_536, 2),
            (0x3f_f000, 65_536, 2),
            (0x1000, 5000, 1),
        ] {
            let whole = PageRange::from_pages(VirtAddr::new(start), PageCount::new(pages));
            let mut next = whole.start();
            let mut count = 0;
            for request in in_parts(whole, 0, Destination::System, workers) {
                let Request::Migrate { range, .. } = request else {
                    panic!("{request:?}");
                };
                assert_eq!(range.start(), next);
                assert!(range.end() == whole.end() || range.end().is_block_aligned());
                next = range.end();
                count += 1;
            }
            assert_eq!(next, whole.end());
            assert!(count <= MAX_PARTS && (workers > 1 || count == 1), "{count}");
        }
    }

    #[test]
    fn requests_are_handed_over_together_or_not_at_all() {
        let jobs = Jobs::new();
        for _ in 0..JOB_SLOTS - 1 {
            jobs.submit(std::iter::once(Request::ShutDown)).unwrap();
        }
        let two = || [Request::ShutDown; 2].into_iter();
        assert!(matches!(jobs.submit(two()), Err(Error::QueueFull { .. })));
        jobs.submit(two().take(1)).unwrap();
        let taken = std::iter::from_fn(|| jobs.next(Duration::ZERO)).count();
        assert_eq!(taken, JOB_SLOTS);
    }
}
