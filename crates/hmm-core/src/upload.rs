//! From system memory to a device, by moving pages.
//!
//! One *step* takes one run of neighbouring pages along:
//! 1. frames and room in staging are taken, no lock held;
//! 2. claim (gate, block): one system call moves the pages out of the program
//!    into staging; states become `Uploading`. The kernel refuses what must
//!    stay (pinned, shared copy-on-write), page by page;
//! 3. copy, no lock held: staging pages into frames, zeros for holes;
//! 4. commit (gate, block): the frames own the data, the device's page table
//!    gets them, the staging pages are free for pages that come home.
//!
//! From step 2 to step 4 the staging page owns the data: a failed copy puts it
//! back.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, Mapping, Presence, SpaceId, Stop, Transfer};
use hmm_types::{
    Access, DeviceId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr,
};

use crate::engine::Engine;
use crate::executor::Executor;
use crate::home::run_transfers;
use crate::map::{Block, BlockId, BlockInner};
use crate::page::PageState;
use crate::staging::{PageSet, SlotKind, StagingPage, StagingRun};

/// How one step of a migration to a device ended for the pages it dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They are on the device.
    Moved {
        /// Of them holes that became zeroed frames.
        zeroed: u64,
        /// They moved as one huge page.
        huge: bool,
    },
    /// They were there already.
    Already,
    /// They are where they were.
    Stayed(StayReason),
    /// They are in flight: wait for a transition, then try again.
    Busy,
    /// The kernel refuses to move them, but they can be copied.
    CopyInstead,
    /// The kernel says pinned or shared copy-on-write.
    Refused,
    /// They are on another device.
    Elsewhere(DeviceId),
}

/// What a step did with the first pages of its range; never zero pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passed {
    pub(crate) pages: u64,
    pub(crate) fate: Fate,
}

impl Passed {
    pub(crate) const fn new(pages: u64, fate: Fate) -> Self {
        Self { pages, fate }
    }
}

/// Pages in flight to a device; where their data is while they are.
pub(crate) struct Flight {
    pub(crate) block: BlockId,
    pub(crate) first: u32,
    pub(crate) pages: u32,
    /// Which of them have data; the others are holes.
    pub(crate) present: PageSet,
    /// Where it is: staging pages from here on.
    pub(crate) source: Option<(StagingRun, VirtAddr)>,
}

impl Flight {
    /// Maximal runs of pages with data or without: (first, pages, data).
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u32, u32, bool)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = next;
            if start == self.pages {
                return None;
            }
            let data = self.present.contains(start as usize);
            while next < self.pages && self.present.contains(next as usize) == data {
                next += 1;
            }
            Some((start, next - start, data))
        })
    }
}

/// What a device is to get, as the caller has found out about the mapping.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) device: DeviceId,
    /// Whether the mapping lets the device write.
    pub(crate) access: Access,
    /// Whether pages of the mapping can be moved at all.
    pub(crate) by_copy: bool,
}

impl Target {
    pub(crate) const fn of(device: DeviceId, mapping: &Mapping) -> Self {
        Self {
            device,
            access: if mapping.permissions.write {
                Access::Write
            } else {
                Access::Read
            },
            by_copy: mapping.shared_region,
        }
    }
}

