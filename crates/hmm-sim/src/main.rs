//! Runs programs on the simulated machine until one goes wrong.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use hmm_sim::{CoreEngine, Failure, Report, SimConfig, run};

/// Lines of the log that a failure shows without --verbose.
const LOG_TAIL_LINES: usize = 60;
/// Seeds between two signs of progress.
const PROGRESS_SEEDS: u64 = 100;

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
    /// Gives the last device memory that the CPU uses in place.
    #[arg(long)]
    coherent: bool,
    /// Gives every program pages of hugetlbfs of several blocks.
    #[arg(long)]
    gigantic: bool,
    /// Threads that run seeds; each seed is run by one.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Goes on after a failure, and shows one line for each.
    #[arg(long)]
    keep_going: bool,
    /// Searches for the least number of operations that fails.
    #[arg(long)]
    minimise: bool,
    /// Shows progress although the output is not a terminal.
    #[arg(long)]
    progress: bool,
    /// Shows each run's configuration and report, and whole logs.
    #[arg(long)]
    verbose: bool,
}

/// What all threads share.
struct Shared {
    next: AtomicU64,
    stop: AtomicBool,
    total: Mutex<(u64, Report)>,
    failures: Mutex<Vec<(SimConfig, Failure)>>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (first, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None => (arguments.start, arguments.seeds),
    };
    let began = Instant::now();
    let shared = Shared {
        next: AtomicU64::new(first),
        stop: AtomicBool::new(false),
        total: Mutex::default(),
        failures: Mutex::default(),
    };
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.clamp(1, count.max(1)) {
            scope.spawn(|| run_seeds(&arguments, &shared, first + count));
        }
    });
    let progress = arguments.progress || std::io::stderr().is_terminal();
    if progress {
        eprintln!();
    }
    let (right, total) = take(shared.total);
    let mut failures = take(shared.failures);
    failures.sort_by_key(|(config, _)| config.seed);
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{right} seeds are right, {} are not; {:.1} seeds/s",
        failures.len(),
        (right as f64) / seconds.max(0.001)
    );
    show(&total);
    let Some((config, failure)) = failures.first() else {
        return ExitCode::SUCCESS;
    };
    if arguments.minimise {
        let (config, failure) = minimise(config, failure);
        explain(&config, &failure, arguments.verbose);
    } else {
        explain(config, failure, arguments.verbose);
    }
    ExitCode::FAILURE
}

fn take<T>(mutex: Mutex<T>) -> T {
    match mutex.into_inner() {
        Ok(value) => value,
        Err(poisoned) => poisoned.into_inner(),
    }
}

fn run_seeds(arguments: &Arguments, shared: &Shared, end: u64) {
    let progress = arguments.progress || std::io::stderr().is_terminal();
    loop {
        let seed = shared.next.fetch_add(1, Ordering::Relaxed);
        if seed >= end || shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let mut config = SimConfig {
            coherent: arguments.coherent,
            ..SimConfig::from_seed(seed, arguments.ops)
        };
        if arguments.gigantic {
            config = config.with_gigantic();
        }
        match run::<CoreEngine>(&config) {
            Ok(report) => {
                if arguments.verbose {
                    println!("seed {seed}: {config:?}\n  {report:?}");
                }
                if let Ok(mut total) = shared.total.lock() {
                    total.0 += 1;
                    total.1.add(&report);
                    if progress && total.0.is_multiple_of(PROGRESS_SEEDS) {
                        eprint!("\r{} seeds are right", total.0);
                        let _ = std::io::stderr().flush();
                    }
                }
            }
            Err(failure) => {
                if !arguments.keep_going {
                    shared.stop.store(true, Ordering::Relaxed);
                }
                if arguments.keep_going {
                    let message: String = failure.message.chars().take(200).collect();
                    println!("seed {seed}: {message}");
                }
                if let Ok(mut failures) = shared.failures.lock() {
                    failures.push((config, *failure));
                }
            }
        }
    }
}

/// The same seed with as few operations as still fail. Fewer operations are a
/// prefix of the same program, so halving finds it.
fn minimise(config: &SimConfig, failure: &Failure) -> (SimConfig, Failure) {
    let mut best = (*config, failure.clone());
    let (mut low, mut high) = (0, config.ops);
    while low + 1 < high {
        let ops = low.midpoint(high);
        let smaller = SimConfig {
            coherent: config.coherent,
            ..SimConfig::from_seed(config.seed, ops)
        };
        match run::<CoreEngine>(&smaller) {
            Ok(_) => low = ops,
            Err(failure) => {
                high = ops;
                best = (smaller, *failure);
            }
        }
    }
    best
}

fn show(total: &Report) {
    let mut rows = vec![
        ("turns", total.steps),
        ("operations", total.ops),
        ("operations inside of the engine's calls", total.nested_ops),
        ("CPU accesses compared", total.cpu_accesses),
        ("CPU stops at a page", total.stops),
        ("device accesses compared", total.device_accesses),
        ("of these to frames", total.frame_accesses),
        ("device faults", total.device_faults),
        ("device faults without an answer", total.unreachable),
        ("forks", total.forks),
        ("devices lost", total.losses),
        ("pages copied to devices", total.to_device.get()),
        ("pages copied to the host", total.to_host.get()),
    ];
    rows.extend(total.engine.iter().map(|(&name, &count)| (name, count)));
    for (name, count) in rows {
        println!("  {name:<42} {count:>14}");
    }
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
