//! A GPU, as a program uses it.

use hmm_core::Destination;
use hmm_hal::Device;
use hmm_types::{Access, ByteCount, DeviceId, PageRange, VirtAddr};
use hmm_vulkan::{
    AddressPolicy, Choice, Copies, Description, LaunchReport, Program, VulkanConfig, VulkanError,
    VulkanStats,
};

use crate::embed::{Faults, InEngine};
use crate::host::Host;
use crate::{Error, LaunchVulkanError, Prefetch};

/// Ranges of a launch whose frames are chosen anew: with more of them the page table is
/// as good.
const MISPLACED: usize = 64;

/// How a Vulkan device is to be.
#[derive(Clone, Copy, Debug)]
pub struct VulkanOptions<'a>(pub(crate) VulkanConfig<'a>);

impl<'a> VulkanOptions<'a> {
    /// The first device that can be used, with this much memory for pages; processors
    /// (Mesa's lavapipe) come last.
    #[must_use]
    pub const fn new(memory: ByteCount) -> Self {
        Self(VulkanConfig::new(memory))
    }

    /// Which device.
    #[must_use]
    pub const fn device(mut self, choice: Choice<'a>) -> Self {
        self.0.device = choice;
        self
    }

    /// Let programs use in place what never migrates and is mapped as shared: files and
    /// shared memory. It is imported for each launch (`VK_EXT_external_memory_host`); where
    /// the driver cannot, its use is an error, as without this. What that promises is in
    /// `docs/vulkan.md`.
    #[must_use]
    pub const fn in_place(mut self, on: bool) -> Self {
        self.0.import_memory = on;
        self
    }

    /// Who copies pages to the device and back.
    #[must_use]
    pub const fn copies(mut self, copies: Copies) -> Self {
        self.0.copies = copies;
        self
    }

    /// Where the device is the CPU, treat it as one that is not: its memory is the
    /// driver's, and its queue copies. For tests.
    #[must_use]
    pub const fn like_a_gpu(mut self) -> Self {
        self.0.own_memory = false;
        self.copies(Copies::Queue)
    }

    /// For how long one dispatch may run, and a kernel that waits for pages without asking
    /// for one, before it is told to stop. Default: 10 seconds.
    #[must_use]
    pub const fn dispatch_limit(mut self, limit: std::time::Duration) -> Self {
        self.0.dispatch_limit = limit;
        self
    }

    /// For how long a launch may run in all before its kernel is told to stop, however many
    /// pages it asks for. Default: as long as it does ask, and ends invocations.
    #[must_use]
    pub const fn launch_limit(mut self, limit: std::time::Duration) -> Self {
        self.0.launch_limit = Some(limit);
        self
    }

    /// Overwrite frames when they are freed, so that a use after free shows: for tests.
    #[must_use]
    pub const fn poison_freed(mut self, on: bool) -> Self {
        self.0.poison_freed = on;
        self
    }
}

/// A Vulkan device of an engine. Copies of the handle are the same device.
#[derive(Clone, Copy, Debug)]
pub struct VulkanDevice {
    host: &'static Host,
    device: &'static hmm_vulkan::VulkanDevice,
    open: &'static OpenVulkan,
    id: DeviceId,
}

/// What has to be done for a device until it is closed.
#[derive(Debug)]
pub(crate) struct OpenVulkan {
    host: &'static Host,
    device: &'static hmm_vulkan::VulkanDevice,
}

impl OpenVulkan {
    pub(crate) fn close(&'static self) {
        hmm_os::unguard_forks(self);
        self.device.close();
    }
}

/// A driver needs malloc(3), whose locks a fork takes.
impl hmm_os::ForkHooks for OpenVulkan {
    fn before_fork(&self) {
        if self.host.is_own_process() {
            self.device.before_fork();
        }
    }

    fn after_fork_in_parent(&self) {
        if self.host.is_own_process() {
            self.device.after_fork();
        }
    }
}

impl VulkanDevice {
    pub(crate) fn open(host: &'static Host, options: VulkanOptions<'_>) -> Result<Self, Error> {
        let embedder = hmm_mem::leaked(InEngine(host));
        let device = hmm_vulkan::VulkanDevice::open_with(options.0, embedder)?;
        let open = hmm_mem::leaked(OpenVulkan { host, device });
        if !hmm_os::guard_forks(open) {
            device.close();
            return Err(Error::TooManyForkGuards);
        }
        let added = host.add_device(device).and_then(|id| {
            device.attach(id, hmm_mem::leaked(Faults(host)))?;
            Ok(id)
        });
        match added {
            Ok(id) => {
                host.keep_vulkan(open);
                Ok(Self {
                    host,
                    device,
                    open,
                    id,
                })
            }
            Err(error) => {
                open.close();
                Err(error)
            }
        }
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

    /// What it is, for people.
    #[must_use]
    pub fn describe(&self) -> Description {
        self.device.describe()
    }

    /// The most direct way at present from a pointer of the program's to one of the
    /// device's: what launches get that name memory which lies as it does in the program.
    #[must_use]
    pub fn policy(&self) -> AddressPolicy {
        self.device.policy()
    }

    /// Whether [`VulkanDevice::map_identical`] would do, as things are now.
    ///
    /// # Errors
    /// [`VulkanError::NoIdentity`]: why not.
    pub fn offers_identity(&self) -> Result<(), VulkanError> {
        self.device.offers_identity()
    }

    /// The device behind it, which takes programs in
    /// ([`hmm_vulkan::VulkanDevice::program`]).
    #[must_use]
    pub const fn driver(&self) -> &'static hmm_vulkan::VulkanDevice {
        self.device
    }

