//! The types that a kernel may load and store.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Plain data: every pattern of bits is a value, and there is no padding.
///
/// # Safety
/// Implementors have no padding, no niches, no references, and no code that
/// runs when they are dropped.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($name:ty)*) => {$(
        // SAFETY: a number: all bits are values, no padding.
        unsafe impl Plain for $name {}
    )*};
}

plain!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64);

// SAFETY: a raw pointer to a sized type is an address; any address is a value
// as long as nobody follows it.
unsafe impl<T: 'static> Plain for *const T {}
// SAFETY: as above.
unsafe impl<T: 'static> Plain for *mut T {}
// SAFETY: an array has no padding beyond that of its items, which have none.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

mod sealed {
    pub trait Sealed {}
}

/// A number on which kernels do atomic operations.
///
/// All of them are sequentially consistent. Sealed: what is atomic is up to
/// the machine.
pub trait AtomicWord: Plain + Eq + sealed::Sealed {
    /// Atomic load.
    ///
    /// # Safety
    /// For all methods: `at` is valid for the access, aligned, and only
    /// accessed atomically while this runs.
    #[doc(hidden)]
    unsafe fn load(at: *mut Self) -> Self;
    /// Atomic store.
    ///
    /// # Safety
    /// As [`AtomicWord::load`].
    #[doc(hidden)]
    unsafe fn store(at: *mut Self, value: Self);
    /// One read-modify-write.
    ///
    /// # Safety
    /// As [`AtomicWord::load`].
    #[doc(hidden)]
    unsafe fn modify(at: *mut Self, operation: Modify, value: Self) -> Self;
    /// Compare and exchange.
    ///
    /// # Safety
    /// As [`AtomicWord::load`].
    #[doc(hidden)]
    unsafe fn compare_exchange(at: *mut Self, current: Self, new: Self) -> Result<Self, Self>;
}

/// The read-modify-write operations.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modify {
    Add,
    Swap,
    And,
    Or,
    Xor,
    Min,
    Max,
}

macro_rules! atomic_word {
    ($($name:ty = $atomic:ty),*) => {$(
        impl sealed::Sealed for $name {}
        impl AtomicWord for $name {
            #[inline(always)]
            unsafe fn load(at: *mut Self) -> Self {
                // SAFETY: the caller's contract is that of `from_ptr`.
                unsafe { <$atomic>::from_ptr(at) }.load(Ordering::SeqCst)
            }

            #[inline(always)]
            unsafe fn store(at: *mut Self, value: Self) {
                // SAFETY: the caller's contract is that of `from_ptr`.
                unsafe { <$atomic>::from_ptr(at) }.store(value, Ordering::SeqCst);
            }

            #[inline(always)]
            unsafe fn modify(at: *mut Self, operation: Modify, value: Self) -> Self {
                // SAFETY: the caller's contract is that of `from_ptr`.
                let word = unsafe { <$atomic>::from_ptr(at) };
                match operation {
                    Modify::Add => word.fetch_add(value, Ordering::SeqCst),
                    Modify::Swap => word.swap(value, Ordering::SeqCst),
                    Modify::And => word.fetch_and(value, Ordering::SeqCst),
                    Modify::Or => word.fetch_or(value, Ordering::SeqCst),
                    Modify::Xor => word.fetch_xor(value, Ordering::SeqCst),
                    Modify::Min => word.fetch_min(value, Ordering::SeqCst),
                    Modify::Max => word.fetch_max(value, Ordering::SeqCst),
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(
                at: *mut Self,
                current: Self,
                new: Self,
            ) -> Result<Self, Self> {
                // SAFETY: the caller's contract is that of `from_ptr`.
                unsafe { <$atomic>::from_ptr(at) }.compare_exchange(
                    current,
                    new,
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                )
            }
        }
    )*};
}

atomic_word!(
    u32 = AtomicU32,
    u64 = AtomicU64,
    i32 = AtomicI32,
    i64 = AtomicI64,
    usize = AtomicUsize
);
