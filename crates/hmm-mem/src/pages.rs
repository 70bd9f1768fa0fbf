//! Whole pages of engine memory, by address only.

use std::alloc::Layout;
use std::ptr::NonNull;

use hmm_types::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

use rustix::mm::{Advice, madvise};

use crate::arena;

/// Pages of engine memory that devices copy into and out of, or that hold a
/// thread's stack. Nobody ever holds a reference to them.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the value is an address and a size; the memory behind it is only used
// through raw pointers, by whoever owns the value.
unsafe impl Send for Pages {}
// SAFETY: as above; who shares the value can read the address and no more.
unsafe impl Sync for Pages {}

impl Pages {
    /// Takes `count` zeroed pages, populated. `None` when the arena is full.
    #[must_use]
    pub fn new(count: PageCount) -> Option<Self> {
        let pages = Self::untouched(count)?;
        // SAFETY: the block is ours and at least that long.
        unsafe { pages.start.write_bytes(0, pages.layout.size()) };
        Some(pages)
    }

    /// Takes `count` pages that hold anything, and that the kernel may still have
    /// to provide. `None` when the arena is full.
    #[must_use]
    pub fn untouched(count: PageCount) -> Option<Self> {
        let page = VirtAddr::new(PAGE_SIZE).addr();
        let bytes = count.index().checked_mul(page)?;
        let layout = Layout::from_size_align(bytes, page).ok()?;
        let start = arena::allocate(layout)?.cast::<u8>();
        Some(Self { start, layout })
    }

    /// Asks for transparent huge pages: less to fill in where much of it is used at
    /// once. A hint.
    pub fn prefer_huge(&self) {
        let start = self.start.as_ptr().cast();
        // SAFETY: the block is this value's own; the advice drops no data.
        let _ = unsafe { madvise(start, self.layout.size(), Advice::LinuxHugepage) };
    }

    /// Where they lie.
    #[must_use]
    pub fn range(&self) -> PageRange {
        PageRange::from_pages(
            VirtAddr::of(self.start.as_ptr()),
            PageCount::new(self.layout.size() as u64 / PAGE_SIZE),
        )
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the block came from the arena with this layout, and its owner
        // gives it up.
        unsafe { arena::release(self.start, self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_in_the_arena() {
        let pages = Pages::new(PageCount::new(64)).unwrap();
        assert!(pages.range().start().is_page_aligned());
        assert!(crate::arena_range().unwrap().encloses(pages.range()));
    }
}
