//! Which handlers wait for events.
//!
//! Whoever polls the userfaultfd is woken by every fault, and to wake a handler
//! on another processor takes as long as to serve the fault. So while one thread
//! alone faults, one handler alone is on duty: the one on that thread's
//! processor. When another thread faults, or a fault takes long, all are.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use hmm_sync::{Condvar, Mutex, Rank};

const ALL: usize = usize::MAX;
/// Faults of one thread in a row until one handler is enough.
const ENOUGH: u32 = 256;
/// So many in a row, and the next thread's are not taken for a second one's at
/// the same time.
const APART: u32 = 16;
/// Faults in a row after which is looked where the thread runs now: at the
/// beginning, and then rarely enough not to show.
const LOOK: u32 = 1024;

/// Who is on duty.
#[derive(Debug)]
pub(crate) struct Rota {
    /// A handler's number, or `ALL`.
    on_duty: AtomicUsize,
    /// Who faulted last, and how often in a row.
    thread: AtomicU32,
    streak: AtomicU32,
    rest: Mutex<()>,
    called: Condvar,
}

impl Rota {
    pub(crate) const fn new() -> Self {
        Self {
            on_duty: AtomicUsize::new(ALL),
            thread: AtomicU32::new(0),
            streak: AtomicU32::new(0),
            rest: Mutex::new(Rank::Queue, ()),
            called: Condvar::new(),
        }
    }

    pub(crate) fn is_on_duty(&self, number: usize) -> bool {
        let on_duty = self.on_duty.load(Ordering::Acquire);
        on_duty == ALL || on_duty == number
    }

    /// Whether this handler alone is on duty.
    pub(crate) fn is_alone(&self, number: usize) -> bool {
        self.on_duty.load(Ordering::Acquire) == number
    }

    /// Sleeps until a handler may be on duty.
    pub(crate) fn rest(&self, number: usize, most: Duration) {
        let rest = self.rest.lock();
        if !self.is_on_duty(number) {
            drop(self.called.wait_timeout(rest, most));
        }
    }

    /// Calls every handler.
    pub(crate) fn call_all(&self) {
        self.streak.store(0, Ordering::Relaxed);
        if self.on_duty.load(Ordering::Acquire) != ALL {
            self.put_on_duty(ALL);
        }
    }

    fn put_on_duty(&self, who: usize) {
        let rest = self.rest.lock();
        self.on_duty.store(who, Ordering::Release);
        drop(rest);
        self.called.notify_all();
    }

    /// A handler has served a fault of this thread, 0 where the kernel does not
    /// tell. `cpus` are where the handlers are, in order.
    pub(crate) fn served(&self, number: usize, thread: u32, cpus: &[usize]) {
        if thread == 0 {
            return self.call_all();
        }
        if self.thread.load(Ordering::Relaxed) != thread {
            self.thread.store(thread, Ordering::Relaxed);
            if self.streak.swap(0, Ordering::Relaxed) < APART {
                self.call_all();
            }
            return;
        }
        let streak = self.streak.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let look = if self.on_duty.load(Ordering::Acquire) == ALL {
            streak >= ENOUGH
        } else {
            streak == APART || streak.is_multiple_of(LOOK)
        };
        if look {
            let near = hmm_os::cpu_of_thread(thread)
                .and_then(|cpu| cpus.iter().position(|&handler| handler == cpu));
            let who = near.unwrap_or(number);
            if self.on_duty.load(Ordering::Acquire) != who {
                self.put_on_duty(who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_enough_for_one_thread() {
        let rota = Rota::new();
        let nobody: [usize; 0] = [];
        for _ in 0..=ENOUGH {
            assert!(rota.is_on_duty(0) && rota.is_on_duty(1));
            rota.served(1, 7, &nobody);
        }
        assert!(!rota.is_on_duty(0) && rota.is_on_duty(1));
        // One after the other is one at a time; one and the other is not.
        rota.served(1, 8, &nobody);
        assert!(!rota.is_on_duty(0));
        rota.served(1, 7, &nobody);
        assert!(rota.is_on_duty(0) && rota.is_on_duty(1));
    }

    #[test]
    fn unknown_threads_and_long_faults_call_everybody() {
        let rota = Rota::new();
        let calm = || (0..=ENOUGH).for_each(|_| rota.served(0, 7, &[]));
        calm();
        assert!(!rota.is_on_duty(1));
        rota.served(0, 0, &[]);
        assert!(rota.is_on_duty(1));
        calm();
        assert!(!rota.is_on_duty(1));
        rota.call_all();
        assert!(rota.is_on_duty(1));
    }
}
