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

use hmm_hal::{DeviceError, Presence, Transfer};
use hmm_mem::Pages;
use hmm_types::{
    Access, DeviceId, FrameId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason,
    VirtAddr,
};

use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::{BOUNCE_LEN, Executor};
use crate::home::{reason_of, run_transfers};
use crate::map::{Block, BlockId};
use crate::page::PageState;
use crate::upload::{Fate, Passed, Target};

/// Sizes that there may be: 512 pages times two to the power of less than this.
const SIZES: usize = 16;
/// How much longer than for others one waits for such a page: a minute, as there may be
/// much else to do.
const SLOWER: u32 = 2048;

/// Pages of an executor's bounce memory.
#[allow(clippy::cast_possible_truncation, reason = "a few pages")]
pub(crate) const BOUNCE: u32 = BOUNCE_LEN as u32;

/// The frames of a page, as the first one of each entry.
pub(crate) type Firsts = [FrameId; PAGES_PER_BLOCK];

pub(crate) const NO_FRAMES: Firsts = [FrameId::new(0); PAGES_PER_BLOCK];

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
pub(crate) struct Turn<'a>(&'a AtomicBool);

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

    pub(crate) fn leave(&self) -> Option<Turn<'_>> {
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

/// Frames of a page as runs that lie together, each with its first page: no longer
/// than a block, as those of other pages.
pub(crate) fn runs(firsts: &Firsts, unit: u32) -> impl Iterator<Item = (u32, FrameRange)> {
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
pub(crate) fn entries(unit: u32) -> impl Iterator<Item = u32> {
    (0..PAGES_PER_BLOCK).map(move |entry| u32::try_from(entry).unwrap_or(0) * unit)
}

/// Where all of a page is mapped now.
pub(crate) fn place_of(block: &Block) -> Option<PageRange> {
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

    pub(crate) fn free_all(&self, device: DeviceId, firsts: &Firsts, unit: u32) {
        for (_, frames) in runs(firsts, unit) {
            self.devices.slot(device).free(frames);
        }
    }

    /// Whether a page is there, which any part of it tells. `None` when that cannot
    /// be found out.
    pub(crate) fn is_there(&self, place: PageRange) -> Option<bool> {
        let mut there = false;
        let looked = self.space.presence(place.slice(0, 1), &mut |_, presence| {
            there |= matches!(presence, Presence::Present { .. });
        });
        looked.ok().map(|()| there)
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
