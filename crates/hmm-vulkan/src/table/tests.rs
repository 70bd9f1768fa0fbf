//! The table against a plain map, without Vulkan.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;

use super::*;

const LEAVES: u32 = 4;
/// Where the device is made to believe that the table lies.
const FAR: u64 = 1 << 40;

struct Memory {
    base: *mut u8,
    layout: Layout,
}

impl Memory {
    fn new() -> Self {
        let bytes = ROOT_BYTES.next_multiple_of(4096) + LEAVES as usize * LEAF_BYTES;
        let layout = Layout::from_size_align(bytes, 4096).unwrap();
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        assert!(!base.is_null());
        Self { base, layout }
    }

    fn table(&self, slow_to_read: bool) -> Table {
        let offset = ROOT_BYTES.next_multiple_of(4096);
        let root = Place {
            host: self.base,
            device: FAR,
        };
        let leaves = Place {
            host: self.base.wrapping_add(offset),
            device: FAR + offset as u64,
        };
        Table::new(root, leaves, LEAVES, slow_to_read).unwrap()
    }

    /// What a kernel finds: the walk of the contract.
    fn walk(&self, address: u64) -> u64 {
        self.read(self.leaf(address) + (address >> 12 & (LEAF_PAGES as u64 - 1)) * 8)
    }

    /// What a kernel finds for the address's group: as a page's entry, or 0.
    fn group(&self, address: u64) -> u64 {
        let entry = self.read(FAR + GROUPS_AT as u64 + (address >> 16) % GROUPS as u64 * 8);
        let there = entry & 1 != 0 && entry & 0x7ffe == address >> 33 << 1;
        let write = entry >> 15 << 1 & WRITE;
        if there {
            entry & !0xffff | write | READ
        } else {
            0
        }
    }

    fn leaf(&self, address: u64) -> u64 {
        let slot = if address >> 47 == 0 {
            address >> 30
        } else {
            GIBS as u64
        };
        self.read(FAR + slot * 8)
    }

