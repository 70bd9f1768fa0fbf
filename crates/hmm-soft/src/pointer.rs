//! Pointers that kernels may carry.

use std::fmt;
use std::ptr;

/// A plain pointer of the process, for a kernel to use on its workers.
///
/// Rust's raw pointers do not go from thread to thread; an address does.
///
/// ```
/// let mut numbers = [1u64, 2, 3];
/// let first = hmm_soft::Pointer::new(numbers.as_mut_ptr());
/// assert_eq!(first.at(2), numbers.as_mut_ptr().wrapping_add(2));
/// ```
pub struct Pointer<T> {
    address: usize,
    what: std::marker::PhantomData<fn() -> T>,
}

impl<T> Pointer<T> {
    /// The same address as the pointer's, which is exposed by this.
    #[must_use]
    pub fn new(pointer: *mut T) -> Self {
        Self {
            address: pointer.expose_provenance(),
            what: std::marker::PhantomData,
        }
    }

    /// As [`Pointer::new`], for memory that the kernel only reads.
    #[must_use]
    pub fn of(pointer: *const T) -> Self {
        Self::new(pointer.cast_mut())
    }

    /// The pointer.
    #[must_use]
    pub fn get(self) -> *mut T {
        ptr::with_exposed_provenance_mut(self.address)
    }

    /// The pointer to the item `index` items further up.
    #[inline]
    #[must_use]
    pub fn at(self, index: usize) -> *mut T {
        self.get().wrapping_add(index)
    }
}

impl<T> Clone for Pointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Pointer<T> {}

impl<T> fmt::Debug for Pointer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}
