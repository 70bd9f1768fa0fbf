//! The tests of some crates, built.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::workspace::Workspace;

/// A program that runs tests.
#[derive(Debug)]
pub struct TestBinary {
    /// The folder of its crate.
    pub of_crate: String,
    /// `basic` of `tests/basic.rs`; of a crate's own tests, the crate's name.
    pub name: String,
    pub path: PathBuf,
}

/// What was built.
#[derive(Debug, Default)]
pub struct Built {
    pub tests: Vec<TestBinary>,
    /// Programs that are no tests.
    pub programs: Vec<PathBuf>,
    /// Shared libraries, which tests look for beside themselves.
    pub libraries: Vec<PathBuf>,
}

impl Built {
    /// Of the crates in these folders. The whole workspace is built, as the
    /// checks do, so that nothing is built twice.
    pub fn of_crates(workspace: &Workspace, crates: &[&str]) -> Result<Self> {
        let command = workspace.cargo([
            "test",
            "--workspace",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ]);
        println!("$ {}", command.line());
        let output = command
            .into_command()
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        if !output.status.success() {
            bail!("the tests do not build");
        }
        let mut built = Self::default();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Ok(message) = serde_json::from_str(line) {
                built.note(&message, crates);
            }
        }
        if built.tests.is_empty() {
            bail!("no test binaries were built for {crates:?}");
        }
        Ok(built)
    }

    fn note(&mut self, message: &Value, crates: &[&str]) {
        let Some(of_crate) = message["manifest_path"]
            .as_str()
            .and_then(|path| Path::new(path).parent()?.file_name()?.to_str())
            .filter(|name| crates.contains(name))
        else {
            return;
        };
        let files = message["filenames"].as_array().into_iter().flatten();
        let libraries = files
            .filter_map(Value::as_str)
            .filter(|path| path.ends_with(".so"));
        self.libraries.extend(libraries.map(PathBuf::from));
        let Some(path) = message["executable"].as_str().map(PathBuf::from) else {
            return;
        };
        if message["profile"]["test"] == true {
            let name = message["target"]["name"].as_str().unwrap_or_default();
            self.tests.push(TestBinary {
                of_crate: of_crate.to_owned(),
                name: name.to_owned(),
                path,
            });
        } else {
            self.programs.push(path);
        }
    }
}

/// The tests in what `--list --format terse` prints.
pub fn tests_in(listed: &str) -> Vec<String> {
    listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cargo_says_is_read() {
        let message = |folder: &str, test: bool| {
            json!({
                "manifest_path": format!("/w/{folder}/Cargo.toml"),
                "target": { "name": "basic" },
                "profile": { "test": test },
                "executable": "/t/basic-1",
                "filenames": ["/t/basic-1", "/t/liba.so"],
            })
        };
        let mut built = Built::default();
        built.note(&message("hmm", true), &["hmm"]);
        built.note(&message("hmm", false), &["hmm"]);
        built.note(&message("other", true), &["hmm"]);
        built.note(&json!({"reason": "build-finished"}), &["hmm"]);
        let [test] = &built.tests[..] else {
            panic!("{built:?}")
        };
        assert_eq!((&*test.of_crate, &*test.name), ("hmm", "basic"));
        assert_eq!(built.programs, [Path::new("/t/basic-1")]);
        assert_eq!(built.libraries.len(), 2);
    }
}
