//! The steps of `cargo xtask test`, in order.

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::counts::{Counts, self_skipped};
use crate::process::Invocation;
use crate::summary::{Outcome, Summary};
use crate::vulkan::Driver;
use crate::workspace::Workspace;
use crate::{docs, kernel_selftests, ordinary_user, shaders};

/// What to run.
#[derive(Debug)]
pub struct TestOptions {
    pub sim_seeds: u64,
    /// All steps when empty.
    pub only: Vec<Step>,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Step {
    /// The Rust components that the other steps use.
    Toolchain,
    /// Formatting.
    Fmt,
    /// Lints; warnings are errors.
    Clippy,
    /// API documentation; warnings are errors.
    Doc,
    /// Documents against the code.
    Docs,
    /// Licences, banned crates and sources of dependencies.
    Deny,
    /// A Vulkan driver for the tests that need one.
    Vulkan,
    /// Compiled shaders against their sources.
    Shaders,
    /// All tests, each in a process of its own.
    Nextest,
    /// The examples in the documentation.
    Doctest,
    /// The library's tests as an ordinary user.
    OrdinaryUser,
    /// The simulator.
    Sim,
    /// Model checks of the gate's protocol.
    Shuttle,
    /// The kernel's own HMM self-test under `hmm run`.
    KernelSelftests,
}

impl Step {
    /// The whole check. Other steps run when they are asked for.
    const ALL: [Self; 14] = [
        Self::Toolchain,
        Self::Fmt,
        Self::Clippy,
        Self::Doc,
        Self::Docs,
        Self::Deny,
        Self::Vulkan,
        Self::Shaders,
        Self::Nextest,
        Self::Doctest,
        Self::OrdinaryUser,
        Self::Sim,
        Self::Shuttle,
        Self::KernelSelftests,
    ];

    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What a step says about itself.
#[derive(Debug)]
pub enum Done {
    Passed(String),
    Skipped(String),
}

impl Done {
    fn quietly() -> Self {
        Self::Passed(String::new())
    }
}

/// Runs the steps until one fails, and ends with the summary.
pub fn test(workspace: &Workspace, options: &TestOptions) -> ExitCode {
    let chosen: Vec<Step> = match &options.only[..] {
        [] => Step::ALL.to_vec(),
        only => {
            let known = Step::value_variants().iter().copied();
            known.filter(|step| only.contains(step)).collect()
        }
    };
    let mut summary = Summary::default();
    for (number, &step) in chosen.iter().enumerate() {
        if summary.has_failed() {
            summary.add(step.name(), Outcome::NotRun, std::time::Duration::ZERO);
            continue;
        }
        println!(
            "\n=== {} ({} of {}) ===",
            step.name(),
            number + 1,
            chosen.len()
        );
        let start = Instant::now();
        let outcome = match run(step, workspace, options, &mut summary) {
            Ok(Done::Passed(remark)) => Outcome::Passed(remark),
            Ok(Done::Skipped(reason)) => {
                println!("SKIPPED: {reason}");
                Outcome::Skipped(reason)
            }
            Err(error) => {
                println!("FAILED: {error:#}");
                // The table has room for one line.
                let reason = error.to_string();
                let line = reason.lines().next().unwrap_or_default();
                Outcome::Failed(line.to_owned())
            }
        };
        let time = start.elapsed();
        println!("--- {}: {:.1} s", step.name(), time.as_secs_f64());
        summary.add(step.name(), outcome, time);
    }
    println!("\n=== summary ===\n{summary}");
    if summary.has_failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn run(
    step: Step,
    workspace: &Workspace,
    options: &TestOptions,
    summary: &mut Summary,
) -> Result<Done> {
    match step {
        Step::Toolchain => toolchain(workspace),
        Step::Fmt => plain(workspace.cargo(["fmt", "--all", "--", "--check", "-l"]))
            .context("these files are not formatted; run `cargo fmt --all`"),
        Step::Clippy => plain(workspace.cargo([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])),
        Step::Doc => plain(
            workspace
                .cargo(["doc", "--workspace", "--lib", "--no-deps"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        ),
        Step::Docs => docs::check(workspace).map(Done::Passed),
        Step::Deny => deny(workspace),
        Step::Vulkan => Ok(vulkan(workspace)),
        Step::Shaders => Ok(match shaders::check(workspace)? {
            Ok(checked) => Done::Passed(checked),
            Err(why) => Done::Skipped(why),
        }),
        Step::Nextest => nextest(workspace, summary),
        Step::Doctest => counted(workspace.cargo(["test", "--workspace", "--doc"]), summary),
        Step::OrdinaryUser => as_ordinary_user(workspace, summary),
        Step::Sim => {
            let seeds = options.sim_seeds;
            let jobs = std::thread::available_parallelism().map_or(1, usize::from);
            let simulator = workspace
                .cargo(["run", "--release", "-p", "hmm-sim", "--"])
                .args([format!("--seeds={seeds}"), format!("--jobs={jobs}")]);
            plain(simulator)?;
            Ok(Done::Passed(format!("{seeds} seeds")))
        }
        Step::Shuttle => shuttle(workspace, summary),
        Step::KernelSelftests => kernel_selftests::step(workspace, summary),
    }
}

/// A command that succeeds or fails, and no more.
fn plain(command: Invocation) -> Result<Done> {
    let line = command.line();
    let (success, _) = command.tee()?;
    if !success {
        bail!("`{line}` failed");
    }
    Ok(Done::quietly())
}

/// A command that runs tests, which are counted.
fn counted(command: Invocation, summary: &mut Summary) -> Result<Done> {
    let line = command.line();
    let (success, output) = command.tee()?;
    let counts = Counts::read(&output);
    summary.tests += counts;
    if !success {
        bail!("`{line}` failed ({counts})");
    }
    Ok(Done::Passed(counts.to_string()))
}

/// Has the components installed where rustup can do it.
fn toolchain(workspace: &Workspace) -> Result<Done> {
    let version = |tool| workspace.cargo([tool, "--version"]).quiet();
    let mut found = Vec::new();
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if version(tool).is_none() {
            println!("installing {component}");
            let added = Invocation::new("rustup")
                .args(["component", "add", component])
                .directory(workspace.root())
                .quiet();
            if added.is_none() || version(tool).is_none() {
                bail!("`cargo {tool}` is missing; `rustup component add {component}` brings it");
            }
        }
        found.push(component);
    }
    let compiler = Invocation::new("rustc").args(["--version"]).quiet();
    if let Some(compiler) = compiler {
        found.insert(0, compiler.split(" (").next().unwrap_or("rustc").trim());
        return Ok(Done::Passed(found.join(", ")));
    }
    Ok(Done::Passed(found.join(", ")))
}

fn deny(workspace: &Workspace) -> Result<Done> {
    if workspace.cargo(["deny", "--version"]).quiet().is_none() {
        return Ok(Done::Skipped(
            "cargo-deny is not installed (`cargo install --locked cargo-deny`)".to_owned(),
        ));
    }
    // Not `advisories`: that needs a database from the network.
    plain(workspace.cargo(["deny", "check", "licenses", "bans", "sources"]))
}

/// Where there is no driver to be had the tests that need one skip themselves.
fn vulkan(workspace: &Workspace) -> Done {
    match Driver::provide(workspace) {
        Ok(driver) => Done::Passed(format!("lavapipe of Mesa {}", driver.version())),
        Err(error) => Done::Skipped(format!("{error:#}")),
    }
}

/// The command, with the Vulkan driver for tests in its environment if there is one.
fn with_driver(workspace: &Workspace, command: Invocation) -> Invocation {
    let driver = Driver::existing(workspace);
    let variables = driver.map(|driver| driver.environment());
    let variables = variables.into_iter().flatten();
    variables.fold(command, |command, (name, value)| command.env(name, value))
}

fn nextest(workspace: &Workspace, summary: &mut Summary) -> Result<Done> {
    if workspace.cargo(["nextest", "--version"]).quiet().is_none() {
        println!(
            "cargo-nextest is not installed: using cargo test, which does not kill a hung test\n\
             (`cargo install --locked cargo-nextest`)"
        );
        let done = counted(
            with_driver(
                workspace,
                workspace.cargo(["test", "--workspace", "--all-targets", "--no-fail-fast"]),
            ),
            summary,
        )?;
        return Ok(match done {
            Done::Passed(remark) => Done::Passed(format!("{remark}; by cargo test")),
            skipped @ Done::Skipped(_) => skipped,
        });
    }
    // nextest keeps its reports here, wherever cargo builds.
    let report = workspace.path("target/nextest/default/junit.xml");
    let _ = fs::remove_file(&report);
    let before = summary.tests;
    let done = counted(
        with_driver(
            workspace,
            workspace.cargo(["nextest", "run", "--workspace", "--no-tests=pass"]),
        ),
        summary,
    );
    let junit = fs::read_to_string(&report).unwrap_or_default();
    let skipped = self_skipped(&junit);
    let count = skipped.len() as u64;
    // Such a test passed for nextest, but proved nothing.
    let moved = count.min(summary.tests.passed - before.passed);
    summary.tests.passed -= moved;
    summary.tests.skipped += moved;
    summary.notes.extend(skipped);
    match done? {
        Done::Passed(remark) if count > 0 => Ok(Done::Passed(format!(
            "{remark}; {count} of the passed skipped themselves"
        ))),
        done => Ok(done),
    }
}

fn as_ordinary_user(workspace: &Workspace, summary: &mut Summary) -> Result<Done> {
    if let Some(reason) = ordinary_user::reason_to_skip() {
        return Ok(Done::Skipped(reason));
    }
    let ran = ordinary_user::run(workspace)?;
    summary.tests += ran.tests;
    summary.notes.extend(ran.notes);
    if !ran.failed.is_empty() {
        bail!("failed as an ordinary user: {}", ran.failed.join(", "));
    }
    Ok(Done::Passed(ran.tests.to_string()))
}

/// The gate's protocol under all interleavings that shuttle tries. Built apart:
/// the flag rebuilds everything.
fn shuttle(workspace: &Workspace, summary: &mut Summary) -> Result<Done> {
    const MODEL: &str = "crates/hmm-core/tests/gate_model.rs";
    if !workspace.path(MODEL).exists() {
        return Ok(Done::Skipped(format!("there is no {MODEL}")));
    }
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    if !flags.is_empty() {
        flags.push(' ');
    }
    flags.push_str("--cfg hmm_shuttle");
    let target = workspace.target().join("shuttle");
    let target = target
        .to_str()
        .context("the target directory's name is not text")?;
    counted(
        workspace
            .cargo(["test", "-p", "hmm-core", "--test", "gate_model"])
            .args(["--target-dir", target])
            .env("RUSTFLAGS", flags),
        summary,
    )
}
