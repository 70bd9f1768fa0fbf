//! Events that wait to be read, and threads that wait for pages.

use hmm_hal::{Event, EventBatch, FaultKind, SpaceId};
use hmm_types::{Access, PageRange, VirtAddr};

use crate::rng::SimRng;

/// The name of an event that a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Clone, Copy, Debug)]
struct Waiting {
    ticket: Ticket,
    space: SpaceId,
    event: Event,
    /// The kernel has changed the mappings, but not yet queued the message.
    hidden: bool,
    /// The same thread's event before this one.
    after: Option<Ticket>,
}

#[derive(Clone, Copy, Debug)]
struct Stopped {
    space: SpaceId,
    thread: u32,
    address: VirtAddr,
    kind: FaultKind,
    access: Access,
    delivered: bool,
}

/// All messages of the kernel that nobody has read yet.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    next: u64,
    events: Vec<Waiting>,
    stopped: Vec<Stopped>,
}

impl EventQueue {
    /// Queues the events of one thread, which sends each when the one before
    /// has been read. Returns the last one's ticket.
    pub(crate) fn post(
        &mut self,
        rng: &mut SimRng,
        space: SpaceId,
        events: impl IntoIterator<Item = Event>,
    ) -> Option<Ticket> {
        let mut last = None;
        for event in events {
            let ticket = Ticket(self.next);
            self.next += 1;
            self.events.push(Waiting {
                ticket,
                space,
                event,
                hidden: rng.one_in(4),
                after: last,
            });
            last = Some(ticket);
        }
        last
    }

    /// Whether an event has not been read yet.
    pub(crate) fn is_unread(&self, ticket: Ticket) -> bool {
        self.events.iter().any(|waiting| waiting.ticket == ticket)
    }

    /// Whether resolving calls on a space say "again" (`mmap_changing`).
    pub(crate) fn changing(&self, space: SpaceId) -> bool {
        self.events
            .iter()
            .any(|waiting| waiting.space == space && !matches!(waiting.event, Event::Exit { .. }))
    }

    /// A thread stops at a page.
    pub(crate) fn stop(
        &mut self,
        space: SpaceId,
        thread: u32,
        address: VirtAddr,
        kind: FaultKind,
        access: Access,
    ) {
        assert!(!self.is_stopped(thread), "simulator: a thread stops twice");
        self.stopped.push(Stopped {
            space,
            thread,
            address,
            kind,
            access,
            delivered: false,
        });
    }

    pub(crate) fn is_stopped(&self, thread: u32) -> bool {
        self.stopped.iter().any(|stopped| stopped.thread == thread)
    }

    /// Wakes the threads that wait for a page of the range.
    pub(crate) fn wake(&mut self, space: SpaceId, range: PageRange) {
        self.stopped
            .retain(|stopped| stopped.space != space || !range.contains(stopped.address));
    }

    /// A signal ends a thread's wait.
    pub(crate) fn interrupt(&mut self, thread: u32) {
        self.stopped.retain(|stopped| stopped.thread != thread);
    }

    /// Forgets the threads of a space that is gone.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.stopped.retain(|stopped| stopped.space != space);
        self.events.retain(|waiting| waiting.space != space);
    }

    /// Reads. Messages of different threads come in any order.
    pub(crate) fn read(&mut self, rng: &mut SimRng, batch: &mut EventBatch) {
        for waiting in &mut self.events {
            waiting.hidden &= rng.one_in(2);
        }
        let mut faults: Vec<_> = (0..self.stopped.len())
            .filter(|&index| !self.stopped[index].delivered)
            .map(Err)
            .collect();
        let unread: Vec<_> = self.events.iter().map(|waiting| waiting.ticket).collect();
        let ready = |waiting: &&Waiting| {
            !waiting.hidden && waiting.after.is_none_or(|ticket| !unread.contains(&ticket))
        };
        // The kernel hands out faults first; the channel may reorder. What a
        // fork copied cannot be told when events overtake it, so they do not.
        let forking = self
            .events
            .iter()
            .any(|waiting| matches!(waiting.event, Event::Fork { .. }));
        if forking {
            faults.extend(
                self.events
                    .iter()
                    .take_while(ready)
                    .map(|waiting| Ok(waiting.ticket)),
            );
        } else {
            faults.extend(
                self.events
                    .iter()
                    .filter(ready)
                    .map(|waiting| Ok(waiting.ticket)),
            );
            if rng.one_in(2) {
                rng.shuffle(&mut faults);
            }
        }
        let mut room = batch.room();
        if rng.one_in(8) {
            room = room.min(1);
        }
        for message in faults.into_iter().take(room) {
            match message {
                Err(index) => {
                    let stopped = &mut self.stopped[index];
                    stopped.delivered = true;
                    batch.push(Event::Fault {
                        space: stopped.space,
                        address: stopped.address,
                        kind: stopped.kind,
                        access: stopped.access,
                        thread: stopped.thread,
                    });
                }
                Ok(ticket) => {
                    if let Some(at) = self.events.iter().position(|w| w.ticket == ticket) {
                        batch.push(self.events.remove(at).event);
                    }
                }
            }
        }
    }

    /// Whether something waits to be read.
    pub(crate) fn has_unread(&self) -> bool {
        !self.events.is_empty() || self.stopped.iter().any(|stopped| !stopped.delivered)
    }

    /// For a message about a hang.
    pub(crate) fn describe(&self) -> String {
        format!("unread: {:?}; stopped: {:?}", self.events, self.stopped)
    }
}
