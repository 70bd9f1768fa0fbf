//! The Vulkan device: any GPU with a Vulkan 1.2 driver that has buffer device addresses,
//! and, without one, Mesa's lavapipe on the CPU.
//!
//! It has memory that pages migrate to ([`hmm_hal::Device`]), a page table that kernels
//! walk themselves, as Vulkan has no page faults, a copy queue, and launches that serve
//! the misses of kernels through the engine. Kernels are SPIR-V that was instrumented to
//! keep to the contract in `docs/vulkan.md`; this crate takes them as words with a few
//! facts about them ([`KernelCode`]).
//!
//! ```no_run
//! use hmm_hal::Device;
//! use hmm_types::ByteCount;
//! use hmm_vulkan::{VulkanConfig, VulkanDevice};
//!
//! let device = VulkanDevice::open(VulkanConfig::new(ByteCount::mib(256)))?;
//! println!("{} of {}", device.info().memory, device.describe().name);
//! device.close();
//! # Ok::<(), hmm_vulkan::VulkanError>(())
//! ```
//!
//! # What the engine must do for it
//! As for every device: never migrate its memory, and its threads' stacks. And not what
//! its driver has allocated: see [`VulkanStats::shares_heap`].
//!
//! # Limits
//! One launch at a time. Memory is one allocation, whose size drivers limit (lavapipe:
//! 2 GiB). Where the device is not the CPU, copies go through staging memory.

mod alias;
mod area;
mod buffer;
mod chunks;
mod config;
mod control;
mod device;
mod dispatch;
mod driver;
mod error;
mod fatal;
mod footprint;
mod gate;
mod gpu;
mod held;
mod identity;
mod imports;
mod instance;
mod kernel;
mod launch;
mod loaded;
mod log;
mod memory;
mod open;
mod physical;
mod pool;
mod program;
mod queue;
mod rounds;
mod servers;
mod staging;
mod stall;
mod stats;
mod table;
mod window;

pub use config::{Copies, MAX_KERNELS, MAX_LEAVES, MAX_LOG_ENTRIES, VulkanConfig};
pub use device::{POISON, VulkanDevice};
pub use error::{ImportFailure, KernelError, LaunchError, VulkanError};
pub use identity::AddressPolicy;
pub use imports::MAX_IMPORTS;
pub use instance::validation_complaints;
pub use kernel::{Kernel, KernelCode, Variant};
pub use launch::RETRY_TIME;
pub use physical::{Choice, Description, list};
pub use program::{Demand, Program, ProgramOptions};
pub use stats::{LaunchReport, VulkanStats};
