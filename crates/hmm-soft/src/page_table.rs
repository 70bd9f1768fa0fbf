//! The device's page table: a radix tree over 48 bits of address.
//!
//! ```text
//! address: | top 9 | middle 9 | directory 9 | leaf 9 | offset 12 |
//!
//! Top ──> Middle ──> Directory ─┬─> Leaf       512 entries of 4 bytes
//!                               └─> HostPages  512 addresses, made on demand
//! ```
//!
//! An entry is one `u32`: two bits of kind, one of permission, and the frame's
//! number. Only exclusive pages need a host address of their own, which stands
//! in a table next to the leaf; pages used in place are where their address
//! says. So a page costs 4 bytes, and a span of 2 MiB costs 2 KiB.
//!
//! Tables appear when something is mapped and stay until the device is closed:
//! whoever looked a leaf up may keep its address. Lookups take no lock. Two
//! threads never change the same entry at a time, since they hold the lock of
//! the block around it.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use hmm_hal::DeviceError;
use hmm_mem::EngineAlloc;
use hmm_types::{Access, FrameId, FrameRange, PAGE_SHIFT, PAGES_PER_BLOCK, PageRange, VirtAddr};

use crate::memory::MAX_FRAMES;

const FANOUT: usize = 512;
/// log2 of the bytes that a leaf spans.
pub(crate) const LEAF_SHIFT: u32 = 21;
const DIRECTORY_SHIFT: u32 = 30;
const MIDDLE_SHIFT: u32 = 39;

/// What the device finds at a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u32);

const KIND_MASK: u32 = 0b011;
const KIND_FRAME: u32 = 0b001;
const KIND_IN_PLACE: u32 = 0b010;
const KIND_STAGED: u32 = 0b011;
const WRITABLE: u32 = 0b100;
const FRAME_SHIFT: u32 = 3;
const _: () = assert!(MAX_FRAMES == 1 << (u32::BITS - FRAME_SHIFT));

impl Entry {
    fn with(kind: u32, access: Access) -> Self {
        Self(match access {
            Access::Read => kind,
            Access::Write => kind | WRITABLE,
        })
    }

    fn frame(frame: FrameId, access: Access) -> Self {
        let number = frame.get();
        assert!(u64::from(number) < MAX_FRAMES, "{frame:?} does not exist");
        Self(number << FRAME_SHIFT | Self::with(KIND_FRAME, access).0)
    }

    /// Whether the page is in a frame, and mapped for the access.
    #[inline(always)]
    pub(crate) const fn is_frame_for(self, write: bool) -> bool {
        let mask = if write {
            KIND_MASK | WRITABLE
        } else {
            KIND_MASK
        };
        self.0 & mask
            == if write {
                KIND_FRAME | WRITABLE
            } else {
                KIND_FRAME
            }
    }

    /// Whether the page is staged for exclusive use, and mapped for the access.
    #[inline(always)]
    pub(crate) const fn is_staged_for(self, write: bool) -> bool {
        self.0 & KIND_MASK == KIND_STAGED && (!write || self.0 & WRITABLE != 0)
    }

    /// Whether the page is system memory to use in place, for the access.
    pub(crate) const fn is_in_place_for(self, write: bool) -> bool {
        self.0 & KIND_MASK == KIND_IN_PLACE && (!write || self.0 & WRITABLE != 0)
    }

    /// Byte offset of the frame in the device's memory.
    #[inline(always)]
    pub(crate) const fn frame_offset(self) -> usize {
        ((self.0 >> FRAME_SHIFT) as usize) << PAGE_SHIFT
    }

    /// Whether an access under way through `self` would be wrong under `new`:
    /// the page has moved, or may not be written any more.
    const fn conflicts_with(self, new: Self) -> bool {
        self.0 != 0
            && (self.0 & KIND_MASK == KIND_STAGED
                || (self.0 | WRITABLE) != (new.0 | WRITABLE)
                || self.0 & !new.0 & WRITABLE != 0)
    }
}

