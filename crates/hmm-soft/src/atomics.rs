//! Atomic operations of kernels.

use hmm_types::VirtAddr;

use crate::plain::Modify;
use crate::{AtomicWord, Context, KernelError};

/// Atomic operations, all of them sequentially consistent, on words that are
/// aligned to their size.
impl Context {
    /// Loads a word atomically.
    ///
    /// # Errors
    /// [`KernelError`] when the access cannot be done, or is not aligned.
    #[inline]
    pub fn atomic_load<T: AtomicWord>(&self, at: *const T) -> Result<T, KernelError> {
        let address = aligned(at)?;
        // SAFETY: `access` gives a pointer at the same offset of a page, and
        // `aligned` has checked that; an aligned word lies in one page.
        self.access::<false, T>(address, &|at| unsafe { T::load(at.cast()) })
    }

    /// Stores a word atomically.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn atomic_store<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<(), KernelError> {
        let address = aligned(at)?;
        // SAFETY: as in `atomic_load`.
        self.access::<true, ()>(address, &|at| unsafe { T::store(at.cast(), value) })
    }

    #[inline(always)]
    fn modify<T: AtomicWord>(&self, at: *mut T, how: Modify, value: T) -> Result<T, KernelError> {
        let address = aligned(at)?;
        // SAFETY: as in `atomic_load`.
        self.access::<true, T>(address, &|at| unsafe { T::modify(at.cast(), how, value) })
    }

    /// Adds, wrapping; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_add<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Add, value)
    }

    /// Replaces; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn swap<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Swap, value)
    }

    /// Bitwise and; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_and<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::And, value)
    }

    /// Bitwise or; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_or<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Or, value)
    }

    /// Bitwise exclusive or; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_xor<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Xor, value)
    }

    /// Minimum; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_min<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Min, value)
    }

    /// Maximum; gives what was there before.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn fetch_max<T: AtomicWord>(&self, at: *mut T, value: T) -> Result<T, KernelError> {
        self.modify(at, Modify::Max, value)
    }

    /// Stores `new` if `current` is there. Gives what was there before: as
    /// `Ok` when it was replaced.
    ///
    /// # Errors
    /// As [`Context::atomic_load`].
    #[inline]
    pub fn compare_exchange<T: AtomicWord>(
        &self,
        at: *mut T,
        current: T,
        new: T,
    ) -> Result<Result<T, T>, KernelError> {
        let address = aligned(at)?;
        // SAFETY: as in `atomic_load`.
        self.access::<true, _>(address, &|at| unsafe {
            T::compare_exchange(at.cast(), current, new)
        })
    }
}

#[inline(always)]
fn aligned<T>(at: *const T) -> Result<usize, KernelError> {
    if at.addr().is_multiple_of(size_of::<T>()) {
        Ok(at.addr())
    } else {
        Err(KernelError::Unaligned {
            address: VirtAddr::of(at),
            size_bytes: size_of::<T>(),
        })
    }
}
