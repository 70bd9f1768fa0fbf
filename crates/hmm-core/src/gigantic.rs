//! Pages of hugetlbfs of more than 2 MiB: a gigabyte, say.
//!
//! They go the ways of the smaller ones ([`crate::hugetlb`]): write-protect, copy,
//! drop, and home by one `UFFDIO_COPY` of all of it, since the kernel does nothing
//! to less. So all of such a page is *one* block, with one lock. Its table has 512
//! entries as any other, each for as many pages as it takes (512 of a gigabyte),
//! whose frames follow each other ([`BlockInner::unit`]).
//!
//! # Why nobody sees a page in two states
//! - All of its states change while the block's lock is held, in one go: who looks at
//!   any part sees what is true of all of it. There is no moment between two blocks,
//!   and no second lock to take.
//! - The kernel's calls for it take the same lock as those for other pages, so claim,
//!   commit and events are ordered as they are everywhere else.
//! - What the program may do to a part of it the kernel refuses: events are about
//!   whole pages, and doom all entries or none. Should the map know better for a
//!   moment (a remap that overtakes an unmapping), it is unmapped as a whole.
//! - One thing is done to less: an entry's frames that a forked child still needs are
//!   copied to others. Then that entry is in flight and the others rest, and nobody
//!   else claims, fills or brings home anything while an entry is in flight.
//! - One page at a time leaves, one comes home: whoever finds the turn or the room
//!   taken has claimed nothing, holds no lock, and tries again.

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

use hmm_hal::{DeviceError, Dropped, Mapping, Presence, SpaceId, Stop, Transfer};
use hmm_mem::{Pages, Vec};
use hmm_types::{
    Access, DeviceId, FrameId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason,
    VirtAddr,
};

use crate::engine::{AGAIN_LIMIT, BUSY_LIMIT, COPY_LIMIT, Engine};
use crate::executor::{BOUNCE_LEN, Executor};
use crate::home::{Home, Step, TRANSFERS, reason_of, run_transfers};
use crate::map::{Block, BlockId, BlockInner};
use crate::page::PageState;
use crate::report::MigrationReport;
use crate::upload::{Fate, Passed, Target};

/// Sizes that there may be: 512 pages times two to the power of less than this.
const SIZES: usize = 16;
/// How much longer than for others one waits for such a page.
const SLOWER: u32 = 256;
/// Shorter runs of frames that are put aside while longer ones are looked for.
const SHORT_RUNS: usize = 4096;
/// Looks for frames before a device is said to be full.
const FRAME_TRIES: u32 = 1 << 14;
/// How often a page that the kernel has no memory for is tried at a time.
const NO_PAGE_TRIES: u32 = 8;
/// How long nothing is copied when the kernel had no page to put it into.
const DRY_NS: u64 = 250_000_000;
/// Waits meanwhile before a thread looks again.
const DRY_WAITS: u32 = 64;

/// Pages of an executor's bounce memory.
#[allow(clippy::cast_possible_truncation, reason = "a few pages")]
const BOUNCE: u32 = BOUNCE_LEN as u32;

/// The frames of a page, as the first one of each entry.
type Firsts = [FrameId; PAGES_PER_BLOCK];

const NO_FRAMES: Firsts = [FrameId::new(0); PAGES_PER_BLOCK];

/// What there is once for all such pages.
pub(crate) struct Gigantic {
    /// Engine memory where a page lies together on its way home, for each size.
    /// Addresses first; memory while it is used.
    rooms: [OnceLock<Option<Pages>>; SIZES],
    /// Somebody has one of them.
    taken: AtomicBool,
    /// A page is leaving.
    leaving: AtomicBool,
}

/// A room, until it is dropped; [`Engine::empty`] gives its memory back as well.
pub(crate) struct LargeRoom<'rooms> {
    gigantic: &'rooms Gigantic,
    range: PageRange,
}

/// The right to take a page out of the program.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

impl Gigantic {
    pub(crate) const fn new() -> Self {
        Self {
            rooms: [const { OnceLock::new() }; SIZES],
            taken: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
        }
    }

    fn room_for(&self, page_len: PageCount) -> Option<&OnceLock<Option<Pages>>> {
        let blocks = page_len.index() / PAGES_PER_BLOCK;
        self.rooms.get(blocks.checked_ilog2()? as usize)
    }

    /// Makes sure that there is room for a page of a size. False when engine memory
    /// is used up.
    pub(crate) fn prepare(&self, page_len: PageCount) -> bool {
        let reserve = || {
            let pages = Pages::untouched(page_len)?;
            pages.prefer_huge();
            Some(pages)
        };
        self.room_for(page_len)
            .is_some_and(|room| room.get_or_init(reserve).is_some())
    }

    /// Does not wait: `None` when somebody has it.
    pub(crate) fn take(&self, page_len: PageCount) -> Option<LargeRoom<'_>> {
        let range = self.room_for(page_len)?.get()?.as_ref()?.range();
        if self.taken.swap(true, AcqRel) {
            return None;
        }
        Some(LargeRoom {
            gigantic: self,
            range,
        })
    }

    fn leave(&self) -> Option<Turn<'_>> {
        // Not made where it is not had: dropping it would end another's.
        (!self.leaving.swap(true, AcqRel)).then(|| Turn(&self.leaving))
    }
}

