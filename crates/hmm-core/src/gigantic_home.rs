//! To system memory: a page of hugetlbfs of several blocks ([`crate::gigantic`]), by
//! way of the room, as [`crate::home`] has the steps.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, SpaceId, Stop, Transfer};
use hmm_types::{DeviceId, FrameRange, PageCount, PageRange, StayReason, VirtAddr};

use crate::engine::{COPY_LIMIT, Engine};
use crate::executor::Executor;
use crate::gigantic::{Firsts, NO_FRAMES, entries, place_of, runs};
use crate::home::{Home, Step, TRANSFERS, reason_of, run_transfers};
use crate::map::{Block, BlockId, BlockInner};
use crate::page::PageState;

/// How often a page that the kernel has no memory for is tried at a time.
const NO_PAGE_TRIES: u32 = 8;
/// How long nothing is copied when the kernel had no page to put it into.
const DRY_NS: u64 = 250_000_000;
/// Waits meanwhile before a thread looks again.
const DRY_WAITS: u32 = 64;

/// A page on its way home.
struct Arriving {
    block: BlockId,
    device: DeviceId,
    pages: u32,
    unit: u32,
}

impl Engine<'_> {
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
}
