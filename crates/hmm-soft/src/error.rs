//! What can go wrong with a device, a launch and a kernel's access.

use hmm_hal::DeviceFaultError;
use hmm_types::{ByteCount, VirtAddr};

use crate::memory::MAX_FRAMES;

/// Why a software device could not be opened or attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SoftError {
    /// The memory size makes no sense.
    #[error(
        "a software device of {asked} ({} bytes) makes no sense; ask for one page to {}",
        asked.get(),
        ByteCount::new(MAX_FRAMES * hmm_types::PAGE_SIZE)
    )]
    MemorySize {
        /// What was asked for.
        asked: ByteCount,
    },
    /// The kernel has no address space for the memory.
    #[error("the kernel refused {asked} of address space for a software device (error {errno})")]
    MemoryRefused {
        /// What was asked for.
        asked: ByteCount,
        /// The kernel's error number.
        errno: i32,
    },
    /// The number of workers makes no sense.
    #[error("a software device cannot have {asked} workers; ask for 1 to {max}", max = crate::MAX_WORKERS)]
    Workers {
        /// What was asked for.
        asked: usize,
    },
    /// A worker thread could not be started.
    #[error("worker thread {worker} could not be started: {reason}")]
    Spawn {
        /// Which of the workers.
        worker: usize,
        /// What the spawner said.
        reason: std::io::ErrorKind,
    },
    /// Engine memory is exhausted.
    #[error("there is no engine memory left for the device's tables")]
    NoEngineMemory,
    /// A system call failed.
    #[error("{operation} failed with error {errno}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The kernel's error number.
        errno: i32,
    },
    /// The device has its engine already.
    #[error("the device is attached already")]
    AlreadyAttached,
}

/// Why an access of a kernel did not happen. Nothing was changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The access is in error, as the engine found.
    #[error(transparent)]
    Fault(#[from] DeviceFaultError),
    /// An atomic operation on an address that is no multiple of its size.
    #[error("atomic access of {size_bytes} bytes at {address}, which is not a multiple of that")]
    Unaligned {
        /// The address.
        address: VirtAddr,
        /// Size of the access.
        size_bytes: usize,
    },
    /// The page is mapped, but there is nothing behind it: its file ends before
    /// it, or its data was lost.
    #[error("nothing is behind the page at {address}: its file was truncated, or its data is lost")]
    Bus {
        /// The address.
        address: VirtAddr,
    },
    /// The page was on its way somewhere all the time.
    #[error("the page at {address} did not settle in {rounds} rounds")]
    Stuck {
        /// The address.
        address: VirtAddr,
        /// How often it was asked for.
        rounds: u64,
    },
    /// The range of an access runs over the end of the address space.
    #[error("access of {len_bytes} bytes at {address} runs over the end of the address space")]
    Overflow {
        /// Where it begins.
        address: VirtAddr,
        /// How long it is.
        len_bytes: usize,
    },
    /// The kernel itself gave up, with a number of its own choice.
    #[error("the kernel gave up with code {0}")]
    User(u64),
}

/// Why a launch did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// No engine is attached that would resolve the kernel's faults.
    #[error("the device is not attached to an engine")]
    NotAttached,
    /// The device is closed.
    #[error("the device is closed")]
    Closed,
    /// The device is lost.
    #[error("the device is lost")]
    Lost,
    /// A kernel tried to launch a kernel on its own device, and would have
    /// waited for itself.
    #[error("a kernel cannot launch a kernel on its own device")]
    Nested,
    /// The kernel ended in error; other indices may have run.
    #[error("the kernel failed at index {index}: {error}")]
    Kernel {
        /// The index it worked on.
        index: usize,
        /// What it returned.
        error: KernelError,
    },
    /// The kernel panicked; other indices may have run.
    #[error("the kernel panicked at index {index}: {message}")]
    Panicked {
        /// The index it worked on.
        index: usize,
        /// What the panic said.
        message: String,
    },
}
