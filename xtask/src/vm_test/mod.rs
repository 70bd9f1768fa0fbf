//! The tests on stock kernels of Debian, old and new, in virtual machines that
//! have persistent memory.

mod archive;
mod guest;
mod kernel;
mod machine;
mod packages;
mod plan;
mod reader;
mod report;
mod tools;

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::workspace::Workspace;
use kernel::{Kernel, Which};
use machine::{Machine, Run};
use plan::Plan;
use reader::News;
use tools::Tools;

/// Which kernels and tests.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The kernel that runs.
    #[arg(long, value_enum, default_value_t = Choice::All)]
    kernel: Choice,
    /// Just tests with this in their name: `dax`, `basic a_round_trip`.
    #[arg(long, value_name = "WORD")]
    test: Option<String>,
    /// Keeps the downloaded packages and the guest's files, and prints the
    /// command that starts the guest again.
    #[arg(long)]
    keep: bool,
    /// What a guest may take in all.
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// Debian 12's own, Linux 6.1.
    Bookworm,
    /// The newest that the mirror of Debian has.
    Newest,
    All,
}

impl Choice {
    fn kernels(self) -> &'static [Which] {
        match self {
            Self::Bookworm => &[Which::Bookworm],
            Self::Newest => &[Which::Newest],
            Self::All => &[Which::Bookworm, Which::Newest],
        }
    }
}

/// `cargo xtask vm-test`
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    if let Err(error) = crate::packages::QEMU.provide() {
        println!("SKIPPED: {error:#}\n0 passed, 0 failed, 1 skipped");
        return Ok(());
    }
    let place = workspace.target().join("vm-test");
    let lists = place.join("apt");
    let tools = Tools::provide(&place.join("tools"), &lists, options.keep)
        .context("the guest's tools are not to be had")?;
    let plan = Plan::new(workspace, options.test.as_deref())?;
    let mut machines = Vec::new();
    for &which in options.kernel.kernels() {
        let kernel = Kernel::provide(which, &place.join("kernels"), &lists, options.keep)
            .context("the kernel is not to be had")?;
        let machine = Machine::new(&kernel, &place.join(&kernel.version))?;
        guest::write(machine.files(), &kernel, &tools, &plan)?;
        machines.push(machine);
    }
    let runs = run_all(&machines, options)?;
    finish(&runs, &plan)
}

/// Runs the machines side by side: each has one thread that works.
fn run_all(machines: &[Machine], options: &Options) -> Result<Vec<Run>> {
    let limit = Duration::from_secs(options.timeout);
    let runs = thread::scope(|scope| {
        let start = |machine: &Machine| machine.run(limit, |news| tell(&machine.version, news));
        let threads: Vec<_> = machines
            .iter()
            .map(|machine| scope.spawn(move || start(machine)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a machine's thread does not panic"))
            .collect()
    });
    for machine in machines {
        if options.keep {
            println!("$ {}", machine.words().join(" "));
        } else {
            machine.clear();
        }
    }
    runs
}

fn tell(version: &str, news: &News) {
    match news {
        News::Booted(kernel) => println!("{version}: {kernel} has booted"),
        News::Shown(line) => println!("{version}: {line}"),
        News::Broken(what) => println!("{version}: broken: {what}"),
        News::Ended(ran) => println!("{}", report::line(version, ran)),
        News::Begun | News::Done => {}
    }
}

fn finish(runs: &[Run], plan: &Plan) -> Result<()> {
    println!("\n{}", report::text(runs));
    for run in runs {
        println!(
            "Linux {}: booted in {:.0} s, {:.0} s in all; console: {}",
            run.version,
            run.boot.as_secs_f64(),
            run.time.as_secs_f64(),
            run.log.display()
        );
        let left = plan.tests.len() - run.tests.len();
        if left > 0 {
            println!("Linux {}: {left} tests did not run", run.version);
        }
    }
    if !plan.left_out.is_empty() {
        println!("left out: {}", plan.left_out.join("; "));
    }
    let counts = report::counts(runs);
    println!("{counts}");
    if counts.failed > 0 {
        bail!("{} tests failed in the virtual machines", counts.failed);
    }
    Ok(())
}
