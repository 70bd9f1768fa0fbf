//! Address space of this process that is a device's.

use std::fmt;
use std::ptr;

use hmm_types::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRange, VirtAddr};
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};

use crate::Embedder;

/// Why a device gets no memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReservationError {
    /// The kernel has no address space for it.
    #[error("the kernel refused the address space (error {errno})")]
    Refused {
        /// The kernel's error number.
        errno: i32,
    },
    /// Another system call failed.
    #[error("{operation} failed with error {errno}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The kernel's error number.
        errno: i32,
    },
}

/// Whole pages at a multiple of 2 MiB, zero at first, which nobody but the device
/// knows. They ask for huge pages, are not inherited by forked children, and cost
/// nothing until they are touched.
pub struct Reservation {
    base: *mut u8,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to no thread; everybody reaches it through raw
// pointers.
unsafe impl Send for Reservation {}
// SAFETY: as for Send; the fields never change.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len_bytes`, a multiple of the page size. The embedder hears of it
    /// while nobody can use it.
    ///
    /// # Errors
    /// [`ReservationError`]. What the embedder has heard of may be excluded then,
    /// but is not there.
    pub fn new(len_bytes: usize, embedder: &dyn Embedder) -> Result<Self, ReservationError> {
        let base = map_aligned(len_bytes).map_err(|errno| ReservationError::Refused {
            errno: errno.raw_os_error(),
        })?;
        let memory = Self { base, len_bytes };
        embedder.exclude(memory.range());
        let opened = memory.open(len_bytes).map_err(|(operation, errno)| {
            // SAFETY: the mapping is given up, and nobody has a pointer to it.
            unsafe { memory.release() };
            ReservationError::System {
                operation,
                errno: errno.raw_os_error(),
            }
        });
        opened?;
        Ok(memory)
    }

    /// Lets the mapping be used.
    fn open(&self, len_bytes: usize) -> Result<(), (&'static str, Errno)> {
        let start = self.base.cast();
        // SAFETY: the mapping just made, which nobody uses yet.
        unsafe {
            // Huge pages are a wish (a kernel without them says EINVAL).
            let _ = madvise(start, len_bytes, Advice::LinuxHugepage);
            // Inherited frames would cost a child copy-on-write faults for memory
            // that it cannot use.
            madvise(start, len_bytes, Advice::LinuxDontFork)
                .map_err(|errno| ("madvise(MADV_DONTFORK)", errno))?;
            let access = MprotectFlags::READ | MprotectFlags::WRITE;
            mprotect(start, len_bytes, access).map_err(|errno| ("mprotect", errno))
        }
    }

    /// Touches all of it, so that first use takes no page fault of the kernel's.
    pub fn populate(&self) {
        let len_bytes = self.len_bytes;
        // SAFETY: populating changes no contents.
        let done = unsafe { madvise(self.base.cast(), len_bytes, Advice::LinuxPopulateWrite) };
        if done.is_ok() {
            return;
        }
        for offset in (0..len_bytes).step_by(1 << PAGE_SHIFT) {
            // SAFETY: the offset lies inside the mapping, and nobody else knows
            // it yet; fresh memory is zero already.
            unsafe { self.base.add(offset).write_volatile(0) };
        }
    }

    /// Where it lies.
    #[must_use]
    pub fn range(&self) -> PageRange {
        let pages = PageCount::new(self.len_bytes as u64 / PAGE_SIZE);
        PageRange::from_pages(VirtAddr::of(self.base), pages)
    }

    /// The first byte.
    #[must_use]
    pub const fn base(&self) -> *mut u8 {
        self.base
    }

    /// Gives the mapping back to the kernel.
    ///
    /// # Safety
    /// Nobody uses a pointer into it from now on, and nobody calls this again.
    pub unsafe fn release(&self) {
        // SAFETY: the range is this value's own mapping, which the caller says
        // is not used any more.
        let _ = unsafe { munmap(self.base.cast(), self.len_bytes) };
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({})", self.range())
    }
}

/// Maps `len_bytes` at a multiple of 2 MiB, of no use yet: maps more, and cuts the
/// ends off.
fn map_aligned(len_bytes: usize) -> rustix::io::Result<*mut u8> {
    let align = PageCount::new(BLOCK_SIZE / PAGE_SIZE).index() << PAGE_SHIFT;
    let asked = len_bytes + align;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice
    // touches nothing that exists.
    let mapped: *mut u8 = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            asked,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    }
    .cast();
    let head = mapped.align_offset(align);
    // SAFETY: `head < align`, so head and what follows it lie in the mapping.
    let base = unsafe { mapped.add(head) };
    if head > 0 {
        // SAFETY: the part before the aligned start is not used by anybody.
        unsafe { munmap(mapped.cast(), head)? };
    }
    let tail = asked - head - len_bytes;
    if tail > 0 {
        // SAFETY: the part behind the frames is not used by anybody.
        unsafe { munmap(base.add(len_bytes).cast(), tail)? };
    }
    Ok(base)
}
