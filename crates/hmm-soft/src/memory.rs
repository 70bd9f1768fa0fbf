//! The device's memory: one reservation of this process, cut into frames.
//!
//! The program cannot name it (no pointer into it is ever handed out), which is
//! what makes it device-private. It is aligned to 2 MiB and asks for huge
//! pages, is not inherited by forked children, and costs nothing until it is
//! touched.

use std::fmt;
use std::ptr;

use hmm_types::{
    BLOCK_SIZE, ByteCount, FrameRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRange, VirtAddr,
};
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};

use crate::{Embedder, SoftError};

/// Most frames that a device can have: a page table entry has 29 bits for the
/// frame's number, which is 2 TiB.
pub const MAX_FRAMES: u64 = 1 << 29;

/// The mapping that holds all frames.
pub(crate) struct DeviceMemory {
    base: *mut u8,
    frames: u32,
}

// SAFETY: the mapping belongs to no thread; everybody reaches it through raw
// pointers, and what two threads do to one frame at a time is their caller's
// contract (see `DeviceMemory::pointer`).
unsafe impl Send for DeviceMemory {}
// SAFETY: as for Send; the fields never change.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// Reserves `size`, rounded down to whole frames. The embedder hears of it while
    /// nobody can use it.
    pub(crate) fn reserve(
        size: ByteCount,
        populate: bool,
        embedder: &dyn Embedder,
    ) -> Result<Self, SoftError> {
        let count = size.whole_pages().get();
        let Some(frames) = u32::try_from(count)
            .ok()
            .filter(|&count| count > 0 && u64::from(count) <= MAX_FRAMES)
        else {
            return Err(SoftError::MemorySize { asked: size });
        };
        let len_bytes = PageCount::new(count).index() << PAGE_SHIFT;
        let base = map_aligned(len_bytes).map_err(|errno| SoftError::MemoryRefused {
            asked: size,
            errno: errno.raw_os_error(),
        })?;
        let memory = Self { base, frames };
        embedder.exclude(memory.range());
        let opened = memory.open(len_bytes).map_err(|(operation, errno)| {
            // SAFETY: the mapping is given up, and nobody has a pointer to it.
            unsafe { memory.release() };
            SoftError::System {
                operation,
                errno: errno.raw_os_error(),
            }
        });
        opened?;
        if populate {
            memory.populate(len_bytes);
        }
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

    fn populate(&self, len_bytes: usize) {
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

    /// Number of frames.
    pub(crate) const fn frames(&self) -> u32 {
        self.frames
    }

    /// Size of all frames.
    pub(crate) const fn size(&self) -> ByteCount {
        ByteCount::new(self.frames as u64 * PAGE_SIZE)
    }

    /// Where the frames lie.
    pub(crate) fn range(&self) -> PageRange {
        PageRange::from_pages(
            VirtAddr::of(self.base),
            PageCount::new(u64::from(self.frames)),
        )
    }

    /// The first frame's first byte.
    pub(crate) const fn base(&self) -> *mut u8 {
        self.base
    }

    /// The first byte of a run of frames. Whoever reads or writes there must
    /// own the frames, or be a kernel that has them mapped.
    ///
    /// # Panics
    /// When the device has no such frames: a write there would be anywhere.
    pub(crate) fn pointer(&self, frames: FrameRange) -> *mut u8 {
        let end = frames.first().index() + frames.count() as usize;
        assert!(
            end <= self.frames as usize,
            "{frames:?} reach out of the device's memory of {} frames",
            self.frames
        );
        // SAFETY: the line above keeps the offset inside the mapping.
        unsafe { self.base.add(frames.first().index() << PAGE_SHIFT) }
    }

    /// Gives the mapping back to the kernel.
    ///
    /// # Safety
    /// Nobody uses a pointer into it from now on, and nobody calls this again.
    pub(crate) unsafe fn release(&self) {
        // SAFETY: the range is this value's own mapping, which the caller says
        // is not used any more.
        let _ = unsafe { munmap(self.base.cast(), (self.frames as usize) << PAGE_SHIFT) };
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({})", self.range())
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

#[cfg(test)]
mod tests {
    use hmm_types::FrameId;

    use super::*;
    use crate::Standalone;

    #[test]
    fn sizes_that_make_no_sense_are_refused_by_name() {
        for size in [0, 4095, u64::MAX, (MAX_FRAMES + 1) * PAGE_SIZE] {
            let asked = ByteCount::new(size);
            let error = DeviceMemory::reserve(asked, false, &Standalone).unwrap_err();
            assert_eq!(error, SoftError::MemorySize { asked });
            assert!(error.to_string().contains(&asked.to_string()), "{error}");
        }
    }

    #[test]
    fn memory_is_aligned_writable_and_rounded_down() {
        for populate in [false, true] {
            let memory =
                DeviceMemory::reserve(ByteCount::new(5 * 4096 + 17), populate, &Standalone)
                    .unwrap();
            assert_eq!(memory.frames(), 5);
            assert_eq!(memory.size(), memory.range().bytes());
            assert!(memory.range().start().is_block_aligned());
            let last = memory.pointer(FrameRange::new(FrameId::new(4), 1));
            // SAFETY: the test owns the memory, and the frame exists.
            unsafe {
                last.write_volatile(7);
                assert_eq!(last.read_volatile(), 7);
                memory.release();
            }
        }
    }
}
