//! What every process must see: plain arrays of bytes, and no engine.

use std::collections::BTreeMap;

use hmm_hal::SpaceId;
use hmm_types::{Access, MemoryKind, PageCount, PageRange, Permissions, VirtAddr};

use crate::calls::ForkAdvice;
use crate::memory::{is_private, take_range};
use crate::page::{Payload, ZEROS};
use crate::rng::SimRng;

/// What one page of a process must be.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub kind: MemoryKind,
    /// How much one page is: more than one in hugetlbfs.
    pub page_len: PageCount,
    pub permissions: Permissions,
    advice: Option<ForkAdvice>,
    /// What the page may hold: mostly one thing, several when accesses race
    /// with a fork, anything at all (empty list) when a device was lost.
    allowed: Vec<Payload>,
}

/// What a structural operation does to a range between the moment when it
/// starts and the moment when it returns to its thread.
/// Of several at a place, at most one is not `Gone`, and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Flux {
    /// The mapping is gone or on its way; devices may still see the old one.
    Gone,
    /// The pages hold what they held, or zeros.
    Fading,
    /// The mapping has just arrived here.
    Arriving,
}

/// A range that an operation is changing.
#[derive(Clone, Copy, Debug)]
struct Changing {
    id: u64,
    space: SpaceId,
    range: PageRange,
    flux: Flux,
}

/// The model of all processes.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    spaces: BTreeMap<SpaceId, BTreeMap<VirtAddr, Expected>>,
    changing: Vec<Changing>,
    next_change: u64,
    /// Children whose fork has not returned yet.
    forking: Vec<SpaceId>,
}

impl Oracle {
    pub(crate) fn space(&self, space: SpaceId) -> Option<&BTreeMap<VirtAddr, Expected>> {
        self.spaces.get(&space)
    }

    fn own(&mut self) -> &mut BTreeMap<VirtAddr, Expected> {
        self.spaces.entry(SpaceId::OWN).or_default()
    }

    pub(crate) fn page(&self, space: SpaceId, address: VirtAddr) -> Option<&Expected> {
        self.spaces.get(&space)?.get(&address.page_floor())
    }

    pub(crate) fn is_free(&self, range: PageRange) -> bool {
        self.spaces
            .get(&SpaceId::OWN)
            .is_none_or(|own| own.range(range.start()..range.end()).next().is_none())
    }

    /// An operation begins; [`Oracle::settle`] ends it.
    pub(crate) fn begin(&mut self, space: SpaceId, range: PageRange, flux: Flux) -> u64 {
        let id = self.next_change;
        self.next_change += 1;
        self.changing.push(Changing {
            id,
            space,
            range,
            flux,
        });
        id
    }

    pub(crate) fn settle(&mut self, id: u64) {
        self.changing.retain(|changing| changing.id != id);
    }

    pub(crate) fn flux(&self, space: SpaceId, range: PageRange) -> Option<Flux> {
        self.changing
            .iter()
            .filter(|changing| changing.space == space && changing.range.overlaps(range))
            .map(|changing| changing.flux)
            .max()
    }

    pub(crate) fn flux_at(&self, space: SpaceId, address: VirtAddr) -> Option<Flux> {
        self.changing
            .iter()
            .filter(|changing| changing.space == space && changing.range.contains(address))
            .map(|changing| changing.flux)
            .max()
    }

    /// Whether nobody is changing the range; or only what was there before, and
    /// whoever has it now does not know of them.
    pub(crate) fn is_settled(&self, space: SpaceId, range: PageRange) -> bool {
        match self.flux(space, range) {
            None => true,
            Some(Flux::Gone) => range
                .iter_pages()
                .all(|page| self.page(space, page).is_some()),
            Some(Flux::Fading | Flux::Arriving) => false,
        }
    }

    /// Where a mapping has just been.
    pub(crate) fn left(&self, rng: &mut SimRng) -> Option<VirtAddr> {
        let going = |changing: &&Changing| changing.flux == Flux::Gone;
        let count = self.changing.iter().filter(going).count();
        let chosen = (count > 0).then(|| rng.index(count))?;
        let changing = self.changing.iter().filter(going).nth(chosen)?;
        Some(changing.range.start())
    }

    /// Whether a mapping that was there before may still be seen by devices.
    pub(crate) fn is_replaced(&self, space: SpaceId, address: VirtAddr) -> bool {
        let mapped = self.page(space, address).is_some();
        let mut changing = self.changing.iter();
        mapped
            && changing.any(|changing| {
                changing.flux == Flux::Gone
                    && changing.space == space
                    && changing.range.contains(address)
            })
    }

    pub(crate) fn map(&mut self, range: PageRange, kind: MemoryKind, page_len: PageCount) {
        for page in range.iter_pages() {
            let old = self.own().insert(
                page,
                Expected {
                    kind,
                    page_len,
                    permissions: Permissions::READ_WRITE,
                    advice: None,
                    allowed: vec![ZEROS],
                },
            );
            assert!(old.is_none(), "oracle: {page} is mapped twice");
        }
    }

    pub(crate) fn unmap(&mut self, space: SpaceId, range: PageRange) {
        if let Some(pages) = self.spaces.get_mut(&space) {
            take_range(pages, range);
        }
    }

    pub(crate) fn remap(&mut self, from: PageRange, to: PageRange) {
        let own = self.own();
        let Some(first) = own.get(&from.start()).cloned() else {
            panic!("oracle: nothing to remap at {from}");
        };
        let moved = take_range(own, from);
        for (page, expected) in moved {
            let index = page.pages_since(from.start());
            if index < to.pages().get() {
                own.insert(to.start().plus_pages(index), expected);
            }
        }
        for page in to.iter_pages().skip(from.pages().index()) {
            own.insert(
                page,
                Expected {
                    allowed: vec![ZEROS],
                    ..first.clone()
                },
            );
        }
    }

