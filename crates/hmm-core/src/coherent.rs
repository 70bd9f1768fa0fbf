//! Device memory that the CPU uses in place: the kernel's device-coherent memory
//! (`mm/memremap.c`, `MEMORY_DEVICE_COHERENT`), as CXL has it.
//!
//! A page there is in the CPU's page table as any other; nothing faults, and
//! nothing comes home by itself. This is its model: the page stays where it is,
//! and the engine notes on it whose memory it stands for. The device uses it in
//! place. The note goes when the program drops the page, when it moves to another
//! device or is brought home, and from all pages when the process forks, as after
//! that the first write to each makes a copy in system memory.

use hmm_hal::Mapping;
use hmm_types::{DeviceId, PageCount, PageRange, StayReason, VirtAddr};

use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::Executor;
use crate::fault::Hole;
use crate::home::Home;
use crate::map::{BlockInner, Piece};
use crate::page::PageState;
use crate::report::MigrationReport;

/// What the first pages of a range are.
enum First {
    /// So many are the device's now, and of these so many were before. None: the
    /// device is full.
    There {
        pages: u64,
        already: u64,
    },
    /// On a device that the CPU cannot reach, or exclusive.
    Away,
    InFlight,
    /// The program has dropped the page, and nobody has touched it since.
    Discarded,
    Gone,
}

