//! The engine: its parts, its settings, and adding and removing devices.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use hmm_hal::{AddressSpace, Capabilities, Clock, Device};
use hmm_sync::{Condvar, Mutex, Rank, RwLock};
use hmm_types::{ByteCount, DeviceId, PageCount, PageRange, StayReason, VirtAddr};

use crate::ahead::Ahead;
use crate::children::Children;
use crate::devices::Devices;
use crate::executor::Executor;
use crate::gigantic::Gigantic;
use crate::hugetlb::Rooms;
use crate::map::SpaceMap;
use crate::mirror::Notifiers;
use crate::readahead::{CPU_WINDOW, DEVICE_WINDOW, Readahead};
use crate::staging::StagingPool;
use crate::stats::Statistics;

/// What can be set when an engine is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Pages that a CPU fault brings home at least; a power of two, at most a
    /// block.
    pub fault_granule: PageCount,
    /// Pages that a device fault takes along at least; likewise.
    pub device_granule: PageCount,
    /// Whether sequential faults lead to larger and asynchronous transfers.
    pub readahead: bool,
    /// Memory that staging may keep populated while nothing uses it.
    pub staging_limit: ByteCount,
    /// Whether pages that have left the program take others home. Faster; but the
    /// kernel may still hold such a page for a pipe or a socket, and would give
    /// the other's data.
    pub reuse_pages: bool,
    /// At most this many pages come home by copying even when staging has
    /// pages to move. Moving a page makes every other CPU flush its TLB, which
    /// copying does not, so few pages are copied faster than moved.
    pub copy_at_most: PageCount,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            fault_granule: PageCount::new(16),
            device_granule: PageCount::new(64),
            readahead: true,
            staging_limit: ByteCount::mib(512),
            reuse_pages: true,
            copy_at_most: PageCount::new(4),
        }
    }
}

/// How often an operation that the kernel answered with "an event waits" tries
/// again before it gives up.
pub(crate) const AGAIN_LIMIT: u32 = 20_000;
/// How often a migration meets a page in flight before it reports it as busy.
pub(crate) const BUSY_LIMIT: u32 = 64;
/// How often a failed copy is tried again.
pub(crate) const COPY_LIMIT: u32 = 3;

/// Why a device was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddDeviceError {
    /// All slots are taken; removed devices keep theirs.
    #[error("the engine has had 16 devices already; open a new engine for more")]
    TooMany,
    /// The device has no memory.
    #[error("the device has less than one page of memory")]
    NoMemory,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The device's memory is the CPU's, but it cannot use the CPU's.
    #[error("a device with coherent memory has to use system memory in place, and this one cannot")]
    CoherentWithoutSystemMemory,
}

/// Heterogeneous memory management for one address space.
///
/// Every method may be called from any number of threads, each with its own
/// [`Executor`].
pub struct Engine<'env> {
    pub(crate) space: &'env dyn AddressSpace,
    pub(crate) clock: &'env dyn Clock,
    pub(crate) settings: Settings,
    pub(crate) capabilities: Capabilities,
    pub(crate) gate: RwLock<SpaceMap>,
    pub(crate) staging: Mutex<StagingPool>,
    pub(crate) devices: Devices<'env>,
    pub(crate) children: Mutex<Children>,
    pub(crate) notifiers: Mutex<Notifiers>,
    /// Some thread is about to read events: no need for another.
    pub(crate) reading: AtomicBool,
    /// The map remembers changes that may still be under way.
    pub(crate) unsettled: AtomicBool,
    pub(crate) cpu_readahead: Readahead,
    pub(crate) device_readahead: Readahead,
    /// What read-ahead planned for a CPU and handlers have not brought yet.
    pub(crate) ahead: Ahead,
    pub(crate) rooms: Rooms,
    pub(crate) gigantic: Gigantic,
    /// See [`Settings::reuse_pages`].
    reuses_pages: AtomicBool,
    pub(crate) stats: Statistics,
    pub(crate) uses: AtomicU64,
    /// There are children: read without their lock.
    pub(crate) owing: AtomicBool,
    control: Mutex<()>,
    closing: AtomicBool,
    /// Who wants nothing to leave; several threads may fork at once.
    pauses: AtomicU32,
    /// Steps under way that take pages out of system memory.
    departing: AtomicU64,
    /// Counts ended transitions; who met a page in flight waits for the next.
    progress: Mutex<u64>,
    progressed: Condvar,
    waiters: AtomicU64,
}

