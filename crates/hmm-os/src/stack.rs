//! The stack of an engine thread.

use std::ffi::c_void;
use std::io;

use hmm_mem::Pages;
use hmm_types::{PAGE_SIZE, PageCount, VirtAddr};
use rustix::mm::{MprotectFlags, mprotect};

/// Stack and guard. What the fault path keeps on it stays below 64 KiB; the rest
/// is for a device's own code.
const PAGES: PageCount = PageCount::new(256);

/// Engine memory with a guard page below it. Not what pthread_create(3) would map:
/// that is the program's memory until the thread runs and says whose it is, and
/// may have left for a device by then.
#[derive(Debug)]
pub(crate) struct Stack {
    /// `None` only while it is dropped.
    pages: Option<Pages>,
}

impl Stack {
    pub(crate) fn new() -> io::Result<Self> {
        let pages = Pages::untouched(PAGES).ok_or(io::ErrorKind::OutOfMemory)?;
        let stack = Self { pages: Some(pages) };
        stack.guard(MprotectFlags::empty())?;
        Ok(stack)
    }

    /// The lowest address that the thread may use, and the bytes from there.
    pub(crate) fn usable(&self) -> (*mut c_void, usize) {
        let guard = VirtAddr::new(PAGE_SIZE).addr();
        let start = self.start().wrapping_byte_add(guard);
        (start, PAGES.bytes_usize() - guard)
    }

    fn start(&self) -> *mut c_void {
        let pages = self.pages.as_ref().map(|pages| pages.range().start());
        std::ptr::with_exposed_provenance_mut(pages.map_or(0, VirtAddr::addr))
    }

    fn guard(&self, access: MprotectFlags) -> rustix::io::Result<()> {
        // SAFETY: the lowest page of this value's own memory, which no thread uses.
        unsafe { mprotect(self.start(), VirtAddr::new(PAGE_SIZE).addr(), access) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let all = MprotectFlags::READ | MprotectFlags::WRITE;
        if self.guard(all).is_err() {
            // Nobody else could use it.
            std::mem::forget(self.pages.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_engine_memory() {
        let stack = Stack::new().unwrap();
        let (lowest, bytes) = stack.usable();
        let arena = hmm_mem::arena_range().unwrap();
        for address in [
            VirtAddr::of(lowest).get() - PAGE_SIZE,
            VirtAddr::of(lowest).get() + bytes as u64 - 1,
        ] {
            assert!(arena.contains(VirtAddr::new(address)));
        }
        let word = lowest.cast::<u64>();
        // SAFETY: in the part that can be used.
        unsafe { word.write(1) };
        drop(stack);
        // What was the guard can be used by whoever gets the memory next.
        let again = Pages::new(PAGES).unwrap();
        assert!(arena.encloses(again.range()));
    }
}
