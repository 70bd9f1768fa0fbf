//! Names of devices and of their memory.

use std::fmt;

use crate::PageCount;

/// Devices that one engine can have at a time.
pub const MAX_DEVICES: usize = 16;

/// A device of the engine: an index below [`MAX_DEVICES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(u8);

impl DeviceId {
    /// The device in slot `index`.
    ///
    /// # Panics
    /// When `index` is not below [`MAX_DEVICES`].
    #[must_use]
    pub const fn new(index: usize) -> Self {
        assert!(index < MAX_DEVICES, "device index out of bounds");
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the line above bounds the index to MAX_DEVICES"
        )]
        let id = Self(index as u8);
        id
    }

    /// The slot's index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev{}", self.0)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A 4 KiB page of a device's memory, by its number: 32 bits of them are
/// 16 TiB a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId(u32);

impl FrameId {
    /// The frame with this number.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for FrameId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {}", self.0)
    }
}

/// A run of neighbouring frames of one device; never empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameRange {
    first: FrameId,
    count: u32,
}

impl FrameRange {
    /// `count` frames from `first`.
    ///
    /// # Panics
    /// When `count` is zero or the last frame's number overflows.
    #[must_use]
    pub const fn new(first: FrameId, count: u32) -> Self {
        assert!(count > 0, "a run of frames is never empty");
        assert!(
            first.0.checked_add(count).is_some(),
            "frame number overflow"
        );
        Self { first, count }
    }

    /// The first frame.
    #[must_use]
    pub const fn first(self) -> FrameId {
        self.first
    }

    /// Number of frames; never zero.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// The same as a number of pages.
    #[must_use]
    pub const fn pages(self) -> PageCount {
        PageCount::new(self.count as u64)
    }

    /// The frame with index `index` in the run.
    ///
    /// # Panics
    /// When the run has no such frame.
    #[must_use]
    pub const fn frame(self, index: u32) -> FrameId {
        assert!(index < self.count, "frame index out of the run");
        FrameId(self.first.0 + index)
    }

    /// `count` frames from the one with index `first`.
    ///
    /// # Panics
    /// When they do not lie in the run, or are none.
    #[must_use]
    pub const fn slice(self, first: u32, count: u32) -> Self {
        assert!(
            first <= self.count && count <= self.count - first,
            "slice reaches out of the run"
        );
        Self::new(FrameId(self.first.0 + first), count)
    }

    /// The frames in order.
    pub fn iter(self) -> impl Iterator<Item = FrameId> {
        (0..self.count).map(move |index| self.frame(index))
    }
}

impl fmt::Debug for FrameRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frames {}+{}", self.first.0, self.count)
    }
}
