//! What device back ends share.
//!
//! A back end brings its memory, its page table and its queue. How free frames are
//! kept ([`FrameAllocator`]), how the CPU copies ([`Copier`]), who starts its threads
//! and keeps its memory where it is ([`Embedder`], [`Reservation`]), and how it fails,
//! on demand ([`Injector`]) or late ([`LateFailures`]), is the same for all of them. Nothing here calls the engine, and
//! nothing but starting a thread uses the process heap.

mod copy;
mod count;
mod embedder;
mod faults;
mod frames;
mod late;
mod reservation;
mod threads;

pub use copy::{Copier, read_ahead};
pub use count::Count;
pub use embedder::{Embedder, Join, Standalone};
pub use faults::{FailAt, Injector, LossMode};
pub use frames::FrameAllocator;
pub use late::LateFailures;
pub use reservation::{Reservation, ReservationError};
pub use threads::{AbortOnUnwind, block_signals};
