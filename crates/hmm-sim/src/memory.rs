//! The mappings and the page table of one process.

use std::collections::BTreeMap;

use hmm_types::{MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, Permissions, VirtAddr};

use crate::page::{Page, ZEROS};

/// Takes what lies in a range out of a map.
pub(crate) fn take_range<T>(
    map: &mut BTreeMap<VirtAddr, T>,
    range: PageRange,
) -> Vec<(VirtAddr, T)> {
    let keys: Vec<_> = map
        .range(range.start()..range.end())
        .map(|(&key, _)| key)
        .collect();
    keys.into_iter()
        .filter_map(|key| map.remove_entry(&key))
        .collect()
}

/// Whether memory of a kind belongs to one process alone.
pub(crate) const fn is_private(kind: MemoryKind) -> bool {
    matches!(kind, MemoryKind::PrivateAnonymous | MemoryKind::HugeTlb)
}

/// The 2 MiB around an address.
pub(crate) fn block_of(address: VirtAddr) -> PageRange {
    PageRange::from_pages(address.block_floor(), PageCount::from(PAGES_PER_BLOCK))
}

/// The page of so many small ones around an address.
pub(crate) fn huge_page_of(address: VirtAddr, page_len: PageCount) -> PageRange {
    let start = address.get() - address.get() % page_len.bytes().get();
    PageRange::from_pages(VirtAddr::new(start), page_len)
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub range: PageRange,
    pub kind: MemoryKind,
    /// How much one page is: more than one in hugetlbfs.
    pub page_len: PageCount,
    pub permissions: Permissions,
    pub locked: bool,
    /// Registered with the engine's userfaultfd.
    pub registered: bool,
    /// Registered with somebody else's.
    pub foreign: bool,
    pub engine_owned: bool,
    pub dont_fork: bool,
    /// Registered because mremap added it to a registered mapping: the kernel
    /// does not say so.
    pub untold: bool,
    pub wipe_on_fork: bool,
}

impl Vma {
    pub(crate) const fn anonymous(range: PageRange) -> Self {
        Self {
            range,
            kind: MemoryKind::PrivateAnonymous,
            page_len: PageCount::ONE,
            permissions: Permissions::READ_WRITE,
            locked: false,
            registered: false,
            foreign: false,
            engine_owned: false,
            dont_fork: false,
            untold: false,
            wipe_on_fork: false,
        }
    }
}

/// Mappings and pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    vmas: BTreeMap<VirtAddr, Vma>,
    pub pages: BTreeMap<VirtAddr, Page>,
}

impl Memory {
    pub(crate) fn insert(&mut self, vma: Vma) {
        assert!(
            self.overlapping(vma.range).next().is_none(),
            "simulator: something is mapped at {} already",
            vma.range
        );
        self.vmas.insert(vma.range.start(), vma);
    }

    pub(crate) fn vma_at(&self, address: VirtAddr) -> Option<&Vma> {
        let (_, vma) = self.vmas.range(..=address).next_back()?;
        vma.range.contains(address).then_some(vma)
    }

    /// The mappings that overlap a range, clipped to it, in order.
    pub(crate) fn overlapping(&self, range: PageRange) -> impl Iterator<Item = Vma> {
        let first = self
            .vma_at(range.start())
            .map_or(range.start(), |vma| vma.range.start());
        self.vmas.range(first..range.end()).map(move |(_, vma)| {
            let Some(part) = vma.range.intersection(range) else {
                unreachable!("simulator: mappings are sorted");
            };
            Vma {
                range: part,
                ..*vma
            }
        })
    }

    /// Whether an address is in a page of hugetlbfs.
    pub(crate) fn is_hugetlb(&self, address: VirtAddr) -> bool {
        let vma = self.vma_at(address);
        vma.is_some_and(|vma| vma.kind == MemoryKind::HugeTlb)
    }

    /// The page that an address is in: more than one small page in hugetlbfs.
    pub(crate) fn page_of(&self, address: VirtAddr) -> PageRange {
        let vma = self.vma_at(address);
        huge_page_of(address, vma.map_or(PageCount::ONE, |vma| vma.page_len))
    }

    /// Whether a range begins and ends where pages do, those of hugetlbfs too.
    pub(crate) fn has_whole_pages(&self, range: PageRange) -> bool {
        let last = range.slice(range.pages().get() - 1, 1);
        self.page_of(range.start()).start() == range.start()
            && self.page_of(last.start()).end() == range.end()
    }

    /// A page, if there is one.
    pub(crate) fn page(&self, page: VirtAddr) -> Option<&Page> {
        self.pages.get(&page).filter(|page| !page.left_protection)
    }

    /// Whether every page of the range is mapped.
    pub(crate) fn covered(&self, range: PageRange) -> bool {
        let pages: PageCount = self.overlapping(range).map(|vma| vma.range.pages()).sum();
        pages == range.pages()
    }

