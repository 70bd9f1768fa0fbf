//! The calls of userfaultfd that resolve faults, page by page as
//! `mm/userfaultfd.c` has them.

use hmm_hal::{Progress, SpaceId, Stop};
use hmm_types::{MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr};

use crate::memory::Memory;
use crate::page::{Page, ZEROS};
use crate::space::{SimSpace, State};

/// What holes are filled with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Filling {
    /// Zeroed pages.
    Zeros,
    /// Markers of lost data.
    Poison,
    /// Copies of the engine's pages from here on.
    Copies(VirtAddr),
}

/// A storm of "again" lasts at most so many calls.
const STORM_CALLS: u64 = 5;
/// A pool of huge pages stays empty for at most so many.
const DRY_CALLS: u64 = 100;

fn stopped(done: u64, stop: Stop) -> Progress {
    Progress {
        done: PageCount::new(done),
        stop: Some(stop),
    }
}

fn all(range: PageRange) -> Progress {
    Progress {
        done: range.pages(),
        stop: None,
    }
}

impl State {
    /// Whether a resolving call has to say "again".
    fn again(&mut self, space: SpaceId) -> bool {
        if self.queue.changing(space) {
            return true;
        }
        if self.again_left > 0 {
            self.again_left -= 1;
            return true;
        }
        if self.rng.one_in(self.rates.again) {
            self.again_left = self.rng.below(STORM_CALLS);
            return true;
        }
        false
    }

    pub(crate) fn move_pages(&mut self, from: PageRange, to: VirtAddr) -> Progress {
        assert!(
            SimSpace::is_engine_memory(to) != SimSpace::is_engine_memory(from.start()),
            "one side of a move is staging memory"
        );
        // Staging and the program share one context: both ways have to wait.
        if self.again(SpaceId::OWN) {
            return stopped(0, Stop::Again);
        }
        let target = PageRange::from_pages(to, from.pages());
        let mut progress = all(from);
        for (index, page) in (0..).zip(from.iter_pages()) {
            if let Err(stop) = self.move_page(from, page, target, to.plus_pages(index)) {
                progress = stopped(index, stop);
                break;
            }
        }
        progress
    }

    fn move_page(
        &mut self,
        from: PageRange,
        page: VirtAddr,
        target: PageRange,
        to: VirtAddr,
    ) -> Result<(), Stop> {
        let busy = self.rng.one_in(self.rates.busy);
        let own = self.own();
        let destination = own.vma_at(to).ok_or(Stop::NotMapped)?;
        let source = own.vma_at(page).ok_or(Stop::NotMapped)?;
        if !destination.registered {
            return Err(Stop::NotMapped);
        }
        if source.kind != MemoryKind::PrivateAnonymous
            || destination.kind != MemoryKind::PrivateAnonymous
            || !source.permissions.write
            || source.permissions != destination.permissions
            || source.locked != destination.locked
        {
            return Err(Stop::Incompatible);
        }
        if own.pages.contains_key(&to) {
            return Err(Stop::Exists);
        }
        let Some(&entry) = own.pages.get(&page) else {
            return Ok(());
        };
        if entry.poisoned {
            return Err(Stop::Incompatible);
        }
        if entry.pin.is_some() || entry.cow_shared || busy {
            return Err(Stop::Busy);
        }
        let whole = |range: PageRange, page: VirtAddr| {
            let block = page.block_floor();
            range.encloses(PageRange::from_pages(
                block,
                PageCount::from(PAGES_PER_BLOCK),
            ))
        };
        let huge = entry.huge
            && whole(from, page)
            && whole(target, to)
            && page.get() - page.block_floor().get() == to.get() - to.block_floor().get();
        if entry.huge && !huge {
            own.split_block(page.block_floor());
        }
        own.pages.remove(&page);
        own.pages.insert(
            to,
            Page {
                huge,
                write_protected: false,
                ..entry
            },
        );
        Ok(())
    }

    /// Places copies, zeros or poison.
    pub(crate) fn fill_pages(&mut self, space: SpaceId, with: Filling, to: PageRange) -> Progress {
        if !self.memories.contains_key(&space) {
            return stopped(0, Stop::Gone);
        }
        if self.again(space) {
            return stopped(0, Stop::Again);
        }
        let memory = self.memories.get(&space);
        let hugetlb = memory.filter(|memory| memory.is_hugetlb(to.start()));
        if let Some(first) = hugetlb.map(|memory| memory.page_of(to.start())) {
            return self.fill_huge_pages(space, with, to, first);
        }
        let mut progress = all(to);
        for (index, page) in (0..).zip(to.iter_pages()) {
            if let Err(stop) = self.fill_page(space, with, index, page) {
                progress = stopped(index, stop);
                break;
            }
        }
        progress
    }

