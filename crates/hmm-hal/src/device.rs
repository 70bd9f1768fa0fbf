//! What the engine asks of a device.

use hmm_types::{Access, ByteCount, DeviceId, FrameRange, PageCount, PageRange, VirtAddr};

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// A name for people.
    pub name: &'static str,
    /// Size of its memory.
    pub memory: ByteCount,
    /// Whether its memory is modelled as the CPU's: pages that migrate there stay
    /// in place and count as the device's, up to `memory`, so nothing of it is
    /// allocated or copied. Takes `system_memory`.
    pub coherent: bool,
    /// Whether its kernels can do atomics on its memory.
    pub atomics: bool,
    /// Whether its kernels can use system memory in place.
    pub system_memory: bool,
    /// Whether it can do [`Transfer::FromProgram`].
    pub reads_program: bool,
    /// Whether its kernels can use in place what never migrates, though perhaps not all
    /// system memory: [`Device::map_unwatched`].
    pub unwatched_memory: bool,
}

/// What a device reports that the engine could not foresee.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Its memory is full.
    #[error("the device's memory is full")]
    OutOfMemory,
    /// A copy did not succeed. What it was to overwrite is undefined.
    #[error("a copy on the device failed")]
    CopyFailed,
    /// The device is lost; whatever was only there is gone, unless it can
    /// still be read.
    #[error("the device is lost")]
    Lost,
}

/// One piece of work for a copy queue. Host addresses are engine memory
/// (staging or bounce pages), present, and left alone by everybody else until
/// the fence is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Pages of the program into frames. The engine has write-protected them, but
    /// the program may drop or unmap them meanwhile: that is an error of the
    /// transfer, [`DeviceError::CopyFailed`], and of nothing else.
    FromProgram {
        /// Source: as many pages as there are frames.
        place: VirtAddr,
        /// Destination.
        frames: FrameRange,
    },
    /// Host memory into frames.
    ToDevice {
        /// Source: as many pages as there are frames.
        host: VirtAddr,
        /// Destination.
        frames: FrameRange,
    },
    /// Frames into host memory.
    ToHost {
        /// Source.
        frames: FrameRange,
        /// Destination: as many pages as there are frames.
        host: VirtAddr,
    },
    /// Zeros into frames.
    Zero {
        /// Destination.
        frames: FrameRange,
    },
}

/// A point in a device's copy queue. Fences of one device are reached in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub u64);

/// A device back end.
///
/// Arguments are checked by core: ranges are user space, frames are allocated,
/// a range and its frames are equally long. `map`, `map_host` and `unmap` are
/// called with a block locked, so they wait for nothing but the device's own
/// short locks and the end of accesses that are under way.
pub trait Device: Sync {
    /// What it is. The memory size never changes.
    fn info(&self) -> DeviceInfo;

    /// Takes a run of frames: at least one, at most `pages`, preferably all.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Lost`].
    fn allocate(&self, pages: PageCount) -> Result<FrameRange, DeviceError>;

