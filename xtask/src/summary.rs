//! What became of each step, and the lines that end the output.

use std::fmt;
use std::time::Duration;

use crate::counts::Counts;

/// How a step ended.
#[derive(Debug)]
pub enum Outcome {
    Passed(String),
    Skipped(String),
    Failed(String),
    NotRun,
}

/// Everything that was done.
#[derive(Debug, Default)]
pub struct Summary {
    rows: Vec<(String, Outcome, Duration)>,
    pub tests: Counts,
    /// Tests that skipped themselves, and why.
    pub notes: Vec<(String, String)>,
}

impl Summary {
    pub fn add(&mut self, step: impl Into<String>, outcome: Outcome, time: Duration) {
        self.rows.push((step.into(), outcome, time));
    }

    pub fn has_failed(&self) -> bool {
        self.rows
            .iter()
            .any(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)))
    }

    /// The tests; a failure of a step that runs none counts as one, so that
    /// the last line never looks better than the run was.
    fn closing_counts(&self) -> Counts {
        let mut counts = self.tests;
        if self.has_failed() && counts.failed == 0 {
            counts.failed = 1;
        }
        counts
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.notes.is_empty() {
            writeln!(f, "Tests that skipped themselves:")?;
            for (test, reason) in &self.notes {
                writeln!(f, "  {test}: {reason}")?;
            }
            writeln!(f)?;
        }
        let width = self.rows.iter().map(|(step, ..)| step.len()).max();
        let width = width.unwrap_or(0).max("step".len());
        writeln!(
            f,
            "{:width$}  {:8}  {:>8}  remarks",
            "step", "result", "time"
        )?;
        for (step, outcome, time) in &self.rows {
            let (result, remark) = match outcome {
                Outcome::Passed(remark) => ("passed", remark.as_str()),
                Outcome::Skipped(reason) => ("SKIPPED", reason.as_str()),
                Outcome::Failed(reason) => ("FAILED", reason.as_str()),
                Outcome::NotRun => ("not run", ""),
            };
            let time = match outcome {
                Outcome::NotRun => String::new(),
                _ => format!("{:.1} s", time.as_secs_f64()),
            };
            let row = format!("{step:width$}  {result:8}  {time:>8}  {remark}");
            writeln!(f, "{}", row.trim_end())?;
        }
        writeln!(f)?;
        write!(f, "{}", self.closing_counts())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts_tests() {
        let mut summary = Summary::default();
        summary.tests.passed = 7;
        summary.add("fmt", Outcome::Passed(String::new()), Duration::ZERO);
        summary.add(
            "deny",
            Outcome::Skipped("not installed".into()),
            Duration::ZERO,
        );
        let text = summary.to_string();
        assert!(
            text.contains("deny  SKIPPED      0.0 s  not installed"),
            "{text}"
        );
        assert_eq!(text.lines().last(), Some("7 passed, 0 failed, 0 skipped"));
        summary.add("clippy", Outcome::Failed("no".into()), Duration::ZERO);
        summary.add("doc", Outcome::NotRun, Duration::ZERO);
        let text = summary.to_string();
        assert_eq!(text.lines().last(), Some("7 passed, 1 failed, 0 skipped"));
    }
}
