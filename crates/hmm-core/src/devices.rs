//! The devices of an engine, and who shares their frames.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use hmm_hal::Device;
use hmm_mem::Vec;
use hmm_sync::{Mutex, Rank};
use hmm_types::{DeviceId, FrameId, FrameRange, MAX_DEVICES, PageRange};

/// One device. Slots are filled once and never emptied, so the fault path can
/// read them without a lock; a removed device keeps its slot, retired.
pub(crate) struct DeviceSlot<'env> {
    pub(crate) device: &'env dyn Device,
    /// No new pages go there.
    retired: AtomicBool,
    /// System memory that it maps in place; not all of it is registered.
    pub(crate) in_place: Mutex<Vec<PageRange>>,
    /// For each frame how many forked children share it with its page.
    shares: Vec<AtomicU8>,
}

impl DeviceSlot<'_> {
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Takes away all system memory that the device maps in place.
    pub(crate) fn forget_in_place(&self) {
        let mut in_place = self.in_place.lock();
        in_place
            .drain(..)
            .for_each(|range| self.device.unmap(range));
    }

    /// Whether a forked child still needs the frame as it is.
    pub(crate) fn is_shared(&self, frame: FrameId) -> bool {
        self.shares[frame.index()].load(Ordering::Acquire) > 0
    }

    /// One more owner. False when there are as many as can be counted.
    pub(crate) fn share(&self, frame: FrameId) -> bool {
        self.shares[frame.index()]
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                count.checked_add(1)
            })
            .is_ok()
    }

    /// One owner less; the last one frees the frame.
    pub(crate) fn free(&self, frames: FrameRange) {
        let mut start = 0;
        for index in 0..=frames.count() {
            let shared = index < frames.count() && {
                self.shares[frames.frame(index).index()]
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                        count.checked_sub(1)
                    })
                    .is_ok()
            };
            if index == frames.count() || shared {
                if start < index {
                    self.device.free(frames.slice(start, index - start));
                }
                start = index + 1;
            }
        }
    }
}

/// All slots.
pub(crate) struct Devices<'env> {
    slots: [OnceLock<DeviceSlot<'env>>; MAX_DEVICES],
}

impl<'env> Devices<'env> {
    pub(crate) const fn new() -> Self {
        Self {
            slots: [const { OnceLock::new() }; MAX_DEVICES],
        }
    }

    /// Fills the next slot; `None` when all are taken. The caller serialises.
    pub(crate) fn add(&self, device: &'env dyn Device) -> Option<DeviceId> {
        let frames = device.info().memory.whole_pages().index();
        let mut shares = hmm_mem::vec_with_capacity(frames);
        shares.extend((0..frames).map(|_| AtomicU8::new(0)));
        let index = self.slots.iter().position(|slot| slot.get().is_none())?;
        let filled = self.slots[index].set(DeviceSlot {
            device,
            retired: AtomicBool::new(false),
            in_place: Mutex::new(Rank::InPlace, hmm_mem::vec()),
            shares,
        });
        assert!(filled.is_ok(), "two threads add devices at once");
        Some(DeviceId::new(index))
    }

    pub(crate) fn get(&self, id: DeviceId) -> Option<&DeviceSlot<'env>> {
        self.slots[id.index()].get()
    }

    /// A device that some page's state names.
    pub(crate) fn slot(&self, id: DeviceId) -> &DeviceSlot<'env> {
        match self.get(id) {
            Some(slot) => slot,
            None => unreachable!("a page is on a device that was never added"),
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (DeviceId, &DeviceSlot<'env>)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| Some((DeviceId::new(index), slot.get()?)))
    }

    /// Engine memory that the slots' tables take.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.all()
            .map(|(_, slot)| slot.shares.capacity() as u64)
            .sum()
    }
}
