//! A small engine: each page is at home or in a frame, under a lock of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_hal::{Device, DeviceError, DeviceFaultError, FaultHandler, Resolution, Transfer};
use hmm_types::{Access, DeviceId, FrameRange, PageCount, PageRange, VirtAddr};

use crate::{Mapped, Subject};

/// What the engine calls the device.
pub const ID: DeviceId = DeviceId::new(3);

/// The engine. The contents of a page are in `home` when it is not in a frame; its own
/// address in `space` is only a name, which the device must not touch.
#[derive(Debug)]
pub struct Engine {
    /// The device.
    pub subject: &'static dyn Subject,
    /// What kernels name.
    pub space: Mapped,
    /// What is there.
    pub home: Mapped,
    /// Where each page is.
    pages: Vec<Mutex<Option<FrameRange>>>,
    /// Every so many faults are answered with "wait".
    retry_every: AtomicU64,
    /// Pages from this one on are read-only.
    read_only_from: AtomicU64,
    /// Where a full device's next victim is looked for.
    hand: AtomicU64,
    /// Faults so far.
    pub faults: AtomicU64,
    /// Waits so far.
    pub waits: AtomicU64,
    /// It ends: faults are errors.
    pub ending: AtomicBool,
}

impl Engine {
    /// An engine of so many pages, at home, zero.
    #[must_use]
    pub fn new(subject: &'static dyn Subject, pages: usize) -> &'static Self {
        let engine: &'static Self = Box::leak(Box::new(Self {
            subject,
            space: Mapped::new(pages),
            home: Mapped::new(pages),
            pages: (0..pages).map(|_| Mutex::new(None)).collect(),
            retry_every: AtomicU64::new(0),
            read_only_from: AtomicU64::new(u64::MAX),
            hand: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        }));
        subject.attach(ID, engine);
        engine
    }

    /// Answers every so many faults with "wait"; 0 for none.
    pub fn retry_every(&self, faults: u64) {
        self.retry_every.store(faults, Ordering::SeqCst);
    }

    /// Makes pages from this one on read-only.
    pub fn protect_from(&self, page: usize) {
        self.read_only_from.store(page as u64, Ordering::SeqCst);
    }

    fn device(&self) -> &'static dyn Device {
        self.subject.device()
    }

    /// The address that kernels know a word by.
    #[must_use]
    pub fn address(&self, word: usize) -> VirtAddr {
        VirtAddr::of(self.space.word(word))
    }

    fn index_of(&self, address: VirtAddr) -> Option<usize> {
        let range = self.space.range();
        range
            .contains(address)
            .then(|| PageCount::new(address.pages_since(range.start())).index())
    }

    fn lock(&self, page: usize) -> MutexGuard<'_, Option<FrameRange>> {
        self.pages[page]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies and waits.
    ///
    /// # Errors
    /// The device's.
    pub fn transfer(&self, transfer: Transfer) -> Result<(), DeviceError> {
        let fence = self.device().submit(&[transfer])?;
        self.device().wait(fence)
    }

    /// Brings a page home; false when it was there.
    ///
    /// # Panics
    /// When it does not come.
    pub fn evict(&self, page: usize) -> bool {
        let mut place = self.lock(page);
        let Some(frames) = place.take() else {
            return false;
        };
        self.device().unmap(self.space.page(page));
        let host = self.home.page(page).start();
        self.transfer(Transfer::ToHost { frames, host })
            .expect("a page comes home");
        self.device().free(frames);
        true
    }

    /// Brings all pages home.
    pub fn evict_all(&self) {
        for page in 0..self.pages.len() {
            self.evict(page);
        }
    }

    /// Takes a page away from kernels, lets `look` look at its frame, and gives it back.
    pub fn unmapped<R>(&self, page: usize, look: impl FnOnce(FrameRange) -> R) -> Option<R> {
        let place = self.lock(page);
        let frames = (*place)?;
        let range: PageRange = self.space.page(page);
        self.device().unmap(range);
        let seen = look(frames);
        let _ = self.device().map(range, frames, Access::Write);
        Some(seen)
    }

    /// Gives a page another frame while kernels run, lets `look` look at the one that it
    /// had, and frees that.
    pub fn replaced<R>(&self, page: usize, look: impl FnOnce(FrameRange) -> R) -> Option<R> {
        let mut place = self.lock(page);
        let frames = (*place)?;
        let other = self.device().allocate(PageCount::ONE).ok()?;
        let range: PageRange = self.space.page(page);
        self.device().map(range, other, Access::Write).ok()?;
        let seen = look(frames);
        self.device().free(frames);
        *place = Some(other);
        Some(seen)
    }

    /// Reads frames through the copy queue.
    ///
    /// # Panics
    /// When the queue fails.
    #[must_use]
    pub fn peek(&self, frames: FrameRange) -> Vec<u64> {
        let pages = frames.count() as usize;
        let copy = Mapped::new(pages);
        let host = copy.range().start();
        self.transfer(Transfer::ToHost { frames, host })
            .expect("a frame can be read");
        (0..pages * 512).map(|word| copy.read(word)).collect()
    }

    /// Room for a page, made by eviction where there is none.
    fn frame_for(&self, page: usize) -> Option<FrameRange> {
        if let Ok(frames) = self.device().allocate(PageCount::ONE) {
            return Some(frames);
        }
        for _ in 0..self.pages.len() {
            let victim = self.hand.fetch_add(1, Ordering::SeqCst) % self.pages.len() as u64;
            let victim = PageCount::new(victim).index();
            if victim == page {
                continue;
            }
            if self.pages[victim]
                .try_lock()
                .is_ok_and(|place| place.is_some())
            {
                self.evict_now(victim);
                if let Ok(frames) = self.device().allocate(PageCount::ONE) {
                    return Some(frames);
                }
            }
        }
        None
    }

    /// As [`Engine::evict`], but never waits for another page's lock: one is held.
    fn evict_now(&self, page: usize) {
        let Ok(mut place) = self.pages[page].try_lock() else {
            return;
        };
        if let Some(frames) = *place {
            self.device().unmap(self.space.page(page));
            let host = self.home.page(page).start();
            if self.transfer(Transfer::ToHost { frames, host }).is_ok() {
                self.device().free(frames);
                *place = None;
            }
        }
    }
}

