//! The simulated address space: its state, and what the engine asks of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use hmm_hal::{
    AddressSpace, Capabilities, Dropped, Event, Mapping, Presence, Progress, RegisterError,
    SpaceError, SpaceId, StagingLayout, Stop,
};
use hmm_sync::{Mutex, MutexGuard, Rank};
use hmm_types::{
    Access, BLOCK_SIZE, MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr,
};

use crate::calls::Touch;
use crate::config::{Rates, SimConfig};
use crate::hook::{Hook, HookPoint, HookSlot};
use crate::memory::{Memory, Vma};
use crate::page::{Page, Payload, ZEROS};
use crate::queue::EventQueue;
use crate::resolve::Filling;
use crate::rng::SimRng;

/// Where the program's memory lies.
pub const ARENA_START: VirtAddr = VirtAddr::new(0x1000_0000_0000);
/// Everything of the program lies below.
pub(crate) const ARENA_END: VirtAddr = VirtAddr::new(0x2000_0000_0000);
const SMALL_STAGING_START: VirtAddr = VirtAddr::new(0x7000_0000_0000);
const HUGE_STAGING_START: VirtAddr = VirtAddr::new(0x7100_0000_0000);
const BOUNCE_START: VirtAddr = VirtAddr::new(0x7200_0000_0000);
const BOUNCE_AREAS: u64 = 64;
/// Areas behind those where the CPU sees the memory of devices.
const VIEWS: u64 = 16;
/// A wait of an engine thread is over after so many looks, or it hangs.
const WAIT_LOOKS: u32 = 2_000;
/// A nested wait for a page gives up after so many looks: what it waits for may
/// be further up the stack.
const NESTED_LOOKS: u32 = 40;
/// Thread numbers of the engine's own threads begin here.
const ENGINE_THREADS: u32 = 1 << 16;
const EINTR: i32 = 4;
const ENOMEM: i32 = 12;
const EFAULT: i32 = 14;
const EINVAL: i32 = 22;

/// Everything that the kernel knows.
#[derive(Debug)]
pub(crate) struct State {
    pub rng: SimRng,
    pub rates: Rates,
    pub memories: BTreeMap<SpaceId, Memory>,
    pub queue: EventQueue,
    /// What the engine is about to drop, by address.
    pub dropping: Vec<PageRange>,
    pub again_left: u64,
    /// So many more pages of hugetlbfs are not to be had.
    pub dry_left: u64,
    pub next_child: u16,
    pub next_pin: u64,
    /// Memory was registered, and the engine has not heard so yet.
    pub registering: bool,
}

