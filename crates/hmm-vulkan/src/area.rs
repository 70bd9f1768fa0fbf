//! Memory that the host and kernels share: control block, page table, log, done bits.
//!
//! ```text
//! control | root of the table | log | done bits | leaves of the table
//! ```

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::VulkanError;
use crate::buffer::{Buffer, Use};
use crate::config::{DISPATCH_INVOCATIONS, MAX_LOG_ENTRIES, VulkanConfig};
use crate::control::Control;
use crate::gpu::Gpu;
use crate::log::UNWRITTEN;
use crate::table::{LEAF_BYTES, Place, ROOT_BYTES};

const PAGE: usize = 4096;
const ROOT: usize = PAGE;
const LOG: usize = (ROOT + ROOT_BYTES).next_multiple_of(PAGE);
const LOG_BYTES: usize = MAX_LOG_ENTRIES as usize * 8;
const DONE: usize = (LOG + LOG_BYTES).next_multiple_of(PAGE);
#[allow(clippy::cast_possible_truncation, reason = "2^20")]
const DONE_WORDS: usize = DISPATCH_INVOCATIONS as usize / 32;
/// Aligned like a leaf's entries are used: 64 KiB.
const LEAVES: usize = (DONE + DONE_WORDS * 4).next_multiple_of(64 << 10);

/// The shared memory of one device.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) buffer: Buffer,
    log_entries: u32,
}

impl Area {
    /// Bytes with so many leaves.
    pub(crate) const fn bytes(leaves: u32) -> usize {
        LEAVES + leaves as usize * LEAF_BYTES
    }

    /// In memory of the driver's, which is cleared.
    pub(crate) fn new(gpu: &Gpu, config: &VulkanConfig<'_>) -> Result<Self, VulkanError> {
        let bytes = Self::bytes(config.leaves);
        let buffer = Buffer::new(gpu, bytes as u64, Use::Shared)?;
        // SAFETY: the buffer is mapped for that many bytes, and nobody else's yet.
        unsafe { ptr::write_bytes(buffer.host, 0, bytes) };
        Ok(Self::begin(buffer, config.log_entries))
    }

    /// In memory of this process.
    ///
    /// # Safety
    /// There are that many bytes, which are zero and stay until the area is destroyed.
    pub(crate) unsafe fn import(
        gpu: &Gpu,
        host: *mut u8,
        config: &VulkanConfig<'_>,
    ) -> Result<Self, VulkanError> {
        let bytes = Self::bytes(config.leaves).next_multiple_of(PAGE);
        // SAFETY: the caller's contract.
        let buffer = unsafe { Buffer::import(gpu, host, bytes as u64, Use::Shared) }?;
        Ok(Self::begin(buffer, config.log_entries))
    }

    fn begin(buffer: Buffer, log_entries: u32) -> Self {
        let area = Self {
            buffer,
            log_entries,
        };
        let control = area.control();
        control.log_capacity.store(log_entries, Ordering::Relaxed);
        control.log.store(area.place(LOG).device, Ordering::Relaxed);
        let root = area.root().device;
        control.table.store(root, Ordering::Relaxed);
        area.clear_log();
        area
    }

    const fn place(&self, offset: usize) -> Place {
        Place {
            host: self.buffer.host.wrapping_add(offset),
            device: self.buffer.device + offset as u64,
        }
    }

    pub(crate) const fn root(&self) -> Place {
        self.place(ROOT)
    }

    pub(crate) const fn leaves(&self) -> Place {
        self.place(LEAVES)
    }

    pub(crate) fn control(&self) -> &Control {
        // SAFETY: the area begins with one, zero or filled in, aligned to a page; it is
        // atomics only, and stays as long as the area.
        unsafe { &*self.buffer.host.cast::<Control>() }
    }

    /// Device address of the control block.
    pub(crate) const fn control_address(&self) -> u64 {
        self.buffer.device
    }

    /// Entries of the log.
    pub(crate) const fn log_entries(&self) -> u32 {
        self.log_entries
    }

    /// Device address of the done bits.
    pub(crate) const fn done_address(&self) -> u64 {
        self.place(DONE).device
    }

    /// The log's entry with this number: the log is a ring.
    pub(crate) fn log(&self, number: u32) -> &AtomicU64 {
        let index = number % self.log_entries;
        // SAFETY: the log has that entry, which host and device use as one word.
        unsafe { &*self.place(LOG).host.cast::<AtomicU64>().add(index as usize) }
    }

    /// Nothing is in the log.
    pub(crate) fn clear_log(&self) {
        for number in 0..self.log_entries {
            self.log(number).store(UNWRITTEN, Ordering::Relaxed);
        }
    }

    /// The done bits of the first so many invocations.
    pub(crate) fn done(&self, invocations: u64) -> &[AtomicU32] {
        let words = invocations.div_ceil(32).min(DONE_WORDS as u64);
        #[allow(clippy::cast_possible_truncation, reason = "2^15 at most")]
        let words = words as usize;
        // SAFETY: there are that many words, used as atomics by both sides; they stay as
        // long as the area.
        unsafe { std::slice::from_raw_parts(self.place(DONE).host.cast::<AtomicU32>(), words) }
    }

    /// No invocation of the first so many is done.
    pub(crate) fn clear_done(&self, invocations: u64) {
        for word in self.done(invocations) {
            word.store(0, Ordering::Relaxed);
        }
    }
}
