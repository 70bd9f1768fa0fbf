//! Pages of hugetlbfs: 2 MiB that move as a whole or not at all.
//!
//! `UFFDIO_MOVE` does not take them, so they go the way of [`crate::fallback`]:
//! write-protect, copy, drop. They come home by `UFFDIO_COPY` of a whole page, for
//! which the data has to lie together: in a *room* of 2 MiB. The kernel takes the
//! page from its pool again; should that be empty, the data rests on the device
//! and the thread that wants it tries again and again.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use hmm_hal::Dropped;
use hmm_mem::Pages;
use hmm_types::{
    BLOCK_PAGES, DeviceId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr,
};

use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::Executor;
use crate::fallback::Tried;
use crate::home::Home;
use crate::page::PageState;
use crate::report::MigrationReport;
use crate::upload::{Fate, Flight, Target};

/// Pages that are dropped together.
const TOGETHER: usize = 16;
/// Rooms there are: more come home one after the other.
const ROOMS: usize = 8;

/// Engine memory for whole pages on their way home. It is there as soon as
/// anything is registered that may need it: who brings a page home allocates
/// nothing.
pub(crate) struct Rooms {
    pages: OnceLock<Option<Pages>>,
    /// One bit each.
    taken: AtomicU32,
}

/// One of them, until it is dropped.
pub(crate) struct Room<'rooms> {
    rooms: &'rooms Rooms,
    number: u32,
    start: VirtAddr,
}

impl Rooms {
    pub(crate) const fn new() -> Self {
        Self {
            pages: OnceLock::new(),
            taken: AtomicU32::new(0),
        }
    }

    /// Makes sure that they exist. False when engine memory is used up.
    pub(crate) fn prepare(&self) -> bool {
        let pages = PageCount::from(ROOMS * PAGES_PER_BLOCK);
        self.pages.get_or_init(|| Pages::new(pages)).is_some()
    }

    /// Whether anything was registered that may need one.
    pub(crate) fn are_prepared(&self) -> bool {
        self.pages.get().is_some()
    }

    /// Does not wait: `None` when all are taken.
    pub(crate) fn take(&self) -> Option<Room<'_>> {
        let start = self.pages.get()?.as_ref()?.range().start();
        let mut taken = self.taken.load(Acquire);
        loop {
            let number = taken.trailing_ones();
            if number as usize >= ROOMS {
                return None;
            }
            let more = taken | 1 << number;
            match self
                .taken
                .compare_exchange_weak(taken, more, AcqRel, Acquire)
            {
                Ok(_) => {
                    return Some(Room {
                        rooms: self,
                        number,
                        start: start.plus_pages(u64::from(number) * PAGES_PER_BLOCK as u64),
                    });
                }
                Err(now) => taken = now,
            }
        }
    }
}

impl Room<'_> {
    pub(crate) const fn start(&self) -> VirtAddr {
        self.start
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.rooms.taken.fetch_and(!(1 << self.number), Release);
    }
}

/// A page that was copied to a device and is still the program's.
struct Copied {
    flight: Flight,
    place: PageRange,
    frames: FrameRange,
}