impl State {
    pub(crate) fn own(&mut self) -> &mut Memory {
        self.memories.entry(SpaceId::OWN).or_default()
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub state: Mutex<State>,
    pub hook: HookSlot,
    pub capabilities: Capabilities,
    pub staging: StagingLayout,
    pub poison: bool,
}

/// The simulated kernel. Copies are the same kernel.
#[derive(Clone, Debug)]
pub struct SimSpace {
    pub(crate) shared: Arc<Shared>,
}

impl SimSpace {
    /// A process with staging memory and nothing else.
    #[must_use]
    pub fn new(config: &SimConfig) -> Self {
        let slots = |start, slots| {
            PageRange::from_pages(start, PageCount::new(slots * PAGES_PER_BLOCK as u64))
        };
        let staging = StagingLayout {
            small: slots(SMALL_STAGING_START, config.small_slots),
            huge: (config.huge_slots > 0).then(|| slots(HUGE_STAGING_START, config.huge_slots)),
        };
        let mut own = Memory::default();
        for range in [Some(staging.small), staging.huge].into_iter().flatten() {
            own.insert(Vma {
                registered: true,
                engine_owned: true,
                ..Vma::anonymous(range)
            });
        }
        own.insert(Vma {
            engine_owned: true,
            ..Vma::anonymous(slots(BOUNCE_START, BOUNCE_AREAS + VIEWS))
        });
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(
                    Rank::System,
                    State {
                        rng: SimRng::new(config.seed, 2),
                        rates: config.rates,
                        memories: BTreeMap::from([(SpaceId::OWN, own)]),
                        queue: EventQueue::default(),
                        dropping: Vec::new(),
                        again_left: 0,
                        dry_left: 0,
                        next_child: 1,
                        next_pin: 0,
                        registering: false,
                    },
                ),
                hook: HookSlot::default(),
                capabilities: config.capabilities,
                staging,
                poison: config.poison,
            }),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock()
    }

    /// Says what runs at hook points; `None` for nothing.
    pub fn set_hook(&self, hook: Option<Arc<Hook>>) {
        self.shared.hook.install(hook);
    }

    /// Nothing goes wrong any more by chance.
    pub(crate) fn calm(&self) {
        let mut state = self.state();
        state.rates = Rates::default();
        state.dry_left = 0;
    }

    /// Forgets everything: the run is over, but somebody may keep a handle.
    pub(crate) fn dismantle(&self) {
        self.state().memories.clear();
    }

    /// How many hooks are running, one inside the other.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.shared.hook.depth()
    }

    /// Bounce memory for an engine thread: 2 MiB of ordinary engine memory.
    ///
    /// # Panics
    /// When there is no area of that number.
    #[must_use]
    pub fn bounce(&self, index: u64) -> PageRange {
        assert!(index < BOUNCE_AREAS, "simulator: no such bounce area");
        let start = VirtAddr::new(BOUNCE_START.get() + index * BLOCK_SIZE);
        PageRange::from_pages(start, PageCount::from(PAGES_PER_BLOCK))
    }

    /// Where the CPU sees frames of a device, a few at a time.
    pub(crate) fn view(index: usize) -> VirtAddr {
        assert!(
            (index as u64) < VIEWS,
            "simulator: no such view of a device"
        );
        VirtAddr::new(BOUNCE_START.get() + (BOUNCE_AREAS + index as u64) * BLOCK_SIZE)
    }

    /// Whether an address is the engine's own memory.
    #[must_use]
    pub fn is_engine_memory(address: VirtAddr) -> bool {
        address >= SMALL_STAGING_START
    }

    /// Reads a host page for a transfer; `None` when the program unmapped it.
    ///
    /// # Panics
    /// When engine memory is not there.
    #[must_use]
    pub fn host_read(&self, page: VirtAddr) -> Option<Payload> {
        let mut state = self.state();
        state.bounce_in(page);
        let entry = state.own().page(page);
        let data = entry.filter(|page| !page.poisoned).map(|page| page.data);
        assert!(
            data.is_some() || !Self::is_engine_memory(page),
            "the engine reads its page {page}, which is not there"
        );
        data
    }

    /// Writes a host page for a transfer; false when the program unmapped it.
    ///
    /// # Panics
    /// When engine memory is not there.
    pub fn host_write(&self, page: VirtAddr, data: Payload) -> bool {
        let mut state = self.state();
        state.bounce_in(page);
        if let Some(entry) = state.own().pages.get_mut(&page) {
            entry.data = data;
            return true;
        }
        assert!(
            !Self::is_engine_memory(page),
            "the engine writes its page {page}, which is not there"
        );
        false
    }

    /// An engine thread touches a page and waits until it is served; nested
    /// waits may be interrupted, and say that they are still stopped.
    fn touch_as_engine(
        &self,
        page: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> Touch {
        let thread = ENGINE_THREADS + self.depth();
        let nested = self.depth() > 0;
        let mut last = Touch::Stopped;
        let mut looks = 0;
        self.wait_until(HookPoint::WaitForFault, |state| {
            last = state.touch(SpaceId::OWN, thread, page, access, edit);
            looks += 1;
            if nested && looks == NESTED_LOOKS && last == Touch::Stopped {
                state.queue.interrupt(thread);
                return true;
            }
            last != Touch::Stopped
        });
        last
    }

    fn moves_huge_pages(&self) -> bool {
        let Capabilities {
            write_protect,
            fork_events,
            ..
        } = self.shared.capabilities;
        write_protect && fork_events
    }

    fn hook(&self, point: HookPoint) {
        self.shared.hook.call(point);
    }

    fn wait_until(&self, point: HookPoint, mut done: impl FnMut(&mut State) -> bool) {
        for _ in 0..WAIT_LOOKS {
            if done(&mut self.state()) {
                return;
            }
            self.hook(point);
        }
        panic!(
            "an engine thread waits for ever ({point:?}); {}",
            self.state().queue.describe()
        );
    }
}

