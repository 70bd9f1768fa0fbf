//! What became of the tests in the guests, for people.

use std::fmt::Write;
use std::time::Duration;

use super::machine::Run;
use super::reader::{Outcome, Ran};
use crate::counts::Counts;

/// Of the output of a failed test.
const LINES: usize = 25;

pub fn counts(runs: &[Run]) -> Counts {
    let mut counts = Counts::default();
    for run in runs {
        for ran in &run.tests {
            counts += count(ran);
        }
        counts.failed += run.broken.len() as u64 + u64::from(run.broken_off.is_some());
    }
    counts
}

fn count(ran: &Ran) -> Counts {
    let mut counts = Counts::default();
    match ran.outcome {
        Outcome::Passed => counts.passed += 1,
        Outcome::Skipped(_) => counts.skipped += 1,
        Outcome::Failed(_) => counts.failed += 1,
    }
    counts
}

/// A line for a test that has run.
pub fn line(version: &str, ran: &Ran) -> String {
    let (word, reason) = match &ran.outcome {
        Outcome::Passed => ("PASS", ""),
        Outcome::Skipped(reason) => ("SKIP", reason.as_str()),
        Outcome::Failed(why) => ("FAIL", why.as_str()),
    };
    let time = ran.time.as_secs_f64();
    let line = format!(
        "{word:>12} [{time:8.3}s] {version} {}  {reason}",
        ran.planned
    );
    line.trim_end().to_owned()
}

/// A row for each kernel and binary; then reasons and failures.
pub fn text(runs: &[Run]) -> String {
    let mut text = table(runs);
    let skipped = runs.iter().flat_map(|run| {
        run.tests.iter().filter_map(move |ran| match &ran.outcome {
            Outcome::Skipped(reason) => Some((run, ran, reason)),
            _ => None,
        })
    });
    for (run, ran, reason) in skipped {
        let _ = writeln!(text, "skipped: {} {}: {reason}", run.version, ran.planned);
    }
    for run in runs {
        failures(&mut text, run);
    }
    text
}

fn failures(text: &mut String, run: &Run) {
    for ran in &run.tests {
        if let Outcome::Failed(why) = &ran.outcome {
            let _ = writeln!(text, "\nfailed: {} {}: {why}", run.version, ran.planned);
            tail(text, &ran.output);
        }
    }
    for what in &run.broken {
        let _ = writeln!(text, "\nfailed: {} set-up: {what}", run.version);
    }
    if let Some((why, lines)) = &run.broken_off {
        let _ = writeln!(text, "\nfailed: {}: {why}", run.version);
        tail(text, lines);
    }
}

fn tail(text: &mut String, lines: &[String]) {
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        let _ = writeln!(text, "  {line}");
    }
}

fn table(runs: &[Run]) -> String {
    let mut rows = Vec::<(String, String, Counts, Duration)>::new();
    for run in runs {
        for ran in &run.tests {
            let key = (&run.version, &ran.planned.binary);
            if rows.last().is_none_or(|row| (&row.0, &row.1) != key) {
                rows.push((
                    key.0.clone(),
                    key.1.clone(),
                    Counts::default(),
                    Duration::ZERO,
                ));
            }
            if let Some(row) = rows.last_mut() {
                row.2 += count(ran);
                row.3 += ran.time;
            }
        }
    }
    let width = |name: &str, column: fn(&(String, String, Counts, Duration)) -> usize| {
        rows.iter().map(column).max().unwrap_or(0).max(name.len())
    };
    let kernel = width("kernel", |row| row.0.len());
    let binary = width("tests", |row| row.1.len());
    let mut text = format!(
        "{:kernel$}  {:binary$}  passed  failed  skipped      time\n",
        "kernel", "tests"
    );
    for (version, name, counts, time) in &rows {
        let _ = writeln!(
            text,
            "{version:kernel$}  {name:binary$}  {:6}  {:6}  {:7}  {:6.1} s",
            counts.passed,
            counts.failed,
            counts.skipped,
            time.as_secs_f64()
        );
    }
    text
}
