//! From addresses to blocks: what the gate protects.
//!
//! A *block* is up to 512 pages of the program's memory with their states; or one
//! larger page of hugetlbfs, which has 512 states as well (see
//! [`crate::gigantic`]). A *piece* says where pages of a block are mapped now. Registering memory makes
//! blocks aligned to 2 MiB with one piece each. What the program does to its
//! mappings afterwards changes pieces only: munmap takes pieces away, mremap
//! gives them other addresses. So an executor that works on pages of a block
//! with no lock held finds them again by block and index, wherever they are
//! mapped by then, and never mistakes new memory at an old address for them.
//!
//! ```text
//!  addresses   ...[======piece======][==piece==]   (gap)   [piece]...
//!                        |                \                  /
//!  blocks            block 7 [0..512)   block 8 [0..300)  [300..512)
//! ```

use hmm_mem::{Box, Vec};
use hmm_sync::{Mutex, Rank};
use hmm_types::{
    BLOCK_PAGES, BLOCK_SIZE, DeviceId, MAX_DEVICES, PAGES_PER_BLOCK, PageCount, PageRange, VirtAddr,
};

use crate::order::Order;
use crate::page::{PageEntry, PageState};

/// Most pieces a map may have: as many mappings as the kernel's default limit
/// allows a process.
pub(crate) const MAX_PIECES: usize = 1 << 20;

/// A block by its number in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockId(u32);

/// Pages `first..first + pages` of a block, mapped at `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: VirtAddr,
    pub(crate) pages: u32,
    pub(crate) block: BlockId,
    pub(crate) first: u32,
}

impl Piece {
    pub(crate) fn range(&self) -> PageRange {
        PageRange::from_pages(self.start, PageCount::new(u64::from(self.pages)))
    }

    /// The part of the piece that lies in `range`.
    fn cut(&self, range: PageRange) -> Option<Self> {
        let common = self.range().intersection(range)?;
        let skip = to_u32(common.start().pages_since(self.start));
        Some(Self {
            start: common.start(),
            pages: to_u32(common.pages().get()),
            block: self.block,
            first: self.first + skip,
        })
    }
}

fn to_u32(pages: u64) -> u32 {
    match u32::try_from(pages) {
        Ok(pages) => pages,
        Err(_) => unreachable!("a block has at most so many pages"),
    }
}

/// What a block's lock protects.
pub(crate) struct BlockInner {
    table: Option<Box<[PageEntry; PAGES_PER_BLOCK]>>,
    /// An entry of the table is for this many pages, as a power of two. They have
    /// frames that follow each other; the entry has the first. Pages are named by
    /// their index all the same.
    shift: u32,
    /// Pages in flight, and pages resting away from the CPU.
    in_flight: u32,
    away: u32,
    /// Pages in devices' coherent memory.
    coherent: u32,
    /// The block left the program as one transparent huge page.
    pub(crate) huge: bool,
    /// When a device last asked for one of its pages.
    pub(crate) last_use: u64,
    /// When one of them last left for a device.
    pub(crate) last_departure: u64,
    /// When a page of several blocks last came home.
    pub(crate) last_arrival: u64,
    /// Until then the kernel is taken to have no page for it.
    pub(crate) dry_until_ns: u64,
    /// No page of the block has been the kernel's to take since it was registered:
    /// see [`AddressSpace::may_have_freed_pages`](hmm_hal::AddressSpace).
    pub(crate) kept: bool,
    /// A page of hugetlbfs may have been write-protected, and was not placed anew
    /// since.
    pub(crate) protected: bool,
    /// Devices (one bit each) that map pages of the block in place.
    pub(crate) in_place: u16,
}

impl BlockInner {
    /// Pages have left for a device that uses them.
    pub(crate) const fn departed(&mut self, now: u64) {
        self.last_use = now;
        self.last_departure = now;
    }

    /// The entry that a page has, perhaps with others.
    pub(crate) fn entry(&self, index: u32) -> PageEntry {
        self.table
            .as_ref()
            .map_or(PageEntry::SYSTEM, |table| table[self.slot(index)])
    }

