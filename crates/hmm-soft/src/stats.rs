//! What the device counts.

use hmm_device::Count;

/// A worker's own counters: one writer, many readers.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    pub(crate) tlb_misses: Count,
    pub(crate) faults: Count,
    pub(crate) retries: Count,
    pub(crate) in_place: Count,
    pub(crate) thrash_in_place: Count,
}

/// The device's counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) launches: Count,
    pub(crate) shootdowns: Count,
    pub(crate) shootdown_barriers: Count,
    pub(crate) shootdown_waits: Count,
    pub(crate) submissions: Count,
    pub(crate) copies: Count,
    pub(crate) bytes_to_device: Count,
    pub(crate) bytes_to_host: Count,
    pub(crate) bytes_zeroed: Count,
    pub(crate) failures_injected: Count,
}

/// A snapshot of what the device has counted since it was opened.
///
/// Accesses that hit are too many to count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SoftStats {
    /// Kernels launched.
    pub launches: u64,
    /// Accesses for which a worker had to walk the page table.
    pub tlb_misses: u64,
    /// Faults handed to the engine.
    pub faults: u64,
    /// Faults that were answered with "wait and look again".
    pub retries: u64,
    /// Accesses to system memory in place.
    pub in_place: u64,
    /// Accesses done in place because their page would not stay on the device.
    pub thrash_in_place: u64,
    /// Unmappings that took a mapping away.
    pub shootdowns: u64,
    /// Those of them that met a running kernel, and so cost a barrier.
    pub shootdown_barriers: u64,
    /// Workers that one of those had to wait for.
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
    /// Bytes of the page table now.
    pub page_table_bytes: u64,
}

impl Counters {
    /// All numbers, with those of the workers summed up.
    pub(crate) fn snapshot<'a>(
        &self,
        workers: impl Iterator<Item = &'a WorkerCounters>,
        page_table_bytes: u64,
    ) -> SoftStats {
        let mut stats = SoftStats {
            launches: self.launches.get(),
            shootdowns: self.shootdowns.get(),
            shootdown_barriers: self.shootdown_barriers.get(),
            shootdown_waits: self.shootdown_waits.get(),
            submissions: self.submissions.get(),
            copies: self.copies.get(),
            bytes_to_device: self.bytes_to_device.get(),
            bytes_to_host: self.bytes_to_host.get(),
            bytes_zeroed: self.bytes_zeroed.get(),
            failures_injected: self.failures_injected.get(),
            page_table_bytes,
            ..SoftStats::default()
        };
        for worker in workers {
            stats.tlb_misses += worker.tlb_misses.get();
            stats.faults += worker.faults.get();
            stats.retries += worker.retries.get();
            stats.in_place += worker.in_place.get();
            stats.thrash_in_place += worker.thrash_in_place.get();
        }
        stats
    }
}
