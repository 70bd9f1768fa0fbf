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
//!   owner's page table may not have met a page that a peer has written.
//!
//! Nobody tells the owner of a peer's own changes, so a peer must leave its mapping
//! where it is. What the owner does to its own is reported as always.

mod owner;
mod peer;
mod wire;

/// What maps call a region's memfd.
pub(crate) const NAME: &str = "hmm-shared";

pub(crate) use owner::{Regions, peer_key};
pub use owner::{Sharing, unmap};
pub use peer::{AttachError, Attached, attach};
