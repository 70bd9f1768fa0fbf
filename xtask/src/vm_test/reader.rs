//! What the guest says on its console.

use std::time::{Duration, Instant};

use super::plan::Planned;
use crate::counts::{Counts, skip_reason};

/// How the lines begin that the guest means for this program.
const MARK: &str = "@@ ";
/// Of a test's output the end is kept.
const KEPT_LINES: usize = 400;
/// The status of a program that was killed.
const KILLED: &str = "137";

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// A test that has run.
#[derive(Clone, Debug)]
pub struct Ran {
    pub planned: Planned,
    pub outcome: Outcome,
    pub output: Vec<String>,
    pub time: Duration,
}

/// What there is to tell.
#[derive(Debug)]
pub enum News {
    /// The kernel that runs.
    Booted(String),
    /// A line for people.
    Shown(String),
    /// Something that the guest needs does not work.
    Broken(String),
    Begun,
    Ended(Ran),
    /// The plan is done.
    Done,
}

#[derive(Debug)]
enum State {
    Idle,
    Showing,
    Running(Planned, Instant),
}

/// Takes the console's lines.
#[derive(Debug)]
pub struct Reader {
    state: State,
    lines: Vec<String>,
}

impl Reader {
    pub fn new() -> Self {
        Self {
            state: State::Idle,
            lines: Vec::new(),
        }
    }

    pub fn line(&mut self, line: &str) -> Option<News> {
        let Some(marked) = line.strip_prefix(MARK) else {
            return self.plain(line);
        };
        let (word, rest) = marked.split_once(' ').unwrap_or((marked, ""));
        match word {
            "booted" => Some(News::Booted(rest.to_owned())),
            "broken" => Some(News::Broken(rest.to_owned())),
            "show" => {
                self.state = State::Showing;
                None
            }
            "shown" => {
                self.state = State::Idle;
                None
            }
            "begin" => {
                let (binary, test) = rest.split_once(' ')?;
                let planned = Planned {
                    binary: binary.to_owned(),
                    test: test.to_owned(),
                };
                self.lines.clear();
                self.state = State::Running(planned, Instant::now());
                Some(News::Begun)
            }
            "end" => self.end(|output| outcome(rest, output)).map(News::Ended),
            "done" => Some(News::Done),
            _ => self.plain(line),
        }
    }

    fn plain(&mut self, line: &str) -> Option<News> {
        if matches!(self.state, State::Showing) {
            return Some(News::Shown(line.to_owned()));
        }
        if !line.is_empty() {
            if self.lines.len() == KEPT_LINES {
                self.lines.remove(0);
            }
            self.lines.push(line.to_owned());
        }
        None
    }

    fn end(&mut self, outcome: impl FnOnce(&str) -> Outcome) -> Option<Ran> {
        let State::Running(planned, start) = std::mem::replace(&mut self.state, State::Idle) else {
            return None;
        };
        let output = std::mem::take(&mut self.lines);
        Some(Ran {
            planned,
            outcome: outcome(&output.join("\n")),
            output,
            time: start.elapsed(),
        })
    }

    /// The guest has ended. A test that still ran has failed.
    pub fn broken_off(&mut self, why: &str) -> Option<Ran> {
        self.end(|_| Outcome::Failed(why.to_owned()))
    }

    /// The console's last lines, where no test runs.
    pub fn last_lines(&self) -> &[String] {
        &self.lines
    }
}

fn outcome(status: &str, output: &str) -> Outcome {
    if status == KILLED {
        return Outcome::Failed("killed: it took too long, or memory ran out".to_owned());
    }
    if status != "0" {
        return Outcome::Failed(format!("ended with status {status}"));
    }
    if let Some(reason) = skip_reason(output) {
        return Outcome::Skipped(reason.to_owned());
    }
    if Counts::read(output).passed == 0 {
        return Outcome::Skipped("ignored".to_owned());
    }
    Outcome::Passed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(lines: &[&str]) -> Ran {
        let mut reader = Reader::new();
        let mut news: Vec<_> = lines.iter().filter_map(|line| reader.line(line)).collect();
        match news.pop() {
            Some(News::Ended(ran)) => ran,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn tests_end_in_several_ways() {
        let passed = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured";
        let ignored = "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured";
        let one = ran(&["@@ begin basic a::b", "", passed, "@@ end 0"]);
        assert_eq!(one.planned.to_string(), "basic a::b");
        assert_eq!(
            (one.outcome, &*one.output),
            (Outcome::Passed, &[passed.to_owned()][..])
        );
        let outcome = |lines: &[&str]| ran(lines).outcome;
        let skipped = outcome(&["@@ begin a b", "SKIPPED a: none", passed, "@@ end 0"]);
        assert_eq!(skipped, Outcome::Skipped("none".into()));
        let skipped = outcome(&["@@ begin a b", ignored, "@@ end 0"]);
        assert_eq!(skipped, Outcome::Skipped("ignored".into()));
        let failed = outcome(&["@@ begin a b", "@@ end 101"]);
        assert_eq!(failed, Outcome::Failed("ended with status 101".into()));
        let failed = outcome(&["@@ begin a b", "@@ end 137"]);
        assert!(matches!(failed, Outcome::Failed(why) if why.contains("too long")));
    }

    #[test]
    fn a_guest_that_dies_fails_its_test() {
        let mut reader = Reader::new();
        assert!(reader.broken_off("x").is_none());
        reader.line("@@ begin a b");
        reader.line("Kernel panic");
        let ran = reader.broken_off("the guest died").unwrap();
        assert_eq!(ran.outcome, Outcome::Failed("the guest died".into()));
        assert_eq!(ran.output, ["Kernel panic"]);
    }

    #[test]
    fn what_is_shown_is_passed_on() {
        let mut reader = Reader::new();
        assert!(reader.line("a").is_none() && reader.line("@@ show").is_none());
        assert!(matches!(reader.line("a"), Some(News::Shown(line)) if line == "a"));
        assert!(reader.line("@@ shown").is_none() && reader.line("a").is_none());
    }
}
