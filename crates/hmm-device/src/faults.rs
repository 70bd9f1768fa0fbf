//! Failures on demand, so that what the engine does about them can be tested.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// When an injected copy failure shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailAt {
    /// When it is handed to the queue: nothing of the submission is done.
    Submit,
    /// When its fence is waited for: the destination holds garbage by then.
    Wait,
}

/// What becomes of the memory of a device that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossMode {
    /// Frames can still be copied to the host.
    MemoryReadable,
    /// Nothing works any more.
    MemoryGone,
}

const PRESENT: u8 = 0;
const LOST_READABLE: u8 = 1;
const LOST: u8 = 2;

/// The failures that a device is to show. All of it may be changed at any time
/// by any thread.
///
/// ```
/// // Of a device, which asks before it allocates.
/// let injector = hmm_device::Injector::default();
/// injector.fail_allocations(1);
/// assert!(injector.allocation_fails());
/// assert!(!injector.allocation_fails());
/// ```
#[derive(Debug, Default)]
pub struct Injector {
    allocations: AtomicU64,
    maps: AtomicU64,
    /// Copies that succeed before the failures begin.
    copies_before: AtomicU64,
    copies: AtomicU64,
    copies_fail_late: AtomicU8,
    loss: AtomicU8,
}

impl Injector {
    /// The next `count` allocations find the memory full.
    pub fn fail_allocations(&self, count: u64) {
        self.allocations.store(count, Ordering::SeqCst);
    }

    /// The next `count` mappings fail for want of memory.
    pub fn fail_maps(&self, count: u64) {
        self.maps.store(count, Ordering::SeqCst);
    }

    /// `after` transfers succeed, then `count` of them fail.
    pub fn fail_copies(&self, after: u64, count: u64, at: FailAt) {
        self.copies.store(0, Ordering::SeqCst);
        self.copies_before.store(after, Ordering::SeqCst);
        self.copies_fail_late
            .store(u8::from(at == FailAt::Wait), Ordering::SeqCst);
        self.copies.store(count, Ordering::SeqCst);
    }

    /// The device is lost from now on; there is no way back.
    pub fn lose(&self, mode: LossMode) {
        let state = match mode {
            LossMode::MemoryReadable => LOST_READABLE,
            LossMode::MemoryGone => LOST,
        };
        self.loss.fetch_max(state, Ordering::SeqCst);
    }

    /// Whether, and how, the device is lost.
    #[must_use]
    pub fn loss(&self) -> Option<LossMode> {
        match self.loss.load(Ordering::SeqCst) {
            PRESENT => None,
            LOST_READABLE => Some(LossMode::MemoryReadable),
            _ => Some(LossMode::MemoryGone),
        }
    }

    /// Decides the fate of the next allocation.
    #[must_use]
    pub fn allocation_fails(&self) -> bool {
        take_one(&self.allocations)
    }

    /// Decides the fate of the next mapping.
    #[must_use]
    pub fn map_fails(&self) -> bool {
        take_one(&self.maps)
    }

    /// Whether a transfer can fail, now or after others.
    #[must_use]
    pub fn may_fail_copies(&self) -> bool {
        self.copies.load(Ordering::Relaxed) > 0 || self.loss().is_some()
    }

    /// Decides the fate of the next transfer.
    #[must_use]
    pub fn copy_fails(&self) -> Option<FailAt> {
        if self.copies.load(Ordering::Relaxed) == 0
            || take_one(&self.copies_before)
            || !take_one(&self.copies)
        {
            return None;
        }
        Some(match self.copies_fail_late.load(Ordering::SeqCst) {
            0 => FailAt::Submit,
            _ => FailAt::Wait,
        })
    }
}

/// Takes one from a counter, if there is one.
fn take_one(counter: &AtomicU64) -> bool {
    counter.load(Ordering::Relaxed) > 0
        && counter
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            })
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_fail_after_as_many_as_said() {
        let injector = Injector::default();
        assert_eq!(injector.copy_fails(), None);
        injector.fail_copies(2, 2, FailAt::Wait);
        let fate: Vec<_> = (0..6).map(|_| injector.copy_fails()).collect();
        let late = Some(FailAt::Wait);
        assert_eq!(fate, [None, None, late, late, None, None]);
    }

    #[test]
    fn a_lost_device_does_not_come_back() {
        let injector = Injector::default();
        assert_eq!(injector.loss(), None);
        injector.lose(LossMode::MemoryGone);
        injector.lose(LossMode::MemoryReadable);
        assert_eq!(injector.loss(), Some(LossMode::MemoryGone));
    }
}
