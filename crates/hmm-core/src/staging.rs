//! The pool of recycled staging pages.
//!
//! A page that leaves the program for a device leaves its system-memory page
//! behind in staging; a page that comes home takes such a page along. So the
//! way home allocates nothing: it reuses what the way out left.
//!
//! Staging is cut into slots of 2 MiB. A page of a slot is *populated* or empty,
//! and *busy* (an executor or a staged page uses it) or free:
//!
//! | | free | busy |
//! |---|---|---|
//! | empty | room for pages that leave | about to receive one |
//! | populated | ready to take a page home | holds data on its way, or staged |
//!
//! The kernel may still hold a page that was the program's, by a reference that
//! nobody can see (vmsplice, MSG_ZEROCOPY): what it reads there must stay. A pool
//! that does not reuse pages keeps such ones as *spent*, until their slot is given
//! back to the kernel; pages come home in fresh ones only.

use hmm_hal::StagingLayout;
use hmm_mem::Vec;
use hmm_types::{BLOCK_PAGES, PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr};

/// A page of staging memory, numbered through both arenas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StagingPage(u32);

impl StagingPage {
    pub(crate) const fn new(number: u32) -> Self {
        Self(number)
    }

    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    pub(crate) const fn plus(self, pages: u32) -> Self {
        Self(self.0 + pages)
    }
}

/// Neighbouring pages of one slot, held by whoever took them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StagingRun {
    pub(crate) first: StagingPage,
    pub(crate) pages: u32,
}

/// Which kind of pages a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotKind {
    Small,
    Huge,
}

/// 512 bits, one for each page of a slot or block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageSet([u64; PAGES_PER_BLOCK / 64]);

impl PageSet {
    pub(crate) const EMPTY: Self = Self([0; PAGES_PER_BLOCK / 64]);

    pub(crate) const fn contains(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 != 0
    }

    pub(crate) const fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    pub(crate) const fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    pub(crate) fn set(&mut self, index: usize, on: bool) {
        if on {
            self.insert(index);
        } else {
            self.remove(index);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }
}

struct Slot {
    populated: PageSet,
    busy: PageSet,
    /// Populated pages that must not take another page home.
    spent: PageSet,
    /// Free populated pages, spent or not; free empty pages.
    ready: u16,
    wasted: u16,
    room: u16,
}

impl Slot {
    const EMPTY: Self = Self {
        populated: PageSet::EMPTY,
        busy: PageSet::EMPTY,
        spent: PageSet::EMPTY,
        ready: 0,
        wasted: 0,
        room: 512,
    };

    const fn is_idle(&self) -> bool {
        (self.ready + self.wasted + self.room) as usize == PAGES_PER_BLOCK
    }

    fn set_busy(&mut self, index: usize, busy: bool) {
        debug_assert!(
            self.busy.contains(index) != busy,
            "staging page taken or given back twice"
        );
        self.busy.set(index, busy);
        let count = if self.spent.contains(index) {
            &mut self.wasted
        } else if self.populated.contains(index) {
            &mut self.ready
        } else {
            &mut self.room
        };
        if busy {
            *count -= 1;
        } else {
            *count += 1;
        }
    }

    /// Longest run of free pages that are ready (or empty) as asked, at
    /// most `pages` long; the first that is long enough wins.
    fn find(&self, populated: bool, pages: u32) -> Option<(usize, u32)> {
        let mut best: Option<(usize, u32)> = None;
        let mut index = 0;
        while index < PAGES_PER_BLOCK {
            let fits = |i: usize| {
                let usable = !self.busy.contains(i) && !self.spent.contains(i);
                usable && self.populated.contains(i) == populated
            };
            if !fits(index) {
                index += 1;
                continue;
            }
            let start = index;
            let mut len = 0;
            while index < PAGES_PER_BLOCK && len < pages && fits(index) {
                index += 1;
                len += 1;
            }
            if best.is_none_or(|(_, longest)| len > longest) {
                best = Some((start, len));
            }
            if len == pages {
                break;
            }
        }
        best
    }
}

/// Both arenas' slots; lives behind a lock of rank `Staging`.
pub(crate) struct StagingPool {
    layout: StagingLayout,
    slots: Vec<Slot>,
    small_slots: usize,
    /// Where the last search for ready small pages ended.
    ready_cursor: usize,
    room_cursor: usize,
    populated: u64,
    held: u64,
    spent: u64,
}

impl StagingPool {
    pub(crate) fn new(layout: StagingLayout) -> Self {
        let slots_of = |range: PageRange| range.pages().index() / PAGES_PER_BLOCK;
        let small_slots = slots_of(layout.small);
        let total = small_slots + layout.huge.map_or(0, slots_of);
        let mut slots = hmm_mem::vec_with_capacity(total);
        slots.extend((0..total).map(|_| Slot::EMPTY));
        Self {
            layout,
            slots,
            small_slots,
            ready_cursor: 0,
            room_cursor: 0,
            populated: 0,
            held: 0,
            spent: 0,
        }
    }

