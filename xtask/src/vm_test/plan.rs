//! What runs in the guest, and what does not.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::built::{Built, TestBinary, tests_in};
use crate::process::Invocation;
use crate::workspace::Workspace;

/// Crates whose tests meet the kernel, in the order in which they run. Those of
/// the others are the same on any kernel.
const CRATES: [&str; 2] = ["hmm-os", "hmm"];
/// The crate of the program that the guest has, too.
const PROGRAM: &str = "hmm-cli";
/// Binaries that do not run, and why.
const LEFT_OUT: [(&str, &str); 1] = [(
    "costs",
    "it measures, and an emulated machine's times mean nothing",
)];

/// After this a test hangs, and is killed. Emulation is slow.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// One test of one binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub binary: String,
    pub test: String,
}

/// All that runs.
#[derive(Debug)]
pub struct Plan {
    pub tests: Vec<Planned>,
    pub binaries: Vec<TestBinary>,
    /// `hmm`.
    pub program: PathBuf,
    /// What does not run, with the reason.
    pub left_out: Vec<String>,
}

impl Plan {
    /// Builds the tests. With a word: just those whose name has it.
    pub fn new(workspace: &Workspace, word: Option<&str>) -> Result<Self> {
        let mut built = Built::of_crates(workspace, &[CRATES[0], CRATES[1], PROGRAM])?;
        let mut plan = Self {
            tests: Vec::new(),
            binaries: Vec::new(),
            program: built.programs.pop().context("hmm-cli has no program")?,
            left_out: Vec::new(),
        };
        for of_crate in CRATES {
            let (mut binaries, others): (Vec<_>, Vec<_>) = (built.tests)
                .into_iter()
                .partition(|binary| binary.of_crate == of_crate);
            built.tests = others;
            binaries.sort_by(|a, b| a.name.cmp(&b.name));
            for binary in binaries {
                plan.add(binary, word)?;
            }
        }
        if plan.tests.is_empty() {
            bail!("there is no such test");
        }
        Ok(plan)
    }

    fn add(&mut self, binary: TestBinary, word: Option<&str>) -> Result<()> {
        let name = &binary.name;
        if let Some((_, why)) = LEFT_OUT.iter().find(|(out, _)| out == name) {
            self.left_out.push(format!("{name} ({why})"));
            return Ok(());
        }
        let listed = Invocation::new(&binary.path)
            .args(["--list", "--format", "terse"])
            .output()?;
        let before = self.tests.len();
        let tests = tests_in(&listed).into_iter().map(|test| Planned {
            binary: name.clone(),
            test,
        });
        let wanted = |planned: &Planned| word.is_none_or(|word| planned.to_string().contains(word));
        self.tests.extend(tests.filter(wanted));
        if self.tests.len() > before {
            self.binaries.push(binary);
        }
        Ok(())
    }

    /// As the guest reads it: seconds, binary, test.
    pub fn lines(&self) -> String {
        let seconds = PATIENCE.as_secs();
        self.tests
            .iter()
            .map(|planned| format!("{seconds} {planned}\n"))
            .collect()
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.binary, self.test)
    }
}
