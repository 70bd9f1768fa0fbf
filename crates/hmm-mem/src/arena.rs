//! One reservation, cut into blocks whose size is a power of two, with a free
//! list for each size.
//!
//! ```text
//! base                                    base+used          base+reserved
//!  | 64 | 64 | 4096          | 2048   | 64 | ...untouched...      | links |
//! ```
//!
//! The reservation is address space only; pages appear as they are touched.
//! Blocks never move and the arena never shrinks, so a freed block is reused
//! for the same size. Tables come in a few sizes, which makes that enough.
//!
//! There is no lock. The program's own threads allocate here too, and such a
//! thread can stop at any instruction: its stack may be on a device, or a signal
//! handler of the program's touches what is. Whoever brings that home must not
//! wait for it. (And what a fork copies is whole at any instant.) The free lists
//! are Treiber's stacks (R. K. Treiber, "Systems Programming: Coping with
//! Parallelism", 1986), with a count in each head so that one which has changed
//! and changed back is not taken for the same. The links lie behind the blocks,
//! not in them: a block may be in use by the time somebody reads its link.

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use hmm_types::{PageCount, PageRange, VirtAddr};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Address space to ask for, in descending order: a process under `ulimit -v`
/// gets by with less.
const RESERVE_BYTES: [usize; 5] = [64 << 30, 16 << 30, 4 << 30, 1 << 30, 128 << 20];
/// Smallest block: a cache line, so that two objects never share one.
const MIN_SHIFT: u32 = 6;
/// Largest block: 2^36 bytes.
const MAX_SHIFT: u32 = 36;
const CLASSES: usize = (MAX_SHIFT - MIN_SHIFT + 1) as usize;
/// Bytes of a link for each smallest block.
const LINK: usize = size_of::<AtomicU32>();

/// The reservation, whose first word says how many bytes blocks may be cut from;
/// null before the first use.
static BASE: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
/// Bytes that blocks have been cut from, and that first line.
static USED: AtomicUsize = AtomicUsize::new(1 << MIN_SHIFT);
static IN_USE: AtomicUsize = AtomicUsize::new(0);
/// Heads of the free lists: the first block's number and one, 0 for none, and
/// above it how often the list has changed.
static FREE: [AtomicU64; CLASSES] = [const { AtomicU64::new(0) }; CLASSES];

/// The reservation: its start, and how many bytes blocks may be cut from.
#[derive(Clone, Copy)]
struct Arena {
    base: NonNull<u8>,
    reserved: usize,
}

/// The addresses that the arena may ever use; `None` before its first use.
#[must_use]
pub fn arena_range() -> Option<PageRange> {
    let arena = Arena::existing()?;
    Some(PageRange::from_pages(
        VirtAddr::of(arena.base.as_ptr()),
        PageCount::new(with_links(arena.reserved) as u64 / hmm_types::PAGE_SIZE),
    ))
}

/// Reserves the arena's addresses now, if that has not been done. False when
/// the process may not have that much address space: then nothing can be
/// allocated here.
#[must_use]
pub fn reserve() -> bool {
    Arena::get().is_some()
}

/// Bytes of the arena that are handed out now, rounded up to the sizes in
/// which it hands them out.
#[must_use]
pub fn in_use_bytes() -> u64 {
    IN_USE.load(Ordering::Relaxed) as u64
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
    let arena = Arena::get()?;
    let block = match arena.pop((shift - MIN_SHIFT) as usize) {
        Some(block) => block,
        None => arena.carve(size)?,
    };
    IN_USE.fetch_add(size, Ordering::Relaxed);
    Some(NonNull::slice_from_raw_parts(block, size))
}

/// Takes a block back.
///
/// # Safety
/// `block` came from [`allocate`] with this layout and is not used any more.
pub(crate) unsafe fn release(block: NonNull<u8>, layout: Layout) {
    let (Some(shift), Some(arena)) = (shift_of(layout), Arena::existing()) else {
        unreachable!("a block that was never handed out");
    };
    IN_USE.fetch_sub(1 << shift, Ordering::Relaxed);
    arena.push((shift - MIN_SHIFT) as usize, block);
}

/// Bytes of a reservation with so many bytes of blocks.
const fn with_links(reserved: usize) -> usize {
    reserved + (reserved >> MIN_SHIFT) * LINK
}

/// The number of the first block of a head, and the head's count.
const fn parts(head: u64) -> (u32, u64) {
    #[allow(clippy::cast_possible_truncation, reason = "the lower half")]
    (head as u32, head >> 32)
}

