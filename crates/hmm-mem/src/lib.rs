//! Engine memory: where the engine keeps everything that its fault path reads.
//!
//! The process heap belongs to the program, and the program may hand any page
//! of it to a device. A thread that resolves faults must therefore never read
//! the heap: the page it needs could be the one it is about to bring home. So
//! the engine's tables, queues and locks live in an arena of their own, one
//! contiguous reservation that is excluded from every migration
//! ([`arena_range`]).
//!
//! Allocation from the arena takes no lock. It may ask the kernel for a page,
//! but never faults on migrated memory. The fault path does not allocate at all;
//! set-up and migration do.
//!
//! This crate is one of those that may use `unsafe`: an allocator cannot be
//! written without.

mod arena;
mod pages;

use std::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator, Layout};

pub use allocator_api2::alloc;
pub use arena::{arena_range, in_use_bytes, reserve};
pub use pages::Pages;

/// Allocates from the engine's arena.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineAlloc;

/// A value in engine memory.
pub type Box<T> = allocator_api2::boxed::Box<T, EngineAlloc>;
/// A growing array in engine memory.
pub type Vec<T> = allocator_api2::vec::Vec<T, EngineAlloc>;

/// Moves a value into engine memory.
///
/// ```
/// let block = hmm_mem::boxed([0u64; 512]);
/// assert!(hmm_mem::arena_range().unwrap().contains(hmm_types::VirtAddr::of(&*block)));
/// ```
pub fn boxed<T>(value: T) -> Box<T> {
    Box::new_in(value, EngineAlloc)
}

/// An empty array in engine memory.
#[must_use]
pub const fn vec<T>() -> Vec<T> {
    Vec::new_in(EngineAlloc)
}

/// An empty array in engine memory with room for `capacity` items.
#[must_use]
pub fn vec_with_capacity<T>(capacity: usize) -> Vec<T> {
    Vec::with_capacity_in(capacity, EngineAlloc)
}

/// Puts a value into engine memory for the rest of the process's life.
///
/// For the few objects that threads may reach at any time: a fault in flight
/// must never find its engine gone.
pub fn leaked<T>(value: T) -> &'static T {
    allocator_api2::boxed::Box::leak(boxed(value))
}

// SAFETY: the arena hands out disjoint, aligned blocks that stay mapped for the
// life of the process; a block is handed out again only after `deallocate`.
// All copies of the zero-sized allocator are the same arena.
unsafe impl Allocator for EngineAlloc {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        arena::allocate(layout).ok_or(AllocError)
    }

    unsafe fn deallocate(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's contract is the one that `release` asks for.
        unsafe { arena::release(block, layout) }
    }
}
