//! Events that wait to be read, and threads that wait for pages.

use hmm_hal::{Event, FaultKind, SpaceId};
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
    /// The kernel has changed the mappings, but the message is not queued
    /// before so many reads: the thread may not get to run for a while.
    late: u64,
    /// Somebody has waited for it.
    hurried: bool,
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
                late: match rng.below(16) {
                    0 => rng.below(32),
                    1..4 => rng.below(4),
                    _ => 0,
                },
                hurried: false,
                after: last,
            });
            last = Some(ticket);
        }
        last
    }

    /// None of the events that there are now is found by the next reads.
    pub(crate) fn delay(&mut self, reads: u64) {
        for waiting in &mut self.events {
            waiting.late = reads;
        }
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

    /// Reads. Messages of different threads come in any order; but those that
    /// were waited for are in the queue before all that is queued later.
    pub(crate) fn read(&mut self, rng: &mut SimRng) -> Option<Event> {
        for waiting in &mut self.events {
            waiting.late = waiting.late.saturating_sub(1);
        }
        // The kernel hands out faults first; the channel may reorder.
        let fresh = |stopped: &&mut Stopped| !stopped.delivered;
        let faults = self.stopped.iter_mut().filter(fresh).count();
        let ready = self.ready_events();
        let among = faults as u64 + if rng.one_in(2) { ready.len() as u64 } else { 0 };
        if faults > 0 && rng.below(among) < faults as u64 {
            let chosen = rng.index(faults);
            let stopped = self.stopped.iter_mut().filter(fresh).nth(chosen)?;
            stopped.delivered = true;
            return Some(Event::Fault {
                space: stopped.space,
                address: stopped.address,
                kind: stopped.kind,
                access: stopped.access,
                thread: stopped.thread,
            });
        }
        let in_order = ready.is_empty() || self.is_forking() || rng.one_in(2);
        let chosen = if in_order { 0 } else { rng.index(ready.len()) };
        let at = *ready.get(chosen)?;
        Some(self.events.remove(at).event)
    }

    /// The events that a read could find, by index.
    fn ready_events(&self) -> Vec<usize> {
        let ready = |waiting: &Waiting| {
            waiting.late == 0 && waiting.after.is_none_or(|ticket| !self.is_unread(ticket))
        };
        let numbered = || self.events.iter().enumerate();
        let hurried = |waiting: &Waiting| ready(waiting) && waiting.hurried;
        if let Some((first, _)) = numbered().find(|(_, waiting)| hurried(waiting)) {
            return vec![first];
        }
        // What a fork copied cannot be told when events overtake it, so they
        // do not.
        let forking = self.is_forking();
        numbered()
            .take_while(|(_, waiting)| !forking || ready(waiting))
            .filter(|(_, waiting)| ready(waiting))
            .map(|(index, _)| index)
            .collect()
    }

    fn is_forking(&self) -> bool {
        self.events
            .iter()
            .any(|waiting| matches!(waiting.event, Event::Fork { .. }))
    }

    /// Whoever has taken something away from a range has said so before
    /// anything else is said. False when there is nobody.
    pub(crate) fn hurry(&mut self, range: PageRange, mover: PageRange) -> bool {
        let mut found = false;
        for waiting in &mut self.events {
            let gone = match waiting.event {
                Event::Unmap { range, .. } => range,
                Event::Remap { from, .. } => from,
                _ => continue,
            };
            if waiting.space == SpaceId::OWN && gone.overlaps(range) && gone != mover {
                waiting.late = 0;
                waiting.hurried = true;
                found = true;
            }
        }
        found
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