impl Engine<'_> {
    /// One step with the first pages of `range`, which lies in one block.
    pub(crate) fn step_to_device(
        &self,
        executor: &mut Executor,
        range: PageRange,
        target: Target,
        huge_hint: bool,
    ) -> Passed {
        let whole = range.pages().index() == PAGES_PER_BLOCK && range.start().is_block_aligned();
        // Looks before it takes frames: much of a range may be there already.
        if let Some(passed) = self.passes_over(range, target.device) {
            return passed;
        }
        let slot = self.devices.slot(target.device);
        let frames = match slot.device.allocate_for(range) {
            Ok(frames) => frames,
            Err(DeviceError::OutOfMemory) => {
                return Passed::new(1, Fate::Stayed(StayReason::NoDeviceMemory));
            }
            Err(_) => {
                return Passed::new(range.pages().get(), Fate::Stayed(StayReason::DeviceLost));
            }
        };
        let kind = if whole && huge_hint && frames.count() as usize == PAGES_PER_BLOCK {
            SlotKind::Huge
        } else {
            SlotKind::Small
        };
        let Some(room) = self.room(executor, kind, frames.count()) else {
            slot.device.free(frames);
            return Passed::new(1, Fate::Stayed(StayReason::NoSystemMemory));
        };
        let mut attempt = 0;
        let flight = loop {
            match self.claim_out(range, frames, room, huge_hint) {
                Ok(flight) => break flight,
                Err(passed) => {
                    if passed.is_none() && self.wait_for_events(executor, attempt) {
                        attempt += 1;
                        continue;
                    }
                    slot.device.free(frames);
                    self.staging.lock().put_run(room, false);
                    return passed.unwrap_or(Passed::new(1, Fate::Stayed(StayReason::Busy)));
                }
            }
        };
        if flight.pages < frames.count() {
            slot.device
                .free(frames.slice(flight.pages, frames.count() - flight.pages));
        }
        let frames = frames.slice(0, flight.pages);
        self.give_back_room(room, flight.pages);
        let huge = kind == SlotKind::Huge && flight.pages as usize == PAGES_PER_BLOCK;
        let copied = self.copy_out(&flight, frames, target.device);
        let passed = match copied {
            Ok(()) => self.commit_out(&flight, frames, target, huge),
            Err(error) => {
                slot.device.free(frames);
                self.put_back(executor, &flight, target.device);
                Passed::new(
                    u64::from(flight.pages),
                    Fate::Stayed(match error {
                        DeviceError::Lost => StayReason::DeviceLost,
                        _ => StayReason::CopyFailed,
                    }),
                )
            }
        };
        self.transition_ended();
        passed
    }

    /// The first pages of a range if they are not in system memory.
    pub(crate) fn passes_over(&self, range: PageRange, device: DeviceId) -> Option<Passed> {
        let map = self.gate.read();
        let Some(piece) = map.find(range.start()) else {
            return Some(Passed::new(1, Fate::Stayed(StayReason::Raced)));
        };
        let inner = map.block(piece.block).lock();
        let fate = |index| match inner.state(index) {
            PageState::System | PageState::Discarded => None,
            PageState::Device { device: on, .. } if on == device => Some(Fate::Already),
            PageState::Device { device: on, .. } | PageState::Staged { device: on, .. } => {
                Some(Fate::Elsewhere(on))
            }
            _ => Some(Fate::Busy),
        };
        let first = fate(piece.first)?;
        let most = u64::from(piece.pages).min(range.pages().get());
        let same = (1..most)
            .take_while(|&offset| {
                u32::try_from(offset).is_ok_and(|offset| fate(piece.first + offset) == Some(first))
            })
            .count();
        Some(Passed::new(same as u64 + 1, first))
    }

    /// Empty staging pages for pages that leave; makes room when there is none.
    fn room(&self, executor: &Executor, kind: SlotKind, pages: u32) -> Option<StagingRun> {
        loop {
            let mut staging = self.staging.lock();
            if let Some(run) = staging.take_room(kind, pages) {
                return Some(run);
            }
            if kind == SlotKind::Huge
                && let Some(run) = staging.take_room(SlotKind::Small, pages)
            {
                return Some(run);
            }
            drop(staging);
            if executor.reads_events() || !self.trim_slot(Some(kind)) {
                return None;
            }
        }
    }

    /// Gives the memory of one idle staging slot back to the kernel.
    pub(crate) fn trim_slot(&self, kind: Option<SlotKind>) -> bool {
        let Some((run, range)) = self.staging.lock().take_for_trim(kind) else {
            return false;
        };
        hmm_sync::assert_none_held();
        let emptied = self.space.discard(range).is_ok();
        self.staging.lock().put_run_as_found(run, emptied);
        emptied
    }

    fn give_back_room(&self, room: StagingRun, used: u32) {
        let mut staging = self.staging.lock();
        for page in used..room.pages {
            staging.put(room.first.plus(page), false);
        }
    }

    /// Moves the first pages of a range out of the program. `Err(None)`: an
    /// event must be read first.
    fn claim_out(
        &self,
        range: PageRange,
        frames: FrameRange,
        room: StagingRun,
        huge_hint: bool,
    ) -> Result<Flight, Option<Passed>> {
        let map = self.gate.read();
        let stayed = |reason| Some(Passed::new(1, Fate::Stayed(reason)));
        let Some(piece) = map.find(range.start()) else {
            return Err(stayed(StayReason::Raced));
        };
        let block = map.block(piece.block);
        // The program has put it there since the mapping was judged; its holes could
        // be taken one by one, and would never come home again.
        if block.is_hugetlb() {
            return Err(stayed(StayReason::Raced));
        }
        let mut inner = block.lock();
        let inner = &mut *inner;
        let most = piece
            .pages
            .min(frames.count())
            .min(room.pages)
            .min(u32::try_from(range.pages().get()).unwrap_or(u32::MAX));
        let here = (0..most)
            .take_while(|&offset| {
                matches!(
                    inner.state(piece.first + offset),
                    PageState::System | PageState::Discarded
                )
            })
            .count();
        if here == 0 {
            return Err(Some(Passed::new(1, Fate::Busy)));
        }
        let range = piece.range().slice(0, here as u64);
        let mut present = PageSet::EMPTY;
        let mut huge_pages = 0;
        let mut guard = here;
        let scan = self.space.presence(range, &mut |span, presence| {
            if presence == Presence::Guard {
                let at = PageCount::new(span.start().pages_since(range.start()));
                guard = guard.min(at.index());
            }
            if let Presence::Present { huge } = presence {
                let from = span.start().pages_since(range.start());
                for page in from..from + span.pages().get() {
                    present.insert(PageCount::new(page).index());
                    huge_pages += usize::from(huge);
                }
            }
        });
        if scan.is_err() {
            return Err(stayed(StayReason::Limit));
        }
        // A page that madvise announced to drop but that is still there: the
        // drop is under way, and would miss the page if it left now.
        if guard == 0 {
            return Err(stayed(StayReason::NoAccess));
        }
        let sound = (0..guard)
            .take_while(|&offset| {
                let index = piece.first + u32::try_from(offset).unwrap_or(0);
                inner.state(index) != PageState::Discarded || !present.contains(offset)
            })
            .count();
        if sound == 0 {
            return Err(stayed(StayReason::Discarded));
        }
        let range = range.slice(0, sound as u64);
        self.invalidate(inner, range);
        let staging = self.staging.lock().address(room.first);
        let mut flight = Flight {
            block: piece.block,
            first: piece.first,
            pages: 0,
            present,
            source: Some((room, staging)),
        };
        let progress = if !present.is_empty() {
            self.space.move_pages(range, staging)
        } else if self.space.is_quiet() {
            hmm_hal::Progress {
                done: range.pages(),
                stop: None,
            }
        } else {
            // Perhaps these are holes because the pages have just been remapped.
            hmm_hal::Progress {
                done: PageCount::ZERO,
                stop: Some(Stop::Again),
            }
        };
        if progress.done == PageCount::ZERO {
            return Err(match progress.stop {
                Some(Stop::Again) => None,
                Some(Stop::Busy) => Some(Passed::new(1, Fate::Refused)),
                Some(Stop::Incompatible) => {
                    Some(Passed::new(range.pages().get(), Fate::CopyInstead))
                }
                Some(Stop::NoMemory) => stayed(StayReason::NoSystemMemory),
                _ => stayed(StayReason::Raced),
            });
        }
        flight.pages = u32::try_from(progress.done.get()).unwrap_or(0);
        for offset in 0..flight.pages {
            let source = present
                .contains(offset as usize)
                .then(|| room.first.plus(offset));
            inner.set(flight.first + offset, PageState::Uploading { source });
        }
        inner.huge = huge_hint && huge_pages == PAGES_PER_BLOCK
            || inner.huge && flight.pages as usize != PAGES_PER_BLOCK;
        Ok(flight)
    }

    pub(crate) fn copy_out(
        &self,
        flight: &Flight,
        frames: FrameRange,
        device: DeviceId,
    ) -> Result<(), DeviceError> {
        hmm_sync::assert_none_held();
        let device = self.devices.slot(device).device;
        let transfers = flight.runs().map(|(first, pages, data)| {
            let frames = frames.slice(first, pages);
            match flight.source {
                Some((_, host)) if data => Transfer::ToDevice {
                    host: host.plus_pages(u64::from(first)),
                    frames,
                },
                _ => Transfer::Zero { frames },
            }
        });
        let result = run_transfers(device, transfers);
        if result.is_err() {
            self.stats.copy_failures.fetch_add(1, Relaxed);
        }
        result
    }

    /// The frames own the pages from here on.
    pub(crate) fn commit_out(
        &self,
        flight: &Flight,
        frames: FrameRange,
        target: Target,
        huge: bool,
    ) -> Passed {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        inner.departed(self.next_use());
        let slot = self.devices.slot(target.device);
        let mut moved = 0;
        let mut zeroed = 0;
        let mut parked = false;
        if let Some((run, _)) = flight.source {
            let mut staging = self.staging.lock();
            for offset in 0..flight.pages {
                let data = flight.present.contains(offset as usize);
                let page = run.first.plus(offset);
                if data {
                    staging.put_used(page, self.reuses_pages());
                } else {
                    staging.put(page, false);
                }
            }
        }
        for offset in 0..flight.pages {
            let index = flight.first + offset;
            let entry = inner.entry(index);
            let data = flight.present.contains(offset as usize);
            parked |= entry.parked();
            if entry.doomed() {
                slot.free(frames.slice(offset, 1));
                inner.set(index, Self::after_removal(block, index));
                continue;
            }
            moved += 1;
            zeroed += u64::from(!data);
            inner.set(
                index,
                PageState::Device {
                    device: target.device,
                    frame: frames.frame(offset),
                },
            );
        }
        self.map_on_device(block, inner, flight, frames, target);
        if parked {
            self.wake_pages(block, flight.first, flight.pages);
        }
        inner.tidy();
        self.stats.pages_to_device.fetch_add(moved, Relaxed);
        self.stats.pages_zeroed.fetch_add(zeroed, Relaxed);
        if huge {
            self.stats.huge_pages.fetch_add(moved, Relaxed);
        }
        if moved == 0 {
            return Passed::new(u64::from(flight.pages), Fate::Stayed(StayReason::Raced));
        }
        Passed::new(u64::from(flight.pages), Fate::Moved { zeroed, huge })
    }

    /// Enters committed pages into the device's page table, as long runs as
    /// they lie together. A table that has no room is no failure: the device
    /// faults and asks again. Pages that were shared with a forked child on
    /// their way are only to be read: the first write gets a copy.
    fn map_on_device(
        &self,
        block: &Block,
        inner: &BlockInner,
        flight: &Flight,
        frames: FrameRange,
        target: Target,
    ) {
        let slot = self.devices.slot(target.device);
        let mut offset = 0;
        while offset < flight.pages {
            let index = flight.first + offset;
            let shared = slot.is_shared(frames.frame(offset));
            let access = if shared { Access::Read } else { target.access };
            let on_device = |index| match inner.state(index) {
                PageState::Device { frame, .. } => slot.is_shared(frame) == shared,
                _ => false,
            };
            let Some(place) = on_device(index)
                .then(|| block.place_of(index, flight.pages - offset))
                .flatten()
            else {
                offset += 1;
                continue;
            };
            let together = (0..place.pages().get())
                .take_while(|&page| u32::try_from(page).is_ok_and(|page| on_device(index + page)))
                .count();
            let pages = u32::try_from(together).unwrap_or(1);
            let place = place.slice(0, u64::from(pages));
            let _ = slot.device.map(place, frames.slice(offset, pages), access);
            offset += pages;
        }
    }

    /// Whether the program has put a guard where a page was away, which the kernel
    /// tells nobody: the page is dropped.
    pub(crate) fn is_guarded(&self, page: PageRange) -> bool {
        let mut guarded = false;
        let looked = self.space.presence(page, &mut |_, presence| {
            guarded = match presence {
                Presence::Guard => true,
                // What stands where a page was away can be nothing else.
                Presence::Present { .. } => !self.capabilities.tells_guards,
                Presence::Hole => false,
            };
        });
        looked.is_ok() && guarded
    }

    /// The state of a page that the program removed in flight.
    pub(crate) fn after_removal(block: &Block, index: u32) -> PageState {
        if block.place_of(index, 1).is_some() {
            PageState::Discarded
        } else {
            PageState::System
        }
    }

    /// The state of a page that was in flight and is the CPU's again, unless the
    /// program removed it.
    pub(crate) fn at_home(block: &Block, index: u32, removed: bool) -> PageState {
        if removed {
            Self::after_removal(block, index)
        } else {
            PageState::System
        }
    }

    /// Wakes whoever waits for pages of a block, wherever they are mapped now.
    pub(crate) fn wake_pages(&self, block: &Block, first: u32, pages: u32) {
        for piece in block.pieces() {
            let from = first.max(piece.first);
            let upto = (first + pages).min(piece.first + piece.pages);
            if from < upto {
                let range = piece
                    .range()
                    .slice(u64::from(from - piece.first), u64::from(upto - from));
                self.space.wake(SpaceId::OWN, range);
            }
        }
    }

    /// Undoes a claim: the staging pages go back into the program. If the way
    /// is blocked too often the pages rest in staging, where a touch of the CPU
    /// finds them.
    pub(crate) fn put_back(&self, executor: &mut Executor, flight: &Flight, device: DeviceId) {
        let Some((run, host)) = flight.source else {
            unreachable!("only moved pages are put back");
        };
        let mut offset = 0;
        let mut attempt = 0;
        while offset < flight.pages {
            let patient = attempt < crate::engine::AGAIN_LIMIT;
            match self.put_back_run(flight, run, host, offset, device, patient) {
                Some(pages) => offset += pages,
                None => {
                    self.wait_for_events(executor, attempt);
                    attempt += 1;
                }
            }
        }
    }

    /// Puts the next pages back that share a fate. `None`: try again.
    fn put_back_run(
        &self,
        flight: &Flight,
        run: StagingRun,
        host: VirtAddr,
        offset: u32,
        device: DeviceId,
        patient: bool,
    ) -> Option<u32> {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let index = flight.first + offset;
        let entry = inner.entry(index);
        let staging_page: StagingPage = run.first.plus(offset);
        if entry.doomed() || !flight.present.contains(offset as usize) {
            if flight.present.contains(offset as usize) {
                self.staging
                    .lock()
                    .put_used(staging_page, self.reuses_pages());
            } else {
                self.staging.lock().put(staging_page, false);
            }
            inner.set(index, Self::at_home(block, index, entry.doomed()));
            if entry.parked() {
                self.wake_pages(block, index, 1);
            }
            return Some(1);
        }
        let place = block.place_of(index, 1)?;
        let source = PageRange::from_pages(host.plus_pages(u64::from(offset)), PageCount::ONE);
        let mut progress = self.space.move_pages(source, place.start());
        let mut emptied = true;
        if matches!(progress.stop, Some(Stop::Incompatible | Stop::Busy)) {
            progress = self.space.copy_pages(SpaceId::OWN, source.start(), place);
            emptied = false;
        }
        match progress.stop {
            None => {
                if emptied {
                    self.staging.lock().put(staging_page, false);
                } else {
                    self.staging
                        .lock()
                        .put_used(staging_page, self.reuses_pages());
                }
                inner.set(index, PageState::System);
                self.space.wake(SpaceId::OWN, place);
            }
            Some(Stop::Exists) if self.is_guarded(place) => {
                self.staging
                    .lock()
                    .put_used(staging_page, self.reuses_pages());
                inner.set(index, PageState::System);
                self.space.wake(SpaceId::OWN, place);
            }
            Some(Stop::Exists) => {
                unreachable!("there is a page at {place} already, where one is put back")
            }
            Some(_) if patient => return None,
            Some(_) => {
                self.stats.stranded_pages.fetch_add(1, Relaxed);
                inner.set(
                    index,
                    PageState::Staged {
                        device,
                        page: staging_page,
                    },
                );
                if entry.parked() {
                    self.wake_pages(block, index, 1);
                }
            }
        }
        inner.tidy();
        Some(1)
    }

    /// Moves one page to staging for a device's exclusive use and maps it
    /// there: no copy.
    pub(crate) fn stage_page(&self, page: PageRange, device: DeviceId) -> Fate {
        let map = self.gate.read();
        let Some(piece) = map.find(page.start()) else {
            return Fate::Stayed(StayReason::Raced);
        };
        let mut inner = map.block(piece.block).lock();
        let inner = &mut *inner;
        match inner.state(piece.first) {
            PageState::System => {}
            PageState::Discarded => return Fate::Stayed(StayReason::Discarded),
            PageState::Device { device: on, .. } | PageState::Staged { device: on, .. } => {
                return if on == device {
                    Fate::Already
                } else {
                    Fate::Elsewhere(on)
                };
            }
            _ => return Fate::Busy,
        }
        let mut there = false;
        let seen = self.space.presence(page, &mut |_, presence| {
            there = matches!(presence, Presence::Present { .. });
        });
        if seen.is_err() {
            return Fate::Stayed(StayReason::Limit);
        }
        if !there {
            return Fate::CopyInstead;
        }
        let Some(run) = self.staging.lock().take_room(SlotKind::Small, 1) else {
            return Fate::Stayed(StayReason::NoSystemMemory);
        };
        let host = self.staging.lock().address(run.first);
        self.invalidate(inner, page);
        let progress = self.space.move_pages(page, host);
        if let Some(stop) = progress.stop {
            self.staging.lock().put_run(run, false);
            return match stop {
                Stop::Again => Fate::Busy,
                Stop::Busy => Fate::Refused,
                Stop::Incompatible => Fate::CopyInstead,
                Stop::NoMemory => Fate::Stayed(StayReason::NoSystemMemory),
                _ => Fate::Stayed(StayReason::Raced),
            };
        }
        inner.set(
            piece.first,
            PageState::Staged {
                device,
                page: run.first,
            },
        );
        inner.departed(self.next_use());
        let slot = self.devices.slot(device);
        let _ = slot.device.map_host(page, host, Access::Write);
        Fate::Moved {
            zeroed: 0,
            huge: false,
        }
    }
}
