//! Heterogeneous memory management in user space: any pointer of a process is
//! valid on any of its devices.
//!
//! Pages migrate to a device's memory while the device works on them, and come
//! back by themselves when a CPU touches them. There is no kernel module, no
//! patched driver and no special hardware underneath: `userfaultfd(2)` tells
//! the library what the process does with its memory, and `UFFDIO_MOVE` takes
//! pages out and puts them back.
//!
//! ```
//! use hmm::{Hmm, Pointer, SoftwareOptions};
//!
//! let hmm = Hmm::open()?;
//! let device = hmm.add_software_device(SoftwareOptions::new(hmm::ByteCount::mib(16)))?;
//!
//! // Ordinary memory of the program.
//! let mut numbers: Vec<u64> = (0..100_000).collect();
//! let report = hmm.migrate(&mut numbers[..], device.id())?;
//! println!("{report}");
//!
//! // A kernel gets the program's own pointers.
//! let first = Pointer::new(numbers.as_mut_ptr());
//! device.launch(100, |context, group| {
//!     for index in group * 1000..(group + 1) * 1000 {
//!         let value = context.load(first.at(index))?;
//!         context.store(first.at(index), 2 * value)?;
//!     }
//!     Ok(())
//! })?;
//!
//! // The CPU just looks: the pages come home by themselves.
//! assert_eq!(numbers[1234], 2468);
//! hmm.shutdown()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What a request names
//! A request names whole pages. Slices are rounded *inwards*
//! ([`Memory::whole_pages`]), so a page that also holds other data never moves
//! unasked; a slice without one whole page moves nothing. A page that a kernel
//! touches moves as a whole, with its neighbours, whatever else is on it: that
//! changes where data is, never what it is.
//!
//! # Aliasing
//! Where a page lives is invisible to Rust: moving memory is no access to it,
//! so `&[T]` is enough for [`Hmm::migrate`]. What a *kernel* does is an access
//! like a thread's. Memory that a kernel writes must be reached through `&mut`,
//! cells, atomics or raw pointers, and data races are data races: a kernel and
//! a CPU thread that use the same location at the same time, one of them
//! writing, must both use atomics. [`SoftwareDevice::launch`] takes raw pointers
//! and returns when the kernel has ended, so a `&mut` that outlives the call
//! covers it.
//!
//! # What stays
//! Pages that cannot move stay where they are, and the [`Report`] says why for
//! each range; the software device uses them in place. See `docs/limits.md`.
#![forbid(unsafe_code)]

mod builder;
mod care;
mod device;
mod embed;
mod error;
mod host;
mod jobs;
mod memory;
mod report;
mod residency;
mod rota;
mod shared;
mod vulkan;

pub use builder::Builder;
pub use device::{SoftwareDevice, SoftwareOptions};
pub use error::{Error, ShutdownError};
pub use host::Hmm;
pub use jobs::Prefetch;
pub use memory::Memory;
pub use report::{Report, StayedRange};
pub use residency::Residency;
pub use shared::{AttachedRegion, SharedRegion, attach};
pub use vulkan::{Used, VulkanDevice, VulkanOptions};

pub use hmm_core::{Destination, MirrorEntry, NotifierId, Sequence, Settings, StatsSnapshot};
pub use hmm_hal::{DeviceFaultError, Reach};
pub use hmm_os::{
    AttachError, Disable, Finding, Machine, MappedMemory, is_engine_thread, memory_of,
};
pub use hmm_soft::{
    AtomicWord, Context, FailAt, Injector, KernelError, LaunchError, LaunchReport, LossMode, Plain,
    Pointer, SoftStats,
};
pub use hmm_types::{
    Access, ByteCount, DeviceId, MemoryKind, PAGE_SIZE, PageCount, PageRange, PageResidency,
    RangeError, StayReason, VirtAddr,
};
pub use hmm_vulkan::{
    AddressPolicy, Choice as VulkanChoice, Copies as VulkanCopies, Demand,
    Description as VulkanDescription, ImportFailure, KernelError as VulkanKernelError,
    LaunchError as LaunchVulkanError, LaunchReport as VulkanReport, Program, ProgramOptions,
    VulkanError, VulkanStats, list as list_vulkan, validation_complaints as vulkan_complaints,
};

/// Engine memory in use: everything that the engine and its software devices
/// keep about memory, in bytes, rounded up to the sizes in which it is handed
/// out. The engine's own memory never migrates and is not the program's heap.
///
/// ```
/// let hmm = hmm::Hmm::open()?;
/// assert!(hmm::engine_memory_bytes() > 0);
/// # hmm.shutdown()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn engine_memory_bytes() -> u64 {
    hmm_mem::in_use_bytes()
}
