//! What is tested, and a stand-in that tests the simulator itself.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use hmm_hal::{AddressSpace, Device, DeviceFaultError, Event, Resolution, SpaceId, Stop};
use hmm_types::{Access, DeviceId, MemoryKind, PageRange, Permissions, VirtAddr};

use crate::clock::SimClock;
use crate::config::SimConfig;
use crate::device::SimDevice;
use crate::space::SimSpace;

/// What a program asks of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Moves a range to a device.
    Migrate(PageRange, DeviceId),
    /// The same, as a hint.
    Prefetch(PageRange, DeviceId),
    /// Moves a range back to system memory.
    Evict(PageRange),
    /// Takes pages from the CPU for a device's atomics.
    Exclusive(PageRange, DeviceId),
}

/// An engine, as the simulator drives it. All calls come from one thread, but
/// nested: while one call waits in a hook, others are made.
pub trait EngineUnderTest: Send + Sync + Sized + 'static {
    /// An engine for these. Device number n has index n.
    fn new(config: &SimConfig, space: SimSpace, devices: Vec<SimDevice>, clock: SimClock) -> Self;

    /// The reader's turn: reads the events that are there and applies the
    /// structural ones. Must not wait for anything.
    fn read(&self);

    /// A worker's turn: serves a fault, drains a child, and so on. Says
    /// whether there was anything to do.
    fn work(&self) -> bool;

    /// A kernel begins on a device: it must see what the program has done to
    /// its mappings before.
    fn command_begins(&self, _device: DeviceId) {}

    /// A kernel of a device needs a page.
    ///
    /// # Errors
    /// [`DeviceFaultError`], when the access is in error.
    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError>;

    /// A request of the program. Whether it succeeds is the engine's business;
    /// the data must be right either way.
    fn request(&self, request: Request);

    /// Called before a fork where the kernel does not report forks: when it
    /// returns, everything is at home, and nothing leaves before
    /// [`EngineUnderTest::after_fork`].
    fn before_fork(&self) {}

    /// Called after such a fork, in the parent.
    fn after_fork(&self) {}

    /// Checks what must hold between calls. Called when no call is under way.
    fn check(&self) {}

    /// Brings everything home, hands children their pages, lets all devices go.
    /// Hooks go on calling [`EngineUnderTest::read`] and
    /// [`EngineUnderTest::work`] meanwhile. False when something had to be left
    /// on a device that is lost.
    fn shutdown(&self) -> bool;

    /// What the engine has counted, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// An engine that migrates nothing: holes are filled with zeros, devices use
/// system memory in place. With it, the simulator tests itself.
#[derive(Debug)]
pub struct SystemOnly {
    space: SimSpace,
    devices: Vec<SimDevice>,
    faults: Mutex<VecDeque<(SpaceId, VirtAddr)>>,
}

impl SystemOnly {
    fn faults(&self) -> std::sync::MutexGuard<'_, VecDeque<(SpaceId, VirtAddr)>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn invalidate(&self, space: SpaceId, range: PageRange) {
        if space == SpaceId::OWN {
            for device in &self.devices {
                device.unmap(range);
            }
        }
    }

    fn mapping(&self, page: PageRange) -> Option<(Permissions, MemoryKind)> {
        let mut found = None;
        let answered = self.space.mappings(page, &mut |mapping| {
            found = Some((mapping.permissions, mapping.kind));
        });
        answered.ok().and(found)
    }
}

/// The page of an address that the simulator made up.
fn page_of(address: VirtAddr) -> PageRange {
    match PageRange::page_of(address) {
        Ok(page) => page,
        Err(error) => panic!("no page at {address}: {error}"),
    }
}

impl EngineUnderTest for SystemOnly {
    fn new(
        _config: &SimConfig,
        space: SimSpace,
        devices: Vec<SimDevice>,
        _clock: SimClock,
    ) -> Self {
        Self {
            space,
            devices,
            faults: Mutex::default(),
        }
    }

    fn read(&self) {
        for event in std::iter::from_fn(|| self.space.read_event()) {
            match event {
                Event::Fault { space, address, .. } => self.faults().push_back((space, address)),
                Event::Remove { space, range } | Event::Unmap { space, range } => {
                    self.invalidate(space, range);
                }
                Event::Remap { space, from, .. } => self.invalidate(space, from),
                Event::Fork { .. } | Event::Exit { .. } => {}
            }
        }
    }

    fn work(&self) -> bool {
        let Some((space, address)) = self.faults().pop_front() else {
            return false;
        };
        let page = page_of(address);
        match self.space.zero_pages(space, page).stop {
            None => self.space.wake(space, page),
            Some(Stop::Again | Stop::NoMemory) => {
                self.faults().push_back((space, address));
                self.space.relax();
            }
            Some(_) => {
                if space == SpaceId::OWN && self.space.capabilities().write_protect {
                    self.space.write_protect(page, false);
                }
                self.space.wake(space, page);
            }
        }
        true
    }

    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        let page = page_of(address);
        let Some((permissions, _)) = self.mapping(page) else {
            return Err(DeviceFaultError::NotMapped { address });
        };
        if !permissions.read {
            return Err(DeviceFaultError::NotMapped { address });
        }
        if access == Access::Write && !permissions.write {
            return Err(DeviceFaultError::ReadOnly { address });
        }
        let device = &self.devices[device.index()];
        if device.is_lost() {
            return Err(DeviceFaultError::DeviceLost);
        }
        if self.space.peek(SpaceId::OWN, page.start()).is_none() {
            if permissions.write {
                if self.space.unshare(page).is_err() {
                    return Ok(Resolution::Retry);
                }
            } else {
                self.space.zero_pages(SpaceId::OWN, page);
                self.space.wake(SpaceId::OWN, page);
                if self.space.peek(SpaceId::OWN, page.start()).is_none() {
                    // Not registered, or an event waits: the hole has no page.
                    let reason = hmm_types::StayReason::Raced;
                    return Err(DeviceFaultError::Unreachable { address, reason });
                }
            }
        }
        match device.map_host(page, page.start(), access) {
            Ok(()) => Ok(Resolution::Mapped),
            Err(_) => Ok(Resolution::Retry),
        }
    }

    fn request(&self, request: Request) {
        match request {
            Request::Migrate(range, _)
            | Request::Prefetch(range, _)
            | Request::Exclusive(range, _) => {
                if self.space.register(range).is_ok() {
                    self.space.relax();
                }
            }
            Request::Evict(range) => {
                self.space.unregister(range);
                self.invalidate(SpaceId::OWN, range);
            }
        }
    }

    fn shutdown(&self) -> bool {
        for device in &self.devices {
            device.unmap(PageRange::span(
                VirtAddr::new(hmm_types::PAGE_SIZE),
                VirtAddr::new(hmm_types::USER_END),
            ));
        }
        for child in 1..=u16::MAX {
            let space = SpaceId::new(child);
            if self.space.is_watched(space) {
                self.space.release(space);
            }
        }
        self.space.unregister(PageRange::span(
            crate::space::ARENA_START,
            crate::space::ARENA_END,
        ));
        true
    }
}