/// Entries of 2 MiB.
pub(crate) struct Leaf {
    entries: [AtomicU32; PAGES_PER_BLOCK],
}
const _: () = assert!(size_of::<Leaf>() == 4 * PAGES_PER_BLOCK);

impl Leaf {
    /// The entry of the page that holds an address.
    #[inline(always)]
    pub(crate) fn entry(&self, address: usize) -> Entry {
        Entry(self.entries[(address >> PAGE_SHIFT) % PAGES_PER_BLOCK].load(Ordering::Acquire))
    }
}

/// Host addresses of 2 MiB's staged pages.
struct HostPages {
    addresses: [AtomicU64; PAGES_PER_BLOCK],
}

/// Leaves of 1 GiB.
pub(crate) struct Directory {
    leaves: [AtomicPtr<Leaf>; FANOUT],
    hosts: [AtomicPtr<HostPages>; FANOUT],
}

impl Directory {
    /// Host address of the staged page that holds `address`. Valid for a page
    /// whose entry was just found to be staged.
    pub(crate) fn host_page(&self, address: usize) -> usize {
        let table = self.hosts[(address >> LEAF_SHIFT) % FANOUT].load(Ordering::Acquire);
        assert!(!table.is_null(), "a staged page without a host address");
        // SAFETY: tables are made whole before their address is stored, and
        // stay until the device is closed, when no kernel runs any more.
        let table = unsafe { &*table };
        let host =
            table.addresses[(address >> PAGE_SHIFT) % PAGES_PER_BLOCK].load(Ordering::Acquire);
        VirtAddr::new(host).addr()
    }
}

struct Middle {
    directories: [AtomicPtr<Directory>; FANOUT],
}

struct Top {
    middles: [AtomicPtr<Middle>; FANOUT],
}

/// A leaf, and the directory that it stands in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafAddress {
    pub(crate) leaf: *const Leaf,
    pub(crate) directory: *const Directory,
}

/// A table whose all-zero bytes are an empty table.
///
/// # Safety
/// The type consists of atomics for which zero is valid, and nothing else.
unsafe trait Table {}
// SAFETY: an array of `AtomicU32`.
unsafe impl Table for Leaf {}
// SAFETY: an array of `AtomicU64`.
unsafe impl Table for HostPages {}
// SAFETY: arrays of `AtomicPtr`, where zero is null.
unsafe impl Table for Directory {}
// SAFETY: an array of `AtomicPtr`.
unsafe impl Table for Middle {}
// SAFETY: an array of `AtomicPtr`.
unsafe impl Table for Top {}

/// The page table of one device.
pub(crate) struct PageTable {
    top: hmm_mem::Box<Top>,
    bytes: AtomicUsize,
}

impl PageTable {
    /// An empty table; `None` when engine memory is exhausted.
    pub(crate) fn new() -> Option<Self> {
        Some(Self {
            top: empty_table()?,
            bytes: AtomicUsize::new(size_of::<Top>()),
        })
    }

    /// Bytes of all tables.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The leaf that spans an address below 2^48, if there is one. It stays
    /// where it is until [`PageTable::release`].
    pub(crate) fn leaf(&self, address: usize) -> Option<LeafAddress> {
        let middle = self.top.middles[(address >> MIDDLE_SHIFT) % FANOUT].load(Ordering::Acquire);
        // SAFETY: a table's address is stored after the table was made, and
        // tables stay until `release`.
        let middle = unsafe { middle.as_ref()? };
        let directory =
            middle.directories[(address >> DIRECTORY_SHIFT) % FANOUT].load(Ordering::Acquire);
        // SAFETY: as above.
        let table = unsafe { directory.as_ref()? };
        let leaf = table.leaves[(address >> LEAF_SHIFT) % FANOUT].load(Ordering::Acquire);
        (!leaf.is_null()).then_some(LeafAddress {
            leaf: leaf.cast_const(),
            directory: directory.cast_const(),
        })
    }

