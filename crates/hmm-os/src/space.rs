//! The process's address space on the real kernel.

use std::fmt;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hmm_hal::{
    AddressSpace, Capabilities, CpuPage, Dropped, Event, Mapping, Presence, Progress,
    RegisterError, SpaceError, SpaceId, StagingLayout, Stop,
};
use hmm_sync::assert_none_held;
use hmm_types::{MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use crate::abi::uffd_msg;
use crate::child::Children;
use crate::config::{Counters, Disable, OpenConfig, OpenError};
use crate::excluded::{first_part, first_part_in, refresh_modules};
use crate::map::{Map, Vma};
use crate::message::{Message, translate};
use crate::pagemap::Pagemap;
use crate::peek;
use crate::refusal;
use crate::region::Region;
use crate::shared::{RegionPages, Regions, peer_key};
use crate::staging::Staging;
use crate::text::Lines;
use crate::thread::table;
use crate::thread_memory::ThreadMemory;
use crate::uffd::{
    FEATURE_FORK, FEATURE_MOVE, FEATURE_POISON, FEATURE_WP, FEATURES_HUGETLB, FEATURES_NEEDED,
    FEATURES_SHARED, FEATURES_WANTED, Reach, Side, Uffd,
};
use crate::waiting::Waiting;

/// The descriptors and the memory of an open space.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) uffd: Uffd,
    pub(crate) children: Children,
    pub(crate) regions: Regions,
    pub(crate) map: Map,
    pub(crate) pagemap: Pagemap,
    staging: Staging,
    /// A block that nobody ever writes to: what holes in huge pages are filled
    /// with.
    pub(crate) zeros: Region,
    /// The same for larger ones, as soon as some are registered.
    pub(crate) more_zeros: OnceLock<Option<Region>>,
    /// Registered, and of no other use: dropping it is an event.
    pub(crate) bell: Region,
    /// What must stay because only faults of user mode are delivered.
    thread_memory: Option<ThreadMemory>,
}

/// The address space of this process.
///
/// Its descriptors are numbers of one table: open it, use it and drop it on
/// threads that share that table ([`crate::EngineThreads`]). Methods panic on
/// others; dropped elsewhere, it leaves its descriptors to the kernel, which
/// closes them with the last thread of the table.
pub struct LinuxSpace {
    parts: ManuallyDrop<Parts>,
    capabilities: Capabilities,
    /// Private memory of hugetlbfs can leave and come back.
    pub(crate) moves_huge_pages: bool,
    /// Sizes of pages of hugetlbfs that have been registered: a bit for the logarithm
    /// of each.
    pub(crate) huge_sizes: AtomicU64,
    table: u32,
    pid: u32,
    pub(crate) waiting: Waiting,
    closed: AtomicBool,
    messages: AtomicU64,
    forks_deferred: AtomicU64,
    /// Somebody on this machine had used MADV_FREE when that was last looked at;
    /// memory has been registered since, so it is to be looked at again.
    freed_pages: AtomicBool,
    freed_unknown: AtomicBool,
}

impl fmt::Debug for LinuxSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinuxSpace")
            .field("capabilities", &self.capabilities)
            .field("staging", &self.parts.staging.layout())
            .finish_non_exhaustive()
    }
}

