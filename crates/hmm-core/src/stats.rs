//! What happened so far, in numbers: nothing slower or weaker than the best way
//! happens without being counted here.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets of a [`LatencyHistogram`]: eight for each power of two nanoseconds.
pub const LATENCY_BUCKETS: usize = 8 * 40;

/// Latencies in buckets that are at most an eighth wide. Recording one is one
/// atomic addition, so the fault path can do it.
#[derive(Debug)]
pub struct LatencyHistogram([AtomicU64; LATENCY_BUCKETS]);

impl LatencyHistogram {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; LATENCY_BUCKETS])
    }

    /// The bucket of a latency: its power of two and the next three bits.
    fn bucket(nanoseconds: u64) -> usize {
        let value = nanoseconds.max(8);
        let power = 63 - value.leading_zeros();
        let eighth = (value >> (power - 3)) & 7;
        ((power as usize - 3) * 8 + eighth as usize).min(LATENCY_BUCKETS - 1)
    }

    /// The largest latency that falls into a bucket.
    fn upper_bound(bucket: usize) -> u64 {
        let power = bucket / 8 + 3;
        ((8 + (bucket as u64 % 8) + 1) << (power - 3)) - 1
    }

    pub(crate) fn record(&self, nanoseconds: u64) {
        self.0[Self::bucket(nanoseconds)].fetch_add(1, Relaxed);
    }

    /// How many latencies were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// An upper bound, at most an eighth above the truth, of the latency that
    /// `per_mille` of a thousand faults do not exceed; 0 without any fault.
    #[must_use]
    pub fn quantile_ns(&self, per_mille: u64) -> u64 {
        let total = self.count();
        let rank = (total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.0.iter().enumerate() {
            seen += count.load(Relaxed);
            if total > 0 && seen >= rank {
                return Self::upper_bound(bucket);
            }
        }
        0
    }
}

macro_rules! statistics {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters of one engine since it was opened.
        #[derive(Debug)]
        pub struct Statistics {
            $($(#[doc = $doc])+ pub $name: AtomicU64,)+
            /// Time from reading a CPU fault to having resolved it.
            pub fault_latency: LatencyHistogram,
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct StatsSnapshot {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// Median time from reading a CPU fault to having resolved it, in
            /// nanoseconds.
            pub fault_p50_ns: u64,
            /// The same that 99 of 100 faults do not exceed.
            pub fault_p99_ns: u64,
        }

        impl Statistics {
            pub(crate) const fn new() -> Self {
                Self {
                    $($name: AtomicU64::new(0),)+
                    fault_latency: LatencyHistogram::new(),
                }
            }

            /// All counters now.
            #[must_use]
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot {
                    $($name: self.$name.load(Relaxed),)+
                    fault_p50_ns: self.fault_latency.quantile_ns(500),
                    fault_p99_ns: self.fault_latency.quantile_ns(990),
                }
            }
        }

        impl StatsSnapshot {
            /// Name, value and meaning of every counter, for tables.
            #[must_use]
            pub fn rows(&self) -> Vec<(&'static str, u64, &'static str)> {
                vec![$((stringify!($name), self.$name, concat!($($doc),+)),)+]
            }
        }
    };
}

statistics! {
    /// CPU faults served.
    cpu_faults,
    /// CPU faults on pages that nobody had touched yet: answered with zeros.
    zero_faults,
    /// CPU faults that found the page on its way and waited for the end.
    parked_faults,
    /// Faults of devices.
    device_faults,
    /// Pages moved from system memory to a device.
    pages_to_device,
    /// Pages moved from a device to system memory.
    pages_to_system,
    /// Pages moved between devices.
    pages_between_devices,
    /// Pages that became zeroed frames without a copy.
    pages_zeroed,
    /// Pages that moved as part of a huge page.
    huge_pages,
    /// Pages brought along by read-ahead.
    readahead_pages,
    /// Pages taken for a device's exclusive use.
    exclusive_pages,
    /// Pages evicted to make room on a device.
    evicted_pages,
    /// Pages that the program removed while they were on their way.
    doomed_pages,
    /// Structural events applied.
    structural_events,
    /// Times an operation waited for an event to be read first.
    again_retries,
    /// Slower: events that were waited for, as a later change was known first.
    overtaken_events,
    /// Weaker: of these, those whose thread was not found.
    overtaken_not_found,
    /// Slower: events that seemed to take away what had arrived there lately.
    disputed_events,
    /// Slower: pages placed by copying, as staging had no page ready.
    staging_dry,
    /// Pages given back with MADV_FREE that the kernel took while they were in
    /// staging.
    freed_in_staging,
    /// Slower: pages that left by write-protect, copy and drop.
    fallback_pages,
    /// Slower: huge pages that came home as small ones.
    huge_pages_lost,
    /// Weaker: pages stranded in staging when the way back was blocked.
    stranded_pages,
    /// Copies that failed on a device.
    copy_failures,
    /// Pages whose data was lost with a device; touching one raises SIGBUS.
    lost_pages,
    /// Pages served to forked children.
    child_pages,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_an_eighth() {
        let histogram = LatencyHistogram::new();
        for value in 1..=1000u64 {
            histogram.record(value * 100);
        }
        for (per_mille, truth) in [(500, 50_000u64), (990, 99_000)] {
            let bound = histogram.quantile_ns(per_mille);
            assert!(
                bound >= truth && bound <= truth + truth / 8 + 1,
                "{bound} for {truth}"
            );
        }
        assert_eq!(histogram.count(), 1000);
    }

    #[test]
    fn every_latency_has_a_bucket() {
        for value in [0, 1, 7, 8, 9, 1 << 20, u64::MAX] {
            let bucket = LatencyHistogram::bucket(value);
            assert!(bucket < LATENCY_BUCKETS);
            if (8..1 << 40).contains(&value) {
                assert!(LatencyHistogram::upper_bound(bucket) >= value);
            }
        }
    }
}
