//! Registering memory that is to migrate for the first time.

use hmm_hal::{Mapping, RegisterError};
use hmm_sync::WriteGuard;
use hmm_types::{PAGE_SIZE, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr};

use crate::Destination;
use crate::engine::Engine;
use crate::executor::Executor;
use crate::map::SpaceMap;

/// How often a mapping that changes all the time is tried.
const TRIES: u32 = 16;

impl Engine<'_> {
    /// Registers a mapping, unless it is: all of it, since registering a part
    /// would split it, and the program could not remap it as one any more.
    pub(crate) fn watch_mapping(
        &self,
        executor: &mut Executor,
        mapping: &Mapping,
    ) -> Option<StayReason> {
        // Also where it is registered already: it may have been for another reason.
        let prepare = |page_len: PageCount| {
            let gigantic = page_len > PageCount::from(PAGES_PER_BLOCK);
            self.rooms.prepare() && (!gigantic || self.gigantic.prepare(page_len))
        };
        if mapping.huge_pages && !prepare(mapping.page_len) {
            return Some(StayReason::NoSystemMemory);
        }
        if self.registered_pages(mapping.range) == mapping.range.pages() {
            return None;
        }
        let Some(_departure) = self.depart() else {
            return Some(StayReason::Cancelled);
        };
        for _ in 0..TRIES {
            let Some(mut map) = self.gate_when_quiet(executor) else {
                return Some(StayReason::Busy);
            };
            match self.watch_now(&mut map, mapping) {
                Ok(true) => return None,
                Ok(false) => {}
                Err(reason) => return Some(reason),
            }
        }
        Some(StayReason::Raced)
    }

    /// Lets memory go that has been excluded meanwhile: what of it has left comes home,
    /// and no event tells of it any more. False when something is in the way of that;
    /// then it stays watched.
    pub fn unwatch_excluded(&self, executor: &mut Executor, range: PageRange) -> bool {
        if self.registered_pages(range) == PageCount::ZERO {
            return true;
        }
        self.migrate(executor, range, Destination::System);
        let Some(mut map) = self.gate_when_quiet(executor) else {
            return false;
        };
        let at_home = map.overlapping(range).all(|piece| {
            let inner = map.block(piece.block).lock();
            let mut states = (piece.first..piece.first + piece.pages).map(|page| inner.state(page));
            states.all(|state| !state.is_away() && !state.in_flight())
        });
        if !at_home {
            return false;
        }
        for piece in map.overlapping(range) {
            self.space.unregister(piece.range());
        }
        self.unmap_all(&mut map, range);
        true
    }

    /// The gate for writing while no change is under way: the map would have
    /// pieces of memory that is not there any more, and what takes its place
    /// would seem registered.
    fn gate_when_quiet(&self, executor: &mut Executor) -> Option<WriteGuard<'_, SpaceMap>> {
        let mut attempt = 0;
        loop {
            let mut map = self.gate.write();
            if self.settles(&mut map) {
                return Some(map);
            }
            drop(map);
            if !self.wait_for_events(executor, attempt) {
                return None;
            }
            attempt += 1;
        }
    }

    /// One try. The program goes on changing memory that is not registered, and
    /// nobody is told: false when that came in between, and nothing was done.
    /// With the gate held no event is lost between the kernel's registration
    /// and ours.
    fn watch_now(&self, map: &mut SpaceMap, judged: &Mapping) -> Result<bool, StayReason> {
        let Some(range) = self.mapping_that_is(judged) else {
            return Err(StayReason::Raced);
        };
        let adjoined = self.adjoined(range);
        match self.space.register(range) {
            Ok(()) => {}
            Err(RegisterError::Foreign) => return Err(StayReason::ForeignUserfaultfd),
            Err(RegisterError::Unsuitable) => return Ok(false),
            Err(RegisterError::Limit) => return Err(StayReason::Limit),
        }
        // Still the memory that was judged, and not a part of another mapping,
        // which would be split now? And did the kernel meet all of it?
        let same = self.adjoined(range) == adjoined
            && self
                .mapping_that_is(judged)
                .is_some_and(|now| now.encloses(range))
            && self.was_met(range);
        if same && map.insert(range, judged.page_len) {
            return Ok(true);
        }
        self.undo(map, range);
        if same {
            return Err(StayReason::Limit);
        }
        Ok(false)
    }

    /// Whether all of a range, which is one mapping now, was registered. The kernel
    /// skips what the program has elsewhere at that moment, and does not report
    /// that it returns. If it skipped all of the mapping, then what it took instead
    /// has gone since, which is a change under way.
    fn was_met(&self, range: PageRange) -> bool {
        self.space.is_quiet() || {
            let mut registered = PageCount::ZERO;
            self.space
                .registered(range, &mut |part| registered += part.pages());
            registered == range.pages()
        }
    }

    /// Only what was registered before stays so. Nothing of the rest has left yet.
    fn undo(&self, map: &mut SpaceMap, range: PageRange) {
        let mut next = range.start();
        for piece in map.overlapping(range) {
            if next < piece.start {
                self.space.unregister(PageRange::span(next, piece.start));
            }
            next = piece.range().end();
        }
        if next < range.end() {
            self.space.unregister(PageRange::span(next, range.end()));
        }
        if self.space.is_quiet() {
            return;
        }
        // Perhaps a drop was announced meanwhile, which comes when that has been
        // read. Nothing may take those pages before: so they are registered again
        // after all, and the event finds them.
        for mapping in self.mappings_of(range).into_iter().flatten() {
            if Self::immovable(&mapping).is_none() && self.space.register(mapping.range).is_ok() {
                // With no room for it, it is registered memory without a piece,
                // which the event gives it.
                let _ = self.adopt(map, mapping.range);
            }
        }
    }

    /// Makes pieces for what of a range is registered and has none. False when there
    /// would be too many.
    pub(crate) fn adopt(&self, map: &mut SpaceMap, range: PageRange) -> bool {
        let mut room = true;
        let mappings = self.mappings_of(range).into_iter().flatten();
        for mapping in mappings.filter(|mapping| !mapping.engine_owned) {
            // As it is now, which need not be what was there a moment ago.
            self.space.registered(mapping.range, &mut |part| {
                room &= map.insert(part, mapping.page_len);
            });
        }
        room
    }

    /// All of the mapping that has the judged range now, if it is still of the
    /// same kind.
    fn mapping_that_is(&self, judged: &Mapping) -> Option<PageRange> {
        let mappings = self.mappings_of(judged.range)?;
        let first = mappings.first()?;
        let same = mappings.iter().all(|now| {
            now.kind == judged.kind
                && now.huge_pages == judged.huge_pages
                && now.page_len == judged.page_len
                && now.shared_region == judged.shared_region
                && now.whole == first.whole
                && Self::immovable(now).is_none()
        });
        (same && first.whole.encloses(judged.range)).then_some(first.whole)
    }

    /// Where the mapping right before a range begins, and where the one right
    /// behind it ends. Registering may join them with the range, no more; or part them,
    /// where the range is what may be watched of a mapping that is the engine's in part.
    fn adjoined(&self, range: PageRange) -> [Option<VirtAddr>; 2] {
        let mapping_at = |page: u64| {
            let page = PageRange::new(VirtAddr::new(page), PAGE_SIZE).ok()?;
            Some(self.mappings_of(page)?.first()?.vma)
        };
        let before = range.start().get().checked_sub(PAGE_SIZE);
        [
            before.and_then(mapping_at).map(PageRange::start),
            mapping_at(range.end().get()).map(PageRange::end),
        ]
    }
}
