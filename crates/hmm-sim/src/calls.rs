//! What the simulated program asks of its kernel.

use hmm_hal::{Event, FaultKind, SpaceId};
use hmm_types::{Access, MemoryKind, PageCount, PageRange, Permissions, VirtAddr};

use crate::memory::{Vma, huge_page_of};
use crate::page::Payload;
use crate::queue::Ticket;
use crate::space::{SimSpace, State};

/// Huge pages appear at the first touch of an empty block once in so many times.
const HUGE_ONCE_IN: u64 = 4;

/// Thread numbers of the devices begin here.
const DEVICE_THREADS: u32 = 1 << 18;

/// How an access of the CPU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It happened.
    Done,
    /// The thread stopped until somebody wakes it; then it tries again.
    Stopped,
    /// The program does what it may not.
    Segv,
    /// The page's data is lost.
    Sigbus,
}

/// What a mapping is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRequest {
    /// Where; nothing may be mapped there.
    pub range: PageRange,
    /// What.
    pub kind: MemoryKind,
    /// How much one page of it is: more than one in hugetlbfs.
    pub page_len: PageCount,
    /// Registered with somebody else's userfaultfd.
    pub foreign: bool,
}

/// MADV_DONTFORK or MADV_WIPEONFORK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkAdvice {
    /// The child does not have the mapping.
    DontFork,
    /// The child's mapping is empty.
    WipeOnFork,
}

impl State {
    /// One access to one page.
    pub(crate) fn touch(
        &mut self,
        space: SpaceId,
        thread: u32,
        address: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> Touch {
        if self.queue.is_stopped(thread) {
            return Touch::Stopped;
        }
        let huge = self.rng.one_in(HUGE_ONCE_IN);
        let Some(memory) = self.memories.get_mut(&space) else {
            return Touch::Segv;
        };
        let Some(&vma) = memory.vma_at(address) else {
            return Touch::Segv;
        };
        if !vma.permissions.allow(access) {
            return Touch::Segv;
        }
        let page = address.page_floor();
        if memory.page(page).is_none() {
            if vma.registered {
                let kind = FaultKind::Missing;
                self.queue.stop(space, thread, address, kind, access);
                return Touch::Stopped;
            }
            memory.populate(page, huge);
        }
        let Some(entry) = memory.pages.get_mut(&page) else {
            unreachable!("simulator: the page was just filled");
        };
        if entry.poisoned {
            return Touch::Sigbus;
        }
        if access == Access::Write {
            if entry.write_protected {
                let kind = FaultKind::WriteProtected;
                self.queue.stop(space, thread, address, kind, access);
                return Touch::Stopped;
            }
            entry.cow_shared = false;
        }
        edit(&mut entry.data);
        Touch::Done
    }
}

impl SimSpace {
    /// Maps memory.
    ///
    /// # Panics
    /// When something is mapped there.
    pub fn mmap(&self, request: MapRequest) {
        self.state().own().insert(Vma {
            kind: request.kind,
            page_len: request.page_len,
            foreign: request.foreign,
            ..Vma::anonymous(request.range)
        });
    }

    /// Unmaps memory. The call returns when the ticket's event has been read.
    pub fn munmap(&self, space: SpaceId, range: PageRange) -> Option<Ticket> {
        let mut guard = self.state();
        let state = &mut *guard;
        let (vmas, _) = state.memories.get_mut(&space)?.remove(range);
        let events = vmas
            .into_iter()
            .filter(|vma| vma.registered)
            .map(|vma| Event::Unmap {
                space,
                range: vma.range,
            });
        state.queue.post(&mut state.rng, space, events)
    }

    /// Maps fresh anonymous memory over whatever is there (MAP_FIXED).
    pub fn map_over(&self, range: PageRange) -> Option<Ticket> {
        let space = SpaceId::OWN;
        let mut guard = self.state();
        let state = &mut *guard;
        let (vmas, _) = state.own().remove(range);
        state.own().insert(Vma::anonymous(range));
        let events = vmas
            .into_iter()
            .filter(|vma| vma.registered)
            .map(|vma| Event::Unmap {
                space,
                range: vma.range,
            });
        state.queue.post(&mut state.rng, space, events)
    }

