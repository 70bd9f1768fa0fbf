//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::bench::ROWS;

/// Heterogeneous memory management in user space: any pointer of a process is
/// valid on any of its devices, and pages move by themselves.
#[derive(Debug, Parser)]
#[command(
    name = "hmm",
    version,
    after_help = "Examples:
  hmm info                     what this machine offers, and what to do about the rest
  hmm demo                     index this program's own executable on a software device
  hmm demo book.txt            the same with a file of yours
  hmm run -- ./hmm-tests       a program with virtual HMM devices
  hmm bench --list             what can be measured
  hmm bench fault_4k_p50       one row of it

`hmm COMMAND --help` tells more about each."
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what this machine offers, and what to do about what is missing
    Info(InfoOptions),
    /// Have a device walk and change a pointer-rich index of a real file
    Demo(DemoOptions),
    /// Run a program with virtual HMM devices, /dev/hmm_dmirror0 to 3
    Run(RunOptions),
    /// Measure the engine against memcpy and the barest userfaultfd handler
    Bench(BenchOptions),
}

/// `hmm info`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hmm info
  hmm info --json | jq '.findings[] | select(.ok | not)'
  hmm info --memory           the memory of this command itself
  hmm info --memory 4711      of a process that you may trace

Exit status: 0 when the engine can be opened, whatever else is missing; 1 when not.
With --memory: 1 when the process cannot be looked at.")]
pub struct InfoOptions {
    /// Show a process's memory instead: what is mapped, how much of it is where, and
    /// what migrates or why not
    #[arg(long, value_name = "PID", num_args = 0..=1)]
    #[allow(clippy::option_option, reason = "the option, and its value")]
    pub memory: Option<Option<u32>>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `hmm demo`
#[derive(Debug, Args)]
#[command(after_help = "What happens:
  The file is cut into pieces. Each different piece becomes a node in ordinary heap
  memory: a Box with its text and its positions in Vecs, and pointers to other nodes.
  Kernels on a device get the raw pointers, walk the lists and change the nodes,
  while a CPU thread looks up and changes nodes as well. Then everything is
  compared, byte for byte, with what the CPU computes alone.

Examples:
  hmm demo
  hmm demo /bin/bash
  hmm demo book.txt --device-memory 4      too little: watch the device evict
  hmm demo --device vulkan                 a compute shader on a GPU, or on lavapipe
  hmm demo --json | jq .pages_to_device

Exit status: 0 when every byte is right; 1 when not, or on an error.")]
pub struct DemoOptions {
    /// The file to index, at most 1 GiB [default: this program's own executable]
    pub file: Option<PathBuf>,
    /// The device: `software`, `vulkan` (the first that can be used), or `vulkan=NAME`
    /// (the first with that in its name)
    #[arg(long, value_name = "DEVICE", default_value = "software")]
    pub device: DeviceKind,
    /// Memory of the device, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub device_memory: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which device is to work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Threads of this process.
    Software,
    /// The first Vulkan device that can be used.
    Vulkan,
    /// The first Vulkan device with this in its name.
    VulkanNamed(String),
}

impl DeviceKind {
    /// Whether it is a Vulkan device.
    pub const fn is_vulkan(&self) -> bool {
        !matches!(self, Self::Software)
    }
}

impl std::str::FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            None if text == "software" => Ok(Self::Software),
            None if text == "vulkan" => Ok(Self::Vulkan),
            Some(("vulkan", name)) if !name.is_empty() => Ok(Self::VulkanNamed(name.to_owned())),
            _ => Err("`software`, `vulkan` or `vulkan=NAME` can be".to_owned()),
        }
    }
}

/// `hmm run`
#[derive(Debug, Args)]
#[command(
    after_help = "The program, unmodified, sees the devices of Linux's HMM test driver (lib/test_hmm.c)
with private memory, and so do the programs that it starts. What it does with them is
done inside of its own process.

Examples:
  hmm run -- ./hmm-tests                       Linux's HMM self-tests
  hmm run --device-memory 64 -- ./program -v   devices of 64 MiB each

Exit status: the program's own; 127 when it cannot be started."
)]
pub struct RunOptions {
    /// Memory of each device, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub device_memory: u64,
    /// When a process ends, print where the time of its migrations went
    #[arg(long)]
    pub report: bool,
    /// The program, and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    pub command: Vec<OsString>,
}

/// `hmm bench`
#[derive(Debug, Args)]
#[command(
    after_help = "Each row is measured several times, and in between what it is compared with (the
floor); medians are shown. A ratio is value / floor, in such a way that the target can
be read: at most for latencies, at least for rates. Benchmarks are no tests: a missed
target shows, but the exit status stays 0. Needs 2 GiB of memory that is free.

Examples:
  hmm bench
  hmm bench to_device_256m to_system_256m
  hmm bench --device vulkan
  hmm bench --json | jq -c 'select(.ok | not)'"
)]
pub struct BenchOptions {
    /// Rows to measure [default: all]
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(ROWS.iter().map(|row| row.name)), hide_possible_values = true)]
    pub names: Vec<String>,
    /// The rows of which device to measure, if none is named: `software` or `vulkan`
    #[arg(long, value_name = "DEVICE", default_value = "software")]
    pub device: DeviceKind,
    /// Print one JSON object per row: name, value, unit, floor, ratio, target, ok
    #[arg(long)]
    pub json: bool,
    /// List the rows, measure nothing
    #[arg(long)]
    pub list: bool,
}