    /// The page's own state: what it says about a frame is about the page's.
    pub(crate) fn state(&self, index: u32) -> PageState {
        let state = self.entry(index).state();
        if self.shift == 0 {
            return state;
        }
        state.of_page(index & (self.unit() - 1))
    }

    /// How many pages an entry is for.
    pub(crate) const fn unit(&self) -> u32 {
        1 << self.shift
    }

    const fn slot(&self, index: u32) -> usize {
        (index >> self.shift) as usize
    }

    /// The states of all entries.
    pub(crate) fn states(&self) -> impl Iterator<Item = PageState> {
        (0..BLOCK_PAGES).map(|slot| self.entry(slot << self.shift).state())
    }

    /// Sets a page's state, and that of all that its entry is for, of which it has
    /// to be the first. Clears the marks. Allocates the table with the first state
    /// that is not `System`.
    pub(crate) fn set(&mut self, index: u32, state: PageState) {
        assert!(
            index & (self.unit() - 1) == 0,
            "a part of an entry cannot change"
        );
        let at = self.slot(index);
        if self.table.is_none() {
            if state == PageState::System {
                return;
            }
            self.table = Some(hmm_mem::boxed([PageEntry::SYSTEM; PAGES_PER_BLOCK]));
        }
        let Some(table) = self.table.as_mut() else {
            unreachable!("the table was made above");
        };
        let slot = &mut table[at];
        let before = slot.state();
        self.coherent -= u32::from(slot.coherent().is_some());
        *slot = PageEntry::new(state);
        self.in_flight -= u32::from(before.in_flight());
        self.in_flight += u32::from(state.in_flight());
        self.away -= u32::from(before.is_away());
        self.away += u32::from(state.is_away());
    }

    /// The drop that a page waits for has happened; its marks stay.
    pub(crate) fn note_dropped(&mut self, index: u32) {
        let entry = self.entry(index);
        let PageState::Dropping { device, frame } = entry.state() else {
            return;
        };
        self.set(index, PageState::Dropped { device, frame });
        if entry.parked() {
            self.park(index);
        }
        if entry.doomed() {
            self.doom(index);
        }
    }

    /// Notes that a CPU thread waits for a page in flight.
    pub(crate) fn park(&mut self, index: u32) {
        debug_assert!(self.state(index).in_flight());
        let at = self.slot(index);
        if let Some(table) = self.table.as_mut() {
            table[at].park();
        }
    }

    /// Notes that a page in flight was removed by the program.
    pub(crate) fn doom(&mut self, index: u32) {
        debug_assert!(self.state(index).in_flight());
        let at = self.slot(index);
        if let Some(table) = self.table.as_mut() {
            table[at].doom();
        }
    }

    /// Notes that a page in flight was removed by the program, which has zeros there
    /// now.
    pub(crate) fn refill(&mut self, index: u32) {
        debug_assert!(self.state(index).in_flight());
        let at = self.slot(index);
        if let Some(table) = self.table.as_mut() {
            table[at].refill();
        }
    }

    /// The device in whose coherent memory a page is.
    pub(crate) fn coherent(&self, index: u32) -> Option<DeviceId> {
        self.entry(index).coherent()
    }

    /// Notes in whose coherent memory a page is that rests with the CPU. The
    /// next [`BlockInner::set`] ends that.
    pub(crate) fn set_coherent(&mut self, index: u32, device: Option<DeviceId>) {
        assert!(self.shift == 0, "pages of hugetlbfs are never coherent");
        let entry = self.entry(index);
        let table = self
            .table
            .get_or_insert_with(|| hmm_mem::boxed([PageEntry::SYSTEM; PAGES_PER_BLOCK]));
        table[index as usize] = entry.with_coherent(device);
        self.coherent -= u32::from(entry.coherent().is_some());
        self.coherent += u32::from(device.is_some());
    }

    pub(crate) const fn has_coherent(&self) -> bool {
        self.coherent > 0
    }

