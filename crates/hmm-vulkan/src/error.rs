//! What can go wrong with a Vulkan device, a kernel and a launch.

use hmm_device::ReservationError;
use hmm_hal::DeviceFaultError;
use hmm_types::{ByteCount, VirtAddr};

use crate::MAX_KERNELS;

/// Why a Vulkan device could not be opened or attached, or no kernel loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VulkanError {
    /// Vulkan itself is missing.
    #[error("there is no Vulkan here ({reason}); the loader is in Debian's package libvulkan1")]
    NoLoader {
        /// What the system's linker said.
        reason: String,
    },
    /// No device fits.
    #[error("no Vulkan device {wanted}; there {}", list(found))]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// Names of those there are.
        found: Vec<String>,
    },
    /// The loader or the driver is too old.
    #[error("{what} knows Vulkan {found}; {needed} is needed")]
    ApiTooOld {
        /// Who.
        what: String,
        /// Its version.
        found: String,
        /// The least version.
        needed: &'static str,
    },
    /// The driver is known to be wrong.
    #[error("{device}: {driver} cannot be used: {reason}")]
    BadDriver {
        /// The device.
        device: String,
        /// The driver and its version.
        driver: String,
        /// What it does wrong.
        reason: &'static str,
    },
    /// The device lacks something.
    #[error("{device} lacks {feature}, which this device back end cannot do without")]
    Feature {
        /// The device.
        device: String,
        /// Vulkan's name of it.
        feature: &'static str,
    },
    /// The device cannot use memory of this process where it is.
    #[error(
        "{device} has addresses of its own, so it cannot use memory of this process in place; with \
         `import_memory` it uses what is mapped as shared, if its driver imports that"
    )]
    Elsewhere {
        /// The device.
        device: String,
    },
    /// The program cannot have memory at the device's addresses.
    #[error("the program can have no memory at the addresses of {device}: {reason}")]
    NoIdentity {
        /// The device.
        device: String,
        /// Why not.
        reason: String,
    },
    /// Validation was asked for.
    #[error(
        "HMM_VULKAN_VALIDATION is set, but there is no VK_LAYER_KHRONOS_validation (Debian's \
         package vulkan-validationlayers)"
    )]
    NoValidation,
    /// The memory size makes no sense.
    #[error("device memory of {asked} makes no sense on {device}: {limit} is {reason}")]
    MemorySize {
        /// What was asked for.
        asked: ByteCount,
        /// The device.
        device: String,
        /// The most, or the least.
        limit: ByteCount,
        /// What sets that limit.
        reason: &'static str,
    },
    /// There is no memory for something.
    #[error("{device} has no memory left for {what} ({size})")]
    OutOfMemory {
        /// The device.
        device: String,
        /// For what.
        what: &'static str,
        /// How much.
        size: ByteCount,
    },
    /// The process gets no address space.
    #[error("no memory of this process for the device: {0}")]
    Reservation(#[from] ReservationError),
    /// A thread could not be started.
    #[error("thread {thread} could not be started: {reason}")]
    Spawn {
        /// Its name.
        thread: &'static str,
        /// What the spawner said.
        reason: std::io::ErrorKind,
    },
    /// Too many kernels.
    #[error("the device has {MAX_KERNELS} kernels already; drop some")]
    TooManyKernels,
    /// What was given as a kernel is none.
    #[error("this is no kernel: {reason}")]
    BadKernel {
        /// Why.
        reason: String,
    },
    /// The device is lost or closed.
    #[error("the device is lost or closed")]
    Lost,
    /// The device has its engine already.
    #[error("the device is attached already")]
    AlreadyAttached,
    /// A call failed for a reason of the driver's.
    #[error("{call} failed: {result}")]
    Call {
        /// The call.
        call: &'static str,
        /// Vulkan's result.
        result: ash::vk::Result,
    },
}

fn list(found: &[String]) -> String {
    match found {
        [] => "is none at all".to_owned(),
        [one] => format!("is {one}"),
        all => format!("are {}", all.join(", ")),
    }
}

/// Why a kernel's access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The access is in error, as the engine found.
    #[error(transparent)]
    Fault(#[from] DeviceFaultError),
    /// The page stays in system memory, and the device cannot use it there.
    #[error(
        "the page at {address} stays in system memory, and the device cannot use it there: {why}"
    )]
    NotImported {
        /// The address.
        address: VirtAddr,
        /// Why not.
        why: ImportFailure,
    },
    /// The page was on its way somewhere all the time.
    #[error("the page at {address} did not settle in {rounds} rounds")]
    Stuck {
        /// The address.
        address: VirtAddr,
        /// How often it was asked for.
        rounds: u64,
    },
    /// No invocation came to its end though the engine brought page after page.
    #[error(
        "no invocation ended in {rounds} rounds, the last of which asked for {address}: one of them \
         needs more pages at a time than the device keeps, or CPUs use these pages all the time"
    )]
    Thrash {
        /// What was asked for last.
        address: VirtAddr,
        /// How many rounds.
        rounds: u64,
    },
    /// Invocations ended early and asked for nothing.
    #[error("{invocations} invocations ended early {rounds} times without asking for a page")]
    Silent {
        /// How many at the last time.
        invocations: u32,
        /// How often.
        rounds: u64,
    },
    /// Invocations waited for longer than they may.
    #[error(
        "{invocations} invocations gave up ({torn} of them after they had written): their pages did \
         not come while they polled"
    )]
    GaveUp {
        /// How many.
        invocations: u32,
        /// Of those, the ones that had written.
        torn: u32,
    },
    /// The kernel runs for too long.
    #[error("the kernel did not end within {limit_ms} ms; it was told to stop, and did")]
    Runaway {
        /// The device's limit.
        limit_ms: u64,
    },
}

/// Why memory that stays could not be imported for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImportFailure {
    /// There is no second mapping of it.
    #[error(
        "only a shared mapping can be mapped a second time (one of huge pages by those only who may \
         open /proc/self/map_files), and an import must not end with the program's"
    )]
    Private,
    /// It has no pages.
    #[error("it is behind the end of its file, cannot be written, or has gone meanwhile")]
    Gone,
    /// The kernel runs.
    #[error(
        "its kernel waits for pages while it runs, and imports are made before: name what it uses"
    )]
    Runs,
    /// The page table is full.
    #[error("the device's page table has no leaf left")]
    Full,
    /// The driver does not import it.
    #[error("{call} failed: {result}")]
    Refused {
        /// The call.
        call: &'static str,
        /// Vulkan's result.
        result: ash::vk::Result,
    },
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
    /// The launch makes no sense.
    #[error("{what} of {asked} makes no sense: the limit is {limit}")]
    Limit {
        /// What is wrong.
        what: &'static str,
        /// How much was asked for.
        asked: u64,
        /// The most.
        limit: u64,
    },
    /// There is no kernel for this launch.
    #[error("the program cannot be launched so: {reason}")]
    NotMade {
        /// Why.
        reason: String,
    },
    /// A kernel that does not check its accesses needs to be told what it accesses.
    #[error("a kernel without checks needs the ranges that it uses, and there are none")]
    NoRanges,
    /// The kernel ended in error; some of it may have run.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A call failed for a reason of the driver's.
    #[error("{call} failed: {result}")]
    Call {
        /// The call.
        call: &'static str,
        /// Vulkan's result.
        result: ash::vk::Result,
    },
}
