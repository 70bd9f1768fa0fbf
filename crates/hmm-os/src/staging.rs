//! Staging memory: where pages live between the program and a device.
//!
//! ```text
//! small  | slot | slot | slot | ...   4 KiB pages
//! huge   | slot | slot | slot | ...   a transparent huge page each
//!          2 MiB
//! ```
//!
//! Address space only, until pages are moved in from the program, or fresh
//! ones are provisioned. Fresh pages are made elsewhere and moved in: a page
//! cannot be made in place, for touching a hole of a registered range is a
//! fault that somebody would have to serve.

use std::sync::atomic::{AtomicU64, Ordering};

use hmm_hal::{Presence, Progress, StagingLayout, Stop};
use hmm_types::{BLOCK_SIZE, PageRange};
use rustix::io::Result;

use crate::pagemap::Pagemap;
use crate::region::Region;
use crate::uffd::{FEATURE_MOVE, Side, Uffd};

/// How much address space staging memory gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingConfig {
    /// For 4 KiB pages; rounded up to 2 MiB, at least that much.
    pub small_bytes: u64,
    /// For transparent huge pages; rounded up to 2 MiB, 0 for none.
    pub huge_bytes: u64,
}

impl Default for StagingConfig {
    fn default() -> Self {
        Self {
            small_bytes: 1 << 30,
            huge_bytes: 1 << 30,
        }
    }
}

/// Tries to move fresh pages in while events wait to be read.
const MOVE_TRIES: u32 = 10_000;

#[derive(Debug)]
pub(crate) struct Staging {
    small: Region,
    huge: Option<Region>,
    thp_provision_failed: AtomicU64,
}

impl Staging {
    /// Reserves the arenas; they are not registered yet.
    pub(crate) fn reserve(config: StagingConfig) -> Result<Self> {
        let small = Region::reserve(config.small_bytes.div_ceil(BLOCK_SIZE).max(1))?;
        // Fails where the kernel is built without THP: then all pages are small.
        let _ = small.prefer_huge(false);
        let huge = if config.huge_bytes > 0 && thp_allowed() {
            let region = Region::reserve(config.huge_bytes.div_ceil(BLOCK_SIZE))?;
            region.prefer_huge(true).is_ok().then_some(region)
        } else {
            None
        };
        Ok(Self {
            small,
            huge,
            thp_provision_failed: AtomicU64::new(0),
        })
    }

    pub(crate) fn layout(&self) -> StagingLayout {
        StagingLayout {
            small: self.small.range(),
            huge: self.huge.as_ref().map(Region::range),
        }
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> {
        let huge = self.huge.as_ref().map(Region::range);
        std::iter::once(self.small.range()).chain(huge)
    }

    /// Gives the arenas' memory back to the kernel; the addresses stay taken.
    pub(crate) fn give_back(&self) {
        self.small.empty();
        if let Some(huge) = &self.huge {
            huge.empty();
        }
    }

    pub(crate) fn contains(&self, range: PageRange) -> bool {
        self.ranges().any(|arena| arena.encloses(range))
    }

    /// Huge slots that got small pages for want of contiguous memory.
    pub(crate) fn thp_provision_failed(&self) -> u64 {
        self.thp_provision_failed.load(Ordering::Relaxed)
    }

    /// Fills a slot with fresh pages. Pages that are there already stay, so a
    /// slot that was filled in part can be filled up.
    pub(crate) fn provision(&self, slot: PageRange, uffd: &Uffd, pagemap: &Pagemap) -> bool {
        debug_assert!(
            self.contains(slot)
                && slot.start().is_block_aligned()
                && slot.bytes().get() == BLOCK_SIZE,
            "{slot} is no staging slot"
        );
        let huge = self
            .huge
            .as_ref()
            .is_some_and(|huge| huge.range().encloses(slot));
        let Ok(fresh) = Region::reserve(1) else {
            return false;
        };
        let _ = fresh.prefer_huge(huge);
        if fresh.populate().is_err() || !fill(slot, fresh.range(), uffd, pagemap) {
            return false;
        }
        if huge && !is_huge(slot, pagemap) {
            self.thp_provision_failed.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}

/// Moves (or, before Linux 6.8, copies) all pages of `fresh` into the slot.
fn fill(slot: PageRange, fresh: PageRange, uffd: &Uffd, pagemap: &Pagemap) -> bool {
    let total = slot.pages().get();
    let mut done = 0;
    for _ in 0..MOVE_TRIES {
        let from = fresh.slice(done, total - done);
        let to = slot.slice(done, total - done);
        let Progress { done: more, stop } = if uffd.features() & FEATURE_MOVE != 0 {
            uffd.move_pages(from, to.start(), Side::From, pagemap)
        } else {
            uffd.copy(from.start(), to)
        };
        done += more.get();
        match stop {
            None => return true,
            Some(Stop::Again) => rustix::thread::sched_yield(),
            Some(Stop::Exists) => done += 1,
            Some(_) => return false,
        }
        if done == total {
            return true;
        }
    }
    false
}

fn is_huge(slot: PageRange, pagemap: &Pagemap) -> bool {
    let mut all = true;
    let result = pagemap.visit(slot, &mut |_, presence| {
        all &= presence == Presence::Present { huge: true };
    });
    all && result.is_ok()
}

/// Whether the machine makes transparent huge pages for who asks for them.
fn thp_allowed() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|text| !text.contains("[never]"))
}
