//! Pages of hugetlbfs: placed and protected as a whole.
//!
//! The kernel takes no part of one, and says of a page that it cannot have, as its pool is
//! empty, that it "exists". Which page an address is in the kernel's map tells, but for a
//! child's, which is out of reach.

use std::sync::atomic::Ordering;

use hmm_hal::{Progress, SpaceId, Stop};
use hmm_types::{BLOCK_SIZE, MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr};
use rustix::mm::{Advice, madvise};

use crate::map::{GIGABYTE, huge_page_of};
use crate::refusal;
use crate::region::Region;
use crate::shared::RegionPages;
use crate::space::{LinuxSpace, stopped};
use crate::uffd::Uffd;

/// Sizes of pages of hugetlbfs that a process has at a time, at most.
const HUGE_SIZES: usize = 4;

impl LinuxSpace {
    /// Calls the context of a space on pages of a range, or if they are a part of a huge page of
    /// hugetlbfs, on all of that: there is no less.
    pub(crate) fn on_pages(
        &self,
        space: SpaceId,
        range: PageRange,
        call: impl FnOnce(&Uffd, PageRange) -> Progress,
        on_huge: impl Fn(&Uffd, PageRange) -> Progress,
    ) -> Progress {
        let progress = self.on(space, |uffd| call(uffd, range));
        if progress.stop != Some(Stop::Incompatible) {
            return progress;
        }
        let on_huge = |huge| self.on(space, |uffd| on_huge(uffd, huge));
        self.on_huge_page(space, range, on_huge).unwrap_or(progress)
    }

    /// Calls for the page of hugetlbfs that a range is a part of, if it is. A child's
    /// may be of any size that has been registered: what is too small is refused
    /// there.
    pub(crate) fn on_huge_page(
        &self,
        space: SpaceId,
        range: PageRange,
        call: impl Fn(PageRange) -> Progress,
    ) -> Option<Progress> {
        let mut last = None;
        for huge in self.huge_pages_around(space, range).into_iter().flatten() {
            let progress = call(huge);
            let done = progress.done.min(range.pages());
            let progress = Progress { done, ..progress };
            if progress.stop != Some(Stop::Incompatible) {
                return Some(progress);
            }
            last = Some(progress);
        }
        last
    }

    /// Places a copy of engine memory in a huge page of hugetlbfs.
    pub(crate) fn place_huge(&self, space: SpaceId, page: PageRange, from: VirtAddr) -> Progress {
        let progress = self.try_place_huge(space, page, from);
        if progress.stop != Some(Stop::NoMemory) || page.pages().index() <= PAGES_PER_BLOCK {
            return progress;
        }
        // The kernel does not fault on what it copies. For smaller pages it takes
        // another one to copy into, and then may; for these it has none.
        let start = std::ptr::with_exposed_provenance_mut(from.addr());
        let len = page.pages().bytes_usize();
        // SAFETY: memory of the engine's own; the advice reads it at most.
        let there = unsafe { madvise(start, len, Advice::LinuxPopulateRead) };
        match there {
            Ok(()) => self.try_place_huge(space, page, from),
            Err(_) => progress,
        }
    }

    /// The kernel says "exists" also when its pool is empty.
    fn try_place_huge(&self, space: SpaceId, page: PageRange, from: VirtAddr) -> Progress {
        let place = |uffd: &Uffd| uffd.copy(from, page);
        let progress = self.on(space, place);
        if progress.stop != Some(Stop::Exists) {
            return progress;
        }
        if space == SpaceId::OWN {
            return self.why_not_there(page).map_or(progress, stopped);
        }
        // A child's page table is out of reach. Twice, as a page may come into the
        // pool between the two looks.
        let again = self.on(space, place);
        let has_page = || refusal::has_huge_page(page.pages()).unwrap_or(false);
        if again.stop == Some(Stop::Exists) && !has_page() {
            return stopped(Stop::NoMemory);
        }
        again
    }

    /// Why a huge page of hugetlbfs could not be placed, if the kernel said that
    /// there is one and there is none: it says so too when its pool is empty.
    fn why_not_there(&self, page: PageRange) -> Option<Stop> {
        // A peer may have met it, and the own page table not.
        if let Some(there) = self.parts().regions.has_page(page) {
            return (!there).then_some(Stop::NoMemory);
        }
        let there = self.parts().pagemap.is_present(page.start());
        // One that the kernel itself is moving is not there either, for a moment.
        there.is_ok_and(|there| !there).then_some(Stop::NoMemory)
    }

    /// Whether a range is a part of one huge page of hugetlbfs.
    pub(crate) fn is_hugetlb(&self, space: SpaceId, range: PageRange) -> bool {
        let mut huge = self.huge_pages_around(space, range).into_iter().flatten();
        huge.next().is_some()
    }

    /// The page of hugetlbfs that a range is a part of, if it is; of a child's, what
    /// it may be, the smallest first.
    fn huge_pages_around(
        &self,
        space: SpaceId,
        range: PageRange,
    ) -> [Option<PageRange>; HUGE_SIZES] {
        let mut huge = [None; HUGE_SIZES];
        let first = range.slice(0, 1);
        let around = |page_len| {
            let page = huge_page_of(range.start(), page_len);
            page.encloses(range).then_some(page)
        };
        if space == SpaceId::OWN {
            let parts = self.parts();
            let _ = parts.map.visit(first, &mut |vma| {
                if vma.kind == MemoryKind::HugeTlb {
                    huge[0] = around(vma.page_len);
                }
            });
            // By its name it is shared memory.
            if parts.regions.has_huge(first) {
                huge[0] = around(RegionPages::Huge.size());
            }
        } else if self.moves_huge_pages {
            // A child's map is out of reach. To allow writes to less than a page is
            // refused there, and does no harm elsewhere: a child may write to all
            // of its memory.
            let refused = self.on(space, |uffd| uffd.write_protect(first, false));
            if refused.stop == Some(Stop::Incompatible) {
                let sizes = self.huge_sizes.load(Ordering::Acquire);
                let registered = (0..u64::BITS).filter(|shift| sizes >> shift & 1 != 0);
                let pages = registered.filter_map(|shift| around(PageCount::new(1 << shift)));
                huge.iter_mut()
                    .zip(pages)
                    .for_each(|(slot, page)| *slot = Some(page));
            }
        }
        huge
    }

    /// Memory of so many zeros.
    pub(crate) fn zeros(&self, page_len: PageCount) -> Option<VirtAddr> {
        let parts = self.parts();
        if page_len <= parts.zeros.range().pages() {
            return Some(parts.zeros.range().start());
        }
        let more = parts.more_zeros.get()?.as_ref()?.range();
        (page_len <= more.pages()).then_some(more.start())
    }

    /// Gets ready for pages of hugetlbfs of a size. False when there are not so many
    /// addresses.
    pub(crate) fn prepare(&self, page_len: PageCount) -> bool {
        let zeros = &self.parts().more_zeros;
        if page_len > PageCount::from(PAGES_PER_BLOCK) {
            let reserve = || {
                let region = Region::reserve(GIGABYTE / BLOCK_SIZE).ok()?;
                // One page of zeros for each block, and hardly any page tables.
                let _ = region.prefer_huge(true);
                Some(region)
            };
            if zeros.get_or_init(reserve).is_none() {
                return false;
            }
        }
        let shift = page_len.get().ilog2();
        self.huge_sizes.fetch_or(1 << shift, Ordering::AcqRel);
        true
    }
}