impl State {
    fn register(&mut self, range: PageRange) -> Result<(), RegisterError> {
        let once_in = self.rates.register_limit;
        if self.rng.one_in(once_in) {
            return Err(RegisterError::Limit);
        }
        let own = self.own();
        if own.overlapping(range).any(|vma| vma.foreign) {
            return Err(RegisterError::Foreign);
        }
        let suits = |vma: Vma| {
            let kinds = [
                MemoryKind::PrivateAnonymous,
                MemoryKind::Shared,
                MemoryKind::HugeTlb,
            ];
            kinds.contains(&vma.kind)
        };
        if own.overlapping(range).next().is_none() || !own.overlapping(range).all(suits) {
            return Err(RegisterError::Unsuitable);
        }
        // Nothing less than a page.
        if !own.has_whole_pages(range) {
            return Err(RegisterError::Unsuitable);
        }
        // An event that is to be read may be about what was there before, and
        // have the engine forget this.
        let untold = self.queue.changing(SpaceId::OWN);
        self.own().change(range, |vma| {
            vma.registered = true;
            vma.untold = untold;
        });
        Ok(())
    }

    /// Bounce memory is ordinary memory: it is there when it is touched.
    pub(crate) fn bounce_in(&mut self, page: VirtAddr) {
        if page >= BOUNCE_START && !self.own().pages.contains_key(&page) {
            self.own().populate(page, false);
        }
    }
}

