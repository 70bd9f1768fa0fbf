//! The copy queue.
//!
//! The thread that submits does the copying: on the fault path a hop to another
//! thread would cost more than the copy of a page. With a large copy another one
//! helps, if there is just that one. So a fence is reached when it is handed out, and
//! waiting for it only tells how it went.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm_device::{Copier, FailAt, Injector, LateFailures, LossMode};
use hmm_hal::{DeviceError, Fence, Transfer};
use hmm_types::{FrameRange, PAGE_SHIFT, VirtAddr};

use crate::guard;
use crate::helper::Helper;
use crate::memory::DeviceMemory;
use crate::stats::Counters;

/// What an injected failure leaves in the destination.
const GARBAGE: u8 = 0xDB;

/// The queue of one device.
pub(crate) struct CopyQueue {
    issued: AtomicU64,
    copier: Copier,
    helper: Helper,
    late: LateFailures,
}

impl CopyQueue {
    /// An empty queue.
    pub(crate) fn new() -> Self {
        Self {
            issued: AtomicU64::new(0),
            copier: Copier::detect(),
            helper: Helper::new(),
            late: LateFailures::new(),
        }
    }

    /// Does the transfers, in order.
    pub(crate) fn submit(
        &self,
        transfers: &[Transfer],
        memory: &DeviceMemory,
        injector: &Injector,
        counters: &Counters,
    ) -> Result<Fence, DeviceError> {
        match injector.loss() {
            None => {}
            Some(LossMode::MemoryReadable)
                if transfers
                    .iter()
                    .all(|transfer| matches!(transfer, Transfer::ToHost { .. })) => {}
            Some(_) => return Err(DeviceError::Lost),
        }
        let mut failed_late = false;
        for transfer in transfers {
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
        let fence = self.issued.fetch_add(1, Ordering::Relaxed) + 1;
        if failed_late {
            self.late.record(fence, DeviceError::CopyFailed)?;
        } else {
            self.transfer_all(transfers, memory, counters)?;
        }
        counters.submissions.add(1);
        Ok(Fence(fence))
    }

    fn transfer_all(
        &self,
        transfers: &[Transfer],
        memory: &DeviceMemory,
        counters: &Counters,
    ) -> Result<(), DeviceError> {
        let total_bytes = transfers
            .iter()
            .map(|transfer| len_bytes(frames_of(*transfer)))
            .sum();
        let stream = self.copier.streams(total_bytes);
        for transfer in transfers {
            let frames = frames_of(*transfer);
            let device = memory.pointer(frames);
            let len = len_bytes(frames);
            match *transfer {
                Transfer::FromProgram { place, .. } => {
                    guard::prepare();
                    // SAFETY: the frames are as below. The program's pages may go
                    // while they are read: then the guard ends the copy.
                    let copy = || unsafe {
                        self.copier
                            .copy(pointer(place).cast_const(), device, len, stream);
                    };
                    guard::attempt(copy).map_err(|_| DeviceError::CopyFailed)?;
                    counters.bytes_to_device.add(len as u64);
                }
                // SAFETY: the trait's contract: host memory is present engine
                // memory of that length, left alone by others until the fence,
                // and so are frames, which `pointer` has checked to exist. The
                // two are different mappings, so they are apart.
                Transfer::ToDevice { host, .. } => unsafe {
                    let from = pointer(host).cast_const();
                    self.helper.copy(&self.copier, from, device, len, stream);
                    counters.bytes_to_device.add(len as u64);
                },
                // SAFETY: as above.
                Transfer::ToHost { host, .. } => unsafe {
                    let (from, to) = (device.cast_const(), pointer(host));
                    self.helper.copy(&self.copier, from, to, len, stream);
                    counters.bytes_to_host.add(len as u64);
                },
                // SAFETY: as above.
                Transfer::Zero { .. } => unsafe {
                    ptr::write_bytes(device, 0, len);
                    counters.bytes_zeroed.add(len as u64);
                },
            }
        }
        if stream {
            self.copier.fence();
        }
        counters.copies.add(transfers.len() as u64);
        Ok(())
    }

    /// Body of the thread that helps with large copies.
    pub(crate) fn help(&self) {
        self.helper.run(&self.copier);
    }

    /// Ends that thread.
    pub(crate) fn close(&self) {
        self.helper.close();
    }

    /// Says how a submission went.
    pub(crate) fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        debug_assert!(
            fence.0 <= self.issued.load(Ordering::Relaxed),
            "{fence:?} was never handed out"
        );
        self.late.take(fence)
    }
}

impl fmt::Debug for CopyQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyQueue")
            .field("issued", &self.issued)
            .field("copier", &self.copier)
            .finish_non_exhaustive()
    }
}

const fn frames_of(transfer: Transfer) -> FrameRange {
    match transfer {
        Transfer::FromProgram { frames, .. }
        | Transfer::ToDevice { frames, .. }
        | Transfer::ToHost { frames, .. }
        | Transfer::Zero { frames } => frames,
    }
}

const fn len_bytes(frames: FrameRange) -> usize {
    (frames.count() as usize) << PAGE_SHIFT
}

/// Overwrites what a failed transfer was to write: its contents are undefined
/// then, and whoever uses them is to notice.
fn spoil(transfer: Transfer, memory: &DeviceMemory) {
    let frames = frames_of(transfer);
    let destination = match transfer {
        Transfer::ToHost { host, .. } => pointer(host),
        Transfer::FromProgram { .. } | Transfer::ToDevice { .. } | Transfer::Zero { .. } => {
            memory.pointer(frames)
        }
    };
    // SAFETY: the destination is the transfer's to write, as in `transfer_all`.
    unsafe { ptr::write_bytes(destination, GARBAGE, len_bytes(frames)) };
}

fn pointer(host: VirtAddr) -> *mut u8 {
    ptr::with_exposed_provenance_mut(host.addr())
}
