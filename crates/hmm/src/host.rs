//! The engine with its threads, and the handle that a program holds.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hmm_core::{Destination, Engine, MirrorEntry, Relief, StatsSnapshot};
use hmm_hal::Device;
use hmm_mem::Pages;
use hmm_os::{EngineThread, EngineThreads, LinuxSpace, MonotonicClock, RegionPages, Sharing};
use hmm_soft::SoftDevice;
use hmm_sync::{Condvar, Mutex, Rank};
use hmm_types::{Access, ByteCount, DeviceId, MAX_DEVICES, PageCount, PageRange, PageResidency};

use crate::builder::Builder;
use crate::care::{self, Heartbeat};
use crate::jobs::{Jobs, Numbers, Outcome, Request, in_parts};
use crate::rota::Rota;
use crate::vulkan::OpenVulkan;
use crate::{
    Error, Memory, Prefetch, Report, Residency, ShutdownError, SoftwareDevice, SoftwareOptions,
};

static CLOCK: MonotonicClock = MonotonicClock;

/// Everything that lives as long as a fault could be in flight: for ever, in
/// engine memory.
pub(crate) struct Host {
    pub(crate) threads: EngineThreads,
    pub(crate) space: &'static LinuxSpace,
    pub(crate) engine: Engine<'static>,
    pub(crate) jobs: Jobs,
    pub(crate) heartbeats: hmm_mem::Vec<Heartbeat>,
    pub(crate) rota: Rota,
    /// Where the handlers are, in order; empty when they are not pinned.
    pub(crate) handler_cpus: hmm_mem::Vec<usize>,
    /// Threads that carry out requests.
    workers: usize,
    devices: [OnceLock<&'static dyn Device>; MAX_DEVICES],
    /// To be closed at the end: their workers are engine threads.
    software: Mutex<hmm_mem::Vec<&'static SoftDevice>>,
    vulkan: Mutex<hmm_mem::Vec<&'static OpenVulkan>>,
    /// Regions that other processes can attach.
    sharing: Mutex<hmm_mem::Vec<Sharing>>,
    stopping: AtomicBool,
    /// Threads to join at the end; and what the watch sleeps on.
    running: Mutex<hmm_mem::Vec<EngineThread>>,
    naps: Mutex<()>,
    wake: Condvar,
    pid: u32,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Host {
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn is_own_process(&self) -> bool {
        self.pid == std::process::id()
    }

    pub(crate) fn has_devices(&self) -> bool {
        self.devices[0].get().is_some()
    }

    /// Sleeps, unless the engine ends.
    pub(crate) fn nap(&self, time: Duration) {
        let guard = self.naps.lock();
        if !self.is_stopping() {
            drop(self.wake.wait_timeout(guard, time));
        }
    }

    pub(crate) fn add_device(&self, device: &'static dyn Device) -> Result<DeviceId, Error> {
        let id = self.engine.add_device(device)?;
        let set = self.devices[id.index()].set(device);
        assert!(set.is_ok(), "the engine gave a device id twice");
        Ok(id)
    }

    pub(crate) fn remove_device(&'static self, device: DeviceId) -> Result<bool, Error> {
        if !self.engine.has_device(device) {
            return Err(Error::NoDevice { device });
        }
        match self.ask(Request::RemoveDevice(device))? {
            Outcome::Clean(clean) => Ok(clean),
            other => unreachable!("removing a device came to {other:?}"),
        }
    }

    fn submit(&self, requests: impl Iterator<Item = Request>) -> Result<Numbers, Error> {
        if !self.is_own_process() {
            return Err(Error::Forked);
        }
        if hmm_os::is_engine_thread() {
            return Err(Error::EngineThread);
        }
        self.jobs.submit(requests)
    }

    /// Has a worker do it, and waits.
    fn ask(&self, request: Request) -> Result<Outcome, Error> {
        let numbers = self.submit(std::iter::once(request))?;
        match numbers.iter().next() {
            Some(number) => Ok(self.jobs.wait(number)),
            None => unreachable!("a request that was taken has a number"),
        }
    }

    /// A migration by as many workers as there are.
    pub(crate) fn move_all(
        &'static self,
        range: Option<PageRange>,
        to: Destination,
    ) -> Result<Prefetch, Error> {
        let since = self.engine.moment();
        let parts = |workers| self.begin(range.map(|range| in_parts(range, since, to, workers)));
        match parts(self.workers) {
            // For one part there may be room.
            Err(Error::QueueFull { .. }) => parts(1),
            result => result,
        }
    }

    fn begin<R>(&'static self, requests: Option<R>) -> Result<Prefetch, Error>
    where
        R: Iterator<Item = Request>,
    {
        let numbers = self.submit(requests.into_iter().flatten())?;
        Ok(Prefetch::new(self, numbers))
    }

    /// Has a thread of the engine look at what its locks protect. The program's
    /// own threads must not hold them: one can stop at any instruction, because
    /// its stack is on a device or a signal handler of the program's touches what
    /// is, and a handler would need the lock to go on.
    ///
    /// # Errors
    /// [`Error::Forked`]: in a forked child there is no such thread.
    fn on_engine_thread<R: Send>(
        &'static self,
        look: impl FnOnce(&'static Engine<'static>) -> R + Send,
    ) -> Result<R, Error> {
        if hmm_os::is_engine_thread() {
            return Ok(look(&self.engine));
        }
        if !self.is_own_process() {
            return Err(Error::Forked);
        }
        Ok(self.threads.run_on_root(move || look(&self.engine)))
    }

    /// Starts handlers, workers and the watch.
    fn start_threads(&'static self, builder: &Builder) -> Result<(), Error> {
        for number in 0..builder.handlers {
            let bounce = care::bounce().ok_or(Error::EngineMemory)?;
            let pin = self.handler_cpus.get(number).copied();
            let name = format!("hmm-handler-{number}");
            let body = move |bounce: Pages| care::handle(self, &bounce, number);
            self.keep(self.threads.spawn(&name, pin, move || body(bounce))?);
        }
        for number in 0..builder.workers {
            let bounce = care::bounce().ok_or(Error::EngineMemory)?;
            let name = format!("hmm-worker-{number}");
            let thread = self
                .threads
                .spawn(&name, None, move || care::work(self, &bounce))?;
            self.keep(thread);
        }
        self.keep(
            self.threads
                .spawn("hmm-watch", None, move || care::watch(self))?,
        );
        Ok(())
    }

    pub(crate) fn keep_software(&self, device: &'static SoftDevice) {
        self.software.lock().push(device);
    }

    pub(crate) fn keep_vulkan(&self, device: &'static OpenVulkan) {
        self.vulkan.lock().push(device);
    }

    pub(crate) fn keep_sharing(&self, sharing: Sharing) {
        self.sharing.lock().push(sharing);
        // One may wait that does not hear of peers.
        self.rota.call_all();
    }

    /// Brings a shared region home and sends its peers away. False when it is not to
    /// be unmapped: it cannot come home, and stays shared; or the program has done it.
    pub(crate) fn end_sharing(&'static self, window: PageRange) -> bool {
        let home = Request::Migrate {
            range: window,
            whole: window,
            since: self.engine.moment(),
            to: Destination::System,
        };
        let is_shared = |sharing: &Sharing| sharing.window() == window;
        if !self.sharing.lock().iter().any(is_shared) {
            return true; // the engine has ended, with everything at home
        }
        match self.ask(home) {
            Ok(Outcome::Report(report)) if report.stayed.is_empty() => {}
            _ => return false,
        }
        let found = {
            let mut all = self.sharing.lock();
            let at = all.iter().position(is_shared);
            at.map(|at| all.swap_remove(at))
        };
        found.is_some_and(|sharing| self.threads.run_on_root(move || sharing.end(self.space)))
    }

    fn keep(&self, thread: EngineThread) {
        self.running.lock().push(thread);
    }

    /// Ends the engine's threads. Everything must be home.
    fn stop_threads(&self) {
        self.jobs.close();
        {
            let _naps = self.naps.lock();
            self.stopping.store(true, Ordering::Release);
        }
        self.wake.notify_all();
        let mut shared = hmm_mem::vec();
        std::mem::swap(&mut shared, &mut *self.sharing.lock());
        for sharing in shared {
            self.threads.run_on_root(|| sharing.end(self.space));
        }
        let mut software = hmm_mem::vec();
        std::mem::swap(&mut software, &mut *self.software.lock());
        for device in software {
            SoftwareDevice::close(self, device);
        }
        let mut vulkan = hmm_mem::vec();
        std::mem::swap(&mut vulkan, &mut *self.vulkan.lock());
        for device in vulkan {
            device.close();
        }
        self.threads.run_on_root(|| self.space.interrupt());
        self.rota.call_all();
        let mut running = hmm_mem::vec();
        std::mem::swap(&mut running, &mut *self.running.lock());
        for thread in running {
            thread.join();
        }
        self.threads.run_on_root(|| self.space.close());
        self.threads.end();
    }
}

impl Relief for Host {
    fn takes_long(&self) {
        self.rota.call_all();
    }

    fn can_be_shared(&self) {
        self.rota.call_all();
        self.space.nudge();
    }
}

/// Heterogeneous memory management for this process.
///
/// Dropping it shuts the engine down as [`Hmm::shutdown`] does.
#[derive(Debug)]
pub struct Hmm {
    host: Option<&'static Host>,
}

impl Hmm {
    /// Opens an engine with default settings.
    ///
    /// # Errors
    /// When the kernel or the user's privileges do not allow it; the message
    /// says what to do. `hmm info` shows what a machine offers.
    pub fn open() -> Result<Self, Error> {
        Self::builder().open()
    }

    /// Settings to choose before opening.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn start(builder: Builder) -> Result<Self, Error> {
        if !hmm_mem::reserve() {
            return Err(Error::EngineMemory);
        }
        let threads = EngineThreads::start()?;
        let space = threads.run_on_root(|| LinuxSpace::open(builder.open_config()))?;
        let space: &'static LinuxSpace = hmm_mem::leaked(space);
        let mut handler_cpus = hmm_mem::vec();
        if builder.pin_handlers {
            let cpus = hmm_os::allowed_cpus();
            handler_cpus.extend(cpus.iter().copied().cycle().take(builder.handlers));
        }
        let mut heartbeats = hmm_mem::vec_with_capacity(builder.handlers);
        heartbeats.extend((0..builder.handlers).map(|_| Heartbeat::new()));
        let host: &'static Host = hmm_mem::leaked(Host {
            threads,
            space,
            engine: Engine::new(space, &CLOCK, builder.settings),
            jobs: Jobs::new(),
            heartbeats,
            rota: Rota::new(),
            handler_cpus,
            workers: builder.workers,
            devices: [const { OnceLock::new() }; MAX_DEVICES],
            software: Mutex::new(Rank::Control, hmm_mem::vec()),
            vulkan: Mutex::new(Rank::Control, hmm_mem::vec()),
            sharing: Mutex::new(Rank::Control, hmm_mem::vec()),
            stopping: AtomicBool::new(false),
            running: Mutex::new(Rank::Control, hmm_mem::vec()),
            naps: Mutex::new(Rank::Queue, ()),
            wake: Condvar::new(),
            pid: std::process::id(),
        });
        if let Err(error) = host.start_threads(&builder) {
            host.stop_threads();
            return Err(error);
        }
        if !host.engine.capabilities().fork_events {
            fork_guard::install(host);
        }
        Ok(Self { host: Some(host) })
    }

