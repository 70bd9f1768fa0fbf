//! How a software device is to be.

use hmm_types::ByteCount;

/// Most worker threads of one device.
pub const MAX_WORKERS: usize = 64;

/// How a software device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftConfig {
    /// A name for people.
    pub name: &'static str,
    /// Size of its memory; rounded down to whole pages.
    pub memory: ByteCount,
    /// Worker threads that run kernels, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Touch all of the memory when the device is opened, so that first use
    /// takes no page fault of the kernel's.
    pub populate: bool,
    /// Overwrite frames when they are freed, so that a use after free shows.
    pub poison_freed: bool,
    /// Its memory is the CPU's as well (device-coherent): a model, in which pages
    /// stay where they are and `memory` says how many may be the device's.
    pub coherent: bool,
    /// Use membarrier(2) where there is one, which makes accesses cheap and
    /// unmapping dear. Otherwise every access pays a fence.
    pub membarrier: bool,
}

impl SoftConfig {
    /// A device with this much memory, and a worker for each processor.
    #[must_use]
    pub fn new(memory: ByteCount) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            name: "software device",
            memory,
            workers: processors.min(MAX_WORKERS),
            populate: false,
            poison_freed: false,
            coherent: false,
            membarrier: true,
        }
    }
}
