//! A command of a device names a whole range: its pages are made usable for
//! the device where they are. Nothing moves to the device's memory.

use hmm_hal::{DeviceFaultError, Mapping, Reach, Resolution};
use hmm_mem::Vec;
use hmm_types::{Access, DeviceId, PageCount, PageRange, StayReason, VirtAddr};

use crate::device_fault::Found;
use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::{BOUNCE_PAGES, Executor};
use crate::fault::Hole;
use crate::home::Home;
use crate::upload::Target;

impl Engine<'_> {
    /// Enters the pages of a range into a device's page table: those that the
    /// device has, and, with [`Reach::Present`], all others in place; what is
    /// on another device comes home for that. Returns how many pages from the
    /// start are entered, which may have changed again by then.
    ///
    /// The kernel's `hmm_range_fault()` for a driver that migrates nothing.
    ///
    /// # Errors
    /// [`DeviceFaultError`], when the range holds a page that the device must
    /// not use so. Permissions are looked at before anything else is done.
    pub fn fault_range(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, DeviceFaultError> {
        self.usable(device)?;
        let mappings = self.permitted(range, access)?;
        let mut entered = PageCount::ZERO;
        for mapping in &mappings {
            let target = Target::of(device, mapping);
            let pages = self.fault_mapping(executor, mapping, target, access, reach)?;
            entered += pages;
            if pages < mapping.range.pages() {
                break;
            }
        }
        Ok(entered)
    }

    /// The mappings of a range, all of which must allow an access.
    ///
    /// # Errors
    /// [`DeviceFaultError`]: the first page that does not.
    pub fn permitted(
        &self,
        range: PageRange,
        access: Access,
    ) -> Result<Vec<Mapping>, DeviceFaultError> {
        let mappings = self
            .mappings_of(range)
            .ok_or(DeviceFaultError::Unreachable {
                address: range.start(),
                reason: StayReason::Limit,
            })?;
        let mut next = range.start();
        for mapping in &mappings {
            if next < mapping.range.start() {
                break;
            }
            Self::permits(mapping, next, access)?;
            next = mapping.range.end();
        }
        if next < range.end() {
            return Err(DeviceFaultError::NotMapped { address: next });
        }
        Ok(mappings)
    }

    fn fault_mapping(
        &self,
        executor: &mut Executor,
        mapping: &Mapping,
        target: Target,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, DeviceFaultError> {
        let range = mapping.range;
        let mut at = range.start();
        let mut present = at;
        let mut waits = 0;
        while at < range.end() {
            let page = PageRange::from_pages(at, PageCount::ONE);
            let resolution = match self.map_resident(at, target, access) {
                Found::Mapped => Resolution::Mapped,
                Found::InFlight => Resolution::Retry,
                Found::Lost => return Err(DeviceFaultError::DeviceLost),
                Found::Unshare(page) => self.unshare_frame(executor, page, target)?,
                Found::Away => {
                    let mut rest = PageRange::span(at, range.end());
                    if reach == Reach::Resident {
                        // The CPU has it as well, but it is the device's.
                        match self.coherent_run(rest, target.device) {
                            0 => break,
                            run => rest = rest.slice(0, run),
                        }
                    }
                    if present <= at {
                        // From another device first: without privilege the
                        // kernel cannot have a page fetched that it touches.
                        self.step_home(executor, page, Home::ahead());
                        present = self.make_present(executor, rest, access)?;
                    }
                    if present <= at {
                        Resolution::Retry
                    } else {
                        self.use_in_place(executor, page, target, StayReason::Limit)?
                    }
                }
            };
            if resolution == Resolution::Mapped {
                at = at.plus_pages(1);
                waits = 0;
                continue;
            }
            if waits == BUSY_LIMIT {
                return Err(DeviceFaultError::Unreachable {
                    address: at,
                    reason: StayReason::Busy,
                });
            }
            waits += 1;
            // The page may have been taken away since it was made present.
            present = at;
            self.wait_for_transition();
        }
        Ok(PageCount::new(at.pages_since(range.start())))
    }

    /// Has the kernel make pages of a mapping present: all of them for a write,
    /// as many as the bounce memory has room for otherwise. Returns the end of
    /// what is present; the start when it is to be tried again.
    fn make_present(
        &self,
        executor: &Executor,
        rest: PageRange,
        access: Access,
    ) -> Result<VirtAddr, DeviceFaultError> {
        let from = rest.start();
        match access {
            Access::Write if self.space.unshare(rest).is_ok() => Ok(rest.end()),
            // Perhaps not all of it: then up to where it goes.
            Access::Write => match self.space.unshare(rest.slice(0, 1)) {
                Ok(()) => Ok(from.plus_pages(1)),
                Err(_) => Err(DeviceFaultError::NotMapped { address: from }),
            },
            Access::Read => {
                let part = rest.slice(0, rest.pages().get().min(BOUNCE_PAGES));
                let bounce = executor.bounce(part.pages().get()).start();
                let read = || self.space.read_pages(part, bounce).done.get();
                match read() {
                    // Without privilege the kernel cannot have a hole filled.
                    0 => match self.fill_hole_at(from) {
                        Hole::Filled(pages) => Ok(from.plus_pages(pages)),
                        Hole::Again => Ok(from),
                        // Somebody else may have filled it just now.
                        Hole::None => match read() {
                            0 => Err(DeviceFaultError::NotMapped { address: from }),
                            pages => Ok(from.plus_pages(pages)),
                        },
                    },
                    pages => Ok(from.plus_pages(pages)),
                }
            }
        }
    }
}
