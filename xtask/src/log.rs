//! The output of a run, in a file.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

/// What a log may grow to. The harness of Linux 6.1 repeats a failed assertion
/// of a fixture's end until it is killed, which comes to gigabytes.
const LIMIT_BYTES: usize = 16 << 20;

/// Takes lines. Those that repeat the line before are counted, not written.
#[derive(Debug)]
pub struct Log<W = File> {
    file: W,
    last: String,
    repeats: u64,
    room_bytes: usize,
}

impl Log {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self::new(file))
    }
}

impl<W: Write> Log<W> {
    fn new(file: W) -> Self {
        Self {
            file,
            last: String::new(),
            repeats: 0,
            room_bytes: LIMIT_BYTES,
        }
    }

    /// Takes in a line. Says whether it is another than the one before.
    pub fn line(&mut self, line: &str) -> bool {
        if line == self.last && !line.is_empty() {
            self.repeats += 1;
            return false;
        }
        self.repeated();
        line.clone_into(&mut self.last);
        self.write(line);
        true
    }

    fn repeated(&mut self) {
        if self.repeats > 0 {
            let note = format!("[repeated {} times]", self.repeats);
            self.repeats = 0;
            self.write(&note);
        }
    }

    fn write(&mut self, line: &str) {
        let needed = line.len() + 1;
        if let Some(room) = self.room_bytes.checked_sub(needed) {
            self.room_bytes = room;
            // A log that cannot be written is missed, but no reason to stop.
            let _ = writeln!(self.file, "{line}");
        }
    }

    /// Ends it with a note, for which there is always room.
    pub fn end(mut self, note: &str) {
        self.room_bytes = LIMIT_BYTES;
        self.repeated();
        self.write(&format!("[{note}]"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_lines_are_counted() {
        let mut file = Vec::new();
        let mut log = Log::new(&mut file);
        let new = ["a", "b", "b", "b", "", "", "b"].map(|line| log.line(line));
        assert_eq!(new, [true, true, false, false, true, true, true]);
        log.line("b");
        log.end("ended");
        let text = String::from_utf8(file).unwrap();
        assert_eq!(
            text,
            "a\nb\n[repeated 2 times]\n\n\nb\n[repeated 1 times]\n[ended]\n"
        );
    }

    #[test]
    fn a_log_has_a_limit() {
        let mut file = Vec::new();
        let mut log = Log::new(&mut file);
        let lines = ["x", "y"].map(|letter| letter.repeat(LIMIT_BYTES / 10));
        for _ in 0..10 {
            lines.iter().for_each(|line| assert!(log.line(line)));
        }
        log.end("ended");
        assert!(file.len() < LIMIT_BYTES + 10 && file.ends_with(b"[ended]\n"));
    }
}