    /// Moves, grows or shrinks one mapping; what is at `to` is free, or `from`
    /// itself.
    ///
    /// # Errors
    /// [`Refused`] when `from` is not one mapping.
    pub fn mremap(&self, from: PageRange, to: PageRange) -> Result<Option<Ticket>, Refused> {
        let space = SpaceId::OWN;
        let mut guard = self.state();
        let state = &mut *guard;
        let registering = state.registering;
        let own = state.own();
        let vma = *own.vma_at(from.start()).ok_or(Refused)?;
        if !vma.range.encloses(from) || vma.foreign {
            return Err(Refused);
        }
        let kept = from.slice(0, from.pages().min(to.pages()).get());
        let mut events = Vec::new();
        if kept != from {
            let tail = PageRange::span(kept.end(), from.end());
            own.remove(tail);
            events.push(Event::Unmap { space, range: tail });
        }
        if to.start() != from.start() {
            let (_, pages) = own.remove(kept);
            let told = to.slice(0, kept.pages().get());
            // Whether the engine is told what it has registered a moment ago, it
            // does not know yet.
            let untold = vma.untold || registering;
            own.insert(Vma {
                range: told,
                untold,
                ..vma
            });
            if told != to {
                own.insert(Vma {
                    range: PageRange::span(told.end(), to.end()),
                    untold: true,
                    ..vma
                });
            }
            for (address, mut page) in pages {
                page.huge = false;
                let index = address.pages_since(kept.start());
                own.pages.insert(to.start().plus_pages(index), page);
            }
            events.push(Event::Remap {
                space,
                from: kept,
                to: to.start(),
            });
            // When that has been read, where it was is reported as unmapped.
            events.push(Event::Unmap { space, range: kept });
        } else if kept != to {
            let grown = PageRange::span(kept.end(), to.end());
            own.insert(Vma {
                range: grown,
                untold: true,
                ..vma
            });
        }
        if !vma.registered {
            events.clear();
        }
        Ok(state.queue.post(&mut state.rng, space, events))
    }

    /// Whether the engine is about to drop pages at these addresses, whatever
    /// is there by then: new memory would be hit (`docs/limits.md`).
    #[must_use]
    pub fn is_dropping(&self, range: PageRange) -> bool {
        let dropping = &self.state().dropping;
        dropping.iter().any(|dropped| dropped.overlaps(range))
    }

    /// The threads that have changed something and not said so yet do not get
    /// to run for so many reads.
    pub fn delay(&self, reads: u64) {
        self.state().queue.delay(reads);
    }

    /// The first half of MADV_DONTNEED: `None` when the kernel refuses, or
    /// what part can be dropped, with [`SimSpace::zap`], once the ticket's
    /// event has been read.
    pub fn dontneed(
        &self,
        space: SpaceId,
        range: PageRange,
    ) -> Option<(PageRange, Option<Ticket>)> {
        let mut guard = self.state();
        let state = &mut *guard;
        let vma = *state.memories.get(&space)?.vma_at(range.start())?;
        if vma.locked {
            return None;
        }
        let mut part = vma.range.intersection(range)?;
        if vma.kind == MemoryKind::HugeTlb {
            // Whole pages, from the start on. Others may have mapped them where the
            // call has not been yet.
            let floor = |at| huge_page_of(at, vma.page_len).start();
            let whole = floor(part.end());
            let fits = part.start() == floor(part.start()) && part.start() < whole;
            part = fits.then(|| PageRange::span(part.start(), whole))?;
        }
        let event = vma
            .registered
            .then_some(Event::Remove { space, range: part });
        Some((part, state.queue.post(&mut state.rng, space, event)))
    }

    /// The second half of MADV_DONTNEED.
    pub fn zap(&self, space: SpaceId, range: PageRange) {
        if let Some(memory) = self.state().memories.get_mut(&space) {
            memory.zap(range);
        }
    }

    /// Forks. The child runs when the ticket's event has been read.
    pub fn fork(&self) -> (SpaceId, Option<Ticket>) {
        let reported = self.shared.capabilities.fork_events;
        let mut guard = self.state();
        let state = &mut *guard;
        let child = SpaceId::new(state.next_child);
        state.next_child += 1;
        let memory = state.own().fork(reported);
        let event = (reported && state.own().has_registered()).then_some(Event::Fork {
            parent: SpaceId::OWN,
            child,
        });
        state.memories.insert(child, memory);
        (child, state.queue.post(&mut state.rng, SpaceId::OWN, event))
    }

    /// A child ends.
    pub fn exit(&self, child: SpaceId) {
        let mut guard = self.state();
        let state = &mut *guard;
        state.memories.remove(&child);
        state.queue.forget(child);
        if self.shared.capabilities.fork_events {
            let event = Event::Exit { space: child };
            state.queue.post(&mut state.rng, child, [event]);
        }
    }

