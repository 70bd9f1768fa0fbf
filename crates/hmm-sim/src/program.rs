//! What a simulated program does, and how it is chosen.

use hmm_hal::SpaceId;
use hmm_types::{
    Access, DeviceId, MemoryKind, PAGE_SIZE, PAGES_PER_BLOCK, PageCount, PageRange, Permissions,
    VirtAddr,
};

use crate::actor::Kind;
use crate::calls::{ForkAdvice, MapRequest};
use crate::config::SimConfig;
use crate::engine::Request;
use crate::memory::huge_page_of;
use crate::oracle::{Flux, Oracle};
use crate::page::SIM_PAGE_BYTES;
use crate::rng::SimRng;
use crate::space::ARENA_START;

/// Size of the part of the address space that programs use.
const ARENA_PAGES: u64 = 5 * PAGES_PER_BLOCK as u64;
/// The same where there are pages of several blocks.
const GIGANTIC_ARENA_PAGES: u64 = 16 * PAGES_PER_BLOCK as u64;
/// A program has at most so many pages mapped.
const MAX_MAPPED_PAGES: usize = 1600;
/// The same where there are pages of several blocks.
const MAX_GIGANTIC_PAGES: usize = 6000;
/// Children that are alive at a time.
const MAX_CHILDREN: usize = 3;
/// Attempts to find a free place.
const PLACE_ATTEMPTS: u32 = 8;

/// What an access does with the bytes at its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads so many bytes.
    Load(usize),
    /// Writes so many bytes of this value.
    Store(usize, u8),
    /// Adds to the eight bytes at an aligned address.
    Add(u64),
}

impl Action {
    /// What the page must allow.
    #[must_use]
    pub const fn access(self) -> Access {
        match self {
            Self::Load(_) => Access::Read,
            Self::Store(..) | Self::Add(_) => Access::Write,
        }
    }
}

/// One operation of a thread or of a device's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// An access of the CPU or of the device.
    Access(VirtAddr, Action),
    /// mmap.
    Map(MapRequest),
    /// munmap.
    Unmap(PageRange),
    /// mmap with MAP_FIXED over what is there.
    MapOver(PageRange),
    /// mremap.
    Remap(PageRange, PageRange),
    /// madvise(MADV_DONTNEED).
    DontNeed(PageRange),
    /// madvise(MADV_DONTFORK) or (MADV_WIPEONFORK).
    AdviseFork(PageRange, ForkAdvice),
    /// mprotect.
    Protect(PageRange, Permissions),
    /// mlock.
    Lock(PageRange),
    /// munlock.
    Unlock(PageRange),
    /// Pins one page for DMA.
    Pin(PageRange),
    /// DMA of this value into the oldest pinned page.
    Dma(u8),
    /// Ends the oldest pin.
    Unpin,
    /// fork.
    Fork,
    /// A child exits.
    Exit,
    /// A request to the engine.
    Request(Request),
    /// A device is lost.
    LoseDevice(DeviceId),
    /// Nothing.
    Idle,
}

impl Op {
    /// Whether the engine is called to start it.
    pub(crate) const fn needs_engine(self) -> bool {
        matches!(self, Self::Request(_) | Self::Fork)
    }
}

/// Chooses what an actor does next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chooser<'a> {
    pub config: &'a SimConfig,
    pub oracle: &'a Oracle,
    pub kind: Kind,
}

