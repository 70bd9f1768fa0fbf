//! The state of one page, packed into eight bytes.
//!
//! ```text
//!  63  52    51       50      49     48    47  44 43  40 39     32 31            0
//! +------+--------+--------+------+------+------+-------+---------+---------------+
//! |      |refilled|coherent|doomed|parked|      | state | device  | frame or page |
//! +------+--------+--------+------+------+------+-------+---------+---------------+
//! ```
//!
//! A page *in flight* is owned by the executor that set the state: nobody else
//! changes it. Others leave a mark: `parked` (a CPU thread waits for the end),
//! `doomed` (the program removed the page meanwhile, so the end is to drop it),
//! `refilled` (and has got another one in its place, which is the program's).
//! A page that rests with the CPU may be *coherent*: in a device's memory that the
//! CPU uses in place; then the entry has that device.

use hmm_types::{DeviceId, FrameId};

use crate::staging::StagingPage;

/// Where a page's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// System memory, swap, or nothing: what the CPU's page table says.
    System,
    /// The program has dropped the page. The kernel announces that before it
    /// does it, so a page that is still present here must not be taken.
    Discarded,
    /// A frame of a device.
    Device { device: DeviceId, frame: FrameId },
    /// A staging page: taken from the CPU for a device's exclusive use, or
    /// stranded there when the way back was blocked too often.
    Staged { device: DeviceId, page: StagingPage },

    /// In flight to a device, still in place and write-protected: where pages
    /// cannot be moved they are copied, then dropped. `data`: there was a page when
    /// it was claimed, and no hole.
    Copying { data: bool },
    /// The same page, copied to a frame; the engine is about to drop it and the
    /// kernel will report that.
    Dropping { device: DeviceId, frame: FrameId },
    /// The same page; the kernel has reported one drop, which is the engine's.
    Dropped { device: DeviceId, frame: FrameId },
    /// In flight to a device; the data is in a staging page, or is all zeros.
    Uploading { source: Option<StagingPage> },
    /// In flight to system memory; the frame stays the owner until the end.
    Downloading { device: DeviceId, frame: FrameId },
    /// In flight to another device; the frame stays the owner until the end.
    Transferring { device: DeviceId, frame: FrameId },
}

impl PageState {
    /// Whether an executor owns the page.
    pub(crate) const fn in_flight(self) -> bool {
        matches!(
            self,
            Self::Copying { .. }
                | Self::Dropping { .. }
                | Self::Dropped { .. }
                | Self::Uploading { .. }
                | Self::Downloading { .. }
                | Self::Transferring { .. }
        )
    }

    /// The state of a page that is so many behind the one whose state this is, and
    /// so are its frames.
    pub(crate) fn of_page(self, offset: u32) -> Self {
        let behind = |frame: FrameId| FrameId::new(frame.get() + offset);
        match self {
            Self::Device { device, frame } => Self::Device {
                device,
                frame: behind(frame),
            },
            Self::Dropping { device, frame } => Self::Dropping {
                device,
                frame: behind(frame),
            },
            Self::Dropped { device, frame } => Self::Dropped {
                device,
                frame: behind(frame),
            },
            Self::Downloading { device, frame } => Self::Downloading {
                device,
                frame: behind(frame),
            },
            Self::Transferring { device, frame } => Self::Transferring {
                device,
                frame: behind(frame),
            },
            other => other,
        }
    }

    /// The device that has the page, or is about to lose it.
    pub(crate) const fn device(self) -> Option<DeviceId> {
        match self {
            Self::Device { device, .. }
            | Self::Staged { device, .. }
            | Self::Dropping { device, .. }
            | Self::Dropped { device, .. }
            | Self::Downloading { device, .. }
            | Self::Transferring { device, .. } => Some(device),
            Self::System | Self::Discarded | Self::Copying { .. } | Self::Uploading { .. } => None,
        }
    }

    /// Whether the page rests away from the CPU.
    pub(crate) const fn is_away(self) -> bool {
        matches!(self, Self::Device { .. } | Self::Staged { .. })
    }
}

/// A page's state with its marks, as the block's table holds it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageEntry(u64);

const STATE_SHIFT: u32 = 40;
const DEVICE_SHIFT: u32 = 32;
const PARKED: u64 = 1 << 48;
const DOOMED: u64 = 1 << 49;
const COHERENT: u64 = 1 << 50;
const REFILLED: u64 = 1 << 51;
const NO_PAGE: u32 = u32::MAX;

impl PageEntry {
    /// A page the engine has not touched.
    pub(crate) const SYSTEM: Self = Self(0);

