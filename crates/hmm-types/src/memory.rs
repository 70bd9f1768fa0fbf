//! What memory is, what may be done with it, and where it lives.

use std::fmt;

use crate::DeviceId;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or a read-modify-write.
    Write,
}

/// What a mapping allows, as mprotect set it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Permissions {
    /// Loads are allowed.
    pub read: bool,
    /// Stores are allowed.
    pub write: bool,
    /// Instructions may be fetched.
    pub execute: bool,
}

impl Permissions {
    /// Loads and stores.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
        execute: false,
    };

    /// Whether the mapping allows the access.
    #[must_use]
    pub const fn allow(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
        }
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |on, letter| if on { letter } else { '-' };
        write!(
            f,
            "{}{}{}",
            bit(self.read, 'r'),
            bit(self.write, 'w'),
            bit(self.execute, 'x')
        )
    }
}

/// What backs a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Private anonymous memory: heap, stacks, `mmap(MAP_PRIVATE | MAP_ANONYMOUS)`.
    PrivateAnonymous,
    /// A file, mapped privately or shared.
    File,
    /// Shared anonymous memory, memfd or tmpfs.
    Shared,
    /// hugetlbfs pages.
    HugeTlb,
    /// Device files, vdso and other special mappings.
    Special,
}

/// Where a page lives, as a snapshot of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageResidency {
    /// System memory, or not there yet: the engine has not touched the page.
    System,
    /// The device's memory.
    Device(DeviceId),
    /// A device's memory that the CPU uses in place.
    Coherent(DeviceId),
    /// Taken from the CPU for a device's atomics; the next CPU touch revokes it.
    Exclusive(DeviceId),
    /// Between two places at the moment of the snapshot.
    InFlight,
}
