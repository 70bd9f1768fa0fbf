//! Forked children: what they still need from the engine.
//!
//! A fork copies the page table as it is. Pages that were on a device are
//! missing in the child; their frames are shared from then on. The child gets
//! each of them when it touches it, and the rest in the background, so that
//! soon it depends on nobody. A device that wants to write to a shared frame
//! gets a copy of its own first.

use std::sync::atomic::Ordering::{Relaxed, Release};

use hmm_hal::{DeviceError, SpaceId, Stop, Transfer};
use hmm_mem::Vec;
use hmm_types::{DeviceId, FrameId, FrameRange, PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr};

use crate::engine::{COPY_LIMIT, Engine};
use crate::executor::{BOUNCE_LEN, Executor};
use crate::gigantic::LargeRoom;
use crate::home::run_transfers;
use crate::hugetlb::Room;
use crate::map::SpaceMap;
use crate::page::PageState;
use crate::staging::StagingPage;

/// How often a huge page is tried at a time.
const HUGE_TRIES: u32 = 64;

/// A page that a child has not got yet; or several in a row, of a page of hugetlbfs
/// of more than a block, with frames in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owed {
    page: VirtAddr,
    pages: u32,
    source: Source,
    /// How large a page of hugetlbfs it is a part of, which is given as a whole.
    hugetlb: Option<PageCount>,
    /// The page was being dropped: the child's page table may have it.
    perhaps_there: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A frame that the child shares.
    Frame { device: DeviceId, frame: FrameId },
    /// A staging page, which cannot be shared: given before the fork's event
    /// is done with.
    Staging(StagingPage),
}

#[derive(Debug)]
struct Child {
    space: SpaceId,
    /// Sorted by address.
    owed: Vec<Owed>,
}

impl Owed {
    fn end(&self) -> VirtAddr {
        self.page.plus_pages(self.pages.into())
    }

    /// What is given as a whole.
    fn whole(&self) -> PageRange {
        let pages = self.hugetlb.unwrap_or(PageCount::ONE);
        let start = self.page.get() - self.page.get() % pages.bytes().get();
        PageRange::from_pages(VirtAddr::new(start), pages)
    }

    /// The frames behind it.
    fn frames(&self) -> Option<(DeviceId, FrameRange)> {
        match self.source {
            Source::Frame { device, frame } => Some((device, FrameRange::new(frame, self.pages))),
            Source::Staging(_) => None,
        }
    }
}

impl Child {
    /// The first that is owed from an address on, or around it.
    fn position(&self, address: VirtAddr) -> usize {
        self.owed.partition_point(|owed| owed.end() <= address)
    }

    fn within(&self, range: PageRange) -> std::ops::Range<usize> {
        let from = self.position(range.start());
        let upto = self.owed.partition_point(|owed| owed.page < range.end());
        from..upto.max(from)
    }
}

/// All children that are owed pages.
#[derive(Debug)]
pub(crate) struct Children(Vec<Child>);

impl Children {
    pub(crate) const fn new() -> Self {
        Self(hmm_mem::vec())
    }

    fn get(&mut self, space: SpaceId) -> Option<&mut Child> {
        self.0.iter_mut().find(|child| child.space == space)
    }
}