    /// Pages in one device's coherent memory.
    pub(crate) fn count_coherent(&self, device: DeviceId) -> u64 {
        if !self.has_coherent() {
            return 0;
        }
        let there = (0..BLOCK_PAGES).filter(|&index| self.coherent(index) == Some(device));
        there.count() as u64
    }

    /// No page is in coherent memory any more.
    pub(crate) fn clear_coherent(&mut self) {
        for index in 0..BLOCK_PAGES {
            if !self.has_coherent() {
                break;
            }
            if self.coherent(index).is_some() {
                self.set_coherent(index, None);
            }
        }
        self.tidy();
    }

    /// Pages that rest away from the CPU.
    pub(crate) const fn away(&self) -> u32 {
        self.away
    }

    pub(crate) const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Checks that all of a page of hugetlbfs is in one state: but a part of it can
    /// get a frame of its own while the rest is on the device.
    fn check_alike(&self) {
        let kind = |state| match state {
            PageState::Transferring { device, .. } | PageState::Device { device, .. } => {
                (2, Some(device), false)
            }
            PageState::Copying { data } => (1, None, data),
            PageState::Dropping { device, .. } => (3, Some(device), false),
            PageState::Dropped { device, .. } => (4, Some(device), false),
            PageState::Downloading { device, .. } => (5, Some(device), false),
            PageState::System => (6, None, false),
            PageState::Discarded => (7, None, false),
            PageState::Staged { .. } | PageState::Uploading { .. } => {
                unreachable!("pages of hugetlbfs are never in staging")
            }
        };
        let mut entries = (0..BLOCK_PAGES)
            .map(|slot| self.entry(slot << self.shift))
            .filter(|entry| !entry.doomed());
        let first = entries.next().map(|entry| kind(entry.state()));
        let alike = entries.all(|entry| Some(kind(entry.state())) == first);
        assert!(alike, "a page of hugetlbfs is in several states");
    }

    /// Gives the table up when it says nothing.
    pub(crate) fn tidy(&mut self) {
        if self.away == 0
            && self.in_flight == 0
            && self
                .table
                .as_ref()
                .is_some_and(|table| table.iter().all(|entry| *entry == PageEntry::SYSTEM))
        {
            self.table = None;
            self.huge = false;
        }
    }
}

/// A block: its states behind a lock, its pieces behind the gate.
pub(crate) struct Block {
    inner: Mutex<BlockInner>,
    /// Changed with the gate held for writing only.
    pieces: Vec<Piece>,
    /// A page of hugetlbfs: nothing less than all of it leaves or comes home. It is
    /// mapped as a whole, too.
    hugetlb: bool,
    /// As in [`BlockInner::unit`].
    shift: u32,
}

impl Block {
    /// A block in memory whose pages are so large.
    fn new(page_len: PageCount) -> Self {
        let hugetlb = page_len > PageCount::ONE;
        let entries = to_u32(page_len.get()) / BLOCK_PAGES;
        let shift = entries.max(1).ilog2();
        Self {
            hugetlb,
            shift,
            inner: Mutex::new(
                Rank::Block,
                BlockInner {
                    table: None,
                    shift,
                    in_flight: 0,
                    away: 0,
                    coherent: 0,
                    huge: false,
                    last_use: 0,
                    last_departure: 0,
                    last_arrival: 0,
                    dry_until_ns: 0,
                    kept: false,
                    // Its memory may have been registered before.
                    protected: hugetlb,
                    in_place: 0,
                },
            ),
            pieces: hmm_mem::vec(),
        }
    }

    pub(crate) fn lock(&self) -> hmm_sync::MutexGuard<'_, BlockInner> {
        self.inner.lock()
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(crate) const fn is_hugetlb(&self) -> bool {
        self.hugetlb
    }

    /// A page of hugetlbfs that is larger than a block of other pages.
    pub(crate) const fn is_gigantic(&self) -> bool {
        self.shift > 0
    }

    /// How many pages the block can have.
    pub(crate) const fn pages(&self) -> u32 {
        BLOCK_PAGES << self.shift
    }

    /// How much one page of its memory is.
    pub(crate) const fn page_len(&self) -> PageCount {
        PageCount::new(if self.hugetlb { self.pages() as u64 } else { 1 })
    }

