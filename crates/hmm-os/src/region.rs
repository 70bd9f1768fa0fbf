//! An anonymous mapping of the engine's own.

use std::ffi::c_void;
use std::ptr;

use hmm_types::{BLOCK_SIZE, PageRange, VirtAddr};
use rustix::io::Result;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};

use crate::excluded::{exclude, include};

/// Private anonymous memory, a whole number of 2 MiB blocks and aligned to
/// them; not there in forked children. Excluded from migration as long as it can
/// be used: a device's thread that looks for memory to take along may come between
/// any two calls. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    start: *mut c_void,
    range: PageRange,
}

// SAFETY: the pointer is an address that belongs to this value; nothing here
// reads or writes through it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `blocks` blocks; pages appear when they are touched.
    pub(crate) fn reserve(blocks: u64) -> Result<Self> {
        let block = VirtAddr::new(BLOCK_SIZE).addr();
        let len = usize::try_from(blocks)
            .ok()
            .and_then(|blocks| blocks.checked_mul(block))
            .filter(|len| *len > 0 && *len < usize::MAX / 4)
            .ok_or(rustix::io::Errno::INVAL)?;
        // One block more, so that an aligned part lies inside.
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len + block,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let head = base.addr().next_multiple_of(block) - base.addr();
        let start = base.wrapping_byte_add(head);
        // SAFETY: both parts lie inside the mapping just made, which nobody
        // else knows, and outside of what is kept.
        unsafe {
            if head > 0 {
                munmap(base, head)?;
            }
            munmap(start.wrapping_byte_add(len), block - head)?;
        }
        let range = PageRange::new(VirtAddr::of(start), len as u64)
            .map_err(|_| rustix::io::Errno::INVAL)?;
        // While it cannot be used, so that it never counts as the program's.
        exclude(range);
        let region = Self { start, range };
        // SAFETY: the mapping just made, which nobody uses yet.
        unsafe { mprotect(start, len, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        region.advise(Advice::LinuxDontFork)?;
        Ok(region)
    }

    /// Gives the memory back to the kernel; the addresses stay taken.
    pub(crate) fn empty(&self) {
        let len = self.range.pages().bytes_usize();
        // SAFETY: the region is the engine's own and nothing in it is needed.
        let _ = unsafe { madvise(self.start, len, Advice::LinuxDontNeed) };
    }

    pub(crate) const fn range(&self) -> PageRange {
        self.range
    }

    /// Asks for transparent huge pages, or for none.
    pub(crate) fn prefer_huge(&self, huge: bool) -> Result<()> {
        self.advise(if huge {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        })
    }

    /// Has the kernel fill in all pages.
    pub(crate) fn populate(&self) -> Result<()> {
        match self.advise(Advice::LinuxPopulateWrite) {
            // Before Linux 5.14: touch them.
            Err(rustix::io::Errno::INVAL) => {
                for page in self.range.iter_pages() {
                    let offset = page.addr() - self.range.start().addr();
                    let byte = self.start.wrapping_byte_add(offset).cast::<u8>();
                    // SAFETY: a byte of this value's own mapping.
                    unsafe { byte.write_volatile(0) };
                }
                Ok(())
            }
            result => result,
        }
    }

    fn advise(&self, advice: Advice) -> Result<()> {
        // SAFETY: the memory is this value's own; none of the advices used
        // here drops data.
        unsafe { madvise(self.start, self.range.pages().bytes_usize(), advice) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: nobody uses the memory any more.
        let _ = unsafe { munmap(self.start, self.range.pages().bytes_usize()) };
        include(self.range);
    }
}
