//! A small engine: each page is at home or in a frame, under a lock of its own.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm_hal::{Device, DeviceFaultError, FaultHandler, Resolution, Transfer};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_types::{Access, ByteCount, DeviceId, FrameRange, PageCount, PageRange, VirtAddr};

/// Pages of anonymous memory, given back when dropped.
pub struct Mapped {
    base: *mut u8,
    pages: usize,
}

// SAFETY: the memory belongs to no thread.
unsafe impl Send for Mapped {}
// SAFETY: only addresses are handed out.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub fn new(pages: usize) -> Self {
        // SAFETY: a fresh mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(base != libc::MAP_FAILED);
        base.expose_provenance();
        Self {
            base: base.cast(),
            pages,
        }
    }

    pub fn page(&self, index: usize) -> PageRange {
        assert!(index < self.pages);
        let start = VirtAddr::of(self.base.wrapping_add(index * 4096));
        PageRange::from_pages(start, PageCount::ONE)
    }

    pub fn range(&self) -> PageRange {
        PageRange::from_pages(VirtAddr::of(self.base), PageCount::from(self.pages))
    }

    /// The address of the word with this index.
    pub fn word(&self, index: usize) -> *mut u64 {
        assert!(index < self.pages * 512);
        self.base.cast::<u64>().wrapping_add(index)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.base.cast(), self.pages * 4096) };
    }
}

/// The engine. The contents of a page are in `shadow` when it is not in a
/// frame; its own address is what kernels use when they fall back to accesses
/// in place.
pub struct Engine {
    pub device: &'static SoftDevice,
    pub space: Mapped,
    pub shadow: Mapped,
    pub pages: Vec<Mutex<Option<FrameRange>>>,
    pub retry_every: u64,
    pub faults: AtomicU64,
}

impl Engine {
    pub fn open(config: SoftConfig, pages: usize, retry_every: u64) -> &'static Self {
        let device = SoftDevice::open(config).unwrap();
        let engine: &'static Self = Box::leak(Box::new(Self {
            device,
            space: Mapped::new(pages),
            shadow: Mapped::new(pages),
            pages: (0..pages).map(|_| Mutex::new(None)).collect(),
            retry_every,
            faults: AtomicU64::new(0),
        }));
        device.attach(DeviceId::new(3), engine).unwrap();
        engine
    }

    pub fn simple(pages: usize) -> &'static Self {
        let mut config = SoftConfig::new(ByteCount::mib(8));
        config.workers = 3;
        config.poison_freed = true;
        Self::open(config, pages, 0)
    }

    pub fn index_of(&self, address: VirtAddr) -> Option<usize> {
        let range = self.space.range();
        range
            .contains(address)
            .then(|| PageCount::new(address.pages_since(range.start())).index())
    }

    /// Copies and waits.
    pub fn transfer(&self, transfer: Transfer) {
        let fence = self.device.submit(&[transfer]).unwrap();
        self.device.wait(fence).unwrap();
    }
}

impl FaultHandler for Engine {
    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        assert_eq!(device, DeviceId::new(3));
        let Some(index) = self.index_of(address) else {
            return Err(DeviceFaultError::NotMapped { address });
        };
        let count = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
        if self.retry_every > 0 && count.is_multiple_of(self.retry_every) {
            return Ok(Resolution::Retry);
        }
        let mut page = self.pages[index].lock().unwrap();
        let frames = match *page {
            Some(frames) => frames,
            None => {
                let Ok(frames) = self.device.allocate(PageCount::ONE) else {
                    return Ok(Resolution::Retry);
                };
                self.transfer(Transfer::ToDevice {
                    host: self.shadow.page(index).start(),
                    frames,
                });
                *page = Some(frames);
                frames
            }
        };
        self.device
            .map(self.space.page(index), frames, access)
            .map_err(|_| DeviceFaultError::DeviceLost)?;
        Ok(Resolution::Mapped)
    }

    fn wait_for_progress(&self) {
        std::thread::yield_now();
    }
}