impl LinuxSpace {
    /// Opens a userfaultfd context with as much as kernel and privileges allow,
    /// reserves and registers staging memory, and excludes what must not
    /// migrate.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do.
    pub fn open(config: OpenConfig) -> Result<Self, OpenError> {
        let disable = config.disable;
        let (uffd, reach) = open_uffd(disable)?;
        let map = Map::open(!disable.procmap_query)
            .map_err(|error| proc_error("/proc/self/maps", error))?;
        let pagemap = Pagemap::open(!disable.pagemap_scan)
            .map_err(|error| proc_error("/proc/self/pagemap", error))?;
        let thread_memory = match reach {
            Reach::Full => None,
            Reach::UserMode => {
                Some(ThreadMemory::open().map_err(|error| proc_error("/proc/self/task", error))?)
            }
        };
        let children = Children::new().map_err(|error| OpenError::Descriptor {
            errno: error.raw_os_error(),
        })?;
        let staging = Staging::reserve(config.staging).map_err(|error| OpenError::Staging {
            errno: error.raw_os_error(),
        })?;
        let reserve_block = || {
            Region::reserve(1).map_err(|error| OpenError::Staging {
                errno: error.raw_os_error(),
            })
        };
        let (zeros, bell) = (reserve_block()?, reserve_block()?);
        let registered = || staging.ranges().chain([bell.range()]);
        for arena in registered() {
            if let Err(error) = uffd.register(arena, false) {
                for arena in registered() {
                    let _ = uffd.unregister(arena);
                }
                return Err(OpenError::Register(error));
            }
        }
        refresh_modules();
        let has = |features| uffd.features() & features == features;
        Ok(Self {
            capabilities: Capabilities {
                move_pages: has(FEATURE_MOVE),
                fork_events: has(FEATURE_FORK),
                kernel_faults: reach == Reach::Full,
                write_protect: has(FEATURE_WP),
                tells_guards: pagemap.tells_guards(),
                poison: has(FEATURE_POISON),
            },
            // Before a fork that is not reported everything must come home, and the
            // kernel's pool of huge pages may be empty for long.
            moves_huge_pages: has(FEATURE_WP) && has(FEATURES_HUGETLB) && has(FEATURE_FORK),
            parts: ManuallyDrop::new(Parts {
                uffd,
                children,
                regions: Regions::new(),
                map,
                pagemap,
                staging,
                zeros,
                more_zeros: OnceLock::new(),
                bell,
                thread_memory,
            }),
            huge_sizes: AtomicU64::new(0),
            table: table(),
            pid: std::process::id(),
            waiting: Waiting::default(),
            closed: AtomicBool::new(false),
            messages: AtomicU64::new(0),
            forks_deferred: AtomicU64::new(0),
            freed_pages: AtomicBool::new(false),
            freed_unknown: AtomicBool::new(false),
        })
    }

    /// Whether the kernel can watch shared memory of such pages, so that it can
    /// migrate.
    pub fn can_share(&self, pages: RegionPages) -> bool {
        let needed = FEATURE_WP
            | match pages {
                RegionPages::Small => FEATURES_SHARED,
                RegionPages::Huge => FEATURES_HUGETLB,
            };
        self.parts().uffd.features() & needed == needed
    }

    /// The regions, and the set of descriptors to wait for.
    pub(crate) fn regions(&self) -> (&Regions, &OwnedFd) {
        let parts = self.parts();
        (&parts.regions, parts.children.poll_descriptor())
    }

    /// Whether this is the process that opened the space; false in its forked
    /// children, where there is nothing to be done with it.
    pub fn is_own_process(&self) -> bool {
        self.pid == std::process::id()
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        Counters {
            messages: self.messages.load(Ordering::Relaxed),
            forks_deferred: self.forks_deferred.load(Ordering::Relaxed),
            thp_provision_failed: self.parts.staging.thp_provision_failed(),
            children: self.parts.children.count() as u64,
        }
    }

    /// Whether PAGEMAP_SCAN and PROCMAP_QUERY are used, in this order.
    pub fn fast_queries(&self) -> (bool, bool) {
        (self.parts.pagemap.has_scan(), self.parts.map.has_query())
    }