    /// The same in hugetlbfs, one whole page after the other. Zeros and poison for a
    /// part of a page are for all of it: there is no less.
    fn fill_huge_pages(
        &mut self,
        space: SpaceId,
        with: Filling,
        to: PageRange,
        first: PageRange,
    ) -> Progress {
        let asked = to.pages();
        let to = match with {
            Filling::Zeros | Filling::Poison if first.encloses(to) => first,
            _ => to,
        };
        let once_in = self.rates.copy_no_memory;
        let page_len = first.pages().get();
        if to.start() != first.start() || !to.pages().get().is_multiple_of(page_len) {
            return stopped(0, Stop::Incompatible);
        }
        for done in (0..to.pages().get()).step_by(first.pages().index()) {
            let block = to.slice(done, page_len);
            let there = |memory: &Memory| memory.page(block.start()).is_some();
            if self.memories.get(&space).is_some_and(there) {
                return stopped(done, Stop::Exists);
            }
            // The pool is empty, or the page comes as a whole.
            if self.dry_left > 0 || self.rng.one_in(once_in) {
                self.dry_left = match self.dry_left {
                    0 => self.rng.below(DRY_CALLS),
                    left => left - 1,
                };
                return stopped(done, Stop::NoMemory);
            }
            for (index, page) in (done..).zip(block.iter_pages()) {
                if let Err(stop) = self.fill_page(space, with, index, page) {
                    return stopped(done, stop);
                }
            }
        }
        Progress {
            done: asked,
            stop: None,
        }
    }

    fn fill_page(
        &mut self,
        space: SpaceId,
        with: Filling,
        index: u64,
        to: VirtAddr,
    ) -> Result<(), Stop> {
        let fresh = match with {
            Filling::Zeros => Page::new(ZEROS),
            Filling::Poison => Page::poison(),
            Filling::Copies(from) => {
                let page = from.plus_pages(index);
                self.bounce_in(page);
                match self.own().pages.get(&page) {
                    Some(page) => Page::new(page.data),
                    None => panic!("the engine copies its page {page}, which is not there"),
                }
            }
        };
        let no_memory = self.rng.one_in(self.rates.copy_no_memory);
        let memory = self.memories.get_mut(&space).ok_or(Stop::Gone)?;
        let vma = memory.vma_at(to).ok_or(Stop::NotMapped)?;
        if !vma.registered {
            return Err(Stop::NotMapped);
        }
        if no_memory && vma.kind != MemoryKind::HugeTlb {
            return Err(Stop::NoMemory);
        }
        if memory.page(to).is_some() {
            return Err(Stop::Exists);
        }
        memory.pages.insert(to, fresh);
        Ok(())
    }

    pub(crate) fn write_protect(&mut self, range: PageRange, on: bool) -> Progress {
        if self.again(SpaceId::OWN) {
            return stopped(0, Stop::Again);
        }
        let own = self.own();
        let whole = own.page_of(range.start());
        if own.is_hugetlb(range.start()) && whole.encloses(range) && whole != range {
            let protected = self.write_protect(whole, on);
            return match protected.stop {
                None => all(range),
                Some(_) => protected,
            };
        }
        let mut progress = all(range);
        for (index, page) in (0..).zip(range.iter_pages()) {
            if !own.vma_at(page).is_some_and(|vma| vma.registered) {
                progress = stopped(index, Stop::NotMapped);
                break;
            }
            let hugetlb = own.is_hugetlb(page);
            match own.pages.get_mut(&page) {
                Some(entry) if entry.left_protection && !on => {
                    own.pages.remove(&page);
                }
                Some(entry) => entry.write_protected = on,
                None if hugetlb && on => {
                    own.pages.insert(page, Page::left_protection());
                }
                None => {}
            }
        }
        if !on && progress.done > PageCount::ZERO {
            let done = PageRange::from_pages(range.start(), progress.done);
            self.queue.wake(SpaceId::OWN, done);
        }
        progress
    }
}