impl Engine<'_> {
    /// Whether the CPU uses this device's memory in place.
    pub(crate) fn is_coherent(&self, device: DeviceId) -> bool {
        self.devices
            .get(device)
            .is_some_and(|slot| slot.device.info().coherent)
    }

    /// Moves a mapping's pages to a device's coherent memory, as many as it has
    /// room for; nothing is evicted.
    pub(crate) fn migrate_coherent(
        &self,
        executor: &mut Executor,
        mapping: &Mapping,
        device: DeviceId,
        report: &mut MigrationReport,
    ) {
        for span in mapping.range.blocks() {
            self.populate(span, mapping.permissions.write);
            self.migrate_coherent_span(executor, span, device, report);
        }
    }

    /// Has every page of a span be there, and where it may be written be the
    /// process's own. It can be gone again at once, so nothing depends on it.
    fn populate(&self, span: PageRange, write: bool) {
        if write && self.space.unshare(span).is_ok() {
            return;
        }
        let mut from = span.start();
        while from < span.end() {
            let filled = match self.fill_hole_at(from) {
                Hole::Filled(pages) => pages,
                Hole::Again | Hole::None => 1,
            };
            from = from.plus_pages(filled);
        }
    }

    fn migrate_coherent_span(
        &self,
        executor: &mut Executor,
        span: PageRange,
        device: DeviceId,
        report: &mut MigrationReport,
    ) {
        let mut from = span.start();
        let mut waits = 0;
        while from < span.end() {
            let rest = PageRange::span(from, span.end());
            let departure = match self.depart_to(device) {
                Ok(departure) => departure,
                Err(reason) => {
                    report.stay(rest, reason);
                    return;
                }
            };
            let first = self.mark_run(rest, device);
            drop(departure);
            let stays = match first {
                First::There { pages: 0, .. } => StayReason::NoDeviceMemory,
                First::There { pages, already } => {
                    report.moved += PageCount::new(pages - already);
                    report.already += PageCount::new(already);
                    waits = 0;
                    from = from.plus_pages(pages);
                    continue;
                }
                First::Gone => StayReason::NotMapped,
                First::Discarded => StayReason::Discarded,
                First::Away | First::InFlight if waits == BUSY_LIMIT => StayReason::Busy,
                First::Away => {
                    waits += 1;
                    let page = rest.slice(0, 1);
                    match self.step_home(executor, rest, Home::ahead()).stuck {
                        Some((stuck, reason))
                            if stuck.overlaps(page) && reason != StayReason::Busy =>
                        {
                            reason
                        }
                        _ => continue,
                    }
                }
                First::InFlight => {
                    waits += 1;
                    self.wait_for_transition();
                    continue;
                }
            };
            report.stay(rest.slice(0, 1), stays);
            from = from.plus_pages(1);
        }
    }

    /// Notes on pages from the start of a range, up to the end of a block, that
    /// they are a device's. With the gate held for writing, so that nobody else
    /// counts on the same room.
    fn mark_run(&self, range: PageRange, device: DeviceId) -> First {
        let size = self.devices.slot(device).device.info().memory.whole_pages();
        let mut map = self.gate.write();
        let Some(piece) = map.find(range.start()) else {
            return First::Gone;
        };
        let in_use = map.count_coherent(device, range.pages().get(), size.get());
        let mut room = size.get() - in_use;
        let mut inner = map.block(piece.block).lock();
        match inner.state(piece.first) {
            state if state.in_flight() => return First::InFlight,
            state if state.is_away() => return First::Away,
            PageState::Discarded => return First::Discarded,
            _ => {}
        }
        let (mut pages, mut already) = (0, 0);
        for index in at_home(&inner, piece, range) {
            if inner.coherent(index) == Some(device) {
                already += 1;
            } else if room > 0 {
                room -= 1;
                inner.set_coherent(index, Some(device));
            } else {
                break;
            }
            pages += 1;
        }
        inner.last_use = self.next_use();
        if pages > already {
            let marked = PageRange::from_pages(range.start(), PageCount::new(pages));
            self.notifiers.lock().invalidate(marked);
        }
        drop(inner);
        map.note_coherent(device, size.get() - room);
        First::There { pages, already }
    }

    /// Brings pages back from coherent memory: all of the range, or those of one
    /// device. Returns how many there were.
    pub(crate) fn leave_coherent(&self, range: PageRange, only: Option<DeviceId>) -> PageCount {
        let mut pages = 0;
        let map = self.gate.read();
        for piece in map.overlapping(range) {
            let mut inner = map.block(piece.block).lock();
            if !inner.has_coherent() {
                continue;
            }
            let before = pages;
            for index in piece.first..piece.first + piece.pages {
                let leaves = match inner.coherent(index) {
                    Some(device) => only.is_none_or(|only| only == device),
                    None => false,
                };
                if leaves {
                    inner.set_coherent(index, None);
                    pages += 1;
                }
            }
            if pages > before {
                self.notifiers.lock().invalidate(piece.range());
            }
            inner.tidy();
        }
        PageCount::new(pages)
    }

    /// The same for all memory.
    pub(crate) fn leave_coherent_device(&self, device: DeviceId) {
        if self.is_coherent(device) {
            let first = VirtAddr::new(hmm_types::PAGE_SIZE);
            let everything = PageRange::span(first, VirtAddr::new(hmm_types::USER_END));
            self.leave_coherent(everything, Some(device));
        }
    }

    /// How many pages from the start of a range, within a block, are in this
    /// device's coherent memory.
    pub(crate) fn coherent_run(&self, range: PageRange, device: DeviceId) -> u64 {
        let map = self.gate.read();
        let Some(piece) = map.find(range.start()) else {
            return 0;
        };
        let inner = map.block(piece.block).lock();
        let run = at_home(&inner, piece, range);
        run.take_while(|&index| inner.coherent(index) == Some(device))
            .count() as u64
    }
}

/// Pages of a block from the start of a piece that rest with the CPU.
fn at_home(inner: &BlockInner, piece: Piece, range: PageRange) -> std::ops::Range<u32> {
    let most = u64::from(piece.pages).min(range.pages().get());
    let most = u32::try_from(most).unwrap_or(piece.pages);
    let pages = (piece.first..piece.first + most)
        .take_while(|&index| inner.state(index) == PageState::System)
        .count();
    piece.first..piece.first + u32::try_from(pages).unwrap_or(0)
}