impl AddressSpace for SimSpace {
    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities
    }

    fn staging(&self) -> StagingLayout {
        self.shared.staging
    }

    fn mappings(&self, range: PageRange, visit: &mut dyn FnMut(Mapping)) -> Result<(), SpaceError> {
        let vmas: Vec<_> = {
            let mut state = self.state();
            let own = state.own();
            let whole = |vma: Vma| own.vma_at(vma.range.start()).map(|all| (vma, all.range));
            own.overlapping(range).filter_map(whole).collect()
        };
        for (vma, whole) in vmas {
            visit(Mapping {
                page_len: vma.page_len,
                huge_pages: vma.kind == MemoryKind::HugeTlb && self.moves_huge_pages(),
                shared_region: false,
                range: vma.range,
                whole,
                vma: whole,
                kind: vma.kind,
                permissions: vma.permissions,
                engine_owned: vma.engine_owned,
                thread_memory: false,
            });
        }
        Ok(())
    }

    fn presence(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<(), SpaceError> {
        let mut spans: Vec<(PageRange, Presence)> = Vec::new();
        {
            let mut state = self.state();
            let own = state.own();
            for page in range.iter_pages() {
                let presence = own
                    .pages
                    .get(&page)
                    .map_or(Presence::Hole, |page| Presence::Present { huge: page.huge });
                match spans.last_mut() {
                    Some((span, last)) if *last == presence => {
                        *span = PageRange::span(span.start(), page.plus_pages(1));
                    }
                    _ => spans.push((PageRange::from_pages(page, PageCount::ONE), presence)),
                }
            }
        }
        for (span, presence) in spans {
            visit(span, presence);
        }
        Ok(())
    }

    fn explain_refusal(&self, page: PageRange) -> Option<StayReason> {
        let mut state = self.state();
        let Some(vma) = state.own().vma_at(page.start()) else {
            return Some(StayReason::NotMapped);
        };
        match vma.kind {
            MemoryKind::PrivateAnonymous if vma.engine_owned => Some(StayReason::EngineOwned),
            MemoryKind::PrivateAnonymous if vma.locked => Some(StayReason::Locked),
            MemoryKind::PrivateAnonymous if !vma.permissions.read => Some(StayReason::NoAccess),
            MemoryKind::PrivateAnonymous => None,
            MemoryKind::File => Some(StayReason::FileBacked),
            MemoryKind::Shared => Some(StayReason::Shared),
            MemoryKind::HugeTlb => Some(StayReason::HugeTlb),
            _ => Some(StayReason::Special),
        }
    }

    fn register(&self, range: PageRange) -> Result<(), RegisterError> {
        if !self.state().own().covered(range) {
            return Err(RegisterError::Unsuitable);
        }
        // The program goes on meanwhile: the kernel takes what there is by then.
        self.hook(HookPoint::Register);
        let registered = self.state().register(range);
        self.state().registering = true;
        self.hook(HookPoint::Register);
        self.state().registering = false;
        registered
    }

    fn unregister(&self, range: PageRange) {
        let mut state = self.state();
        let own = state.own();
        // Refused, as by the kernel.
        if !own.has_whole_pages(range) {
            return;
        }
        own.change(range, |vma| vma.registered = false);
        own.pages.retain(|&address, page| {
            let here = range.contains(address);
            page.write_protected &= !here;
            !(here && page.left_protection)
        });
        state.queue.wake(SpaceId::OWN, range);
    }

    fn registered(&self, range: PageRange, visit: &mut dyn FnMut(PageRange)) {
        let vmas: Vec<_> = self.state().own().overlapping(range).collect();
        let mine = vmas.into_iter().filter(|vma| vma.registered);
        mine.filter_map(|vma| vma.range.intersection(range))
            .for_each(visit);
    }

    fn move_pages(&self, from: PageRange, to: VirtAddr) -> Progress {
        if !self.shared.capabilities.move_pages {
            return Progress {
                done: PageCount::ZERO,
                stop: Some(Stop::Incompatible),
            };
        }
        self.state().move_pages(from, to)
    }

    fn copy_pages(&self, space: SpaceId, from: VirtAddr, to: PageRange) -> Progress {
        self.state().fill_pages(space, Filling::Copies(from), to)
    }

    fn zero_pages(&self, space: SpaceId, range: PageRange) -> Progress {
        if hmm_sync::holds_none() {
            self.hook(HookPoint::Fill);
        }
        self.state().fill_pages(space, Filling::Zeros, range)
    }

    fn poison_pages(&self, space: SpaceId, range: PageRange) -> Progress {
        if !self.shared.poison {
            return Progress {
                done: PageCount::ZERO,
                stop: Some(Stop::Incompatible),
            };
        }
        self.state().fill_pages(space, Filling::Poison, range)
    }

    fn wake(&self, space: SpaceId, range: PageRange) {
        self.state().queue.wake(space, range);
    }

    fn write_protect(&self, range: PageRange, on: bool) -> Progress {
        assert!(
            self.shared.capabilities.write_protect,
            "pages cannot be write-protected on this kernel"
        );
        self.state().write_protect(range, on)
    }

    fn is_protected(&self, page: VirtAddr) -> bool {
        let mut state = self.state();
        let entry = state.own().page(page);
        entry.is_some_and(|entry| entry.write_protected)
    }

    /// Children of the simulation do not inherit a protection.
    fn allow_writes(&self, _: SpaceId, range: PageRange) -> Progress {
        Progress {
            done: range.pages(),
            stop: None,
        }
    }

    fn read_pages(&self, from: PageRange, to: VirtAddr) -> Progress {
        for (index, page) in (0..).zip(from.iter_pages()) {
            let mut seen = None;
            let touch = self.touch_as_engine(page, Access::Read, &mut |data| seen = Some(*data));
            let Some(data) = seen.filter(|_| touch == Touch::Done) else {
                return Progress {
                    done: PageCount::new(index),
                    stop: Some(if touch == Touch::Stopped {
                        Stop::Again
                    } else {
                        Stop::NotMapped
                    }),
                };
            };
            self.host_write(to.plus_pages(index), data);
        }
        Progress {
            done: from.pages(),
            stop: None,
        }
    }

    fn discard(&self, range: PageRange) -> Result<Dropped, SpaceError> {
        let refuses = |errno| SpaceError {
            operation: "madvise(MADV_DONTNEED)",
            errno,
        };
        let mut all_there = self.state().own().covered(range);
        let parts: Vec<_> = self.state().own().overlapping(range).collect();
        // All of it from the start: what is mapped where the call has not been yet
        // is hit as well.
        self.state().dropping.push(range);
        let mut locked = false;
        for vma in parts {
            if vma.locked {
                locked = true;
                break;
            }
            if vma.registered {
                let ticket = {
                    let mut state = self.state();
                    let State { queue, rng, .. } = &mut *state;
                    let space = SpaceId::OWN;
                    queue.post(
                        rng,
                        space,
                        [Event::Remove {
                            space,
                            range: vma.range,
                        }],
                    )
                };
                self.wait_until(HookPoint::WaitForEvent, |state| {
                    ticket.is_none_or(|ticket| !state.queue.is_unread(ticket))
                });
                self.hook(HookPoint::Discard);
            }
            let mut state = self.state();
            all_there &= state.own().covered(vma.range);
            state.own().zap(vma.range);
        }
        let mut state = self.state();
        if let Some(done) = state.dropping.iter().position(|&r| r == range) {
            state.dropping.remove(done);
        }
        drop(state);
        if locked {
            return Err(refuses(EINVAL));
        }
        if all_there {
            Ok(Dropped::Reported)
        } else {
            Err(refuses(ENOMEM))
        }
    }

    fn unshare(&self, range: PageRange) -> Result<(), SpaceError> {
        for page in range.iter_pages() {
            self.hook(HookPoint::Unshare);
            let errno = match self.touch_as_engine(page, Access::Write, &mut |_| {}) {
                Touch::Done => continue,
                Touch::Stopped => EINTR,
                Touch::Segv | Touch::Sigbus => EFAULT,
            };
            return Err(SpaceError {
                operation: "madvise(MADV_POPULATE_WRITE)",
                errno,
            });
        }
        Ok(())
    }

    fn provision(&self, slot: PageRange) -> bool {
        self.hook(HookPoint::Provision);
        let staging = self.shared.staging;
        let huge = staging.huge.is_some_and(|range| range.encloses(slot));
        assert!(
            (huge || staging.small.encloses(slot))
                && slot.start().is_block_aligned()
                && slot.pages() == PageCount::from(PAGES_PER_BLOCK),
            "{slot} is not a staging slot"
        );
        let mut guard = self.state();
        let state = &mut *guard;
        let once_in = state.rates.provision_fails;
        if state.rng.one_in(once_in) {
            return false;
        }
        for page in slot.iter_pages() {
            let fresh = Page {
                huge,
                ..Page::new(ZEROS)
            };
            let old = state.own().pages.insert(page, fresh);
            assert!(old.is_none(), "staging page {page} is there already");
        }
        true
    }

    fn read_event(&self) -> Option<Event> {
        let event = {
            let mut state = self.state();
            let State { queue, rng, .. } = &mut *state;
            queue.read(rng)
        };
        if event.is_some() {
            self.hook(HookPoint::Read);
        }
        event
    }

    fn await_change(&self, target: PageRange, mover: PageRange) -> bool {
        self.state().queue.hurry(target, mover)
    }

    fn release(&self, space: SpaceId) {
        assert!(space != SpaceId::OWN, "the own space is never released");
        let mut state = self.state();
        let State {
            memories, queue, ..
        } = &mut *state;
        if let Some(child) = memories.get_mut(&space) {
            for range in child.let_go() {
                queue.wake(space, range);
            }
        }
    }

    fn is_quiet(&self) -> bool {
        !self.state().queue.changing(SpaceId::OWN)
    }

    fn relax(&self) {
        self.hook(HookPoint::Relax);
    }

    fn may_sleep(&self) -> bool {
        false
    }
}