impl Engine<'_> {
    /// The process forked. Called with the gate held for writing, so nothing
    /// has been committed since the kernel copied the page table.
    pub(crate) fn fork(&self, map: &mut SpaceMap, space: SpaceId) {
        let mut owed = hmm_mem::vec();
        for piece in map.pieces() {
            let block = map.block(piece.block);
            let hugetlb = block.is_hugetlb().then(|| block.page_len());
            let mut inner = block.lock();
            inner.clear_coherent();
            if inner.away() == 0 && inner.in_flight() == 0 {
                continue;
            }
            // Device mappings go: the next write asks, and un-shares.
            self.invalidate(&mut inner, piece.range());
            let unit = inner.unit();
            let pages = (piece.first..).zip(piece.range().iter_pages());
            for (index, page) in pages.step_by(unit as usize) {
                if inner.entry(index).doomed() {
                    continue;
                }
                let state = inner.state(index);
                let perhaps_there = matches!(
                    state,
                    PageState::Dropping { .. } | PageState::Dropped { .. }
                );
                let source = match state {
                    PageState::Device { device, frame }
                    | PageState::Dropping { device, frame }
                    | PageState::Dropped { device, frame }
                    | PageState::Downloading { device, frame }
                    | PageState::Transferring { device, frame } => {
                        self.share(device, FrameRange::new(frame, unit));
                        Source::Frame { device, frame }
                    }
                    PageState::Staged { page: staged, .. }
                    | PageState::Uploading {
                        source: Some(staged),
                    } => Source::Staging(staged),
                    PageState::System
                    | PageState::Discarded
                    | PageState::Copying { .. }
                    | PageState::Uploading { source: None } => continue,
                };
                owed.push(Owed {
                    page,
                    pages: unit,
                    source,
                    hugetlb,
                    perhaps_there,
                });
            }
        }
        if !owed.is_empty() {
            self.space.wiped_on_fork(&mut |wiped| {
                owed.retain(|owed: &Owed| {
                    let keep = !wiped.contains(owed.page);
                    if !keep {
                        self.settle(*owed);
                    }
                    keep
                });
            });
        }
        self.children.lock().0.push(Child { space, owed });
        self.owing.store(true, Release);
        while let Some((page, staged)) = self.owed_from_staging(space) {
            self.give_now(map, space, page, staged);
        }
    }

    fn share(&self, device: DeviceId, frames: FrameRange) {
        assert!(
            self.try_share(device, frames),
            "a page is owed to more than 255 children at once"
        );
    }

    /// One more owner for all of the frames, or for none.
    fn try_share(&self, device: DeviceId, frames: FrameRange) -> bool {
        let slot = self.devices.slot(device);
        let unshared = frames.iter().position(|frame| !slot.share(frame));
        match unshared.map(u32::try_from) {
            None => true,
            Some(shared) => {
                if let Ok(shared @ 1..) = shared {
                    slot.free(frames.slice(0, shared));
                }
                false
            }
        }
    }

    fn owed_from_staging(&self, space: SpaceId) -> Option<(PageRange, StagingPage)> {
        let mut children = self.children.lock();
        children.get(space)?.owed.iter().find_map(|owed| {
            let Source::Staging(staged) = owed.source else {
                return None;
            };
            Some((PageRange::from_pages(owed.page, PageCount::ONE), staged))
        })
    }

    /// Copies a page from staging to a child. The child may run already and
    /// change its mappings: then its events come first, and the page may be
    /// owed elsewhere, or not any more.
    fn give_now(&self, map: &mut SpaceMap, space: SpaceId, page: PageRange, staged: StagingPage) {
        let host = self.staging.lock().address(staged);
        match self.space.copy_pages(space, host, page).stop {
            // `NotMapped`: the child does not see this memory (MADV_DONTFORK).
            None | Some(Stop::Gone | Stop::NotMapped | Stop::Exists) => {
                self.space.wake(space, page);
                self.child_dropped(space, page);
            }
            Some(Stop::Again) => self.read_more(map),
            Some(Stop::NoMemory) => {}
            Some(stop) => unreachable!("cannot give {page} to a forked child: {stop:?}"),
        }
    }

    /// A child forked: its child is owed the same.
    pub(crate) fn fork_of_child(&self, map: &mut SpaceMap, parent: SpaceId, space: SpaceId) {
        let mut children = self.children.lock();
        let mut owed = hmm_mem::vec();
        if let Some(parent) = children.get(parent) {
            owed.extend_from_slice(&parent.owed);
        }
        for page in &owed {
            if let Some((device, frames)) = page.frames() {
                self.share(device, frames);
            }
        }
        children.0.push(Child { space, owed });
        drop(children);
        // Only while the parent's own fork is being dealt with.
        while let Some((page, staged)) = self.owed_from_staging(space) {
            self.give_now(map, space, page, staged);
        }
    }

    /// A child unmapped or dropped a range: nothing of it is owed any more.
    pub(crate) fn child_dropped(&self, space: SpaceId, range: PageRange) {
        let mut children = self.children.lock();
        if let Some(child) = children.get(space) {
            let gone = child.within(range);
            for owed in child.owed.drain(gone) {
                self.settle(owed);
            }
        }
    }

    pub(crate) fn child_remapped(&self, space: SpaceId, from: PageRange, to: VirtAddr) {
        let mut children = self.children.lock();
        if let Some(child) = children.get(space) {
            let moved = child.within(from);
            for owed in &mut child.owed[moved] {
                owed.page = to.plus_pages(owed.page.pages_since(from.start()));
            }
            child.owed.sort_unstable_by_key(|owed| owed.page);
        }
    }

    pub(crate) fn child_gone(&self, space: SpaceId) {
        let mut children = self.children.lock();
        if let Some(at) = children.0.iter().position(|child| child.space == space) {
            for owed in children.0.swap_remove(at).owed {
                self.settle(owed);
            }
            self.space.release(space);
        }
    }

    fn settle(&self, owed: Owed) {
        if let Some((device, frames)) = owed.frames() {
            self.devices.slot(device).free(frames);
        }
    }

    /// A child's thread touched a missing page.
    pub(crate) fn child_fault(&self, executor: &mut Executor, space: SpaceId, address: VirtAddr) {
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        let mut attempt = 0;
        // Whatever becomes of it: who waits looks again.
        while self.give_run(executor, space, page.start()).is_none()
            && self.fill_hole_of_child(space, page) == Some(Stop::Again)
            && self.wait_for_events(executor, attempt)
        {
            attempt += 1;
        }
        self.space.wake(space, page);
    }

    /// Zeros for a child's page, unless it is owed one. Under the gate: a fork
    /// that is being applied is about to say what a new child is owed.
    fn fill_hole_of_child(&self, space: SpaceId, page: PageRange) -> Option<Stop> {
        let _gate = self.gate.read();
        let mut children = self.children.lock();
        if let Some(child) = children.get(space)
            && !child.within(page).is_empty()
        {
            return Some(Stop::Again);
        }
        self.space.zero_pages(space, page).stop
    }

    /// A child's thread writes to a page that the engine had write-protected in
    /// the parent when it forked. The page is the child's own: it may.
    pub(crate) fn child_writes(&self, executor: &mut Executor, space: SpaceId, address: VirtAddr) {
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        let mut attempt = 0;
        while self.space.allow_writes(space, page).stop == Some(Stop::Again)
            && self.wait_for_events(executor, attempt)
        {
            attempt += 1;
        }
        self.space.wake(space, page);
    }

    /// Gives a child the owed pages from `start` on that follow each other, a
    /// few at a time. `None` when nothing is owed at `start`.
    fn give_run(&self, executor: &mut Executor, space: SpaceId, start: VirtAddr) -> Option<u64> {
        let mut run: [Option<Owed>; BOUNCE_LEN] = [None; BOUNCE_LEN];
        let mut len = 0u64;
        {
            let mut children = self.children.lock();
            let child = children.get(space)?;
            let from = child.position(start);
            let first = child.owed.get(from)?;
            if first.hugetlb.is_some() && first.page <= start {
                let whole = first.whole();
                drop(children);
                return Some(self.give_huge_page(executor, space, whole));
            }
            for (slot, owed) in run.iter_mut().zip(&child.owed[from..]) {
                if owed.page != start.plus_pages(len) || owed.hugetlb.is_some() {
                    break;
                }
                let Some((device, frames)) = owed.frames() else {
                    unreachable!("given before a fork's event is done with");
                };
                // Kept while it is read: the child may drop the page meanwhile.
                if !self.try_share(device, frames) {
                    break;
                }
                *slot = Some(*owed);
                len += 1;
            }
        }
        if len == 0 {
            return None;
        }
        let bounce = executor.bounce(len);
        let readable = run
            .iter()
            .flatten()
            .zip(bounce.iter_pages())
            .take_while(|(owed, host)| self.read_owed(owed, *host).is_ok())
            .count();
        let mut attempt = 0;
        while !self.place_in_child(space, &run[..readable], bounce.start())
            && self.wait_for_events(executor, attempt)
        {
            attempt += 1;
        }
        if let (0, Some(lost)) = (readable, run[0]) {
            self.lose_in_child(executor, space, lost);
        }
        run.into_iter().flatten().for_each(|owed| self.settle(owed));
        Some(readable.max(1) as u64)
    }

    /// Gives a child a whole page of hugetlbfs. Returns how many pages are owed
    /// no more.
    fn give_huge_page(&self, executor: &mut Executor, space: SpaceId, page: PageRange) -> u64 {
        let gigantic = page.pages() > PageCount::from(PAGES_PER_BLOCK);
        let (small, large) = if gigantic {
            (None, self.gigantic.take(page.pages()))
        } else {
            (self.rooms.take(), None)
        };
        let start = small
            .as_ref()
            .map(Room::start)
            .or_else(|| large.as_ref().map(LargeRoom::start));
        // Not held without a room: nobody would let it go.
        let held = start.and_then(|start| Some((start, self.hold_owed(space, page)?)));
        let Some((start, owed)) = held else {
            // All rooms are taken, or the child has changed something: who waits
            // looks again.
            drop(large);
            self.space.relax();
            return 0;
        };
        let readable = owed.iter().all(|owed| {
            let host = start.plus_pages(owed.page.pages_since(page.start()));
            self.read_owed(owed, host).is_ok()
        });
        let from = readable.then_some(start);
        // The child may get no page from the pool for long: others have their turn.
        let given = (0..HUGE_TRIES)
            .find_map(|attempt| {
                let given = self.place_huge_page(space, page, &owed, from);
                if given.is_none() {
                    self.wait_for_events(executor, attempt);
                }
                given
            })
            .unwrap_or(0);
        owed.into_iter().for_each(|owed| self.settle(owed));
        if let Some(room) = large {
            self.empty(room);
        }
        given
    }

    /// What a child is owed of a huge page, with frames that stay while they are
    /// read. Nothing, unless it is all of it.
    fn hold_owed(&self, space: SpaceId, page: PageRange) -> Option<Vec<Owed>> {
        let mut children = self.children.lock();
        let child = children.get(space)?;
        let within = child.within(page);
        if within.len() != PAGES_PER_BLOCK {
            return None;
        }
        let mut held = hmm_mem::vec_with_capacity(PAGES_PER_BLOCK);
        for owed in &child.owed[within] {
            let Some((device, frames)) = owed.frames() else {
                unreachable!("pages of hugetlbfs are never in staging");
            };
            if !self.try_share(device, frames) {
                held.into_iter().for_each(|owed| self.settle(owed));
                return None;
            }
            held.push(*owed);
        }
        Some(held)
    }

    /// Places a huge page in a child from memory that holds it, or as lost, if it
    /// is still owed as it was. `None` when one of the child's events must be read
    /// first. Under the gate, as [`Engine::place_in_child`].
    fn place_huge_page(
        &self,
        space: SpaceId,
        page: PageRange,
        held: &[Owed],
        from: Option<VirtAddr>,
    ) -> Option<u64> {
        let _gate = self.gate.read();
        let mut children = self.children.lock();
        let Some(child) = children.get(space) else {
            return Some(0);
        };
        let owed = child.within(page);
        if child.owed[owed.clone()] != *held {
            return Some(0);
        }
        let (progress, counter) = match from {
            Some(from) => (
                self.space.copy_pages(space, from, page),
                &self.stats.child_pages,
            ),
            None => (self.space.poison_pages(space, page), &self.stats.lost_pages),
        };
        match progress.stop {
            Some(Stop::Again | Stop::NoMemory) => return None,
            // Also what hugetlbfs says when its pool is empty; the child has the
            // page only if it forked while the page was being dropped.
            Some(Stop::Exists) if held.iter().all(|owed| !owed.perhaps_there) => return None,
            Some(Stop::Incompatible) => panic!(
                "{page} cannot be given to a forked child; zeros in its place would be wrong data"
            ),
            _ => {}
        }
        self.space.wake(space, page);
        let given = page.pages().get();
        counter.fetch_add(given, Relaxed);
        for owed in child.owed.drain(owed) {
            self.settle(owed);
        }
        Some(given)
    }

    /// Reads a frame into bounce memory, several times if need be.
    fn read_owed(&self, owed: &Owed, host: VirtAddr) -> Result<(), DeviceError> {
        let Some((device, frames)) = owed.frames() else {
            unreachable!("given before a fork's event is done with");
        };
        let transfer = Transfer::ToHost { frames, host };
        let device = self.devices.slot(device).device;
        let mut result = Ok(());
        for _ in 0..COPY_LIMIT {
            result = run_transfers(device, std::iter::once(transfer));
            match result {
                Ok(()) | Err(DeviceError::Lost) => break,
                Err(_) => {
                    self.stats.copy_failures.fetch_add(1, Relaxed);
                }
            }
        }
        result
    }

    /// A page that a child is owed cannot be read any more.
    fn lose_in_child(&self, executor: &mut Executor, space: SpaceId, lost: Owed) {
        let page = PageRange::from_pages(lost.page, PageCount::ONE);
        let mut attempt = 0;
        loop {
            let stop = {
                let mut children = self.children.lock();
                let Some(child) = children.get(space) else {
                    return;
                };
                let at = child.position(lost.page);
                if child.owed.get(at) != Some(&lost) {
                    return;
                }
                let stop = self.space.poison_pages(space, page).stop;
                if !matches!(
                    stop,
                    Some(Stop::Again | Stop::NoMemory | Stop::Incompatible)
                ) {
                    child.owed.remove(at);
                    self.settle(lost);
                    self.stats.lost_pages.fetch_add(1, Relaxed);
                    return;
                }
                stop
            };
            assert!(
                stop != Some(Stop::Incompatible),
                "the data of {page} is lost to a forked child, and this kernel cannot mark the \
                 page; zeros in its place would be wrong data"
            );
            if !self.wait_for_events(executor, attempt) {
                return;
            }
            attempt += 1;
        }
    }

    /// Places copied pages in a child, those that are still owed as they were.
    /// False when one of its events must be read first.
    ///
    /// Under the gate: the child may fork, and what it is owed at that moment
    /// must be what its page table lacked.
    fn place_in_child(&self, space: SpaceId, run: &[Option<Owed>], bounce: VirtAddr) -> bool {
        let _gate = self.gate.read();
        let mut children = self.children.lock();
        let Some(child) = children.get(space) else {
            return true;
        };
        for (index, owed) in (0u64..).zip(run.iter().flatten()) {
            let at = child.position(owed.page);
            if child.owed.get(at) != Some(owed) {
                continue;
            }
            let page = PageRange::from_pages(owed.page, PageCount::ONE);
            match self
                .space
                .copy_pages(space, bounce.plus_pages(index), page)
                .stop
            {
                Some(Stop::Again | Stop::NoMemory) => return false,
                Some(Stop::Exists) => self.space.wake(space, page),
                // `NotMapped`: the child does not see this memory, or no more.
                None | Some(Stop::Gone | Stop::NotMapped) => {
                    self.space.wake(space, page);
                    self.stats.child_pages.fetch_add(1, Relaxed);
                }
                Some(stop) => panic!(
                    "{page} cannot be given to a forked child ({stop:?}); zeros in its place would \
                     be wrong data"
                ),
            }
            child.owed.remove(at);
            self.settle(*owed);
        }
        true
    }

    /// Gives children what they are owed, at most about `pages` pages; lets go
    /// of those that are owed nothing. True when no child is left.
    pub fn drain_children(&self, executor: &mut Executor, pages: u64) -> bool {
        let mut given = 0;
        let mut blocked = 0;
        while given < pages {
            let next = {
                let _gate = self.gate.read();
                let mut children = self.children.lock();
                let Some(child) = children.0.first() else {
                    self.owing.store(false, Release);
                    return true;
                };
                match child.owed.last() {
                    Some(owed) => {
                        // Whole runs from the end: taking the last is cheap.
                        let from = child.owed.len().saturating_sub(BOUNCE_LEN);
                        let start = child.owed[from..]
                            .iter()
                            .rev()
                            .zip(0u64..)
                            .take_while(|(page, back)| page.page.plus_pages(*back) == owed.page)
                            .last()
                            .map_or(owed.page, |(page, _)| page.page);
                        Some((child.space, start))
                    }
                    None => {
                        let space = child.space;
                        children.0.swap_remove(0);
                        self.space.release(space);
                        None
                    }
                }
            };
            if let Some((space, start)) = next {
                let now = self.give_run(executor, space, start).unwrap_or(1);
                given += now;
                if now == 0 {
                    // A huge page that the child cannot get: another child's turn.
                    let mut children = self.children.lock();
                    blocked += 1;
                    if blocked >= children.0.len() {
                        return false;
                    }
                    children.0.rotate_left(1);
                }
            }
        }
        false
    }
}
