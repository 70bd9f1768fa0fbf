//! The kernel's own test of its heterogeneous memory management, unmodified,
//! against the devices that `hmm run` gives to a program.

mod apt;
mod harness;
mod huge_page;
mod lines;
mod log;
mod name;
mod report;
mod runner;
mod session;
mod sources;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::counts::Counts;
use crate::steps::Done;
use crate::summary::Summary;
use crate::workspace::Workspace;
use harness::Outcome;
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

/// The step of `cargo xtask test`: skipped where the sources cannot be had.
pub fn step(workspace: &Workspace, summary: &mut Summary) -> Result<Done> {
    let options = Options::default();
    let sources = match Sources::provide(workspace, None, false) {
        Ok(sources) => sources,
        Err(error) => return Ok(Done::Skipped(format!("{error:#}"))),
    };
    let (all, counts) = finish(workspace, &sources, &options)?;
    summary.tests += counts;
    for Ran { test, .. } in all {
        if let Outcome::Skipped(reason) = test.outcome {
            summary.notes.push((test.name.to_string(), reason));
        }
    }
    let remark = format!("Linux {}: {counts}", sources.version);
    if counts.failed > 0 {
        bail!("{remark}");
    }
    Ok(Done::Passed(remark))
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
