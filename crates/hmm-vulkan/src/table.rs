//! The page table that kernels walk.
//!
//! ```text
//! root   [2^17 + 1]  device addresses of leaves, one per GiB; the last is for every
//!                    address of 2^47 and above
//! groups [2^17]      entries for 64 KiB, each at its number modulo 2^17
//! leaf   [2^18]      entries, one per page; then 2 x 2^18 "wanted" bits
//! entry of a page    63..12 frame's device address | 1 write | 0 read
//! of a group         63..16 its device address | 15 write | 14..1 bits 46..33 of the
//!                    address that it is for | 0 read
//! ```
//!
//! No root entry is null: where there is no leaf it is the *empty leaf*, number 0, whose
//! entries stay zero. So a kernel looks twice and never asks. The host writes entries, 8
//! bytes at once; kernels set wanted bits, and the host clears them.
//!
//! A group's entry says the same as its 16 pages' entries, where these lie together: so
//! few words that they stay in a cache while a kernel goes all over its memory. What is
//! 8 GiB further on has the same place. Nobody minds: who comes last is there, an
//! entry that is not there is looked up page by page, and who goes leaves 0 behind,
//! whoever was there. So the host only ever writes them.
//!
//! Neighbours in 64 KiB belong to one block of the engine, whose lock the caller has, so
//! a group of 16 entries has one writer at a time. Leaves that have become empty are
//! taken back when none is left, while no dispatch runs: a kernel may have read the
//! leaf's address a moment ago.
//!
//! Memory that a device sees can be slow to read for the CPU (a window onto a bus). Then
//! a copy of the entries is kept in engine memory, and that is what is read.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hmm_hal::DeviceError;
use hmm_mem::Pages;
use hmm_types::{Access, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRange, VirtAddr};

use crate::gate::Gate;
use crate::pool::Pool;

/// Entries of a leaf.
pub(crate) const LEAF_PAGES: usize = 1 << 18;
/// Where a leaf's wanted bits begin.
const WANTED: usize = LEAF_PAGES * 8;
/// Words of a leaf's wanted bits.
const WANTED_WORDS: usize = LEAF_PAGES * 2 / 32;
/// Bytes of a leaf.
pub(crate) const LEAF_BYTES: usize = WANTED + WANTED_WORDS * 4;
/// Entries of the root, without the one for addresses of no user.
const GIBS: usize = 1 << 17;
/// Where the groups begin, behind the root.
const GROUPS_AT: usize = ((GIBS + 1) * 8).next_multiple_of(4096);
const GROUPS: usize = 1 << 17;
/// Bytes of the root and the groups.
pub(crate) const ROOT_BYTES: usize = GROUPS_AT + GROUPS * 8;
const GIB_SHIFT: u32 = 30;

const READ: u64 = 1;
const WRITE: u64 = 2;
const FLAGS: u64 = PAGE_SIZE - 1;
/// Pages that one entry can speak for.
const GROUP: usize = 16;
const GROUP_BYTES: u64 = GROUP as u64 * PAGE_SIZE;
/// Of a group's entry, where a page's has [`WRITE`].
const GROUP_WRITE: u64 = 1 << 15;

// Kernels look where the host writes.
const _: () = {
    use hmm_spirv::table as kernels;
    assert!(kernels::ROOT_SIZE == ROOT_BYTES as u64 && kernels::LEAF_SIZE == LEAF_BYTES as u64);
    assert!(kernels::GROUPS_AT == GROUPS_AT as u64 && kernels::GROUPS == GROUPS as u64);
    assert!(kernels::WANTED == WANTED as u64 && 1 << kernels::GROUP_SHIFT == GROUP_BYTES);
    assert!(kernels::READABLE == READ && kernels::WRITABLE == WRITE);
    assert!(kernels::GROUP_READABLE == READ && kernels::GROUP_WRITABLE == GROUP_WRITE);
};

/// What [`Table::used`] holds while a leaf is taken back.
const TAKEN: u32 = 1 << 31;

/// Where the table's memory is, for the host and for the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) host: *mut u8,
    pub(crate) device: u64,
}