impl LargeRoom<'_> {
    pub(crate) const fn start(&self) -> VirtAddr {
        self.range.start()
    }
}

impl Drop for LargeRoom<'_> {
    fn drop(&mut self) {
        self.gigantic.taken.store(false, Release);
    }
}

/// A page on its way to a device: claimed at `place`, with data or a hole.
struct Leaving {
    block: BlockId,
    place: PageRange,
    unit: u32,
    data: bool,
}

/// A page on its way home.
struct Arriving {
    block: BlockId,
    device: DeviceId,
    pages: u32,
    unit: u32,
}

/// Frames of a page as runs that lie together, each with its first page: no longer
/// than a block, as those of other pages.
fn runs(firsts: &Firsts, unit: u32) -> impl Iterator<Item = (u32, FrameRange)> {
    let most = PAGES_PER_BLOCK;
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        let first = firsts.get(start)?;
        let mut frames = unit;
        next += 1;
        while firsts
            .get(next)
            .is_some_and(|frame| frame.get() == first.get() + frames)
            && frames as usize + unit as usize <= most
        {
            frames += unit;
            next += 1;
        }
        let page = u32::try_from(start).unwrap_or(0) * unit;
        Some((page, FrameRange::new(*first, frames)))
    })
}

/// The first page of each entry.
fn entries(unit: u32) -> impl Iterator<Item = u32> {
    (0..PAGES_PER_BLOCK).map(move |entry| u32::try_from(entry).unwrap_or(0) * unit)
}

/// Where all of a page is mapped now.
fn place_of(block: &Block) -> Option<PageRange> {
    block.place_of(0, block.pages())
}