impl Chooser<'_> {
    pub(crate) fn choose(&self, rng: &mut SimRng) -> Op {
        match self.kind {
            Kind::Device(_) => self.access(rng, SpaceId::OWN, true),
            Kind::Thread { space, .. } if space != SpaceId::OWN => self.choose_in_child(rng, space),
            Kind::Thread { .. } => self.choose_in_own(rng),
        }
    }

    fn choose_in_child(&self, rng: &mut SimRng, space: SpaceId) -> Op {
        match rng.below(40) {
            0 => Op::Exit,
            1 | 2 => {
                let range = self.range(rng, space);
                let changed = range.map(|range| self.changeable(space, range));
                let op = if rng.one_in(2) {
                    Op::DontNeed
                } else {
                    Op::Unmap
                };
                changed.map_or(Op::Idle, op)
            }
            _ => self.access(rng, space, false),
        }
    }

    fn choose_in_own(&self, rng: &mut SimRng) -> Op {
        let space = SpaceId::OWN;
        let mapped = self.oracle.space(space).map_or(0, |pages| pages.len());
        let device = DeviceId::new(rng.index(self.config.devices));
        let Some(range) = self.range(rng, space) else {
            return self.map(rng);
        };
        let changed = self.changeable(space, range);
        let steady = self.oracle.is_settled(space, range) && self.oracle.is_settled(space, changed);
        let request = |request| {
            if steady || self.config.racy_requests {
                Op::Request(request)
            } else {
                Op::Idle
            }
        };
        // Two threads that change the same range at once are a broken program;
        // but one may have what another one has given up.
        let change = |op| if steady { op } else { Op::Idle };
        if self.config.restless && rng.one_in(3) {
            return change(match rng.below(6) {
                0 => Op::Unmap(changed),
                1 => Op::MapOver(changed),
                2 => Op::DontNeed(changed),
                _ => self.remap(rng, changed),
            });
        }
        match rng.below(100) {
            0..10 if mapped < self.most_mapped() => self.map(rng),
            10..14 => change(Op::Unmap(changed)),
            14..15 => change(Op::MapOver(changed)),
            15..19 => change(self.remap(rng, changed)),
            19..23 => change(Op::DontNeed(changed)),
            23..24 if self.config.fork_flags => {
                let advice = if rng.one_in(2) {
                    ForkAdvice::DontFork
                } else {
                    ForkAdvice::WipeOnFork
                };
                change(Op::AdviseFork(changed, advice))
            }
            24..27 => change(Op::Protect(changed, permissions(rng))),
            27..28 if !self.is_hugetlb(space, range.start()) => {
                change(Op::Lock(changed.slice(0, changed.pages().get().min(16))))
            }
            28..30 => change(Op::Unlock(changed)),
            // Without page moving, nobody can tell that a page is pinned.
            30..32 if self.config.capabilities.move_pages => change(Op::Pin(range.slice(0, 1))),
            32..34 => Op::Dma((rng.bits() & 0xff) as u8),
            34..36 => Op::Unpin,
            36..38 if self.oracle.spaces().len() <= MAX_CHILDREN => Op::Fork,
            38..54 => request(Request::Migrate(range, device)),
            54..58 => request(Request::Prefetch(range, device)),
            58..63 => request(Request::Evict(range)),
            63..67 => request(Request::Exclusive(
                range.slice(0, range.pages().get().min(4)),
                device,
            )),
            67 if self.config.lose_devices && rng.one_in(8) => Op::LoseDevice(device),
            _ => self.access(rng, space, false),
        }
    }

    fn map(&self, rng: &mut SimRng) -> Op {
        let kind = match rng.below(12) {
            0 => MemoryKind::File,
            1 => MemoryKind::Shared,
            _ => MemoryKind::PrivateAnonymous,
        };
        let mut page_len = PageCount::ONE;
        let huge_once_in = if self.config.gigantic.is_some() { 3 } else { 6 };
        let (kind, pages) = if self.config.huge_pages && rng.one_in(huge_once_in) {
            page_len = PageCount::from(PAGES_PER_BLOCK);
            let pages = PAGES_PER_BLOCK as u64 * rng.between(1, 2);
            match self.config.gigantic {
                Some(gigantic) if rng.one_in(2) => {
                    page_len = gigantic;
                    let pages = gigantic.get() * if rng.one_in(4) { 2 } else { 1 };
                    (MemoryKind::HugeTlb, pages)
                }
                _ => (MemoryKind::HugeTlb, pages),
            }
        } else if rng.one_in(8) {
            (kind, PAGES_PER_BLOCK as u64)
        } else {
            (kind, rng.between(1, 64))
        };
        let place = self.place(rng, pages, page_len);
        place.map_or(Op::Idle, |range| {
            Op::Map(MapRequest {
                range,
                kind,
                page_len,
                foreign: rng.one_in(40),
            })
        })
    }

    /// A free place; often one that has just become free, and perhaps nobody
    /// has read of that yet.
    fn place(&self, rng: &mut SimRng, pages: u64, page_len: PageCount) -> Option<PageRange> {
        (0..PLACE_ATTEMPTS).find_map(|_| {
            let arena = self.arena();
            let mut first = rng.below(arena - pages);
            if let Some(left) = self.oracle.left(rng)
                && rng.one_in(2)
            {
                first = left.pages_since(ARENA_START).min(arena - pages);
            }
            if pages >= PAGES_PER_BLOCK as u64 {
                first -= first % PAGES_PER_BLOCK as u64;
            }
            first -= first % page_len.get();
            let range = PageRange::from_pages(ARENA_START.plus_pages(first), PageCount::new(pages));
            let flux = self.oracle.flux(SpaceId::OWN, range);
            let free = self.oracle.is_free(range) && matches!(flux, None | Some(Flux::Gone));
            free.then_some(range)
        })
    }

    fn is_hugetlb(&self, space: SpaceId, address: VirtAddr) -> bool {
        let page = self.oracle.page(space, address);
        page.is_some_and(|page| page.kind == MemoryKind::HugeTlb)
    }

    fn page_len(&self, space: SpaceId, address: VirtAddr) -> PageCount {
        let page = self.oracle.page(space, address);
        page.map_or(PageCount::ONE, |page| page.page_len)
    }

    const fn arena(&self) -> u64 {
        match self.config.gigantic {
            Some(_) => GIGANTIC_ARENA_PAGES,
            None => ARENA_PAGES,
        }
    }

    const fn most_mapped(&self) -> usize {
        match self.config.gigantic {
            Some(_) => MAX_GIGANTIC_PAGES,
            None => MAX_MAPPED_PAGES,
        }
    }

    /// The first pages of a range that one call can change: of hugetlbfs, the whole
    /// page.
    fn changeable(&self, space: SpaceId, range: PageRange) -> PageRange {
        if self.is_hugetlb(space, range.start()) {
            return huge_page_of(range.start(), self.page_len(space, range.start()));
        }
        let mut pages = range.iter_pages();
        match pages.position(|page| self.is_hugetlb(space, page)) {
            Some(first) => range.slice(0, first as u64),
            None => range,
        }
    }

    fn remap(&self, rng: &mut SimRng, from: PageRange) -> Op {
        if self.is_hugetlb(SpaceId::OWN, from.start()) {
            let page_len = self.page_len(SpaceId::OWN, from.start());
            let to = self.place(rng, from.pages().get(), page_len);
            return to.map_or(Op::Idle, |to| Op::Remap(from, to));
        }
        let pages = match rng.below(4) {
            0 => rng.between(1, from.pages().get()),
            1 => (from.pages().get() + rng.between(1, 16)).min(ARENA_PAGES / 2),
            _ => from.pages().get(),
        };
        if rng.one_in(4) {
            let to = PageRange::from_pages(from.start(), PageCount::new(pages));
            let grows = to.pages() > from.pages();
            let free = !grows || {
                let tail = PageRange::span(from.end(), to.end());
                self.oracle.is_free(tail) && self.oracle.flux(SpaceId::OWN, tail).is_none()
            };
            return if free { Op::Remap(from, to) } else { Op::Idle };
        }
        self.place(rng, pages, PageCount::ONE)
            .map_or(Op::Idle, |to| Op::Remap(from, to))
    }

    /// A mapped page and some that follow; sometimes they reach over the end.
    fn range(&self, rng: &mut SimRng, space: SpaceId) -> Option<PageRange> {
        let page = self.page(rng, space)?;
        if rng.one_in(10) {
            let block = PageCount::from(PAGES_PER_BLOCK);
            return Some(PageRange::from_pages(page.block_floor(), block));
        }
        let most = if rng.one_in(3) { 64 } else { 12 };
        Some(PageRange::from_pages(
            page,
            PageCount::new(rng.between(1, most)),
        ))
    }

    fn page(&self, rng: &mut SimRng, space: SpaceId) -> Option<VirtAddr> {
        let pages = self.oracle.space(space)?;
        // Near a random place, so that each mapping has the same chance at its
        // first pages, and accesses meet. Or what has just changed hands.
        let mut from = ARENA_START.plus_pages(rng.below(self.arena()));
        if let Some(left) = self.oracle.left(rng)
            && rng.one_in(4)
        {
            from = left;
        }
        let (&page, _) = pages.range(from..).next().or_else(|| pages.iter().next())?;
        let ahead = page.plus_pages(rng.below(8));
        Some(if pages.contains_key(&ahead) {
            ahead
        } else {
            page
        })
    }

    fn access(&self, rng: &mut SimRng, space: SpaceId, device: bool) -> Op {
        let Some(page) = self.page(rng, space) else {
            return Op::Idle;
        };
        let words = SIM_PAGE_BYTES as u64 / 8;
        let action = match rng.below(if device { 5 } else { 4 }) {
            0 | 1 => Action::Load(8 * usize::try_from(rng.between(1, words)).unwrap_or(1)),
            4 => Action::Add(rng.bits()),
            _ => Action::Store(1 + rng.index(8), (rng.bits() & 0xff) as u8),
        };
        let offset = match action {
            Action::Load(len) => rng.below((SIM_PAGE_BYTES - len) as u64 + 1),
            Action::Store(len, _) => rng.below((SIM_PAGE_BYTES - len) as u64 + 1),
            Action::Add(_) => 8 * rng.below(words),
        };
        // Now and then an address just behind a mapping.
        let page = if rng.one_in(60) {
            page.plus_pages(1)
        } else {
            page
        };
        debug_assert!(offset < PAGE_SIZE, "an access lies in one page");
        Op::Access(VirtAddr::new(page.get() + offset), action)
    }
}

fn permissions(rng: &mut SimRng) -> Permissions {
    let none = Permissions::default();
    match rng.below(6) {
        0 => none,
        1 | 2 => Permissions { read: true, ..none },
        _ => Permissions::READ_WRITE,
    }
}
