//! A second thread for a large copy: two processors copy faster than one where
//! memory is faster than either. Whoever has the copy works on it all the while, so
//! a helper that comes late, or not at all, holds up nothing but its own last part.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hmm_device::Copier;
use hmm_sync::{Condvar, Mutex, Rank};

/// Copies of fewer bytes are not worth a wake-up.
const WORTH_BYTES: usize = 1 << 20;
/// What one of the two takes at a time.
const PART_BYTES: usize = 128 << 10;
/// How long a helper sleeps without being called.
const NAP: Duration = Duration::from_secs(60);

/// A copy that two threads work on.
#[derive(Clone, Copy)]
struct Copy {
    from: *const u8,
    to: *mut u8,
    len_bytes: usize,
    stream: bool,
}

// SAFETY: the pointers are used while the thread that has offered the copy waits, by
// the contract of `Helper::copy`.
unsafe impl Send for Copy {}

struct Offer {
    copy: Option<Copy>,
    /// Goes up with each, so that a helper takes one once.
    number: u64,
}

/// The helper of a device, as those see it who copy.
pub(crate) struct Helper {
    /// Copies that are under way, large or small. With more than one there is no
    /// processor to spare.
    copies: AtomicUsize,
    /// Somebody's copy is offered.
    taken: AtomicBool,
    offer: Mutex<Offer>,
    offered: Condvar,
    /// The next part that nobody has begun.
    next: AtomicUsize,
    /// The helper works on the offered copy.
    helps: AtomicBool,
    /// The helper is there.
    runs: AtomicBool,
    closed: AtomicBool,
}

impl Helper {
    pub(crate) const fn new() -> Self {
        Self {
            copies: AtomicUsize::new(0),
            taken: AtomicBool::new(false),
            offer: Mutex::new(
                Rank::Device,
                Offer {
                    copy: None,
                    number: 0,
                },
            ),
            offered: Condvar::new(),
            next: AtomicUsize::new(0),
            helps: AtomicBool::new(false),
            runs: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// Copies whole pages, with help if there is some to be had.
    ///
    /// # Safety
    /// As [`Copier::copy`].
    pub(crate) unsafe fn copy(
        &self,
        copier: &Copier,
        from: *const u8,
        to: *mut u8,
        len_bytes: usize,
        stream: bool,
    ) {
        let alone = self.copies.fetch_add(1, Ordering::Relaxed) == 0;
        let helped = alone && len_bytes >= WORTH_BYTES && !self.taken.swap(true, Ordering::Acquire);
        if helped {
            let copy = Copy {
                from,
                to,
                len_bytes,
                stream,
            };
            // SAFETY: the caller's contract, and it waits here for both.
            unsafe { self.share(copier, copy) };
            self.taken.store(false, Ordering::Release);
        } else {
            // SAFETY: the caller's contract.
            unsafe { copier.copy(from, to, len_bytes, stream) };
        }
        self.copies.fetch_sub(1, Ordering::Relaxed);
    }

    /// # Safety
    /// As [`Copier::copy`]; nobody else's copy is offered.
    unsafe fn share(&self, copier: &Copier, copy: Copy) {
        self.next.store(0, Ordering::Relaxed);
        {
            let mut offer = self.offer.lock();
            offer.copy = Some(copy);
            offer.number += 1;
        }
        self.offered.notify_one();
        // SAFETY: the caller's contract; every part is begun once.
        unsafe { self.work(copier, copy, || true) };
        // Whoever has not begun by now does not.
        self.offer.lock().copy = None;
        while self.helps.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    /// Copies parts that nobody has begun, while there are some and `goes_on`.
    ///
    /// # Safety
    /// As [`Copier::copy`], for those parts.
    unsafe fn work(&self, copier: &Copier, copy: Copy, goes_on: impl Fn() -> bool) {
        while goes_on() {
            let first = self.next.fetch_add(1, Ordering::Relaxed) * PART_BYTES;
            if first >= copy.len_bytes {
                return;
            }
            let len_bytes = PART_BYTES.min(copy.len_bytes - first);
            // SAFETY: the part lies in both; the caller's contract.
            unsafe {
                let (from, to) = (copy.from.add(first), copy.to.add(first));
                copier.copy(from, to, len_bytes, copy.stream);
            }
        }
    }

    /// Body of the helper.
    pub(crate) fn run(&self, copier: &Copier) {
        self.runs.store(true, Ordering::SeqCst);
        let mut seen = 0;
        let mut offer = self.offer.lock();
        while !self.closed.load(Ordering::SeqCst) {
            let Some(copy) = offer.copy.filter(|_| offer.number != seen) else {
                offer = self.offered.wait_timeout(offer, NAP);
                continue;
            };
            seen = offer.number;
            self.helps.store(true, Ordering::Relaxed);
            drop(offer);
            // SAFETY: who offers it waits until nobody helps any more, as was said
            // under the lock under which it takes the offer back.
            unsafe {
                self.work(copier, copy, || self.copies.load(Ordering::Relaxed) == 1);
            }
            copier.fence();
            self.helps.store(false, Ordering::Release);
            offer = self.offer.lock();
        }
        drop(offer);
        self.runs.store(false, Ordering::SeqCst);
    }

    /// Ends the helper. Without the lock: a thread of the program calls this, which
    /// may stop at any instruction until a page has come home, and that takes a copy.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while self.runs.load(Ordering::SeqCst) {
            self.offered.notify_one();
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies so many times. `alone`: nobody else does, so that nobody may be at work
    /// any more when a copy has returned.
    fn copies(helper: &Helper, copier: &Copier, times: u64, alone: bool) {
        let most = 3 * WORTH_BYTES;
        let mut to = vec![0u64; most / 8];
        for time in 0..times {
            let len_bytes = match time % 3 {
                0 => most,
                1 => WORTH_BYTES + 4096,
                _ => WORTH_BYTES - 4096,
            };
            let from: Vec<u64> = (0..most as u64 / 8)
                .map(|word| word ^ (time << 40))
                .collect();
            to.fill(0);
            // SAFETY: two vectors of at least so many bytes.
            unsafe {
                let (from, to) = (from.as_ptr().cast(), to.as_mut_ptr().cast());
                helper.copy(copier, from, to, len_bytes, false);
            }
            let helps = helper.helps.load(Ordering::Relaxed);
            assert!(
                !(alone && helps),
                "who has copied goes on while a part is missing"
            );
            assert!(to[..len_bytes / 8] == from[..len_bytes / 8], "copy {time}");
            assert!(to[len_bytes / 8..].iter().all(|&word| word == 0));
        }
    }

    #[test]
    fn whoever_copies_gets_all_of_it() {
        let (helper, copier) = (Helper::new(), Copier::detect());
        // Nobody helps yet.
        copies(&helper, &copier, 3, true);
        std::thread::scope(|scope| {
            scope.spawn(|| helper.run(&copier));
            copies(&helper, &copier, 60, true);
            // Two at a time.
            let second = scope.spawn(|| copies(&helper, &copier, 40, false));
            copies(&helper, &copier, 40, false);
            second.join().unwrap();
            helper.close();
        });
        // Nor any more.
        copies(&helper, &copier, 3, true);
    }
}
