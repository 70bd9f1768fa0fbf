//! Runs the library's tests as an ordinary user.
//!
//! An ordinary user's userfaultfd delivers fewer faults and no forks, so the
//! engine takes other ways. Root's own runs never see them.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{env, process, thread};

use anyhow::{Context, Result};

use crate::built::{Built, TestBinary, tests_in};
use crate::counts::{Counts, skip_reason};
use crate::process::Invocation;
use crate::workspace::Workspace;

/// Crates whose tests run.
const CRATES: [&str; 2] = ["hmm", "hmm-shim"];
/// The user and the group: nobody's.
const NOBODY: &str = "65534";
/// After this a test hangs, and is killed; a stress test may take longer.
const PATIENCE: Duration = Duration::from_secs(180);
const STRESS_PATIENCE: Duration = Duration::from_secs(300);
/// How long a stress test runs here; the full time is for the other run.
const STRESS_SECONDS: (&str, &str) = ("HMM_STRESS_SECONDS", "15");

/// Why the tests cannot run as another user, if so.
pub fn reason_to_skip() -> Option<String> {
    if !rustix::process::getuid().is_root() {
        return Some("not root: the tests ran as an ordinary user already".to_owned());
    }
    crate::packages::SETPRIV
        .provide()
        .err()
        .map(|error| format!("{error:#}"))
}

/// What the run came to.
#[derive(Debug, Default)]
pub struct Ran {
    pub tests: Counts,
    pub notes: Vec<(String, String)>,
    pub failed: Vec<String>,
}

/// Builds the tests and runs each in a process of its own.
pub fn run(workspace: &Workspace) -> Result<Ran> {
    let built = Built::of_crates(workspace, &CRATES)?;
    let place = Place::new()?;
    let mut ran = Ran::default();
    for library in &built.libraries {
        place.copy(library)?;
    }
    for TestBinary { name, path, .. } in &built.tests {
        let copy = place.copy(path)?;
        for test in list(&copy, &place)? {
            one(&copy, &place, name, &test, &mut ran)?;
        }
    }
    Ok(ran)
}

/// A directory that everybody can read, gone when dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("hmm-ordinary-user-{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    fn copy(&self, binary: &Path) -> Result<PathBuf> {
        let copy = self
            .0
            .join(binary.file_name().context("a binary has a name")?);
        fs::copy(binary, &copy).with_context(|| format!("cannot copy {}", binary.display()))?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(copy)
    }

    /// A call of a binary as nobody.
    fn call(&self, binary: &Path) -> Invocation {
        Invocation::new(crate::packages::SETPRIV.program)
            .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
            .args(["--inh-caps=-all", "--"])
            .args([binary])
            .env("HOME", env::temp_dir())
            .env(STRESS_SECONDS.0, STRESS_SECONDS.1)
            .directory(&self.0)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn list(binary: &Path, place: &Place) -> Result<Vec<String>> {
    let listed = place
        .call(binary)
        .args(["--list", "--format", "terse"])
        .quiet()
        .with_context(|| format!("{} does not list its tests", binary.display()))?;
    Ok(tests_in(&listed))
}

fn one(binary: &Path, place: &Place, name: &str, test: &str, ran: &mut Ran) -> Result<()> {
    let path = place.0.join("output");
    let output = File::create(&path)?;
    let start = Instant::now();
    let patience = if test.contains("stress") || name.contains("stress") {
        STRESS_PATIENCE
    } else {
        PATIENCE
    };
    let mut child = place
        .call(binary)
        .args(["--exact", test, "--nocapture"])
        .into_command()
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("cannot run setpriv")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
    let success = status.is_some_and(|status| status.success());
    let counts = Counts::read(&text);
    let result = if !success {
        ran.tests.failed += 1;
        ran.failed.push(format!("{name} {test}"));
        if status.is_some() { "FAIL" } else { "TIMEOUT" }
    } else if let Some(reason) = skip_reason(&text) {
        ran.tests.skipped += 1;
        ran.notes
            .push((format!("{test} (ordinary user)"), reason.to_owned()));
        "SKIP"
    } else if counts.passed == 0 {
        ran.tests.skipped += 1;
        "IGNORED"
    } else {
        ran.tests.passed += 1;
        "PASS"
    };
    let time = start.elapsed().as_secs_f64();
    println!("{result:>12} [{time:8.3}s] {name} {test}");
    if !success {
        println!("{text}");
    }
    Ok(())
}
