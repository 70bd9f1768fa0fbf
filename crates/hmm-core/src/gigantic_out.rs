//! To a device: pages of hugetlbfs of several blocks ([`crate::gigantic`]), one
//! after the other, as [`crate::fallback`] has the steps.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, Dropped, Mapping, Stop, Transfer};
use hmm_mem::Vec;
use hmm_types::{
    Access, DeviceId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr,
};

use crate::engine::{AGAIN_LIMIT, Engine};
use crate::executor::{BOUNCE_LEN, Executor};
use crate::gigantic::{BOUNCE, Firsts, NO_FRAMES, entries, place_of, runs};
use crate::home::{Home, reason_of, run_transfers};
use crate::map::{Block, BlockId};
use crate::page::PageState;
use crate::report::MigrationReport;
use crate::upload::{Fate, Passed, Target};

/// Shorter runs of frames that are put aside while longer ones are looked for.
const SHORT_RUNS: usize = 4096;
/// Looks for frames before a device is said to be full.
const FRAME_TRIES: u32 = 1 << 14;

/// A page on its way to a device: claimed at `place`, with data or a hole.
struct Leaving {
    block: BlockId,
    place: PageRange,
    unit: u32,
    data: bool,
}

impl Engine<'_> {
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
                    if let Some((_, reason @ StayReason::DeviceLost)) = step.stuck {
                        return report.stay(asked, reason);
                    }
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
                let removed = doomed && !entry.refilled();
                inner.set(index, Self::at_home(block, index, removed));
            }
        }
        if parked {
            self.wake_pages(block, 0, block.pages());
        }
        inner.tidy();
        true
    }
}
