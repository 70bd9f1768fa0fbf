//! The device itself.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{OnceLock, PoisonError};
use std::time::Instant;

use hmm_device::{AbortOnUnwind, FrameAllocator, block_signals};
use hmm_hal::{
    Device, DeviceError, DeviceFaultError, DeviceInfo, FaultHandler, Fence, Reach, Resolution,
    Transfer,
};
use hmm_sync::{Mutex, Rank};
use hmm_types::{Access, DeviceId, FrameRange, PAGE_SHIFT, PageCount, PageRange, VirtAddr};

use crate::guard;
use crate::launch::{Board, Job};
use crate::memory::DeviceMemory;
use crate::page_table::PageTable;
use crate::queue::CopyQueue;
use crate::shootdown::Shootdown;
use crate::stats::Counters;
use crate::{
    Context, Embedder, Injector, Join, KernelError, LaunchError, LaunchReport, MAX_WORKERS,
    SoftConfig, SoftError, SoftStats, Standalone, worker,
};

/// What freed frames are overwritten with, where that was asked for.
pub const POISON: u8 = 0xA5;

/// A device in software: its own memory, page table, copy queue and threads.
///
/// It lives in engine memory for the rest of the process's life;
/// [`SoftDevice::close`] gives back everything that is large.
pub struct SoftDevice {
    config: SoftConfig,
    memory: DeviceMemory,
    frames: Mutex<FrameAllocator>,
    /// What the allocator has free, to be read without its lock.
    free: AtomicU64,
    table: PageTable,
    shootdown: Shootdown,
    queue: CopyQueue,
    injector: Injector,
    counters: Counters,
    board: Board,
    engine: OnceLock<(DeviceId, &'static dyn FaultHandler)>,
    closed: AtomicBool,
    /// Calls that use memory or tables now; closing waits for their end.
    users: AtomicUsize,
    /// Touched when the device is opened and closed only: these are on the heap.
    threads: std::sync::Mutex<Vec<Box<dyn Join>>>,
}

/// A call that uses the device's memory or tables.
struct Use<'a>(&'a AtomicUsize);

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SoftDevice {
    /// Makes a device whose workers are plain threads.
    ///
    /// # Errors
    /// [`SoftError`] when the configuration makes no sense or the system has
    /// not enough of something.
    pub fn open(config: SoftConfig) -> Result<&'static Self, SoftError> {
        Self::open_with(config, &Standalone)
    }

    /// Makes a device in a program that excludes its memory and starts its workers.
    ///
    /// # Errors
    /// As [`SoftDevice::open`].
    pub fn open_with(
        config: SoftConfig,
        embedder: &dyn Embedder,
    ) -> Result<&'static Self, SoftError> {
        if config.workers == 0 || config.workers > MAX_WORKERS {
            return Err(SoftError::Workers {
                asked: config.workers,
            });
        }
        let table = PageTable::new().ok_or(SoftError::NoEngineMemory)?;
        let memory = DeviceMemory::reserve(config.memory, config.populate, embedder)?;
        let device = hmm_mem::leaked(Self {
            config,
            frames: Mutex::new(Rank::Device, FrameAllocator::new(memory.frames())),
            free: AtomicU64::new(u64::from(memory.frames())),
            memory,
            table,
            shootdown: Shootdown::new(config.workers, config.membarrier),
            queue: CopyQueue::new(),
            injector: Injector::default(),
            counters: Counters::default(),
            board: Board::new(),
            engine: OnceLock::new(),
            closed: AtomicBool::new(false),
            users: AtomicUsize::new(0),
            threads: std::sync::Mutex::new(Vec::new()),
        });
        let helper: (String, Box<dyn FnOnce() + Send>) = (
            "hmm-soft-copy".to_owned(),
            Box::new(|| device.help_to_copy()),
        );
        let workers = (0..config.workers).map(|worker| {
            let body: Box<dyn FnOnce() + Send> = Box::new(move || worker::main(device, worker));
            (format!("hmm-soft-{worker}"), body)
        });
        for (worker, (name, body)) in workers.chain([helper]).enumerate() {
            match embedder.spawn(name, body) {
                Ok(thread) => device.lock_threads().push(thread),
                Err(error) => {
                    device.close();
                    return Err(SoftError::Spawn {
                        worker,
                        reason: error.kind(),
                    });
                }
            }
        }
        device.board.wait_for_workers(config.workers);
        Ok(device)
    }

    /// Tells the device who it is, and who resolves the faults of its kernels.
    ///
    /// # Errors
    /// [`SoftError::AlreadyAttached`].
    pub fn attach(
        &self,
        id: DeviceId,
        handler: &'static dyn FaultHandler,
    ) -> Result<(), SoftError> {
        self.engine
            .set((id, handler))
            .map_err(|_| SoftError::AlreadyAttached)
    }

    /// Lets the engine know that a command begins on the calling worker.
    pub(crate) fn command_begins(&self) {
        if let Some(&(id, engine)) = self.engine.get() {
            engine.command_begins(id);
        }
    }

    /// Runs `kernel` for each index below `groups`, on all workers, and waits
    /// until that is done.
    ///
    /// One kernel runs at a time; launches of several threads take turns in the
    /// order in which they came. The kernel may borrow from the caller. It
    /// reaches memory that may be on the device through its [`Context`] only;
    /// whatever else it touches, it touches as a CPU thread.
    ///
    /// # Errors
    /// [`LaunchError`]: the first failure ends the launch, and indices that
    /// have not begun do not run.
    pub fn launch<K>(&'static self, groups: usize, kernel: K) -> Result<LaunchReport, LaunchError>
    where
        K: Fn(&Context, usize) -> Result<(), KernelError> + Sync,
    {
        if worker::is_worker_of(self) {
            return Err(LaunchError::Nested);
        }
        if self.closed.load(Ordering::SeqCst) {
            return Err(LaunchError::Closed);
        }
        if self.injector.loss().is_some() {
            return Err(LaunchError::Lost);
        }
        if self.engine.get().is_none() {
            return Err(LaunchError::NotAttached);
        }
        guard::install();
        let workers = self.config.workers.min(groups);
        let mut before = self.stats();
        let mut start = Instant::now();
        if groups > 0 {
            self.board.run(Job::new(&kernel), groups, workers, || {
                before = self.stats();
                start = Instant::now();
            })?;
        }
        if self.injector.loss().is_some() {
            return Err(LaunchError::Lost);
        }
        let elapsed = start.elapsed();
        self.counters.launches.add(1);
        let after = self.stats();
        Ok(LaunchReport {
            groups,
            workers,
            faults: after.faults - before.faults,
            retries: after.retries - before.retries,
            tlb_misses: after.tlb_misses - before.tlb_misses,
            in_place: after.in_place - before.in_place,
            thrash_in_place: after.thrash_in_place - before.thrash_in_place,
            elapsed,
        })
    }

    /// Ends the workers, waits for calls that are under way, and gives memory
    /// and tables back. A kernel that runs now fails at its next fault, or
    /// before its next index. The device answers as a lost one from now on.
    ///
    /// # Panics
    /// When a kernel of the device itself calls this: it would wait for itself.
    pub fn close(&self) {
        assert!(
            !worker::is_worker_of(self),
            "a kernel cannot close the device that it runs on"
        );
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        self.board.close();
        self.queue.close();
        let threads = std::mem::take(&mut *self.lock_threads());
        for thread in threads {
            thread.join();
        }
        while self.users.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: the workers have ended, the calls that used memory or tables
        // too, and every later one finds the device closed; `swap` above lets
        // one caller through.
        unsafe {
            self.memory.release();
            self.table.release();
        }
    }

    /// What the device has counted.
    #[must_use]
    pub fn stats(&self) -> SoftStats {
        self.counters.snapshot(
            self.shootdown.slots().iter().map(|slot| &slot.counters),
            self.table.bytes() as u64,
        )
    }

    /// The failures that the device is to show.
    #[must_use]
    pub fn injector(&self) -> &Injector {
        &self.injector
    }

    /// How it was opened.
    #[must_use]
    pub fn config(&self) -> SoftConfig {
        self.config
    }

    /// Whether every access pays a fence, for lack of membarrier(2).
    #[must_use]
    pub fn uses_fences(&self) -> bool {
        self.shootdown.uses_fences()
    }

    /// Where the device's memory lies in this process.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.memory.range()
    }

    pub(crate) fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    pub(crate) fn table(&self) -> &PageTable {
        &self.table
    }

    pub(crate) fn shootdown(&self) -> &Shootdown {
        &self.shootdown
    }

    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Has the engine resolve a fault of a kernel. Called on a worker.
    pub(crate) fn fault(
        &self,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        self.ask_engine(|id, handler| handler.device_fault(id, address, access))
    }

    /// Has the engine make a range usable for a command. Called on a worker.
    pub(crate) fn fault_range(
        &self,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, DeviceFaultError> {
        self.ask_engine(|id, handler| handler.fault_range(id, range, access, reach))
    }

    fn ask_engine<R>(
        &self,
        ask: impl FnOnce(DeviceId, &'static dyn FaultHandler) -> Result<R, DeviceFaultError>,
    ) -> Result<R, DeviceFaultError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(DeviceFaultError::ShuttingDown);
        }
        if self.injector.loss().is_some() {
            return Err(DeviceFaultError::DeviceLost);
        }
        let Some(&(id, handler)) = self.engine.get() else {
            return Err(DeviceFaultError::ShuttingDown);
        };
        // An engine that panics must not be taken for a kernel that does.
        let bomb = AbortOnUnwind("the engine resolved a device fault");
        let answer = ask(id, handler);
        bomb.defuse();
        answer
    }

    pub(crate) fn wait_for_progress(&self) {
        if let Some((_, handler)) = self.engine.get() {
            handler.wait_for_progress();
        }
    }

    fn lock_threads(&self) -> std::sync::MutexGuard<'_, Vec<Box<dyn Join>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Body of the thread that helps with large copies.
    fn help_to_copy(&self) {
        block_signals();
        self.queue.help();
    }

    /// Keeps memory and tables until the value is dropped; `None` when they
    /// are gone.
    fn enter(&self) -> Option<Use<'_>> {
        self.users.fetch_add(1, Ordering::SeqCst);
        let guard = Use(&self.users);
        (!self.closed.load(Ordering::SeqCst)).then_some(guard)
    }

    /// As [`SoftDevice::enter`], for calls that a lost device refuses.
    fn enter_alive(&self) -> Result<Use<'_>, DeviceError> {
        let guard = self.enter().ok_or(DeviceError::Lost)?;
        match self.injector.loss() {
            None => Ok(guard),
            Some(_) => Err(DeviceError::Lost),
        }
    }

    /// Decides whether a mapping goes ahead; nothing is mapped when it does not.
    fn begin_map(
        &self,
        range: PageRange,
        prepare: impl FnOnce() -> Result<bool, DeviceError>,
    ) -> Result<(), DeviceError> {
        let prepared = if self.injector.map_fails() {
            self.counters.failures_injected.add(1);
            Err(DeviceError::OutOfMemory)
        } else {
            prepare()
        };
        match prepared {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.shoot_down(range);
                Ok(())
            }
            Err(error) => {
                self.shoot_down(range);
                Err(error)
            }
        }
    }

    fn shoot_down(&self, range: PageRange) {
        if !self.table.clear(range) {
            return;
        }
        self.counters.shootdowns.add(1);
        if let Some(waits) = self.shootdown.wait() {
            self.counters.shootdown_barriers.add(1);
            self.counters.shootdown_waits.add(waits);
        }
    }
}

