//! The kernel's own test of its heterogeneous memory management, unmodified,
//! against the devices that `hmm run` gives to a program.

mod harness;
mod huge_page;
mod name;
mod report;
mod runner;
mod sources;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::counts::Counts;
use crate::steps::Done;
use crate::summary::Summary;
use crate::workspace::Workspace;
use harness::{Finished, Outcome};
use huge_page::HugePage;
use name::Name;
use runner::{Ran, Runner};
use sources::Sources;

/// Which tests of which kernel.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// The Debian suite whose kernel sources are taken, such as
    /// bookworm-backports, sid or experimental. Without it: the system's own.
    #[arg(long)]
    suite: Option<String>,
    /// The kind of device memory.
    #[arg(long, value_enum, default_value_t)]
    variant: Variant,
    /// Just this test: `migrate`, or `hmm.migrate`.
    #[arg(long, value_name = "NAME")]
    test: Option<String>,
    /// Keeps the downloaded package beside the sources.
    #[arg(long)]
    keep: bool,
    /// Prints one object for each test.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Variant {
    /// Memory that only the device reaches.
    Private,
    /// Memory that the CPU reaches too.
    Coherent,
    #[default]
    All,
}

impl Options {
    fn mean(&self, name: &Name) -> bool {
        let variant = match self.variant {
            Variant::Private => name.variant() == "private",
            Variant::Coherent => name.variant() == "coherent",
            Variant::All => true,
        };
        variant && (self.test.as_deref()).is_none_or(|given| name.is_meant_by(given))
    }
}

/// `cargo xtask kernel-selftests`
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let sources = Sources::provide(workspace, options.suite.as_deref(), options.keep)
        .context("the kernel's self-test is not to be had")?;
    let counts = finish(workspace, &sources, options)?.1;
    if counts.failed > 0 {
        bail!("{} of the kernel's tests failed", counts.failed);
    }
    Ok(())
}

/// The suite of the whole check: newer kernels test more, and their harness
/// runs each test on its own.
const SUITE: &str = "trixie-backports";
/// Tests that cannot pass; `docs/limits.md` says why.
const CANNOT_PASS: [&str; 1] = ["hmm.migrate_file_private"];

/// The step of `cargo xtask test`: skipped where the sources cannot be had, and
/// for ordinary users, for whom the tests do not start.
pub fn step(workspace: &Workspace, summary: &mut Summary) -> Result<Done> {
    if !rustix::process::geteuid().is_root() {
        let reason = "the tests set a sysctl at their start: run it as root";
        return Ok(Done::Skipped(reason.to_owned()));
    }
    let options = Options {
        variant: Variant::All,
        ..Options::default()
    };
    let sources = match Sources::provide(workspace, Some(SUITE), false) {
        Ok(sources) => sources,
        Err(error) => return Ok(Done::Skipped(format!("{error:#}"))),
    };
    let (mut all, _) = finish(workspace, &sources, &options)?;
    for Ran { test, .. } in &mut all {
        excuse(test)?;
        if let Outcome::Skipped(reason) = &test.outcome {
            summary.notes.push((test.name.to_string(), reason.clone()));
        }
    }
    let counts = report::counts(&all);
    summary.tests += counts;
    let remark = format!("Linux {}: {counts}", sources.version);
    if counts.failed > 0 {
        bail!("{remark}");
    }
    Ok(Done::Passed(remark))
}

/// A test that cannot pass counts as skipped, and must not pass unnoticed.
fn excuse(test: &mut Finished) -> Result<()> {
    if !CANNOT_PASS.contains(&test.name.row().as_str()) {
        return Ok(());
    }
    match test.outcome {
        Outcome::Failed(_) => {
            let reason = "fails: see the limits for the kernel interface that is missing";
            test.outcome = Outcome::Skipped(reason.to_owned());
            Ok(())
        }
        _ => bail!("{} does not fail any more: take it off the list", test.name),
    }
}

/// Runs the tests and says what became of them.
fn finish(
    workspace: &Workspace,
    sources: &Sources,
    options: &Options,
) -> Result<(Vec<Ran>, Counts)> {
    eprintln!("the tests of Linux {}", sources.version);
    let binary = sources.build()?;
    let runner = Runner::new(workspace, binary, sources.logs())?;
    let page = HugePage::provide();
    let all = runner.run(|name| options.mean(name))?;
    drop(page);
    let counts = report::counts(&all);
    if options.json {
        for ran in &all {
            println!("{}", report::object(&sources.version, ran));
        }
        eprintln!("{counts}");
    } else {
        println!("\n{}", report::text(&all));
        println!("output of the tests: {}", sources.logs().display());
        println!("{counts}");
    }
    Ok((all, counts))
}