impl std::fmt::Debug for Engine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("settings", &self.settings)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl<'env> Engine<'env> {
    /// An engine without devices for an address space.
    #[must_use]
    pub fn new(space: &'env dyn AddressSpace, clock: &'env dyn Clock, settings: Settings) -> Self {
        Self {
            space,
            clock,
            settings,
            capabilities: space.capabilities(),
            gate: RwLock::new(Rank::Gate, SpaceMap::new()),
            staging: Mutex::new(Rank::Staging, StagingPool::new(space.staging())),
            devices: Devices::new(),
            children: Mutex::new(Rank::Children, Children::new()),
            notifiers: Mutex::new(Rank::Notifiers, Notifiers::new()),
            reading: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            cpu_readahead: Readahead::new(
                settings.fault_granule.get(),
                CPU_WINDOW,
                settings.readahead,
            ),
            device_readahead: Readahead::new(
                settings.device_granule.get(),
                DEVICE_WINDOW,
                settings.readahead,
            ),
            ahead: Ahead::new(),
            rooms: Rooms::new(),
            gigantic: Gigantic::new(),
            reuses_pages: AtomicBool::new(settings.reuse_pages),
            stats: Statistics::new(),
            uses: AtomicU64::new(1),
            owing: AtomicBool::new(false),
            control: Mutex::new(Rank::Control, ()),
            closing: AtomicBool::new(false),
            pauses: AtomicU32::new(0),
            departing: AtomicU64::new(0),
            progress: Mutex::new(Rank::Queue, 0),
            progressed: Condvar::new(),
            waiters: AtomicU64::new(0),
        }
    }

    /// What the address space offers.
    #[must_use]
    pub const fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// What the engine was opened with.
    #[must_use]
    pub const fn settings(&self) -> Settings {
        self.settings
    }

    /// The counters.
    #[must_use]
    pub const fn statistics(&self) -> &Statistics {
        &self.stats
    }

    /// Adds a device.
    ///
    /// # Errors
    /// [`AddDeviceError`]; then nothing changed.
    pub fn add_device(&self, device: &'env dyn Device) -> Result<DeviceId, AddDeviceError> {
        let _control = self.control.lock();
        if self.is_closing() {
            return Err(AddDeviceError::ShuttingDown);
        }
        if device.info().memory.whole_pages() == PageCount::ZERO {
            return Err(AddDeviceError::NoMemory);
        }
        if device.info().coherent && !device.info().system_memory {
            return Err(AddDeviceError::CoherentWithoutSystemMemory);
        }
        self.devices.add(device).ok_or(AddDeviceError::TooMany)
    }

    /// Brings everything home from a device. True when nothing is left on it;
    /// what goes there at the same time may be.
    pub fn vacate_device(&self, executor: &mut Executor, device: DeviceId) -> bool {
        self.leave_coherent_device(device);
        self.bring_all_home(executor, Some(device))
    }

    /// Brings everything home from a device and lets nothing go there again.
    /// True when nothing is left on it.
    pub fn remove_device(&self, executor: &mut Executor, device: DeviceId) -> bool {
        let Some(slot) = self.devices.get(device) else {
            return true;
        };
        slot.retire();
        slot.forget_in_place();
        // Who found the device in place just before has arrived after this; who
        // departs later finds it retired.
        self.pause();
        self.resume();
        self.leave_coherent_device(device);
        self.bring_all_home(executor, Some(device))
    }

    /// Refuses new work and brings everything home. True when all pages are in
    /// system memory and no child depends on the engine any more.
    pub fn shut_down(&self, executor: &mut Executor) -> bool {
        self.closing.store(true, Ordering::SeqCst);
        self.wait_for_departures();
        for (_, slot) in self.devices.all() {
            slot.forget_in_place();
        }
        let home = self.bring_all_home(executor, None);
        let clean = home & self.drain_all_children(executor);
        if clean {
            self.unwatch_all();
        }
        clean
    }

