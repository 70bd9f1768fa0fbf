//! The device itself.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex as HeapMutex, MutexGuard as HeapGuard, OnceLock, PoisonError};

use hmm_device::{Embedder, FrameAllocator, Injector, Join, LossMode, Reservation};
use hmm_hal::{Device, DeviceError, DeviceInfo, FaultHandler, Fence, Transfer};
use hmm_sync::{Mutex, Rank};
use hmm_types::{Access, DeviceId, FrameRange, PAGE_SHIFT, PageCount, PageRange, VirtAddr};

use crate::area::Area;
use crate::config::VulkanConfig;
use crate::control::Control;
use crate::dispatch::Commands;
use crate::driver::Driver;
use crate::footprint::Footprint;
use crate::gate::Gate;
use crate::gpu::Gpu;
use crate::kernel::{Pipeline, Variant};
use crate::loaded;
use crate::memory::Memory;
use crate::physical::Description;
use crate::queue::{CopyQueue, Fate};
use crate::servers::Servers;
use crate::stats::{Counters, VulkanStats};
use crate::table::Table;
use crate::window::Window;
use crate::{Choice, VulkanError};

/// What freed frames are overwritten with, where that was asked for.
pub const POISON: u8 = 0xA5;

/// A device of Vulkan's.
///
/// It lives in engine memory for the rest of the process's life;
/// [`VulkanDevice::close`] gives back everything that is large.
///
/// # System memory in place
/// With [`VulkanConfig::system_memory`] on a device that is the CPU, pages can be mapped
/// where they are. Its driver neither pins nor checks them. A page that the program drops
/// or unmaps while a kernel uses it is a fault of the driver's thread, which can only be
/// answered by taking the lock that whoever unmaps for that has, and that waits for the
/// kernel: the process ends after a minute. So it is for programs that leave such
/// memory alone while kernels run, and off by default.
///
/// With [`VulkanConfig::import_memory`], also off by default, memory that never migrates
/// is imported for a launch: `docs/vulkan.md` says which, and what becomes of it.
pub struct VulkanDevice {
    pub(crate) parts: Parts,
    frames: Mutex<FrameAllocator>,
    /// What the allocator has free, to be read without its lock.
    free: AtomicU64,
    /// Which frames pages get, where there is a choice: see `allocate_for`.
    window: Window,
    gate: Gate,
    servers: Servers,
    injector: Injector,
    counters: Counters,
    driver: &'static Driver,
    embedder: &'static (dyn Embedder + Sync),
    engine: OnceLock<(DeviceId, &'static dyn FaultHandler)>,
    ticks: AtomicU64,
    closed: AtomicBool,
    /// A dispatch has not ended when it was told to: nothing is given back.
    given_up: AtomicBool,
    /// Calls that use memory or tables now; closing waits for their end.
    users: AtomicUsize,
    shares_heap: AtomicBool,
    // The following are on the heap, and touched by the driver's thread, or when the
    // device is opened and closed.
    excluded: HeapMutex<Vec<PageRange>>,
    kernels: HeapMutex<Vec<(Pipeline, bool)>>,
    threads: HeapMutex<Vec<Box<dyn Join>>>,
}

/// What opening a device made, and closing it gives back.
pub(crate) struct Parts {
    pub(crate) config: VulkanConfig<'static>,
    pub(crate) name: &'static str,
    pub(crate) gpu: ManuallyDrop<Gpu>,
    pub(crate) memory: Memory,
    pub(crate) area: Area,
    pub(crate) table: Table,
    pub(crate) queue: CopyQueue,
    pub(crate) commands: Commands,
    /// Memory of this process that the device's is in, where it is the CPU.
    pub(crate) reservation: Option<Reservation>,
}

/// A call that uses the device's memory or tables.
struct Use<'a>(&'a AtomicUsize);

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &HeapMutex<T>) -> HeapGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VulkanDevice {
    /// In engine memory, from parts that `open.rs` has made. On the driver's thread.
    pub(crate) fn assemble(
        parts: Parts,
        gate: Gate,
        driver: &'static Driver,
        embedder: &'static (dyn Embedder + Sync),
    ) -> &'static Self {
        let frames = parts.memory.frames();
        hmm_mem::leaked(Self {
            frames: Mutex::new(Rank::Device, FrameAllocator::new(frames)),
            free: AtomicU64::new(u64::from(frames)),
            window: Window::new(frames),
            parts,
            gate,
            servers: Servers::new(),
            injector: Injector::default(),
            counters: Counters::default(),
            driver,
            embedder,
            engine: OnceLock::new(),
            ticks: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            users: AtomicUsize::new(0),
            shares_heap: AtomicBool::new(false),
            excluded: HeapMutex::new(Vec::new()),
            kernels: HeapMutex::new(Vec::new()),
            threads: HeapMutex::new(Vec::new()),
        })
    }

    /// Tells the device who it is, and who resolves the faults of its kernels.
    ///
    /// # Errors
    /// [`VulkanError::AlreadyAttached`].
    pub fn attach(
        &self,
        id: DeviceId,
        handler: &'static dyn FaultHandler,
    ) -> Result<(), VulkanError> {
        self.engine
            .set((id, handler))
            .map_err(|_| VulkanError::AlreadyAttached)
    }

    /// Pages of a range whose frames are not where all others' are, so that kernels
    /// cannot find them by adding a number: others had those frames at the time. They
    /// come right when they go home and come anew. At most `most` ranges.
    #[must_use]
    pub fn misplaced(&self, range: PageRange, most: usize) -> Vec<PageRange> {
        let mut found: Vec<PageRange> = Vec::new();
        let Some(_guard) = self.enter() else {
            return found;
        };
        let wanted = |page: VirtAddr| {
            let page = PageRange::from_pages(page, PageCount::ONE);
            let run = self.window.frames(page)?;
            Some(self.parts.memory.device(run))
        };
        self.parts.table.misplaced(range, wanted, |page| {
            let full = found.len() >= most;
            match found.last_mut() {
                Some(last) if last.end() == page.start() => {
                    *last = PageRange::span(last.start(), page.end());
                }
                _ if full => {}
                _ => found.push(page),
            }
        });
        found
    }

    /// What it is, for people.
    #[must_use]
    pub fn describe(&self) -> Description {
        self.parts.gpu.physical.description.clone()
    }

    /// What the device has counted.
    #[must_use]
    pub fn stats(&self) -> VulkanStats {
        VulkanStats {
            leaves: u64::from(self.parts.table.leaves()),
            driver_ranges: lock(&self.excluded).len() as u64,
            shares_heap: self.shares_heap.load(Ordering::Relaxed),
            imported_now: self.gate.imported(),
            ..self.counters.snapshot()
        }
    }

    /// The failures that the device is to show.
    #[must_use]
    pub const fn injector(&self) -> &Injector {
        &self.injector
    }

    /// How it was opened. The choice of the device is gone: it is this one.
    #[must_use]
    pub const fn config(&self) -> VulkanConfig<'static> {
        self.parts.config
    }

    /// Ends the threads, waits for calls that are under way, and gives memory and tables
    /// back. A kernel that runs now is told to stop. The device answers as a lost one
    /// from now on, and its kernels are unloaded.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        self.driver.begin_closing();
        self.control().stop.store(1, Ordering::SeqCst);
        if let Some(staging) = self.parts.queue.staging() {
            staging.close();
        }
        while self.users.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // Launches that wait for their turn end before.
        self.driver.run(|| self.tear_down());
        self.servers.close();
        self.driver.close();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            thread.join();
        }
        if self.has_given_up() {
            return; // the device may still write to its memory
        }
        if let Some(memory) = &self.parts.reservation {
            // SAFETY: the device has given its buffers back, and every call finds it
            // closed; `swap` above lets one caller through.
            unsafe { memory.release() };
            self.embedder.include(memory.range());
        }
        for range in std::mem::take(&mut *lock(&self.excluded)) {
            self.embedder.include(range);
        }
    }

    /// On the driver's thread, as its last work. The copying thread ends first.
    fn tear_down(&self) {
        let Parts {
            gpu,
            memory,
            area,
            queue,
            commands,
            ..
        } = &self.parts;
        if let Some(staging) = queue.staging() {
            staging.wait_for_thread();
        }
        // The last launch has given its imports back, and nobody unmaps any more.
        self.gate.close();
        let kernels = std::mem::take(&mut *self.lock_kernels());
        if self.has_given_up() {
            return;
        }
        // SAFETY: no dispatch runs and none will, the copying thread has ended, and so
        // have all calls that use memory or tables; this is called once.
        unsafe {
            for (kernel, _) in kernels {
                gpu.device.destroy_pipeline(kernel.pipeline, None);
                gpu.device.destroy_pipeline_layout(kernel.layout, None);
            }
            gpu.device.destroy_semaphore(commands.timeline, None);
            gpu.device.destroy_command_pool(commands.pool, None);
            if let Some(staging) = queue.staging() {
                staging.destroy(gpu);
            }
            area.buffer.destroy(gpu);
            memory.buffer.destroy(gpu);
            gpu.destroy();
        }
    }

    /// Before a fork(3) of this process, which takes the locks of malloc(3) that drivers
    /// need: waits until no dispatch runs that others wait for, and lets none begin until
    /// [`VulkanDevice::after_fork`]. On any thread; takes no lock.
    pub fn before_fork(&self) {
        self.gate.hold(|| self.has_given_up());
    }

    /// After it, in the process that has forked.
    pub fn after_fork(&self) {
        self.gate.let_go();
    }

    /// Keeps a thread to be joined.
    pub(crate) fn keep(&self, thread: Box<dyn Join>) {
        lock(&self.threads).push(thread);
    }

    /// Excludes from migration what a driver has mapped since. On the driver's thread.
    pub(crate) fn exclude_new(&self, before: &Footprint, late: bool) {
        let taken = before.taken(late);
        let mut known = lock(&self.excluded);
        for range in taken.ranges {
            // Known ones too: what the driver had given back the program may have claimed.
            self.embedder.exclude_guess(range);
            known.retain(|&old| {
                let is_said_again = range.encloses(old);
                if is_said_again {
                    self.embedder.include(old);
                }
                !is_said_again
            });
            known.push(range);
        }
        self.shares_heap
            .fetch_or(taken.shares_heap, Ordering::Relaxed);
    }

    /// Excludes what the C library knows of the objects that drivers have loaded.
    pub(crate) fn exclude_loaded(&self) {
        for heap in loaded::heaps() {
            // Where heaps are short the program's threads share it.
            self.embedder.exclude_guess(heap);
            lock(&self.excluded).push(heap);
        }
    }

    pub(crate) fn lock_kernels(&self) -> HeapGuard<'_, Vec<(Pipeline, bool)>> {
        lock(&self.kernels)
    }

    /// Whether a kernel has not been dispatched yet; it counts as dispatched then.
    pub(crate) fn is_first_dispatch(&self, pipeline: Pipeline) -> bool {
        let mut kernels = self.lock_kernels();
        let known = kernels.iter_mut().find(|(known, _)| *known == pipeline);
        known.is_some_and(|(_, dispatched)| !std::mem::replace(dispatched, true))
    }

    /// Tells kernels how this one translates.
    pub(crate) fn set_translation(&self, variant: Variant) {
        let control = self.control();
        let polls = self.parts.config.stall_polls;
        control.stall_polls.store(polls, Ordering::Relaxed);
        let done = match variant {
            Variant::Checked => self.area().done_address(),
            _ => 0,
        };
        control.done.store(done, Ordering::Relaxed);
        match variant {
            Variant::Delta(delta) => control.delta.store(delta, Ordering::Relaxed),
            Variant::Masked { base, mask } => {
                control.base.store(base, Ordering::Relaxed);
                control.mask.store(mask, Ordering::Relaxed);
            }
            Variant::Checked | Variant::Stall | Variant::Table | Variant::Plain => {}
        }
    }

    /// A dispatch does not end: the device is of no use any more. Its table stays as it
    /// is and its frames are nobody's again, so that the kernel goes on with those; where
    /// they are memory of this process, what is in them can still be read.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        let readable = self.parts.reservation.is_some();
        self.injector.lose(if readable {
            LossMode::MemoryReadable
        } else {
            LossMode::MemoryGone
        });
        // System memory in place is the program's, and nobody's to write to later.
        if !self.parts.config.system_memory && !self.imports_memory() {
            self.gate.abandon();
        }
    }

    pub(crate) fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// The driver says that the device is lost. Memory of this process is still there.
    pub(crate) fn lose(&self) {
        if self.injector.loss().is_some() {
            return; // known, and how
        }
        let readable = self.parts.reservation.is_some() && !self.has_given_up();
        self.injector.lose(if readable {
            LossMode::MemoryReadable
        } else {
            LossMode::MemoryGone
        });
    }

    pub(crate) fn next_tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.parts.gpu
    }

    pub(crate) const fn area(&self) -> &Area {
        &self.parts.area
    }

    pub(crate) fn control(&self) -> &Control {
        self.parts.area.control()
    }

    pub(crate) const fn control_address(&self) -> u64 {
        self.parts.area.control_address()
    }

    pub(crate) const fn commands(&self) -> Commands {
        self.parts.commands
    }

    pub(crate) const fn table(&self) -> &Table {
        &self.parts.table
    }

    pub(crate) const fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) const fn servers(&self) -> &Servers {
        &self.servers
    }

    pub(crate) const fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) const fn driver(&self) -> &'static Driver {
        self.driver
    }

    pub(crate) fn engine(&self) -> Option<&(DeviceId, &'static dyn FaultHandler)> {
        self.engine.get()
    }

    pub(crate) const fn frames(&self) -> u32 {
        self.parts.memory.frames()
    }

    /// Counts the calling thread as one that uses memory or tables, unless the
    /// device is closed.
    fn enter(&self) -> Option<Use<'_>> {
        self.users.fetch_add(1, Ordering::SeqCst);
        let guard = Use(&self.users);
        (!self.closed.load(Ordering::SeqCst)).then_some(guard)
    }

    /// As [`VulkanDevice::enter`], for calls that a lost device refuses.
    fn enter_alive(&self) -> Result<Use<'_>, DeviceError> {
        let guard = self.enter().ok_or(DeviceError::Lost)?;
        match self.injector.loss() {
            None => Ok(guard),
            Some(_) => Err(DeviceError::Lost),
        }
    }

    fn take_frames(
        &self,
        pick: impl FnOnce(&mut FrameAllocator) -> Option<FrameRange>,
    ) -> Result<FrameRange, DeviceError> {
        let _guard = self.enter_alive()?;
        if self.injector.allocation_fails() {
            self.counters.failures_injected.add(1);
            return Err(DeviceError::OutOfMemory);
        }
        let mut frames = self.frames.lock();
        let run = pick(&mut frames);
        self.free
            .store(u64::from(frames.free_frames()), Ordering::Relaxed);
        run.ok_or(DeviceError::OutOfMemory)
    }

    pub(crate) const fn memory(&self) -> &Memory {
        &self.parts.memory
    }

    pub(crate) const fn window(&self) -> &Window {
        &self.window
    }

    /// From now on frame 0 is for the page with this number.
    pub(crate) fn pin_window(&self, begin: u64) {
        let _frames = self.frames.lock();
        self.window.pin(begin);
    }

    /// Takes a range away from kernels. What is imported of it goes as a whole, and is
    /// given back before this returns.
    pub(crate) fn shoot_down(&self, range: PageRange) {
        let table = &self.parts.table;
        let cleared = self.gate.clear(|imports| {
            let any = table.clear(range);
            let imported = imports.condemn(range, |whole| {
                table.clear(whole);
            });
            (any, imported)
        });
        let Some((any, imported)) = cleared else {
            return;
        };
        if any || imported {
            self.counters.shootdowns.add(1);
            if self.gate.quiesce(self.control()) {
                self.counters.shootdown_waits.add(1);
            }
        }
        if imported {
            self.gate.expel(range);
        }
    }

    /// Enters pages; the first one is at this device address.
    fn enter_pages(&self, range: PageRange, first: u64, access: Access) -> Result<(), DeviceError> {
        let table = &self.parts.table;
        let prepared = if self.injector.map_fails() {
            self.counters.failures_injected.add(1);
            Err(DeviceError::OutOfMemory)
        } else {
            table.prepare(range, &self.gate)
        };
        let _leaves = prepared.inspect_err(|_| self.shoot_down(range))?;
        let imports = self.imports_memory();
        let stale = imports && self.gate.lock().imports.concern(range);
        if stale || !table.fits(range, first, access) {
            self.shoot_down(range);
        }
        // An import's neighbours belong to no block whose lock the caller has.
        let _alone = imports.then(|| self.gate.lock());
        table.map(range, first, access);
        Ok(())
    }
}

