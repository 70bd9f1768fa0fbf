//! Runs the tests under `hmm run`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::harness::{Finished, Outcome, Reader};
use super::name::{Name, listed};
use super::sources::Binary;
use crate::log::Log;
use crate::process::Invocation;
use crate::session::{self, Ended};
use crate::workspace::Workspace;

/// After this a test hangs. The harness itself ends a test after 30 s, a
/// benchmark after 120 s, as long as the harness can still run.
const PATIENCE: Duration = Duration::from_secs(45);
const BENCHMARK_PATIENCE: Duration = Duration::from_secs(150);
/// The crates whose release builds `hmm run` needs, where they are there.
const CRATES: [&str; 2] = ["hmm-cli", "hmm-shim"];

/// A test that has run, and where all of its output is.
#[derive(Debug)]
pub struct Ran {
    pub test: Finished,
    pub log: PathBuf,
}

/// The test program, and what runs it.
#[derive(Debug)]
pub struct Runner {
    hmm: PathBuf,
    binary: Binary,
    logs: PathBuf,
}

impl Runner {
    /// Builds `hmm` too, and makes sure that it runs programs.
    pub fn new(workspace: &Workspace, binary: Binary, logs: PathBuf) -> Result<Self> {
        let crates = CRATES
            .into_iter()
            .filter(|name| workspace.path("crates").join(name).exists());
        workspace
            .cargo(["build", "--release"])
            .args(crates.map(|name| format!("--package={name}")))
            .run()?;
        let hmm = workspace.target().join("release/hmm");
        Invocation::new(&hmm)
            .args(["run", "--", "true"])
            .output()
            .context("`hmm run` runs no programs")?;
        fs::create_dir_all(&logs)?;
        Ok(Self { hmm, binary, logs })
    }

    /// Runs the tests that are wanted, each in a run of its own if the harness
    /// can do that. A harness that cannot runs all, and the others are not
    /// counted.
    pub fn run(&self, wanted: impl Fn(&Name) -> bool) -> Result<Vec<Ran>> {
        let mut all = Vec::new();
        if self.binary.selects {
            for name in self.list()?.iter().filter(|name| wanted(name)) {
                let name = name.to_string();
                all.extend(self.one_run(&["-r", &name], &name, &wanted)?);
            }
        } else {
            all = self.one_run(&[], "hmm-tests", &wanted)?;
        }
        if all.is_empty() {
            bail!("there is no such test");
        }
        Ok(all)
    }

    fn list(&self) -> Result<Vec<Name>> {
        // On the standard error; and the exit status is that of a skipped test.
        let output = Invocation::new(&self.binary.program)
            .args(["-l"])
            .into_command()
            .output()
            .context("cannot run the tests")?;
        let names = listed(&String::from_utf8_lossy(&output.stderr));
        if names.is_empty() {
            // Newer ones prepare huge pages first, which takes root.
            let said = String::from_utf8_lossy(&output.stdout);
            let reason = said.lines().find(|line| line.starts_with("Bail out!"));
            bail!(
                "the tests do not list themselves: {}",
                reason.unwrap_or(&said)
            );
        }
        Ok(names)
    }

    fn one_run(
        &self,
        arguments: &[&str],
        label: &str,
        wanted: &impl Fn(&Name) -> bool,
    ) -> Result<Vec<Ran>> {
        let path = self.logs.join(format!("{label}.log"));
        let mut log = Log::create(&path)?;
        let mut reader = Reader::new();
        let mut tests = Vec::new();
        let (mut results, mut failures) = (0, 0);
        let words: Vec<&Path> = [&self.hmm, Path::new("run"), Path::new("--")]
            .into_iter()
            .chain([self.binary.program.as_path()])
            .chain(arguments.iter().map(Path::new))
            .collect();
        let patience = if label.contains("benchmark") {
            BENCHMARK_PATIENCE
        } else {
            PATIENCE
        };
        let ended = session::run(&words, &self.logs, patience.into(), |line| {
            if !log.line(line) {
                return false;
            }
            let Some(test) = reader.line(line) else {
                return false;
            };
            results += 1;
            failures += usize::from(matches!(test.outcome, Outcome::Failed(_)));
            if wanted(&test.name) {
                announce(&test);
                tests.push(test);
            }
            true
        })?;
        log.end(&ended.to_string());
        let sound = match ended {
            Ended::ByItself(status) => status.code() == Some(i32::from(failures > 0)),
            Ended::OutOfTime(_) => false,
        };
        if !sound || results < reader.planned {
            let why = match reader.planned {
                1 => ended.to_string(),
                planned => format!("{ended}; {results} of {planned} tests had a result"),
            };
            // Whoever ran then is at fault, or whoever ran last.
            let mut test = match tests.pop() {
                Some(last) if !reader.is_running() => last,
                last => {
                    tests.extend(last);
                    reader.broken_off(label)
                }
            };
            test.fail(why);
            announce(&test);
            tests.push(test);
        }
        let ran = |test| Ran {
            test,
            log: path.clone(),
        };
        Ok(tests.into_iter().map(ran).collect())
    }
}

fn announce(test: &Finished) {
    let (result, reason) = match &test.outcome {
        Outcome::Passed => ("PASS", ""),
        Outcome::Skipped(reason) => ("SKIP", reason.as_str()),
        Outcome::Failed(_) => ("FAIL", ""),
    };
    let time = test.time.as_secs_f64();
    let line = format!("{result:>12} [{time:8.3}s] {}  {reason}", test.name);
    eprintln!("{}", line.trim_end());
}
