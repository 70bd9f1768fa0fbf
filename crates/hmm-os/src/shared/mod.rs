//! Memory that several processes share, and that leaves and comes home for all
//! of them.
//!
//! A *region* is a memfd that one process, its *owner*, has made; the owner's
//! engine migrates it. Other processes, *peers*, map the memfd, register their
//! mapping with a userfaultfd of their own and hand that to the owner, whose
//! engine serves it as it serves the owner's faults: an address of a peer's
//! becomes the owner's address of the same page, so the core knows of one mapping
//! only.
//!
//! - Pages leave by write protection in every mapping, a copy, and a hole in the
//!   file: from then on no process has them.
//! - They come home by UFFDIO_COPY into the owner's mapping, which puts them into
//!   the page cache for all.
//! - What is there is what the file has, whoever maps it (`SEEK_DATA`): the
//!   owner's page table may not have met a page that a peer has written. A file of
//!   huge pages has all of them from the start, but what the owner has taken out.
//!
//! Nobody tells the owner of a peer's own changes, so a peer must leave its mapping
//! where it is. What the owner does to its own is reported as always.

mod bits;
mod owner;
mod peer;
mod wire;

use std::io;

use hmm_types::{PAGES_PER_BLOCK, PageCount};
use rustix::fs::MemfdFlags;

/// What maps call a region's memfd.
pub(crate) const NAME: &str = "hmm-shared";

pub(crate) use owner::{Regions, peer_key};
pub use owner::{Sharing, unmap};
pub use peer::{AttachError, Attached, attach};

/// What pages a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionPages {
    /// Of 4 KiB.
    Small,
    /// Of 2 MiB, from the kernel's pool of huge pages (hugetlbfs).
    Huge,
}

impl RegionPages {
    /// The size of one, in pages of 4 KiB.
    #[must_use]
    pub fn size(self) -> PageCount {
        match self {
            Self::Small => PageCount::ONE,
            Self::Huge => PageCount::from(PAGES_PER_BLOCK),
        }
    }

    /// What it means that memory of this kind could not be mapped.
    fn explain(self, error: io::Error) -> io::Error {
        match self {
            Self::Huge if error.kind() == io::ErrorKind::OutOfMemory => io::Error::new(
                error.kind(),
                "the kernel's pool has not as many free huge pages; raise /proc/sys/vm/nr_hugepages",
            ),
            _ => error,
        }
    }

    fn memfd_flags(self) -> MemfdFlags {
        match self {
            Self::Small => MemfdFlags::empty(),
            Self::Huge => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        }
    }
}
