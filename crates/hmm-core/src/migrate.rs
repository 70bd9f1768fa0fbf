//! Requests: move a range, take pages for exclusive use, and say what became of
//! every page.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{Mapping, Presence};
use hmm_mem::Vec;
use hmm_types::{
    DeviceId, MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, PageResidency, StayReason,
    VirtAddr,
};

use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::Executor;
use crate::home::Home;
use crate::map::SpaceMap;
use crate::page::PageState;
use crate::report::{Destination, MigrationReport};
use crate::upload::{Fate, Passed, Target};

/// Pages that wait to be given back because nothing may use them again.
const SPENT_LIMIT: u64 = 2048;

impl Engine<'_> {
    /// Moves the pages of a range to a device or home, each if it can, and
    /// reports on every one of them. To make room on a device, pages outside
    /// of the range may be evicted; never pages of the range itself.
    pub fn migrate(
        &self,
        executor: &mut Executor,
        range: PageRange,
        to: Destination,
    ) -> MigrationReport {
        self.migrate_part(executor, range, range, self.moment(), to)
    }

    /// The same with one part of a request; others may carry out the other
    /// parts at the same time. Nothing of `whole` is evicted. What they have moved
    /// along since the request began ([`Engine::moment`]) counts as moved.
    pub fn migrate_part(
        &self,
        executor: &mut Executor,
        range: PageRange,
        whole: PageRange,
        since: u64,
        to: Destination,
    ) -> MigrationReport {
        let mut report = MigrationReport::new();
        match to {
            Destination::System => self.migrate_home(executor, range, since, &mut report),
            Destination::Device(device) => {
                self.migrate_to_device(executor, range, device, (whole, since), &mut report);
            }
        }
        self.trim_staging();
        debug_assert_eq!(
            report.total(),
            range.pages(),
            "a page was not reported, or twice"
        );
        report
    }

    fn migrate_home(
        &self,
        executor: &mut Executor,
        range: PageRange,
        since: u64,
        report: &mut MigrationReport,
    ) {
        let mut from = range.start();
        let mut rounds = 0;
        while from < range.end() {
            let rest = PageRange::span(from, range.end());
            let step = self.step_home(executor, rest, Home::request(since));
            if step.passed == 0 {
                // The next page is in flight.
                if rounds < self.patience_at(from) {
                    rounds += 1;
                    self.wait_for_transition();
                    continue;
                }
                report.stay(rest.slice(0, 1), StayReason::Busy);
                from = from.plus_pages(1);
            }
            rounds = 0;
            report.moved += PageCount::new(step.moved);
            if let Some((range, reason)) = step.stuck {
                report.stay(range, reason);
            }
            from = from.plus_pages(step.passed).min(range.end());
        }
        let settled = report.moved.plus(report.stayed_pages).get();
        let left = range.pages().get().saturating_sub(settled);
        // Others may have sent pages there that this request had brought home.
        let came = self.leave_coherent(range, None).get().min(left);
        report.moved += PageCount::new(came);
        report.already = PageCount::new(left - came);
    }

    /// Moves what can be moved of `range`, evicting nothing inside of `keep`, for a
    /// request that began at a moment.
    pub(crate) fn migrate_to_device(
        &self,
        executor: &mut Executor,
        range: PageRange,
        device: DeviceId,
        (keep, since): (PageRange, u64),
        report: &mut MigrationReport,
    ) {
        if self.is_closing() {
            report.stay(range, StayReason::Cancelled);
            return;
        }
        if self
            .devices
            .get(device)
            .is_none_or(|slot| slot.is_retired())
        {
            report.stay(range, StayReason::DeviceLost);
            return;
        }
        let mut next = range.start();
        let Some(mappings) = self.mappings_of(range) else {
            report.stay(range, StayReason::Limit);
            return;
        };
        for mapping in &mappings {
            if next < mapping.range.start() {
                report.stay(
                    PageRange::span(next, mapping.range.start()),
                    StayReason::NotMapped,
                );
            }
            next = mapping.range.end();
            match Self::immovable(mapping).or_else(|| self.watch_mapping(executor, mapping)) {
                Some(reason) => report.stay(mapping.range, reason),
                None if self.is_coherent(device) && mapping.huge_pages => {
                    report.stay(mapping.range, StayReason::HugeTlb);
                }
                None if self.is_coherent(device) => {
                    self.migrate_coherent(executor, mapping, device, report);
                }
                None => self.migrate_mapping(executor, mapping, device, (keep, since), report),
            }
        }
        if next < range.end() {
            report.stay(PageRange::span(next, range.end()), StayReason::NotMapped);
        }
    }

    pub(crate) fn mappings_of(&self, range: PageRange) -> Option<Vec<Mapping>> {
        let mut mappings: Vec<Mapping> = hmm_mem::vec();
        let mut next = range.start();
        self.space
            .mappings(range, &mut |mapping| {
                // The program may change mappings between two looks: each page
                // is taken as it was seen first.
                if mapping.range.end() > next {
                    let start = mapping.range.start().max(next);
                    next = mapping.range.end();
                    mappings.push(Mapping {
                        range: PageRange::span(start, next),
                        ..mapping
                    });
                }
            })
            .ok()?;
        Some(mappings)
    }

    /// Why nothing of a mapping can leave it.
    pub(crate) fn immovable(mapping: &Mapping) -> Option<StayReason> {
        if mapping.engine_owned {
            return Some(StayReason::EngineOwned);
        }
        if mapping.thread_memory {
            return Some(StayReason::ThreadMemory);
        }
        match mapping.kind {
            MemoryKind::PrivateAnonymous => {}
            MemoryKind::File => return Some(StayReason::FileBacked),
            MemoryKind::Shared if mapping.shared_region => {}
            MemoryKind::Shared => return Some(StayReason::Shared),
            MemoryKind::HugeTlb if mapping.huge_pages => {}
            MemoryKind::HugeTlb => return Some(StayReason::HugeTlb),
            _ => return Some(StayReason::Special),
        }
        (!mapping.permissions.read && !mapping.permissions.write).then_some(StayReason::NoAccess)
    }

    fn migrate_mapping(
        &self,
        executor: &mut Executor,
        mapping: &Mapping,
        device: DeviceId,
        (keep, since): (PageRange, u64),
        report: &mut MigrationReport,
    ) {
        let target = Target::of(device, mapping);
        if mapping.huge_pages && mapping.page_len > PageCount::from(PAGES_PER_BLOCK) {
            let asked = (keep, since);
            return self.migrate_gigantic_pages(executor, mapping, target, asked, report);
        }
        if mapping.huge_pages {
            return self.migrate_huge_pages(executor, mapping.range, target, keep, report);
        }
        for span in mapping.range.blocks() {
            self.migrate_span(executor, span, target, keep, report);
        }
    }

    /// Whether the whole span is one transparent huge page: if one page of it is a
    /// part of one, all are. To look at all would take as long as to move some.
    fn is_huge(&self, span: PageRange) -> bool {
        if span.pages().index() != PAGES_PER_BLOCK {
            return false;
        }
        let mut huge = false;
        let seen = self.space.presence(span.slice(0, 1), &mut |_, presence| {
            huge = presence == Presence::Present { huge: true };
        });
        seen.is_ok() && huge
    }

    /// Makes pages the program's again that the kernel may take at any moment:
    /// should it do so while they move, `UFFDIO_MOVE` never returns (see
    /// `docs/kernel-notes.md`). Once for each block; what is given back later is
    /// told of.
    fn keep_freed_pages(&self, span: PageRange) {
        let whole = span.pages().index() == PAGES_PER_BLOCK;
        // A block that lies where it was registered.
        let block_of = |map: &SpaceMap| {
            let piece = map.find(span.start())?;
            let at_home = piece.first == 0 && u64::from(piece.pages) == span.pages().get();
            at_home.then_some(piece.block)
        };
        if whole {
            let map = self.gate.read();
            if block_of(&map).is_some_and(|block| map.block(block).lock().kept) {
                return;
            }
        }
        let seen = self.space.presence(span, &mut |part, presence| {
            let there = matches!(presence, Presence::Present { .. });
            if !there || self.space.unshare(part).is_ok() {
                return;
            }
            // It ends at a page that the kernel has taken just now (or nothing can
            // be written here; then nothing was freed). That is a hole; the others
            // are not.
            for page in part.iter_pages() {
                let _ = self
                    .space
                    .unshare(PageRange::from_pages(page, PageCount::ONE));
            }
        });
        if whole && seen.is_ok() {
            let map = self.gate.read();
            if let Some(block) = block_of(&map) {
                map.block(block).lock().kept = true;
            }
        }
    }

    /// The first pages of a range up to the end of their mapping as it is now. What
    /// a page does not allow the next mapping may: pages that can be moved are
    /// not to be copied, which sees no pin.
    fn in_one_mapping(&self, range: PageRange) -> PageRange {
        let mut first = range.slice(0, 1);
        let looked = self.space.mappings(range, &mut |mapping| {
            if mapping.range.contains(range.start())
                && let Some(here) = mapping.range.intersection(range)
            {
                first = here;
            }
        });
        debug_assert!(first.start() == range.start() || looked.is_err());
        first
    }

    /// Moves what can be moved of a span, which lies within 2 MiB.
    fn migrate_span(
        &self,
        executor: &mut Executor,
        span: PageRange,
        target: Target,
        keep: PageRange,
        report: &mut MigrationReport,
    ) {
        if !target.by_copy && self.space.may_have_freed_pages() {
            self.keep_freed_pages(span);
        }
        let huge = self.is_huge(span);
        let mut from = span.start();
        let mut busy = 0;
        let mut full = false;
        let mut unshared = span.start();
        while from < span.end() {
            let rest = PageRange::span(from, span.end());
            let departure = match self.depart_to(target.device) {
                Ok(departure) => departure,
                Err(reason) => {
                    report.stay(rest, reason);
                    return;
                }
            };
            let mut passed = if target.by_copy {
                self.passes_over(rest, target.device)
                    .unwrap_or(Passed::new(rest.pages().get(), Fate::CopyInstead))
            } else {
                self.step_to_device(executor, rest, target, huge)
            };
            if let Fate::CopyInstead = passed.fate {
                let alike = self.in_one_mapping(rest);
                passed = match self.space.explain_refusal(alike.slice(0, 1)) {
                    Some(reason) => Passed::new(alike.pages().get(), Fate::Stayed(reason)),
                    None => self.step_by_copy(executor, alike, target, false),
                };
            }
            if let Fate::Elsewhere(on) = passed.fate {
                let there = rest.slice(0, passed.pages);
                passed = self.step_between_devices(executor, there, on, target);
                if passed.fate == Fate::Busy {
                    // In staging, or gone home meanwhile.
                    self.step_home(executor, there.slice(0, 1), Home::ahead());
                }
            }
            drop(departure);
            let part = rest.slice(0, passed.pages.min(rest.pages().get()));
            let stays = match passed.fate {
                Fate::Moved { zeroed, huge } => {
                    report.moved += part.pages();
                    report.zeroed += PageCount::new(zeroed);
                    if huge {
                        report.huge += part.pages();
                    }
                    busy = 0;
                    full = false;
                    None
                }
                Fate::Already => {
                    report.already += part.pages();
                    None
                }
                Fate::Busy | Fate::Elsewhere(_) | Fate::CopyInstead if busy < BUSY_LIMIT => {
                    busy += 1;
                    self.wait_for_transition();
                    continue;
                }
                Fate::Busy | Fate::Elsewhere(_) | Fate::CopyInstead => Some(StayReason::Busy),
                Fate::Refused if from >= unshared => {
                    let shared = rest.slice(0, self.system_run(rest).max(1));
                    unshared = shared.end();
                    if self.space.unshare(shared).is_ok() {
                        continue;
                    }
                    // Perhaps one page of many stands in the way.
                    unshared = from.plus_pages(1);
                    if self.space.unshare(rest.slice(0, 1)).is_ok() {
                        continue;
                    }
                    Some(StayReason::SharedCow)
                }
                Fate::Refused => Some(StayReason::Pinned),
                Fate::Stayed(StayReason::NoDeviceMemory) if !full => {
                    if self.make_room(executor, target.device, keep) {
                        continue;
                    }
                    // Once more: others may have made room meanwhile.
                    full = true;
                    continue;
                }
                Fate::Stayed(reason) => Some(reason),
            };
            if let Some(reason) = stays {
                report.stay(part, reason);
            }
            from = part.end();
        }
    }

    /// Pages from the start of a range that rest in system memory.
    fn system_run(&self, range: PageRange) -> u64 {
        let map = self.gate.read();
        let Some(piece) = map.find(range.start()) else {
            return 0;
        };
        let inner = map.block(piece.block).lock();
        let most = u64::from(piece.pages).min(range.pages().get());
        let run = (piece.first..)
            .take(PageCount::new(most).index())
            .take_while(|&index| inner.state(index) == PageState::System)
            .count();
        run as u64
    }

    /// Takes pages from the CPU for a device: they stay in system memory, but
    /// only the device can reach them, so its atomics are atomic. A CPU touch
    /// takes a page back. Pages that the device has in its own memory are
    /// exclusive already.
    pub fn exclusive(
        &self,
        executor: &mut Executor,
        range: PageRange,
        device: DeviceId,
    ) -> MigrationReport {
        let mut report = MigrationReport::new();
        let usable = self
            .devices
            .get(device)
            .is_some_and(|slot| !slot.is_retired() && slot.device.info().system_memory);
        if self.is_closing() {
            report.stay(range, StayReason::Cancelled);
            return report;
        }
        if !usable {
            report.stay(range, StayReason::DeviceLost);
            return report;
        }
        let Some(mappings) = self.mappings_of(range) else {
            report.stay(range, StayReason::Limit);
            return report;
        };
        let mut next = range.start();
        for mapping in &mappings {
            if next < mapping.range.start() {
                report.stay(
                    PageRange::span(next, mapping.range.start()),
                    StayReason::NotMapped,
                );
            }
            next = mapping.range.end();
            let reason = Self::immovable(mapping)
                .or(mapping.huge_pages.then_some(StayReason::HugeTlb))
                .or(mapping.shared_region.then_some(StayReason::Shared))
                .or((!mapping.permissions.write).then_some(StayReason::NoAccess))
                .or_else(|| self.watch_mapping(executor, mapping));
            if let Some(reason) = reason {
                report.stay(mapping.range, reason);
                continue;
            }
            for page in mapping.range.iter_pages() {
                let page = PageRange::from_pages(page, PageCount::ONE);
                self.exclude_page(executor, page, device, &mut report);
            }
        }
        if next < range.end() {
            report.stay(PageRange::span(next, range.end()), StayReason::NotMapped);
        }
        report
    }

    fn exclude_page(
        &self,
        executor: &mut Executor,
        page: PageRange,
        device: DeviceId,
        report: &mut MigrationReport,
    ) {
        let mut refused = false;
        for attempt in 0..=BUSY_LIMIT {
            let departure = match self.depart_to(device) {
                Ok(departure) => departure,
                Err(reason) => {
                    report.stay(page, reason);
                    return;
                }
            };
            let fate = self.stage_page(page, device);
            drop(departure);
            match fate {
                Fate::Moved { .. } => {
                    self.stats.exclusive_pages.fetch_add(1, Relaxed);
                    report.moved += PageCount::ONE;
                    return;
                }
                Fate::Already => {
                    report.already += PageCount::ONE;
                    return;
                }
                Fate::Busy => {
                    self.wait_for_events(executor, attempt);
                }
                Fate::Elsewhere(_) => {
                    self.step_home(executor, page, Home::ahead());
                }
                Fate::Refused | Fate::CopyInstead if !refused => {
                    // Also makes a hole a page: there must be one to share out.
                    refused = true;
                    if self.space.unshare(page).is_err() {
                        report.stay(page, StayReason::SharedCow);
                        return;
                    }
                }
                Fate::Refused => {
                    report.stay(page, StayReason::Pinned);
                    return;
                }
                Fate::CopyInstead => {
                    let reason = self.space.explain_refusal(page);
                    report.stay(page, reason.unwrap_or(StayReason::Limit));
                    return;
                }
                Fate::Stayed(reason) => {
                    report.stay(page, reason);
                    return;
                }
            }
        }
        report.stay(page, StayReason::Busy);
    }

    /// What is where: one entry for each page of the range, in order.
    #[must_use]
    pub fn residency(&self, range: PageRange) -> Vec<PageResidency> {
        let mut pages = hmm_mem::vec_with_capacity(range.pages().index());
        pages.resize(range.pages().index(), PageResidency::System);
        let map = self.gate.read();
        for piece in map.overlapping(range) {
            let inner = map.block(piece.block).lock();
            if inner.away() == 0 && inner.in_flight() == 0 && !inner.has_coherent() {
                continue;
            }
            let skip = PageCount::new(piece.start.pages_since(range.start())).index();
            for (index, page) in (piece.first..piece.first + piece.pages).zip(&mut pages[skip..]) {
                *page = match inner.state(index) {
                    PageState::System | PageState::Discarded => inner
                        .coherent(index)
                        .map_or(PageResidency::System, PageResidency::Coherent),
                    PageState::Device { device, .. } => PageResidency::Device(device),
                    PageState::Staged { device, .. } => PageResidency::Exclusive(device),
                    _ => PageResidency::InFlight,
                };
            }
        }
        pages
    }

    /// Gives staging memory beyond the limit back to the kernel, and what is not
    /// used again: that in bulk, as each time is a call and an event.
    pub fn trim_staging(&self) {
        let limit = self.settings.staging_limit.whole_pages().get();
        let is_full = || {
            let staging = self.staging.lock();
            staging.populated_pages() > limit || staging.spent_pages() > SPENT_LIMIT
        };
        while is_full() {
            if !self.trim_slot(None) {
                return;
            }
        }
    }

    /// Has fresh pages ready for pages that come home: with none ready they
    /// come by copying, which is slower. Not for threads that read events.
    pub fn provision_staging(&self, ready: PageCount) {
        use crate::staging::SlotKind::Small;
        for _ in 0..ready.index().div_ceil(PAGES_PER_BLOCK) {
            let mut staging = self.staging.lock();
            if staging.ready_pages(Small) >= ready.get() {
                return;
            }
            let Some((run, slot)) = staging.take_for_provision(Small) else {
                return;
            };
            drop(staging);
            hmm_sync::assert_none_held();
            let filled = self.space.provision(slot);
            self.staging.lock().put_run(run, filled);
            if !filled {
                return;
            }
        }
    }

    /// Where an address lies for a device: the mapping of its page.
    pub(crate) fn mapping_at(&self, address: VirtAddr) -> Option<Mapping> {
        let page = PageRange::page_of(address).ok()?;
        let mut found = None;
        self.space
            .mappings(page, &mut |mapping| found = Some(mapping))
            .ok()?;
        found
    }
}