impl Engine<'_> {
    /// Whether an address is in such a page, as far as the engine knows.
    pub(crate) fn is_gigantic(&self, address: VirtAddr) -> bool {
        let map = self.gate.read();
        let piece = map.find(address);
        piece.is_some_and(|piece| map.block(piece.block).is_gigantic())
    }

    /// How often one waits for a page in flight at an address.
    pub(crate) fn patience_at(&self, address: VirtAddr) -> u32 {
        if self.space.may_sleep() && self.is_gigantic(address) {
            BUSY_LIMIT * SLOWER
        } else {
            BUSY_LIMIT
        }
    }

    /// Gives a room back, and its memory to the kernel.
    pub(crate) fn empty(&self, room: LargeRoom<'_>) {
        hmm_sync::assert_none_held();
        let _ = self.space.discard(room.range);
        drop(room);
    }

    fn free_all(&self, device: DeviceId, firsts: &Firsts, unit: u32) {
        for (_, frames) in runs(firsts, unit) {
            self.devices.slot(device).free(frames);
        }
    }

    /// Moves the pages of a mapping to a device.
    pub(crate) fn migrate_gigantic_pages(
        &self,
        executor: &mut Executor,
        mapping: &Mapping,
        target: Target,
        request: (PageRange, u64),
        report: &mut MigrationReport,
    ) {
        for asked in mapping.range.cut_at(mapping.page_len) {
            self.migrate_gigantic_page(executor, asked, mapping.page_len, target, request, report);
        }
    }

    /// Moves a whole page to a device. `asked` is the part that the request is
    /// about; the report speaks of that.
    fn migrate_gigantic_page(
        &self,
        executor: &mut Executor,
        asked: PageRange,
        page_len: PageCount,
        target: Target,
        (keep, since): (PageRange, u64),
        report: &mut MigrationReport,
    ) {
        let start = asked.start().get() - asked.start().get() % page_len.bytes().get();
        let whole = PageRange::from_pages(VirtAddr::new(start), page_len);
        for _ in 0..self.patience_at(asked.start()) {
            let looked = self.passes_over(whole.slice(0, 1), target.device);
            let passed = match looked.or_else(|| self.send_in_turn(executor, whole, target, keep)) {
                Some(passed) => passed,
                None => continue,
            };
            match passed.fate {
                Fate::Moved { zeroed, .. } => {
                    report.moved += asked.pages();
                    report.huge += asked.pages();
                    report.zeroed += PageCount::new(zeroed.min(asked.pages().get()));
                    return;
                }
                // Another part of the request was about the same page.
                Fate::Already if self.has_left_since(whole.start(), since) => {
                    report.moved += asked.pages();
                    report.huge += asked.pages();
                    return;
                }
                Fate::Already => {
                    report.already += asked.pages();
                    return;
                }
                Fate::Elsewhere(_) => {
                    let step = self.step_home(executor, whole, Home::ahead());
                    if step.busy > 0 {
                        self.wait_for_transition();
                    }
                }
                Fate::Stayed(reason) => return report.stay(asked, reason),
                Fate::Busy | Fate::Refused | Fate::CopyInstead => {
                    self.wait_for_transition();
                }
            }
        }
        report.stay(asked, StayReason::Busy);
    }

    /// Sends a page, if it is this one's turn. `None`: it is to be looked at again.
    fn send_in_turn(
        &self,
        executor: &mut Executor,
        whole: PageRange,
        target: Target,
        keep: PageRange,
    ) -> Option<Passed> {
        let pages = whole.pages().get();
        let unit = u32::try_from(whole.pages().index() / PAGES_PER_BLOCK).unwrap_or(1);
        let stays = |reason| Some(Passed::new(pages, Fate::Stayed(reason)));
        let Some(_turn) = self.gigantic.leave() else {
            return Some(Passed::new(pages, Fate::Busy));
        };
        // Whoever had it before may have sent this page.
        if self.passes_over(whole.slice(0, 1), target.device).is_some() {
            return None;
        }
        let mut firsts = NO_FRAMES;
        if let Err(reason) = self.find_frames(executor, target.device, unit, keep, &mut firsts) {
            return stays(reason);
        }
        match self.depart_to(target.device) {
            Ok(_departure) => Some(self.send(executor, whole, target, &firsts)),
            Err(reason) => {
                self.free_all(target.device, &firsts, unit);
                stays(reason)
            }
        }
    }

    fn has_left_since(&self, address: VirtAddr, since: u64) -> bool {
        let map = self.gate.read();
        let piece = map.find(address);
        piece.is_some_and(|piece| map.block(piece.block).lock().last_departure >= since)
    }

    /// Takes frames for all of a page, and evicts what is in the way. They come in
    /// runs that fit the entries; what is shorter is put aside meanwhile, or it would
    /// be found again and again.
    fn find_frames(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        unit: u32,
        keep: PageRange,
        firsts: &mut Firsts,
    ) -> Result<(), StayReason> {
        let slot = self.devices.slot(device);
        let all = PageCount::from(PAGES_PER_BLOCK * unit as usize);
        if slot.device.info().memory.whole_pages() < all {
            return Err(StayReason::NoDeviceMemory);
        }
        let mut short: Vec<FrameRange> = hmm_mem::vec();
        let put_back = |short: &mut Vec<FrameRange>| {
            short.drain(..).for_each(|frames| slot.device.free(frames));
        };
        let mut have = 0;
        let mut full = false;
        let mut result = Err(StayReason::NoDeviceMemory);
        for _ in 0..FRAME_TRIES {
            if have == PAGES_PER_BLOCK {
                result = Ok(());
                break;
            }
            let missing = PageCount::from((PAGES_PER_BLOCK - have) * unit as usize);
            match slot.device.allocate(missing) {
                Ok(frames) => {
                    for first in (0..frames.count() / unit).map(|entry| frames.frame(entry * unit))
                    {
                        firsts[have] = first;
                        have += 1;
                    }
                    let rest = frames.count() % unit;
                    if rest > 0 {
                        short.push(frames.slice(frames.count() - rest, rest));
                    }
                    if short.len() < SHORT_RUNS {
                        continue;
                    }
                }
                Err(DeviceError::OutOfMemory) => {}
                Err(_) => {
                    result = Err(StayReason::DeviceLost);
                    break;
                }
            }
            put_back(&mut short);
            if full && !self.make_room(executor, device, keep) {
                break;
            }
            // Once more: others may have made room meanwhile.
            full = true;
        }
        put_back(&mut short);
        if result.is_err() {
            for &first in &firsts[..have] {
                slot.device.free(FrameRange::new(first, unit));
            }
        }
        result
    }

    /// Sends a page to frames, or frees them.
    fn send(
        &self,
        executor: &mut Executor,
        whole: PageRange,
        target: Target,
        firsts: &Firsts,
    ) -> Passed {
        let pages = whole.pages().get();
        let unit = u32::try_from(whole.pages().index() / PAGES_PER_BLOCK).unwrap_or(1);
        let stays = |reason| Passed::new(pages, Fate::Stayed(reason));
        if !self.capabilities.write_protect || executor.reads_events() {
            self.free_all(target.device, firsts, unit);
            return stays(StayReason::Limit);
        }
        let mut attempt = 0;
        let leaving = loop {
            match self.claim_leaving(whole) {
                Ok(leaving) => break leaving,
                Err(None) if self.wait_for_events(executor, attempt) => attempt += 1,
                Err(fate) => {
                    self.free_all(target.device, firsts, unit);
                    return Passed::new(pages, fate.unwrap_or(Fate::Busy));
                }
            }
        };
        let passed = match self.copy_leaving(executor, &leaving, firsts, target.device) {
            Err(reason) => {
                self.release_leaving(executor, &leaving, firsts, target.device, Some(false));
                stays(reason)
            }
            Ok(()) => {
                self.read_changes(executor);
                let wanted = self.mark_leaving(&leaving, firsts, target.device);
                hmm_sync::assert_none_held();
                let dropped = wanted.then(|| self.space.discard(leaving.place));
                if matches!(dropped, Some(Ok(Dropped::Unreported))) {
                    unreachable!("memory of this process alone is dropped with a report");
                }
                if matches!(dropped, Some(Ok(_))) && self.has_left(executor, &leaving) {
                    self.commit_leaving(&leaving, firsts, target)
                } else {
                    let ours = match dropped {
                        None => Some(false),
                        Some(Ok(_)) => Some(true),
                        // Perhaps, if it is still there.
                        Some(Err(_)) => None,
                    };
                    self.release_leaving(executor, &leaving, firsts, target.device, ours);
                    stays(StayReason::Locked)
                }
            }
        };
        self.transition_ended();
        passed
    }

    /// Whether a page is there, which any part of it tells. `None` when that cannot
    /// be found out.
    fn is_there(&self, place: PageRange) -> Option<bool> {
        let mut there = false;
        let looked = self.space.presence(place.slice(0, 1), &mut |_, presence| {
            there |= matches!(presence, Presence::Present { .. });
        });
        looked.ok().map(|()| there)
    }

    /// Write-protects a page that is at home. `Err(None)`: an event must be read
    /// first.
    fn claim_leaving(&self, whole: PageRange) -> Result<Leaving, Option<Fate>> {
        let map = self.gate.read();
        let stayed = |reason| Some(Fate::Stayed(reason));
        let Some(piece) = map.find(whole.start()) else {
            return Err(stayed(StayReason::Raced));
        };
        let block = map.block(piece.block);
        let place = piece.range();
        if !block.is_gigantic() || place != whole || piece.pages != block.pages() {
            return Err(stayed(StayReason::Raced));
        }
        let mut inner = block.lock();
        let inner = &mut *inner;
        if inner.states().any(|state| state == PageState::Discarded) {
            return Err(stayed(StayReason::Discarded));
        }
        if !inner.states().all(|state| state == PageState::System) {
            return Err(Some(Fate::Busy));
        }
        let protect = |on| match self.space.write_protect(place, on).stop {
            None => Ok(()),
            Some(Stop::Again) => Err(None),
            Some(_) => Err(stayed(StayReason::Limit)),
        };
        // A protection outlives its page, and such a hole looks like a page. Without
        // one it does not, and who fills it waits for this block.
        if inner.protected {
            protect(false)?;
            inner.protected = false;
        }
        let limit = || stayed(StayReason::Limit);
        if self.is_there(place).ok_or_else(limit)? {
            protect(true)?;
            inner.protected = true;
        }
        // Looked at under write protection: a page that is there stays as it is.
        let Some(data) = self.is_there(place) else {
            let _ = self.space.write_protect(place, false);
            return Err(limit());
        };
        if !self.space.is_quiet() {
            // What was seen may be somewhere else by now. A protection that
            // stays behind costs a fault.
            return Err(None);
        }
        self.invalidate(inner, place);
        let unit = inner.unit();
        for index in entries(unit) {
            inner.set(index, PageState::Copying { data });
        }
        Ok(Leaving {
            block: piece.block,
            place,
            unit,
            data,
        })
    }

    fn copy_leaving(
        &self,
        executor: &Executor,
        leaving: &Leaving,
        firsts: &Firsts,
        device: DeviceId,
    ) -> Result<(), StayReason> {
        hmm_sync::assert_none_held();
        let device = self.devices.slot(device).device;
        let failed = |error| {
            self.stats.copy_failures.fetch_add(1, Relaxed);
            reason_of(error)
        };
        let runs = || runs(firsts, leaving.unit);
        let part = |first: u32, frames: FrameRange| {
            leaving.place.slice(u64::from(first), frames.pages().get())
        };
        if !leaving.data {
            let zeros = runs().map(|(_, frames)| Transfer::Zero { frames });
            return run_transfers(device, zeros).map_err(failed);
        }
        if device.info().reads_program {
            let transfers = runs().map(|(first, frames)| Transfer::FromProgram {
                place: part(first, frames).start(),
                frames,
            });
            return run_transfers(device, transfers).map_err(failed);
        }
        for (first, frames) in runs() {
            for at in (0..frames.count()).step_by(BOUNCE_LEN) {
                let pages = (frames.count() - at).min(BOUNCE);
                let from = part(first, frames).slice(at.into(), pages.into());
                let host = executor.bounce(pages.into()).start();
                match self.space.read_pages(from, host).stop {
                    None => {}
                    // Unmapped meanwhile, or marked as lost.
                    Some(Stop::NotMapped) => return Err(StayReason::CopyFailed),
                    Some(_) => return Err(StayReason::Raced),
                }
                let frames = frames.slice(at, pages);
                let transfer = Transfer::ToDevice { host, frames };
                run_transfers(device, std::iter::once(transfer)).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// The page is about to be dropped. False when it is not wanted any more, or
    /// somewhere else than where it was copied.
    fn mark_leaving(&self, leaving: &Leaving, firsts: &Firsts, device: DeviceId) -> bool {
        let map = self.gate.read();
        let block = map.block(leaving.block);
        let mut inner = block.lock();
        if inner.entry(0).doomed() || place_of(block) != Some(leaving.place) {
            return false;
        }
        for (index, &frame) in entries(leaving.unit).zip(firsts) {
            let parked = inner.entry(index).parked();
            inner.set(index, PageState::Dropping { device, frame });
            if parked {
                inner.park(index);
            }
        }
        true
    }

    /// Whether the page is gone from the program. The drop went by address: memory
    /// that was remapped in between is still there.
    fn has_left(&self, executor: &mut Executor, leaving: &Leaving) -> bool {
        let mut attempt = 0;
        loop {
            match self.was_seen_leaving(leaving) {
                Some(left) => return left,
                None if self.wait_for_events(executor, attempt) => attempt += 1,
                None => return false,
            }
        }
    }

    /// `None` while a change is under way that may be a remap of the page.
    fn was_seen_leaving(&self, leaving: &Leaving) -> Option<bool> {
        let map = self.gate.read();
        let block = map.block(leaving.block);
        let inner = block.lock();
        if !self.space.is_quiet() {
            return None;
        }
        let reported = entries(leaving.unit).all(|index| {
            let entry = inner.entry(index);
            entry.doomed() || matches!(entry.state(), PageState::Dropped { .. })
        });
        if !reported {
            return Some(false);
        }
        let Some(place) = place_of(block) else {
            return Some(true);
        };
        // What was dropped under protection looks like a page.
        if self.space.write_protect(place, false).stop.is_some() {
            return None;
        }
        Some(self.is_there(place) == Some(false))
    }

    /// The frames own the page from here on.
    fn commit_leaving(&self, leaving: &Leaving, firsts: &Firsts, target: Target) -> Passed {
        let map = self.gate.read();
        let block = map.block(leaving.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        inner.departed(self.next_use());
        let slot = self.devices.slot(target.device);
        let (mut moved, mut parked) = (0, false);
        for (index, &frame) in entries(leaving.unit).zip(firsts) {
            let entry = inner.entry(index);
            parked |= entry.parked();
            if entry.doomed() {
                slot.free(FrameRange::new(frame, leaving.unit));
                inner.set(index, Self::after_removal(block, index));
                continue;
            }
            let device = target.device;
            inner.set(index, PageState::Device { device, frame });
            moved += u64::from(leaving.unit);
        }
        if moved > 0 {
            self.map_gigantic(block, firsts, target);
        }
        if parked {
            self.wake_pages(block, 0, block.pages());
        }
        inner.tidy();
        let zeroed = if leaving.data { 0 } else { moved };
        for (counter, pages) in [
            (&self.stats.pages_to_device, moved),
            (&self.stats.pages_zeroed, zeroed),
            (&self.stats.huge_pages, moved),
            (&self.stats.fallback_pages, moved),
        ] {
            counter.fetch_add(pages, Relaxed);
        }
        let pages = leaving.place.pages().get();
        if moved == 0 {
            return Passed::new(pages, Fate::Stayed(StayReason::Raced));
        }
        Passed::new(pages, Fate::Moved { zeroed, huge: true })
    }

    /// Enters a page that a device has into its page table. One that has no room is no
    /// failure. What was shared with a forked child on its way is only to be read.
    fn map_gigantic(&self, block: &Block, firsts: &Firsts, target: Target) {
        let slot = self.devices.slot(target.device);
        let unit = block.pages() / u32::try_from(PAGES_PER_BLOCK).unwrap_or(1);
        let Some(place) = place_of(block) else {
            return;
        };
        for (first, frames) in runs(firsts, unit) {
            let shared = frames.iter().any(|frame| slot.is_shared(frame));
            let access = if shared { Access::Read } else { target.access };
            let part = place.slice(first.into(), frames.pages().get());
            let _ = slot.device.map(part, frames, access);
        }
    }

    /// Undoes a claim: what the engine has not dropped is the program's again, what
    /// it has dropped stays on the device. `ours`: whether it has; `None`, if the
    /// kernel has refused to.
    fn release_leaving(
        &self,
        executor: &mut Executor,
        leaving: &Leaving,
        firsts: &Firsts,
        device: DeviceId,
        ours: Option<bool>,
    ) {
        let mut attempt = 0;
        while !self.try_release(leaving, firsts, device, ours, attempt < AGAIN_LIMIT) {
            self.wait_for_events(executor, attempt);
            attempt += 1;
        }
    }

    fn try_release(
        &self,
        leaving: &Leaving,
        firsts: &Firsts,
        device: DeviceId,
        ours: Option<bool>,
        patient: bool,
    ) -> bool {
        let map = self.gate.read();
        let block = map.block(leaving.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let place = place_of(block);
        // A drop that the kernel has refused has not hit a page that is somewhere
        // else now: what was reported was the program's.
        let ours = ours.unwrap_or_else(|| place.is_none_or(|place| place == leaving.place));
        let mut there = false;
        if let Some(place) = place {
            // What was dropped under protection looks like a page.
            let lift = || self.space.write_protect(place, false).stop == Some(Stop::Again);
            if patient && lift() {
                return false;
            }
            // Looked at before the next call: what that does not refuse was true
            // here.
            let seen = self.is_there(place);
            if patient && seen.is_none() {
                return false;
            }
            there = seen == Some(true);
            if lift() && patient {
                return false;
            }
        }
        let mut parked = false;
        for (index, &frame) in entries(leaving.unit).zip(firsts) {
            let entry = inner.entry(index);
            let reported = matches!(entry.state(), PageState::Dropped { .. });
            let doomed = entry.doomed() || (reported && !ours && !there);
            parked |= entry.parked();
            if reported && !doomed && !there {
                inner.set(index, PageState::Device { device, frame });
            } else {
                let frames = FrameRange::new(frame, leaving.unit);
                self.devices.slot(device).free(frames);
                inner.set(index, Self::at_home(block, index, doomed));
            }
        }
        if parked {
            self.wake_pages(block, 0, block.pages());
        }
        inner.tidy();
        true
    }

    /// Brings the first page of a range home, of which so many pages are asked for.
    pub(crate) fn bring_gigantic_home(
        &self,
        executor: &mut Executor,
        range: PageRange,
        home: Home,
        (asked, page_len, waits): (u32, PageCount, bool),
        step: &mut Step,
    ) {
        executor.takes_long();
        let asked = u64::from(asked);
        if waits {
            (0..DRY_WAITS).for_each(|_| self.space.relax());
            step.stays(range.slice(step.passed, asked), StayReason::NoSystemMemory);
            step.passed += asked;
            return;
        }
        let Some(room) = self.gigantic.take(page_len) else {
            // Another one is on its way.
            if !home.stops_at_flights {
                self.space.relax();
                step.busy += asked;
                step.passed += asked;
            }
            return;
        };
        let mut firsts = NO_FRAMES;
        let at = range.start().plus_pages(step.passed);
        let Some(arriving) = self.claim_arriving(at, page_len, home, &mut firsts) else {
            // In flight, or gone, or not wanted.
            drop(room);
            let flies = self.is_in_flight(at);
            if !(flies && home.stops_at_flights) {
                step.busy += if flies { asked } else { 0 };
                step.passed += asked;
            }
            return;
        };
        match self.copy_arriving(&arriving, &firsts, room.start()) {
            Ok(()) => match self.commit_arriving(executor, &arriving, &firsts, room.start()) {
                Ok(true) => step.moved += asked,
                Ok(false) => {}
                Err(reason) => step.stays(range.slice(step.passed, asked), reason),
            },
            Err(error) => {
                if self.arriving_failed(&arriving, &firsts, error, home) {
                    step.stays(range.slice(step.passed, asked), reason_of(error));
                }
            }
        }
        self.empty(room);
        step.passed += asked;
        self.transition_ended();
    }

    fn is_in_flight(&self, address: VirtAddr) -> bool {
        let map = self.gate.read();
        let piece = map.find(address);
        piece.is_some_and(|piece| map.block(piece.block).lock().in_flight() > 0)
    }

    /// Claims the page at an address if all of it is on one device.
    fn claim_arriving(
        &self,
        at: VirtAddr,
        page_len: PageCount,
        home: Home,
        firsts: &mut Firsts,
    ) -> Option<Arriving> {
        let map = self.gate.read();
        let piece = map.undivided(map.find(at)?);
        let block = map.block(piece.block);
        if block.page_len() != page_len {
            return None;
        }
        let mut inner = block.lock();
        let inner = &mut *inner;
        let PageState::Device { device, .. } = inner.state(0) else {
            return None;
        };
        let wanted = home.only.is_none_or(|only| only == device);
        if !wanted || home.unless.is_true_of(inner) {
            return None;
        }
        for (slot, state) in firsts.iter_mut().zip(inner.states()) {
            match state {
                PageState::Device { device: on, frame } if on == device => *slot = frame,
                _ => return None,
            }
        }
        let place = piece.range();
        self.notifiers.lock().invalidate(place);
        self.devices.slot(device).device.unmap(place);
        let unit = inner.unit();
        for (index, &frame) in entries(unit).zip(firsts.iter()) {
            inner.set(index, PageState::Downloading { device, frame });
        }
        Some(Arriving {
            block: piece.block,
            device,
            pages: piece.pages,
            unit,
        })
    }

    fn copy_arriving(
        &self,
        arriving: &Arriving,
        firsts: &Firsts,
        room: VirtAddr,
    ) -> Result<(), DeviceError> {
        hmm_sync::assert_none_held();
        let device = self.devices.slot(arriving.device).device;
        let mut runs = runs(firsts, arriving.unit).peekable();
        // A few at a time: what fails is copied again.
        while runs.peek().is_some() {
            let mut batch: [Option<Transfer>; TRANSFERS] = [None; TRANSFERS];
            for (slot, (first, frames)) in batch.iter_mut().zip(&mut runs) {
                *slot = Some(Transfer::ToHost {
                    frames,
                    host: room.plus_pages(first.into()),
                });
            }
            let mut result = Ok(());
            for _ in 0..COPY_LIMIT {
                result = run_transfers(device, batch.iter().flatten().copied());
                match result {
                    Ok(()) | Err(DeviceError::Lost) => break,
                    Err(_) => {
                        self.stats.copy_failures.fetch_add(1, Relaxed);
                    }
                }
            }
            result?;
        }
        Ok(())
    }

    /// Puts a copied page in place. True when it is home, false when the program has
    /// removed it meanwhile.
    ///
    /// # Errors
    /// What is in its way; it rests on the device.
    fn commit_arriving(
        &self,
        executor: &mut Executor,
        arriving: &Arriving,
        firsts: &Firsts,
        room: VirtAddr,
    ) -> Result<bool, StayReason> {
        let mut attempt = 0;
        loop {
            let stop = match self.place_arriving(arriving, firsts, room) {
                Ok(None) => return Ok(false),
                Ok(Some(place)) => {
                    self.space.wake(SpaceId::OWN, place);
                    return Ok(true);
                }
                Err(stop) => stop,
            };
            // A pool of huge pages that is empty may stay so for long.
            let dry = stop == Stop::NoMemory;
            let hopeless = stop == Stop::Gone || (dry && attempt >= NO_PAGE_TRIES);
            if hopeless || !self.wait_for_events(executor, attempt) {
                self.settle_arriving(arriving, firsts, dry);
                return Err(if dry {
                    StayReason::NoSystemMemory
                } else {
                    StayReason::Busy
                });
            }
            attempt += 1;
        }
    }

    fn place_arriving(
        &self,
        arriving: &Arriving,
        firsts: &Firsts,
        room: VirtAddr,
    ) -> Result<Option<PageRange>, Stop> {
        let map = self.gate.read();
        let block = map.block(arriving.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        if inner.entry(0).doomed() {
            self.settle_all(inner, block, arriving, firsts);
            return Ok(None);
        }
        let Some(place) = place_of(block) else {
            unreachable!("a page that is not doomed is mapped somewhere");
        };
        match self.space.copy_pages(SpaceId::OWN, room, place).stop {
            None => {}
            Some(Stop::Exists) => {
                unreachable!("there is a page at {place} already, where one comes home")
            }
            Some(stop) => return Err(stop),
        }
        self.come_home(inner, arriving, firsts);
        inner.protected = false;
        inner.last_arrival = self.next_use();
        inner.tidy();
        let pages = u64::from(arriving.pages);
        self.stats.pages_to_system.fetch_add(pages, Relaxed);
        self.stats.huge_pages.fetch_add(pages, Relaxed);
        Ok(Some(place))
    }

    /// The frames are needed no more: the program has the page.
    fn come_home(&self, inner: &mut BlockInner, arriving: &Arriving, firsts: &Firsts) {
        self.free_all(arriving.device, firsts, arriving.unit);
        for index in entries(arriving.unit) {
            inner.set(index, PageState::System);
        }
    }

    /// `dry`: the kernel had no page for it. It is copied again after a while only, and
    /// others make room on its device before it is asked to.
    fn settle_arriving(&self, arriving: &Arriving, firsts: &Firsts, dry: bool) {
        let map = self.gate.read();
        let block = map.block(arriving.block);
        let inner = &mut *block.lock();
        if dry {
            inner.last_use = self.next_use();
            if self.space.may_sleep() {
                inner.dry_until_ns = self.clock.now_ns() + DRY_NS;
            }
        }
        self.settle_all(inner, block, arriving, firsts);
    }

    /// A page back to rest on its device, unless the program removed it.
    fn settle_all(
        &self,
        inner: &mut BlockInner,
        block: &Block,
        arriving: &Arriving,
        firsts: &Firsts,
    ) {
        let mut parked = false;
        for (index, &frame) in entries(arriving.unit).zip(firsts) {
            let entry = inner.entry(index);
            parked |= entry.parked();
            if entry.doomed() {
                let frames = FrameRange::new(frame, arriving.unit);
                self.devices.slot(arriving.device).free(frames);
                inner.set(index, Self::after_removal(block, index));
            } else {
                let device = arriving.device;
                inner.set(index, PageState::Device { device, frame });
            }
        }
        if parked {
            self.wake_pages(block, 0, block.pages());
        }
        inner.tidy();
    }

    /// The device could not give the page: it stays there, or, when it is needed, it
    /// is lost and says so. True when it stays.
    fn arriving_failed(
        &self,
        arriving: &Arriving,
        firsts: &Firsts,
        error: DeviceError,
        home: Home,
    ) -> bool {
        let map = self.gate.read();
        let block = map.block(arriving.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let doomed = inner.entry(0).doomed();
        let lost = place_of(block)
            .filter(|place| home.poisons.includes_any(*place) && !doomed)
            .filter(|place| self.poison(*place, error));
        let Some(place) = lost else {
            self.settle_all(inner, block, arriving, firsts);
            return true;
        };
        self.come_home(inner, arriving, firsts);
        inner.tidy();
        self.space.wake(SpaceId::OWN, place);
        false
    }

    /// Gives an entry frames of its own instead of those that a forked child needs as
    /// they are.
    pub(crate) fn unshare_unit(
        &self,
        executor: &Executor,
        address: VirtAddr,
        target: Target,
    ) -> Passed {
        let slot = self.devices.slot(target.device);
        let stays = |reason| Passed::new(1, Fate::Stayed(reason));
        let Some(unit) = self.unit_at(address) else {
            return Passed::new(1, Fate::Busy);
        };
        let fresh = match slot.device.allocate(PageCount::new(unit.into())) {
            Ok(frames) if frames.count() == unit => frames,
            Ok(frames) => {
                slot.device.free(frames);
                return stays(StayReason::NoDeviceMemory);
            }
            Err(DeviceError::OutOfMemory) => return stays(StayReason::NoDeviceMemory),
            Err(_) => return stays(StayReason::DeviceLost),
        };
        let Some((block, index, old)) = self.claim_unit(address, fresh, target.device) else {
            slot.device.free(fresh);
            return Passed::new(1, Fate::Busy);
        };
        let copied = self.copy_unit(executor, old, fresh, target.device);
        {
            let map = self.gate.read();
            let block = map.block(block);
            let mut inner = block.lock();
            let inner = &mut *inner;
            let entry = inner.entry(index);
            let (kept, spare) = if copied.is_ok() {
                (fresh, old)
            } else {
                (old, fresh)
            };
            slot.free(spare);
            if entry.doomed() {
                slot.free(kept);
                inner.set(index, Self::after_removal(block, index));
            } else {
                let (device, frame) = (target.device, kept.first());
                inner.set(index, PageState::Device { device, frame });
                if copied.is_ok() {
                    inner.last_use = self.next_use();
                    if let Some(part) = block.place_of(index, unit) {
                        let shared = kept.iter().any(|frame| slot.is_shared(frame));
                        let access = if shared { Access::Read } else { target.access };
                        let _ = slot.device.map(part, kept, access);
                    }
                }
            }
            if entry.parked() {
                self.wake_pages(block, 0, block.pages());
            }
            inner.tidy();
        }
        self.transition_ended();
        match copied {
            Ok(()) => {
                let pages = u64::from(unit);
                self.stats.pages_between_devices.fetch_add(pages, Relaxed);
                let (zeroed, huge) = (0, false);
                Passed::new(1, Fate::Moved { zeroed, huge })
            }
            Err(error) => {
                self.stats.copy_failures.fetch_add(1, Relaxed);
                stays(reason_of(error))
            }
        }
    }

    fn unit_at(&self, address: VirtAddr) -> Option<u32> {
        let map = self.gate.read();
        let block = map.block(map.find(address)?.block);
        let unit = block.lock().unit();
        block.is_gigantic().then_some(unit)
    }

    /// Claims the entry of an address, which rests on a device: its block, its first
    /// page, its frames.
    fn claim_unit(
        &self,
        address: VirtAddr,
        fresh: FrameRange,
        on: DeviceId,
    ) -> Option<(BlockId, u32, FrameRange)> {
        let map = self.gate.read();
        let piece = map.find(address)?;
        let block = map.block(piece.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let unit = inner.unit();
        let index = piece.first & !(unit - 1);
        let PageState::Device { device, frame } = inner.state(index) else {
            return None;
        };
        if device != on || fresh.count() != unit {
            return None;
        }
        let place = block.place_of(index, unit)?;
        self.invalidate(inner, place);
        inner.set(index, PageState::Transferring { device, frame });
        Some((piece.block, index, FrameRange::new(frame, unit)))
    }

    fn copy_unit(
        &self,
        executor: &Executor,
        from: FrameRange,
        to: FrameRange,
        device: DeviceId,
    ) -> Result<(), DeviceError> {
        hmm_sync::assert_none_held();
        let device = self.devices.slot(device).device;
        for at in (0..from.count()).step_by(BOUNCE_LEN) {
            let pages = (from.count() - at).min(BOUNCE);
            let host = executor.bounce(pages.into()).start();
            for transfer in [
                Transfer::ToHost {
                    frames: from.slice(at, pages),
                    host,
                },
                Transfer::ToDevice {
                    host,
                    frames: to.slice(at, pages),
                },
            ] {
                run_transfers(device, std::iter::once(transfer))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_at_a_time_leaves_and_comes() {
        let gigantic = Gigantic::new();
        let page_len = PageCount::from(2 * PAGES_PER_BLOCK);
        assert!(gigantic.take(page_len).is_none(), "not prepared");
        assert!(gigantic.prepare(page_len) && gigantic.prepare(page_len));
        for _ in 0..2 {
            let (turn, room) = (gigantic.leave(), gigantic.take(page_len));
            assert!(turn.is_some() && room.is_some());
            for _ in 0..2 {
                assert!(gigantic.leave().is_none() && gigantic.take(page_len).is_none());
            }
        }
    }

    #[test]
    fn frames_in_a_row_are_copied_together() {
        let mut firsts = NO_FRAMES;
        for (frame, first) in (0..).step_by(2).zip(&mut firsts) {
            *first = FrameId::new(if frame < 100 { frame } else { frame + 7 });
        }
        let runs: std::vec::Vec<_> = runs(&firsts, 2)
            .map(|(first, frames)| (first, frames.first().get(), frames.count()))
            .collect();
        assert_eq!(runs, [(0, 0, 100), (100, 107, 512), (612, 619, 412)]);
    }
}
