//! What a terminal receives, cut into lines.

use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A longer line is handed on in parts.
const LIMIT_BYTES: usize = 64 << 10;

/// The side of a terminal that receives.
#[derive(Debug)]
pub struct Lines {
    terminal: OwnedFd,
    pending: Vec<u8>,
}

impl Lines {
    pub fn new(terminal: OwnedFd) -> Self {
        let pending = Vec::new();
        Self { terminal, pending }
    }

    /// Waits for more, and hands on what is whole. Says whether there was more.
    pub fn read(&mut self, wait: &Timespec, mut line: impl FnMut(&str)) -> Result<bool> {
        let mut ready = [PollFd::new(&self.terminal, PollFlags::IN)];
        poll(&mut ready, Some(wait))?;
        if !ready[0].revents().contains(PollFlags::IN) {
            if ready[0].revents().contains(PollFlags::HUP) {
                // Nobody has it open any more; poll no longer waits.
                thread::sleep(Duration::try_from(*wait)?);
            }
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        let count = rustix::io::read(&self.terminal, &mut bytes).unwrap_or(0);
        self.pending.extend_from_slice(&bytes[..count]);
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let whole: Vec<u8> = self.pending.drain(..=end).collect();
            line(String::from_utf8_lossy(&whole).trim_end());
        }
        if self.pending.len() > LIMIT_BYTES {
            line(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        }
        Ok(count > 0)
    }

    /// Hands on a line that has no end.
    pub fn last(self, line: impl FnOnce(&str)) {
        if !self.pending.is_empty() {
            line(String::from_utf8_lossy(&self.pending).trim_end());
        }
    }
}
