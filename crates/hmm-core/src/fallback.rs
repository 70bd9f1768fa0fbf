//! From system memory to a device where pages cannot be moved: kernels before
//! Linux 6.8, and mappings whose protection differs from staging's.
//!
//! One *step*:
//! 1. claim (gate, block): the pages are write-protected; states `Copying`;
//! 2. copy, no lock held: program to bounce memory to frames;
//! 3. recheck (gate, block): pages that are still wanted become `Dropping`;
//! 4. drop, no lock held: madvise. The kernel reports that to us like the
//!    program's own; the first report of a page is ours, a second one is the
//!    program's and dooms it;
//! 5. commit (gate, block): the frames own the data.
//!
//! A CPU write between 1 and 5 waits and then finds the page on the device.
//! Weaker than moving pages: a pin for DMA cannot be seen, and step 4 goes by
//! address (see `docs/limits.md`). Every page that goes this way is counted.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, Dropped, Presence, Stop, Transfer};
use hmm_types::{
    DeviceId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr,
};

use crate::engine::{AGAIN_LIMIT, Engine};
use crate::executor::{BOUNCE_LEN, BOUNCE_PAGES, Executor};
use crate::home::run_transfers;
use crate::map::Block;
use crate::page::PageState;
use crate::staging::PageSet;
use crate::upload::{Fate, Flight, Passed, Target};

/// Whether a page that was reported as dropped was dropped by the engine.
#[derive(Clone, Copy)]
enum Ours {
    Yes,
    No,
    /// If it is still there, or anywhere in the range whose drop was refused: the
    /// kernel may have dropped a part before.
    IfAt(VirtAddr, Option<PageRange>),
}

/// A drop that did not succeed.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tried {
    /// So many pages of the flight have surely been dropped before.
    dropped: u32,
    /// What the kernel has refused to drop.
    refused: Option<PageRange>,
}

impl Tried {
    pub(crate) const fn dropped(pages: u32) -> Self {
        Self {
            dropped: pages,
            refused: None,
        }
    }
}

/// Parts of a run that fit into bounce memory.
fn chunks((first, pages, data): (u32, u32, bool)) -> impl Iterator<Item = (u32, u32, bool)> {
    (0..pages).step_by(BOUNCE_LEN).map(move |from| {
        let fits = (from..pages).take(BOUNCE_LEN).len();
        (first + from, u32::try_from(fits).unwrap_or(1), data)
    })
}

