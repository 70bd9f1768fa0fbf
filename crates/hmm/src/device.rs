//! The software device, as a program uses it.

use std::cell::Cell;
use std::io;

use hmm_device::{Embedder, Join};
use hmm_hal::Device;
use hmm_soft::{
    Context, Injector, KernelError, LaunchError, LaunchReport, SoftConfig, SoftDevice, SoftStats,
};
use hmm_types::{ByteCount, DeviceId, PageRange};

use crate::Error;
use crate::embed::{Faults, InEngine};
use crate::host::Host;

/// How a software device is to be.
#[derive(Clone, Copy, Debug)]
pub struct SoftwareOptions(pub(crate) SoftConfig);

impl SoftwareOptions {
    /// A device with this much memory, rounded down to whole pages, and a
    /// worker for each processor.
    #[must_use]
    pub fn new(memory: ByteCount) -> Self {
        Self(SoftConfig::new(memory))
    }

    /// A name for people. Default: `software device`.
    #[must_use]
    pub const fn name(mut self, name: &'static str) -> Self {
        self.0.name = name;
        self
    }

    /// Threads that run kernels, 1 to 64.
    #[must_use]
    pub const fn workers(mut self, workers: usize) -> Self {
        self.0.workers = workers;
        self
    }

    /// Touch all of the device's memory now, so that first use is as fast as
    /// every other.
    #[must_use]
    pub const fn populate(mut self, on: bool) -> Self {
        self.0.populate = on;
        self
    }

    /// Overwrite frames when they are freed, so that a use after free shows:
    /// for tests.
    #[must_use]
    pub const fn poison_freed(mut self, on: bool) -> Self {
        self.0.poison_freed = on;
        self
    }

    /// The CPU uses the device's memory in place (device-coherent, as with CXL).
    /// It is a model of such a device: pages that migrate there stay where they
    /// are and count as the device's, so neither the CPU nor the device faults on
    /// them; they are the device's until they are evicted, dropped, moved to
    /// another device, or the process forks.
    #[must_use]
    pub const fn coherent(mut self, on: bool) -> Self {
        self.0.coherent = on;
        self
    }
}

/// A software device of an engine. Copies of the handle are the same device.
#[derive(Clone, Copy, Debug)]
pub struct SoftwareDevice {
    host: &'static Host,
    device: &'static SoftDevice,
    id: DeviceId,
}

impl SoftwareDevice {
    pub(crate) fn open(host: &'static Host, options: SoftwareOptions) -> Result<Self, Error> {
        let embedder = Opening {
            engine: InEngine(host),
            memory: Cell::new(None),
        };
        let device = SoftDevice::open_with(options.0, &embedder).inspect_err(|_| {
            if let Some(memory) = embedder.memory.get() {
                host.threads.run_on_root(move || hmm_os::include(memory));
            }
        })?;
        let added = host.add_device(device).and_then(|id| {
            device.attach(id, hmm_mem::leaked(Faults(host)))?;
            Ok(id)
        });
        match added {
            Ok(id) => {
                host.keep_software(device);
                Ok(Self { host, device, id })
            }
            Err(error) => {
                Self::close(host, device);
                Err(error)
            }
        }
    }

    pub(crate) fn close(host: &Host, device: &SoftDevice) {
        let memory = device.range();
        device.close();
        host.threads.run_on_root(move || hmm_os::include(memory));
    }

    /// What requests name it by.
    #[must_use]
    pub const fn id(&self) -> DeviceId {
        self.id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.device.info().name
    }

    /// Size of its memory.
    #[must_use]
    pub fn memory(&self) -> ByteCount {
        self.device.info().memory
    }

    /// Memory of it that is free now.
    #[must_use]
    pub fn free_memory(&self) -> ByteCount {
        self.device.free_pages().bytes()
    }

    /// Runs `kernel` for each index below `groups` on the device's workers, and
    /// waits until all are done. The kernel gets the program's own pointers and
    /// reaches what they point to through its [`Context`]; pages that are not on
    /// the device fault and come.
    ///
    /// ```
    /// # let hmm = hmm::Hmm::open()?;
    /// # let device = hmm.add_software_device(hmm::SoftwareOptions::new(hmm::ByteCount::mib(8)))?;
    /// let mut total = Box::new(0u64);
    /// let pointer = hmm::Pointer::new(&raw mut *total);
    /// device.launch(10, |context, index| {
    ///     context.fetch_add(pointer.get(), index as u64)?;
    ///     Ok(())
    /// })?;
    /// assert_eq!(*total, 45);
    /// # hmm.shutdown()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`LaunchError`]: an access in error, a panic of the kernel, a device
    /// that is lost or removed.
    pub fn launch<K>(&self, groups: usize, kernel: K) -> Result<LaunchReport, LaunchError>
    where
        K: Fn(&Context, usize) -> Result<(), KernelError> + Sync,
    {
        self.device.launch(groups, |context, group| {
            hmm_os::catching(|| kernel(context, group))
        })
    }

    /// Brings everything home from the device, ends it and gives its memory
    /// back. Pages that could not be brought home stay there, and the device
    /// with them: then the answer is false.
    ///
    /// # Errors
    /// As [`crate::Hmm::migrate`].
    pub fn remove(&self) -> Result<bool, Error> {
        let clean = self.host.remove_device(self.id)?;
        if clean {
            Self::close(self.host, self.device);
        }
        Ok(clean)
    }

    /// Failures to order, for tests.
    #[must_use]
    pub fn injector(&self) -> &'static Injector {
        self.device.injector()
    }

    /// What the device has counted.
    #[must_use]
    pub fn stats(&self) -> SoftStats {
        self.device.stats()
    }
}

/// A device whose memory is to be included again if it cannot be opened.
struct Opening {
    engine: InEngine,
    memory: Cell<Option<PageRange>>,
}

impl Embedder for Opening {
    fn exclude(&self, range: PageRange) {
        self.memory.set(Some(range));
        self.engine.exclude(range);
    }

    fn include(&self, range: PageRange) {
        self.engine.include(range);
    }

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>> {
        self.engine.spawn(name, body)
    }
}
