//! What read-ahead has planned and nobody has brought yet.
//!
//! Handlers bring it home a block at a time while no fault waits, all of them
//! together: a thread that reads in sequence waits for nothing else, and a
//! fault elsewhere waits for one block at most.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Release};

use hmm_sync::{Mutex, Rank};
use hmm_types::{PAGES_PER_BLOCK, PageRange};

/// Plans that wait at a time.
const PLANS: usize = 16;

/// A range to bring home, as planned at a time (see
/// [`Engine::uses_now`](crate::engine::Engine::uses_now)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) range: PageRange,
    pub(crate) at: u64,
}

/// The plans, first in, first out.
pub(crate) struct Ahead {
    plans: Mutex<[Option<Planned>; PLANS]>,
    /// How many there are: read without the lock.
    len: AtomicUsize,
}

impl Ahead {
    pub(crate) const fn new() -> Self {
        Self {
            plans: Mutex::new(Rank::Queue, [None; PLANS]),
            len: AtomicUsize::new(0),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len.load(Acquire) == 0
    }

    /// False when there is no room.
    pub(crate) fn put(&self, plan: Planned) -> bool {
        let mut plans = self.plans.lock();
        let Some(free) = plans.iter_mut().find(|slot| slot.is_none()) else {
            return false;
        };
        *free = Some(plan);
        self.len.fetch_add(1, Release);
        true
    }

    /// Takes the first plan's pages up to the end of their block.
    pub(crate) fn take_block(&self) -> Option<Planned> {
        if self.is_empty() {
            return None;
        }
        let mut plans = self.plans.lock();
        let first = (*plans.first()?)?;
        let range = first.range;
        let end = range
            .start()
            .block_floor()
            .plus_pages(PAGES_PER_BLOCK as u64);
        if end < range.end() {
            plans[0] = Some(Planned {
                range: PageRange::span(end, range.end()),
                ..first
            });
            return Some(Planned {
                range: PageRange::span(range.start(), end),
                ..first
            });
        }
        plans.rotate_left(1);
        plans[PLANS - 1] = None;
        self.len.fetch_sub(1, Release);
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use hmm_types::{PageCount, VirtAddr};

    use super::*;

    fn plan(first: u64, pages: u64) -> Planned {
        Planned {
            range: PageRange::from_pages(VirtAddr::new(first * 4096), PageCount::new(pages)),
            at: first,
        }
    }

    #[test]
    fn plans_are_taken_by_blocks_and_in_order() {
        let ahead = Ahead::new();
        assert!(ahead.put(plan(500, 600)) && ahead.put(plan(5000, 1)));
        for expected in [plan(500, 12), plan(512, 512), plan(1024, 76)] {
            assert!(!ahead.is_empty());
            let taken = ahead.take_block().unwrap();
            assert_eq!((taken.range, taken.at), (expected.range, 500));
        }
        assert_eq!(ahead.take_block(), Some(plan(5000, 1)));
        assert!(ahead.is_empty());
        assert_eq!(ahead.take_block(), None);
    }

    #[test]
    fn there_is_room_for_so_many_and_no_more() {
        let ahead = Ahead::new();
        for number in 0..PLANS as u64 {
            assert!(ahead.put(plan(512 * (number + 1), 1)));
        }
        assert!(!ahead.put(plan(1, 1)));
        assert!(ahead.take_block().is_some());
        assert!(ahead.put(plan(1, 1)));
    }
}
