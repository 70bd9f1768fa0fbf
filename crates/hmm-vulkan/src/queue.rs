//! The copy queue.
//!
//! Where the device is the CPU, the thread that submits copies: what resolves faults then
//! does not depend on a driver that may fault itself. A fence is reached when it is handed
//! out, and waiting only tells how it went. Elsewhere the device's queue copies, fed by
//! another thread (`staging.rs`).

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm_device::{Copier, FailAt, Injector, LateFailures, LossMode};
use hmm_hal::{DeviceError, Fence, Transfer};
use hmm_types::{FrameRange, PAGE_SHIFT, VirtAddr};

use crate::memory::Memory;
use crate::staging::Staging;
use crate::stats::Counters;

/// What an injected failure leaves in the destination.
const GARBAGE: u8 = 0xDB;

/// The queue of one device.
#[derive(Debug)]
pub(crate) struct CopyQueue {
    issued: AtomicU64,
    copier: Copier,
    late: LateFailures,
    staging: Option<Staging>,
}

/// What a submission may meet.
pub(crate) struct Fate<'a> {
    pub(crate) injector: &'a Injector,
    pub(crate) counters: &'a Counters,
}

impl CopyQueue {
    /// An empty queue; the CPU copies when there is no staging.
    pub(crate) fn new(staging: Option<Staging>) -> Self {
        Self {
            issued: AtomicU64::new(0),
            copier: Copier::detect(),
            late: LateFailures::new(),
            staging,
        }
    }

    pub(crate) const fn staging(&self) -> Option<&Staging> {
        self.staging.as_ref()
    }

    /// Does the transfers, or has them done, in order.
    pub(crate) fn submit(
        &self,
        transfers: &[Transfer],
        memory: &Memory,
        fate: &Fate<'_>,
    ) -> Result<Fence, DeviceError> {
        let Fate { injector, counters } = fate;
        let only_home = transfers
            .iter()
            .all(|transfer| matches!(transfer, Transfer::ToHost { .. }));
        match injector.loss() {
            None => {}
            Some(LossMode::MemoryReadable) if only_home => {}
            Some(_) => return Err(DeviceError::Lost),
        }
        let mut failed_late = false;
        for transfer in transfers {
            memory.offset_of(frames_of(*transfer)); // checks that the frames exist
            match injector.copy_fails() {
                None => {}
                Some(fate) => {
                    counters.failures_injected.add(1);
                    if fate == FailAt::Submit {
                        return Err(DeviceError::CopyFailed);
                    }
                    failed_late = true;
                    spoil(*transfer, memory);
                }
            }
        }
        counters.submissions.add(1);
        if failed_late {
            // Fences are reached in order, this one with those before it.
            let fence = self.next_fence(&[])?;
            self.late.record(fence.0, DeviceError::CopyFailed)?;
            return Ok(fence);
        }
        count(transfers, counters);
        if self.staging.is_some() {
            return self.next_fence(transfers);
        }
        self.copy_all(transfers, memory);
        self.next_fence(&[])
    }

    fn next_fence(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        match &self.staging {
            Some(staging) => staging.push(transfers),
            None => Ok(Fence(self.issued.fetch_add(1, Ordering::Relaxed) + 1)),
        }
    }

    fn copy_all(&self, transfers: &[Transfer], memory: &Memory) {
        let lens = transfers.iter().map(|transfer| len(frames_of(*transfer)));
        let stream = self.copier.streams(lens.sum());
        for transfer in transfers {
            let frames = frames_of(*transfer);
            let Some(device) = memory.host(frames) else {
                unreachable!("without staging the CPU sees the frames");
            };
            let len = len(frames);
            // SAFETY: the trait's contract: host memory is present engine memory of that
            // length, left alone by others until the fence, and so are frames, which
            // exist. The two are different mappings, so they are apart.
            unsafe {
                match *transfer {
                    Transfer::ToDevice { host, .. } => {
                        self.copier
                            .copy(pointer(host).cast_const(), device, len, stream);
                    }
                    Transfer::ToHost { host, .. } => {
                        self.copier
                            .copy(device.cast_const(), pointer(host), len, stream);
                    }
                    Transfer::Zero { .. } => ptr::write_bytes(device, 0, len),
                    Transfer::FromProgram { .. } => {
                        unreachable!("the device does not read the program's pages")
                    }
                }
            }
        }
        if stream {
            self.copier.fence();
        }
    }

    /// Says how a submission went, when it has gone.
    pub(crate) fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        if let Some(staging) = &self.staging {
            staging.wait(fence)?;
        }
        self.late.take(fence)
    }

    /// Keeps a failure of the copying thread's.
    pub(crate) fn fail(&self, fence: u64, error: DeviceError) -> Result<(), DeviceError> {
        self.late.record(fence, error)
    }
}

pub(crate) const fn frames_of(transfer: Transfer) -> FrameRange {
    match transfer {
        Transfer::FromProgram { frames, .. }
        | Transfer::ToDevice { frames, .. }
        | Transfer::ToHost { frames, .. }
        | Transfer::Zero { frames } => frames,
    }
}

const fn len(frames: FrameRange) -> usize {
    (frames.count() as usize) << PAGE_SHIFT
}

fn count(transfers: &[Transfer], counters: &Counters) {
    for transfer in transfers {
        let bytes = len(frames_of(*transfer)) as u64;
        match transfer {
            Transfer::ToDevice { .. } | Transfer::FromProgram { .. } => {
                counters.bytes_to_device.add(bytes);
            }
            Transfer::ToHost { .. } => counters.bytes_to_host.add(bytes),
            Transfer::Zero { .. } => counters.bytes_zeroed.add(bytes),
        }
    }
    counters.copies.add(transfers.len() as u64);
}

/// Overwrites what a failed transfer was to write, where the CPU can: its contents are
/// undefined then, and whoever uses them is to notice.
fn spoil(transfer: Transfer, memory: &Memory) {
    let frames = frames_of(transfer);
    let destination = match transfer {
        Transfer::ToHost { host, .. } => Some(pointer(host)),
        _ => memory.host(frames),
    };
    if let Some(destination) = destination {
        // SAFETY: the destination is the transfer's to write, as in `copy_all`.
        unsafe { ptr::write_bytes(destination, GARBAGE, len(frames)) };
    }
}

pub(crate) fn pointer(host: VirtAddr) -> *mut u8 {
    ptr::with_exposed_provenance_mut(host.addr())
}