    /// Maps memory for the program at the addresses that the device's memory has: as much as
    /// that, in whole blocks of 2 MiB. Pointers to it are the device's, too. A launch that
    /// names such memory alone ([`VulkanDevice::launch_with`]) runs the shader as it was
    /// written, and says that the distance is 0.
    ///
    /// The mapping is the caller's: anonymous memory, which stays when the device goes. So
    /// call this once, and early.
    ///
    /// ```no_run
    /// use hmm::{ByteCount, Hmm, Used, VulkanOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let hmm = Hmm::open()?;
    /// let device = hmm.add_vulkan_device(VulkanOptions::new(ByteCount::mib(256)))?;
    /// let memory: *mut [u8] = device.map_identical()?;
    /// println!("{} bytes at {:?}", memory.len(), memory.cast::<u8>());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VulkanError::NoIdentity`]: these addresses are not free in this process. That is so
    /// with every driver that works inside of it (lavapipe), and may be by chance.
    pub fn map_identical(&self) -> Result<*mut [u8], VulkanError> {
        let range = self.device.map_identical()?;
        let start = std::ptr::with_exposed_provenance_mut(range.start().addr());
        let len = range.pages().bytes_usize();
        Ok(std::ptr::slice_from_raw_parts_mut(start, len))
    }

    /// Runs a program over a grid of workgroups, with pages coming as it meets them, and
    /// waits until that is done.
    ///
    /// # Errors
    /// [`LaunchVulkanError`]: an access in error, a program that cannot demand pages, a
    /// kernel that runs for too long, a device that is lost or removed.
    pub fn launch(
        &self,
        program: &Program,
        groups: [u32; 3],
        push_constants: &[u8],
    ) -> Result<LaunchReport, LaunchVulkanError> {
        program.launch(groups, push_constants, &[])
    }

    /// The same with everything named that the program follows pointers to: all pages of
    /// it come to the device first and stay until the end, and nothing is checked.
    /// Memory that is not whole pages is rounded *outwards*: the program touches all of
    /// it.
    ///
    /// # Errors
    /// As [`VulkanDevice::launch`]; and when that memory is more than the device's, or
    /// some of it cannot migrate.
    pub fn launch_with(
        &self,
        program: &Program,
        groups: [u32; 3],
        push_constants: &[u8],
        uses: &[Used],
    ) -> Result<LaunchReport, LaunchVulkanError> {
        let ranges: Vec<_> = uses.iter().map(|used| (used.range, used.access)).collect();
        for &Used { range, .. } in uses {
            self.host.threads.run_on_root(move || hmm_os::claim(range));
        }
        for used in uses {
            // What stays is asked for page by page, and then in error.
            self.bring(used.range);
            // Two that came at the same time can have been in each other's way.
            for range in self.device.misplaced(used.range, MISPLACED) {
                let home = self.host.move_all(Some(range), Destination::System);
                drop(home.map(Prefetch::wait));
                self.bring(range);
            }
        }
        program.launch(groups, push_constants, &ranges)
    }

    fn bring(&self, range: PageRange) {
        let to = Destination::Device(self.id);
        let moved = self.host.move_all(Some(range), to);
        drop(moved.map(Prefetch::wait));
    }

    /// Brings everything home from the device, ends it and gives its memory back. Pages
    /// that could not be brought home stay there, and the device with them: then the
    /// answer is false.
    ///
    /// # Errors
    /// As [`crate::Hmm::migrate`].
    pub fn remove(&self) -> Result<bool, Error> {
        let clean = self.host.remove_device(self.id)?;
        if clean {
            self.open.close();
        }
        Ok(clean)
    }

    /// What the device has counted.
    #[must_use]
    pub fn stats(&self) -> VulkanStats {
        self.device.stats()
    }
}

/// Memory that a program uses, as whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    range: PageRange,
    access: Access,
}

impl Used {
    /// It reads these items.
    #[must_use]
    pub fn read<T>(items: *const [T]) -> Option<Self> {
        Self::new(items, Access::Read)
    }

    /// It reads and writes them.
    #[must_use]
    pub fn write<T>(items: *mut [T]) -> Option<Self> {
        Self::new(items, Access::Write)
    }

    /// The pages that hold a part of the items; `None` when there are none.
    fn new<T>(items: *const [T], access: Access) -> Option<Self> {
        let bytes = (items.len() as u64).checked_mul(size_of::<T>() as u64)?;
        let range = PageRange::covering(VirtAddr::of(items.cast::<T>()), bytes).ok()?;
        Some(Self { range, access })
    }
}