    /// The same for these pages: a device whose kernels find memory faster where pages
    /// that lie together have frames that do, at the same distance, may choose them so:
    /// fewer than there are, but from the first page on.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn allocate_for(&self, pages: PageRange) -> Result<FrameRange, DeviceError> {
        self.allocate(pages.pages())
    }

    /// Gives frames back. They need not be one run that was allocated.
    fn free(&self, frames: FrameRange);

    /// Frames that are free now.
    fn free_pages(&self) -> PageCount;

    /// Maps pages to frames in the device's page table; replaces what was there.
    ///
    /// # Errors
    /// [`DeviceError`]; then nothing is mapped at the range, and the device
    /// faults when it uses it.
    fn map(&self, range: PageRange, frames: FrameRange, access: Access) -> Result<(), DeviceError>;

    /// Maps pages to host memory: `range` itself for use in place, or staging
    /// pages for exclusive access.
    ///
    /// # Errors
    /// As [`Device::map`].
    fn map_host(&self, range: PageRange, host: VirtAddr, access: Access)
    -> Result<(), DeviceError>;

    /// Lets the device use pages in place that the engine does not watch: they never
    /// migrate, and it learns nothing of what becomes of them. A device that has to
    /// prepare that without locks may do so when it is back from the fault that led here,
    /// unless [`Device::unmap`] has been called for a part of the range by then.
    ///
    /// # Errors
    /// As [`Device::map`].
    fn map_unwatched(&self, range: PageRange, access: Access) -> Result<(), DeviceError> {
        self.map_host(range, range.start(), access)
    }

    /// Unmaps pages. When it returns, no access of the device through an old
    /// mapping is under way, and none will follow. Works on a lost device too.
    fn unmap(&self, range: PageRange);

    /// Calls `read` with the address at which the CPU reads these frames, and returns
    /// true: they stay there until `read` returns. False, and `read` is not called,
    /// where the CPU cannot read them about as fast as its own memory, and when the
    /// copy queue would not read them now. Called with a block locked, for a few
    /// pages that the device does not map.
    fn with_host_view(&self, _frames: FrameRange, _read: &mut dyn FnMut(VirtAddr)) -> bool {
        false
    }

    /// Hands transfers to the copy queue.
    ///
    /// # Errors
    /// [`DeviceError`]; then none of them is under way.
    fn submit(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError>;

    /// Waits until the queue has reached a fence. Called without locks.
    ///
    /// # Errors
    /// [`DeviceError`], when one of the transfers up to the fence failed.
    fn wait(&self, fence: Fence) -> Result<(), DeviceError>;
}

/// What the engine did about a device's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The page is mapped for the access; look again.
    Mapped,
    /// Somebody else has the page on its way: [`FaultHandler::wait_for_progress`],
    /// then look again.
    Retry,
}

/// What a command may have done about pages that its device has no mapping for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing: only what the device has already, in its memory or exclusively.
    Resident,
    /// Everything else is made present and used in place.
    Present,
}

/// Why a device's access is in error. The program's data is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFaultError {
    /// Nothing is mapped there, or it allows no access at all (EFAULT).
    #[error("the device accessed {address}, where nothing is mapped that it could read")]
    NotMapped {
        /// The address.
        address: VirtAddr,
    },
    /// A store to read-only memory (EPERM).
    #[error("the device wrote to {address}, which is read-only")]
    ReadOnly {
        /// The address.
        address: VirtAddr,
    },
    /// The page can neither move to the device nor be used in place.
    #[error("the page at {address} can neither migrate nor be used in place: {reason}")]
    Unreachable {
        /// The address.
        address: VirtAddr,
        /// Why it did not migrate.
        reason: hmm_types::StayReason,
    },
    /// The device is lost.
    #[error("the device is lost")]
    DeviceLost,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// The engine, as a device sees it.
pub trait FaultHandler: Sync {
    /// A kernel of `device` needs `address`. Called on one of the device's own
    /// threads, without locks.
    ///
    /// # Errors
    /// [`DeviceFaultError`], when the access is in error.
    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError>;

    /// Kernels of `device` are about to use all of a range: what of it can be brought
    /// to the device's memory is. A hint: what stays is asked for when it is missed.
    /// Called as [`FaultHandler::device_fault`] is.
    ///
    /// This one does nothing.
    fn prefetch(&self, _device: DeviceId, _range: PageRange) {}

    /// A command of `device` works on a whole range: its pages are made usable
    /// where they are, as far as `reach` says. Returns how many pages from the
    /// start of the range are entered into the device's page table. Called as
    /// [`FaultHandler::device_fault`] is.
    ///
    /// # Errors
    /// [`DeviceFaultError`], when an access to the range is in error.
    ///
    /// This one is for those who know single pages only.
    fn fault_range(
        &self,
        device: DeviceId,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, DeviceFaultError> {
        let mut pages = PageCount::ZERO;
        if reach == Reach::Present {
            for page in range.iter_pages() {
                match self.device_fault(device, page, access)? {
                    Resolution::Mapped => pages += PageCount::ONE,
                    Resolution::Retry => break,
                }
            }
        }
        Ok(pages)
    }

    /// A command begins: called on each of the device's threads that works on
    /// it, without locks, before its first access. When it returns, changes of
    /// mappings and of protections that the program made before it gave the
    /// command are seen by the device.
    fn command_begins(&self, _device: DeviceId) {}

    /// Waits, for a bounded time, until some transition has ended.
    fn wait_for_progress(&self);
}
