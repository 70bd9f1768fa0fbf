//! Deterministic simulation of everything below the engine, with an oracle.
//!
//! The engine's core runs unchanged on a simulated kernel ([`SimSpace`]),
//! simulated devices ([`SimDevice`]) and a simulated clock. A seed decides
//! everything: what the program does, what the kernel refuses, which copies
//! fail, and who runs when. What each process sees is compared, access by
//! access, with plain arrays of bytes.
//!
//! All of it runs on one thread. Interleavings come from nesting: wherever the
//! engine calls down without a lock, the simulator lets other threads of the
//! program, devices, the reader of events and further requests run before it
//! returns ([`HookPoint`]).
//!
//! | file | what |
//! |---|---|
//! | `memory` | mappings and page table of a process |
//! | `queue` | unread events, stopped threads |
//! | `space`, `resolve` | the engine's calls into the kernel |
//! | `calls` | the program's calls into the kernel |
//! | `frames`, `device` | a device |
//! | `oracle` | what must be seen |
//! | `program` | operations, and how they are chosen |
//! | `engine`, `core_engine` | what is tested: the rules, and `hmm-core` |
//! | `world`, `actor`, `start`, `advance`, `finish` | one run |
//!
//! Not modelled: swap, file contents, memory that processes share, threads of
//! the kernel that touch user memory (`read(2)` into a page), grandchildren,
//! calls that cross a boundary of mappings and that the kernel refuses whole
//! (the simulated calls work page by page).
#![forbid(unsafe_code)]

mod actor;
mod advance;
mod calls;
mod clock;
mod config;
mod core_engine;
mod device;
mod engine;
mod finish;
mod frames;
mod hook;
mod memory;
mod oracle;
mod page;
mod program;
mod queue;
mod resolve;
mod rng;
mod space;
mod start;
mod world;

pub use calls::{ForkAdvice, MapRequest, Refused, Touch};
pub use clock::SimClock;
pub use config::{Rates, SimConfig};
pub use core_engine::CoreEngine;
pub use device::{DeviceCounters, SimDevice};
pub use engine::{EngineUnderTest, Request, SystemOnly};
pub use hook::{Hook, HookPoint};
pub use page::{Payload, SIM_PAGE_BYTES};
pub use program::Op;
pub use queue::Ticket;
pub use rng::SimRng;
pub use space::{ARENA_START, SimSpace};
pub use world::{Failure, Report, run};