/// What a look at ranges has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survey {
    /// A page is not mapped for its access.
    Missing,
    /// All are.
    Apart,
    /// All are, and this added to any of their addresses is where it leads to.
    At(u64),
}

/// The page table of one device.
pub(crate) struct Table {
    root: Place,
    leaves: Place,
    /// A copy of all entries, leaf by leaf, where the table itself is slow to read.
    copy: Option<Pages>,
    /// The leaf of each GiB, 0 for none.
    leaf_of: hmm_mem::Vec<AtomicU32>,
    /// Pages that a leaf has entries for, and threads that work on it.
    used: hmm_mem::Vec<AtomicU32>,
    /// Leaves that are some GiB's; to be read without a lock.
    in_use: AtomicU32,
}

// SAFETY: the pointers lead to memory that belongs to no thread and stays until the
// device is closed; it is only used as atomics.
unsafe impl Send for Table {}
// SAFETY: as for Send.
unsafe impl Sync for Table {}

/// A leaf that is not taken back until this is dropped.
struct Pinned<'a> {
    table: &'a Table,
    leaf: u32,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.table.used[self.leaf as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

impl Table {
    /// An empty table of `leaves` leaves in memory that is zero. `None` when engine
    /// memory is exhausted.
    pub(crate) fn new(root: Place, leaves: Place, count: u32, slow_to_read: bool) -> Option<Self> {
        let copy = if slow_to_read {
            let bytes = count as u64 * WANTED as u64;
            let pages = Pages::new(PageCount::new(bytes / PAGE_SIZE))?;
            Some(pages)
        } else {
            None
        };
        let mut leaf_of = hmm_mem::vec_with_capacity(GIBS);
        leaf_of.resize_with(GIBS, AtomicU32::default);
        let mut used = hmm_mem::vec_with_capacity(count as usize);
        used.resize_with(count as usize, AtomicU32::default);
        let table = Self {
            root,
            leaves,
            copy,
            leaf_of,
            used,
            in_use: AtomicU32::new(0),
        };
        for slot in 0..=GIBS {
            table.set_root(slot, 0);
        }
        Some(table)
    }

    /// Leaves in use, the empty one not counted.
    pub(crate) fn leaves(&self) -> u32 {
        self.in_use.load(Ordering::Relaxed)
    }

    /// Whether pages can be mapped without taking anything away: nothing is there, or
    /// the same frames with no more rights. `first` is the first page's device address;
    /// the others follow.
    pub(crate) fn fits(&self, range: PageRange, first: u64, access: Access) -> bool {
        let flags = flags(access);
        let mut fits = true;
        self.for_spans(range, |leaf, page, count, done| {
            for index in 0..count {
                let old = self.load(leaf, page + index);
                let new = (first + ((done + index) as u64) * PAGE_SIZE) | flags;
                fits &= old == 0 || (old & !new == 0 && old & !FLAGS == new & !FLAGS);
            }
        });
        fits
    }

    /// Maps pages, where that fits.
    pub(crate) fn map(&self, range: PageRange, first: u64, access: Access) {
        debug_assert!(
            self.fits(range, first, access),
            "{range} is mapped otherwise"
        );
        let flags = flags(access);
        let start = range.start().addr() >> PAGE_SHIFT;
        self.for_spans(range, |leaf, _, count, done| {
            self.update(leaf, start + done, count, |index| {
                (first + ((done + index) as u64) * PAGE_SIZE) | flags
            });
        });
    }

    /// Makes the leaves that a range needs.
    pub(crate) fn prepare<'a>(
        &'a self,
        range: PageRange,
        gate: &Gate,
    ) -> Result<Prepared<'a>, DeviceError> {
        let mut prepared = Prepared(hmm_mem::vec());
        let mut gib = range.start().addr() >> GIB_SHIFT;
        let last = (range.end().addr() - 1) >> GIB_SHIFT;
        while gib <= last {
            prepared.0.push(self.make(gib, gate)?);
            gib += 1;
        }
        Ok(prepared)
    }

    /// Clears the entries of a range; true when there were any. The gate says when that
    /// may be done, and when no access through them is under way any more.
    pub(crate) fn clear(&self, range: PageRange) -> bool {
        let mut any = false;
        let start = range.start().addr() >> PAGE_SHIFT;
        self.for_spans(range, |leaf, page, count, done| {
            let found = (page..page + count).any(|page| self.load(leaf, page) != 0);
            if found {
                self.update(leaf, start + done, count, |_| 0);
                any = true;
            }
        });
        any
    }

    /// Whether a page is mapped for an access.
    pub(crate) fn allows(&self, address: VirtAddr, access: Access) -> bool {
        let gib = address.addr() >> GIB_SHIFT;
        let needed = flags(access);
        self.pin(gib).is_some_and(|pinned| {
            let page = address.addr() >> PAGE_SHIFT & (LEAF_PAGES - 1);
            self.load(pinned.leaf, page) & needed == needed
        })
    }

    /// Looks at all pages of ranges.
    pub(crate) fn survey(&self, ranges: &[(PageRange, Access)]) -> Survey {
        let mut distance = None;
        let mut one = true;
        for &(range, access) in ranges {
            let needed = flags(access);
            let mut seen = 0;
            let mut all = true;
            self.for_spans(range, |leaf, page, count, done| {
                let start = range.start().get() + done as u64 * PAGE_SIZE;
                for index in 0..count {
                    let entry = self.load(leaf, page + index);
                    all &= entry & needed == needed;
                    let address = start + index as u64 * PAGE_SIZE;
                    let here = (entry & !FLAGS).wrapping_sub(address);
                    one &= *distance.get_or_insert(here) == here;
                }
                seen += count;
            });
            if !all || seen < range.pages().index() {
                return Survey::Missing;
            }
        }
        match distance {
            Some(distance) if one => Survey::At(distance),
            _ => Survey::Apart,
        }
    }

    /// Visits pages of a range that are mapped to another place than `wanted` says.
    pub(crate) fn misplaced(
        &self,
        range: PageRange,
        wanted: impl Fn(VirtAddr) -> Option<u64>,
        mut visit: impl FnMut(PageRange),
    ) {
        self.for_spans(range, |leaf, page, count, done| {
            for index in 0..count {
                let entry = self.load(leaf, page + index) & !FLAGS;
                let at = range.start().plus_pages((done + index) as u64);
                if entry != 0 && wanted(at).is_some_and(|place| place != entry) {
                    visit(PageRange::from_pages(at, PageCount::ONE));
                }
            }
        });
    }

    /// Forgets that kernels have asked for a page: what is asked for from now on is
    /// logged anew. The empty leaf's bit stands for many pages, this one among them.
    pub(crate) fn clear_wanted(&self, address: VirtAddr, access: Access) {
        let page = address.addr() >> PAGE_SHIFT & (LEAF_PAGES - 1);
        let bit = page * 2 + usize::from(access == Access::Write);
        let mask = !(1u32 << (bit % 32));
        self.wanted(0, bit / 32).fetch_and(mask, Ordering::SeqCst);
        if let Some(pinned) = self.pin(address.addr() >> GIB_SHIFT) {
            let word = self.wanted(pinned.leaf, bit / 32);
            word.fetch_and(mask, Ordering::SeqCst);
        }
    }

    /// The same for all pages.
    pub(crate) fn clear_all_wanted(&self, gate: &Gate) {
        let fresh = gate.lock().pool.fresh();
        for leaf in 0..fresh {
            for word in 0..WANTED_WORDS {
                let word = self.wanted(leaf, word);
                if word.load(Ordering::Relaxed) != 0 {
                    word.store(0, Ordering::SeqCst);
                }
            }
        }
    }

    fn for_spans(&self, range: PageRange, mut visit: impl FnMut(u32, usize, usize, usize)) {
        let first = range.start().addr() >> PAGE_SHIFT;
        let end = range.end().addr() >> PAGE_SHIFT;
        let mut page = first;
        while page < end {
            let cut = ((page / LEAF_PAGES + 1) * LEAF_PAGES).min(end);
            if let Some(pinned) = self.pin(page / LEAF_PAGES) {
                visit(pinned.leaf, page % LEAF_PAGES, cut - page, page - first);
            }
            page = cut;
        }
    }

    /// Enters pages of one leaf, and keeps the groups of 16 that they lie in right.
    /// `number` is the first one's in the address space.
    fn update(&self, leaf: u32, number: usize, count: usize, entry: impl Fn(usize) -> u64) {
        let first = number % LEAF_PAGES;
        let end = first + count;
        for group in first / GROUP..=(end - 1) / GROUP {
            let start = group * GROUP;
            let old: [u64; GROUP] = std::array::from_fn(|index| self.load(leaf, start + index));
            let new: [u64; GROUP] = std::array::from_fn(|index| {
                let page = start + index;
                if (first..end).contains(&page) {
                    entry(page - first)
                } else {
                    old[index]
                }
            });
            let (before, after) = (together(&old), together(&new));
            let address = (number - first + start) << PAGE_SHIFT;
            if before != 0 && before != after {
                self.set_group(address, 0);
            }
            let (mut more, mut fewer) = (0, 0);
            for index in 0..GROUP {
                if new[index] != old[index] {
                    self.store(leaf, start + index, new[index]);
                    more += u32::from(old[index] == 0);
                    fewer += u32::from(new[index] == 0);
                }
            }
            if after != 0 && before != after {
                self.set_group(address, after);
            }
            self.used[leaf as usize].fetch_add(more, Ordering::SeqCst);
            self.used[leaf as usize].fetch_sub(fewer, Ordering::SeqCst);
        }
    }

    /// Keeps a GiB's leaf, if it has one.
    fn pin(&self, gib: usize) -> Option<Pinned<'_>> {
        let slot = self.leaf_of.get(gib)?;
        loop {
            let leaf = slot.load(Ordering::SeqCst);
            if leaf == 0 {
                return None;
            }
            self.used[leaf as usize].fetch_add(1, Ordering::SeqCst);
            let pinned = Pinned { table: self, leaf };
            // It may have been taken back in between.
            if slot.load(Ordering::SeqCst) == leaf {
                return Some(pinned);
            }
        }
    }

    fn make(&self, gib: usize, gate: &Gate) -> Result<Pinned<'_>, DeviceError> {
        if let Some(pinned) = self.pin(gib) {
            return Ok(pinned);
        }
        if let Some(pinned) = self.enter_new(gib, &mut gate.lock().pool) {
            return Ok(pinned);
        }
        let made = gate.when_idle(|pool| {
            self.take_back(pool);
            self.enter_new(gib, pool)
        });
        made.flatten().ok_or(DeviceError::OutOfMemory)
    }

    /// Gives a GiB a leaf. The pool is locked, so nobody else does.
    fn enter_new(&self, gib: usize, pool: &mut Pool) -> Option<Pinned<'_>> {
        if let Some(pinned) = self.pin(gib) {
            return Some(pinned);
        }
        let leaf = pool.take()?;
        self.used[leaf as usize].fetch_add(1, Ordering::SeqCst);
        self.leaf_of[gib].store(leaf, Ordering::SeqCst);
        self.set_root(gib, leaf);
        self.in_use.fetch_add(1, Ordering::Relaxed);
        Some(Pinned { table: self, leaf })
    }

    /// Takes back the leaves that nothing is entered in. No dispatch runs.
    fn take_back(&self, pool: &mut Pool) {
        for (gib, slot) in self.leaf_of.iter().enumerate() {
            let leaf = slot.load(Ordering::SeqCst);
            if leaf == 0 {
                continue;
            }
            let used = &self.used[leaf as usize];
            let taken = used.compare_exchange(0, TAKEN, Ordering::SeqCst, Ordering::SeqCst);
            if taken.is_ok() {
                slot.store(0, Ordering::SeqCst);
                self.set_root(gib, 0);
                for word in 0..WANTED_WORDS {
                    self.wanted(leaf, word).store(0, Ordering::Relaxed);
                }
                used.fetch_sub(TAKEN, Ordering::SeqCst);
                pool.put(leaf);
                self.in_use.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn set_root(&self, slot: usize, leaf: u32) {
        debug_assert!(slot <= GIBS, "the root has no slot {slot}");
        let address = self.leaves.device + u64::from(leaf) * LEAF_BYTES as u64;
        // SAFETY: the root has that many words, aligned (`Place` comes from a page).
        let word = unsafe { &*self.root.host.cast::<AtomicU64>().add(slot) };
        word.store(address, Ordering::Release);
    }

    fn load(&self, leaf: u32, page: usize) -> u64 {
        debug_assert!(page < LEAF_PAGES);
        let word = match &self.copy {
            None => self.entry(leaf, page),
            Some(copy) => {
                let base: *const AtomicU64 =
                    std::ptr::with_exposed_provenance(copy.range().start().addr());
                // SAFETY: the copy has an entry for each page of each leaf, and is
                // only used as these atomics.
                unsafe { &*base.add(leaf as usize * LEAF_PAGES + page) }
            }
        };
        word.load(Ordering::Relaxed)
    }

    fn store(&self, leaf: u32, page: usize, entry: u64) {
        if let Some(copy) = &self.copy {
            let base: *const AtomicU64 =
                std::ptr::with_exposed_provenance(copy.range().start().addr());
            // SAFETY: as in `load`.
            let word = unsafe { &*base.add(leaf as usize * LEAF_PAGES + page) };
            word.store(entry, Ordering::Relaxed);
        }
        self.entry(leaf, page).store(entry, Ordering::Release);
    }

    fn entry(&self, leaf: u32, page: usize) -> &AtomicU64 {
        debug_assert!((leaf as usize) < self.used.len() && page < LEAF_PAGES);
        // SAFETY: the leaf is one of the table's, and has that entry; device and host
        // use it as one aligned word.
        unsafe {
            let leaf = self.leaves.host.add(leaf as usize * LEAF_BYTES);
            &*leaf.cast::<AtomicU64>().add(page)
        }
    }

    /// Enters the group at an address; `page` is its first page's entry, or 0.
    fn set_group(&self, address: usize, page: u64) {
        let index = (address >> PAGE_SHIFT) / GROUP % GROUPS;
        let write = if page & WRITE == 0 { 0 } else { GROUP_WRITE };
        let tag = (address >> 33 << 1) as u64;
        let entry = match page {
            0 => 0,
            page => page & !FLAGS | write | tag | READ,
        };
        // SAFETY: the groups are behind the root, and this is one of them.
        let word = unsafe {
            let groups = self.root.host.add(GROUPS_AT);
            &*groups.cast::<AtomicU64>().add(index)
        };
        word.store(entry, Ordering::Release);
    }

    fn wanted(&self, leaf: u32, word: usize) -> &AtomicU32 {
        debug_assert!((leaf as usize) < self.used.len() && word < WANTED_WORDS);
        // SAFETY: as in `entry`, for the words behind the entries.
        unsafe {
            let leaf = self.leaves.host.add(leaf as usize * LEAF_BYTES + WANTED);
            &*leaf.cast::<AtomicU32>().add(word)
        }
    }
}

/// The leaves of a range, which are there until this is dropped.
pub(crate) struct Prepared<'a>(
    #[allow(
        dead_code,
        reason = "it is the pins that matter, until they are dropped"
    )]
    hmm_mem::Vec<Pinned<'a>>,
);

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("root", &self.root)
            .field("leaves", &self.leaves)
            .finish_non_exhaustive()
    }
}

const fn flags(access: Access) -> u64 {
    match access {
        Access::Read => READ,
        Access::Write => READ | WRITE,
    }
}

/// The first entry of pages that are a group, or 0.
fn together(group: &[u64; GROUP]) -> u64 {
    let first = group[0];
    let together = first & !FLAGS & (GROUP_BYTES - 1) == 0
        && group
            .iter()
            .zip(0u64..)
            .all(|(&entry, index)| entry == first + index * PAGE_SIZE);
    if together { first } else { 0 }
}

#[cfg(test)]
mod tests;
