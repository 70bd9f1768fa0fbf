//! Failures of copies that show when their fence is waited for.
//!
//! A fence speaks for its own submission alone: many threads share a queue, and one
//! must not learn of (or consume) another's failure.

use hmm_hal::{DeviceError, Fence};
use hmm_sync::{Mutex, Rank};

/// Failures that wait to be asked for. When all places are taken, a failure
/// shows when the work is submitted.
const LATE_FAILURES: usize = 64;

#[derive(Clone, Copy, Debug)]
struct LateFailure {
    fence: u64,
    error: DeviceError,
    reported: bool,
}

/// The failures of one queue.
#[derive(Debug)]
pub struct LateFailures(Mutex<[LateFailure; LATE_FAILURES]>);

impl Default for LateFailures {
    fn default() -> Self {
        Self::new()
    }
}

impl LateFailures {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        const NONE: LateFailure = LateFailure {
            fence: 0,
            error: DeviceError::CopyFailed,
            reported: true,
        };
        Self(Mutex::new(Rank::Device, [NONE; LATE_FAILURES]))
    }

    /// Keeps a failure until its fence is waited for.
    ///
    /// # Errors
    /// The failure itself, when there is no room for it.
    pub fn record(&self, fence: u64, error: DeviceError) -> Result<(), DeviceError> {
        let mut late = self.0.lock();
        let oldest = late
            .iter_mut()
            .filter(|failure| failure.reported)
            .min_by_key(|failure| failure.fence);
        let place = oldest.ok_or(error)?;
        *place = LateFailure {
            fence,
            error,
            reported: false,
        };
        Ok(())
    }

    /// Says how the submission with this fence went.
    ///
    /// # Errors
    /// Its failure; asked for again, the same, as long as its place is not needed.
    pub fn take(&self, fence: Fence) -> Result<(), DeviceError> {
        let mut late = self.0.lock();
        match late.iter_mut().find(|failure| failure.fence == fence.0) {
            Some(failure) if fence.0 != 0 => {
                failure.reported = true;
                Err(failure.error)
            }
            _ => Ok(()),
        }
    }
}
