//! From a device to system memory.
//!
//! One *step* brings one run of neighbouring pages home:
//! 1. claim (gate, block): states become `Downloading`, the device's mapping
//!    goes;
//! 2. copy, no lock held: frames into recycled staging pages, or into bounce
//!    memory when few pages come;
//! 3. place and commit (gate, block): the staging pages are moved into the
//!    program (or the bounce pages copied), the frames freed, waiters woken.
//!
//! Until step 3 the frames own the data. Whatever fails before leaves the page
//! on the device; whatever the program removes meanwhile is dropped in step 3.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, Progress, SpaceId, Stop, Transfer};
use hmm_types::{
    BLOCK_PAGES, DeviceId, FrameId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, StayReason,
    VirtAddr,
};

use crate::engine::{COPY_LIMIT, Engine};
use crate::executor::{BOUNCE_PAGES, Executor, QueuedFault};
use crate::map::{BlockId, BlockInner};
use crate::page::PageState;
use crate::staging::{SlotKind, StagingPage, StagingRun};

/// How often a huge page that the kernel has no memory for is tried at a time.
const NO_PAGE_LIMIT: u32 = 64;
/// Pages that a device may leave in the processor's caches.
const CACHED: u32 = 32;
/// Transfers handed to a device at a time.
pub(crate) const TRANSFERS: usize = 32;

/// What one step did with the pages it was given, counted from the first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Step {
    /// Pages dealt with, one way or another.
    pub(crate) passed: u64,
    /// Pages that came home.
    pub(crate) moved: u64,
    /// Pages that are in flight elsewhere.
    pub(crate) busy: u64,
    /// Pages that could not come, and why.
    pub(crate) stuck: Option<(PageRange, StayReason)>,
}

impl Step {
    /// Pages could not come. One range is told: of several, the last.
    pub(crate) fn stays(&mut self, range: PageRange, reason: StayReason) {
        self.stuck = Some(match self.stuck {
            Some((stuck, reason)) if stuck.end() == range.start() => {
                (PageRange::span(stuck.start(), range.end()), reason)
            }
            _ => (range, reason),
        });
    }
}

/// How a step is to be done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home {
    /// Only pages on this device.
    pub(crate) only: Option<DeviceId>,
    /// What of it is poisoned if it cannot be read from its device any more.
    pub(crate) poisons: Poisons,
    /// End before a page that is in flight, so that the caller can wait for it.
    pub(crate) stops_at_flights: bool,
    /// Nothing of blocks of which this is true.
    pub(crate) unless: Since,
    /// Nothing of pages of several blocks.
    spares_gigantic: bool,
    /// What has come along with something else since counts as having come.
    pub(crate) since: u64,
}

impl Home {
    /// Whatever can come, passing over pages in flight.
    pub(crate) const fn ahead() -> Self {
        Self {
            only: None,
            poisons: Poisons::Nothing,
            stops_at_flights: false,
            unless: Since::Never,
            spares_gigantic: false,
            since: u64::MAX,
        }
    }

    /// As planned at a time (see [`Engine::uses_now`]): what a device has used
    /// since is wanted there.
    pub(crate) const fn planned(at: u64) -> Self {
        Self {
            unless: Since::Used(at),
            spares_gigantic: true,
            ..Self::ahead()
        }
    }

    /// For a CPU thread that waited for this page at a time. If pages have left
    /// since, it may have had it already, and sent it off again: if it has not,
    /// it has to ask again.
    pub(crate) const fn demanded(page: VirtAddr, at: u64) -> Self {
        Self {
            poisons: Poisons::Page(page),
            unless: Since::Left(at),
            ..Self::ahead()
        }
    }

    /// Nothing may stay away.
    pub(crate) const fn whatever_it_takes() -> Self {
        Self {
            poisons: Poisons::Everything,
            ..Self::ahead()
        }
    }