impl Device for VulkanDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: self.parts.name,
            memory: self.parts.memory.size(),
            coherent: false,
            atomics: true,
            system_memory: self.parts.config.system_memory,
            reads_program: false,
            unwatched_memory: self.imports_memory(),
        }
    }

    fn allocate(&self, pages: PageCount) -> Result<FrameRange, DeviceError> {
        self.take_frames(|frames| frames.allocate(pages.get()))
    }

    /// Where there is room, at one distance from all other pages on the device: kernels
    /// find those by adding it.
    fn allocate_for(&self, pages: PageRange) -> Result<FrameRange, DeviceError> {
        self.take_frames(|frames| {
            if frames.free_frames() == self.frames() {
                self.window.lay_around(pages);
            }
            self.window
                .frames(pages)
                .and_then(|run| frames.allocate_at(run.first(), run.count()))
                .or_else(|| frames.allocate(pages.pages().get()))
        })
    }

    fn free(&self, run: FrameRange) {
        let Some(_guard) = self.enter() else {
            return;
        };
        // A kernel that was given up goes on with what is in them.
        if self.parts.config.poison_freed
            && !self.has_given_up()
            && let Some(memory) = self.parts.memory.host(run)
        {
            let len_bytes = (run.count() as usize) << PAGE_SHIFT;
            // SAFETY: the caller gives the frames up, so nobody else uses them; `host`
            // has checked that they exist.
            unsafe { std::ptr::write_bytes(memory, POISON, len_bytes) };
        }
        let mut frames = self.frames.lock();
        frames.free(run);
        self.free
            .store(u64::from(frames.free_frames()), Ordering::Relaxed);
    }

    fn free_pages(&self) -> PageCount {
        PageCount::new(self.free.load(Ordering::Relaxed))
    }

    fn map(&self, range: PageRange, frames: FrameRange, access: Access) -> Result<(), DeviceError> {
        // Whatever was there must be gone, lost device or not.
        let _guard = self.enter_alive().inspect_err(|_| self.unmap(range))?;
        assert!(
            range.pages() == frames.pages(),
            "{range} has not as many pages as {frames:?}"
        );
        self.enter_pages(range, self.parts.memory.device(frames), access)
    }

    fn map_host(
        &self,
        range: PageRange,
        host: VirtAddr,
        access: Access,
    ) -> Result<(), DeviceError> {
        assert!(
            self.parts.config.system_memory,
            "{} uses no system memory, and says so",
            self.parts.name
        );
        assert!(host.is_page_aligned(), "{host} is not the start of a page");
        let _guard = self.enter_alive().inspect_err(|_| self.unmap(range))?;
        self.enter_pages(range, host.get(), access)
    }

    /// Imports need the driver, which is not called with locks held: the page is entered
    /// when the launch that has asked for it takes that up (`imports.rs`).
    fn map_unwatched(&self, range: PageRange, access: Access) -> Result<(), DeviceError> {
        if !self.imports_memory() {
            return self.map_host(range, range.start(), access);
        }
        let _guard = self.enter_alive().inspect_err(|_| self.unmap(range))?;
        self.grant(range)
    }

    fn unmap(&self, range: PageRange) {
        let Some(_guard) = self.enter() else {
            return;
        };
        self.shoot_down(range);
    }

    fn with_host_view(&self, frames: FrameRange, read: &mut dyn FnMut(VirtAddr)) -> bool {
        let memory = &self.parts.memory;
        match (self.enter(), memory.host(frames)) {
            // Failures are for the queue to tell.
            (Some(_guard), Some(host))
                if memory.buffer.quick_to_read && !self.injector.may_fail_copies() =>
            {
                read(VirtAddr::of(host));
                let len = frames.pages().bytes().get();
                self.counters.bytes_to_host.add(len);
                true
            }
            _ => false,
        }
    }

    fn submit(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        let _guard = self.enter().ok_or(DeviceError::Lost)?;
        let fate = Fate {
            injector: &self.injector,
            counters: &self.counters,
        };
        self.parts
            .queue
            .submit(transfers, &self.parts.memory, &fate)
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        self.parts.queue.wait(fence)
    }
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice")
            .field("name", &self.parts.name)
            .field("config", &self.parts.config)
            .field("free", &self.free)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// The choice of a device, without what it borrows.
pub(crate) const fn without_choice(config: VulkanConfig<'_>) -> VulkanConfig<'static> {
    VulkanConfig {
        device: Choice::First,
        memory: config.memory,
        copies: config.copies,
        own_memory: config.own_memory,
        system_memory: config.system_memory,
        import_memory: config.import_memory,
        poison_freed: config.poison_freed,
        leaves: config.leaves,
        log_entries: config.log_entries,
        dispatch_limit: config.dispatch_limit,
        launch_limit: config.launch_limit,
        stall_polls: config.stall_polls,
    }
}
