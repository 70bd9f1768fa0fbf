//! One reservation, cut into blocks whose size is a power of two, with a free
//! list for each size.
//!
//! ```text
//! base                                    base+used          base+RESERVED
//!  | 64 | 64 | 4096          | 2048   | 64 | ...untouched...      |
//! ```
//!
//! The reservation is address space only; pages appear as they are touched.
//! Blocks never move and the arena never shrinks, so a freed block is reused
//! for the same size. Tables come in a few sizes, which makes that enough.

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_types::{PageCount, PageRange, VirtAddr};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Address space to ask for, in descending order: a process under `ulimit -v`
/// gets by with less.
const RESERVE_BYTES: [usize; 5] = [64 << 30, 16 << 30, 4 << 30, 1 << 30, 128 << 20];
/// Smallest block: a cache line, so that two objects never share one.
const MIN_SHIFT: u32 = 6;
/// Largest block: 2^36 bytes.
const MAX_SHIFT: u32 = 36;
const CLASSES: usize = (MAX_SHIFT - MIN_SHIFT + 1) as usize;

struct Arena {
    base: *mut u8,
    reserved: usize,
    used: usize,
    in_use: usize,
    free: [*mut u8; CLASSES],
}

// SAFETY: the pointers lead into the arena's own reservation, which no thread
// owns; they are only followed under the mutex.
unsafe impl Send for Arena {}

/// Forks of forks that can each have an arena.
pub const GENERATIONS: usize = 64;

/// One for each generation of forked processes; a process uses one of them.
static ARENAS: [Mutex<Arena>; GENERATIONS] = [const {
    Mutex::new(Arena {
        base: ptr::null_mut(),
        reserved: 0,
        used: 0,
        in_use: 0,
        free: [ptr::null_mut(); CLASSES],
    })
}; GENERATIONS];
static GENERATION: AtomicUsize = AtomicUsize::new(0);

fn arena() -> MutexGuard<'static, Arena> {
    ARENAS[GENERATION.load(Ordering::Acquire)]
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// The addresses that the arena may ever use; `None` before its first use.
#[must_use]
pub fn arena_range() -> Option<PageRange> {
    let arena = arena();
    (!arena.base.is_null()).then(|| {
        PageRange::from_pages(
            VirtAddr::of(arena.base),
            PageCount::new(arena.reserved as u64 / hmm_types::PAGE_SIZE),
        )
    })
}

/// Reserves the arena's addresses now, if that has not been done. False when
/// the process may not have that much address space: then nothing can be
/// allocated here.
#[must_use]
pub fn reserve() -> bool {
    let mut arena = arena();
    !arena.base.is_null() || arena.reserve().is_some()
}

/// In a forked child: goes on with an arena of its own. The one that it has
/// inherited may be locked by a thread that it does not have, for ever; what is
/// in there stays valid, and may be given back.
///
/// # Panics
/// In the child of a child of ... [`GENERATIONS`] processes, each of which has
/// forked the next.
pub fn in_forked_child() {
    let generation = GENERATION.fetch_add(1, Ordering::AcqRel) + 1;
    assert!(
        generation < GENERATIONS,
        "more than {GENERATIONS} generations of forked processes"
    );
}

/// Bytes of the arena that are handed out now, rounded up to the sizes in
/// which it hands them out.
#[must_use]
pub fn in_use_bytes() -> u64 {
    let arena = arena();
    arena.in_use as u64
}

/// The size class of a layout: log2 of the block that holds it.
fn shift_of(layout: Layout) -> Option<u32> {
    let bytes = layout.size().max(layout.align()).max(1 << MIN_SHIFT);
    let shift = bytes.checked_next_power_of_two()?.trailing_zeros();
    // Blocks are aligned to their size up to a page, never further.
    (shift <= MAX_SHIFT && layout.align() <= 4096).then_some(shift)
}

pub(crate) fn allocate(layout: Layout) -> Option<NonNull<[u8]>> {
    let shift = shift_of(layout)?;
    let size = 1usize << shift;
    let class = (shift - MIN_SHIFT) as usize;
    let mut arena = arena();
    if arena.base.is_null() {
        arena.reserve()?;
    }
    let block = match NonNull::new(arena.free[class]) {
        Some(block) => {
            // SAFETY: a block on the free list belongs to the arena and holds
            // the pointer to the next one in its first bytes (see `release`).
            arena.free[class] = unsafe { block.cast::<*mut u8>().read() };
            block
        }
        None => arena.carve(size)?,
    };
    arena.in_use += size;
    Some(NonNull::slice_from_raw_parts(block, size))
}

/// Takes a block back.
///
/// # Safety
/// `block` came from [`allocate`] with this layout and is not used any more.
pub(crate) unsafe fn release(block: NonNull<u8>, layout: Layout) {
    let Some(shift) = shift_of(layout) else {
        unreachable!("a block of a size that is never handed out");
    };
    let class = (shift - MIN_SHIFT) as usize;
    let mut arena = arena();
    // SAFETY: the caller gives the block up; it is at least a cache line long
    // and aligned to one, so a pointer fits.
    unsafe { block.cast::<*mut u8>().write(arena.free[class]) };
    arena.free[class] = block.as_ptr();
    arena.in_use -= 1 << shift;
}

impl Arena {
    fn reserve(&mut self) -> Option<()> {
        for bytes in RESERVE_BYTES {
            // SAFETY: a fresh anonymous mapping at an address of the kernel's
            // choice touches nothing that exists.
            let mapped = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    bytes,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            };
            if let Ok(base) = mapped {
                self.base = base.cast();
                self.reserved = bytes;
                return Some(());
            }
        }
        None
    }

    /// A new block from the untouched end, aligned to its size up to a page.
    fn carve(&mut self, size: usize) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(size.min(4096));
        let end = start.checked_add(size)?;
        if end > self.reserved {
            return None;
        }
        self.used = end;
        // SAFETY: `start < reserved`, so the result lies inside the mapping.
        NonNull::new(unsafe { self.base.add(start) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{boxed, vec};

    #[test]
    fn blocks_are_disjoint_and_reused() {
        let mut all: Vec<_> = (0u64..1000).map(|n| boxed([n; 20])).collect();
        for (n, block) in all.iter().enumerate() {
            assert_eq!(**block, [n as u64; 20]);
        }
        let last = VirtAddr::of(&*all.pop().unwrap());
        let range = arena_range().unwrap();
        assert!(range.contains(last));
        let again: Vec<_> = (0..1000).map(|_| boxed([7u8; 160])).collect();
        assert!(again.iter().any(|block| VirtAddr::of(&**block) == last));
    }

    #[test]
    fn arrays_grow_in_the_arena() {
        let mut array = vec();
        for n in 0..100_000u32 {
            array.push(n);
        }
        assert!(array.iter().copied().eq(0..100_000));
        assert!(
            arena_range()
                .unwrap()
                .contains(VirtAddr::of(array.as_ptr()))
        );
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert!(allocate(Layout::from_size_align(1 << 40, 8).unwrap()).is_none());
        assert!(allocate(Layout::from_size_align(8, 8192).unwrap()).is_none());
    }
}