    /// For a request, which accounts for every page.
    pub(crate) const fn request(since: u64) -> Self {
        Self {
            stops_at_flights: true,
            since,
            ..Self::ahead()
        }
    }

    /// Whether what a device cannot give is not left there.
    pub(crate) const fn leaves_nothing(self) -> bool {
        matches!(self.poisons, Poisons::Everything)
    }

    /// Only pages on one device, if one is given.
    pub(crate) const fn only(self, only: Option<DeviceId>) -> Self {
        Self { only, ..self }
    }
}

/// What a device has done with a block's pages at a time or later.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Since {
    Never,
    /// Asked for one.
    Used(u64),
    /// Got one.
    Left(u64),
}

impl Since {
    pub(crate) const fn is_true_of(self, block: &BlockInner) -> bool {
        match self {
            Self::Never => false,
            Self::Used(at) => block.last_use >= at,
            Self::Left(at) => block.last_departure >= at,
        }
    }
}

/// Pages that somebody cannot do without: if a device cannot give them they are
/// lost, and touching them raises SIGBUS. Others stay on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Poisons {
    Nothing,
    /// A CPU thread waits for this page.
    Page(VirtAddr),
    Everything,
}

impl Poisons {
    pub(crate) fn includes_any(self, range: PageRange) -> bool {
        match self {
            Self::Nothing => false,
            Self::Page(one) => range.contains(one),
            Self::Everything => true,
        }
    }

    fn includes(self, page: VirtAddr) -> bool {
        match self {
            Self::Nothing => false,
            Self::Page(one) => one == page,
            Self::Everything => true,
        }
    }
}

/// Pages of a block whose states are `Downloading`, owned by the step.
pub(crate) struct Claim<'a> {
    block: BlockId,
    pub(crate) first: u32,
    pub(crate) pages: u32,
    pub(crate) device: DeviceId,
    frames: &'a [FrameId],
    huge: bool,
    /// Pages of a huge page of hugetlbfs that the caller has asked about; all of
    /// it comes.
    pub(crate) part_of_hugetlb: Option<u32>,
}

impl Claim<'_> {
    /// The frames of pages `from..from + pages` as runs, each with the index of
    /// its first page counted from `from`.
    pub(crate) fn runs(&self, from: u32, pages: u32) -> impl Iterator<Item = (u32, FrameRange)> {
        let frames = &self.frames[from as usize..(from + pages) as usize];
        let mut next = 0u32;
        std::iter::from_fn(move || {
            let start = next;
            let first = frames.get(start as usize)?;
            next += 1;
            while frames
                .get(next as usize)
                .is_some_and(|frame| frame.get() == first.get() + (next - start))
            {
                next += 1;
            }
            Some((start, FrameRange::new(*first, next - start)))
        })
    }
}

/// Host memory that a step copies into.
#[derive(Clone, Copy)]
enum Landing {
    Staging(StagingRun, VirtAddr),
    Bounce(VirtAddr, u32),
}

impl Landing {
    const fn pages(&self) -> u32 {
        match self {
            Self::Staging(run, _) => run.pages,
            Self::Bounce(_, pages) => *pages,
        }
    }

    const fn address(&self, page: u32) -> VirtAddr {
        match self {
            Self::Staging(_, start) | Self::Bounce(start, _) => start.plus_pages(page as u64),
        }
    }

    const fn is_bounce(&self) -> bool {
        matches!(self, Self::Bounce(..))
    }

    fn staging_page(&self, page: u32) -> Option<StagingPage> {
        match self {
            Self::Staging(run, _) => Some(run.first.plus(page)),
            Self::Bounce(..) => None,
        }
    }
}