impl Engine<'_> {
    /// One step with the first pages of `range`, which lies in one block; or with all
    /// of it, where it was judged to be one page of hugetlbfs.
    pub(crate) fn step_by_copy(
        &self,
        executor: &mut Executor,
        range: PageRange,
        target: Target,
        huge_page: bool,
    ) -> Passed {
        if !self.capabilities.write_protect || executor.reads_events() {
            return Passed::new(range.pages().get(), Fate::Stayed(StayReason::Limit));
        }
        let slot = self.devices.slot(target.device);
        let want = if huge_page {
            PAGES_PER_BLOCK as u64
        } else {
            range.pages().get().min(BOUNCE_PAGES)
        };
        // All of a huge page, wherever that is.
        let frames = if huge_page {
            slot.device.allocate(range.pages())
        } else {
            slot.device.allocate_for(range.slice(0, want))
        };
        let frames = match frames {
            Ok(frames) if huge_page && u64::from(frames.count()) < want => {
                slot.device.free(frames);
                return Passed::new(1, Fate::Stayed(StayReason::NoDeviceMemory));
            }
            Ok(frames) => frames,
            Err(DeviceError::OutOfMemory) => {
                return Passed::new(1, Fate::Stayed(StayReason::NoDeviceMemory));
            }
            Err(_) => {
                return Passed::new(range.pages().get(), Fate::Stayed(StayReason::DeviceLost));
            }
        };
        let mut attempt = 0;
        let (flight, place) = loop {
            match self.claim_protected(range, frames, huge_page) {
                Ok(claimed) => break claimed,
                Err(None) if self.wait_for_events(executor, attempt) => attempt += 1,
                Err(passed) => {
                    slot.device.free(frames);
                    return passed.unwrap_or(Passed::new(1, Fate::Stayed(StayReason::Busy)));
                }
            }
        };
        if flight.pages < frames.count() {
            slot.device
                .free(frames.slice(flight.pages, frames.count() - flight.pages));
        }
        let frames = frames.slice(0, flight.pages);
        let passed = match self.copy_protected(executor, &flight, place, frames, target.device) {
            Ok(()) => match self.drop_protected(executor, &flight, place, frames, target.device) {
                Ok(()) => {
                    self.stats
                        .fallback_pages
                        .fetch_add(u64::from(flight.pages), Relaxed);
                    self.commit_out(&flight, frames, target, huge_page)
                }
                Err(tried) => {
                    let tried = Some(tried);
                    self.release_protected(executor, &flight, place, frames, target, tried);
                    Passed::new(u64::from(flight.pages), Fate::Stayed(StayReason::Locked))
                }
            },
            Err(reason) => {
                self.release_protected(executor, &flight, place, frames, target, None);
                Passed::new(u64::from(flight.pages), Fate::Stayed(reason))
            }
        };
        self.transition_ended();
        passed
    }

    pub(crate) fn claim_protected(
        &self,
        range: PageRange,
        frames: FrameRange,
        huge_page: bool,
    ) -> Result<(Flight, PageRange), Option<Passed>> {
        let map = self.gate.read();
        let stayed = |reason| Some(Passed::new(1, Fate::Stayed(reason)));
        let Some(piece) = map.find(range.start()) else {
            return Err(stayed(StayReason::Raced));
        };
        let block = map.block(piece.block);
        // Something else has come there since the mapping was judged: small pages that
        // could be moved, and may be pinned, are not to be copied.
        if block.is_gigantic() || block.is_hugetlb() != huge_page {
            return Err(stayed(StayReason::Raced));
        }
        let mut inner = block.lock();
        let inner = &mut *inner;
        let most = piece
            .pages
            .min(frames.count())
            .min(u32::try_from(range.pages().get()).unwrap_or(u32::MAX));
        let here = (0..most)
            .take_while(|&offset| inner.state(piece.first + offset) == PageState::System)
            .count();
        if here == 0 || (huge_page && here < PAGES_PER_BLOCK) {
            let fate = match inner.state(piece.first) {
                PageState::Discarded => Fate::Stayed(StayReason::Discarded),
                _ => Fate::Busy,
            };
            return Err(Some(Passed::new(1, fate)));
        }
        let range = piece.range().slice(0, here as u64);
        let protect = |on| match self.space.write_protect(range, on).stop {
            None => Ok(()),
            Some(Stop::Again) => Err(None),
            Some(_) => Err(stayed(StayReason::Limit)),
        };
        // Of hugetlbfs, a page that is there and protected already needs no more.
        let seen = if inner.protected && self.space.is_protected(range.start()) {
            let mut all = PageSet::EMPTY;
            (0..here).for_each(|page| all.insert(page));
            Some((all, here))
        } else {
            // In hugetlbfs a protection outlives the page, and such a hole looks like a
            // page. Without one it does not, and who fills it waits for this block.
            let mut hole = false;
            if huge_page {
                if inner.protected {
                    protect(false)?;
                    inner.protected = false;
                }
                hole = self
                    .present_pages(range)
                    .is_some_and(|(present, _)| present.is_empty());
            }
            if !hole {
                protect(true)?;
                inner.protected = huge_page;
            }
            // Looked at under write protection: a page that is there stays as it is.
            self.present_pages(range)
        };
        let Some((present, unguarded)) = seen else {
            let _ = self.space.write_protect(range, false);
            return Err(stayed(StayReason::Limit));
        };
        if unguarded == 0 {
            return Err(stayed(StayReason::NoAccess));
        }
        let range = range.slice(0, unguarded as u64);
        if !self.space.is_quiet() {
            // What was seen may be somewhere else by now. A protection that
            // stays behind costs a fault.
            return Err(None);
        }
        self.invalidate(inner, range);
        let pages = u32::try_from(unguarded).unwrap_or(0);
        for offset in 0..pages {
            let data = present.contains(offset as usize);
            inner.set(piece.first + offset, PageState::Copying { data });
        }
        let flight = Flight {
            block: piece.block,
            first: piece.first,
            pages,
            present,
            source: None,
        };
        Ok((flight, range))
    }

    /// Which pages of a range are there, and how many come before a guard. `None`
    /// when that cannot be read.
    fn present_pages(&self, range: PageRange) -> Option<(PageSet, usize)> {
        let mut present = PageSet::EMPTY;
        let mut unguarded = range.pages().index();
        let scan = self.space.presence(range, &mut |span, presence| {
            if presence == Presence::Guard {
                let at = PageCount::new(span.start().pages_since(range.start()));
                unguarded = unguarded.min(at.index());
            }
            if matches!(presence, Presence::Present { .. }) {
                let from = span.start().pages_since(range.start());
                for page in from..from + span.pages().get() {
                    present.insert(PageCount::new(page).index());
                }
            }
        });
        scan.ok().map(|()| (present, unguarded))
    }

    pub(crate) fn copy_protected(
        &self,
        executor: &Executor,
        flight: &Flight,
        place: PageRange,
        frames: FrameRange,
        device: DeviceId,
    ) -> Result<(), StayReason> {
        hmm_sync::assert_none_held();
        if self.devices.slot(device).device.info().reads_program {
            for (first, pages, data) in flight.runs() {
                let from = place.slice(u64::from(first), u64::from(pages)).start();
                let frames = frames.slice(first, pages);
                let transfer = if data {
                    Transfer::FromProgram {
                        place: from,
                        frames,
                    }
                } else {
                    Transfer::Zero { frames }
                };
                self.transfer(device, transfer)?;
            }
            return Ok(());
        }
        let bounce = executor.bounce(u64::from(flight.pages).min(BOUNCE_PAGES));
        for (first, pages, data) in flight.runs().flat_map(chunks) {
            if data {
                let from = place.slice(u64::from(first), u64::from(pages));
                match self.space.read_pages(from, bounce.start()).stop {
                    None => {}
                    // Unmapped meanwhile, or marked as lost.
                    Some(Stop::NotMapped) => return Err(StayReason::CopyFailed),
                    Some(_) => return Err(StayReason::Raced),
                }
            }
            let frames = frames.slice(first, pages);
            let transfer = if data {
                Transfer::ToDevice {
                    host: bounce.start(),
                    frames,
                }
            } else {
                Transfer::Zero { frames }
            };
            self.transfer(device, transfer)?;
        }
        Ok(())
    }

    fn transfer(&self, device: DeviceId, transfer: Transfer) -> Result<(), StayReason> {
        let device = self.devices.slot(device).device;
        run_transfers(device, std::iter::once(transfer)).map_err(|error| {
            self.stats.copy_failures.fetch_add(1, Relaxed);
            match error {
                DeviceError::Lost => StayReason::DeviceLost,
                _ => StayReason::CopyFailed,
            }
        })
    }

    /// Drops the copied pages from the program.
    ///
    /// # Errors
    /// How far it came before the kernel refused, or before a page that has been
    /// remapped since they were claimed: what was copied of it may be something
    /// else. All, if a drop was not reported where it should be: then the page had
    /// been remapped, and something else was dropped.
    fn drop_protected(
        &self,
        executor: &mut Executor,
        flight: &Flight,
        claimed: PageRange,
        frames: FrameRange,
        device: DeviceId,
    ) -> Result<(), Tried> {
        let mut offset = 0;
        while offset < flight.pages {
            self.read_changes(executor);
            let Some((place, pages)) = self.mark_dropping(flight, offset, frames, device) else {
                offset += 1;
                continue;
            };
            if place.start() != claimed.start().plus_pages(u64::from(offset)) {
                return Err(Tried::dropped(offset));
            }
            hmm_sync::assert_none_held();
            match self.space.discard(place) {
                Ok(Dropped::Reported) => {}
                Ok(Dropped::Unreported) => self.note_dropped(flight, offset, pages),
                Err(_) => {
                    return Err(Tried {
                        dropped: offset,
                        refused: Some(place),
                    });
                }
            }
            offset += pages;
        }
        if self.is_dropped(executor, flight) {
            Ok(())
        } else {
            Err(Tried::dropped(flight.pages))
        }
    }

    /// What an event would have said about pages that were dropped without one.
    pub(crate) fn note_dropped(&self, flight: &Flight, offset: u32, pages: u32) {
        let map = self.gate.read();
        let mut inner = map.block(flight.block).lock();
        let first = flight.first + offset;
        (first..first + pages).for_each(|index| inner.note_dropped(index));
    }

    /// The drop goes by address: who has mapped something else there is to have been
    /// heard of first.
    pub(crate) fn read_changes(&self, executor: &mut Executor) {
        let mut attempt = 0;
        while !self.space.is_quiet() && self.wait_for_events(executor, attempt) {
            attempt += 1;
        }
    }

    /// Whether all of a flight is gone from the program. The drop went by address:
    /// memory that was remapped in between, and left its mapping behind
    /// (MREMAP_DONTUNMAP), is still there.
    pub(crate) fn is_dropped(&self, executor: &mut Executor, flight: &Flight) -> bool {
        let mut attempt = 0;
        loop {
            match self.was_dropped(flight) {
                Some(dropped) => return dropped,
                None if self.wait_for_events(executor, attempt) => attempt += 1,
                None => return false,
            }
        }
    }

    /// Whether none of a flight's pages is there, wherever they are mapped now. One
    /// may be although the drop has succeeded: it was remapped; or the mapping was
    /// split while the report was read, and the kernel left the rest alone (6.1).
    fn is_gone(&self, block: &Block, flight: &Flight) -> Option<bool> {
        let mut offset = 0;
        while offset < flight.pages {
            let left = flight.pages - offset;
            let Some(place) = block.place_of(flight.first + offset, left) else {
                offset += 1;
                continue;
            };
            let is_empty = || {
                let there = self.present_pages(place);
                there.is_some_and(|(present, _)| present.is_empty())
            };
            // In hugetlbfs it may be a protection that was left behind.
            if block.is_hugetlb()
                && !is_empty()
                && self.space.write_protect(place, false).stop.is_some()
            {
                return None;
            }
            if !is_empty() {
                return Some(false);
            }
            offset += u32::try_from(place.pages().get()).unwrap_or(1);
        }
        Some(true)
    }

    /// `None` while a change is under way that may be a remap of the pages.
    fn was_dropped(&self, flight: &Flight) -> Option<bool> {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let inner = block.lock();
        if !self.space.is_quiet() {
            return None;
        }
        let reported = (flight.first..flight.first + flight.pages).all(|index| {
            let entry = inner.entry(index);
            entry.doomed() || matches!(entry.state(), PageState::Dropped { .. })
        });
        if reported {
            self.is_gone(block, flight)
        } else {
            Some(false)
        }
    }

    /// The next pages that are still wanted and lie together.
    pub(crate) fn mark_dropping(
        &self,
        flight: &Flight,
        offset: u32,
        frames: FrameRange,
        device: DeviceId,
    ) -> Option<(PageRange, u32)> {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let mut inner = block.lock();
        let index = flight.first + offset;
        let wanted = (0..flight.pages - offset)
            .take_while(|&page| !inner.entry(index + page).doomed())
            .count();
        let place = block.place_of(index, u32::try_from(wanted).unwrap_or(0).max(1))?;
        if wanted == 0 {
            return None;
        }
        let pages = u32::try_from(place.pages().get()).unwrap_or(1);
        for page in 0..pages {
            let index = index + page;
            let frame = frames.frame(offset + page);
            let parked = inner.entry(index).parked();
            inner.set(index, PageState::Dropping { device, frame });
            if parked {
                inner.park(index);
            }
        }
        Some((place, pages))
    }

    /// Undoes a claim: what the engine has not dropped is the program's again;
    /// what it has dropped already stays on the device. It has tried that where they
    /// were `claimed`, or not at all.
    pub(crate) fn release_protected(
        &self,
        executor: &mut Executor,
        flight: &Flight,
        claimed: PageRange,
        frames: FrameRange,
        target: Target,
        tried: Option<Tried>,
    ) {
        let whole = self.is_hugetlb_flight(flight);
        let mut offset = 0;
        let mut attempt = 0;
        while offset < flight.pages {
            let ours = match tried {
                None => Ours::No,
                Some(tried) if offset < tried.dropped => Ours::Yes,
                Some(tried) => {
                    Ours::IfAt(claimed.start().plus_pages(u64::from(offset)), tried.refused)
                }
            };
            let pages = if whole { flight.pages } else { 1 };
            let frames = frames.slice(offset, pages);
            let patient = attempt < AGAIN_LIMIT;
            if self.release_pages(flight, offset, ours, frames, target.device, patient) {
                offset += pages;
            } else {
                self.wait_for_events(executor, attempt);
                attempt += 1;
            }
        }
    }

    fn is_hugetlb_flight(&self, flight: &Flight) -> bool {
        self.gate.read().block(flight.block).is_hugetlb()
    }

    /// One page, or all of one of hugetlbfs, whose states change together.
    fn release_pages(
        &self,
        flight: &Flight,
        offset: u32,
        ours: Ours,
        frames: FrameRange,
        device: DeviceId,
        patient: bool,
    ) -> bool {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let first = flight.first + offset;
        let slot = self.devices.slot(device);
        let mut there = false;
        // A drop that the kernel has refused, or that was not tried, has not hit
        // a page that is somewhere else now: what was reported was the program's.
        let place = block.place_of(first, frames.count());
        let ours = match ours {
            Ours::Yes => true,
            Ours::No => false,
            Ours::IfAt(claimed, refused) => place.is_none_or(|place| {
                place.start() == claimed || refused.is_some_and(|range| range.encloses(place))
            }),
        };
        if let Some(place) = place {
            // In hugetlbfs what was dropped under protection looks like a page.
            if block.is_hugetlb()
                && patient
                && self.space.write_protect(place, false).stop == Some(Stop::Again)
            {
                return false;
            }
            // The drop was reported, but went by an address where the page may
            // not have been any more. Looked at first: what the next call does
            // not refuse was true here.
            let seen = self.space.presence(place, &mut |_, presence| {
                there |= matches!(presence, Presence::Present { .. });
            });
            if patient && seen.is_err() {
                return false;
            }
            // Before the state changes: the flight keeps the block. A page that
            // stays write-protected is freed by the next write, which faults.
            let stop = self.space.write_protect(place, false).stop;
            if patient && stop == Some(Stop::Again) {
                return false;
            }
        }
        for (index, frame) in (first..).zip(frames.iter()) {
            let entry = inner.entry(index);
            let reported = matches!(entry.state(), PageState::Dropped { .. });
            let doomed = entry.doomed() || (reported && !ours && !there);
            if let (PageState::Dropped { device, frame }, false) = (entry.state(), doomed || there)
            {
                inner.set(index, PageState::Device { device, frame });
            } else if entry.state().in_flight() {
                slot.free(FrameRange::new(frame, 1));
                let removed = doomed && !entry.refilled();
                inner.set(index, Self::at_home(block, index, removed));
            }
            if entry.parked() {
                self.wake_pages(block, index, 1);
            }
        }
        inner.tidy();
        true
    }
}
