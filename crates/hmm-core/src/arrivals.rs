//! Memory that has arrived where an event takes something away.
//!
//! The engine does not know all that is registered: a mapping that grew is not
//! reported. So a place where a remap arrives can look free although another
//! thread's munmap of it is still to be reported:
//!
//! ```text
//! thread 1  munmap(A)   ............  UNMAP A
//! thread 2              mremap(B -> A)   REMAP B A
//! ```
//!
//! The UNMAP means what was there before. But it may as well mean what has
//! arrived, with something new at A since. The kernel's mappings tell whether
//! there is registered memory; reading on tells whether it is still the same:
//! until no change is under way, or the report of the next arrival.
//!
//! Memory that is remapped at the very moment at which it is registered can have got
//! no pieces, and what was mapped in its place may have some. Where the two have
//! pages of different sizes (hugetlbfs), these do not go along.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{Event, SpaceId};
use hmm_mem::Vec;
use hmm_types::{PageCount, PageRange, VirtAddr};

use crate::engine::Engine;
use crate::map::SpaceMap;
use crate::order::target;

/// Looks for another event, of about a microsecond each. A thread that has not
/// queued its event by then does not get to run; see `docs/limits.md`.
const LOOKS: u32 = 20_000;

impl Engine<'_> {
    /// What an unmapping of the range leaves alone.
    pub(crate) fn outlives_unmap(&self, map: &mut SpaceMap, range: PageRange) -> Vec<PageRange> {
        let there = self.arrived(map, range);
        if !there.is_empty() && self.reads_of_another(map, &there) {
            return hmm_mem::vec();
        }
        there
    }

    /// What a remap of the range does not take along. A remap that leaves the
    /// mapping behind (MREMAP_DONTUNMAP) takes all; others are reported as
    /// unmapped next.
    pub(crate) fn outlives_remap(
        &self,
        map: &mut SpaceMap,
        from: PageRange,
        to: VirtAddr,
    ) -> Vec<PageRange> {
        let mut there = self.arrived(map, from);
        if !there.is_empty() {
            let another = self.reads_of_another(map, &there);
            let space = SpaceId::OWN;
            let unmapped = Event::Unmap { space, range: from };
            if another || !map.order.has_read_ahead(|event| *event == unmapped) {
                there.clear();
            }
        }
        there.extend(self.of_another_kind(map, from, to));
        there
    }

    /// Pieces of a range that are not of the kind that has arrived where the range
    /// went, and of which nothing is away.
    fn of_another_kind(
        &self,
        map: &SpaceMap,
        from: PageRange,
        to: VirtAddr,
    ) -> impl Iterator<Item = PageRange> {
        let pieces = self.rooms.are_prepared().then(|| map.overlapping(from));
        pieces.into_iter().flatten().filter_map(move |piece| {
            let block = map.block(piece.block);
            let inner = block.lock();
            if inner.away() > 0 || inner.in_flight() > 0 {
                return None;
            }
            let there = to.plus_pages(piece.start.pages_since(from.start()));
            let mut differs = false;
            let _ = self.space.mappings(
                PageRange::from_pages(there, PageCount::ONE),
                &mut |mapping| {
                    differs = mapping.page_len != block.page_len();
                },
            );
            differs.then(|| piece.range())
        })
    }

    /// The parts of a range that have arrived lately, and where registered memory
    /// is now.
    fn arrived(&self, map: &SpaceMap, range: PageRange) -> Vec<PageRange> {
        let mut there = hmm_mem::vec();
        for part in map.order.reached_parts(range) {
            let piece = map.overlapping(part).next();
            // Cheap, and says no for nearly everything that is in order. Memory of
            // another kind is surely not what has arrived.
            let mapped = piece.is_some_and(|piece| {
                let page_len = map.block(piece.block).page_len();
                let mut any = false;
                let looked = self.space.mappings(part, &mut |mapping| {
                    any |= mapping.page_len == page_len;
                });
                any || looked.is_err()
            });
            if mapped {
                self.space.registered(part, &mut |part| there.push(part));
            }
        }
        there
    }

    /// Whether what is at these places now is not what the engine knows there. Reads on
    /// until no change is under way, or a remap to one of them is reported; that of a
    /// remap that waits for this very event was read before.
    fn reads_of_another(&self, map: &mut SpaceMap, places: &[PageRange]) -> bool {
        self.stats.disputed_events.fetch_add(1, Relaxed);
        let arrives = |event: &Event| match *event {
            Event::Remap {
                space: SpaceId::OWN,
                from,
                to,
            } => places.iter().any(|place| target(from, to).overlaps(*place)),
            _ => false,
        };
        for _ in 0..LOOKS {
            if map.order.has_read_ahead(arrives) {
                return true;
            }
            if self.space.is_quiet() {
                return map.order.is_needed_at(places);
            }
            match self.space.read_event() {
                None => std::hint::spin_loop(),
                Some(Event::Fault { space, address, .. }) => {
                    let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
                    map.order.stop(space, page);
                }
                Some(event) => map.order.read_ahead(event),
            }
        }
        false
    }
}