impl Engine<'_> {
    /// Brings the page of a fault home, whatever it takes, and the rest of the
    /// window around it unless a device has used it since the fault: before the
    /// page if that is little, else after it. True when the page surely came, so
    /// that who waits for it was woken.
    pub(crate) fn bring_demanded(
        &self,
        executor: &mut Executor,
        fault: QueuedFault,
        window: PageRange,
    ) -> bool {
        let page = fault.address.page_floor();
        let around = Home::planned(fault.read_at);
        let huge = window.pages().index() == PAGES_PER_BLOCK && window.start().is_block_aligned();
        let start = if huge || window.pages().get() <= BOUNCE_PAGES {
            window.start()
        } else {
            page
        };
        let mut from = start;
        let mut came = false;
        while from < window.end() {
            let rest = PageRange::span(from, window.end());
            let step = self.step_home(executor, rest, around);
            let next = from.plus_pages(step.passed.max(1));
            came |= (from..next).contains(&page) && step.moved == step.passed;
            from = next;
        }
        if !came {
            // Alone: what cannot be read now is lost.
            let alone = PageRange::from_pages(page, PageCount::ONE);
            came = self
                .step_home(executor, alone, Home::demanded(page, fault.read_at))
                .moved
                > 0;
        }
        if window.start() < start {
            let before = PageRange::span(window.start(), start);
            self.bring_ahead(executor, before, around);
        }
        came
    }

    /// Brings home what is away in a range; pages in flight are left alone.
    /// Returns the number of pages that came.
    pub(crate) fn bring_ahead(&self, executor: &mut Executor, range: PageRange, home: Home) -> u64 {
        let mut from = range.start();
        let mut moved = 0;
        while from < range.end() {
            let step = self.step_home(executor, PageRange::span(from, range.end()), home);
            from = from.plus_pages(step.passed.max(1));
            moved += step.moved;
        }
        moved
    }

    /// One step with the first run of away pages in `range`.
    pub(crate) fn step_home(&self, executor: &mut Executor, range: PageRange, home: Home) -> Step {
        let mut step = Step::default();
        let mut attempt = 0;
        let mut frames = [FrameId::new(0); PAGES_PER_BLOCK];
        let claim = loop {
            match self.claim_home(executor, range, home, &mut step, &mut frames) {
                Claimed::Nothing => return step,
                Claimed::Gigantic {
                    asked,
                    page_len,
                    waits,
                } => {
                    let what = (asked, page_len, waits);
                    self.bring_gigantic_home(executor, range, home, what, &mut step);
                    return step;
                }
                Claimed::Again => {
                    if !self.wait_for_events(executor, attempt) {
                        step.passed = step.passed.max(1);
                        step.stuck = Some((range.slice(0, 1), StayReason::Busy));
                        return step;
                    }
                    attempt += 1;
                    step = Step::default();
                }
                Claimed::Came { pages, to_wake } => {
                    if let Some(place) = to_wake {
                        self.space.wake(SpaceId::OWN, place);
                    }
                    step.passed += pages;
                    step.moved = pages;
                    self.stats.pages_to_system.fetch_add(pages, Relaxed);
                    self.transition_ended();
                    return step;
                }
                Claimed::Pages(claim) => break claim,
            }
        };
        let room = claim.part_of_hugetlb.and_then(|_| self.rooms.take());
        let mut done = 0;
        while done < claim.pages {
            let landing = match &room {
                Some(room) => Landing::Bounce(room.start(), claim.pages),
                None if claim.part_of_hugetlb.is_some() => {
                    // All rooms are taken: another time.
                    self.settle_home(&claim, 0, claim.pages);
                    step.busy += u64::from(claim.pages);
                    break;
                }
                None => self.landing(executor, &claim, claim.pages - done),
            };
            match self.copy_home(&claim, done, landing) {
                Ok(()) => {
                    let (moved, given_up) = self.commit_home(executor, &claim, done, landing);
                    step.moved += moved;
                    if let Some((pages, reason)) = given_up {
                        let end = done + landing.pages();
                        let (from, pages) = match claim.part_of_hugetlb {
                            Some(asked) => (0, asked),
                            None => (end - pages, pages),
                        };
                        let first = step.passed + u64::from(from);
                        step.stays(range.slice(first, u64::from(pages)), reason);
                    }
                }
                Err(error) => {
                    let rests = self.copy_home_failed(
                        &claim,
                        done,
                        landing,
                        error,
                        home.poisons,
                        &mut step,
                    );
                    if let (Some(asked), true) = (claim.part_of_hugetlb, rests) {
                        let asked = range.slice(step.passed, u64::from(asked));
                        step.stays(asked, reason_of(error));
                    }
                }
            }
            done += landing.pages();
        }
        self.stats.pages_to_system.fetch_add(step.moved, Relaxed);
        step.passed += u64::from(claim.part_of_hugetlb.unwrap_or(claim.pages));
        if let Some(asked) = claim.part_of_hugetlb {
            if step.moved == u64::from(claim.pages) {
                self.stats.huge_pages.fetch_add(step.moved, Relaxed);
            }
            step.moved = step.moved.min(asked.into());
        }
        self.transition_ended();
        step
    }

    /// Finds the first run of pages that are away and claims it, unless it can come
    /// at once.
    fn claim_home<'a>(
        &self,
        executor: &Executor,
        range: PageRange,
        home: Home,
        step: &mut Step,
        frames: &'a mut [FrameId; PAGES_PER_BLOCK],
    ) -> Claimed<'a> {
        let map = self.gate.read();
        // One block a step: its lock is held while states are looked through.
        let Some(piece) = map.overlapping(range).next() else {
            step.passed = range.pages().get();
            return Claimed::Nothing;
        };
        step.passed = piece.start.pages_since(range.start());
        let block = map.block(piece.block);
        let asked = piece.pages;
        if block.is_gigantic() {
            let inner = block.lock();
            let at_home = inner.away() == 0 && inner.in_flight() == 0;
            if at_home || home.spares_gigantic || home.unless.is_true_of(&inner) {
                step.passed += u64::from(asked);
                if at_home && inner.last_arrival >= home.since {
                    step.moved += u64::from(asked);
                }
                return Claimed::Nothing;
            }
            let page_len = block.page_len();
            let waits = self.clock.now_ns() < inner.dry_until_ns;
            return Claimed::Gigantic {
                asked,
                page_len,
                waits,
            };
        }
        let piece = map.undivided(piece);
        let mut inner = block.lock();
        let inner = &mut *inner;
        let wanted = |state| match state {
            PageState::Device { device, .. } | PageState::Staged { device, .. } => {
                home.only.is_none_or(|only| only == device)
            }
            _ => false,
        };
        let nothing_away = inner.away() == 0 && inner.in_flight() == 0;
        if nothing_away || home.unless.is_true_of(inner) {
            step.passed += u64::from(asked);
            return Claimed::Nothing;
        }
        let whole = |index| match inner.state(index) {
            PageState::Device { device, .. } => {
                matches!(inner.state(0), PageState::Device { device: on, .. } if on == device)
                    && wanted(inner.state(index))
            }
            _ => false,
        };
        if block.is_hugetlb() && !(0..BLOCK_PAGES).all(whole) {
            // One of its pages gets a frame of its own just now, or all are on
            // their way.
            if inner.in_flight() == 0 {
                step.passed += u64::from(asked);
            } else if !home.stops_at_flights {
                step.busy += u64::from(asked);
                step.passed += u64::from(asked);
            }
            return Claimed::Nothing;
        }
        let end = piece.first + piece.pages;
        let mut index = piece.first;
        while index < end && !wanted(inner.state(index)) {
            if home.stops_at_flights && inner.state(index).in_flight() {
                return Claimed::Nothing;
            }
            step.busy += u64::from(inner.state(index).in_flight());
            step.passed += 1;
            index += 1;
        }
        if index == end {
            return Claimed::Nothing;
        }
        let place = piece
            .range()
            .slice(u64::from(index - piece.first), u64::from(end - index));
        if let PageState::Staged { page, .. } = inner.state(index) {
            return self.unstage(inner, index, place.slice(0, 1), page, step);
        }
        let PageState::Device { device, .. } = inner.state(index) else {
            unreachable!("only pages that are away are wanted");
        };
        let first = index;
        let huge = inner.huge && first == 0 && end == BLOCK_PAGES;
        let huge = huge && place.start().is_block_aligned() && !block.is_hugetlb();
        let mut pages = 0;
        for slot in frames.iter_mut().take((end - first) as usize) {
            match inner.state(first + pages) {
                PageState::Device { device: on, frame } if on == device => *slot = frame,
                _ => break,
            }
            pages += 1;
        }
        let claim = Claim {
            block: piece.block,
            first,
            pages,
            device,
            frames: &frames[..pages as usize],
            huge: huge && pages == BLOCK_PAGES,
            part_of_hugetlb: block.is_hugetlb().then_some(asked),
        };
        let place = place.slice(0, u64::from(pages));
        self.notifiers.lock().invalidate(place);
        self.devices.slot(device).device.unmap(place);
        if let Some(came) = self.bring_at_once(executor, inner, &claim, place) {
            return came;
        }
        for (index, &frame) in (first..).zip(claim.frames) {
            inner.set(index, PageState::Downloading { device, frame });
        }
        Claimed::Pages(claim)
    }

    /// Where to copy the next pages of a claim.
    fn landing(&self, executor: &Executor, claim: &Claim<'_>, pages: u32) -> Landing {
        if self.capabilities.move_pages && u64::from(pages) > self.settings.copy_at_most.get() {
            let mut staging = self.staging.lock();
            let kinds: &[SlotKind] = if claim.huge && pages == claim.pages {
                &[SlotKind::Huge, SlotKind::Small]
            } else {
                &[SlotKind::Small]
            };
            for &kind in kinds {
                if let Some(run) = staging.take_ready(kind, pages) {
                    if claim.huge {
                        let counter = match kind {
                            SlotKind::Huge => &self.stats.huge_pages,
                            SlotKind::Small => &self.stats.huge_pages_lost,
                        };
                        counter.fetch_add(u64::from(run.pages), Relaxed);
                    }
                    return Landing::Staging(run, staging.address(run.first));
                }
            }
            self.stats.staging_dry.fetch_add(1, Relaxed);
        }
        let pages = u64::from(pages).min(BOUNCE_PAGES);
        let bounce = executor.bounce(pages);
        match u32::try_from(pages) {
            Ok(pages) => Landing::Bounce(bounce.start(), pages),
            Err(_) => unreachable!("bounce memory is a few pages"),
        }
    }

    fn copy_home(&self, claim: &Claim<'_>, from: u32, landing: Landing) -> Result<(), DeviceError> {
        hmm_sync::assert_none_held();
        if claim.part_of_hugetlb.is_none() {
            return self.copy_pages_home(claim, from, landing, 0..landing.pages());
        }
        // The kernel is about to read it all once more: a little at a time stays
        // in the caches.
        for first in (0..landing.pages()).step_by(CACHED as usize) {
            let upto = (first + CACHED).min(landing.pages());
            self.copy_pages_home(claim, from, landing, first..upto)?;
        }
        Ok(())
    }

    /// Copies some of the pages of a landing.
    fn copy_pages_home(
        &self,
        claim: &Claim<'_>,
        from: u32,
        landing: Landing,
        pages: std::ops::Range<u32>,
    ) -> Result<(), DeviceError> {
        let device = self.devices.slot(claim.device).device;
        let mut result = Ok(());
        for _ in 0..COPY_LIMIT {
            let runs = claim.runs(from + pages.start, pages.end - pages.start);
            let transfers = runs.map(|(page, frames)| Transfer::ToHost {
                frames,
                host: landing.address(pages.start + page),
            });
            result = run_transfers(device, transfers);
            match result {
                Ok(()) | Err(DeviceError::Lost) => break,
                Err(_) => {
                    self.stats.copy_failures.fetch_add(1, Relaxed);
                }
            }
        }
        result
    }

    /// Puts copied pages in place. Returns how many are home, and how many of the
    /// last ones rest on the device because the way was blocked too often, and by
    /// what. Others were removed by the program.
    fn commit_home(
        &self,
        executor: &mut Executor,
        claim: &Claim<'_>,
        from: u32,
        landing: Landing,
    ) -> (u64, Option<(u32, StayReason)>) {
        let mut moved = 0;
        let mut given_up = None;
        let mut offset = 0;
        let mut attempt = 0;
        let wakes = executor.is_alone();
        while offset < landing.pages() {
            let (placed, stop) = self.place_home(claim, from, landing, &mut offset, wakes);
            if let Some(placed) = placed {
                moved += placed.pages().get();
                // If that can be done without another call, it has been.
                if !(wakes && landing.is_bounce()) {
                    self.space.wake(SpaceId::OWN, placed);
                }
            }
            match stop {
                None => {}
                // Exit of the process: nobody will look at the page again.
                Some(Stop::Gone) => {
                    self.give_up(claim, from, landing, &mut offset);
                }
                Some(stop) => {
                    // A pool of huge pages that is empty may stay so for long.
                    let hopeless = stop == Stop::NoMemory
                        && claim.part_of_hugetlb.is_some()
                        && attempt >= NO_PAGE_LIMIT;
                    if hopeless || !self.wait_for_events(executor, attempt) {
                        let reason = match stop {
                            Stop::NoMemory => StayReason::NoSystemMemory,
                            _ => StayReason::Busy,
                        };
                        given_up = Some((landing.pages() - offset, reason));
                        self.give_up(claim, from, landing, &mut offset);
                    }
                    attempt += 1;
                }
            }
        }
        (moved, given_up)
    }

    /// Places the next run that lies together: what was placed, to be woken
    /// now that no lock is held, and why it must be tried again, if it must.
    fn place_home(
        &self,
        claim: &Claim<'_>,
        from: u32,
        landing: Landing,
        offset: &mut u32,
        wakes: bool,
    ) -> (Option<PageRange>, Option<Stop>) {
        let map = self.gate.read();
        let block = map.block(claim.block);
        let mut inner = block.lock();
        let index = claim.first + from + *offset;
        let left = landing.pages() - *offset;
        if inner.entry(index).doomed() {
            self.drop_claimed(
                &mut inner,
                claim,
                from,
                landing,
                *offset,
                block.place_of(index, 1),
            );
            *offset += 1;
            return (None, None);
        }
        let sound = (0..left)
            .take_while(|&page| !inner.entry(index + page).doomed())
            .count();
        let Some(place) = block.place_of(index, u32::try_from(sound).unwrap_or(left)) else {
            unreachable!("a page that is not doomed is mapped somewhere");
        };
        let host = landing.address(*offset);
        let (progress, emptied) = self.place_pages(host, place, landing, wakes);
        let placed = u32::try_from(progress.done.get()).unwrap_or(0);
        for (_, frames) in claim.runs(from + *offset, placed) {
            self.devices.slot(claim.device).free(frames);
        }
        inner.protected &= placed == 0;
        for page in 0..placed {
            inner.set(index + page, PageState::System);
        }
        if let Landing::Staging(run, _) = landing {
            let mut staging = self.staging.lock();
            for page in *offset..*offset + placed {
                staging.put(run.first.plus(page), !emptied);
            }
        }
        *offset += placed;
        if progress.stop == Some(Stop::Exists) {
            let (at, index) = (place.slice(u64::from(placed), 1), index + placed);
            assert!(
                self.is_guarded(at),
                "there is a page at {at} already, where one comes home"
            );
            self.drop_claimed(&mut inner, claim, from, landing, *offset, Some(at));
            inner.set(index, PageState::System);
            *offset += 1;
            let placed = (placed > 0).then(|| place.slice(0, u64::from(placed)));
            return (placed, None);
        }
        inner.tidy();
        let placed = (placed > 0).then(|| place.slice(0, u64::from(placed)));
        (placed, progress.stop)
    }

    /// Moves staging pages in, or copies where the mapping does not let pages
    /// move or the pages are bounce memory: those wake who waits, if `wakes`. True
    /// when the sources are gone.
    fn place_pages(
        &self,
        host: VirtAddr,
        place: PageRange,
        landing: Landing,
        wakes: bool,
    ) -> (Progress, bool) {
        if landing.is_bounce() {
            let progress = if wakes {
                self.space.copy_pages_and_wake(SpaceId::OWN, host, place)
            } else {
                self.space.copy_pages(SpaceId::OWN, host, place)
            };
            return (progress, false);
        }
        let source = PageRange::from_pages(host, place.pages());
        let progress = self.space.move_pages(source, place.start());
        let movable = !matches!(progress.stop, Some(Stop::Incompatible | Stop::Busy));
        if progress.done > PageCount::ZERO || movable {
            return (progress, true);
        }
        (self.space.copy_pages(SpaceId::OWN, host, place), false)
    }

    fn free_claimed(&self, claim: &Claim<'_>, page: u32) {
        let frame = claim.frames[page as usize];
        self.devices
            .slot(claim.device)
            .free(FrameRange::new(frame, 1));
    }

    /// A page that the program removed while it was on its way.
    fn drop_claimed(
        &self,
        inner: &mut BlockInner,
        claim: &Claim<'_>,
        from: u32,
        landing: Landing,
        offset: u32,
        place: Option<PageRange>,
    ) {
        let index = claim.first + from + offset;
        let parked = inner.entry(index).parked();
        self.free_claimed(claim, from + offset);
        inner.set(
            index,
            if place.is_some() {
                PageState::Discarded
            } else {
                PageState::System
            },
        );
        if let Some(staging) = landing.staging_page(offset) {
            self.staging.lock().put(staging, true);
        }
        if let (true, Some(place)) = (parked, place) {
            self.space.wake(SpaceId::OWN, place);
        }
        inner.tidy();
    }

    /// Gives the rest of a landing up: the pages rest on the device.
    fn give_up(&self, claim: &Claim<'_>, from: u32, landing: Landing, offset: &mut u32) {
        self.settle_home(claim, from + *offset, landing.pages() - *offset);
        while *offset < landing.pages() {
            if let Some(staging) = landing.staging_page(*offset) {
                self.staging.lock().put(staging, true);
            }
            *offset += 1;
        }
    }

    /// Pages of a claim rest on the device.
    fn settle_home(&self, claim: &Claim<'_>, from: u32, pages: u32) {
        let map = self.gate.read();
        let block = map.block(claim.block);
        let mut inner = block.lock();
        for page in from..from + pages {
            let place = block.place_of(claim.first + page, 1);
            self.settle_page(&mut inner, claim, page, place);
        }
    }

    /// One page back to rest on its device, unless the program removed it.
    fn settle_page(
        &self,
        inner: &mut BlockInner,
        claim: &Claim<'_>,
        page: u32,
        place: Option<PageRange>,
    ) {
        let index = claim.first + page;
        let entry = inner.entry(index);
        if entry.doomed() {
            self.free_claimed(claim, page);
            inner.set(
                index,
                if place.is_some() {
                    PageState::Discarded
                } else {
                    PageState::System
                },
            );
        } else {
            inner.set(
                index,
                PageState::Device {
                    device: claim.device,
                    frame: claim.frames[page as usize],
                },
            );
        }
        if let (true, Some(place)) = (entry.parked(), place) {
            self.space.wake(SpaceId::OWN, place);
        }
    }

    /// The device could not give the pages: they stay there, or, when a CPU
    /// thread needs them, they are lost and say so.
    fn copy_home_failed(
        &self,
        claim: &Claim<'_>,
        from: u32,
        landing: Landing,
        error: DeviceError,
        poisons: Poisons,
        step: &mut Step,
    ) -> bool {
        let map = self.gate.read();
        let block = map.block(claim.block);
        let mut inner = block.lock();
        let inner = &mut *inner;
        // There is no less than a whole page of hugetlbfs.
        let whole = claim
            .part_of_hugetlb
            .and_then(|_| block.place_of(claim.first, claim.pages));
        let all_poisoned = whole.is_some_and(|whole| {
            whole.iter_pages().any(|page| poisons.includes(page))
                && !inner.entry(claim.first).doomed()
                && self.poison(whole, error)
        });
        for offset in 0..landing.pages() {
            let index = claim.first + from + offset;
            let place = block.place_of(index, 1);
            if let Some(staging) = landing.staging_page(offset) {
                self.staging.lock().put(staging, true);
            }
            match place {
                Some(place)
                    if all_poisoned
                        || whole.is_none()
                            && poisons.includes(place.start())
                            && !inner.entry(index).doomed()
                            && self.poison(place, error) =>
                {
                    self.free_claimed(claim, from + offset);
                    let parked = inner.entry(index).parked();
                    inner.set(index, PageState::System);
                    if parked {
                        self.space.wake(SpaceId::OWN, place);
                    }
                }
                place => {
                    self.settle_page(inner, claim, from + offset, place);
                    if let Some(place) = place {
                        let reason = reason_of(error);
                        if whole.is_none() {
                            step.stays(place, reason);
                        }
                    }
                }
            }
        }
        !all_poisoned
    }

    /// Marks a page whose data is lost. False when an event must be read first;
    /// the thread that waits for it then faults again.
    pub(crate) fn poison(&self, place: PageRange, error: DeviceError) -> bool {
        match self.space.poison_pages(SpaceId::OWN, place).stop {
            None | Some(Stop::Gone) => {
                self.stats
                    .lost_pages
                    .fetch_add(place.pages().get(), Relaxed);
                true
            }
            Some(Stop::Again | Stop::NoMemory) => false,
            // Whoever touches a guard gets a signal as it is.
            Some(Stop::Exists) if self.is_guarded(place.slice(0, 1)) => true,
            Some(stop) => panic!(
                "the data of {place} is lost with its device ({error}), and this kernel cannot \
                 mark the page ({stop:?}); zeros in its place would be wrong data"
            ),
        }
    }
}

