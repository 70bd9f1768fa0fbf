//! Runs programs on the simulated machine until one goes wrong.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use hmm_sim::{Failure, Report, SimConfig, CoreEngine, run};

/// Lines of the log that a failure shows without --verbose.
const LOG_TAIL_LINES: usize = 60;
/// Seeds between two lines of progress.
const PROGRESS_SEEDS: u64 = 500;

/// Deterministic simulation of the engine: random programs against an oracle.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Number of seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// First seed.
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Runs just this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Operations of each program.
    #[arg(long, default_value_t = 400)]
    ops: u64,
    /// Shows each run's configuration and report, and whole logs.
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (first, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None => (arguments.start, arguments.seeds),
    };
    let mut total = Report::default();
    for seed in (first..).take(usize::try_from(count).unwrap_or(usize::MAX)) {
        let config = SimConfig::from_seed(seed, arguments.ops);
        match run::<CoreEngine>(&config) {
            Ok(report) => {
                if arguments.verbose {
                    println!("seed {seed}: {config:?}\n  {report:?}");
                }
                total.add(&report);
            }
            Err(failure) => {
                explain(&config, &failure, arguments.verbose);
                return ExitCode::FAILURE;
            }
        }
        if (seed + 1 - first).is_multiple_of(PROGRESS_SEEDS) {
            println!("{} of {count} seeds are right", seed + 1 - first);
        }
    }
    println!("{count} seeds are right: {total:?}");
    ExitCode::SUCCESS
}

fn explain(config: &SimConfig, failure: &Failure, verbose: bool) {
    println!("{config:?}");
    let skip = if verbose {
        0
    } else {
        failure.log.len().saturating_sub(LOG_TAIL_LINES)
    };
    if skip > 0 {
        println!("... {skip} operations before (--verbose shows them)");
    }
    for line in &failure.log[skip..] {
        println!("{line}");
    }
    println!("seed {} failed: {}", failure.seed, failure.message);
    println!(
        "replay: cargo run --release -p hmm-sim -- --seed {} --ops {}",
        failure.seed, config.ops
    );
}
