//! The device's memory: one reservation of this process, cut into frames.
//!
//! The program cannot name it (no pointer into it is ever handed out), which is
//! what makes it device-private. It is aligned to 2 MiB and asks for huge
//! pages, is not inherited by forked children, and costs nothing until it is
//! touched.

use std::fmt;

use hmm_device::{Reservation, ReservationError};
use hmm_types::{ByteCount, FrameRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRange};

use crate::{Embedder, SoftError};

/// Most frames that a device can have: a page table entry has 29 bits for the
/// frame's number, which is 2 TiB.
pub const MAX_FRAMES: u64 = 1 << 29;

/// The mapping that holds all frames. What two threads do to one frame at a time
/// is their caller's contract (see [`DeviceMemory::pointer`]).
pub(crate) struct DeviceMemory {
    memory: Reservation,
    frames: u32,
}

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
        let memory = Reservation::new(len_bytes, embedder).map_err(|error| match error {
            ReservationError::Refused { errno } => SoftError::MemoryRefused { asked: size, errno },
            ReservationError::System { operation, errno } => SoftError::System { operation, errno },
        })?;
        if populate {
            memory.populate();
        }
        Ok(Self { memory, frames })
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
        self.memory.range()
    }

    /// The first frame's first byte.
    pub(crate) const fn base(&self) -> *mut u8 {
        self.memory.base()
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
        unsafe { self.base().add(frames.first().index() << PAGE_SHIFT) }
    }

    /// Gives the mapping back to the kernel.
    ///
    /// # Safety
    /// Nobody uses a pointer into it from now on, and nobody calls this again.
    pub(crate) unsafe fn release(&self) {
        // SAFETY: the caller's contract.
        unsafe { self.memory.release() };
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({})", self.range())
    }
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