    /// One access of a CPU thread to one page; `edit` sees the page's bytes.
    pub fn touch(
        &self,
        space: SpaceId,
        thread: u32,
        address: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> Touch {
        self.state().touch(space, thread, address, access, edit)
    }

    /// A device's access in place: its own thread touches the memory.
    pub fn touch_in_place(
        &self,
        device: usize,
        address: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> Touch {
        let thread = DEVICE_THREADS + u32::try_from(device).unwrap_or(0);
        self.state()
            .touch(SpaceId::OWN, thread, address, access, edit)
    }

    /// Changes what a range allows. The kernel tells nobody.
    pub fn mprotect(&self, range: PageRange, permissions: Permissions) {
        self.state()
            .own()
            .change(range, |vma| vma.permissions = permissions);
    }

    /// Locks a range (the caller then touches its pages) or unlocks it.
    pub fn mlock(&self, range: PageRange, on: bool) {
        self.state().own().change(range, |vma| vma.locked = on);
    }

    /// Says what a fork does with a range.
    pub fn advise_fork(&self, range: PageRange, advice: ForkAdvice) {
        self.state().own().change(range, |vma| match advice {
            ForkAdvice::DontFork => vma.dont_fork = true,
            ForkAdvice::WipeOnFork => vma.wipe_on_fork = true,
        });
    }

    /// Pins a page for DMA: `None` when it is not there or pinned already.
    pub fn pin(&self, page: VirtAddr) -> Option<u64> {
        let mut state = self.state();
        let pin = state.next_pin;
        // Nobody can tell that a page of hugetlbfs is pinned.
        if state.own().is_hugetlb(page) {
            return None;
        }
        let entry = state.own().pages.get_mut(&page)?;
        if entry.pin.is_some() || entry.cow_shared || entry.write_protected || entry.poisoned {
            return None;
        }
        entry.pin = Some(pin);
        state.next_pin += 1;
        Some(pin)
    }

    /// DMA into a pinned page; where it is now mapped, if it is.
    pub fn dma(&self, pin: u64, edit: &mut dyn FnMut(&mut Payload)) -> Option<VirtAddr> {
        let mut state = self.state();
        let (&address, page) = find_pin(&mut state, pin)?;
        edit(&mut page.data);
        Some(address)
    }

    /// Ends a pin.
    pub fn unpin(&self, pin: u64) {
        if let Some((_, page)) = find_pin(&mut self.state(), pin) {
            page.pin = None;
        }
    }

    /// Whether the event still waits to be read.
    #[must_use]
    pub fn is_unread(&self, ticket: Ticket) -> bool {
        self.state().queue.is_unread(ticket)
    }

    /// Whether any message waits to be read.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        self.state().queue.has_unread()
    }

    /// Whether somebody would stop at a hole of the space: it is registered.
    #[must_use]
    pub fn is_watched(&self, space: SpaceId) -> bool {
        !self.watched(space).is_empty()
    }

    /// What of the space is registered.
    #[must_use]
    pub fn watched(&self, space: SpaceId) -> Vec<PageRange> {
        let state = self.state();
        let program = PageRange::span(VirtAddr::new(4096), crate::space::ARENA_END);
        let memory = state.memories.get(&space);
        memory
            .into_iter()
            .flat_map(|memory| memory.overlapping(program))
            .filter(|vma| vma.registered && !vma.untold)
            .map(|vma| vma.range)
            .collect()
    }

    /// What a page holds, without touching it: `None` for a hole.
    #[must_use]
    pub fn peek(&self, space: SpaceId, page: VirtAddr) -> Option<Payload> {
        let state = self.state();
        state.memories.get(&space)?.page(page).map(|page| page.data)
    }

    /// Whether a page's data may be on a device: a hole, or copied there and
    /// about to be dropped here.
    #[must_use]
    pub fn may_be_away(&self, space: SpaceId, page: VirtAddr) -> bool {
        let state = self.state();
        state.memories.get(&space).is_some_and(|memory| {
            memory
                .pages
                .get(&page)
                .is_none_or(|page| page.write_protected)
        })
    }

    /// What nobody has read yet, for a message about a hang.
    #[must_use]
    pub fn describe_waits(&self) -> String {
        self.state().queue.describe()
    }

    /// Pages that are mapped in the own space, staging not counted.
    #[must_use]
    pub fn resident(&self) -> PageCount {
        let mut state = self.state();
        let count = state.own().pages.range(..crate::space::ARENA_END).count();
        PageCount::from(count)
    }
}

/// The kernel refuses a call; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

fn find_pin(state: &mut State, pin: u64) -> Option<(&VirtAddr, &mut crate::page::Page)> {
    state
        .own()
        .pages
        .iter_mut()
        .find(|(_, page)| page.pin == Some(pin))
}