    fn read(&self, device: u64) -> u64 {
        let at = self
            .base
            .wrapping_add(usize::try_from(device - FAR).unwrap());
        // SAFETY: an aligned word of the table.
        unsafe { (*at.cast::<AtomicU64>()).load(Ordering::Acquire) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_pages(VirtAddr::new(first << 12), PageCount::new(count))
}

fn map(table: &Table, gate: &Gate, range: PageRange, frame: u64, access: Access) -> bool {
    let prepared = table.prepare(range, gate).unwrap();
    let fits = table.fits(range, frame, access);
    if !fits {
        table.clear(range);
    }
    table.map(range, frame, access);
    drop(prepared);
    fits
}

#[test]
fn no_address_leads_astray() {
    let memory = Memory::new();
    memory.table(false);
    for address in [0, 4096, 1 << 30, (1 << 47) - 1, 1 << 47, u64::MAX] {
        assert_eq!(memory.walk(address), 0, "{address:#x}");
        assert_eq!(memory.group(address), 0, "{address:#x}");
    }
}

#[test]
fn entries_say_where_and_what() {
    let memory = Memory::new();
    let (table, gate) = (memory.table(false), Gate::new(Pool::new(LEAVES)));
    assert!(map(&table, &gate, pages(5, 2), 0x7000, Access::Read));
    assert_eq!(memory.walk(5 << 12 | 17), 0x7000 | READ);
    assert_eq!(memory.walk(6 << 12), 0x8000 | READ);
    assert_eq!(memory.walk(7 << 12), 0);
    assert!(table.allows(VirtAddr::new(5 << 12), Access::Read));
    assert!(!table.allows(VirtAddr::new(5 << 12), Access::Write));
    // More rights for the same frames take nothing away, fewer do.
    assert!(map(&table, &gate, pages(5, 2), 0x7000, Access::Write));
    assert!(!map(&table, &gate, pages(5, 1), 0x7000, Access::Read));
    assert!(!map(&table, &gate, pages(6, 1), 0xa000, Access::Write));
    assert_eq!(memory.walk(6 << 12), 0xa000 | READ | WRITE);
    assert!(table.clear(pages(5, 2)));
    assert!(!table.clear(pages(5, 2)));
    assert_eq!(memory.walk(5 << 12), 0);
}

#[test]
fn sixteen_pages_that_lie_together_are_a_group() {
    let memory = Memory::new();
    let (table, gate) = (memory.table(false), Gate::new(Pool::new(LEAVES)));
    let group = |page: u64| memory.group(page << 12);
    // Page by page: the last one makes it so for all.
    for page in 32..48 {
        assert_eq!(group(32), 0);
        map(
            &table,
            &gate,
            pages(page, 1),
            (page + 16) << 12,
            Access::Write,
        );
    }
    let whole = 48 << 12 | READ | WRITE;
    assert_eq!(group(32), whole);
    assert_eq!(group(47), whole);
    // Another access for one of them, a page less, a page more.
    table.clear(pages(40, 1));
    assert_eq!(group(32), 0);
    map(&table, &gate, pages(40, 1), 56 << 12, Access::Read);
    assert_eq!(group(32), 0);
    map(&table, &gate, pages(40, 1), 56 << 12, Access::Write);
    assert_eq!(group(32), whole);
    // A run over three groups; the frames are aligned like the pages, or are not.
    map(
        &table,
        &gate,
        pages(64 + 8, 32),
        (128 + 8) << 12,
        Access::Read,
    );
    assert_eq!([64, 80, 96].map(group), [0, 144 << 12 | READ, 0]);
    map(&table, &gate, pages(128, 16), 7 << 12, Access::Read);
    assert_eq!(group(128), 0);
}

#[test]
fn groups_of_one_place_are_not_taken_for_each_other() {
    let memory = Memory::new();
    let (table, gate) = (memory.table(false), Gate::new(Pool::new(LEAVES)));
    let [near, far] = [1u64, 0x3fff].map(|place| place << 33 >> 12);
    map(&table, &gate, pages(near, 16), 0x1_0000, Access::Read);
    assert_eq!(memory.group(near << 12), 0x1_0000 | READ);
    assert_eq!(memory.group(far << 12), 0);
    map(&table, &gate, pages(far, 16), 0x2_0000, Access::Write);
    assert_eq!(memory.group(far << 12), 0x2_0000 | READ | WRITE);
    assert_eq!(memory.group(near << 12), 0);
    assert_eq!(memory.walk(near << 12), 0x1_0000 | READ);
    // Whoever goes, nothing of it is left.
    table.clear(pages(far + 3, 1));
    assert_eq!([near, far].map(|page| memory.group(page << 12)), [0, 0]);
    assert_eq!(memory.walk(near << 12), 0x1_0000 | READ);
}

#[test]
fn leaves_are_bounded_and_come_back() {
    let memory = Memory::new();
    let (table, gate) = (memory.table(false), Gate::new(Pool::new(LEAVES)));
    let gib = |number: u64| pages(number << 18, 1);
    for number in 1..u64::from(LEAVES) {
        map(&table, &gate, gib(number), 0x1000, Access::Read);
    }
    assert!(matches!(
        table.prepare(gib(9), &gate),
        Err(DeviceError::OutOfMemory)
    ));
    let wanted = table.wanted(2, 5);
    wanted.store(7, Ordering::Relaxed);
    table.clear(gib(2));
    // While a stalled kernel runs none is taken back: it may have read the address.
    gate.begin(crate::gate::Manner::Parks, || true);
    assert!(table.prepare(gib(9), &gate).is_err());
    gate.end();
    map(&table, &gate, gib(9), 0x5000, Access::Read);
    assert_eq!(memory.walk(9 << 30), 0x5000 | READ);
    assert_eq!(memory.walk(2 << 30), 0);
    assert_eq!(wanted.load(Ordering::Relaxed), 0);
    assert_eq!(table.leaves(), 3);
}

#[test]
fn what_was_wanted_is_forgotten() {
    let memory = Memory::new();
    let (table, gate) = (memory.table(false), Gate::new(Pool::new(LEAVES)));
    let address = VirtAddr::new(3 << 12);
    map(&table, &gate, pages(4, 1), 0x1000, Access::Read);
    for leaf in [0, 1] {
        table.wanted(leaf, 0).store(u32::MAX, Ordering::Relaxed);
    }
    table.clear_wanted(address, Access::Write);
    for leaf in [0, 1] {
        assert_eq!(table.wanted(leaf, 0).load(Ordering::Relaxed), !(1 << 7));
    }
    table.clear_all_wanted(&gate);
    for leaf in [0, 1] {
        assert_eq!(table.wanted(leaf, 0).load(Ordering::Relaxed), 0);
    }
}

/// Random maps and clears against a map of pages, and groups against their definition.
#[test]
fn behaves_like_a_plain_map() {
    for (seed, slow) in [(1u64, false), (2, true), (3, false)] {
        let memory = Memory::new();
        let (table, gate) = (memory.table(slow), Gate::new(Pool::new(LEAVES)));
        let mut state = seed;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        // Around the border of two leaves.
        let base = LEAF_PAGES as u64 - 64;
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for _ in 0..4000 {
            let (first, count) = (base + random(120), 1 + random(40));
            if random(3) == 0 {
                let before = model.len();
                model.retain(|page, _| !(first..first + count).contains(page));
                let any = model.len() < before;
                assert_eq!(table.clear(pages(first, count)), any);
            } else {
                let frame = if random(2) == 0 { first } else { random(256) };
                let access = if random(2) == 0 {
                    Access::Read
                } else {
                    Access::Write
                };
                map(&table, &gate, pages(first, count), frame << 12, access);
                for index in 0..count {
                    model.insert(first + index, (frame + index) << 12 | flags(access));
                }
            }
            for page in base..base + 160 {
                let entry = memory.walk(page << 12);
                let expected = model.get(&page).copied().unwrap_or(0);
                assert_eq!(entry, expected, "page {page}, seed {seed}");
                let start = page / 16 * 16;
                let first = model.get(&start).copied().unwrap_or(0);
                let together = first != 0
                    && first & 0xf000 == 0
                    && (0..16).all(|k| model.get(&(start + k)) == Some(&(first + (k << 12))));
                let expected = if together { first } else { 0 };
                let group = memory.group(page << 12);
                assert_eq!(group, expected, "page {page}, seed {seed}");
            }
        }
    }
}
