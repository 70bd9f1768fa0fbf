//! Events come in another order than the changes that they report.
//!
//! A thread changes the mappings under the kernel's lock and queues its event
//! after it has let go of it, so another thread's later change may be reported
//! first. And one mremap is reported twice: where the memory went, and, when
//! that has been read, that the place it left is unmapped. In between other
//! threads may map memory there:
//!
//! ```text
//! thread 1  mremap(A -> B)   REMAP A B  ................  UNMAP A
//! thread 2                   mremap(C -> A)   REMAP C A
//! ```
//!
//! Taken at its word, the UNMAP would throw away what thread 2 has moved to A.
//! So a remap waits until its target is free, and the UNMAP that follows a
//! remap spares what has arrived meanwhile. While it waits nothing is read before
//! the thread that keeps the target has queued its event: thread 2 must not go
//! on and change A again, which would be taken for thread 1's A. All of this is
//! forgotten as soon as no change is under way. Until then the kernel lets nothing be committed, so
//! nobody sees what is not settled yet.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{Event, SpaceId};
use hmm_mem::Vec;
use hmm_types::{PageCount, PageRange, VirtAddr};

use crate::engine::Engine;
use crate::map::SpaceMap;

/// Remembered ranges of a kind; of more, the oldest are forgotten: whoever
/// caused them has had its turn long ago.
const REMEMBERED: usize = 256;

/// What is known about changes that are under way.
pub(crate) struct Order {
    /// Left by a remap, and not yet reported as unmapped.
    left: Vec<PageRange>,
    /// Reached by a remap.
    reached: Vec<PageRange>,
    /// Remaps whose target something else still has, and what happened to the
    /// target afterwards.
    waiting: Vec<Event>,
    /// Pages whose faults were read along with what was looked for.
    stopped: Vec<(SpaceId, PageRange)>,
    /// Events that were read to understand another one, and come after it.
    ahead: Vec<Event>,
}

impl Order {
    pub(crate) const fn new() -> Self {
        Self {
            left: hmm_mem::vec(),
            reached: hmm_mem::vec(),
            waiting: hmm_mem::vec(),
            stopped: hmm_mem::vec(),
            ahead: hmm_mem::vec(),
        }
    }

    /// Whether there is nothing to remember.
    pub(crate) fn is_settled(&self) -> bool {
        self.left.is_empty() && self.reached.is_empty() && self.waiting.is_empty()
    }

    /// No change is under way.
    pub(crate) fn settle(&mut self) {
        assert!(self.waiting.is_empty(), "a remap was not carried out");
        debug_assert!(self.ahead.is_empty(), "an event was not applied");
        self.left.clear();
        self.reached.clear();
    }

    /// A remap was read.
    pub(crate) fn leave(&mut self, from: PageRange) {
        remember(&mut self.left, from);
    }

    /// A remap was carried out.
    pub(crate) fn reach(&mut self, target: PageRange) {
        remember(&mut self.reached, target);
    }

    /// Whether this is what follows a remap; once for each.
    pub(crate) fn expected(&mut self, unmapped: PageRange) -> bool {
        let at = self.left.iter().position(|&left| left == unmapped);
        at.map(|at| self.left.remove(at)).is_some()
    }

    /// The parts of a range that have arrived lately, or are still to leave.
    pub(crate) fn spared(&self, range: PageRange) -> Vec<PageRange> {
        let leaving = self.waiting.iter().filter_map(|event| match event {
            Event::Remap { from, .. } => Some(*from),
            _ => None,
        });
        let mut spared = hmm_mem::vec();
        let parts = leaving.filter_map(|leaving| leaving.intersection(range));
        spared.extend(self.reached_parts(range).chain(parts));
        spared
    }

    /// The parts of a range that a remap has reached.
    pub(crate) fn reached_parts(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        let reached = self.reached.iter();
        reached.filter_map(move |reached| reached.intersection(range))
    }

    /// Keeps an event for after the one that is being carried out.
    pub(crate) fn read_ahead(&mut self, event: Event) {
        self.ahead.push(event);
    }

    pub(crate) fn has_read_ahead(&self, wanted: impl Fn(&Event) -> bool) -> bool {
        self.ahead.iter().any(wanted)
    }

    /// Whether a remap to one of these places waits, and nothing else that was read
    /// makes the place free for it. What follows a remap does not count: that one did.
    pub(crate) fn is_needed_at(&self, places: &[PageRange]) -> bool {
        let frees = |event: &Event, place: &PageRange| match event {
            Event::Remap { from, .. } => from.overlaps(*place),
            Event::Unmap { range, .. } => range.overlaps(*place) && !self.left.contains(range),
            _ => false,
        };
        let mut events = self.ahead.iter().chain(&self.waiting);
        places.iter().any(|place| self.awaits(*place))
            && !events.any(|event| places.iter().any(|place| frees(event, place)))
    }

    /// A thread whose fault was read is to look again later.
    pub(crate) fn stop(&mut self, space: SpaceId, page: PageRange) {
        self.stopped.push((space, page));
    }

    /// The remap that waits longest: what went, and where it is.
    fn awaited(&self) -> Option<(PageRange, PageRange)> {
        self.waiting.iter().find_map(|event| match event {
            Event::Remap { from, to, .. } => Some((*from, target(*from, *to))),
            _ => None,
        })
    }