    fn split(&mut self, at: VirtAddr) {
        let Some(&vma) = self.vma_at(at) else { return };
        if vma.range.start() < at {
            for range in [
                PageRange::span(vma.range.start(), at),
                PageRange::span(at, vma.range.end()),
            ] {
                self.vmas.insert(range.start(), Vma { range, ..vma });
            }
        }
    }

    /// Changes the mappings of a range; splits them at its ends.
    pub(crate) fn change(&mut self, range: PageRange, mut change: impl FnMut(&mut Vma)) {
        self.split(range.start());
        self.split(range.end());
        for (_, vma) in self.vmas.range_mut(range.start()..range.end()) {
            change(vma);
        }
    }

    /// Unmaps a range. The mappings it had come back, and their pages.
    pub(crate) fn remove(&mut self, range: PageRange) -> (Vec<Vma>, Vec<(VirtAddr, Page)>) {
        self.split(range.start());
        self.split(range.end());
        self.split_huge(range);
        let vmas = take_range(&mut self.vmas, range)
            .into_iter()
            .map(|(_, vma)| vma)
            .collect();
        (vmas, take_range(&mut self.pages, range))
    }

    /// Drops the private pages of a range. In hugetlbfs a protection stays.
    pub(crate) fn zap(&mut self, range: PageRange) {
        self.split_huge(range);
        let parts: Vec<_> = self.overlapping(range).collect();
        for vma in parts {
            if !is_private(vma.kind) {
                continue;
            }
            for (address, page) in take_range(&mut self.pages, vma.range) {
                if vma.kind == MemoryKind::HugeTlb && page.write_protected {
                    self.pages.insert(address, Page::left_protection());
                }
            }
        }
    }

    /// Splits the huge entries that reach over the ends of a range.
    pub(crate) fn split_huge(&mut self, range: PageRange) {
        for edge in [range.start(), range.end()] {
            if edge.is_block_aligned() {
                continue;
            }
            let block = edge.block_floor();
            if self.pages.get(&edge).is_some_and(|page| page.huge) {
                self.split_block(block);
            }
        }
    }

    pub(crate) fn split_block(&mut self, block: VirtAddr) {
        let end = block.plus_pages(PAGES_PER_BLOCK as u64);
        for (_, page) in self.pages.range_mut(block..end) {
            page.huge = false;
        }
    }

    /// Fills a hole with zeros; a whole block when `huge` and one fits, and in
    /// hugetlbfs.
    pub(crate) fn populate(&mut self, address: VirtAddr, huge: bool) {
        let block = block_of(address);
        if self.is_hugetlb(address) {
            let whole = self.page_of(address);
            for page in whole.iter_pages() {
                let old = self.pages.insert(page, Page::new(ZEROS));
                let there = old.is_some_and(|old| !old.left_protection);
                assert!(!there, "simulator: a part of {whole} is there");
            }
            return;
        }
        let fits =
            huge && self.vma_at(address).is_some_and(|vma| {
                vma.range.encloses(block) && vma.kind == MemoryKind::PrivateAnonymous
            }) && self
                .pages
                .range(block.start()..block.end())
                .next()
                .is_none();
        if fits {
            for page in block.iter_pages() {
                self.pages.insert(
                    page,
                    Page {
                        huge: true,
                        ..Page::new(ZEROS)
                    },
                );
            }
        } else {
            self.pages.insert(address.page_floor(), Page::new(ZEROS));
        }
    }

    /// Unregisters everything; says what was registered.
    pub(crate) fn let_go(&mut self) -> Vec<PageRange> {
        self.vmas
            .values_mut()
            .filter(|vma| vma.registered)
            .map(|vma| {
                vma.registered = false;
                vma.range
            })
            .collect()
    }

    /// Whether anything is registered.
    pub(crate) fn has_registered(&self) -> bool {
        self.vmas.values().any(|vma| vma.registered)
    }

    /// What a forked child gets; what the parent keeps is shared from now on.
    pub(crate) fn fork(&mut self, registered_in_child: bool) -> Self {
        let mut child = Self::default();
        for vma in self.vmas.values() {
            // Memory shared between processes is not modelled in children.
            if vma.dont_fork || vma.engine_owned || !is_private(vma.kind) {
                continue;
            }
            let range = vma.range;
            child.vmas.insert(
                range.start(),
                Vma {
                    registered: vma.registered && registered_in_child,
                    untold: false,
                    locked: false,
                    ..*vma
                },
            );
            if vma.wipe_on_fork {
                continue;
            }
            for (&address, page) in self.pages.range_mut(range.start()..range.end()) {
                if page.left_protection {
                    continue;
                }
                let mut copy = Page::new(page.data);
                copy.poisoned = page.poisoned;
                child.pages.insert(address, copy);
                // A pinned page is copied at once: the parent's stays its own.
                page.cow_shared = page.pin.is_none();
            }
        }
        child
    }
}