    /// Where the pages from `index` are mapped now, and how many of them
    /// follow each other there, at most `pages`.
    pub(crate) fn place_of(&self, index: u32, pages: u32) -> Option<PageRange> {
        self.pieces.iter().find_map(|piece| {
            if !(piece.first..piece.first + piece.pages).contains(&index) {
                return None;
            }
            let skip = index - piece.first;
            let count = pages.min(piece.pages - skip);
            Some(PageRange::from_pages(
                piece.start.plus_pages(u64::from(skip)),
                PageCount::new(u64::from(count)),
            ))
        })
    }
}

/// Registered memory of the process. The engine keeps it in the gate.
pub(crate) struct SpaceMap {
    /// Sorted by address; no two overlap.
    pieces: Vec<Piece>,
    blocks: Vec<Option<Box<Block>>>,
    free: Vec<BlockId>,
    /// Blocks without pieces that still have pages in flight.
    orphans: Vec<BlockId>,
    /// What is known about changes that are under way.
    pub(crate) order: Order,
    /// Pages in each device's coherent memory, at most: they are only added with
    /// the gate held for writing, and leave without being counted.
    coherent: [u64; MAX_DEVICES],
}

impl SpaceMap {
    pub(crate) const fn new() -> Self {
        Self {
            pieces: hmm_mem::vec(),
            blocks: hmm_mem::vec(),
            free: hmm_mem::vec(),
            orphans: hmm_mem::vec(),
            order: Order::new(),
            coherent: [0; MAX_DEVICES],
        }
    }

    /// A block that a piece or an executor names: both keep it alive.
    pub(crate) fn block(&self, id: BlockId) -> &Block {
        match &self.blocks[id.0 as usize] {
            Some(block) => block,
            None => unreachable!("a block that is still named was freed"),
        }
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        match &mut self.blocks[id.0 as usize] {
            Some(block) => block,
            None => unreachable!("a block that is still named was freed"),
        }
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Pages in a device's coherent memory, at most, counted anew where so many
    /// more might not fit into its size.
    pub(crate) fn count_coherent(&mut self, device: DeviceId, more: u64, size: u64) -> u64 {
        if self.coherent[device.index()] + more > size {
            let pages = self
                .blocks()
                .map(|block| block.lock().count_coherent(device));
            self.coherent[device.index()] = pages.sum();
        }
        self.coherent[device.index()]
    }

    /// Sets what [`SpaceMap::count_coherent`] says.
    pub(crate) const fn note_coherent(&mut self, device: DeviceId, pages: u64) {
        self.coherent[device.index()] = pages;
    }

    /// All blocks, also those that only executors name.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().flatten().map(|block| &**block)
    }

    /// The first piece that ends behind `address`.
    fn position(&self, address: VirtAddr) -> usize {
        self.pieces
            .partition_point(|piece| piece.range().end() <= address)
    }

    /// The page that `address` lies in: its piece, cut to begin there.
    pub(crate) fn find(&self, address: VirtAddr) -> Option<Piece> {
        let piece = self.pieces.get(self.position(address))?;
        if !piece.range().contains(address) {
            return None;
        }
        piece.cut(PageRange::span(address.page_floor(), piece.range().end()))
    }

    /// The pieces that overlap `range`, cut to it, in order.
    pub(crate) fn overlapping(&self, range: PageRange) -> impl Iterator<Item = Piece> {
        self.pieces[self.position(range.start())..]
            .iter()
            .take_while(move |piece| piece.start < range.end())
            .filter_map(move |piece| piece.cut(range))
    }

    /// All of the page that a piece is a part of, as it comes home.
    pub(crate) fn undivided(&self, piece: Piece) -> Piece {
        if !self.block(piece.block).hugetlb {
            return piece;
        }
        let block = self.block(piece.block);
        match block.pieces() {
            [whole] if whole.pages == block.pages() => *whole,
            _ => unreachable!("a huge page of hugetlbfs at {} is in pieces", piece.start),
        }
    }

