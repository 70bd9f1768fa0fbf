//! What the kernel's test harness prints while it runs tests.

use std::time::{Duration, Instant};

use super::name::Name;

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// Why.
    Skipped(String),
    /// The lines that it printed.
    Failed(Vec<String>),
}

/// A test that has run.
#[derive(Clone, Debug)]
pub struct Finished {
    pub name: Name,
    pub outcome: Outcome,
    /// What it printed for people: tables, figures.
    pub printed: Vec<String>,
    pub time: Duration,
}

impl Finished {
    /// It has failed after all.
    pub fn fail(&mut self, why: String) {
        let mut lines = match &mut self.outcome {
            Outcome::Failed(lines) => std::mem::take(lines),
            _ => Vec::new(),
        };
        lines.push(why);
        self.outcome = Outcome::Failed(lines);
    }
}

/// A test that prints more has its first lines kept.
const KEPT_LINES: usize = 1000;

/// Reads the lines of a run.
#[derive(Debug)]
pub struct Reader {
    /// The test that runs.
    name: Option<Name>,
    /// What it printed.
    lines: Vec<String>,
    start: Instant,
    /// How many tests are to run.
    pub planned: usize,
}

impl Reader {
    pub fn new() -> Self {
        Self {
            name: None,
            lines: Vec::new(),
            start: Instant::now(),
            planned: 1,
        }
    }

    /// Takes in a line. Returns the test that ends with it.
    pub fn line(&mut self, line: &str) -> Option<Finished> {
        if let Some(count) = line.strip_prefix("1..") {
            self.planned = count.trim().parse().unwrap_or(1);
        } else if let Some(name) = progress(line, "RUN") {
            self.name = Some(name.trim_end_matches('.').trim_end().into());
            self.lines.clear();
            self.start = Instant::now();
        } else if let Some((ok, directive)) = self.result(line) {
            let name = self.name.take()?;
            let outcome = match (ok, directive.strip_prefix("SKIP")) {
                (false, _) => Outcome::Failed(self.lines.clone()),
                (true, Some(reason)) => Outcome::Skipped(reason.trim().to_owned()),
                // Older harnesses say it only in a line of its own.
                (true, None) => match self.lines.iter().find_map(|line| progress(line, "SKIP")) {
                    Some(reason) => Outcome::Skipped(reason.to_owned()),
                    None => Outcome::Passed,
                },
            };
            return Some(self.finish(name, outcome));
        } else if !line.is_empty()
            && self.lines.len() < KEPT_LINES
            && progress(line, "OK").is_none()
            && progress(line, "FAIL").is_none()
        {
            self.lines.push(line.to_owned());
        }
        None
    }

    /// `ok 1 NAME # SKIP reason` of the test that runs: whether it is ok, and
    /// what stands behind the `#`.
    fn result<'a>(&self, line: &'a str) -> Option<(bool, &'a str)> {
        let (ok, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => (true, line.strip_prefix("ok ")?),
        };
        let (name, directive) = rest.split_once('#').unwrap_or((rest, ""));
        let (_, name) = name.trim().split_once(' ')?;
        (self.name == Some(name.into())).then_some((ok, directive.trim()))
    }

    /// The test that has no result yet has failed. If none runs, that is
    /// `otherwise`, which never began.
    pub fn broken_off(&mut self, otherwise: &str) -> Finished {
        let name = self.name.take().unwrap_or_else(|| otherwise.into());
        let outcome = Outcome::Failed(self.lines.clone());
        self.finish(name, outcome)
    }

    fn finish(&mut self, name: Name, outcome: Outcome) -> Finished {
        let for_people = |line: &String| !line.starts_with('#');
        Finished {
            name,
            outcome,
            printed: self.lines.drain(..).filter(for_people).collect(),
            time: self.start.elapsed(),
        }
    }

    /// Whether a test has begun that has no result.
    pub fn is_running(&self) -> bool {
        self.name.is_some()
    }
}

/// What follows the word in a line like `#   WORD   rest`.
fn progress<'a>(line: &'a str, word: &str) -> Option<&'a str> {
    let rest = line.strip_prefix('#')?.trim_start().strip_prefix(word)?;
    rest.starts_with(' ').then(|| rest.trim())
}

#[cfg(test)]
mod tests;
