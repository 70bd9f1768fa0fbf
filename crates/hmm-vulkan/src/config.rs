//! How a Vulkan device is to be.

use std::time::Duration;

use hmm_types::ByteCount;

use crate::Choice;

/// Most entries of a fault log.
pub const MAX_LOG_ENTRIES: u32 = 1 << 16;
/// Most invocations of one checked dispatch: it has a done bit for each.
pub(crate) const DISPATCH_INVOCATIONS: u64 = 1 << 20;
/// Most leaves of a page table, which has one for each GiB that something is mapped in.
pub const MAX_LEAVES: u32 = 4096;
/// Most kernels that a device has loaded.
pub const MAX_KERNELS: usize = 1024;

/// Who does the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// The CPU where the device is one, and the device's queue elsewhere.
    Fitting,
    /// The device's queue, through staging memory, wherever that can be avoided or not.
    Queue,
    /// As [`Copies::Queue`], but what goes to the device is read where it is, where the
    /// driver imports it. What comes home goes through staging memory all the same: a
    /// copy that hangs would go on writing to pages that are somebody else's by then.
    QueueImports,
}

/// How a Vulkan device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VulkanConfig<'a> {
    /// Which device.
    pub device: Choice<'a>,
    /// Size of the memory that pages migrate to; rounded down to whole pages.
    pub memory: ByteCount,
    /// Who does the copies.
    pub copies: Copies,
    /// Where the device is the CPU, let its memory be the process's own: aligned, in huge
    /// pages, and excluded from migration before anybody can use it.
    pub own_memory: bool,
    /// Let kernels use system memory in place. Only where the device is the CPU and its
    /// driver works in this process (else [`crate::VulkanError::Elsewhere`]), and only for
    /// programs that leave that memory alone meanwhile: see [`crate::VulkanDevice`].
    pub system_memory: bool,
    /// Let kernels use in place what never migrates and is mapped as shared (files, shared
    /// memory), where the driver imports it: see `docs/vulkan.md`. Nothing is imported for
    /// longer than a launch.
    pub import_memory: bool,
    /// Overwrite frames when they are freed, so that a use after free shows; where the
    /// CPU can write to them.
    pub poison_freed: bool,
    /// GiBs of the address space that the device can have pages of at a time, and one;
    /// 2 to [`MAX_LEAVES`]. Each takes 2 MiB and 64 KiB of memory that both see.
    pub leaves: u32,
    /// Misses that a kernel can log before they are served, a power of two up to
    /// [`MAX_LOG_ENTRIES`]. With fewer, pages come in more rounds.
    pub log_entries: u32,
    /// For how long one dispatch may run, and a stalled one without asking for a page.
    pub dispatch_limit: Duration,
    /// For how long a launch may run in all, however many pages it asks for; `None`: as
    /// long as it does ask.
    pub launch_limit: Option<Duration>,
    /// How often a stalled invocation looks for its page before it gives up.
    pub stall_polls: u32,
}

impl VulkanConfig<'_> {
    /// The first usable device, with this much memory.
    #[must_use]
    pub const fn new(memory: ByteCount) -> Self {
        Self {
            device: Choice::First,
            memory,
            copies: Copies::Fitting,
            own_memory: true,
            system_memory: false,
            import_memory: false,
            poison_freed: false,
            leaves: 65,
            log_entries: MAX_LOG_ENTRIES,
            dispatch_limit: Duration::from_secs(10),
            launch_limit: None,
            stall_polls: 1 << 30,
        }
    }
}
