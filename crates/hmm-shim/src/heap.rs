//! This library's own heap: engine memory.
//!
//! The program's heap is the program's. It may be on a device, or in a state
//! that the program has made of it; nothing here depends on that.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::NonNull;

use hmm_mem::EngineAlloc;
use hmm_mem::alloc::Allocator;

struct EngineHeap;

#[global_allocator]
static HEAP: EngineHeap = EngineHeap;

// SAFETY: the engine's allocator gives out disjoint, aligned blocks; it never
// unwinds.
unsafe impl GlobalAlloc for EngineHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        EngineAlloc
            .allocate(layout)
            .map_or(std::ptr::null_mut(), |block| block.as_ptr().cast())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller's contract: it came from `alloc` with this
            // layout.
            unsafe { EngineAlloc.deallocate(block, layout) }
        }
    }
}