    /// Makes pieces for what of `range` has none. False, and nothing changed,
    /// when there would be too many. `page_len`: how much one page of it is; in
    /// hugetlbfs, each is a block.
    pub(crate) fn insert(&mut self, range: PageRange, page_len: PageCount) -> bool {
        let spans = range.pages().index() / PAGES_PER_BLOCK + 2;
        if self.pieces.len() + spans > MAX_PIECES {
            return false;
        }
        self.sweep();
        let mut added: Vec<Piece> = hmm_mem::vec_with_capacity(spans);
        let mut next = range.start();
        let mut holes: Vec<PageRange> = hmm_mem::vec();
        for piece in self.overlapping(range) {
            if next < piece.start {
                holes.push(PageRange::span(next, piece.start));
            }
            next = piece.range().end();
        }
        if next < range.end() {
            holes.push(PageRange::span(next, range.end()));
        }
        let block_pages = page_len.get().max(u64::from(BLOCK_PAGES));
        let whole = |at: VirtAddr| at.get().is_multiple_of(page_len.bytes().get());
        if !holes
            .iter()
            .all(|hole| whole(hole.start()) && whole(hole.end()))
        {
            return false;
        }
        for hole in &holes {
            for span in hole.cut_at(PageCount::new(block_pages)) {
                added.push(self.place(span, page_len));
            }
        }
        let merged = added.len() + self.pieces.len();
        self.pieces.extend_from_slice(&added);
        self.pieces.sort_unstable_by_key(|piece| piece.start);
        debug_assert_eq!(merged, self.pieces.len());
        true
    }

    /// A block for pages that have none: the one of the same 2 MiB if its
    /// entries for them are unused, else a new one.
    fn place(&mut self, span: PageRange, page_len: PageCount) -> Piece {
        if page_len > PageCount::from(PAGES_PER_BLOCK) {
            assert!(span.pages() == page_len, "{span} is a part of a huge page");
            let block = self.new_block(page_len);
            return self.attach(span, block, 0);
        }
        let base = span.start().block_floor();
        let first = to_u32(span.start().pages_since(base));
        let pages = to_u32(span.pages().get());
        let home = PageRange::from_pages(base, PageCount::new(BLOCK_SIZE / hmm_types::PAGE_SIZE));
        let neighbour = self
            .overlapping(home)
            .find(|piece| {
                piece.start.pages_since(base) == u64::from(piece.first) && {
                    let block = self.block(piece.block);
                    let inner = block.lock();
                    let unused = |index| {
                        inner.entry(index) == PageEntry::SYSTEM
                            && !block
                                .pieces
                                .iter()
                                .any(|p| (p.first..p.first + p.pages).contains(&index))
                    };
                    (first..first + pages).all(unused)
                }
            })
            .map(|piece| piece.block);
        let block = neighbour.unwrap_or_else(|| self.new_block(page_len));
        self.block(block).lock().kept = false;
        self.attach(span, block, first)
    }

    /// A piece of a block, from the page with this index on.
    fn attach(&mut self, span: PageRange, block: BlockId, first: u32) -> Piece {
        let piece = Piece {
            start: span.start(),
            pages: to_u32(span.pages().get()),
            block,
            first,
        };
        self.block_mut(block).pieces.push(piece);
        piece
    }

    fn new_block(&mut self, page_len: PageCount) -> BlockId {
        let block = Some(hmm_mem::boxed(Block::new(page_len)));
        if let Some(id) = self.free.pop() {
            self.blocks[id.0 as usize] = block;
            return id;
        }
        self.blocks.push(block);
        BlockId(to_u32(self.blocks.len() as u64 - 1))
    }