    /// A child may wait for a huge page of the kernel's for a while.
    fn drain_all_children(&self, executor: &mut Executor) -> bool {
        const PATIENCE_NS: u64 = 10_000_000_000;
        let since = self.clock.now_ns();
        while !self.drain_children(executor, u64::MAX) {
            if self.clock.now_ns().saturating_sub(since) > PATIENCE_NS {
                return false;
            }
            self.space.relax();
        }
        true
    }

    /// Lets all registered memory go: from here on it is the program's alone.
    fn unwatch_all(&self) {
        let mut map = self.gate.write();
        // What mremap added to a mapping is registered like the rest of it, and
        // the engine was not told.
        let everything = PageRange::span(
            VirtAddr::new(hmm_types::PAGE_SIZE),
            VirtAddr::new(hmm_types::USER_END),
        );
        for mapping in self.mappings_of(everything).iter().flatten() {
            if !mapping.engine_owned && map.overlapping(mapping.range).next().is_some() {
                self.space.unregister(mapping.range);
            }
        }
        for piece in map.pieces() {
            self.space.unregister(piece.range());
        }
        *map = SpaceMap::new();
    }

    /// Refuses new work from now on; [`Engine::shut_down`] does the rest.
    pub fn begin_shut_down(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Lets no page leave system memory until [`Engine::resume`] was called as
    /// often; what is under way has ended when this returns. Requests and
    /// device faults wait.
    pub fn pause(&self) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        self.wait_for_departures();
    }