    /// Free pages that only giving them back makes useful again.
    pub(crate) const fn spent_pages(&self) -> u64 {
        self.spent
    }

    /// Pages that hold memory, busy or not.
    pub(crate) const fn populated_pages(&self) -> u64 {
        self.populated
    }

    /// Pages that somebody holds; zero when the engine is at rest.
    pub(crate) const fn held_pages(&self) -> u64 {
        self.held
    }

    pub(crate) fn address(&self, page: StagingPage) -> VirtAddr {
        let index = u64::from(page.get());
        let small = self.layout.small.pages().get();
        if index < small {
            self.layout.small.start().plus_pages(index)
        } else {
            match self.layout.huge {
                Some(huge) => huge.start().plus_pages(index - small),
                None => unreachable!("staging page beyond the arenas"),
            }
        }
    }

    pub(crate) fn contains(&self, address: VirtAddr) -> bool {
        self.layout.small.contains(address)
            || self.layout.huge.is_some_and(|huge| huge.contains(address))
    }

    /// Whether somebody holds the page at an address.
    pub(crate) fn is_held(&self, address: VirtAddr) -> bool {
        let small = self.layout.small;
        let page = if small.contains(address) {
            address.pages_since(small.start())
        } else {
            match self.layout.huge {
                Some(huge) if huge.contains(address) => {
                    small.pages().get() + address.pages_since(huge.start())
                }
                _ => return false,
            }
        };
        let page = PageCount::new(page).index();
        self.slots[page / PAGES_PER_BLOCK]
            .busy
            .contains(page % PAGES_PER_BLOCK)
    }

    fn arena(&self, kind: SlotKind) -> std::ops::Range<usize> {
        match kind {
            SlotKind::Small => 0..self.small_slots,
            SlotKind::Huge => self.small_slots..self.slots.len(),
        }
    }

    fn page_of(slot: usize, index: usize) -> StagingPage {
        match u32::try_from(slot * PAGES_PER_BLOCK + index) {
            Ok(number) => StagingPage(number),
            Err(_) => unreachable!("staging arenas are far smaller than 16 TiB"),
        }
    }

    fn hold(&mut self, slot: usize, first: usize, pages: u32) -> StagingRun {
        for index in first..first + pages as usize {
            self.slots[slot].set_busy(index, true);
        }
        self.held += u64::from(pages);
        StagingRun {
            first: Self::page_of(slot, first),
            pages,
        }
    }

    /// Room for pages that leave: a run of empty pages, at most `pages` long.
    pub(crate) fn take_room(&mut self, kind: SlotKind, pages: u32) -> Option<StagingRun> {
        let arena = self.arena(kind);
        let whole = pages as usize == PAGES_PER_BLOCK;
        let count = arena.len();
        for step in 0..count {
            let slot = arena.start + (self.room_cursor + step) % count;
            let room = self.slots[slot].room as usize;
            if room == 0 || (whole && room < PAGES_PER_BLOCK) {
                continue;
            }
            self.room_cursor = slot - arena.start;
            let (first, len) = self.slots[slot].find(false, pages)?;
            return Some(self.hold(slot, first, len));
        }
        if whole && kind == SlotKind::Small {
            // No slot is wholly empty: shorter runs still help.
            return self.take_room(kind, pages / 2);
        }
        None
    }