    /// Ends the service: staging memory is given back, and every later call
    /// panics. For a space that lives as long as the process; its descriptors
    /// go with the last thread of their table.
    ///
    /// No other thread may be in a call, and nothing may be away.
    pub fn close(&self) {
        let _ = self.parts();
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.retire_staging();
        }
    }

    fn retire_staging(&self) {
        // Unregistered first: dropping pages of a registered range waits for a
        // reader.
        let bell = self.parts.bell.range();
        for arena in self.parts.staging.ranges().chain([bell]) {
            let _ = self.parts.uffd.unregister(arena);
        }
        self.parts.staging.give_back();
    }

    /// The parts, on a thread where their descriptors mean anything.
    pub(crate) fn parts(&self) -> &Parts {
        assert!(
            table() == self.table,
            "the address space was opened with another descriptor table; \
             use it on threads of the EngineThreads that opened it"
        );
        assert!(
            !self.closed.load(Ordering::Acquire),
            "the address space was closed"
        );
        &self.parts
    }

    /// Calls the context of a space; a space that was released is gone.
    pub(crate) fn on(&self, space: SpaceId, call: impl FnOnce(&Uffd) -> Progress) -> Progress {
        let parts = self.parts();
        if space == SpaceId::OWN {
            return call(&parts.uffd);
        }
        parts
            .children
            .with(space, call)
            .unwrap_or(stopped(Stop::Gone))
    }

    /// Pages of shared memory were placed in the owner's mapping, and so for all.
    fn placed(&self, space: SpaceId, to: PageRange, progress: Progress) -> Progress {
        if space == SpaceId::OWN && progress.done > PageCount::ZERO {
            self.parts()
                .regions
                .placed(to.slice(0, progress.done.get()));
        }
        progress
    }

    /// Reads a message of one space.
    fn read_space(&self, space: SpaceId) -> Option<Event> {
        let parts = self.parts();
        let mut buffer = [MaybeUninit::<uffd_msg>::uninit(); 1];
        let messages = if space == SpaceId::OWN {
            match parts.uffd.read(&mut buffer) {
                Ok(messages) => messages,
                Err(error) => {
                    self.note_read_error(error);
                    return None;
                }
            }
        } else {
            parts.children.read(space, &mut buffer)?
        };
        self.messages.fetch_add(1, Ordering::Relaxed);
        match translate(space, messages.first()?)? {
            // Shared memory keeps its pages when a mapping drops them.
            Message::Event(Event::Remove { range, .. })
                if space == SpaceId::OWN && parts.regions.has(range) =>
            {
                None
            }
            Message::Event(event) => {
                parts.regions.changed(&event);
                Some(event)
            }
            Message::Fork(number) => {
                // SAFETY: the kernel has just put this descriptor into the
                // reader's table, for the reader to own.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                let child = parts.children.add(fd, parts.uffd.features());
                // Whoever waits without a timeout does not look for exits.
                self.nudge();
                Some(Event::Fork {
                    parent: space,
                    child,
                })
            }
        }
    }

    /// An event of one of the children, or of a peer.
    fn read_child(&self) -> Option<Event> {
        let parts = self.parts();
        let children = &parts.children;
        if children.count() == 0 && parts.regions.peers() == 0 {
            return None;
        }
        let message = children.find_ready(|ready| match ready {
            Ok(space) => self.read_space(space),
            Err(key) => {
                let (region, peer) = peer_key(key)?;
                parts.regions.read(region, peer)
            }
        });
        message.or_else(|| {
            let space = children.take_gone()?;
            Some(Event::Exit { space })
        })
    }

    fn note_read_error(&self, error: Errno) {
        // The fork waits, and is read again, when a descriptor is free.
        if matches!(error, Errno::MFILE | Errno::NFILE) {
            self.forks_deferred.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for LinuxSpace {
    fn drop(&mut self) {
        if table() != self.table || !self.is_own_process() || self.closed.load(Ordering::Acquire) {
            return;
        }
        self.retire_staging();
        // SAFETY: nothing uses the parts after this.
        unsafe { ManuallyDrop::drop(&mut self.parts) };
    }
}

impl AddressSpace for LinuxSpace {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn staging(&self) -> StagingLayout {
        self.parts.staging.layout()
    }

    fn mappings(&self, range: PageRange, visit: &mut dyn FnMut(Mapping)) -> Result<(), SpaceError> {
        let parts = self.parts();
        let threads = match &parts.thread_memory {
            Some(threads) => threads
                .find(&parts.map)
                .map_err(|error| failed("finding the memory of threads", error))?,
            None => hmm_mem::vec(),
        };
        // What stays, and why: the first part of a range.
        let split = |range| {
            let (part, engine_owned) = first_part(range);
            if engine_owned {
                return (part, true, false);
            }
            let (part, thread_memory) = first_part_in(part, || threads.iter().copied());
            (part, false, thread_memory)
        };
        // Pins cannot be seen on pages of hugetlbfs; where there are none at all
        // there are none on those.
        let mut pinned = None;
        let mut movable = |vma: &Vma, region: bool| {
            (region || vma.own_huge_pages && self.moves_huge_pages)
                && !*pinned.get_or_insert_with(|| refusal::anything_pinned().unwrap_or(true))
        };
        let result = parts.map.visit(range, &mut |vma| {
            let huge_region = parts.regions.has_huge(vma.range);
            let huge_pages = movable(&vma, huge_region);
            let mut rest = vma.range.intersection(range);
            while let Some(asked) = rest {
                let (part, engine_owned, thread_memory) = split(asked);
                visit(Mapping {
                    range: part,
                    whole: match split(vma.range) {
                        (all, false, false) if all == vma.range => all,
                        _ => part,
                    },
                    vma: vma.range,
                    kind: if huge_region {
                        MemoryKind::HugeTlb
                    } else {
                        vma.kind
                    },
                    page_len: if huge_region {
                        RegionPages::Huge.size()
                    } else {
                        vma.page_len
                    },
                    huge_pages,
                    shared_region: parts.regions.has(part),
                    permissions: vma.permissions,
                    engine_owned,
                    thread_memory,
                });
                rest = (part.end() < asked.end()).then(|| PageRange::span(part.end(), asked.end()));
            }
        });
        result.map_err(|error| failed("reading the process's map", error))
    }

    fn presence(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<(), SpaceError> {
        let parts = self.parts();
        let result = match parts.regions.visit(range, visit) {
            Some(result) => result,
            None => parts.pagemap.visit(range, visit),
        };
        result.map_err(|error| failed("reading the page map", error))
    }

    fn cpu_pages(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, CpuPage),
    ) -> Result<(), SpaceError> {
        let parts = self.parts();
        let mut seen = Ok(());
        let found = parts.map.visit(range, &mut |vma| {
            if let Some(part) = vma.range.intersection(range) {
                let mut visit = |part, page: CpuPage| {
                    // A plain page map does not tell huge pages from small ones.
                    let huge = page.huge
                        || vma.kind == MemoryKind::HugeTlb
                        || parts.regions.has_huge(part);
                    let gigantic = vma.is_gigantic();
                    visit(
                        part,
                        CpuPage {
                            huge,
                            gigantic,
                            ..page
                        },
                    );
                };
                seen = seen.and_then(|()| parts.pagemap.visit_pages(part, vma.shared, &mut visit));
            }
        });
        found
            .and(seen)
            .map_err(|error| failed("reading the page map", error))
    }

    fn explain_refusal(&self, page: PageRange) -> Option<StayReason> {
        if self.parts().regions.has(page) {
            return None;
        }
        refusal::explain(&self.parts().map, page)
    }

    fn register(&self, range: PageRange) -> Result<(), RegisterError> {
        let parts = self.parts();
        let (mut suitable, mut prepared) = (false, true);
        // The kernel would take shared memory as well, and skip what is not
        // mapped; nothing is registered that could not be served.
        let mut next = range.start();
        let result = parts.map.visit(range, &mut |vma| {
            let gapless = vma.range.start() <= next;
            let movable = matches!(vma.kind, MemoryKind::PrivateAnonymous | MemoryKind::HugeTlb)
                || parts.regions.has(vma.range);
            prepared &= vma.kind != MemoryKind::HugeTlb || self.prepare(vma.page_len);
            suitable = gapless && movable && (suitable || next == range.start());
            next = if suitable {
                vma.range.end()
            } else {
                range.end()
            };
        });
        if result.is_err() || !suitable || next < range.end() {
            return Err(RegisterError::Unsuitable);
        }
        if !prepared {
            return Err(RegisterError::Limit);
        }
        let registered = parts.uffd.register(range, self.capabilities.write_protect);
        self.freed_unknown.store(true, Ordering::Relaxed);
        registered
    }

    fn may_have_freed_pages(&self) -> bool {
        assert_none_held();
        if self.freed_unknown.swap(false, Ordering::Relaxed) && freed_pages_exist() {
            self.freed_pages.store(true, Ordering::Relaxed);
        }
        self.freed_pages.load(Ordering::Relaxed)
    }

    fn unregister(&self, range: PageRange) {
        // Refused only where nothing is mapped any more, or was registered.
        let _ = self.parts().uffd.unregister(range);
    }

    fn registered(&self, range: PageRange, visit: &mut dyn FnMut(PageRange)) {
        if let Err(error) = crate::refusal::visit_registered(range, visit) {
            crate::fatal::fail(format_args!(
                "cannot read /proc/self/smaps ({error}): what of {range} the engine has \
                 registered is not known any more"
            ));
        }
    }

    fn move_pages(&self, from: PageRange, to: VirtAddr) -> Progress {
        let parts = self.parts();
        if !self.capabilities.move_pages {
            return stopped(Stop::Incompatible);
        }
        let leaves = parts
            .staging
            .contains(PageRange::from_pages(to, from.pages()));
        assert!(
            leaves != parts.staging.contains(from),
            "one of {from} and {to} has to be staging memory"
        );
        let own = if leaves { Side::To } else { Side::From };
        parts.uffd.move_pages(from, to, own, &parts.pagemap)
    }

    fn copy_pages(&self, space: SpaceId, from: VirtAddr, to: PageRange) -> Progress {
        let copy = |uffd: &Uffd| uffd.copy(from, to);
        let whole = to.pages() >= PageCount::from(PAGES_PER_BLOCK);
        // Nothing but pages of hugetlbfs is given to a child in one piece.
        let huge = whole && (space != SpaceId::OWN || self.is_hugetlb(space, to));
        let progress = if huge {
            self.place_huge(space, to, from)
        } else {
            self.on(space, copy)
        };
        self.placed(space, to, progress)
    }

    fn copy_pages_and_wake(&self, space: SpaceId, from: VirtAddr, to: PageRange) -> Progress {
        if to.pages() < PageCount::from(PAGES_PER_BLOCK) {
            let progress = self.on(space, |uffd| uffd.copy_and_wake(from, to));
            return self.placed(space, to, progress);
        }
        let progress = self.copy_pages(space, from, to);
        self.wake(space, to);
        progress
    }

    fn zero_pages(&self, space: SpaceId, range: PageRange) -> Progress {
        let filled = self.on(space, |uffd| uffd.zero(range));
        // hugetlbfs has no page of zeros to share, and no smaller one. Asked only then:
        // anywhere else, to place a whole one would hide what is still owed there.
        if filled.stop == Some(Stop::Incompatible) {
            let fill = |huge: PageRange| {
                let filled = match self.zeros(huge.pages()) {
                    Some(zeros) => self.place_huge(space, huge, zeros),
                    None => stopped(Stop::Incompatible),
                };
                self.placed(space, huge, filled)
            };
            if let Some(filled) = self.on_huge_page(space, range, fill) {
                return filled;
            }
        }
        self.placed(space, range, filled)
    }

    fn poison_pages(&self, space: SpaceId, range: PageRange) -> Progress {
        let mut poisoned = self.on_pages(space, range, Uffd::poison, Uffd::poison);
        let regions = &self.parts().regions;
        let shared = space == SpaceId::OWN && regions.has(range);
        if poisoned.stop == Some(Stop::Exists) && (shared || self.is_hugetlb(space, range)) {
            poisoned = self.on(space, |uffd| uffd.poison_protected(range));
        }
        if shared && poisoned.stop.is_none() {
            regions.poison(range);
        }
        poisoned
    }

    fn wake(&self, space: SpaceId, range: PageRange) {
        let parts = self.parts();
        if space == SpaceId::OWN {
            parts.uffd.wake(range);
            parts.regions.wake(range);
        } else {
            let _ = parts.children.with(space, |uffd| uffd.wake(range));
        }
    }

    fn write_protect(&self, range: PageRange, on: bool) -> Progress {
        if !self.capabilities.write_protect {
            return stopped(Stop::Incompatible);
        }
        let call = |uffd: &Uffd, range| uffd.write_protect(range, on);
        let progress = self.on_pages(SpaceId::OWN, range, call, call);
        match self.parts().regions.write_protect(range, on) {
            Some(stop) if progress.stop.is_none() => stopped(stop),
            _ => progress,
        }
    }

    fn is_protected(&self, page: VirtAddr) -> bool {
        let parts = self.parts();
        // What the peers of a region have is not known here.
        let region = parts
            .regions
            .has(PageRange::from_pages(page, PageCount::ONE));
        !region && parts.pagemap.is_protected(page).unwrap_or(false)
    }

    fn allow_writes(&self, space: SpaceId, range: PageRange) -> Progress {
        let call = |uffd: &Uffd, range| uffd.write_protect(range, false);
        self.on_pages(space, range, call, call)
    }

    fn read_pages(&self, from: PageRange, to: VirtAddr) -> Progress {
        assert_none_held();
        peek::read(self.pid, from, to)
    }

    fn discard(&self, range: PageRange) -> Result<Dropped, SpaceError> {
        assert_none_held();
        if let Some(punched) = self.parts().regions.punch(range) {
            return punched.map(|()| Dropped::Unreported);
        }
        advise(
            range,
            Advice::LinuxDontNeed,
            "dropping pages with madvise(MADV_DONTNEED)",
        )
        .map(|()| Dropped::Reported)
    }

    fn unshare(&self, range: PageRange) -> Result<(), SpaceError> {
        assert_none_held();
        advise(
            range,
            Advice::LinuxPopulateWrite,
            "un-sharing pages with madvise(MADV_POPULATE_WRITE)",
        )?;
        // UFFDIO_MOVE asks the first page of a huge one whether anybody shares it,
        // wherever that page is by now. This cuts huge pages of which only a part is
        // here; otherwise it is a hint for reclaim. Not before Linux 5.4.
        let cold = "cutting huge pages with madvise(MADV_COLD)";
        let _ = advise(range, Advice::LinuxCold, cold);
        Ok(())
    }

    fn provision(&self, slot: PageRange) -> bool {
        let parts = self.parts();
        parts.staging.provision(slot, &parts.uffd, &parts.pagemap)
    }

    fn read_event(&self) -> Option<Event> {
        // The own threads' faults may never end: the children have their turns.
        const CHILDREN_FIRST: u64 = 8;
        let turn = self.messages.load(Ordering::Relaxed);
        if turn.is_multiple_of(CHILDREN_FIRST) {
            self.read_child().or_else(|| self.read_space(SpaceId::OWN))
        } else {
            self.read_space(SpaceId::OWN).or_else(|| self.read_child())
        }
    }

    fn await_change(&self, target: PageRange, mover: PageRange) -> bool {
        crate::changes::wait_until_reported(target, mover)
    }

    fn release(&self, space: SpaceId) {
        self.parts().children.release(space);
    }

    fn wiped_on_fork(&self, visit: &mut dyn FnMut(PageRange)) {
        if let Err(error) = crate::refusal::visit_wiped(visit) {
            crate::fatal::fail(format_args!(
                "cannot read /proc/self/smaps at a fork ({error}): a child could see memory that \
                 it must not see"
            ));
        }
    }

    fn is_quiet(&self) -> bool {
        // Lifts a protection that staging never has: the kernel refuses, but
        // first it says whether an event is under way.
        let probe = self.parts().staging.layout().small.slice(0, 1);
        self.parts().uffd.write_protect(probe, false).stop != Some(Stop::Again)
    }

    fn relax(&self) {
        // Yielding lets the reader in when it shares the CPU; sleeping, when
        // something else is to run first.
        const YIELDS: u32 = 4;
        const SLEEP_NS: i64 = 20_000;
        thread_local! {
            static CALLS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
        }
        CALLS.set(CALLS.get().wrapping_add(1));
        if CALLS.get().is_multiple_of(YIELDS) {
            let _ = rustix::thread::nanosleep(&rustix::thread::Timespec {
                tv_sec: 0,
                tv_nsec: SLEEP_NS,
            });
        } else {
            rustix::thread::sched_yield();
        }
    }
}

fn open_uffd(disable: Disable) -> Result<(Uffd, Reach), OpenError> {
    let mut wanted = FEATURES_WANTED;
    for (off, feature) in [
        (disable.move_pages, FEATURE_MOVE),
        (disable.fork_events, FEATURE_FORK),
        (disable.write_protect, FEATURE_WP),
    ] {
        if off {
            wanted &= !feature;
        }
    }
    let full = if disable.privileged {
        Err(Errno::PERM)
    } else {
        Uffd::open(Reach::Full, wanted).map(|uffd| (uffd, Reach::Full))
    };
    let (uffd, reach) = full
        .or_else(|_| Uffd::open(Reach::UserMode, wanted).map(|uffd| (uffd, Reach::UserMode)))
        .map_err(|error| OpenError::Userfaultfd {
            errno: error.raw_os_error(),
        })?;
    if uffd.features() & FEATURES_NEEDED == FEATURES_NEEDED {
        Ok((uffd, reach))
    } else {
        Err(OpenError::Features)
    }
}

fn advise(range: PageRange, advice: Advice, operation: &'static str) -> Result<(), SpaceError> {
    let start = std::ptr::with_exposed_provenance_mut(range.start().addr());
    // SAFETY: core tracks the range and has decided that its pages are dropped,
    // or made its own; neither reads or writes the program's data.
    unsafe { madvise(start, range.pages().bytes_usize(), advice) }
        .map_err(|error| failed(operation, error))
}

fn failed(operation: &'static str, error: Errno) -> SpaceError {
    SpaceError {
        operation,
        errno: error.raw_os_error(),
    }
}

fn proc_error(file: &'static str, error: Errno) -> OpenError {
    OpenError::Proc {
        file,
        errno: error.raw_os_error(),
    }
}

pub(crate) const fn stopped(stop: Stop) -> Progress {
    Progress {
        done: PageCount::ZERO,
        stop: Some(stop),
    }
}

impl AsFd for LinuxSpace {
    /// The process's own context, for tests and measurements.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.parts().uffd.as_fd()
    }
}

/// Whether anybody on this machine has ever given pages back with MADV_FREE; true
/// when that cannot be known. Read without the program's heap, as all that a
/// migration does.
fn freed_pages_exist() -> bool {
    let flags = OFlags::CLOEXEC | OFlags::RDONLY;
    let Ok(counters) = open(c"/proc/vmstat", flags, Mode::empty()) else {
        return true;
    };
    let mut lines = Lines::new(counters.as_fd());
    while let Ok(Some(line)) = lines.next() {
        if let Some(count) = line.strip_prefix(b"pglazyfree ") {
            return count != b"0";
        }
    }
    true
}