    /// The opposite of [`Engine::pause`].
    pub fn resume(&self) {
        let before = self.pauses.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "resumed more often than paused");
        self.transition_ended();
    }

    fn wait_for_departures(&self) {
        // Where nothing runs at the same time there is nobody to wait for.
        while self.space.may_sleep() && self.departing.load(Ordering::SeqCst) > 0 {
            self.space.relax();
        }
    }

    /// Leave to take pages out of system memory; waits while that is paused.
    /// `None` when the engine shuts down.
    pub(crate) fn depart(&self) -> Option<Departure<'_>> {
        loop {
            self.departing.fetch_add(1, Ordering::SeqCst);
            let departure = Departure(&self.departing);
            if self.is_closing() {
                return None;
            }
            if self.pauses.load(Ordering::SeqCst) == 0 {
                return Some(departure);
            }
            drop(departure);
            if !self.space.may_sleep() {
                return None;
            }
            self.wait_for_transition();
        }
    }

    /// The same to put pages on a device, for which it must not be removed: who
    /// removes it waits for all departures from before.
    pub(crate) fn depart_to(&self, device: DeviceId) -> Result<Departure<'_>, StayReason> {
        let departure = self.depart().ok_or(StayReason::Cancelled)?;
        match self.devices.get(device) {
            Some(slot) if !slot.is_retired() => Ok(departure),
            _ => Err(StayReason::DeviceLost),
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Makes the engine accept work again after everything was brought home,
    /// for instance around a fork that the kernel does not report.
    pub fn reopen(&self) {
        self.closing.store(false, Ordering::SeqCst);
    }

    /// A logical time for recency of use.
    pub(crate) fn next_use(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }

    /// A moment in the order in which pages leave and arrive, to tell what happens
    /// from now on.
    pub fn moment(&self) -> u64 {
        self.uses_now()
    }

    /// The time that the next use will have.
    pub(crate) fn uses_now(&self) -> u64 {
        self.uses.load(Ordering::Relaxed)
    }

    /// Tells those who met a page in flight to look again.
    pub(crate) fn transition_ended(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            *self.progress.lock() += 1;
            self.progressed.notify_all();
        }
    }

    /// Waits until a transition has ended, a bounded time. Not for threads that
    /// read events.
    pub fn wait_for_transition(&self) {
        const PATIENCE: Duration = Duration::from_micros(500);
        hmm_sync::assert_none_held();
        if !self.space.may_sleep() {
            self.space.relax();
            return;
        }
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let progress = self.progress.lock();
        drop(self.progressed.wait_timeout(progress, PATIENCE));
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Called without locks after the kernel said that an event waits to be
    /// read: reads it, or lets those run who will. False when `attempt` has
    /// reached the limit.
    pub(crate) fn wait_for_events(&self, executor: &mut Executor, attempt: u32) -> bool {
        hmm_sync::assert_none_held();
        self.stats.again_retries.fetch_add(1, Ordering::Relaxed);
        if attempt > 0 {
            executor.takes_long();
        }
        if executor.reads_events() && executor.has_room() {
            self.pump(executor);
        } else {
            self.space.relax();
        }
        attempt < AGAIN_LIMIT
    }

    /// Whether the address is memory of the engine that must never fault.
    pub(crate) fn is_staging(&self, address: VirtAddr) -> bool {
        self.staging.lock().contains(address)
    }

    /// From now on pages that leave the program take no others home (see
    /// [`Settings::reuse_pages`]).
    pub fn stop_reusing_pages(&self) {
        self.reuses_pages.store(false, Ordering::SeqCst);
    }

    pub(crate) fn reuses_pages(&self) -> bool {
        self.reuses_pages.load(Ordering::SeqCst)
    }

    /// Pages of staging that somebody holds: zero when the engine is at rest.
    #[must_use]
    pub fn staging_held(&self) -> PageCount {
        PageCount::new(self.staging.lock().held_pages())
    }

    /// Bytes of the engine's own tables: (for registered memory, per device).
    #[must_use]
    pub fn metadata_bytes(&self) -> (ByteCount, ByteCount) {
        let map = self.gate.read().table_bytes() + self.staging.lock().table_bytes();
        (
            ByteCount::new(map),
            ByteCount::new(self.devices.table_bytes()),
        )
    }

    /// Pages of the range that the engine watches.
    #[must_use]
    pub fn registered_pages(&self, range: PageRange) -> PageCount {
        let map = self.gate.read();
        map.overlapping(range)
            .map(|piece| piece.range().pages())
            .sum()
    }

    /// Whether the device was added and not removed.
    #[must_use]
    pub fn has_device(&self, device: DeviceId) -> bool {
        self.devices
            .get(device)
            .is_some_and(|slot| !slot.is_retired())
    }

    /// Whether a device can use pages of system memory where they are.
    #[must_use]
    pub fn uses_system_memory(&self, device: DeviceId) -> bool {
        let slot = self.devices.get(device);
        slot.is_some_and(|slot| slot.device.info().system_memory)
    }

    /// Whether something is not in system memory, or on its way; or not on one
    /// device. Memory that is unmapped counts while it is in flight.
    pub(crate) fn has_pages_away(&self, only: Option<DeviceId>) -> bool {
        let map = self.gate.read();
        map.blocks().any(|block| {
            let inner = block.lock();
            if inner.away() == 0 && inner.in_flight() == 0 {
                return false;
            }
            only.is_none_or(|only| inner.states().any(|state| state.device() == Some(only)))
        })
    }

    /// Pages that are not in system memory, or on their way.
    #[must_use]
    pub fn away_pages(&self) -> PageCount {
        let map = self.gate.read();
        map.pieces()
            .iter()
            .map(|piece| {
                let inner = map.block(piece.block).lock();
                let away = (piece.first..piece.first + piece.pages)
                    .filter(|&index| inner.state(index).is_away() || inner.state(index).in_flight())
                    .count();
                PageCount::from(away)
            })
            .sum()
    }

    /// Whether forked children still need pages from the engine.
    #[must_use]
    pub fn owes_children(&self) -> bool {
        self.owing.load(Ordering::Acquire)
    }

    /// Checks the map's own rules; for tests.
    ///
    /// # Panics
    /// When one is broken.
    pub fn check(&self) {
        let map = self.gate.read();
        map.check();
        assert_eq!(
            self.is_unsettled(),
            !map.order.is_settled(),
            "handlers look for the end of changes that have ended"
        );
        if !self.space.is_quiet() {
            return;
        }
        for piece in map.pieces() {
            let page_len = map.block(piece.block).page_len();
            let _ = self.space.mappings(piece.range(), &mut |mapping| {
                let (range, now) = (mapping.range, mapping.page_len);
                assert_eq!(page_len, now, "{range} is taken for something else");
            });
        }
    }
}

/// Leave to take pages out of system memory, while it lives.
#[derive(Debug)]
pub(crate) struct Departure<'a>(&'a AtomicU64);

impl Drop for Departure<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
