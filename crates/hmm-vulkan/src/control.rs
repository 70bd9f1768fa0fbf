//! The control block: what a running kernel and the host tell each other.
//!
//! Its layout is a contract with the pass that instruments kernels
//! (`docs/vulkan.md`). Both sides write to it at any time, so it is atomics only.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// One per device, in memory that both see.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// Host: nonzero has every invocation return at its next miss or loop check.
    pub(crate) stop: AtomicU32,
    /// Host: unmappings that wait. Nonzero keeps parked what is parked.
    pub(crate) yielding: AtomicU32,
    /// Kernel: misses counted so far, which wraps around. One is written at its number
    /// modulo the capacity, or nowhere if `log_served` was that far behind.
    pub(crate) log_count: AtomicU32,
    pub(crate) log_capacity: AtomicU32,
    /// Kernel: subgroups under way in the low half, those of them that are parked in
    /// the high one. Apart for the kernel, but the host has to see both at one time.
    pub(crate) subgroups: AtomicU64,
    /// Kernel: invocations that returned early.
    pub(crate) unfinished: AtomicU32,
    /// Kernel: invocations that gave up after they had written.
    pub(crate) torn: AtomicU32,
    pub(crate) table: AtomicU64,
    pub(crate) log: AtomicU64,
    /// Host: where the done bits are; 0 when nobody asks for them.
    pub(crate) done: AtomicU64,
    pub(crate) delta: AtomicU64,
    pub(crate) mask: AtomicU64,
    pub(crate) base: AtomicU64,
    pub(crate) base_group: [AtomicU32; 3],
    /// Host: entries of the log that it has read, and overwritten with ones.
    pub(crate) log_served: AtomicU32,
    pub(crate) groups: [AtomicU32; 3],
    pub(crate) dispatched: [AtomicU32; 3],
    /// Polls after which a stalled invocation gives up.
    pub(crate) stall_polls: AtomicU32,
    _end: u32,
}

const _: () = {
    assert!(size_of::<Control>() == 128);
    assert!(offset_of!(Control, stop) == 0);
    assert!(offset_of!(Control, yielding) == 4);
    assert!(offset_of!(Control, log_count) == 8);
    assert!(offset_of!(Control, log_capacity) == 12);
    assert!(offset_of!(Control, subgroups) == 16);
    assert!(offset_of!(Control, unfinished) == 24);
    assert!(offset_of!(Control, torn) == 28);
    assert!(offset_of!(Control, table) == 32);
    assert!(offset_of!(Control, log) == 40);
    assert!(offset_of!(Control, done) == 48);
    assert!(offset_of!(Control, delta) == 56);
    assert!(offset_of!(Control, mask) == 64);
    assert!(offset_of!(Control, base) == 72);
    assert!(offset_of!(Control, base_group) == 80);
    assert!(offset_of!(Control, log_served) == 92);
    assert!(offset_of!(Control, groups) == 96);
    assert!(offset_of!(Control, dispatched) == 108);
    assert!(offset_of!(Control, stall_polls) == 120);
};

impl Control {
    /// Ready for the next dispatch of a launch over `groups`.
    pub(crate) fn prepare(&self, groups: [u32; 3], base: [u32; 3], dispatched: [u32; 3]) {
        self.log_count.store(0, Ordering::Relaxed);
        self.log_served.store(0, Ordering::Relaxed);
        self.subgroups.store(0, Ordering::Relaxed);
        self.unfinished.store(0, Ordering::Relaxed);
        self.torn.store(0, Ordering::Relaxed);
        for axis in 0..3 {
            self.groups[axis].store(groups[axis], Ordering::Relaxed);
            self.base_group[axis].store(base[axis], Ordering::Relaxed);
            self.dispatched[axis].store(dispatched[axis], Ordering::Relaxed);
        }
    }

    /// Whether no subgroup is between looking up an address and using it.
    pub(crate) fn all_parked(&self) -> bool {
        let both = self.subgroups.load(Ordering::SeqCst);
        both & u64::from(u32::MAX) == both >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_counts_are_seen_at_one_time() {
        let control = Control::default();
        assert!(control.all_parked());
        control.subgroups.store(3 | 2 << 32, Ordering::SeqCst);
        assert!(!control.all_parked());
        control.subgroups.store(3 | 3 << 32, Ordering::SeqCst);
        assert!(control.all_parked());
    }
}
