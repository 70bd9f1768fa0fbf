//! Lines of a file under /proc, read without the heap.

use std::os::fd::BorrowedFd;

use rustix::io::{Result, pread};

/// Longer than a path of PATH_MAX with the columns before it.
const CAPACITY: usize = 8192;

/// Reads a file line by line through a buffer on the stack. What a line has
/// beyond the buffer is left out.
pub(crate) struct Lines<'a> {
    fd: BorrowedFd<'a>,
    offset: u64,
    buffer: [u8; CAPACITY],
    start: usize,
    end: usize,
}

impl<'a> Lines<'a> {
    pub(crate) fn new(fd: BorrowedFd<'a>) -> Self {
        Self {
            fd,
            offset: 0,
            buffer: [0; CAPACITY],
            start: 0,
            end: 0,
        }
    }

    /// The next line, without its end; `None` behind the last one.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>> {
        let mut seen = 0;
        loop {
            let held = &self.buffer[self.start..self.end];
            if let Some(len) = held[seen..].iter().position(|&byte| byte == b'\n') {
                let line = self.start..self.start + seen + len;
                self.start = line.end + 1;
                return Ok(Some(&self.buffer[line]));
            }
            seen = held.len();
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            if self.end == CAPACITY {
                // Keep the line's head; its tail falls away.
                self.end = CAPACITY / 2;
                seen = self.end;
            }
            let more = pread(self.fd, &mut self.buffer[self.end..], self.offset)?;
            if more == 0 {
                let line = self.start..self.end;
                self.start = self.end;
                return Ok((!line.is_empty()).then(|| &self.buffer[line]));
            }
            self.offset += more as u64;
            self.end += more;
        }
    }
}

/// The number in base 16 at the start of `text`, and what follows it.
pub(crate) fn hex(text: &[u8]) -> Option<(u64, &[u8])> {
    number(text, 16)
}

/// The number in base 10 at the start of `text`, and what follows it.
pub(crate) fn decimal(text: &[u8]) -> Option<(u64, &[u8])> {
    number(text, 10)
}

fn number(text: &[u8], base: u32) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    for &byte in text {
        let Some(digit) = char::from(byte).to_digit(base) else {
            break;
        };
        value = value.checked_mul(base.into())?.checked_add(digit.into())?;
        len += 1;
    }
    (len > 0).then(|| (value, &text[len..]))
}