    /// Populated pages to take a page home: a run of at most `pages` small
    /// ones, or one whole huge page.
    pub(crate) fn take_ready(&mut self, kind: SlotKind, pages: u32) -> Option<StagingRun> {
        let arena = self.arena(kind);
        let count = arena.len();
        let least = match kind {
            SlotKind::Small => 1,
            SlotKind::Huge => PAGES_PER_BLOCK,
        };
        for step in 0..count {
            let slot = arena.start + (self.ready_cursor + step) % count;
            if (self.slots[slot].ready as usize) < least {
                continue;
            }
            self.ready_cursor = slot - arena.start;
            let (first, len) = self.slots[slot].find(true, pages)?;
            return Some(self.hold(slot, first, len));
        }
        None
    }

    /// Gives one held page back, populated or empty.
    pub(crate) fn put(&mut self, page: StagingPage, populated: bool) {
        let number = page.get() as usize;
        let (slot, index) = (number / PAGES_PER_BLOCK, number % PAGES_PER_BLOCK);
        let slot = &mut self.slots[slot];
        // The page changes sides while it is busy, where neither counter has it.
        if slot.populated.contains(index) != populated {
            slot.populated.set(index, populated);
            if populated {
                self.populated += 1;
            } else {
                self.populated -= 1;
            }
        }
        if !populated && slot.spent.contains(index) {
            slot.spent.remove(index);
            self.spent -= 1;
        }
        slot.set_busy(index, false);
        self.held -= 1;
    }

    /// Gives back a held page that was the program's: ready to take another one
    /// home, or spent.
    pub(crate) fn put_used(&mut self, page: StagingPage, ready: bool) {
        let number = page.get() as usize;
        let (slot, index) = (number / PAGES_PER_BLOCK, number % PAGES_PER_BLOCK);
        if !ready && !self.slots[slot].spent.contains(index) {
            self.slots[slot].spent.insert(index);
            self.spent += 1;
        }
        self.put(page, true);
    }

    /// Gives a held run back.
    pub(crate) fn put_run(&mut self, run: StagingRun, populated: bool) {
        for offset in 0..run.pages {
            self.put(run.first.plus(offset), populated);
        }
    }

    /// Gives a slot taken for trimming back: emptied, or as it was before.
    pub(crate) fn put_run_as_found(&mut self, run: StagingRun, emptied: bool) {
        for offset in 0..run.pages {
            let page = run.first.plus(offset);
            let number = page.get() as usize;
            let populated = self.slots[number / PAGES_PER_BLOCK]
                .populated
                .contains(number % PAGES_PER_BLOCK);
            self.put(page, populated && !emptied);
        }
    }

    /// Takes a whole idle slot with memory in it, to give that memory back to
    /// the kernel (then `put_run(.., false)`).
    pub(crate) fn take_for_trim(
        &mut self,
        kind: Option<SlotKind>,
    ) -> Option<(StagingRun, PageRange)> {
        let slot = self.slots.iter().enumerate().position(|(number, slot)| {
            let of_kind = kind.is_none_or(|kind| self.arena(kind).contains(&number));
            of_kind && slot.is_idle() && slot.ready + slot.wasted > 0
        })?;
        let run = self.hold(slot, 0, BLOCK_PAGES);
        let range =
            PageRange::from_pages(self.address(run.first), PageCount::from(PAGES_PER_BLOCK));
        Some((run, range))
    }

    /// Takes a whole empty slot, to have it filled (then `put_run(.., true)`).
    pub(crate) fn take_for_provision(&mut self, kind: SlotKind) -> Option<(StagingRun, PageRange)> {
        let slot = self
            .arena(kind)
            .find(|&slot| self.slots[slot].room as usize == PAGES_PER_BLOCK)?;
        let run = self.hold(slot, 0, BLOCK_PAGES);
        let range =
            PageRange::from_pages(self.address(run.first), PageCount::from(PAGES_PER_BLOCK));
        Some((run, range))
    }

    /// Ready pages of a kind.
    pub(crate) fn ready_pages(&self, kind: SlotKind) -> u64 {
        self.slots[self.arena(kind)]
            .iter()
            .map(|slot| u64::from(slot.ready))
            .sum()
    }