impl Engine<'_> {
    /// Moves the pages of a mapping to a device, several together: each drop is an
    /// event that has to be read before it is done.
    pub(crate) fn migrate_huge_pages(
        &self,
        executor: &mut Executor,
        range: PageRange,
        target: Target,
        keep: PageRange,
        report: &mut MigrationReport,
    ) {
        // What is evicted for it goes whole, too.
        let floor = keep.start().block_floor();
        let blocks = keep
            .end()
            .pages_since(floor)
            .div_ceil(PAGES_PER_BLOCK as u64);
        let whole = PageCount::new(blocks * PAGES_PER_BLOCK as u64);
        let keep = PageRange::from_pages(floor, whole);
        let mut from = range.start();
        while from < range.end() {
            let rest = PageRange::span(from, range.end());
            let end = self.migrate_together(executor, rest, target, report);
            if end > from {
                from = end;
                continue;
            }
            let end = from.block_floor().plus_pages(PAGES_PER_BLOCK as u64);
            let asked = PageRange::span(from, end.min(range.end()));
            self.migrate_huge_page(executor, asked, target, keep, report);
            from = asked.end();
        }
    }

    /// Moves the first pages of a range that are at home and can go at once; says
    /// where they end. Whatever is in the way is left to
    /// [`Engine::migrate_huge_page`].
    fn migrate_together(
        &self,
        executor: &mut Executor,
        range: PageRange,
        target: Target,
        report: &mut MigrationReport,
    ) -> VirtAddr {
        let mut end = range.start();
        let Ok(departure) = self.depart_to(target.device) else {
            return end;
        };
        // Who reads events cannot wait for one.
        if executor.reads_events() {
            return end;
        }
        let mut rooms: [Option<FrameRange>; TOGETHER] = [None; TOGETHER];
        let mut copied: [Option<Copied>; TOGETHER] = [const { None }; TOGETHER];
        let whole = || {
            let blocks = range.blocks();
            blocks.take_while(|block| block.pages().index() == PAGES_PER_BLOCK)
        };
        let device = self.devices.slot(target.device).device;
        let mut fits = range.start();
        for (room, page) in rooms.iter_mut().zip(whole()) {
            *room = self.frames_for_whole(page, target.device);
            if room.is_none() {
                break;
            }
            fits = page.end();
        }
        // In a region it takes a message to every peer.
        if !target.by_copy && fits > range.start() {
            self.protect_ahead(PageRange::span(range.start(), fits));
        }
        for ((slot, room), page) in copied.iter_mut().zip(&mut rooms).zip(whole()) {
            let Some(frames) = room.take() else {
                break;
            };
            *slot = self.copy_whole(executor, page, frames, target);
            if slot.is_none() {
                break;
            }
        }
        for frames in rooms.into_iter().flatten() {
            device.free(frames);
        }
        let pages = || copied.iter().flatten();
        if let Some(last) = pages().next_back() {
            let span = PageRange::span(range.start(), last.place.end());
            self.read_changes(executor);
            let unchanged = pages().all(|page| {
                let marked = self.mark_dropping(&page.flight, 0, page.frames, target.device);
                marked.is_some_and(|(place, _)| place == page.place)
            });
            hmm_sync::assert_none_held();
            let dropped = unchanged.then(|| match self.space.discard(span) {
                Ok(Dropped::Reported) => true,
                Ok(Dropped::Unreported) => {
                    pages().for_each(|page| self.note_dropped(&page.flight, 0, BLOCK_PAGES));
                    true
                }
                Err(_) => false,
            });
            let mut gone = dropped == Some(true);
            if gone {
                self.lift_what_is_left(pages(), span);
            }
            for page in pages() {
                gone = gone && self.is_dropped(executor, &page.flight);
            }
            if gone {
                for page in pages() {
                    match self
                        .commit_out(&page.flight, page.frames, target, true)
                        .fate
                    {
                        Fate::Moved { zeroed, .. } => {
                            report.moved += page.place.pages();
                            report.huge += page.place.pages();
                            report.zeroed += PageCount::new(zeroed);
                        }
                        Fate::Stayed(reason) => report.stay(page.place, reason),
                        other => unreachable!("a committed page: {other:?}"),
                    }
                }
                end = span.end();
                let all = span.pages().get();
                self.stats.fallback_pages.fetch_add(all, Relaxed);
            } else {
                let tried = dropped.map(|all| Tried::dropped(if all { BLOCK_PAGES } else { 0 }));
                for page in pages() {
                    let (flight, frames) = (&page.flight, page.frames);
                    self.release_protected(executor, flight, page.place, frames, target, tried);
                }
            }
        }
        drop(departure);
        self.transition_ended();
        end
    }

    /// Frames that follow each other for all of a page.
    fn frames_for_whole(&self, page: PageRange, device: DeviceId) -> Option<FrameRange> {
        let device = self.devices.slot(device).device;
        let frames = device.allocate(page.pages()).ok()?;
        if frames.count() as usize == PAGES_PER_BLOCK {
            return Some(frames);
        }
        device.free(frames);
        None
    }

    /// Write-protects pages that are about to be claimed, all in one call: each has
    /// every processor forget what it knows of the page table, and takes longer than
    /// the rest of a claim. A claim looks whether it still holds.
    fn protect_ahead(&self, range: PageRange) {
        let map = self.gate.read();
        let mut end = range.start();
        for page in range.blocks() {
            let piece = map.find(page.start()).filter(|it| it.range() == page);
            let Some(block) = piece.map(|piece| map.block(piece.block)) else {
                break;
            };
            let mut inner = block.lock();
            let at_home = inner.states().all(|state| state == PageState::System);
            if !block.is_hugetlb() || !at_home {
                break;
            }
            // Before it is: whoever looks at a hole has to know.
            inner.protected = true;
            end = page.end();
        }
        if end > range.start() {
            self.space
                .write_protect(PageRange::span(range.start(), end), true);
        }
    }

    /// Takes away what remains of pages that were dropped under protection, if they
    /// are where they were; else that is left to who looks at each.
    fn lift_what_is_left<'a>(&self, pages: impl Iterator<Item = &'a Copied>, span: PageRange) {
        let map = self.gate.read();
        let mut pages = pages.map(|page| {
            let place = map
                .block(page.flight.block)
                .place_of(page.flight.first, page.flight.pages);
            (place, page.place)
        });
        if pages.all(|(now, place)| now == Some(place)) {
            self.space.write_protect(span, false);
        }
    }

    /// Copies a page that is at home. `None`, and nothing changed, if anything is
    /// in the way.
    fn copy_whole(
        &self,
        executor: &mut Executor,
        page: PageRange,
        frames: FrameRange,
        target: Target,
    ) -> Option<Copied> {
        let Ok((flight, place)) = self.claim_protected(page, frames, true) else {
            self.devices.slot(target.device).device.free(frames);
            return None;
        };
        if self
            .copy_protected(executor, &flight, place, frames, target.device)
            .is_err()
        {
            self.release_protected(executor, &flight, place, frames, target, None);
            return None;
        }
        Some(Copied {
            flight,
            place,
            frames,
        })
    }

    /// Moves a whole page to a device. `asked` is the part that the request is
    /// about; the report speaks of that.
    pub(crate) fn migrate_huge_page(
        &self,
        executor: &mut Executor,
        asked: PageRange,
        target: Target,
        keep: PageRange,
        report: &mut MigrationReport,
    ) {
        let whole = PageRange::from_pages(
            asked.start().block_floor(),
            PageCount::from(PAGES_PER_BLOCK),
        );
        let mut full = false;
        for _ in 0..BUSY_LIMIT {
            let departure = match self.depart_to(target.device) {
                Ok(departure) => departure,
                Err(reason) => return report.stay(asked, reason),
            };
            let passed = self
                .passes_over(whole, target.device)
                .unwrap_or_else(|| self.step_by_copy(executor, whole, target, true));
            drop(departure);
            match passed.fate {
                Fate::Moved { zeroed, .. } => {
                    report.moved += asked.pages();
                    report.huge += asked.pages();
                    report.zeroed += PageCount::new(zeroed.min(asked.pages().get()));
                    return;
                }
                Fate::Already => {
                    report.already += asked.pages();
                    return;
                }
                Fate::Elsewhere(_) => {
                    let step = self.step_home(executor, whole, Home::ahead());
                    if let Some((_, reason @ StayReason::DeviceLost)) = step.stuck {
                        return report.stay(asked, reason);
                    }
                }
                Fate::Stayed(StayReason::NoDeviceMemory) if !full => {
                    // Room for a page is 2 MiB that lie together.
                    full = !self.make_room(executor, target.device, keep);
                }
                Fate::Stayed(reason) => return report.stay(asked, reason),
                Fate::Busy | Fate::Refused | Fate::CopyInstead => self.wait_for_transition(),
            }
        }
        report.stay(asked, StayReason::Busy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_room_is_taken_once() {
        let rooms = Rooms::new();
        assert!(rooms.take().is_none(), "not prepared");
        assert!(rooms.prepare() && rooms.prepare());
        let mut held: Vec<Room<'_>> = std::iter::from_fn(|| rooms.take()).collect();
        assert_eq!(held.len(), ROOMS);
        held.sort_by_key(Room::start);
        for pair in held.windows(2) {
            let apart = pair[1].start().pages_since(pair[0].start());
            assert_eq!(apart, PAGES_PER_BLOCK as u64);
        }
        let free = held.remove(3).start();
        assert_eq!(rooms.take().map(|room| room.start()), Some(free));
    }
}
