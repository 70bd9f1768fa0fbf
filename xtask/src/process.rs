//! Running other programs.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A program with its arguments, to be run once.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    shown: Vec<OsString>,
}

impl Invocation {
    /// A call of `program`, searched for in PATH.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let name = Path::new(program.as_ref());
        Self {
            command: Command::new(program.as_ref()),
            shown: vec![name.file_name().unwrap_or(name.as_os_str()).to_owned()],
        }
    }

    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        for argument in arguments {
            self.shown.push(argument.as_ref().to_owned());
            self.command.arg(argument);
        }
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut shown = OsString::from(format!("{name}="));
        shown.push(value.as_ref());
        self.shown.insert(0, shown);
        self.command.env(name, value);
        self
    }

    pub fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// As one would type it.
    pub fn line(&self) -> String {
        let words: Vec<_> = self
            .shown
            .iter()
            .map(|word| {
                let word = word.to_string_lossy();
                if word.contains(char::is_whitespace) {
                    format!("'{word}'")
                } else {
                    word.into_owned()
                }
            })
            .collect();
        words.join(" ")
    }

    /// Runs it on this terminal.
    pub fn run(mut self) -> Result<()> {
        let line = self.line();
        let status = self
            .command
            .status()
            .with_context(|| format!("cannot run `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed ({status})");
        }
        Ok(())
    }

    /// Runs it, shows what it prints, and returns that too, without colours.
    /// The result says whether it succeeded.
    pub fn tee(mut self) -> Result<(bool, String)> {
        let line = self.line();
        println!("$ {line}");
        let colour = if io::stdout().is_terminal() {
            "always"
        } else {
            "never"
        };
        let (reader, writer) = io::pipe()?;
        let mut child = self
            .command
            .env("CARGO_TERM_COLOR", colour)
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run `{line}`"))?;
        // The command holds write ends of the pipe, which would never end.
        drop(self.command);
        let mut text = String::new();
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes)? > 0 {
            io::stdout().write_all(&bytes)?;
            text.push_str(&plain(&String::from_utf8_lossy(&bytes)));
            bytes.clear();
        }
        Ok((child.wait()?.success(), text))
    }

    /// Runs it quietly. `None` when there is no such program or it fails.
    pub fn quiet(mut self) -> Option<String> {
        let output = self.command.stdin(Stdio::null()).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it quietly and returns what it prints. The error of a failure ends
    /// with what it said first, which is most often the cause.
    pub fn output(mut self) -> Result<String> {
        let line = self.line();
        let output = self
            .command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run `{line}`"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().next().unwrap_or_default();
            bail!("`{line}` failed ({}): {said}", output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The command itself, for what needs more.
    pub fn into_command(self) -> Command {
        self.command
    }
}

/// The text without colours and other control sequences of terminals.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(letter) = rest.next() {
        if letter == '\u{1b}' {
            // ESC [ ... final byte
            if rest.next() == Some('[') {
                for letter in rest.by_ref() {
                    if ('@'..='~').contains(&letter) {
                        break;
                    }
                }
            }
        } else {
            out.push(letter);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go() {
        assert_eq!(
            plain("\u{1b}[32;1m  Summary\u{1b}[0m 3 tests"),
            "  Summary 3 tests"
        );
    }

    #[test]
    fn output_is_kept_and_failure_is_seen() {
        let echo = Invocation::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]);
        let (success, text) = echo.tee().unwrap();
        assert!(!success);
        assert_eq!(text, "out\nerr\n");
    }

    #[test]
    fn a_failure_says_why() {
        let echo = |script: &str| Invocation::new("sh").args(["-c", script]).output();
        assert_eq!(echo("echo out; echo err >&2").unwrap(), "out\n");
        let error = echo("echo no space >&2; echo sorry >&2; exit 3").unwrap_err();
        assert!(error.to_string().ends_with("3): no space"), "{error}");
    }

    #[test]
    fn a_missing_program_is_none() {
        assert!(Invocation::new("no-such-program-here").quiet().is_none());
    }
}
