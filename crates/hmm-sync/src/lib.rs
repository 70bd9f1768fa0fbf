//! Locks that carry their rank.
//!
//! A thread takes locks in ascending [`Rank`] only. Debug and test builds check
//! that on every acquisition, per thread, and panic with the two ranks when the
//! order is broken; release builds pay nothing. The order itself, with what
//! each lock protects and forbids, is written once: in [`Rank`].
//!
//! Under `--cfg hmm_shuttle` the primitives are shuttle's, so that a test can
//! explore the interleavings of code built on them.
#![forbid(unsafe_code)]

mod rank;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

#[cfg(not(hmm_shuttle))]
use std::sync as imp;

#[cfg(hmm_shuttle)]
use shuttle::sync as imp;

pub use imp::atomic;
pub use rank::{Rank, assert_none_held, enter_engine_thread, holds_none};

use rank::Held;

/// A mutual-exclusion lock with a rank.
pub struct Mutex<T> {
    rank: Rank,
    inner: imp::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A lock of this rank around a value.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            inner: imp::Mutex::new(value),
        }
    }

    /// Waits for the lock.
    ///
    /// # Panics
    /// When another thread panicked while it held the lock: what it protects
    /// may be torn, and an engine that goes on could lose data. In debug and
    /// test builds also when the order of ranks is broken.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let held = Held::acquire(self.rank);
        match self.inner.lock() {
            Ok(inner) => MutexGuard {
                inner,
                held,
                #[cfg(hmm_shuttle)]
                lock: &self.inner,
            },
            Err(_) => panic!("lock {:?}: a thread panicked while it held it", self.rank),
        }
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mutex({:?})", self.rank)
    }
}

/// Access to what a [`Mutex`] protects.
pub struct MutexGuard<'a, T> {
    inner: imp::MutexGuard<'a, T>,
    held: Held,
    #[cfg(hmm_shuttle)]
    lock: &'a imp::Mutex<T>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MutexGuard({:?})", self.held)
    }
}

/// A readers-writer lock with a rank. Readers do not nest: the rank check
/// refuses a second acquisition by the same thread, which could deadlock with
/// a writer in between.
pub struct RwLock<T> {
    rank: Rank,
    inner: imp::RwLock<T>,
}

impl<T> RwLock<T> {
    /// A lock of this rank around a value.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            inner: imp::RwLock::new(value),
        }
    }

    /// Waits until no writer holds the lock.
    ///
    /// # Panics
    /// As [`Mutex::lock`].
    pub fn read(&self) -> ReadGuard<'_, T> {
        let held = Held::acquire(self.rank);
        match self.inner.read() {
            Ok(inner) => ReadGuard { inner, held },
            Err(_) => panic!("lock {:?}: a thread panicked while it held it", self.rank),
        }
    }

    /// The lock, if nobody holds it at this moment.
    ///
    /// # Panics
    /// As [`Mutex::lock`].
    pub fn try_write(&self) -> Option<WriteGuard<'_, T>> {
        let held = Held::acquire(self.rank);
        match self.inner.try_write() {
            Ok(inner) => Some(WriteGuard { inner, held }),
            Err(imp::TryLockError::WouldBlock) => None,
            Err(imp::TryLockError::Poisoned(_)) => {
                panic!("lock {:?}: a thread panicked while it held it", self.rank)
            }
        }
    }

    /// Waits until nobody holds the lock.
    ///
    /// # Panics
    /// As [`Mutex::lock`].
    pub fn write(&self) -> WriteGuard<'_, T> {
        let held = Held::acquire(self.rank);
        match self.inner.write() {
            Ok(inner) => WriteGuard { inner, held },
            Err(_) => panic!("lock {:?}: a thread panicked while it held it", self.rank),
        }
    }
}

impl<T> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RwLock({:?})", self.rank)
    }
}

/// Shared access to what a [`RwLock`] protects.
pub struct ReadGuard<'a, T> {
    inner: imp::RwLockReadGuard<'a, T>,
    held: Held,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> fmt::Debug for ReadGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadGuard({:?})", self.held)
    }
}

/// Sole access to what a [`RwLock`] protects.
pub struct WriteGuard<'a, T> {
    inner: imp::RwLockWriteGuard<'a, T>,
    held: Held,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> fmt::Debug for WriteGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteGuard({:?})", self.held)
    }
}

/// A condition to wait for, tied to a [`Mutex`].
#[derive(Debug)]
pub struct Condvar(imp::Condvar);

impl Condvar {
    /// A condition that nobody waits for yet.
    #[must_use]
    #[allow(
        clippy::new_without_default,
        reason = "a condition without its mutex is not a value to default to"
    )]
    pub const fn new() -> Self {
        Self(imp::Condvar::new())
    }

    /// Gives the lock up, waits to be notified or for `timeout`, takes the lock
    /// again. Wakes without a notification may happen; check and wait again.
    ///
    /// # Panics
    /// As [`Mutex::lock`].
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> MutexGuard<'a, T> {
        self.wait(guard, timeout)
    }

    #[cfg(not(hmm_shuttle))]
    fn wait<'a, T>(&self, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
        let MutexGuard { inner, held } = guard;
        match self.0.wait_timeout(inner, timeout) {
            Ok((inner, _)) => MutexGuard { inner, held },
            Err(_) => panic!("condition: a thread panicked while it held the lock"),
        }
    }

    /// Shuttle's waits never time out; a wake without a notification is the
    /// same to the caller.
    #[cfg(hmm_shuttle)]
    fn wait<'a, T>(&self, guard: MutexGuard<'a, T>, _: Duration) -> MutexGuard<'a, T> {
        let MutexGuard { inner, held, lock } = guard;
        drop(inner);
        shuttle::thread::yield_now();
        match lock.lock() {
            Ok(inner) => MutexGuard { inner, held, lock },
            Err(_) => panic!("condition: a thread panicked while it held the lock"),
        }
    }

    /// Wakes one waiting thread.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiting threads.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascending_order_is_allowed() {
        let gate = RwLock::new(Rank::Gate, ());
        let block = Mutex::new(Rank::Block, ());
        let _gate = gate.read();
        drop(block.lock());
        drop(block.lock());
    }

    #[test]
    #[cfg_attr(
        not(debug_assertions),
        ignore = "ranks are checked in debug builds only"
    )]
    #[should_panic(expected = "lock order")]
    fn descending_order_panics() {
        let gate = RwLock::new(Rank::Gate, ());
        let block = Mutex::new(Rank::Block, ());
        let _block = block.lock();
        let _gate = gate.read();
    }

    #[test]
    #[cfg_attr(
        not(debug_assertions),
        ignore = "ranks are checked in debug builds only"
    )]
    #[should_panic(expected = "lock order")]
    fn readers_do_not_nest() {
        let gate = RwLock::new(Rank::Gate, ());
        let _one = gate.read();
        let _two = gate.read();
    }
}