    /// Makes the tables of a range, and says whether an entry there conflicts
    /// with the new ones: then those must be cleared and shot down first.
    fn prepare(
        &self,
        range: PageRange,
        staged: bool,
        new: impl Fn(usize) -> Entry,
    ) -> Result<bool, DeviceError> {
        let mut conflict = false;
        self.for_spans(range, |span, first| {
            let found = self.make_leaf(span.start().addr())?;
            if staged {
                // SAFETY: tables stay until `release`.
                let directory = unsafe { &*found.directory };
                self.child(&directory.hosts[(span.start().addr() >> LEAF_SHIFT) % FANOUT])?;
            }
            // SAFETY: as above.
            let leaf = unsafe { &*found.leaf };
            for (index, page) in span.iter_pages().enumerate() {
                conflict |= leaf.entry(page.addr()).conflicts_with(new(first + index));
            }
            Ok(())
        })?;
        Ok(conflict)
    }

    /// Makes room for [`PageTable::set_frames`]; true when old entries must be
    /// cleared and shot down before.
    pub(crate) fn prepare_frames(
        &self,
        range: PageRange,
        frames: FrameRange,
        access: Access,
    ) -> Result<bool, DeviceError> {
        self.prepare(range, false, |index| {
            Entry::frame(nth_frame(frames, index), access)
        })
    }

    /// Maps pages to frames; prepared before.
    pub(crate) fn set_frames(&self, range: PageRange, frames: FrameRange, access: Access) {
        self.set(range, |_, index| {
            Entry::frame(nth_frame(frames, index), access)
        });
    }

    /// Makes room for [`PageTable::set_host`], as
    /// [`PageTable::prepare_frames`] does.
    pub(crate) fn prepare_host(
        &self,
        range: PageRange,
        host: VirtAddr,
        access: Access,
    ) -> Result<bool, DeviceError> {
        let staged = host != range.start();
        let entry = host_entry(staged, access);
        self.prepare(range, staged, |_| entry)
    }

    /// Maps pages to host memory; prepared before.
    pub(crate) fn set_host(&self, range: PageRange, host: VirtAddr, access: Access) {
        let staged = host != range.start();
        let entry = host_entry(staged, access);
        self.set(range, |found, index| {
            if staged {
                let page = range.start().plus_pages(index as u64).addr();
                // SAFETY: tables stay until `release`, and `prepare_host` made
                // this one.
                let table = unsafe {
                    let slot = &(*found.directory).hosts[(page >> LEAF_SHIFT) % FANOUT];
                    &*slot.load(Ordering::Acquire)
                };
                table.addresses[(page >> PAGE_SHIFT) % PAGES_PER_BLOCK]
                    .store(host.plus_pages(index as u64).get(), Ordering::Release);
            }
            entry
        });
    }

    fn set(&self, range: PageRange, new: impl Fn(LeafAddress, usize) -> Entry) {
        let done = self.for_spans(range, |span, first| {
            let Some(found) = self.leaf(span.start().addr()) else {
                unreachable!("the range was prepared");
            };
            for (index, page) in span.iter_pages().enumerate() {
                let entry = new(found, first + index);
                // SAFETY: tables stay until `release`.
                let entries = unsafe { &(*found.leaf).entries };
                entries[(page.addr() >> PAGE_SHIFT) % PAGES_PER_BLOCK]
                    .store(entry.0, Ordering::Release);
            }
            Ok(())
        });
        debug_assert!(done.is_ok(), "storing entries cannot fail");
    }

    /// Clears the entries of a range; true when there were any. Accesses
    /// through them may be under way until a shootdown has ended.
    pub(crate) fn clear(&self, range: PageRange) -> bool {
        let mut any = false;
        let done = self.for_spans(range, |span, _| {
            if let Some(found) = self.leaf(span.start().addr()) {
                // SAFETY: tables stay until `release`.
                let entries = unsafe { &(*found.leaf).entries };
                for page in span.iter_pages() {
                    let entry = &entries[(page.addr() >> PAGE_SHIFT) % PAGES_PER_BLOCK];
                    if entry.load(Ordering::Relaxed) != 0 {
                        // The shootdown's fence orders all of them.
                        entry.store(0, Ordering::Relaxed);
                        any = true;
                    }
                }
            }
            Ok(())
        });
        debug_assert!(done.is_ok(), "clearing entries cannot fail");
        any
    }

