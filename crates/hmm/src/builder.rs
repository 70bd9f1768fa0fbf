//! How an engine is to be.

use hmm_core::Settings;
use hmm_os::{Disable, OpenConfig, StagingConfig};
use hmm_types::{ByteCount, PAGES_PER_BLOCK, PageCount};

use crate::{Error, Hmm};

/// Settings of an engine, all with sensible defaults.
///
/// ```
/// use hmm::{ByteCount, Hmm, PageCount};
///
/// let hmm = Hmm::builder()
///     .fault_granule(PageCount::new(1))
///     .staging_limit(ByteCount::mib(64))
///     .open()?;
/// hmm.shutdown()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    pub(crate) settings: Settings,
    pub(crate) handlers: usize,
    pub(crate) workers: usize,
    pub(crate) pin_handlers: bool,
    pub(crate) disable: Disable,
}

/// Handler threads at most: each of them wakes for every fault.
const MAX_HANDLERS: usize = 8;
/// Threads that carry out requests at most.
const MAX_WORKERS: usize = 8;

impl Default for Builder {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            settings: Settings::default(),
            // One on each processor, so that a fault is served where it was
            // taken; never one alone, so that one can serve the other.
            handlers: processors.clamp(2, 4),
            workers: 2,
            pin_handlers: true,
            disable: Disable::default(),
        }
    }
}

impl Builder {
    /// Pages that a CPU fault brings home at least: a power of two from 1 to
    /// 512. Default: 16.
    #[must_use]
    pub const fn fault_granule(mut self, pages: PageCount) -> Self {
        self.settings.fault_granule = pages;
        self
    }

    /// Pages that a device's fault takes along at least: a power of two from 1
    /// to 512. Default: 64.
    #[must_use]
    pub const fn device_granule(mut self, pages: PageCount) -> Self {
        self.settings.device_granule = pages;
        self
    }

    /// Whether sequential faults lead to larger and asynchronous transfers.
    /// Default: yes.
    #[must_use]
    pub const fn readahead(mut self, on: bool) -> Self {
        self.settings.readahead = on;
        self
    }

    /// System memory that may wait in staging to take pages home. More of it
    /// makes large transfers home fast; all of it is memory the program cannot
    /// use. Default: 512 MiB, at least 4 MiB.
    #[must_use]
    pub const fn staging_limit(mut self, limit: ByteCount) -> Self {
        self.settings.staging_limit = limit;
        self
    }

    /// Whether pages that have left the program are used to bring others home.
    /// That is much faster. But the kernel may hold such a page by a reference
    /// that nobody can see, for a pipe after vmsplice(2) or for a socket with
    /// `MSG_ZEROCOPY`, and would then give other data. Say `false` if the program
    /// migrates buffers that it has handed over in these ways and that are not
    /// consumed yet. Default: true.
    #[must_use]
    pub const fn reuse_pages(mut self, reuse: bool) -> Self {
        self.settings.reuse_pages = reuse;
        self
    }

    /// Pages that come home by copying even when they could be moved. Default: 4.
    #[must_use]
    pub const fn copy_at_most(mut self, pages: PageCount) -> Self {
        self.settings.copy_at_most = pages;
        self
    }

    /// Threads that serve CPU faults, 2 to 8. Default: one for each processor,
    /// at most 4.
    #[must_use]
    pub const fn handlers(mut self, threads: usize) -> Self {
        self.handlers = threads;
        self
    }

    /// Whether each handler stays on its processor. Default: yes.
    #[must_use]
    pub const fn pin_handlers(mut self, on: bool) -> Self {
        self.pin_handlers = on;
        self
    }

    /// Threads that carry out requests, 1 to 8. Default: 2.
    #[must_use]
    pub const fn workers(mut self, threads: usize) -> Self {
        self.workers = threads;
        self
    }

    /// Kernel facilities to do without: for tests of what older kernels and
    /// ordinary users get.
    #[must_use]
    pub const fn disable(mut self, disable: Disable) -> Self {
        self.disable = disable;
        self
    }

    /// Opens the engine.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Open`], [`Error::Thread`].
    pub fn open(self) -> Result<Hmm, Error> {
        self.check()?;
        Hmm::start(self)
    }

    fn check(&self) -> Result<(), Error> {
        let granule = |setting, pages: PageCount| {
            let value = pages.get();
            if value.is_power_of_two() && value <= PAGES_PER_BLOCK as u64 {
                Ok(())
            } else {
                Err(Error::Setting {
                    setting,
                    value,
                    why: "a power of two from 1 to 512 pages",
                })
            }
        };
        granule("fault_granule", self.settings.fault_granule)?;
        granule("device_granule", self.settings.device_granule)?;
        let within = |setting, value: usize, least, most, why| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(Error::Setting {
                    setting,
                    value: value as u64,
                    why,
                })
            }
        };
        within("handlers", self.handlers, 2, MAX_HANDLERS, "2 to 8 threads")?;
        within("workers", self.workers, 1, MAX_WORKERS, "1 to 8 threads")?;
        if self.settings.staging_limit < ByteCount::mib(4) {
            return Err(Error::Setting {
                setting: "staging_limit",
                value: self.settings.staging_limit.get(),
                why: "at least 4 MiB",
            });
        }
        Ok(())
    }

    /// Address space for staging: the limit in small pages and in huge ones,
    /// and room for what is on its way.
    pub(crate) fn open_config(&self) -> OpenConfig {
        let bytes = ByteCount::new(
            self.settings
                .staging_limit
                .get()
                .saturating_add(ByteCount::mib(64).get()),
        );
        OpenConfig {
            staging: StagingConfig {
                small_bytes: bytes.get(),
                huge_bytes: bytes.get(),
            },
            disable: self.disable,
        }
    }
}
