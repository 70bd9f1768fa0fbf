//! What the device counts.

use std::time::Duration;

use hmm_device::Count;
use hmm_types::PAGE_SHIFT;

/// The device's counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) launches: Count,
    pub(crate) dispatches: Count,
    pub(crate) faults: Count,
    pub(crate) retries: Count,
    pub(crate) log_overflows: Count,
    pub(crate) shootdowns: Count,
    pub(crate) shootdown_waits: Count,
    pub(crate) submissions: Count,
    pub(crate) copies: Count,
    pub(crate) bytes_to_device: Count,
    pub(crate) bytes_to_host: Count,
    pub(crate) bytes_zeroed: Count,
    pub(crate) failures_injected: Count,
    pub(crate) imports: Count,
    pub(crate) import_failures: Count,
    pub(crate) bytes_imported: Count,
    pub(crate) copies_imported: Count,
}

/// A snapshot of what the device has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VulkanStats {
    /// Kernels launched.
    pub launches: u64,
    /// Dispatches that they took.
    pub dispatches: u64,
    /// Faults handed to the engine.
    pub faults: u64,
    /// Faults that were answered with "wait and look again".
    pub retries: u64,
    /// Times that the log did not hold all misses.
    pub log_overflows: u64,
    /// Unmappings that took a mapping away.
    pub shootdowns: u64,
    /// Those of them that had to wait for a kernel.
    pub shootdown_waits: u64,
    /// Submissions to the copy queue.
    pub submissions: u64,
    /// Transfers done.
    pub copies: u64,
    /// Bytes copied from host memory into frames.
    pub bytes_to_device: u64,
    /// Bytes copied from frames into host memory.
    pub bytes_to_host: u64,
    /// Bytes of frames zeroed.
    pub bytes_zeroed: u64,
    /// Failures that were injected.
    pub failures_injected: u64,
    /// Pieces of system memory imported for use in place.
    pub imports: u64,
    /// Pages that could not be.
    pub import_failures: u64,
    /// Bytes of those pieces.
    pub bytes_imported: u64,
    /// Pieces that are imported now.
    pub imported_now: u64,
    /// Pieces of copies that were imported instead of going through staging memory.
    pub copies_imported: u64,
    /// Leaves of the page table in use: GiBs in which something is, or was, mapped.
    pub leaves: u64,
    /// Ranges of the driver's that are excluded from migration.
    pub driver_ranges: u64,
    /// The driver's thread shares the program's main heap, which is not excluded.
    pub shares_heap: bool,
}

impl Counters {
    /// Pages that have come to the device. (More frames are handed out: what a migration
    /// does not need after all is given back.)
    pub(crate) fn pages_come(&self) -> u64 {
        (self.bytes_to_device.get() + self.bytes_zeroed.get()) >> PAGE_SHIFT
    }

    pub(crate) fn snapshot(&self) -> VulkanStats {
        VulkanStats {
            launches: self.launches.get(),
            dispatches: self.dispatches.get(),
            faults: self.faults.get(),
            retries: self.retries.get(),
            log_overflows: self.log_overflows.get(),
            shootdowns: self.shootdowns.get(),
            shootdown_waits: self.shootdown_waits.get(),
            submissions: self.submissions.get(),
            copies: self.copies.get(),
            bytes_to_device: self.bytes_to_device.get(),
            bytes_to_host: self.bytes_to_host.get(),
            bytes_zeroed: self.bytes_zeroed.get(),
            failures_injected: self.failures_injected.get(),
            imports: self.imports.get(),
            import_failures: self.import_failures.get(),
            bytes_imported: self.bytes_imported.get(),
            copies_imported: self.copies_imported.get(),
            ..VulkanStats::default()
        }
    }
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchReport {
    /// Dispatches that it took.
    pub dispatches: u64,
    /// Those of them that ran invocations again whose pages had been missing.
    pub repeats: u64,
    /// Faults handed to the engine.
    pub faults: u64,
    /// Faults that were answered with "wait and look again".
    pub retries: u64,
    /// Times that the log did not hold all misses.
    pub log_overflows: u64,
    /// What was added to each pointer, where all that the launch named was at one
    /// distance from its frames; the page table was walked where there is none.
    pub distance: Option<u64>,
    /// Time from the launch's turn to its end.
    pub elapsed: Duration,
}
