//! Units and identifiers that every other crate speaks in.
//!
//! Addresses, page counts and byte counts are types of their own, so that a
//! count of pages cannot be passed where bytes are meant; arithmetic on them
//! is checked. A [`PageRange`] is always made of whole pages of user-space
//! addresses: a value of that type never needs to be validated again.
#![forbid(unsafe_code)]

mod ids;
mod memory;
mod range;
mod reason;
mod units;

pub use ids::{DeviceId, FrameId, FrameRange, MAX_DEVICES};
pub use memory::{Access, MemoryKind, PageResidency, Permissions};
pub use range::{BlockSpans, PageRange, RangeError};
pub use reason::StayReason;
pub use units::{
    BLOCK_PAGES, BLOCK_SIZE, ByteCount, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BLOCK, PageCount,
    USER_END, VirtAddr,
};
