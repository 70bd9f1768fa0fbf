//! What the engine is measured against, and on: memory of the benchmarks' own,
//! processors to stay on, and the barest handler of user faults that can be.
//!
//! This is the only module of the crate with unsafe code. Its interface is
//! safe: memory belongs to an [`Area`] for its whole life, and a range that is
//! registered with the bare handler is served by it, or let go, before anyone
//! gets it back.

mod abi;
mod area;
mod cpu;
mod handler;

pub use area::Area;
pub use cpu::{allowed_cpus, stay_on};
pub use handler::{BareHandler, Placement};
