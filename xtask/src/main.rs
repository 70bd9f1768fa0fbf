//! `cargo xtask`: the project's own commands.
#![forbid(unsafe_code)]

mod apt;
mod built;
mod counts;
mod docs;
mod kernel_selftests;
mod lines;
mod log;
mod ordinary_user;
mod packages;
mod process;
mod session;
mod shaders;
mod steps;
mod summary;
mod tables;
mod vm_test;
mod vulkan;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::process::Invocation;
use crate::steps::{Step, TestOptions};
use crate::workspace::Workspace;

/// Seeds of the simulator in a run of the tests.
const TEST_SEEDS: u64 = 10_000;

const EXAMPLES: &str = "\
Examples:
  cargo xtask test                     the whole check; what CI runs
  cargo xtask test --only nextest      one step of it (--only may be repeated)
  cargo xtask test --sim-seeds 200     the same with a short simulation
  cargo xtask docs                     are the documents in step with the code?
  cargo xtask sim --seeds 100000       a long simulation
  cargo xtask sim -- --seed 4711       replay one seed
  cargo xtask bench -- fault_4k_p50    one row of the benchmark
  cargo xtask kernel-selftests         the kernel's own tests, against hmm run
  cargo xtask vm-test --test dax       tests on other kernels, in virtual machines
  eval \"$(cargo xtask vulkan)\"        a Vulkan driver for tests run by hand

Tests need no set-up, and no network beyond what cargo fetches, the source
package of Linux's own tests and Mesa's drivers. They use
cargo-nextest where it is installed, which kills hung tests, and else cargo
test. Some test more as root: fork events and faults inside of system calls.
As root, the library's tests also run as an ordinary user.";

/// Set-up, tests and benchmarks of the project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the whole check; the first failure ends it.
    ///
    /// The last lines of the output are a table of the steps and the number of
    /// tests.
    Test {
        /// Seeds that the simulator runs.
        #[arg(long, value_name = "N", default_value_t = TEST_SEEDS)]
        sim_seeds: u64,
        /// Runs just this step; may be repeated.
        #[arg(long, value_name = "STEP")]
        only: Vec<Step>,
    },
    /// Checks the documents against the code: locks, page states, limits, links.
    Docs,
    /// Runs the simulator: random programs against a byte-array oracle.
    Sim {
        /// Seeds to run.
        #[arg(long, value_name = "N")]
        seeds: Option<u64>,
        /// Passed on to the simulator; see `cargo xtask sim -- --help`.
        #[arg(last = true)]
        rest: Vec<String>,
    },
    /// Runs `hmm bench` in release mode: every row with its floor and target.
    Bench {
        /// Passed on: names of rows, `--json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Runs the kernel's own HMM self-test, unmodified, under `hmm run`.
    ///
    /// The sources come from a Debian package, which is not installed. They and
    /// the tests' output stay below target/kernel-selftests.
    KernelSelftests(kernel_selftests::Options),
    /// Runs tests on other kernels, in virtual machines with persistent memory.
    ///
    /// The kernels are Debian's own: that of Debian 12, and the newest that the
    /// mirror has. QEMU emulates the machine in software, which takes ten times
    /// as long as the real one and needs no KVM. Packages of the guest are
    /// downloaded, not installed. They and the consoles' output stay below
    /// target/vm-test; see docs/virtual-machine.md.
    VmTest(vm_test::Options),
    /// Gets Mesa's lavapipe and what else the Vulkan device's tests need, and
    /// prints the environment in which they find it.
    ///
    /// The driver is unpacked below target/vulkan, not installed. The loader, the
    /// validation layer, glslang and SPIR-V's tools are installed where they are
    /// missing.
    Vulkan,
    /// Compiles all shaders anew, after a change of one; commit what it makes.
    Shaders,
}

fn main() -> ExitCode {
    let workspace = Workspace::find();
    let done = match Arguments::parse().command {
        Command::Test { sim_seeds, only } => {
            return steps::test(&workspace, &TestOptions { sim_seeds, only });
        }
        Command::Docs => docs::check(&workspace).map(|checked| println!("{checked}")),
        Command::Sim { seeds, rest } => {
            let seeds = seeds.map(|seeds| format!("--seeds={seeds}"));
            workspace
                .cargo(["run", "--release", "-p", "hmm-sim", "--"])
                .args(seeds)
                .args(rest)
                .run()
        }
        Command::Bench { rest } => bench(&workspace, rest),
        Command::KernelSelftests(options) => kernel_selftests::run(&workspace, &options),
        Command::VmTest(options) => vm_test::run(&workspace, &options),
        Command::Vulkan => vulkan::run(&workspace),
        Command::Shaders => shaders::make(&workspace),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(workspace: &Workspace, rest: Vec<String>) -> anyhow::Result<()> {
    let hmm: Invocation = workspace.cargo([
        "run",
        "--release",
        "-p",
        "hmm-cli",
        "--bin",
        "hmm",
        "--",
        "bench",
    ]);
    hmm.args(rest).run()
}
