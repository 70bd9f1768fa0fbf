//! A kernel on a device touched a page that the device has no mapping for.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, DeviceFaultError, Mapping, Resolution};
use hmm_types::{
    Access, DeviceId, FrameRange, MemoryKind, PAGE_SIZE, PAGES_PER_BLOCK, PageCount, PageRange,
    StayReason, USER_END, VirtAddr,
};

use crate::engine::{AGAIN_LIMIT, Engine};
use crate::executor::Executor;
use crate::home::Home;
use crate::page::PageState;
use crate::readahead::Plan;
use crate::report::MigrationReport;
use crate::upload::{Fate, Target};

/// Stretches of system memory that a device maps in place at a time; with more
/// it starts over.
const MAX_IN_PLACE: usize = 1 << 14;

/// How many places' windows a device has room for at a time, at least.
const PLACES: u64 = 16;

/// How often room is looked for, for a page that the device cannot use in place.
const ROOM_TRIES: u32 = 64;

/// What the page's state says about the fault.
pub(crate) enum Found {
    Mapped,
    InFlight,
    /// A frame that a forked child still needs as it is.
    Unshare(PageRange),
    /// Not on this device.
    Away,
    /// The device does not answer any more.
    Lost,
}

impl Engine<'_> {
    /// Serves a fault of a device: brings the page there, or maps it in place.
    /// For threads that may wait.
    ///
    /// # Errors
    /// [`DeviceFaultError`], when the access is in error; nothing changed.
    pub fn device_fault(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        self.stats.device_faults.fetch_add(1, Relaxed);
        self.usable(device)?;
        // mprotect sends no event: what is allowed is asked at every fault.
        let mapping = self
            .mapping_at(address)
            .ok_or(DeviceFaultError::NotMapped { address })?;
        Self::permits(&mapping, address, access)?;
        let target = Target::of(device, &mapping);
        match self.map_resident(address, target, access) {
            Found::Mapped => Ok(Resolution::Mapped),
            Found::InFlight => Ok(Resolution::Retry),
            Found::Lost => Err(DeviceFaultError::DeviceLost),
            Found::Unshare(page) => self.unshare_frame(executor, page, target),
            Found::Away => self.fetch_to_device(executor, device, address, &mapping, target),
        }
    }

    /// Whether a device can be served at all.
    pub(crate) fn usable(&self, device: DeviceId) -> Result<(), DeviceFaultError> {
        if self.is_closing() {
            return Err(DeviceFaultError::ShuttingDown);
        }
        match self.devices.get(device) {
            Some(slot) if !slot.is_retired() => Ok(()),
            _ => Err(DeviceFaultError::DeviceLost),
        }
    }

    /// Whether a mapping allows a device's access.
    pub(crate) fn permits(
        mapping: &Mapping,
        address: VirtAddr,
        access: Access,
    ) -> Result<(), DeviceFaultError> {
        if !mapping.permissions.read {
            return Err(DeviceFaultError::NotMapped { address });
        }
        if !mapping.permissions.allow(access) {
            return Err(DeviceFaultError::ReadOnly { address });
        }
        Ok(())
    }

    /// Gives the device a frame of its own for a page whose frame a forked
    /// child needs as it is.
    pub(crate) fn unshare_frame(
        &self,
        executor: &mut Executor,
        page: PageRange,
        target: Target,
    ) -> Result<Resolution, DeviceFaultError> {
        let device = target.device;
        let departure = match self.depart_to(device) {
            Ok(departure) => departure,
            Err(StayReason::DeviceLost) => return Err(DeviceFaultError::DeviceLost),
            Err(_) => return Err(DeviceFaultError::ShuttingDown),
        };
        let passed = if self.is_gigantic(page.start()) {
            self.unshare_unit(executor, page.start(), target)
        } else {
            self.step_between_devices(executor, page, device, target)
        };
        drop(departure);
        match passed.fate {
            Fate::Stayed(StayReason::DeviceLost) => return Err(DeviceFaultError::DeviceLost),
            // Without room for a copy the page itself goes home.
            Fate::Stayed(StayReason::NoDeviceMemory) if !self.make_room(executor, device, page) => {
                self.step_home(executor, page, Home::ahead());
            }
            _ => {}
        }
        Ok(Resolution::Retry)
    }

    /// Maps a page that is on the device already, with its neighbours.
    pub(crate) fn map_resident(&self, address: VirtAddr, target: Target, access: Access) -> Found {
        let map = self.gate.read();
        let Some(piece) = map.find(address) else {
            return Found::Away;
        };
        let mut inner = map.block(piece.block).lock();
        inner.last_use = self.next_use();
        let slot = self.devices.slot(target.device);
        let page = piece.range().slice(0, 1);
        match inner.state(piece.first) {
            PageState::Device { device, frame } if device == target.device => {
                let shared = slot.is_shared(frame);
                if shared && access == Access::Write {
                    return Found::Unshare(page);
                }
                let allowed = if shared { Access::Read } else { target.access };
                Self::entered(slot.device.map(page, FrameRange::new(frame, 1), allowed))
            }
            PageState::Staged {
                device,
                page: staged,
            } if device == target.device => {
                let host = self.staging.lock().address(staged);
                Self::entered(slot.device.map_host(page, host, target.access))
            }
            state if state.in_flight() => Found::InFlight,
            _ => Found::Away,
        }
    }

    /// A device's page table that is full for now may have room later.
    const fn entered(mapped: Result<(), DeviceError>) -> Found {
        match mapped {
            Ok(()) => Found::Mapped,
            Err(DeviceError::Lost) => Found::Lost,
            Err(_) => Found::InFlight,
        }
    }

    fn fetch_to_device(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        address: VirtAddr,
        mapping: &Mapping,
        target: Target,
    ) -> Result<Resolution, DeviceFaultError> {
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        let reason = match Self::immovable(mapping) {
            // No memory that belongs to the process alone, nor a file's.
            Some(reason @ StayReason::Special) => {
                return Err(DeviceFaultError::Unreachable { address, reason });
            }
            Some(reason) => reason,
            // Its memory and the CPU's are the same to it.
            None if self.is_coherent(device) => StayReason::Limit,
            None => {
                let window = if mapping.page_len > PageCount::from(PAGES_PER_BLOCK) {
                    // All of it goes: more than enough.
                    page
                } else {
                    self.device_window(device, address)
                };
                let mut stayed = self.fetch_window(executor, device, window, page);
                let in_place = self.devices.slot(device).device.info().system_memory;
                if !in_place {
                    // The window alone may fill the device, and what others bring takes
                    // the room that was made.
                    let mut tries = 0;
                    while stayed == Some(StayReason::NoDeviceMemory) && tries < ROOM_TRIES {
                        if tries > 0 {
                            self.wait_for_transition();
                        }
                        tries += 1;
                        stayed = self.fetch_window(executor, device, page, page);
                    }
                }
                match stayed {
                    None => return Ok(Resolution::Mapped),
                    Some(StayReason::Raced | StayReason::Busy) => return Ok(Resolution::Retry),
                    // This device, or the one that the page is on.
                    Some(reason @ StayReason::DeviceLost) => {
                        return Err(DeviceFaultError::Unreachable { address, reason });
                    }
                    Some(StayReason::Cancelled) => return Err(DeviceFaultError::ShuttingDown),
                    Some(reason) => reason,
                }
            }
        };
        // Nothing of such a mapping ever leaves: neighbours come along for free.
        let huge = mapping.kind == MemoryKind::HugeTlb && !mapping.huge_pages;
        if huge || matches!(mapping.kind, MemoryKind::File | MemoryKind::Shared) {
            let block =
                PageRange::from_pages(address.block_floor(), PageCount::from(PAGES_PER_BLOCK));
            let together = mapping.whole.intersection(block).unwrap_or(page);
            if let Some(resolution) = self.map_in_place(together, target) {
                return Ok(resolution);
            }
        }
        self.use_in_place(executor, page, target, reason)
    }

    /// Brings a window to a device; why a page of it stayed, if it did.
    fn fetch_window(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        window: PageRange,
        page: PageRange,
    ) -> Option<StayReason> {
        let mut report = MigrationReport::new();
        let asked = (window, self.moment());
        self.migrate_to_device(executor, window, device, asked, &mut report);
        let mut stayed = report.stayed.iter();
        let stayed = stayed.find(|stayed| stayed.range.overlaps(page));
        stayed.map(|stayed| stayed.reason)
    }

    /// Has the device use a page where it is, though it would rather have it:
    /// `reason`. What is on another device comes home, as that cannot be used
    /// in place.
    pub(crate) fn use_in_place(
        &self,
        executor: &mut Executor,
        page: PageRange,
        target: Target,
        reason: StayReason,
    ) -> Result<Resolution, DeviceFaultError> {
        let address = page.start();
        let step = self.step_home(executor, page, Home::ahead());
        match step.stuck {
            None | Some((_, StayReason::Busy)) => {}
            Some((_, reason)) => return Err(DeviceFaultError::Unreachable { address, reason }),
        }
        self.map_in_place(page, target)
            .ok_or(DeviceFaultError::Unreachable { address, reason })
    }

    /// The pages that a fault takes along: no more than a part of the device's memory, as
    /// kernels use several places at a time, and what comes along with one of them must not
    /// drive away the others.
    fn device_window(&self, device: DeviceId, address: VirtAddr) -> PageRange {
        let frames = self.devices.slot(device).device.info().memory.get() / PAGE_SIZE;
        let most = 1 << (frames / PLACES).max(1).ilog2();
        let (mut from, mut upto) = self.device_readahead.plan_whole(address);
        if upto - from > most {
            let page = address.page_number();
            from = from.max(page / most * most);
            upto = from + most;
        }
        let (from, upto) = Plan::addresses((from, upto));
        PageRange::span(
            from.max(VirtAddr::new(PAGE_SIZE)),
            upto.min(VirtAddr::new(USER_END)),
        )
    }

    /// Lets the device use pages of system memory where they are. Several only if
    /// the engine has none of them registered.
    fn map_in_place(&self, page: PageRange, target: Target) -> Option<Resolution> {
        let slot = self.devices.slot(target.device);
        let info = slot.device.info();
        if !info.system_memory && !info.unwatched_memory {
            return None;
        }
        let map = self.gate.read();
        let piece = map.overlapping(page).next();
        let watched = piece.is_some();
        let resting = match piece {
            None => true,
            Some(_) if page.pages() > PageCount::ONE || !info.system_memory => return None,
            Some(piece) => {
                let mut inner = map.block(piece.block).lock();
                let state = inner.state(piece.first);
                inner.in_place |= 1 << target.device.index();
                !state.is_away() && !state.in_flight()
            }
        };
        if !resting {
            return Some(Resolution::Retry);
        }
        let mut in_place = slot.in_place.lock();
        // Whoever ends the device sets that first, then takes what is here.
        if self.is_closing() || slot.is_retired() {
            return None;
        }
        if in_place.len() == MAX_IN_PLACE {
            in_place
                .drain(..)
                .for_each(|range| slot.device.unmap(range));
        }
        let mapped = if watched {
            slot.device.map_host(page, page.start(), target.access)
        } else {
            slot.device.map_unwatched(page, target.access)
        };
        mapped.ok()?;
        match in_place.last_mut() {
            Some(last) if last.end() == page.start() => {
                *last = PageRange::span(last.start(), page.end());
            }
            _ => in_place.push(page),
        }
        Some(Resolution::Mapped)
    }

    /// A command begins on a device: it must see what the program did to its
    /// mappings before. Changes that are under way are waited for; memory used
    /// in place, and pages whose protection was changed meanwhile, are looked
    /// up anew when they are touched.
    pub fn command_begins(&self, device: DeviceId) {
        let Some(slot) = self.devices.get(device) else {
            return;
        };
        for _ in 0..AGAIN_LIMIT {
            if self.space.is_quiet() {
                break;
            }
            self.space.relax();
        }
        slot.forget_in_place();
        let mut from = VirtAddr::new(hmm_types::PAGE_SIZE);
        while let Some(range) = self.next_with_pages_away(from) {
            from = range.end();
            for mapping in self.mappings_of(range).iter().flatten() {
                if !(mapping.permissions.read && mapping.permissions.write) {
                    slot.device.unmap(mapping.range);
                }
            }
        }
    }

    /// The next stretch of registered memory, from `from` on, whose blocks have
    /// pages away.
    fn next_with_pages_away(&self, from: VirtAddr) -> Option<PageRange> {
        let map = self.gate.read();
        let everything = PageRange::span(from, VirtAddr::new(USER_END));
        let mut stretch: Option<PageRange> = None;
        for piece in map.overlapping(everything) {
            let away = map.block(piece.block).lock().away() > 0;
            let range = piece.range();
            stretch = match stretch {
                Some(so_far) if so_far.end() == range.start() && away => {
                    Some(PageRange::span(so_far.start(), range.end()))
                }
                Some(so_far) => return Some(so_far),
                None => away.then_some(range),
            };
        }
        stretch
    }
}
