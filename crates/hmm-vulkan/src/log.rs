//! The fault log: a ring of addresses that kernels missed.
//!
//! A kernel takes a number (`log_count`), and writes its entry there unless the host
//! (`log_served`) is a whole ring behind. The host reads, overwrites with ones, and moves
//! on; a number whose entry is still ones was not written yet, or never will be. An entry
//! that is lost is asked for again, as long as its page's wanted bit is cleared: so after
//! a loss all of them are.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hmm_types::{Access, VirtAddr};

use crate::area::Area;

/// What stands in the log where nothing does.
pub(crate) const UNWRITTEN: u64 = u64::MAX;
/// An entry whose number was taken is written by then, if the kernel still runs.
const WRITTEN: Duration = Duration::from_millis(100);

/// A miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Miss {
    pub(crate) address: VirtAddr,
    pub(crate) access: Access,
}

impl Miss {
    pub(crate) const NONE: Self = Self::parse(0);

    /// From an address whose lowest bit says whether it was to be written to.
    const fn parse(entry: u64) -> Self {
        Self {
            address: VirtAddr::new(entry & !1),
            access: if entry & 1 == 1 {
                Access::Write
            } else {
                Access::Read
            },
        }
    }
}

impl Area {
    /// Moves all that is in the log to `misses`. False when some were lost. While the
    /// kernel runs, entries may be on their way.
    pub(crate) fn read_log(&self, runs: bool, misses: &mut hmm_mem::Vec<Miss>) -> bool {
        let control = self.control();
        let count = control.log_count.load(Ordering::SeqCst);
        let first = control.log_served.load(Ordering::SeqCst);
        let pending = count.wrapping_sub(first);
        let entries = self.log_entries();
        let mut complete = pending <= entries;
        let since = Instant::now();
        for offset in 0..pending.min(entries) {
            let slot = self.log(first.wrapping_add(offset));
            let mut entry = slot.load(Ordering::SeqCst);
            while entry == UNWRITTEN && runs && since.elapsed() < WRITTEN {
                std::thread::yield_now();
                entry = slot.load(Ordering::SeqCst);
            }
            if entry == UNWRITTEN {
                complete = false;
            } else {
                slot.store(UNWRITTEN, Ordering::SeqCst);
                misses.push(Miss::parse(entry));
            }
        }
        control.log_served.store(count, Ordering::SeqCst);
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_was_missed() {
        let miss = |address, access| Miss {
            address: VirtAddr::new(address),
            access,
        };
        assert_eq!(Miss::parse(0x7001), miss(0x7000, Access::Write));
        assert_eq!(Miss::parse(0x7010), miss(0x7010, Access::Read));
        assert_eq!(Miss::parse(0), miss(0, Access::Read));
    }
}
