//! The last line of a process that cannot go on.

use std::fmt::{self, Write};

/// Text on the stack; what does not fit is cut off.
pub(crate) struct Line {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Line {
    const CAPACITY: usize = 512;

    pub(crate) const fn new() -> Self {
        Self {
            bytes: [0; Self::CAPACITY],
            len: 0,
        }
    }

    /// Writes the line to standard error with one system call and no lock.
    pub(crate) fn send(mut self) {
        let end = self.len.min(Self::CAPACITY - 1);
        self.bytes[end] = b'\n';
        let _ = rustix::io::write(rustix::stdio::stderr(), &self.bytes[..=end]);
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = Self::CAPACITY - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}

/// Says why, and ends the process: going on would lose data or hang threads.
pub(crate) fn fail(message: fmt::Arguments<'_>) -> ! {
    let mut line = Line::new();
    let _ = write!(line, "hmm: {message}");
    line.send();
    std::process::abort()
}

/// Says why, and ends the process: for what would otherwise lose data or hang
/// threads. Touches no heap and takes no lock.
pub fn die(message: &str) -> ! {
    fail(format_args!("{message}"))
}

/// Writes one line to standard error. Touches no heap and takes no lock.
pub fn warn(message: &str) {
    let mut line = Line::new();
    let _ = line.write_str(message);
    line.send();
}
