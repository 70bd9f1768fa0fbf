//! One run of a program on a terminal of its own, so that what it prints comes
//! line by line and in order, whatever the program does to buffer it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::Timespec;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::lines::Lines;
use crate::packages;
use crate::process::Invocation;

/// How often it is looked whether the program has ended.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};
const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};
const NAP: Duration = Duration::from_millis(10);
/// What a program gets to tidy up when it is told to end.
const GRACE: Duration = Duration::from_secs(1);

/// How the run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    ByItself(ExitStatus),
    /// It came no further for so long, and was killed.
    OutOfTime(Duration),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByItself(status) => write!(f, "ended with {status}"),
            Self::OutOfTime(time) => write!(f, "killed after {} s", time.as_secs()),
        }
    }
}

/// How long a program is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From one progress to the next.
    pub without_progress: Duration,
    /// In all.
    pub in_all: Duration,
}

impl From<Duration> for Patience {
    /// Patience with everything that makes progress.
    fn from(without_progress: Duration) -> Self {
        Self {
            without_progress,
            in_all: Duration::MAX,
        }
    }
}

/// Runs the program in a session of its own, hands on its lines, and leaves
/// none of its processes behind. It may take a while from one line that is
/// said to be progress to the next, and a while in all.
pub fn run(
    words: &[&Path],
    directory: &Path,
    patience: Patience,
    mut line: impl FnMut(&str) -> bool,
) -> Result<Ended> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags).context("cannot open a terminal")?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let theirs = ioctl_tiocgptpeer(&terminal, flags)?;
    // With a terminal that controls it, it ends when this program does.
    let mut child = Invocation::new(packages::SETSID.program)
        .args(["--ctty"])
        .args(words)
        .directory(directory)
        .into_command()
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs)
        .spawn()
        .context("cannot run setsid")?;
    let mut lines = Lines::new(terminal);
    let start = Instant::now();
    let mut since = start;
    let ended = loop {
        lines.read(&TICK, |text| {
            if line(text) {
                since = Instant::now();
            }
        })?;
        if let Some(status) = child.try_wait()? {
            break Ended::ByItself(status);
        }
        let too_long = if since.elapsed() > patience.without_progress {
            Some(patience.without_progress)
        } else {
            (start.elapsed() > patience.in_all).then_some(patience.in_all)
        };
        if let Some(time) = too_long {
            end(&mut child)?;
            break Ended::OutOfTime(time);
        }
    };
    clear(&child);
    while lines.read(&NOW, |text| _ = line(text))? {}
    lines.last(|text| _ = line(text));
    Ok(ended)
}

/// Asks the whole session to end, and ends its leader if that does not.
fn end(child: &mut Child) -> Result<()> {
    signal_session(child, Signal::TERM);
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > GRACE {
            child.kill()?;
        }
        thread::sleep(NAP);
    }
    Ok(())
}

/// Kills what is left of the session. A kill takes its time; it is waited for,
/// but not for ever.
fn clear(leader: &Child) {
    let start = Instant::now();
    while signal_session(leader, Signal::KILL) > 0 && start.elapsed() < GRACE {
        thread::sleep(NAP);
    }
}

/// Sends a signal to all in the session, and says how many that are. The tests
/// put themselves into process groups of their own, but stay in the session.
fn signal_session(leader: &Child, signal: Signal) -> usize {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let members = processes.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        (session(&stat)? == leader.id()).then(|| Pid::from_raw(pid))?
    });
    // One may have ended meanwhile.
    members
        .filter_map(|pid| kill_process(pid, signal).ok())
        .count()
}

/// The session in the `stat` of a process that lives: behind its name, state,
/// parent and group.
fn session(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let session = fields.nth(2)?.parse().ok()?;
    (!["Z", "X"].contains(&state)).then_some(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: Duration) -> (Ended, Vec<String>) {
        let mut lines = Vec::new();
        let words = ["sh", "-c", script].map(Path::new);
        let ended = run(&words, Path::new("/"), patience.into(), |line| {
            lines.push(line.to_owned());
            false
        });
        (ended.unwrap(), lines)
    }

    #[test]
    fn both_outputs_come_in_order() {
        let (ended, lines) = shell(
            "echo one; echo two >&2; printf three; exit 3",
            Duration::MAX,
        );
        assert_eq!(ended.to_string(), "ended with exit status: 3");
        assert_eq!(lines, ["one", "two", "three"]);
    }

    #[test]
    fn a_hanging_session_is_killed_with_its_groups() {
        let start = Instant::now();
        let script = "trap '' TERM; set -m; sleep 60 & echo $!; wait";
        let (ended, lines) = shell(script, Duration::from_millis(200));
        assert!(matches!(ended, Ended::OutOfTime(_)), "{ended}");
        assert!(start.elapsed() < Duration::from_secs(30));
        let stat = fs::read_to_string(format!("/proc/{}/stat", lines[0])).unwrap_or_default();
        // Gone, or dead and not yet buried.
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }

    #[test]
    fn the_session_in_stat() {
        assert_eq!(session("7 (a) b) S 6 5 4 3"), Some(4));
        assert_eq!(session("7 (a) Z 6 5 4 3"), None);
        assert_eq!(session(""), None);
    }
}