    /// The state without any mark.
    pub(crate) const fn new(state: PageState) -> Self {
        let (tag, device, index): (u64, usize, u32) = match state {
            PageState::System => (0, 0, 0),
            PageState::Discarded => (1, 0, 0),
            PageState::Device { device, frame } => (2, device.index(), frame.get()),
            PageState::Staged { device, page } => (3, device.index(), page.get()),
            PageState::Copying { data } => (4, 0, if data { 1 } else { 0 }),
            PageState::Uploading { source: Some(page) } => (5, 0, page.get()),
            PageState::Uploading { source: None } => (5, 0, NO_PAGE),
            PageState::Downloading { device, frame } => (6, device.index(), frame.get()),
            PageState::Transferring { device, frame } => (7, device.index(), frame.get()),
            PageState::Dropping { device, frame } => (8, device.index(), frame.get()),
            PageState::Dropped { device, frame } => (9, device.index(), frame.get()),
        };
        Self(tag << STATE_SHIFT | (device as u64) << DEVICE_SHIFT | index as u64)
    }

    pub(crate) fn state(self) -> PageState {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the low half of the entry is the index by construction"
        )]
        let index = self.0 as u32;
        let device = || DeviceId::new(((self.0 >> DEVICE_SHIFT) & 0xff) as usize);
        let frame = FrameId::new(index);
        match (self.0 >> STATE_SHIFT) & 0xf {
            0 => PageState::System,
            1 => PageState::Discarded,
            2 => PageState::Device {
                device: device(),
                frame,
            },
            3 => PageState::Staged {
                device: device(),
                page: StagingPage::new(index),
            },
            4 => PageState::Copying { data: index != 0 },
            5 => PageState::Uploading {
                source: (index != NO_PAGE).then(|| StagingPage::new(index)),
            },
            6 => PageState::Downloading {
                device: device(),
                frame,
            },
            7 => PageState::Transferring {
                device: device(),
                frame,
            },
            8 => PageState::Dropping {
                device: device(),
                frame,
            },
            9 => PageState::Dropped {
                device: device(),
                frame,
            },
            tag => unreachable!("page entry with state {tag}"),
        }
    }

    /// A CPU thread waits for the page.
    pub(crate) const fn parked(self) -> bool {
        self.0 & PARKED != 0
    }

    /// The program removed the page while it was in flight.
    pub(crate) const fn doomed(self) -> bool {
        self.0 & DOOMED != 0
    }

    /// The device in whose coherent memory the page is.
    pub(crate) fn coherent(self) -> Option<DeviceId> {
        (self.0 & COHERENT != 0).then(|| DeviceId::new(((self.0 >> DEVICE_SHIFT) & 0xff) as usize))
    }

    /// The same page, which rests with the CPU, in a device's coherent memory or
    /// in none.
    pub(crate) fn with_coherent(self, device: Option<DeviceId>) -> Self {
        let state = self.state();
        assert!(
            state == PageState::System,
            "a page that is {state:?} cannot be coherent"
        );
        let Self(plain) = Self::new(state);
        Self(device.map_or(plain, |device| {
            plain | COHERENT | (device.index() as u64) << DEVICE_SHIFT
        }))
    }

    pub(crate) const fn park(&mut self) {
        self.0 |= PARKED;
    }

    /// The program is about to remove the page.
    pub(crate) const fn doom(&mut self) {
        self.0 = self.0 & !REFILLED | DOOMED;
    }

    /// The program has removed the page, and has zeros in its place now.
    pub(crate) const fn refill(&mut self) {
        self.0 |= DOOMED | REFILLED;
    }

    /// The page is doomed, but nothing that is there now is to be dropped.
    pub(crate) const fn refilled(self) -> bool {
        self.0 & REFILLED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_survives_packing() {
        let device = DeviceId::new(15);
        for index in [0, 1, 77, u32::MAX - 1] {
            let frame = FrameId::new(index);
            let page = StagingPage::new(index);
            for state in [
                PageState::System,
                PageState::Discarded,
                PageState::Device { device, frame },
                PageState::Staged { device, page },
                PageState::Copying { data: true },
                PageState::Copying { data: false },
                PageState::Dropping { device, frame },
                PageState::Dropped { device, frame },
                PageState::Uploading { source: None },
                PageState::Uploading { source: Some(page) },
                PageState::Downloading { device, frame },
                PageState::Transferring { device, frame },
            ] {
                let mut entry = PageEntry::new(state);
                assert_eq!(entry.state(), state);
                assert!(!entry.parked() && !entry.doomed());
                entry.park();
                entry.doom();
                assert_eq!(entry.state(), state);
                assert!(entry.parked() && entry.doomed());
                entry.refill();
                assert_eq!(entry.state(), state);
                assert!(entry.doomed() && entry.refilled());
                entry.doom();
                assert!(entry.doomed() && !entry.refilled());
            }
        }
    }
}
