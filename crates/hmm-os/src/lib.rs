//! Linux: userfaultfd, page tables, staging memory and engine threads.
//!
//! [`LinuxSpace`] implements [`hmm_hal::AddressSpace`] on the real kernel. One
//! userfaultfd context serves both the program's ranges and the staging
//! memory: while an event of the context is unread, every resolving ioctl on
//! it says EAGAIN, and that is what keeps the engine from moving pages of a
//! mapping that has just been replaced by another one.
//!
//! Descriptors live in a table of the engine's own (see [`EngineThreads`]), out
//! of reach of a program's `close_range(3, ~0)`. A descriptor is a number in
//! *one* table: methods that use one must run on a thread which shares it, and
//! panic elsewhere instead of hitting a stranger's file.
//!
//! # Which operation is unsafe
//!
//! Registering a range changes what a load from it does, so whoever registers
//! must serve; dropping, moving and replacing pages change what memory holds.
//! Those rest on core's protocol: it only names ranges whose pages it tracks.
//! Reading maps, waking and zero-filling holes cannot harm anybody.

mod abi;
mod changes;
mod child;
mod clock;
mod config;
mod cpu;
mod excluded;
mod fatal;
mod forks;
mod heaps;
mod hugetlb;
mod map;
mod memory_map;
mod message;
mod pagemap;
mod peek;
mod probe;
mod refusal;
mod region;
mod shared;
mod space;
mod stack;
mod staging;
mod tasks;
mod text;
mod thread;
mod thread_locals;
mod thread_memory;
mod threads;
mod uffd;
mod waiting;

pub use child::MAX_CHILDREN;
pub use clock::MonotonicClock;
pub use config::{Counters, Disable, OpenConfig, OpenError, Wakeup};
pub use cpu::cpu_of_thread;
pub use excluded::{claim, exclude, exclude_guess, include, refresh_modules};
pub use fatal::{die, warn};
pub use forks::{ForkHooks, guard_forks, unguard_forks};
pub use memory_map::{MappedMemory, memory_of};
pub use probe::{Finding, Machine};
pub use refusal::has_registered_memory;
pub use shared::{AttachError, Attached, RegionPages, Sharing, attach, unmap};
pub use space::LinuxSpace;
pub use staging::StagingConfig;
pub use thread::{EngineThread, allowed_cpus, catching, is_engine_thread, uncatching};
pub use threads::EngineThreads;
