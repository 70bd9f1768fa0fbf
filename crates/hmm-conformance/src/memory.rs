//! Anonymous memory.

use std::ptr;

use hmm_types::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

/// Pages of anonymous memory, given back when dropped.
#[derive(Debug)]
pub struct Mapped {
    base: *mut u8,
    pages: usize,
}

/// Bytes of a page, as the index type.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

// SAFETY: the memory belongs to no thread.
unsafe impl Send for Mapped {}
// SAFETY: only addresses are handed out.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// So many pages of zeros.
    ///
    /// # Panics
    /// When the kernel has none.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        // SAFETY: a fresh mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(base != libc::MAP_FAILED, "no memory for a test");
        base.expose_provenance();
        Self {
            base: base.cast(),
            pages,
        }
    }

    /// One of the pages.
    #[must_use]
    pub fn page(&self, index: usize) -> PageRange {
        assert!(index < self.pages);
        let start = VirtAddr::of(self.base.wrapping_add(index * PAGE));
        PageRange::from_pages(start, PageCount::ONE)
    }

    /// All of them.
    #[must_use]
    pub fn range(&self) -> PageRange {
        PageRange::from_pages(VirtAddr::of(self.base), PageCount::from(self.pages))
    }

    /// The address of the word with this index.
    #[must_use]
    pub fn word(&self, index: usize) -> *mut u64 {
        assert!(index < self.pages * PAGE / 8);
        self.base.cast::<u64>().wrapping_add(index)
    }

    /// Reads a word, whoever else may write it.
    #[must_use]
    pub fn read(&self, index: usize) -> u64 {
        // SAFETY: `word` has checked that it is there.
        unsafe { self.word(index).read_volatile() }
    }

    /// Writes a word, whoever else may read it.
    pub fn write(&self, index: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.word(index).write_volatile(value) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.base.cast(), self.pages * PAGE) };
    }
}
