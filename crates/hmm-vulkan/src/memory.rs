//! The device's frames: one buffer, cut into pages.

use hmm_device::Reservation;
use hmm_types::{BLOCK_SIZE, ByteCount, FrameRange, PAGE_SHIFT, PAGE_SIZE};

use crate::VulkanError;
use crate::buffer::{Buffer, Use};
use crate::gpu::Gpu;

/// All frames of a device.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) buffer: Buffer,
    /// Where the first frame lies in the buffer: at a multiple of 2 MiB for the device.
    pub(crate) offset: u64,
    frames: u32,
}

impl Memory {
    /// How many frames `asked` is, if the device can have that many.
    pub(crate) fn frames_in(gpu: &Gpu, asked: ByteCount) -> Result<u32, VulkanError> {
        let physical = &gpu.physical;
        let bad = |limit, reason| VulkanError::MemorySize {
            asked,
            device: gpu.name().to_owned(),
            limit: ByteCount::new(limit),
            reason,
        };
        let bytes = asked.whole_pages().bytes().get();
        if bytes == 0 {
            return Err(bad(PAGE_SIZE, "the least, one page"));
        }
        // Room to move the first frame to a multiple of 2 MiB.
        let largest = physical.largest_allocation.saturating_sub(BLOCK_SIZE);
        if bytes > largest {
            return Err(bad(
                largest,
                "the most that one allocation of its driver holds",
            ));
        }
        let heap = physical.description.memory.get();
        if bytes > heap {
            return Err(bad(heap, "the size of its largest heap"));
        }
        let pages = u32::try_from(bytes >> PAGE_SHIFT);
        pages.map_err(|_| {
            bad(
                u64::from(u32::MAX) << PAGE_SHIFT,
                "the most frames there can be",
            )
        })
    }

    /// Frames in memory of the driver's.
    pub(crate) fn new(gpu: &Gpu, frames: u32) -> Result<Self, VulkanError> {
        let bytes = u64::from(frames) << PAGE_SHIFT;
        let buffer = Buffer::new(gpu, bytes + BLOCK_SIZE, Use::Frames)?;
        let offset = buffer.device.next_multiple_of(BLOCK_SIZE) - buffer.device;
        Ok(Self {
            buffer,
            offset,
            frames,
        })
    }

    /// Frames at the start of a reservation.
    ///
    /// # Safety
    /// The reservation is as large, and stays until the memory is destroyed.
    pub(crate) unsafe fn import(
        gpu: &Gpu,
        frames: u32,
        memory: &Reservation,
    ) -> Result<Self, VulkanError> {
        let bytes = u64::from(frames) << PAGE_SHIFT;
        // SAFETY: the caller's contract.
        let buffer = unsafe { Buffer::import(gpu, memory.base(), bytes, Use::Frames) }?;
        Ok(Self {
            buffer,
            offset: 0,
            frames,
        })
    }

    /// Number of frames.
    pub(crate) const fn frames(&self) -> u32 {
        self.frames
    }

    /// Size of all frames.
    pub(crate) const fn size(&self) -> ByteCount {
        ByteCount::new((self.frames as u64) << PAGE_SHIFT)
    }

    /// Where a run of frames begins in the buffer.
    ///
    /// # Panics
    /// When the device has no such frames.
    pub(crate) fn offset_of(&self, frames: FrameRange) -> u64 {
        let end = frames.first().index() + frames.count() as usize;
        assert!(
            end <= self.frames as usize,
            "{frames:?} reach out of the device's memory of {} frames",
            self.frames
        );
        self.offset + (u64::from(frames.first().get()) << PAGE_SHIFT)
    }

    /// Its device address.
    pub(crate) fn device(&self, frames: FrameRange) -> u64 {
        self.buffer.device + self.offset_of(frames)
    }

    /// Where the CPU finds it, where it does.
    pub(crate) fn host(&self, frames: FrameRange) -> Option<*mut u8> {
        let offset = self.offset_of(frames);
        let host = self.buffer.host;
        #[allow(
            clippy::cast_possible_truncation,
            reason = "an offset into memory that is mapped here"
        )]
        (!host.is_null()).then(|| host.wrapping_add(offset as usize))
    }
}