    fn host(&self) -> &'static Host {
        match self.host {
            Some(host) => host,
            None => unreachable!("only shutting down takes the host away"),
        }
    }

    /// Adds a software device: memory, page table and worker threads of its own.
    ///
    /// # Errors
    /// [`Error::Software`], [`Error::AddDevice`]; then nothing changed.
    pub fn add_software_device(&self, options: SoftwareOptions) -> Result<SoftwareDevice, Error> {
        if !self.host().is_own_process() {
            return Err(Error::Forked);
        }
        SoftwareDevice::open(self.host(), options)
    }

    /// Adds a Vulkan device: a GPU, or Mesa's lavapipe where there is none. Open it
    /// early: what other threads map at that moment never migrates.
    ///
    /// # Errors
    /// [`Error::Vulkan`]: there is no Vulkan, no such device, or it lacks something.
    /// [`Error::AddDevice`]: the engine has as many devices as it can.
    ///
    /// ```
    /// let hmm = hmm::Hmm::open()?;
    /// match hmm.add_vulkan_device(hmm::VulkanOptions::new(hmm::ByteCount::mib(16))) {
    ///     Ok(device) => println!("{} with {}", device.name(), device.memory()),
    ///     Err(why) => println!("{why}"),
    /// }
    /// hmm.shutdown()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_vulkan_device(
        &self,
        options: crate::VulkanOptions<'_>,
    ) -> Result<crate::VulkanDevice, Error> {
        if !self.host().is_own_process() {
            return Err(Error::Forked);
        }
        crate::VulkanDevice::open(self.host(), options)
    }

    /// Makes memory that other processes can [`attach`](crate::attach) at `path`, and
    /// that migrates for all of them; `size` is rounded up to whole pages. It begins
    /// as zeros. At `path` a socket is made that only this user can use.
    ///
    /// # Errors
    /// [`Error::Share`]: the path is taken or cannot be made, there is no memory, or
    /// the kernel is older than Linux 5.19. Then nothing was changed.
    ///
    /// ```
    /// use hmm::{ByteCount, Hmm, SoftwareOptions};
    ///
    /// let path = std::env::temp_dir().join(format!("frames-{}", std::process::id()));
    /// let hmm = Hmm::open()?;
    /// let device = hmm.add_software_device(SoftwareOptions::new(ByteCount::mib(4)))?;
    /// # if !hmm.can_share() { println!("skipped: no WP_HUGETLBFS_SHMEM"); return Ok(()) }
    /// let region = hmm.share(ByteCount::mib(1), &path)?;
    /// hmm.migrate(&region, device.id())?; // out of every process that has it
    /// # assert!(hmm.residency(&region)?.to_string().len() > 0);
    /// drop(region); // home again
    /// hmm.shutdown()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn share(
        &self,
        size: ByteCount,
        path: impl AsRef<std::path::Path>,
    ) -> Result<crate::SharedRegion, Error> {
        if !self.host().is_own_process() {
            return Err(Error::Forked);
        }
        crate::SharedRegion::open(self.host(), size, RegionPages::Small, path.as_ref())
    }

    /// The same in huge pages of 2 MiB, which leave and come home whole; `size` is
    /// rounded up to those. They are taken from the kernel's pool
    /// (`/proc/sys/vm/nr_hugepages`): all of them now, and again whenever they come
    /// home. If the pool is empty then, they stay on the device, and who touches
    /// them waits.
    ///
    /// # Errors
    /// As [`Hmm::share`]. The pool has too few pages: [`Error::Share`], and nothing was
    /// changed.
    ///
    /// ```no_run
    /// let hmm = hmm::Hmm::open()?;
    /// let region = hmm.share_huge(hmm::ByteCount::mib(64), "/run/user/1000/frames")?;
    /// # drop(region);
    /// # hmm.shutdown()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn share_huge(
        &self,
        size: ByteCount,
        path: impl AsRef<std::path::Path>,
    ) -> Result<crate::SharedRegion, Error> {
        if !self.host().is_own_process() {
            return Err(Error::Forked);
        }
        crate::SharedRegion::open(self.host(), size, RegionPages::Huge, path.as_ref())
    }

    /// Whether [`Hmm::share`] works here: Linux 5.19 or later.
    #[must_use]
    pub fn can_share(&self) -> bool {
        let host = self.host();
        host.threads
            .run_on_root(|| host.space.can_share(RegionPages::Small))
    }

    /// Moves memory to a device, and waits until it is there. Each page moves
    /// if it can; the report says which did not and why. If the device is full,
    /// what it has not used for longest is evicted, never pages of this request;
    /// from coherent memory nothing is.
    ///
    /// The bytes may be used by any thread meanwhile: a thread that touches a
    /// page on its way waits for it and has it brought back.
    ///
    /// # Errors
    /// [`Error`] when the request names no memory or no device. Then nothing
    /// was changed.
    pub fn migrate(&self, memory: impl Memory, device: DeviceId) -> Result<Report, Error> {
        let range = memory.whole_pages()?;
        self.known(device)?;
        self.move_all(range, Destination::Device(device))
            .and_then(Self::judged)
    }

    /// The same without waiting: the migration runs by itself.
    ///
    /// # Errors
    /// As [`Hmm::migrate`], and [`Error::QueueFull`].
    pub fn prefetch(&self, memory: impl Memory, device: DeviceId) -> Result<Prefetch, Error> {
        let range = memory.whole_pages()?;
        self.known(device)?;
        let to = Destination::Device(device);
        let since = self.host().engine.moment();
        self.begin(range.map(|range| in_parts(range, since, to, 1)))
    }

    /// Brings memory home to system memory, and waits until it is there.
    ///
    /// # Errors
    /// As [`Hmm::migrate`].
    pub fn evict(&self, memory: impl Memory) -> Result<Report, Error> {
        let range = memory.whole_pages()?;
        Ok(self.move_all(range, Destination::System)?.wait())
    }

    /// Takes pages from the CPU for a device without moving them to its memory,
    /// so that the device's atomics on them are atomic. The next CPU touch of a
    /// page takes it back.
    ///
    /// # Errors
    /// As [`Hmm::migrate`]; and when the device cannot use system memory.
    pub fn exclusive(&self, memory: impl Memory, device: DeviceId) -> Result<Report, Error> {
        let range = memory.whole_pages()?;
        self.known(device)?;
        if !self.host().engine.uses_system_memory(device) {
            return Err(Error::NotInPlace { device });
        }
        self.begin(range.map(|range| std::iter::once(Request::Exclusive(range, device))))
            .and_then(Self::judged)
    }

    fn move_all(&self, range: Option<PageRange>, to: Destination) -> Result<Prefetch, Error> {
        self.host().move_all(range, to)
    }

    fn begin<R>(&self, requests: Option<R>) -> Result<Prefetch, Error>
    where
        R: Iterator<Item = Request>,
    {
        self.host().begin(requests)
    }

    /// A report, unless nothing of the request was there at all.
    fn judged(prefetch: Prefetch) -> Result<Report, Error> {
        let report = prefetch.wait();
        match report.stayed[..] {
            [only]
                if only.reason == hmm_types::StayReason::NotMapped
                    && only.range.pages() == report.total() =>
            {
                Err(Error::NotMapped { range: only.range })
            }
            _ => Ok(report),
        }
    }

    /// What a device that mirrors this process sees in a range, one entry for
    /// each page; makes nothing present. (The kernel's `hmm_range_fault()`
    /// without a fault.)
    ///
    /// # Errors
    /// When the range is empty or no memory of the process, or the kernel's
    /// tables cannot be read.
    pub fn snapshot(&self, range: PageRange) -> Result<Vec<MirrorEntry>, Error> {
        match self.host().ask(Request::Snapshot(range))? {
            Outcome::Entries(entries) => {
                let entries = entries?;
                let mut copy = Vec::with_capacity(entries.len());
                copy.extend_from_slice(&entries);
                Ok(copy)
            }
            other => unreachable!("a snapshot came to {other:?}"),
        }
    }

    /// Whether all of a range is mapped and allows a device an access.
    ///
    /// # Errors
    /// [`Error::Access`] tells the first page that does not.
    pub fn check(&self, range: PageRange, access: Access) -> Result<(), Error> {
        match self.host().ask(Request::Check(range, access))? {
            Outcome::Checked(result) => Ok(result?),
            other => unreachable!("a check came to {other:?}"),
        }
    }

    /// Whether forked children still wait for pages that were on a device when
    /// they were forked. Should this process end before they have them, they
    /// would read zeros.
    #[must_use]
    pub fn owes_children(&self) -> bool {
        self.host().engine.owes_children()
    }

    /// In a forked child whose parent has an engine, before another one is
    /// opened here: waits until the parent has handed over the pages that were
    /// on its devices, or a time has passed. True when nothing is left there.
    #[must_use]
    pub fn await_handover(patience: Duration) -> bool {
        const NAP: Duration = Duration::from_millis(2);
        let since = Instant::now();
        loop {
            if !hmm_os::has_registered_memory().unwrap_or(true) {
                return true;
            }
            if since.elapsed() >= patience {
                return false;
            }
            std::thread::sleep(NAP);
        }
    }

    /// Brings everything home from a device, which can be used again. True when
    /// nothing was left on it.
    ///
    /// # Errors
    /// As [`Hmm::migrate`].
    pub fn vacate(&self, device: DeviceId) -> Result<bool, Error> {
        self.known(device)?;
        match self.host().ask(Request::Vacate(device))? {
            Outcome::Clean(clean) => Ok(clean),
            other => unreachable!("vacating a device came to {other:?}"),
        }
    }

    fn known(&self, device: DeviceId) -> Result<(), Error> {
        if self.host().engine.has_device(device) {
            Ok(())
        } else {
            Err(Error::NoDevice { device })
        }
    }

    /// Where the pages of some memory are now. Touches none of them.
    ///
    /// # Errors
    /// When the request names no whole page.
    pub fn residency(&self, memory: impl Memory) -> Result<Residency, Error> {
        let Some(range) = memory.whole_pages()? else {
            return Err(Error::Range(hmm_types::RangeError::Empty {
                start: hmm_types::VirtAddr::new(0),
            }));
        };
        // The heap of the program first: nothing of the engine is locked yet.
        let mut pages: Vec<PageResidency> = Vec::with_capacity(range.pages().index());
        let found = self
            .host()
            .on_engine_thread(move |engine| engine.residency(range))?;
        pages.extend_from_slice(&found);
        Ok(Residency::new(range, pages))
    }

    /// From now on pages that leave the program bring no others home, as if
    /// [`Builder::reuse_pages`](crate::Builder::reuse_pages) had been set to
    /// `false`. To be called before a buffer is handed over by vmsplice(2) or with
    /// `MSG_ZEROCOPY` for the first time.
    ///
    /// ```no_run
    /// # let hmm = hmm::Hmm::open()?;
    /// hmm.stop_reusing_pages();
    /// // setsockopt(socket, SOL_SOCKET, SO_ZEROCOPY, ...)
    /// # Ok::<(), hmm::Error>(())
    /// ```
    pub fn stop_reusing_pages(&self) {
        self.host().engine.stop_reusing_pages();
    }

    /// What happened so far, in numbers.
    #[must_use]
    pub fn statistics(&self) -> StatsSnapshot {
        self.host().engine.statistics().snapshot()
    }

    /// Whether faults that the kernel takes inside of system calls are served:
    /// false for ordinary users, whose read(2) into a page on a device fails
    /// with EFAULT.
    #[must_use]
    pub fn serves_kernel_faults(&self) -> bool {
        self.host().engine.capabilities().kernel_faults
    }

    /// Whether pages are moved (Linux 6.8) or copied.
    #[must_use]
    pub fn moves_pages(&self) -> bool {
        self.host().engine.capabilities().move_pages
    }

    /// Whether touching a page whose data was lost with its device raises SIGBUS
    /// (Linux 6.6). Else the process ends with a message when that data is needed.
    ///
    /// ```no_run
    /// # let hmm = hmm::Hmm::open()?;
    /// if !hmm.marks_lost_pages() {
    ///     eprintln!("a device that is lost with data may end this process");
    /// }
    /// # Ok::<(), hmm::Error>(())
    /// ```
    #[must_use]
    pub fn marks_lost_pages(&self) -> bool {
        self.host().engine.capabilities().poison
    }

    /// Bytes that the engine's own tables take: for registered memory, and for
    /// the memory of devices.
    #[must_use]
    pub fn metadata(&self) -> (ByteCount, ByteCount) {
        self.host()
            .on_engine_thread(Engine::metadata_bytes)
            .unwrap_or_default()
    }

    /// Staging pages that are held; none when nothing moves and nothing is
    /// exclusive.
    #[must_use]
    pub fn staging_held(&self) -> PageCount {
        self.host()
            .on_engine_thread(Engine::staging_held)
            .unwrap_or_default()
    }

    /// Pages of a range that the engine watches.
    #[must_use]
    pub fn watched(&self, range: PageRange) -> PageCount {
        self.host()
            .on_engine_thread(move |engine| engine.registered_pages(range))
            .unwrap_or_default()
    }

    /// Ends the engine: everything comes home, its threads end, its
    /// descriptors close. Devices cannot be used any more.
    ///
    /// # Errors
    /// [`ShutdownError`] when something could not be brought home; the engine
    /// then goes on serving it.
    pub fn shutdown(mut self) -> Result<(), ShutdownError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), ShutdownError> {
        let Some(host) = self.host.take() else {
            return Ok(());
        };
        // In a forked child the engine never ran; in one of its own threads it
        // cannot wait for itself.
        if !host.is_own_process() || hmm_os::is_engine_thread() {
            return Ok(());
        }
        let clean = matches!(host.ask(Request::ShutDown), Ok(Outcome::Clean(true)));
        if !clean {
            return Err(ShutdownError {
                left: host
                    .on_engine_thread(Engine::away_pages)
                    .unwrap_or_default(),
                reason: "a device did not give them back, or they were busy for too long",
            });
        }
        fork_guard::remove(host);
        host.stop_threads();
        Ok(())
    }
}