impl FaultHandler for Engine {
    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        assert_eq!(device, ID);
        if self.ending.load(Ordering::SeqCst) {
            return Err(DeviceFaultError::ShuttingDown);
        }
        let Some(index) = self.index_of(address) else {
            return Err(DeviceFaultError::NotMapped { address });
        };
        let read_only = index as u64 >= self.read_only_from.load(Ordering::SeqCst);
        if read_only && access == Access::Write {
            return Err(DeviceFaultError::ReadOnly { address });
        }
        let count = self.faults.fetch_add(1, Ordering::SeqCst) + 1;
        let every = self.retry_every.load(Ordering::SeqCst);
        if every > 0 && count.is_multiple_of(every) {
            return Ok(Resolution::Retry);
        }
        let mut place = self.lock(index);
        let frames = match *place {
            Some(frames) => frames,
            None => {
                let Some(frames) = self.frame_for(index) else {
                    return Ok(Resolution::Retry);
                };
                let host = self.home.page(index).start();
                if self.transfer(Transfer::ToDevice { host, frames }).is_err() {
                    self.device().free(frames);
                    return Err(DeviceFaultError::DeviceLost);
                }
                *place = Some(frames);
                frames
            }
        };
        match self.device().map(self.space.page(index), frames, access) {
            Ok(()) => Ok(Resolution::Mapped),
            Err(DeviceError::OutOfMemory) => Ok(Resolution::Retry),
            Err(_) => Err(DeviceFaultError::DeviceLost),
        }
    }

    fn wait_for_progress(&self) {
        self.waits.fetch_add(1, Ordering::SeqCst);
        std::thread::yield_now();
    }
}
