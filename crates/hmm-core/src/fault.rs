//! A CPU thread touched a page that is not there.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{FaultKind, Progress, SpaceId, Stop};
use hmm_types::{PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr};

use crate::ahead::Planned;
use crate::engine::Engine;
use crate::executor::{BOUNCE_PAGES, Executor, QueuedFault};
use crate::home::Home;
use crate::map::{BlockInner, Piece, SpaceMap};
use crate::page::PageState;
use crate::readahead::Plan;

/// Pages filled with zeros at a time when a hole is touched.
const ZERO_PAGES: u32 = 16;

/// What became of a place where there was perhaps no page.
pub(crate) enum Hole {
    /// So many pages of zeros are there now.
    Filled(u64),
    /// The page is away or on its way, or an event must be read first.
    Again,
    /// No hole, or not the engine's.
    None,
}

/// What a look at the page's state said.
enum Found {
    /// Nothing to do but to let the thread look again.
    Wake,
    /// The thread waits for the end of a flight.
    Parked,
    /// An event must be read first.
    Again,
    /// There is no memory for it: the thread looks again after a while.
    Later,
    /// The page is away: bring this range home.
    Away(PageRange),
}

impl Engine<'_> {
    /// Serves one of the faults that this executor has read; meanwhile it may
    /// read more. Returns whose it was: the kernel's number of the thread, 0
    /// where it does not tell. `None` when there is no fault.
    pub fn serve(&self, executor: &mut Executor) -> Option<u32> {
        let fault = executor.next_fault()?;
        self.serve_fault(executor, fault);
        Some(fault.thread)
    }

    fn serve_fault(&self, executor: &mut Executor, fault: QueuedFault) {
        self.stats.cpu_faults.fetch_add(1, Relaxed);
        if fault.space != SpaceId::OWN {
            match fault.kind {
                FaultKind::Missing => self.child_fault(executor, fault.space, fault.address),
                FaultKind::WriteProtected => {
                    self.child_writes(executor, fault.space, fault.address);
                }
            }
            return;
        }
        let page = PageRange::from_pages(fault.address.page_floor(), PageCount::ONE);
        let mut attempt = 0;
        let found = loop {
            match self.look_at(fault) {
                Found::Again if self.wait_for_events(executor, attempt) => attempt += 1,
                found => break found,
            }
        };
        match found {
            Found::Wake | Found::Again => self.space.wake(SpaceId::OWN, page),
            Found::Later => {
                self.space.relax();
                self.space.wake(SpaceId::OWN, page);
            }
            Found::Parked => {
                self.stats.parked_faults.fetch_add(1, Relaxed);
                self.follow(executor, fault);
            }
            Found::Away(huge) => self.fetch(executor, fault, huge),
        }
        let latency = self.clock.now_ns().saturating_sub(fault.read_at_ns);
        self.stats.fault_latency.record(latency);
    }

    fn look_at(&self, fault: QueuedFault) -> Found {
        let map = self.gate.read();
        let Some(piece) = map.find(fault.address) else {
            if self.is_staging(fault.address) {
                drop(map);
                return self.refill_staging(fault.address);
            }
            // Registered memory without a piece has nothing away: a hole, for
            // instance behind mremap(MREMAP_DONTUNMAP). While the gate is held it
            // gets none: the fault may be an old one, of what was there before.
            let page = PageRange::from_pages(fault.address.page_floor(), PageCount::ONE);
            return match self.space.zero_pages(SpaceId::OWN, page).stop {
                Some(Stop::Again) => Found::Again,
                _ => Found::Wake,
            };
        };
        let block = map.block(piece.block);
        let mut inner = block.lock();
        let entry = inner.entry(piece.first);
        match entry.state() {
            PageState::System | PageState::Discarded if fault.kind == FaultKind::WriteProtected => {
                let page = piece.range().slice(0, 1);
                match self.space.write_protect(page, false).stop {
                    Some(Stop::Again) => Found::Again,
                    _ => Found::Wake,
                }
            }
            PageState::System | PageState::Discarded => {
                let progress = self.fill_hole(&map, &mut inner, piece);
                match progress.stop {
                    Some(Stop::Again) if progress.done == PageCount::ZERO => Found::Again,
                    Some(Stop::NoMemory) if progress.done == PageCount::ZERO => Found::Later,
                    // Behind the first page others may exist already; that is fine.
                    _ => Found::Wake,
                }
            }
            // The program has dropped the page under the copy that still reads it; or
            // it had said before that it would, and only gets to it now. It is the
            // program's: zeros, which are not to be dropped once more.
            PageState::Copying { data }
                if (data || entry.doomed()) && fault.kind == FaultKind::Missing =>
            {
                let all = map.undivided(piece);
                let dropped = if block.is_hugetlb() {
                    all.first..all.first + all.pages
                } else {
                    piece.first..piece.first + 1
                };
                let range = piece.range().slice(0, 1);
                match self.space.zero_pages(SpaceId::OWN, range).stop {
                    Some(Stop::Again) => Found::Again,
                    Some(Stop::NoMemory) => Found::Later,
                    // It is there: the fault is an old one.
                    Some(_) => Found::Wake,
                    None => {
                        let unit = inner.unit() as usize;
                        dropped.step_by(unit).for_each(|index| inner.refill(index));
                        Found::Wake
                    }
                }
            }
            PageState::Device { .. } if block.is_gigantic() => {
                Found::Away(map.undivided(piece).range())
            }
            PageState::Device { .. } | PageState::Staged { .. } => {
                let block_start = piece.start.block_floor();
                let whole = (inner.huge || block.is_hugetlb())
                    && block.place_of(0, 512).is_some_and(|place| {
                        place.start() == block_start && place.pages().get() == 512
                    });
                Found::Away(if whole {
                    PageRange::from_pages(block_start, PageCount::new(512))
                } else {
                    piece.range().slice(0, 1)
                })
            }
            PageState::Copying { .. }
            | PageState::Dropping { .. }
            | PageState::Dropped { .. }
            | PageState::Uploading { .. }
            | PageState::Downloading { .. }
            | PageState::Transferring { .. } => {
                inner.park(piece.first);
                Found::Parked
            }
        }
    }

    /// The program had given a page back with MADV_FREE, and the kernel has taken
    /// it while it was in staging: it reads as zeros, as it would at home. Nothing
    /// else that somebody holds there can vanish.
    fn refill_staging(&self, address: VirtAddr) -> Found {
        assert!(
            self.staging.lock().is_held(address),
            "a thread touched a staging page at {address} that nobody holds"
        );
        self.stats.freed_in_staging.fetch_add(1, Relaxed);
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        match self.space.zero_pages(SpaceId::OWN, page).stop {
            Some(Stop::Again) => Found::Again,
            _ => Found::Wake,
        }
    }

    /// Puts zeros where nobody has been yet.
    pub(crate) fn fill_hole_at(&self, address: VirtAddr) -> Hole {
        let map = self.gate.read();
        let Some(piece) = map.find(address) else {
            return Hole::None;
        };
        let mut inner = map.block(piece.block).lock();
        match inner.state(piece.first) {
            PageState::System | PageState::Discarded => {}
            _ => return Hole::Again,
        }
        let progress = self.fill_hole(&map, &mut inner, piece);
        match progress.stop {
            _ if progress.done > PageCount::ZERO => Hole::Filled(progress.done.get()),
            Some(Stop::Again) => Hole::Again,
            _ => Hole::None,
        }
    }

    /// Puts zeros where nobody has been yet, a few pages at a time; all of a page
    /// of hugetlbfs.
    fn fill_hole(&self, map: &SpaceMap, inner: &mut BlockInner, piece: Piece) -> Progress {
        self.stats.zero_faults.fetch_add(1, Relaxed);
        let (piece, most) = if map.block(piece.block).is_hugetlb() {
            // All of it is filled: nobody may have a part of it in hand still.
            if inner.in_flight() > 0 {
                return Progress {
                    done: PageCount::ZERO,
                    stop: Some(Stop::Again),
                };
            }
            (map.undivided(piece), map.block(piece.block).pages())
        } else {
            (piece, ZERO_PAGES)
        };
        let unit = inner.unit();
        let units = (0..piece.pages.min(most))
            .step_by(unit as usize)
            .take_while(|&offset| {
                matches!(
                    inner.state(piece.first + offset),
                    PageState::System | PageState::Discarded
                )
            })
            .count();
        let range = piece.range().slice(0, units as u64 * u64::from(unit));
        let progress = self.space.zero_pages(SpaceId::OWN, range);
        let filled = u32::try_from(progress.done.get()).unwrap_or(0);
        for index in (piece.first..piece.first + filled).step_by(unit as usize) {
            // A hole in coherent memory stays there.
            if inner.state(index) != PageState::System {
                inner.set(index, PageState::System);
            }
        }
        progress
    }

    /// Brings the page home, and what the plan says with it.
    fn fetch(&self, executor: &mut Executor, fault: QueuedFault, least: PageRange) {
        let plan = self.cpu_readahead.plan(fault.address);
        let (from, upto) = Plan::addresses(plan.now);
        let from = from
            .min(least.start())
            .max(VirtAddr::new(hmm_types::PAGE_SIZE));
        let upto = upto
            .max(least.end())
            .min(VirtAddr::new(hmm_types::USER_END));
        // The touched page first: somebody waits for it.
        let window = if least.pages().index() >= PAGES_PER_BLOCK {
            // A huge page comes whole, or it would be one no more.
            least
        } else {
            PageRange::span(from, upto)
        };
        if window.pages().get() > BOUNCE_PAGES {
            executor.takes_long();
        }
        if !self.bring_demanded(executor, fault, window) {
            // Somebody else was quicker, or it could not come, or has been home and
            // was sent off again: who still waits looks again.
            let page = PageRange::from_pages(fault.address.page_floor(), PageCount::ONE);
            self.space.wake(SpaceId::OWN, page);
        }
        self.plan_ahead(executor, plan, fault.read_at);
    }

    /// A thread waits for a page on its way: whoever reads in sequence needs more.
    fn follow(&self, executor: &mut Executor, fault: QueuedFault) {
        let plan = self.cpu_readahead.plan_on(fault.address);
        self.plan_ahead(executor, plan, fault.read_at);
    }

    fn plan_ahead(&self, executor: &mut Executor, plan: Plan, planned_at: u64) {
        let (from, upto) = Plan::addresses(plan.ahead);
        let upto = upto.min(VirtAddr::new(hmm_types::USER_END));
        if from < upto {
            let range = PageRange::span(from, upto);
            let planned = Planned {
                range,
                at: planned_at,
            };
            if self.ahead.put(planned) && range.pages().index() > PAGES_PER_BLOCK {
                executor.can_be_shared();
            }
        }
    }

    /// Whether [`Engine::read_ahead`] has something to do.
    #[must_use]
    pub fn is_ahead_planned(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Brings home a block's worth of what read-ahead has planned, while no fault
    /// waits. True when there was something.
    pub fn read_ahead(&self, executor: &mut Executor) -> bool {
        let Some(planned) = self.ahead.take_block() else {
            return false;
        };
        let moved = self.bring_ahead(executor, planned.range, Home::planned(planned.at));
        self.stats.readahead_pages.fetch_add(moved, Relaxed);
        true
    }
}
