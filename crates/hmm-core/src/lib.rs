//! The engine: where every page of a registered range lives, and how it gets
//! from one place to another.
//!
//! # The way of a CPU fault
//! 1. [`Engine::pump`] takes the gate for writing and reads the events that the
//!    kernel has queued (`events.rs`). Structural ones are applied at once,
//!    faults are queued for the reading thread itself.
//! 2. [`Engine::serve`] takes the faults one by one (`fault.rs`): block and page
//!    state say where the data is.
//! 3. A page on a device is brought home (`home.rs`): unmapped from the device,
//!    copied with no lock held, put in place and committed; or copied straight from
//!    the device's memory, if the CPU can read that (`direct.rs`).
//!
//! # Modules
//! | module | noun |
//! |---|---|
//! | `page` | the state of one page, packed into eight bytes |
//! | `map` | addresses to blocks: what the gate protects |
//! | `staging` | the pool of recycled staging pages |
//! | `devices` | the devices and who shares their frames |
//! | `events`, `children` | structural events; what forked children still need |
//! | `fault`, `home`, `direct` | a CPU touch; device memory to system memory; the same without a flight |
//! | `upload`, `fallback`, `transfer` | system memory to a device: by moving pages; by write-protecting them; between devices |
//! | `migrate`, `evict` | requests and their reports; making room |
//! | `device_fault`, `device_range` | a device's touch; a device's command on a range |
//! | `mirror` | notifiers, snapshots and range faults |
//! | `coherent` | device memory that the CPU uses in place |
//! | `readahead`, `ahead` | how much to bring along; what of it is still to be brought |
//! | `watch` | registering memory |
//! | `order` | events that come in another order than the changes |
//!
//! The core makes no system call, starts no thread and reads no clock; it calls
//! `hmm-hal`. It keeps everything in engine memory (`hmm-mem`).
#![forbid(unsafe_code)]

mod ahead;
mod arrivals;
mod children;
mod coherent;
mod device_fault;
mod device_range;
mod devices;
mod direct;
mod engine;
mod events;
mod evict;
mod executor;
mod fallback;
mod fault;
mod gigantic;
mod gigantic_home;
mod gigantic_out;
mod home;
mod hugetlb;
mod map;
mod migrate;
mod mirror;
mod order;
mod page;
mod readahead;
mod report;
mod staging;
mod stats;
mod transfer;
mod upload;
mod watch;

pub use engine::{AddDeviceError, Engine, Settings};
pub use executor::{BOUNCE_PAGES, Executor, Relief};
pub use mirror::{MirrorEntry, Notifier, NotifierId, Sequence};
pub use report::{Destination, MigrationReport, Stayed};
pub use stats::{LATENCY_BUCKETS, LatencyHistogram, Statistics, StatsSnapshot};
