//! Reading events, and what structural ones do to the map.
//!
//! The thread that unmapped memory runs on as soon as its event has been
//! *read*. So events are read with the gate held for writing, and structural
//! ones are applied before it is let go: nobody can see a mapping that munmap
//! has already returned from. While an event is unread, every commit of a page
//! fails with "again", so what was read is all that happened.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use hmm_hal::{Event, SpaceId};
use hmm_sync::WriteGuard;
use hmm_types::{PageCount, PageRange, VirtAddr};

use crate::engine::Engine;
use crate::executor::{Executor, QueuedFault};
use crate::map::{BlockInner, Piece, SpaceMap};
use crate::page::PageState;

impl Engine<'_> {
    /// Reads an event, if there is one. Applies a structural one, and queues a
    /// fault for this executor. True when it has read one; does nothing while
    /// the executor's queue is full.
    pub fn pump(&self, executor: &mut Executor) -> bool {
        if !executor.has_room() {
            return false;
        }
        // Every handler wakes for every fault; the one that comes first reads.
        if self.reading.swap(true, Acquire) {
            return false;
        }
        let mut map = self.gate_for_reading();
        if !map.order.is_settled() {
            self.settles(&mut map);
        }
        // Before the event is read: afterwards its thread may have gone on already.
        let read_at = self.uses_now();
        let event = self.space.read_event();
        self.reading.store(false, Release);
        match event {
            None => return false,
            Some(Event::Fault {
                space,
                address,
                kind,
                thread,
                ..
            }) => {
                drop(map);
                executor.queue(QueuedFault {
                    space,
                    address,
                    kind,
                    thread,
                    read_at_ns: self.clock.now_ns(),
                    read_at,
                });
            }
            Some(event) => {
                self.apply(&mut map, event);
                self.end_waiting(&mut map);
                self.wake_stopped(&mut map);
            }
        }
        true
    }

    /// The gate for writing. Those who hold it do so for a few microseconds:
    /// less than it takes to sleep and be woken, so it is worth a few looks.
    fn gate_for_reading(&self) -> WriteGuard<'_, SpaceMap> {
        const LOOKS: u32 = 200;
        for _ in 0..LOOKS {
            if let Some(map) = self.gate.try_write() {
                return map;
            }
            std::hint::spin_loop();
        }
        self.gate.write()
    }

    /// What an event does to the map; [`Engine::apply`] says when.
    pub(crate) fn carry_out(&self, map: &mut SpaceMap, event: Event) {
        match event {
            Event::Fault { .. } => unreachable!("faults are queued, not applied"),
            Event::Unmap {
                space: SpaceId::OWN,
                range,
            } => self.unmap(map, range),
            Event::Remap {
                space: SpaceId::OWN,
                from,
                to,
            } => self.carry_over(map, from, to),
            Event::Remove {
                space: SpaceId::OWN,
                range,
            } => self.remove(map, range),
            Event::Fork {
                parent: SpaceId::OWN,
                child,
            } => self.fork(map, child),
            Event::Fork { parent, child } => self.fork_of_child(map, parent, child),
            Event::Unmap { space, range } | Event::Remove { space, range } => {
                self.child_dropped(space, range);
            }
            Event::Remap { space, from, to } => self.child_remapped(space, from, to),
            Event::Exit { space } => self.child_gone(space),
        }
    }

    /// munmap: the pages are gone, and so is the right to the addresses. What
    /// has arrived there since stays.
    fn unmap(&self, map: &mut SpaceMap, range: PageRange) {
        let spared = if map.order.expected(range) {
            map.order.spared(range)
        } else {
            self.outlives_unmap(map, range)
        };
        for part in without(range, &spared) {
            self.unmap_all(map, part);
        }
    }

    pub(crate) fn unmap_all(&self, map: &mut SpaceMap, range: PageRange) {
        let taken = map.remove(range, |map, piece| {
            let mut inner = map.block(piece.block).lock();
            self.wake_parked(&inner, piece);
            self.drop_pages(&mut inner, piece, PageState::System);
        });
        map.release_blocks(&taken);
    }

    /// mremap: pages keep their block and index, pieces get other addresses.
    fn carry_over(&self, map: &mut SpaceMap, from: PageRange, to: VirtAddr) {
        let spared = self.outlives_remap(map, from, to);
        for part in without(from, &spared) {
            let taken = map.remove(part, |map, piece| {
                let mut inner = map.block(piece.block).lock();
                self.wake_parked(&inner, piece);
                self.invalidate(&mut inner, piece.range());
            });
            map.insert_moved(&taken, from.start(), to);
        }
        map.order.reach(PageRange::from_pages(to, from.pages()));
    }

    /// madvise: the pages are about to be dropped, the mapping stays. The
    /// kernel drops them *after* this event has been read: see
    /// [`PageState::Discarded`].
    ///
    /// Memory can be registered and have no pieces yet, where a mapping grew:
    /// it gets them now, or a page of it could be taken before it is dropped. Or
    /// it is not registered any more, if this is reported late.
    fn remove(&self, map: &mut SpaceMap, range: PageRange) {
        if self.is_staging(range.start()) {
            return;
        }
        let known: PageCount = map.overlapping(range).map(|p| p.range().pages()).sum();
        if known < range.pages() {
            let adopted = self.adopt(map, range);
            assert!(adopted, "more mappings than the engine can watch");
        }
        for piece in map.overlapping(range) {
            let block = map.block(piece.block);
            let piece = if block.is_gigantic() {
                map.undivided(piece)
            } else {
                piece
            };
            self.drop_pages(&mut block.lock(), piece, PageState::Discarded);
        }
    }

    /// Threads that wait at addresses which are going: nobody would find them
    /// when the flight ends, which goes by block. They look again, at what is
    /// there now. Whoever brings a page home for a thread has not marked it.
    fn wake_parked(&self, inner: &BlockInner, piece: Piece) {
        let flying = inner.in_flight() > 0
            && (piece.first..piece.first + piece.pages).any(|index| inner.state(index).in_flight());
        if flying {
            self.space.wake(SpaceId::OWN, piece.range());
        }
    }

    /// Frees what the pages of a piece hold away from the CPU and leaves them
    /// in `state`; pages in flight are left to their executor, marked.
    fn drop_pages(&self, inner: &mut BlockInner, piece: Piece, state: PageState) {
        // An entry is for one page, or for several with frames in a row.
        let unit = inner.unit();
        let mut pages = (piece.first..piece.first + piece.pages).step_by(unit as usize);
        // What is being dropped left the devices when it was claimed.
        if !pages.all(|index| matches!(inner.state(index), PageState::Dropping { .. })) {
            self.invalidate(inner, piece.range());
        }
        for index in (piece.first..piece.first + piece.pages).step_by(unit as usize) {
            match inner.state(index) {
                PageState::System | PageState::Discarded => inner.set(index, state),
                PageState::Device { device, frame } => {
                    self.devices
                        .slot(device)
                        .free(hmm_types::FrameRange::new(frame, unit));
                    inner.set(index, state);
                }
                PageState::Staged { page, .. } => {
                    self.staging.lock().put_used(page, self.reuses_pages());
                    inner.set(index, state);
                }
                PageState::Dropping { .. } if state == PageState::Discarded => {
                    inner.note_dropped(index);
                }
                PageState::Copying { .. }
                | PageState::Dropping { .. }
                | PageState::Dropped { .. }
                | PageState::Uploading { .. }
                | PageState::Downloading { .. }
                | PageState::Transferring { .. } => {
                    self.stats.doomed_pages.fetch_add(unit.into(), Relaxed);
                    inner.doom(index);
                }
            }
        }
        inner.tidy();
    }

    /// Takes a range of one block away from all devices that map it, and tells
    /// those who mirror it. When it returns no device uses the range.
    pub(crate) fn invalidate(&self, inner: &mut BlockInner, range: PageRange) {
        self.notifiers.lock().invalidate(range);
        if inner.away() > 0 || inner.in_place != 0 || inner.in_flight() > 0 {
            for (_, slot) in self.devices.all() {
                slot.device.unmap(range);
            }
        }
    }
}

/// The parts of a range outside of others.
fn without(range: PageRange, others: &[PageRange]) -> impl Iterator<Item = PageRange> {
    let mut from = range.start();
    std::iter::from_fn(move || {
        while from < range.end() {
            let rest = PageRange::span(from, range.end());
            let parts = others.iter().filter_map(|other| other.intersection(rest));
            let next = parts.min_by_key(|part| part.start());
            let upto = next.map_or(range.end(), PageRange::start);
            let part = (from < upto).then(|| PageRange::span(from, upto));
            from = next.map_or(range.end(), PageRange::end);
            if part.is_some() {
                return part;
            }
        }
        None
    })
}
