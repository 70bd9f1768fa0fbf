//! The software device: a device back end that is always there.
//!
//! It has what a real one has, in software: memory that the program cannot name
//! ([`SoftDevice::range`] tells the engine where), a page table that says which
//! frame holds a page, worker threads that run kernels and fault into the
//! engine, a copy queue with fences, and unmapping that waits for accesses
//! under way. On top it fails on demand ([`Injector`]).
//!
//! ```
//! use hmm_hal::{Device, DeviceFaultError, FaultHandler, Resolution};
//! use hmm_soft::{Pointer, SoftConfig, SoftDevice};
//! use hmm_types::{Access, ByteCount, DeviceId, PageRange, VirtAddr};
//!
//! /// An engine that lets the device use system memory in place.
//! #[derive(Debug)]
//! struct InPlace(&'static SoftDevice);
//!
//! impl FaultHandler for InPlace {
//!     fn device_fault(
//!         &self,
//!         _device: DeviceId,
//!         address: VirtAddr,
//!         access: Access,
//!     ) -> Result<Resolution, DeviceFaultError> {
//!         let not_mapped = DeviceFaultError::NotMapped { address };
//!         let page = PageRange::page_of(address).map_err(|_| not_mapped)?;
//!         self.0.map_host(page, page.start(), access).map_err(|_| not_mapped)?;
//!         Ok(Resolution::Mapped)
//!     }
//!
//!     fn wait_for_progress(&self) {}
//! }
//!
//! let device = SoftDevice::open(SoftConfig::new(ByteCount::mib(4)))?;
//! device.attach(DeviceId::new(0), hmm_mem::leaked(InPlace(device)))?;
//! let mut numbers = vec![1u64; 1000];
//! let first = Pointer::new(numbers.as_mut_ptr());
//! let report = device.launch(1000, |context, index| {
//!     let value = context.load(first.at(index))?;
//!     context.store(first.at(index), value + index as u64)
//! })?;
//! assert_eq!(report.groups, 1000);
//! assert!(numbers.iter().enumerate().all(|(index, &number)| number == index as u64 + 1));
//! device.close();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What the engine must do for it
//! It must never migrate the device's memory and the stacks of its threads (see
//! [`Embedder`]): a worker that faulted on its own stack in an access section
//! would have the engine wait for itself.
//!
//! # Limits
//! Memory up to 2 TiB, up to [`MAX_WORKERS`] workers, one kernel at a time. A
//! kernel cannot launch kernels on its own device. Kernels are threads of this
//! process: they touch memory that they do not reach through their [`Context`]
//! as CPU threads do, faults and all.

mod atomics;
mod config;
mod context;
mod device;
mod error;
mod guard;
mod helper;
mod launch;
mod memory;
mod page_table;
mod plain;
mod pointer;
mod queue;
mod range_access;
mod shootdown;
mod stats;
mod tlb;
mod worker;

pub use config::{MAX_WORKERS, SoftConfig};
pub use context::{Context, RETRY_LIMIT, RETRY_TIME, THRASH_LIMIT};
pub use device::{POISON, SoftDevice};
pub use error::{KernelError, LaunchError, SoftError};
pub use hmm_device::{Embedder, FailAt, Injector, Join, LossMode, Standalone};
pub use launch::LaunchReport;
pub use memory::MAX_FRAMES;
pub use plain::{AtomicWord, Plain};
pub use pointer::Pointer;
pub use stats::SoftStats;
