//! Memory to measure with.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use anyhow::Context;
use hmm::{ByteCount, PAGE_SIZE, PageCount, PageRange, VirtAddr};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Alignment of every area: that of a transparent huge page.
const ALIGN_BYTES: usize = 2 << 20;

/// Private anonymous memory, in pages of the size that was asked for.
#[derive(Debug)]
pub struct Area {
    mapping: NonNull<u64>,
    mapping_bytes: usize,
    start: NonNull<u64>,
    words: usize,
}

// SAFETY: an area owns its memory as a vector does.
unsafe impl Send for Area {}
// SAFETY: a shared area only gives shared references to its words.
unsafe impl Sync for Area {}

impl Area {
    /// Memory of `size`, all zeros, of huge pages or of none.
    pub fn new(size: ByteCount, huge: bool) -> io::Result<Self> {
        let bytes = size.whole_pages().index() * page_bytes();
        let mapping_bytes = bytes + ALIGN_BYTES;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let mapping = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapping_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let offset = mapping.cast::<u8>().align_offset(ALIGN_BYTES);
        let start = mapping.wrapping_byte_add(offset);
        let advice = if huge {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        // Without huge pages in the kernel there is nothing to advise.
        // SAFETY: the size of pages changes nothing that can be read.
        let _ = unsafe { madvise(start, bytes, advice) };
        let pointer = |at: *mut std::ffi::c_void| {
            NonNull::new(at.cast::<u64>()).ok_or(io::ErrorKind::OutOfMemory)
        };
        Ok(Self {
            mapping: pointer(mapping)?,
            mapping_bytes,
            start: pointer(start)?,
            words: bytes / size_of::<u64>(),
        })
    }

    /// The same, with a different number in each word.
    pub fn filled(size: ByteCount, huge: bool) -> io::Result<Self> {
        Ok(Self::new(size, huge)?.fill())
    }

    /// Memory of huge pages from hugetlbfs, with numbers.
    pub fn hugetlb(size: ByteCount) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB;
        let bytes = size.whole_pages().index() * page_bytes();
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let mapping = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), bytes, access, flags)
        }?;
        Ok(Self::whole(mapping, bytes)?.fill())
    }

    /// A file without a name, mapped, with numbers: its pages are the page cache's.
    pub fn file(size: ByteCount) -> anyhow::Result<Self> {
        let bytes = size.whole_pages().index() * page_bytes();
        let name = format!("hmm-bench-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let options = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .clone();
        let file = options
            .open(&path)
            .with_context(|| format!("cannot make a file at {}", path.display()))?;
        std::fs::remove_file(&path)?;
        file.set_len(size.get())?;
        // SAFETY: a new mapping, at an address of the kernel's choice, of a file
        // that nobody else has.
        let mapping = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        Ok(Self::whole(mapping, bytes)?.fill())
    }

    fn whole(mapping: *mut std::ffi::c_void, bytes: usize) -> io::Result<Self> {
        let start = NonNull::new(mapping.cast::<u64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            mapping: start,
            mapping_bytes: bytes,
            start,
            words: bytes / size_of::<u64>(),
        })
    }

    fn fill(mut self) -> Self {
        for (number, word) in (0u64..).zip(self.words_mut()) {
            *word = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        self
    }

    /// The memory, as requests to the engine name it.
    pub fn range(&self) -> PageRange {
        let start = VirtAddr::of(self.start.as_ptr().cast_const());
        PageRange::from_pages(start, self.pages())
    }

    /// Its size.
    pub fn pages(&self) -> PageCount {
        ByteCount::new((self.words * size_of::<u64>()) as u64).whole_pages()
    }

    /// Its words.
    pub fn words(&self) -> &[u64] {
        // SAFETY: the area owns the memory, which is mapped and initialised;
        // pages that a handler places hold some numbers as well.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// Its words.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`, and nobody else has a reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.words) }
    }

    /// Loads the first word of a page, once, whatever the compiler thinks.
    pub fn touch(&self, page: usize) -> u64 {
        let word: *const u64 = &raw const self.words()[page * (page_bytes() / size_of::<u64>())];
        // SAFETY: the pointer comes from a reference to it.
        unsafe { word.read_volatile() }
    }

    /// Address of a page.
    pub(super) fn page(&self, page: usize) -> *mut u8 {
        assert!(
            page < self.pages().index(),
            "page {page} lies outside of the area"
        );
        self.start
            .as_ptr()
            .cast::<u8>()
            .wrapping_add(page * page_bytes())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is the area's own and ends with it.
        let result = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapping_bytes) };
        debug_assert!(result.is_ok(), "a mapping of its own can be unmapped");
    }
}

/// Bytes of a page, as the index type.
pub(super) const fn page_bytes() -> usize {
    PageCount::ONE.index() << PAGE_SIZE.trailing_zeros()
}