    /// Whether a remap to a part of the range waits.
    fn awaits(&self, range: PageRange) -> bool {
        self.waiting.iter().any(|event| match event {
            Event::Remap { from, to, .. } => target(*from, *to).overlaps(range),
            _ => false,
        })
    }

    /// Whether the fork that made a child waits.
    fn awaits_child(&self, space: SpaceId) -> bool {
        let mut waiting = self.waiting.iter();
        waiting.any(|event| matches!(event, Event::Fork { child, .. } if *child == space))
    }

    /// All that waits, in the order in which it was read.
    fn take_waiting(&mut self) -> Vec<Event> {
        std::mem::replace(&mut self.waiting, hmm_mem::vec())
    }
}

impl Engine<'_> {
    /// Carries an event out, or has it wait; and then what was read to understand
    /// it.
    pub(crate) fn apply(&self, map: &mut SpaceMap, event: Event) {
        self.apply_one(map, event);
        while !map.order.ahead.is_empty() {
            let event = map.order.ahead.remove(0);
            self.apply_one(map, event);
        }
    }

    /// Carries an event out, and what has waited for it; or has it wait.
    fn apply_one(&self, map: &mut SpaceMap, event: Event) {
        self.stats.structural_events.fetch_add(1, Relaxed);
        if let Event::Remap {
            space: SpaceId::OWN,
            from,
            ..
        } = event
        {
            map.order.leave(from);
        }
        if must_wait(map, event) {
            map.order.waiting.push(event);
            return;
        }
        self.carry_out(map, event);
        for event in map.order.take_waiting() {
            if must_wait(map, event) {
                map.order.waiting.push(event);
            } else {
                self.carry_out(map, event);
            }
        }
    }

    /// Reads on until nothing waits. Whoever keeps a remap's target is between
    /// the kernel's lock and its event, and needs no lock of the engine's.
    pub(crate) fn end_waiting(&self, map: &mut SpaceMap) {
        let mut asked = None;
        while !map.order.waiting.is_empty() {
            if !self.space.is_quiet() {
                let awaited = map.order.awaited();
                // Once for each: what was seen is in the queue from then on.
                if let Some((from, target)) = awaited
                    && asked != awaited
                {
                    asked = awaited;
                    self.stats.overtaken_events.fetch_add(1, Relaxed);
                    if !self.space.await_change(target, from) {
                        self.stats.overtaken_not_found.fetch_add(1, Relaxed);
                    }
                }
                self.read_more(map);
                continue;
            }
            // Nothing more is to come that would free a target.
            for event in map.order.take_waiting() {
                if let Event::Remap { from, to, .. } = event {
                    self.unmap_all(map, target(from, to));
                }
                self.carry_out(map, event);
            }
            map.order.settle();
        }
        self.unsettled.store(!map.order.is_settled(), Relaxed);
    }

    /// Reads and applies an event with the gate held. Faults are not for now.
    /// Their threads look again, but not before [`Engine::wake_stopped`]: the
    /// kernel hands out faults first, and would have nothing else to hand out.
    pub(crate) fn read_more(&self, map: &mut SpaceMap) {
        match self.space.read_event() {
            None => {}
            Some(Event::Fault { space, address, .. }) => {
                let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
                map.order.stop(space, page);
            }
            Some(event) => self.apply(map, event),
        }
    }

    /// Has those look again whose faults [`Engine::read_more`] has met.
    pub(crate) fn wake_stopped(&self, map: &mut SpaceMap) {
        for (space, page) in map.order.stopped.drain(..) {
            self.space.wake(space, page);
        }
    }

    /// Whether no change is under way; then none is remembered.
    pub(crate) fn settles(&self, map: &mut SpaceMap) -> bool {
        let quiet = self.space.is_quiet();
        if quiet {
            map.order.settle();
            self.unsettled.store(false, Relaxed);
        }
        quiet
    }

    /// Whether the engine remembers changes that may still be under way: then
    /// [`Engine::pump`] is to be called again soon.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled.load(Relaxed)
    }
}

/// Whether an event is about what a remap that waits will have done.
fn must_wait(map: &SpaceMap, event: Event) -> bool {
    let order = &map.order;
    match event {
        Event::Remap {
            space: SpaceId::OWN,
            from,
            to,
        } => {
            let target = target(from, to);
            map.overlapping(target).next().is_some() || order.awaits(target)
        }
        Event::Remove {
            space: SpaceId::OWN,
            range,
        } => order.awaits(range),
        // The child has what the remap has done.
        Event::Fork {
            parent: SpaceId::OWN,
            ..
        } => !order.waiting.is_empty(),
        Event::Unmap { space, .. }
        | Event::Remap { space, .. }
        | Event::Remove { space, .. }
        | Event::Exit { space }
        | Event::Fork { parent: space, .. } => order.awaits_child(space),
        Event::Fault { .. } => false,
    }
}

pub(crate) fn target(from: PageRange, to: VirtAddr) -> PageRange {
    PageRange::from_pages(to, from.pages())
}

fn remember(list: &mut Vec<PageRange>, range: PageRange) {
    if list.len() == REMEMBERED {
        list.remove(0);
    }
    list.push(range);
}
