//! What a thread brings along to do the engine's work.

use hmm_hal::{FaultKind, SpaceId};
use hmm_types::{PageCount, PageRange, VirtAddr};

/// Pages of bounce memory that every executor owns.
pub const BOUNCE_PAGES: u64 = 64;
/// The same as the length of an array.
pub(crate) const BOUNCE_LEN: usize = 64;

/// A fault that was read and waits to be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueuedFault {
    pub(crate) space: SpaceId,
    pub(crate) address: VirtAddr,
    pub(crate) kind: FaultKind,
    pub(crate) thread: u32,
    pub(crate) read_at_ns: u64,
    /// No later, as a time of use (see [`Engine::uses_now`](crate::engine::Engine::uses_now)).
    pub(crate) read_at: u64,
}

/// A bounded queue of faults: first in, first out.
#[derive(Debug)]
struct FaultQueue {
    slots: [Option<QueuedFault>; Self::CAPACITY],
    head: usize,
    len: usize,
}

impl FaultQueue {
    const CAPACITY: usize = 64;
}

/// A thread's own place to work: bounce memory, and the faults it has read but
/// not served. One for each thread that calls the engine; nothing in it is
/// shared.
#[derive(Debug)]
pub struct Executor {
    bounce: VirtAddr,
    reads_events: bool,
    queue: FaultQueue,
    alone: bool,
    relief: Option<&'static dyn Relief>,
}

/// Whoever sees to it that others read events while an executor cannot.
pub trait Relief: Sync + std::fmt::Debug {
    /// What is to be done now takes long.
    fn takes_long(&self);

    /// There is work that another executor can share: see
    /// [`Engine::read_ahead`](crate::Engine::read_ahead).
    fn can_be_shared(&self);
}

impl Executor {
    /// For a thread that reads events and serves CPU faults. It must never
    /// wait for an event to be read by somebody else.
    ///
    /// `bounce` is engine memory of [`BOUNCE_PAGES`] pages, not registered, of
    /// this executor alone.
    #[must_use]
    pub const fn handler(bounce: VirtAddr) -> Self {
        Self::new(bounce, true)
    }

    /// For a thread that carries out requests: migrations, device faults.
    #[must_use]
    pub const fn worker(bounce: VirtAddr) -> Self {
        Self::new(bounce, false)
    }

    const fn new(bounce: VirtAddr, reads_events: bool) -> Self {
        Self {
            bounce,
            reads_events,
            queue: FaultQueue {
                slots: [None; FaultQueue::CAPACITY],
                head: 0,
                len: 0,
            },
            alone: false,
            relief: None,
        }
    }

    /// Has somebody told before something is done that takes long.
    #[must_use]
    pub const fn relieved_by(mut self, relief: &'static dyn Relief) -> Self {
        self.relief = Some(relief);
        self
    }

    /// Whether no other executor serves faults now. A thread that is woken while
    /// this one holds locks finds nobody who would wait for them.
    pub const fn set_alone(&mut self, alone: bool) {
        self.alone = alone;
    }

    pub(crate) const fn is_alone(&self) -> bool {
        self.alone
    }

    pub(crate) fn takes_long(&self) {
        if let Some(relief) = self.relief {
            relief.takes_long();
        }
    }

    pub(crate) fn can_be_shared(&self) {
        if let Some(relief) = self.relief {
            relief.can_be_shared();
        }
    }

    pub(crate) const fn reads_events(&self) -> bool {
        self.reads_events
    }

    /// The first `pages` pages of bounce memory.
    pub(crate) fn bounce(&self, pages: u64) -> PageRange {
        assert!(
            pages <= BOUNCE_PAGES,
            "more pages than the bounce memory has"
        );
        PageRange::from_pages(self.bounce, PageCount::new(pages))
    }

    /// Whether faults were read that are not served yet: whoever waits for events
    /// meanwhile keeps their threads waiting.
    #[must_use]
    pub const fn has_faults(&self) -> bool {
        self.queue.len > 0
    }

    /// Whether another fault could be queued.
    pub(crate) const fn has_room(&self) -> bool {
        self.queue.len < FaultQueue::CAPACITY
    }

    pub(crate) const fn queue(&mut self, fault: QueuedFault) {
        assert!(
            self.queue.len < FaultQueue::CAPACITY,
            "more faults read than fit"
        );
        let at = (self.queue.head + self.queue.len) % FaultQueue::CAPACITY;
        self.queue.slots[at] = Some(fault);
        self.queue.len += 1;
    }

    pub(crate) const fn next_fault(&mut self) -> Option<QueuedFault> {
        if self.queue.len == 0 {
            return None;
        }
        let fault = self.queue.slots[self.queue.head].take();
        self.queue.head = (self.queue.head + 1) % FaultQueue::CAPACITY;
        self.queue.len -= 1;
        fault
    }
}