impl Device for SoftDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: self.config.name,
            memory: self.memory.size(),
            coherent: self.config.coherent,
            atomics: true,
            system_memory: true,
            reads_program: cfg!(target_arch = "x86_64"),
            unwatched_memory: true,
        }
    }

    fn allocate(&self, pages: PageCount) -> Result<FrameRange, DeviceError> {
        let _guard = self.enter_alive()?;
        if self.injector.allocation_fails() {
            self.counters.failures_injected.add(1);
            return Err(DeviceError::OutOfMemory);
        }
        let mut frames = self.frames.lock();
        let run = frames.allocate(pages.get());
        self.free
            .store(u64::from(frames.free_frames()), Ordering::Relaxed);
        run.ok_or(DeviceError::OutOfMemory)
    }

    fn free(&self, run: FrameRange) {
        let Some(_guard) = self.enter() else {
            return;
        };
        if self.config.poison_freed {
            let len_bytes = (run.count() as usize) << PAGE_SHIFT;
            // SAFETY: the caller gives the frames up, so nobody else uses them;
            // `pointer` has checked that they exist.
            unsafe { std::ptr::write_bytes(self.memory.pointer(run), POISON, len_bytes) };
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
        self.memory.pointer(frames); // checks that the frames exist
        self.begin_map(range, || self.table.prepare_frames(range, frames, access))?;
        self.table.set_frames(range, frames, access);
        Ok(())
    }

    fn map_host(
        &self,
        range: PageRange,
        host: VirtAddr,
        access: Access,
    ) -> Result<(), DeviceError> {
        let _guard = self.enter_alive().inspect_err(|_| self.unmap(range))?;
        assert!(host.is_page_aligned(), "{host} is not the start of a page");
        self.begin_map(range, || self.table.prepare_host(range, host, access))?;
        self.table.set_host(range, host, access);
        Ok(())
    }

    fn unmap(&self, range: PageRange) {
        let Some(_guard) = self.enter() else {
            return;
        };
        self.shoot_down(range);
    }

    fn with_host_view(&self, frames: FrameRange, read: &mut dyn FnMut(VirtAddr)) -> bool {
        match self.enter() {
            // Failures are for the queue to tell.
            Some(_guard) if !self.injector.may_fail_copies() => {
                read(VirtAddr::of(self.memory.pointer(frames)));
                let len = frames.pages().bytes().get();
                self.counters.bytes_to_host.add(len);
                true
            }
            _ => false,
        }
    }

    fn submit(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        let _guard = self.enter().ok_or(DeviceError::Lost)?;
        self.queue
            .submit(transfers, &self.memory, &self.injector, &self.counters)
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        self.queue.wait(fence)
    }
}

impl fmt::Debug for SoftDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDevice")
            .field("config", &self.config)
            .field("memory", &self.memory)
            .field("free", &self.free)
            .field("table", &self.table)
            .field("shootdown", &self.shootdown)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}
