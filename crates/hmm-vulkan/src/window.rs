//! Where the program's pages go in the device's memory, if they have the choice.
//!
//! As far as there is room, all pages on the device lie in its memory as they do in the
//! program: at one distance, so that a kernel finds them by adding a constant. The device's
//! memory is a window onto the program's, and the window repeats itself before and behind:
//! a page that lies elsewhere gets the frame that it would have in the repetition.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hmm_types::{BLOCK_PAGES, FrameId, FrameRange, PAGE_SHIFT, PageRange};

/// Changes with the frames' allocator locked.
#[derive(Debug)]
pub(crate) struct Window {
    /// In whole blocks, so that 64 KiB and 2 MiB lie in memory as they do in the program.
    pages: u64,
    /// The number of the page that frame 0 is for.
    begin: AtomicU64,
    pinned: AtomicBool,
}

impl Window {
    /// For a device with so many frames.
    pub(crate) const fn new(frames: u32) -> Self {
        Self {
            pages: (frames / BLOCK_PAGES * BLOCK_PAGES) as u64,
            begin: AtomicU64::new(0),
            pinned: AtomicBool::new(false),
        }
    }

    /// Its size; 0 where there is not a whole block.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }

    /// From now on, and for ever, frame 0 is for the page with this number.
    pub(crate) fn pin(&self, begin: u64) {
        self.begin.store(begin, Ordering::Relaxed);
        self.pinned.store(true, Ordering::SeqCst);
    }

    /// Whether frames have the addresses of pages, and keep them (`identity.rs`).
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::SeqCst)
    }

    /// Lays it around the first pages that come to an empty device, unless it is pinned.
    pub(crate) fn lay_around(&self, pages: PageRange) {
        if self.is_pinned() {
            return;
        }
        let block = u64::from(BLOCK_PAGES);
        let first = (pages.start().get() >> PAGE_SHIFT) / block * block;
        let begin = first.wrapping_sub(self.pages / 2 / block * block);
        self.begin.store(begin, Ordering::Relaxed);
    }

    /// The frames for these pages. `None` where they run over its end.
    pub(crate) fn frames(&self, pages: PageRange) -> Option<FrameRange> {
        let first = pages.start().get() >> PAGE_SHIFT;
        let since = first.wrapping_sub(self.begin.load(Ordering::Relaxed));
        // They may lie before: then as much behind the repetition before that.
        let since = since
            .cast_signed()
            .checked_rem_euclid(self.pages.cast_signed())?;
        let since = u32::try_from(since).ok()?;
        let count = u32::try_from(pages.pages().get()).ok()?;
        let fits = u64::from(since) + u64::from(count) <= self.pages;
        fits.then(|| FrameRange::new(FrameId::new(since), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_types::{PageCount, VirtAddr};

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::from_pages(VirtAddr::new(first << PAGE_SHIFT), PageCount::new(count))
    }

    fn frames(first: u32, count: u32) -> Option<FrameRange> {
        Some(FrameRange::new(FrameId::new(first), count))
    }

    #[test]
    fn pages_lie_in_it_as_in_the_program() {
        let window = Window::new(4 * BLOCK_PAGES + 7);
        let block = u64::from(BLOCK_PAGES);
        assert_eq!(window.pages(), 4 * block);
        let here = 100 * block;
        window.lay_around(pages(here + 3, 5));
        // Two blocks lie before.
        assert_eq!(
            window.frames(pages(here + 3, 5)),
            frames(2 * BLOCK_PAGES + 3, 5)
        );
        assert_eq!(window.frames(pages(here - 2 * block, 1)), frames(0, 1));
        // It repeats itself, and nothing runs over its end.
        let last = here + 2 * block - 1;
        assert_eq!(
            window.frames(pages(last, 1)),
            frames(4 * BLOCK_PAGES - 1, 1)
        );
        assert_eq!(window.frames(pages(last, 2)), None);
        assert_eq!(window.frames(pages(last + 1, 2)), frames(0, 2));
        assert_eq!(
            window.frames(pages(here - 2 * block - 1, 1)),
            frames(4 * BLOCK_PAGES - 1, 1)
        );
        // Pinned, it stays.
        window.pin(50 * block);
        window.lay_around(pages(here, 1));
        assert!(window.is_pinned());
        assert_eq!(window.frames(pages(50 * block, 2)), frames(0, 2));
    }

    #[test]
    fn less_than_a_block_is_none() {
        let window = Window::new(BLOCK_PAGES - 1);
        window.lay_around(pages(1000, 1));
        assert_eq!((window.pages(), window.frames(pages(1000, 1))), (0, None));
    }
}