    /// Takes the pieces of `range` out of the map and hands each to `taken`,
    /// cut to the range: but pages of several blocks as a whole, as the kernel maps
    /// no less of them. Their blocks stay until [`SpaceMap::release_blocks`].
    pub(crate) fn remove(
        &mut self,
        range: PageRange,
        mut taken: impl FnMut(&Self, Piece),
    ) -> Vec<Piece> {
        let from = self.position(range.start());
        let mut upto = from;
        let mut out: Vec<Piece> = hmm_mem::vec();
        let mut rest: Vec<Piece> = hmm_mem::vec();
        while let Some(piece) = self.pieces.get(upto).copied() {
            let Some(mut gone) = piece.cut(range) else {
                break;
            };
            if self.block(piece.block).is_gigantic() {
                gone = piece;
                out.push(gone);
                upto += 1;
                continue;
            }
            if piece.start < range.start() {
                rest.extend(piece.cut(PageRange::span(piece.start, range.start())));
            }
            if piece.range().end() > range.end() {
                rest.extend(piece.cut(PageRange::span(range.end(), piece.range().end())));
            }
            out.push(gone);
            upto += 1;
        }
        if upto == from {
            return out;
        }
        self.pieces.splice(from..upto, rest.iter().copied());
        for gone in &out {
            let rest = rest.iter().copied();
            let block = self.block_mut(gone.block);
            block.pieces.retain(|piece| piece.cut(range).is_none());
            for piece in rest.filter(|piece| piece.block == gone.block) {
                if !block.pieces.contains(&piece) {
                    block.pieces.push(piece);
                }
            }
        }
        for gone in &out {
            taken(self, *gone);
        }
        out
    }

    /// Frees blocks that lost their last piece. Those with pages in flight wait.
    pub(crate) fn release_blocks(&mut self, pieces: &[Piece]) {
        for piece in pieces {
            let id = piece.block;
            if self.blocks[id.0 as usize]
                .as_ref()
                .is_some_and(|block| block.pieces.is_empty())
            {
                if self.block(id).lock().in_flight() == 0 {
                    self.free_block(id);
                } else if !self.orphans.contains(&id) {
                    self.orphans.push(id);
                }
            }
        }
    }

    fn free_block(&mut self, id: BlockId) {
        self.blocks[id.0 as usize] = None;
        self.free.push(id);
    }

    /// Frees orphans whose last flight has ended.
    fn sweep(&mut self) {
        let mut index = 0;
        while let Some(&id) = self.orphans.get(index) {
            let landed = self.block(id).lock().in_flight() == 0;
            if landed {
                self.orphans.swap_remove(index);
                self.free_block(id);
            } else {
                index += 1;
            }
        }
    }

    /// Puts pieces that were removed at `from` back at `to`, in the same order
    /// and at the same distances.
    pub(crate) fn insert_moved(&mut self, pieces: &[Piece], from: VirtAddr, to: VirtAddr) {
        for piece in pieces {
            let moved = Piece {
                start: to.plus_pages(piece.start.pages_since(from)),
                ..*piece
            };
            let at = self
                .pieces
                .partition_point(|other| other.start < moved.start);
            self.pieces.insert(at, moved);
            self.block_mut(piece.block).pieces.push(moved);
        }
    }

    /// Engine memory that the map's own tables take.
    pub(crate) fn table_bytes(&self) -> u64 {
        let blocks: usize = self
            .blocks
            .iter()
            .flatten()
            .map(|block| {
                let table = block.lock().table.is_some();
                size_of::<Block>()
                    + block.pieces.capacity() * size_of::<Piece>()
                    + if table {
                        PAGES_PER_BLOCK * size_of::<PageEntry>()
                    } else {
                        0
                    }
            })
            .sum();
        (blocks
            + self.pieces.capacity() * size_of::<Piece>()
            + self.blocks.capacity() * size_of::<Option<Box<Block>>>()) as u64
    }

