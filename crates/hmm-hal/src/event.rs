//! What an address space reports.

use std::fmt;

use hmm_types::{Access, PageRange, VirtAddr};

/// One address space that the engine serves: the process's own, or that of a
/// forked child whose pages it still holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(u16);

impl SpaceId {
    /// The process that the engine lives in.
    pub const OWN: Self = Self(0);

    /// The space with this number; 0 is [`SpaceId::OWN`].
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::OWN {
            f.write_str("own space")
        } else {
            write!(f, "child space {}", self.0)
        }
    }
}

/// Why a CPU thread stopped at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Nothing is mapped at the page.
    Missing,
    /// The page is there, but write-protected by the engine.
    WriteProtected,
}

/// One message of the kernel about a registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A CPU thread waits for a page.
    Fault {
        /// Whose thread.
        space: SpaceId,
        /// The address it touched.
        address: VirtAddr,
        /// What stopped it.
        kind: FaultKind,
        /// What it wants to do.
        access: Access,
        /// The kernel's number of the thread; 0 where it does not tell.
        thread: u32,
    },
    /// `parent` forked; `child` sees its memory as it was at that moment, and
    /// the pages that were not in system memory are to be served by the engine.
    Fork {
        /// The space that was copied.
        parent: SpaceId,
        /// The copy.
        child: SpaceId,
    },
    /// mremap(2) moved a range, pages and all.
    Remap {
        /// Whose mapping.
        space: SpaceId,
        /// Where it was.
        from: PageRange,
        /// Where it is now; as long as before.
        to: VirtAddr,
    },
    /// madvise(2) is about to drop the pages of a range (the kernel sends this
    /// *before* it drops them); the mapping stays.
    Remove {
        /// Whose pages.
        space: SpaceId,
        /// Which.
        range: PageRange,
    },
    /// The range is not mapped any more.
    Unmap {
        /// Whose mapping.
        space: SpaceId,
        /// Which range.
        range: PageRange,
    },
    /// The space is gone: its process exited or called exec.
    Exit {
        /// Which space.
        space: SpaceId,
    },
}