    /// Engine memory that the pool's own tables take.
    pub(crate) fn table_bytes(&self) -> u64 {
        (self.slots.capacity() * size_of::<Slot>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> StagingPool {
        let at = |mib: u64, len: u64| {
            PageRange::new(VirtAddr::new(mib << 20), len << 20).expect("a range of pages")
        };
        let layout = StagingLayout {
            small: at(64, 8),
            huge: Some(at(128, 4)),
        };
        StagingPool::new(layout)
    }

    #[test]
    fn what_the_kernel_may_hold_is_not_written_to() {
        let mut pool = pool();
        let out = pool.take_room(SlotKind::Small, 4).unwrap();
        for page in 0..4 {
            pool.put_used(out.first.plus(page), false);
        }
        assert_eq!((pool.populated_pages(), pool.spent_pages()), (4, 4));
        assert!(pool.take_ready(SlotKind::Small, 1).is_none());
        let next = pool.take_room(SlotKind::Small, 4).unwrap();
        assert!(
            next.first.get() >= out.first.get() + 4,
            "spent pages are no room"
        );
        pool.put_run(next, true);
        let home = pool.take_ready(SlotKind::Small, 8).unwrap();
        assert_eq!(home, next, "fresh pages are ready");
        pool.put_run(home, false);
        // Not emptied: spent as before.
        let (run, _) = pool.take_for_trim(None).unwrap();
        pool.put_run_as_found(run, false);
        assert_eq!(pool.spent_pages(), 4);
        let (run, _) = pool.take_for_trim(None).unwrap();
        pool.put_run_as_found(run, true);
        assert_eq!((pool.populated_pages(), pool.spent_pages()), (0, 0));
        let whole = pool.take_room(SlotKind::Small, 512).unwrap();
        assert_eq!(whole.pages, 512);
    }

    #[test]
    fn what_leaves_is_what_comes_home() {
        let mut pool = pool();
        assert!(pool.take_ready(SlotKind::Small, 16).is_none());
        let out = pool.take_room(SlotKind::Small, 512).unwrap();
        assert_eq!(out.pages, 512);
        pool.put_run(out, true);
        assert_eq!(pool.populated_pages(), 512);
        let home = pool.take_ready(SlotKind::Small, 16).unwrap();
        assert_eq!(home.pages, 16);
        pool.put_run(home, false);
        assert_eq!(pool.populated_pages(), 496);
        assert_eq!(pool.held_pages(), 0);
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        let mut pool = pool();
        let out = pool.take_room(SlotKind::Huge, 512).unwrap();
        assert_eq!(pool.address(out.first), VirtAddr::new(128 << 20));
        pool.put_run(out, true);
        let home = pool.take_ready(SlotKind::Huge, 512).unwrap();
        assert_eq!(home, out);
        assert!(pool.take_ready(SlotKind::Huge, 512).is_none());
    }

    #[test]
    fn a_full_pool_gives_shorter_runs_and_then_none() {
        let mut pool = pool();
        for _ in 0..4 {
            let run = pool.take_room(SlotKind::Small, 1).unwrap();
            assert_eq!(run.pages, 1);
        }
        let mut taken = 4;
        while let Some(run) = pool.take_room(SlotKind::Small, 512) {
            taken += run.pages;
        }
        assert_eq!(taken, 4 * 512);
    }

    #[test]
    fn only_idle_slots_with_memory_are_trimmed() {
        let mut pool = pool();
        assert!(pool.take_for_trim(None).is_none());
        let out = pool.take_room(SlotKind::Small, 512).unwrap();
        assert!(pool.take_for_trim(None).is_none());
        pool.put_run(out, true);
        let (run, range) = pool.take_for_trim(None).unwrap();
        assert_eq!(range.start(), pool.address(out.first));
        pool.put_run(run, false);
        assert_eq!(pool.populated_pages(), 0);
    }

    #[test]
    #[cfg_attr(not(debug_assertions), ignore = "a debug assertion")]
    #[should_panic(expected = "twice")]
    fn giving_back_twice_is_a_bug() {
        let mut pool = pool();
        let run = pool.take_room(SlotKind::Small, 1).unwrap();
        pool.put_run(run, true);
        pool.put_run(run, true);
    }
}
