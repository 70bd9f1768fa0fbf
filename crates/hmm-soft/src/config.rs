//! How a software device is to be, and who starts its threads.

use std::io;

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

/// Starts the device's threads: the engine's library starts them its own way.
///
/// The stacks of these threads must never be migrated, see
/// [`SoftDevice::for_each_own_range`](crate::SoftDevice::for_each_own_range).
pub trait Spawn {
    /// Runs `body` on a thread of this name.
    ///
    /// # Errors
    /// When the system has no thread to give.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>>;
}

/// A thread that was started.
pub trait Join: Send {
    /// Waits for its end.
    fn join(self: Box<Self>);
}

/// Starts plain threads of the standard library.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdSpawner;

impl Spawn for StdSpawner {
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>> {
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        Ok(Box::new(thread))
    }
}

impl Join for std::thread::JoinHandle<()> {
    fn join(self: Box<Self>) {
        // A worker that panicked outside of a kernel has said so on stderr.
        let _ = std::thread::JoinHandle::join(*self);
    }
}