impl Drop for Hmm {
    fn drop(&mut self) {
        if self.end().is_err() {
            hmm_os::warn("hmm: at shutdown not everything came home; the engine keeps serving it");
        }
    }
}

/// Where the kernel does not report forks (ordinary users), a child would read
/// zeros instead of pages that are away. So everything comes home before a
/// fork, and nothing leaves until it is over.
mod fork_guard {
    use hmm_core::Executor;
    use hmm_os::ForkHooks;

    use super::{Host, care};

    impl ForkHooks for Host {
        fn before_fork(&self) {
            if hmm_os::is_engine_thread() || !self.is_own_process() {
                return;
            }
            self.engine.pause();
            let clean = care::bounce().is_some_and(|bounce| {
                let mut executor = Executor::worker(bounce.range().start());
                self.threads
                    .run_on_root(|| self.engine.bring_all_home_before_fork(&mut executor))
            });
            if !clean {
                hmm_os::die(
                    "pages could not be brought home before a fork: others have had them in \
                     flight for half a minute, or the engine has no memory left. The child would \
                     read zeros there, so the process ends now",
                );
            }
        }

        fn after_fork_in_parent(&self) {
            if hmm_os::is_engine_thread() || !self.is_own_process() {
                return;
            }
            self.engine.resume();
        }
    }

    pub(super) fn install(host: &'static Host) {
        hmm_os::guard_forks(host);
    }

    pub(super) fn remove(host: &'static Host) {
        hmm_os::unguard_forks(host);
    }
}