    /// Visits the parts of a range that lie in one leaf each, with the index
    /// of their first page in the range.
    fn for_spans(
        &self,
        range: PageRange,
        mut visit: impl FnMut(PageRange, usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut first = 0;
        for span in range.blocks() {
            visit(span, first)?;
            first += span.pages().index();
        }
        Ok(())
    }

    fn make_leaf(&self, address: usize) -> Result<LeafAddress, DeviceError> {
        let middle = self.child(&self.top.middles[(address >> MIDDLE_SHIFT) % FANOUT])?;
        // SAFETY: `child` gives the address of a table that stays.
        let slot = unsafe { &(*middle).directories[(address >> DIRECTORY_SHIFT) % FANOUT] };
        let directory = self.child(slot)?;
        // SAFETY: as above.
        let slot = unsafe { &(*directory).leaves[(address >> LEAF_SHIFT) % FANOUT] };
        let leaf = self.child(slot)?;
        Ok(LeafAddress { leaf, directory })
    }

    /// The table that a slot leads to, made when there is none. Threads that
    /// meet here agree on the first one's.
    fn child<T: Table>(&self, slot: &AtomicPtr<T>) -> Result<*const T, DeviceError> {
        let there = slot.load(Ordering::Acquire);
        if !there.is_null() {
            return Ok(there.cast_const());
        }
        let made = hmm_mem::Box::into_raw(empty_table::<T>().ok_or(DeviceError::OutOfMemory)?);
        match slot.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                self.bytes.fetch_add(size_of::<T>(), Ordering::Relaxed);
                Ok(made.cast_const())
            }
            Err(there) => {
                // SAFETY: `made` came from a box just now, and nobody saw it.
                drop(unsafe { hmm_mem::Box::from_raw_in(made, EngineAlloc) });
                Ok(there.cast_const())
            }
        }
    }

    /// Gives all tables but the top one back.
    ///
    /// # Safety
    /// Nobody looks anything up, changes anything or keeps a leaf's address.
    pub(crate) unsafe fn release(&self) {
        for middle in take_all(&self.top.middles) {
            for directory in take_all(&middle.directories) {
                drop_all(&directory.leaves);
                drop_all(&directory.hosts);
            }
        }
        self.bytes.store(size_of::<Top>(), Ordering::Relaxed);
    }
}

fn drop_all<T>(slots: &[AtomicPtr<T>]) {
    take_all(slots).for_each(drop);
}

/// Empties slots that nobody else looks at any more.
fn take_all<T>(slots: &[AtomicPtr<T>]) -> impl Iterator<Item = hmm_mem::Box<T>> {
    slots.iter().filter_map(|slot| {
        let table = slot.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: what stands in a slot came from a box (see `child`), and the
        // slot is empty now, so nobody makes it a box twice. That nobody else
        // uses it is the contract of `release`, the only caller.
        (!table.is_null()).then(|| unsafe { hmm_mem::Box::from_raw_in(table, EngineAlloc) })
    })
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageTable({} bytes)", self.bytes())
    }
}

fn empty_table<T: Table>() -> Option<hmm_mem::Box<T>> {
    let zeroed = hmm_mem::Box::<T>::try_new_zeroed_in(EngineAlloc).ok()?;
    // SAFETY: zero bytes are a valid table (the trait's promise).
    Some(unsafe { zeroed.assume_init() })
}

fn nth_frame(frames: FrameRange, index: usize) -> FrameId {
    match u32::try_from(index) {
        Ok(index) => frames.frame(index),
        Err(_) => panic!("more pages than {frames:?}"),
    }
}

fn host_entry(staged: bool, access: Access) -> Entry {
    Entry::with(if staged { KIND_STAGED } else { KIND_IN_PLACE }, access)
}

#[cfg(test)]
mod tests;