/// The head that follows one with this count.
const fn next_head(block: u32, count: u64) -> u64 {
    (count.wrapping_add(1)) << 32 | block as u64
}

impl Arena {
    fn existing() -> Option<Self> {
        let base = NonNull::new(BASE.load(Ordering::Acquire))?;
        // SAFETY: written before the base was published, and never again.
        let reserved = unsafe { base.cast::<usize>().read() };
        Some(Self { base, reserved })
    }

    fn get() -> Option<Self> {
        Self::existing().or_else(Self::reserve)
    }

    /// Threads that come at the same time all reserve; the first one's is kept.
    fn reserve() -> Option<Self> {
        for bytes in RESERVE_BYTES {
            // SAFETY: a fresh anonymous mapping at an address of the kernel's
            // choice touches nothing that exists.
            let mapped = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    with_links(bytes),
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            };
            let Ok(base) = mapped else { continue };
            // SAFETY: the mapping made above, which nobody else knows yet.
            unsafe { base.cast::<usize>().write(bytes) };
            let null = ptr::null_mut();
            let published =
                BASE.compare_exchange(null, base.cast(), Ordering::AcqRel, Ordering::Acquire);
            if published.is_err() {
                // SAFETY: as above; nobody will know it.
                let _ = unsafe { munmap(base, with_links(bytes)) };
            }
            break;
        }
        Self::existing()
    }

    /// The link of a block, by the block's number and one.
    fn link(self, block: u32) -> &'static AtomicU32 {
        let index = block as usize - 1;
        debug_assert!(index < self.reserved >> MIN_SHIFT);
        // SAFETY: links lie behind the blocks, one for each smallest block,
        // zeroed at first, and are only ever used as these atomics; the mapping
        // stays for the life of the process.
        unsafe { self.base.add(self.reserved + index * LINK).cast().as_ref() }
    }

    fn pop(self, class: usize) -> Option<NonNull<u8>> {
        let mut head = FREE[class].load(Ordering::Acquire);
        loop {
            let (block, count) = parts(head);
            if block == 0 {
                return None;
            }
            // If the block is taken meanwhile this is any number, and the count
            // has changed.
            let next = next_head(self.link(block).load(Ordering::Relaxed), count);
            match FREE[class].compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire)
            {
                // SAFETY: the block lies inside the reservation.
                Ok(_) => return Some(unsafe { self.base.add((block as usize - 1) << MIN_SHIFT) }),
                Err(now) => head = now,
            }
        }
    }

    fn push(self, class: usize, block: NonNull<u8>) {
        let offset = block.addr().get() - self.base.addr().get();
        let Ok(number) = u32::try_from((offset >> MIN_SHIFT) + 1) else {
            unreachable!("2^30 blocks at most");
        };
        let mut head = FREE[class].load(Ordering::Relaxed);
        loop {
            let (first, count) = parts(head);
            self.link(number).store(first, Ordering::Relaxed);
            match FREE[class].compare_exchange_weak(
                head,
                next_head(number, count),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// A new block from the untouched end, aligned to its size up to a page.
    fn carve(self, size: usize) -> Option<NonNull<u8>> {
        let mut used = USED.load(Ordering::Relaxed);
        loop {
            let start = used.next_multiple_of(size.min(4096));
            let end = start.checked_add(size)?;
            if end > self.reserved {
                return None;
            }
            match USED.compare_exchange_weak(used, end, Ordering::Relaxed, Ordering::Relaxed) {
                // SAFETY: `start < reserved`, so the result lies inside the mapping.
                Ok(_) => return Some(unsafe { self.base.add(start) }),
                Err(now) => used = now,
            }
        }
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

    /// Blocks of one size go from hand to hand among threads: nobody else ever
    /// writes to the one that somebody has.
    #[test]
    fn threads_never_share_a_block() {
        std::thread::scope(|scope| {
            for number in 0..4u64 {
                scope.spawn(move || {
                    let mut held = Vec::new();
                    for round in 0..20_000usize {
                        let mark = number << 32 | round as u64;
                        held.push((mark, boxed([mark; 17])));
                        if round % 3 > 0 {
                            let place = round * 7 % held.len();
                            let (mark, block) = held.swap_remove(place);
                            assert_eq!(*block, [mark; 17]);
                        }
                    }
                    for (mark, block) in held {
                        assert_eq!(*block, [mark; 17]);
                    }
                });
            }
        });
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert!(allocate(Layout::from_size_align(1 << 40, 8).unwrap()).is_none());
        assert!(allocate(Layout::from_size_align(8, 8192).unwrap()).is_none());
    }
}