    pub(crate) fn zero(&mut self, space: SpaceId, range: PageRange) {
        let Some(pages) = self.spaces.get_mut(&space) else {
            return;
        };
        for (_, page) in pages.range_mut(range.start()..range.end()) {
            if is_private(page.kind) {
                page.allowed = vec![ZEROS];
            }
        }
    }

    pub(crate) fn change(&mut self, range: PageRange, change: impl Fn(&mut Expected)) {
        for (_, page) in self.own().range_mut(range.start()..range.end()) {
            change(page);
        }
    }

    pub(crate) fn advise_fork(&mut self, range: PageRange, advice: ForkAdvice) {
        self.change(range, |page| {
            // A child does not see it at all: the stronger of the two stays.
            if page.advice != Some(ForkAdvice::DontFork) {
                page.advice = Some(advice);
            }
        });
    }

    pub(crate) fn fork(&mut self, child: SpaceId) {
        let pages = self
            .own()
            .iter()
            .filter(|(_, page)| is_private(page.kind))
            .filter(|(_, page)| page.advice != Some(ForkAdvice::DontFork))
            .map(|(&address, page)| {
                let mut page = page.clone();
                if page.advice == Some(ForkAdvice::WipeOnFork) {
                    page.allowed = vec![ZEROS];
                }
                (address, page)
            })
            .collect();
        self.spaces.insert(child, pages);
        // What fades in the parent may have faded in the child.
        let fading: Vec<_> = self
            .changing
            .iter()
            .filter(|changing| changing.flux == Flux::Fading && changing.space == SpaceId::OWN)
            .map(|changing| changing.range)
            .collect();
        for range in fading {
            self.also_allow(child, range, &ZEROS);
        }
        self.forking.push(child);
    }

    fn also_allow(&mut self, space: SpaceId, range: PageRange, data: &Payload) {
        let Some(pages) = self.spaces.get_mut(&space) else {
            return;
        };
        for (_, page) in pages.range_mut(range.start()..range.end()) {
            if !page.allowed.is_empty() && !page.allowed.contains(data) {
                page.allowed.push(*data);
            }
        }
    }

    pub(crate) fn fork_returned(&mut self, child: SpaceId) {
        self.forking.retain(|&forking| forking != child);
    }

    pub(crate) fn exit(&mut self, child: SpaceId) {
        self.spaces.remove(&child);
        self.changing.retain(|changing| changing.space != child);
        self.fork_returned(child);
    }

    /// Checks what was read. Of several things that were possible, those that
    /// were not seen are impossible from now on, unless the page is in flux.
    pub(crate) fn read(
        &mut self,
        space: SpaceId,
        address: VirtAddr,
        offset: usize,
        seen: &[u8],
    ) -> Result<(), String> {
        let flux = self.flux_at(space, address);
        let Some(page) = self
            .spaces
            .get_mut(&space)
            .and_then(|pages| pages.get_mut(&address.page_floor()))
        else {
            return Err(format!("{space:?} read {address}, which is not mapped"));
        };
        let span = offset..offset + seen.len();
        let fits = |data: &Payload| data[span.clone()] == *seen;
        let faded = flux == Some(Flux::Fading) && fits(&ZEROS);
        if page.allowed.is_empty() || faded {
            return Ok(());
        }
        if !page.allowed.iter().any(fits) {
            let expected: Vec<_> = page.allowed.iter().map(|d| hex(&d[span.clone()])).collect();
            return Err(format!(
                "{space:?} read {} at {address}, expected {} (flux: {flux:?})",
                hex(seen),
                expected.join(" or ")
            ));
        }
        if flux.is_none() {
            page.allowed.retain(fits);
        }
        Ok(())
    }

    /// Notes what was written. `by_device` when a fork that has not returned
    /// may or may not see it.
    pub(crate) fn write(
        &mut self,
        space: SpaceId,
        address: VirtAddr,
        by_device: bool,
        edit: impl Fn(&mut Payload),
    ) {
        let page_address = address.page_floor();
        let Some(page) = self
            .spaces
            .get_mut(&space)
            .and_then(|pages| pages.get_mut(&page_address))
        else {
            return;
        };
        for data in &mut page.allowed {
            edit(data);
        }
        page.allowed.dedup();
        if by_device && space == SpaceId::OWN && !self.forking.is_empty() {
            let values = page.allowed.clone();
            let unknown = values.is_empty();
            let Ok(range) = PageRange::page_of(page_address) else {
                return;
            };
            for child in self.forking.clone() {
                for value in &values {
                    self.also_allow(child, range, value);
                }
                if unknown {
                    self.forget_page(child, page_address);
                }
            }
        }
    }

    /// What the page holds may be anything: the only copy was lost.
    pub(crate) fn forget_page(&mut self, space: SpaceId, page: VirtAddr) {
        if let Some(expected) = self
            .spaces
            .get_mut(&space)
            .and_then(|pages| pages.get_mut(&page))
        {
            expected.allowed.clear();
        }
    }

    /// Whether the page's data may be lost.
    pub(crate) fn is_lost(&self, space: SpaceId, address: VirtAddr) -> bool {
        self.page(space, address)
            .is_some_and(|page| page.allowed.is_empty())
    }

    /// Whether the program may do this to the page.
    pub(crate) fn allows(&self, space: SpaceId, address: VirtAddr, access: Access) -> bool {
        self.page(space, address)
            .is_some_and(|page| page.permissions.allow(access))
    }

    pub(crate) fn spaces(&self) -> Vec<SpaceId> {
        self.spaces.keys().copied().collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