    /// Checks what must hold between events; for tests.
    ///
    /// # Panics
    /// When it does not.
    pub(crate) fn check(&self) {
        for pair in self.pieces.windows(2) {
            assert!(
                pair[0].range().end() <= pair[1].start,
                "pieces overlap or are unsorted"
            );
        }
        for piece in &self.pieces {
            let block = self.block(piece.block);
            assert!(piece.pages > 0 && piece.first + piece.pages <= block.pages());
            assert!(!block.is_gigantic() || piece.pages == block.pages());
            assert!(
                self.block(piece.block).pieces.contains(piece),
                "a block does not know its piece"
            );
        }
        let of_blocks: usize = self
            .blocks
            .iter()
            .flatten()
            .map(|block| block.pieces.len())
            .sum();
        assert_eq!(
            of_blocks,
            self.pieces.len(),
            "a block has a piece that the map lacks"
        );
        let mut in_use = [0; MAX_DEVICES];
        for block in self.blocks() {
            let inner = block.lock();
            if block.is_gigantic() {
                inner.check_alike();
                continue;
            }
            let mut marked = 0;
            for index in 0..BLOCK_PAGES {
                if let Some(device) = inner.coherent(index) {
                    in_use[device.index()] += 1;
                    marked += 1;
                }
            }
            assert_eq!(inner.coherent, marked, "coherent pages are miscounted");
        }
        for (in_use, at_most) in in_use.iter().zip(self.coherent) {
            assert!(*in_use <= at_most, "more coherent pages than were marked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> PageRange {
        PageRange::from_pages(VirtAddr::new(page * 4096), PageCount::new(pages))
    }

    #[test]
    fn registration_cuts_at_block_boundaries_and_keeps_what_is_there() {
        let mut map = SpaceMap::new();
        assert!(map.insert(range(1000, 1000), PageCount::ONE));
        map.check();
        assert_eq!(map.pieces().len(), 3);
        assert!(map.insert(range(900, 1200), PageCount::ONE));
        map.check();
        // The pages around join the blocks that their 2 MiB already have.
        let covered: u64 = map
            .overlapping(range(900, 1200))
            .map(|p| u64::from(p.pages))
            .sum();
        assert_eq!(covered, 1200);
        let a = map.find(VirtAddr::new(1000 * 4096)).unwrap();
        let b = map.find(VirtAddr::new(999 * 4096)).unwrap();
        assert_eq!(a.block, b.block);
        assert_eq!(a.first, b.first + 1);
    }

    #[test]
    fn a_moved_page_keeps_its_block_and_index() {
        let mut map = SpaceMap::new();
        map.insert(range(512, 1024), PageCount::ONE);
        let before = map.find(VirtAddr::new(700 * 4096)).unwrap();
        let taken = map.remove(range(600, 300), |_, _| {});
        map.insert_moved(
            &taken,
            VirtAddr::new(600 * 4096),
            VirtAddr::new(9001 * 4096),
        );
        map.check();
        assert!(map.find(VirtAddr::new(700 * 4096)).is_none());
        let after = map.find(VirtAddr::new(9101 * 4096)).unwrap();
        assert_eq!((after.block, after.first), (before.block, before.first));
        let place = map.block(after.block).place_of(after.first, 512).unwrap();
        assert_eq!(place.start(), VirtAddr::new(9101 * 4096));
    }

    #[test]
    fn a_hole_in_the_middle_leaves_both_sides() {
        let mut map = SpaceMap::new();
        map.insert(range(512, 512), PageCount::ONE);
        let taken = map.remove(range(600, 10), |_, _| {});
        map.release_blocks(&taken);
        map.check();
        assert_eq!(map.pieces().len(), 2);
        assert!(map.find(VirtAddr::new(605 * 4096)).is_none());
        assert_eq!(map.find(VirtAddr::new(610 * 4096)).unwrap().first, 98);
    }

    #[test]
    fn new_memory_at_an_old_address_is_another_block_while_the_old_is_in_flight() {
        let mut map = SpaceMap::new();
        map.insert(range(512, 512), PageCount::ONE);
        let piece = map.find(VirtAddr::new(512 * 4096)).unwrap();
        map.block(piece.block)
            .lock()
            .set(0, PageState::Copying { data: true });
        let taken = map.remove(range(512, 512), |_, _| {});
        map.release_blocks(&taken);
        map.insert(range(512, 512), PageCount::ONE);
        map.check();
        let again = map.find(VirtAddr::new(512 * 4096)).unwrap();
        assert_ne!(again.block, piece.block);
        map.block(piece.block).lock().set(0, PageState::System);
        map.insert(range(2048, 1), PageCount::ONE);
        assert_eq!(
            map.find(VirtAddr::new(2048 * 4096)).unwrap().block,
            piece.block
        );
    }
}