/// What a look for pages that are away came to.
pub(crate) enum Claimed<'a> {
    /// There is nothing to copy; the step says how far it looked.
    Nothing,
    /// A page of several blocks, of which so much is asked for, as far away as the
    /// step has looked.
    Gigantic {
        asked: u32,
        page_len: PageCount,
        /// The kernel had no page for it a moment ago.
        waits: bool,
    },
    Again,
    /// So many pages have come already. Who waits for some is to be woken when no
    /// lock is held any more.
    Came {
        pages: u64,
        to_wake: Option<PageRange>,
    },
    Pages(Claim<'a>),
}

pub(crate) const fn reason_of(error: DeviceError) -> StayReason {
    match error {
        DeviceError::Lost => StayReason::DeviceLost,
        _ => StayReason::CopyFailed,
    }
}

/// Submits transfers a bounded number at a time and waits for them all. After
/// an error what was copied is undefined.
pub(crate) fn run_transfers(
    device: &dyn hmm_hal::Device,
    mut transfers: impl Iterator<Item = Transfer>,
) -> Result<(), DeviceError> {
    while let Some(first) = transfers.next() {
        let mut batch = [first; TRANSFERS];
        let mut len = 1;
        for (slot, transfer) in batch[1..].iter_mut().zip(&mut transfers) {
            *slot = transfer;
            len += 1;
        }
        let fence = device.submit(&batch[..len])?;
        device.wait(fence)?;
    }
    Ok(())
}
