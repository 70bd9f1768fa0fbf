//! What can go wrong, and what to do about it.

use hmm_types::{DeviceId, PageCount, PageRange, RangeError};

/// Why a request was refused. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The numbers name no memory of the process.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// No page of the range is mapped.
    #[error("nothing is mapped at {range}; check the pointer and the length")]
    NotMapped {
        /// The range.
        range: PageRange,
    },
    /// The device was removed, or is none of this engine's.
    #[error("{device} is gone; add a device and use its id")]
    NoDevice {
        /// The device.
        device: DeviceId,
    },
    /// Exclusive use is of system memory, which this device cannot use.
    #[error("{device} cannot use system memory in place; migrate the pages to it instead")]
    NotInPlace {
        /// The device.
        device: DeviceId,
    },
    /// As many engines and Vulkan devices as can be told of forks are open.
    #[error("too many engines and Vulkan devices of this process are open; close one of them")]
    TooManyForkGuards,
    /// As many requests as can be queued are waiting.
    #[error("{limit} requests are waiting already; wait for one of them")]
    QueueFull {
        /// How many can wait.
        limit: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// Called in a forked child.
    #[error("the engine stayed in the parent process; open another one after a fork")]
    Forked,
    /// The engine's own threads asked it for something.
    #[error("a kernel cannot ask the engine that it runs on; do it before or after the launch")]
    EngineThread,
    /// The address space could not be opened.
    #[error("cannot open the address space: {0}")]
    Open(#[from] hmm_os::OpenError),
    /// An engine thread could not be started.
    #[error(
        "cannot start an engine thread: {0}; see `ulimit -u` (threads) and `ulimit -n` (descriptors)"
    )]
    Thread(#[from] std::io::Error),
    /// A setting makes no sense.
    #[error("{setting} cannot be {value}: {why}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        why: &'static str,
    },
    /// The software device could not be made.
    #[error("cannot make the software device: {0}")]
    Software(#[from] hmm_soft::SoftError),
    /// The Vulkan device could not be made.
    #[error(transparent)]
    Vulkan(#[from] hmm_vulkan::VulkanError),
    /// The device was not accepted.
    #[error(transparent)]
    AddDevice(#[from] hmm_core::AddDeviceError),
    /// The engine has no memory for its tables.
    #[error("the engine's own memory is exhausted; see `ulimit -v`")]
    EngineMemory,
    /// Memory could not be shared.
    #[error(
        "cannot share memory at {path}: {source}; the path must be free, its folder writable, and \
         the kernel Linux 5.19 or later"
    )]
    Share {
        /// Where it was to be attached.
        path: std::path::PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The range does not allow the access.
    #[error(transparent)]
    Access(#[from] hmm_hal::DeviceFaultError),
    /// The kernel's tables could not be read.
    #[error(transparent)]
    System(#[from] hmm_hal::SpaceError),
}

/// Not everything could be brought home. The engine goes on serving what is
/// left, so that nothing is lost.
#[derive(Debug, thiserror::Error)]
#[error(
    "{left:?} could not be brought home ({reason}); the engine keeps serving them until the \
     process ends"
)]
pub struct ShutdownError {
    /// How many pages are still away.
    pub left: PageCount,
    /// What stood in the way.
    pub reason: &'static str,
}
