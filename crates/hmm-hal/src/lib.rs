//! The boundary of the engine: what it asks of an operating system, a device
//! and a clock.
//!
//! `hmm-core` makes no system call and starts no thread; it calls these traits.
//! The real implementations are `hmm-os` (Linux) and the device back ends
//! (`hmm-soft`, ...); `hmm-sim` implements all of them deterministically.
//!
//! Core validates; an implementation reports only what core cannot foresee.
#![forbid(unsafe_code)]

mod device;
mod event;
mod space;

pub use device::{
    Device, DeviceError, DeviceFaultError, DeviceInfo, FaultHandler, Fence, Reach, Resolution,
    Transfer,
};
pub use event::{Event, FaultKind, SpaceId};
pub use space::{
    AddressSpace, Capabilities, CpuPage, Dropped, Mapping, Presence, Progress, RegisterError,
    SpaceError, StagingLayout, Stop,
};

/// A clock that never goes backwards.
pub trait Clock: Sync {
    /// Nanoseconds since a moment of the implementation's choice.
    fn now_ns(&self) -> u64;
}
