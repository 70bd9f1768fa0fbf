//! A worker's translation cache.
//!
//! A slot holds where the leaf of a 2 MiB span lies. Leaves never move and
//! stay until the device is closed, so a slot never becomes wrong: nothing has
//! to be flushed when pages are unmapped. The page's own entry is read from the
//! leaf on every access, inside of the access section, which is one load from
//! a table that is 1000 times smaller than what it maps.

use std::cell::Cell;
use std::ptr;

use crate::page_table::{Directory, LEAF_SHIFT, Leaf, LeafAddress};

/// Slots of a TLB; together they span 512 MiB.
const SLOTS: usize = 256;

#[derive(Clone, Copy)]
pub(crate) struct Slot {
    /// Number of the 2 MiB span.
    tag: usize,
    pub(crate) leaf: *const Leaf,
    pub(crate) directory: *const Directory,
}

/// The translation cache of one worker: direct mapped.
pub(crate) struct Tlb {
    slots: [Cell<Slot>; SLOTS],
}

impl Tlb {
    /// Nothing cached.
    pub(crate) const fn new() -> Self {
        Self {
            slots: [const {
                Cell::new(Slot {
                    tag: usize::MAX,
                    leaf: ptr::null(),
                    directory: ptr::null(),
                })
            }; SLOTS],
        }
    }

    /// The leaf that spans an address, if it is cached.
    #[inline(always)]
    pub(crate) fn find(&self, address: usize) -> Option<Slot> {
        let tag = address >> LEAF_SHIFT;
        let slot = self.slots[tag % SLOTS].get();
        (slot.tag == tag).then_some(slot)
    }

    /// Caches a leaf.
    pub(crate) fn fill(&self, address: usize, found: LeafAddress) {
        let tag = address >> LEAF_SHIFT;
        self.slots[tag % SLOTS].set(Slot {
            tag,
            leaf: found.leaf,
            directory: found.directory,
        });
    }
}
