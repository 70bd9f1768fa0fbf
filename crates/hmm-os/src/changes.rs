//! Threads that are changing the process's mappings.
//!
//! A thread changes them under the kernel's lock, lets go of it, and queues its
//! event; then it sleeps in its system call until that is read. In between it
//! may have to wait for a processor. Whether it has got as far as to sleep is
//! what /proc/self/task/*/syscall tells: the call and its arguments, or
//! "running".

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hmm_types::{PageRange, VirtAddr};
use rustix::io::{Errno, Result};

use crate::tasks::{Tasks, open_file};
use crate::text::{Lines, decimal, hex};

/// A thread that is not found for so long does not come. It may have used a
/// call that is not known here; then its event is in the queue.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same where nothing can be looked up.
const BLIND_PATIENCE: Duration = Duration::from_millis(20);
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

/// Waits until a thread that has taken something away from `target` sleeps
/// until its event is read. The one that has remapped `mover` is not meant.
/// False when there was none for a while.
pub(crate) fn wait_until_reported(target: PageRange, mover: PageRange) -> bool {
    let start = Instant::now();
    loop {
        let patience = match is_reported(target, mover) {
            Ok(true) => return true,
            Ok(false) => PATIENCE,
            Err(_) => BLIND_PATIENCE,
        };
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

fn is_reported(target: PageRange, mover: PageRange) -> Result<bool> {
    Tasks::open()?.any(|thread| {
        let call = call_of(thread)?;
        Ok(call.is_some_and(|call| call.takes_from(target, mover)))
    })
}

/// A system call in which a thread sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    number: i64,
    arguments: [u64; 6],
}

/// `None` for a thread that runs, sleeps outside of a call, or has ended.
fn call_of(thread: u32) -> Result<Option<Call>> {
    let Some(file) = open_file(thread, "syscall")? else {
        return Ok(None);
    };
    match Lines::new(file.as_fd()).next() {
        Ok(line) => Ok(line.and_then(parse)),
        Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `11 0x7f2580316000 0x20000 0x0 ...`, or `running`, or `-1 ...`.
fn parse(line: &[u8]) -> Option<Call> {
    let (number, mut rest) = decimal(line)?;
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        let (value, behind) = hex(rest.strip_prefix(b" 0x")?)?;
        (*argument, rest) = (value, behind);
    }
    Some(Call {
        number: i64::try_from(number).ok()?,
        arguments,
    })
}

impl Call {
    /// Whether the call ends what was mapped in a part of `target`. One that
    /// does not say which addresses it is about may.
    fn takes_from(&self, target: PageRange, mover: PageRange) -> bool {
        let [first, second, _, flags, fifth, _] = self.arguments;
        let overlaps = |start: u64, bytes: u64| {
            PageRange::covering(VirtAddr::new(start), bytes)
                .is_ok_and(|range| range.overlaps(target))
        };
        match self.number {
            libc::SYS_munmap | libc::SYS_mmap => overlaps(first, second),
            libc::SYS_mremap => {
                let moved_here = flags & libc::MREMAP_FIXED as u64 != 0 && overlaps(fifth, second);
                first != mover.start().get() && (overlaps(first, second) || moved_here)
            }
            libc::SYS_brk | libc::SYS_shmdt | libc::SYS_shmat | libc::SYS_remap_file_pages => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = b"25 0x7f0000000000 0x3000 0x3000 0x3 0x7f0000010000 0x0 0x7ffd 0x7f25";
        let call = parse(line).unwrap();
        assert_eq!(call.number, 25);
        assert_eq!(call.arguments[..2], [0x7f00_0000_0000, 0x3000]);
        assert_eq!(call.arguments[4], 0x7f00_0001_0000);
        assert_eq!(parse(b"running"), None);
        assert_eq!(parse(b"-1 0x7ffd 0x7f25"), None);
    }

    #[test]
    fn only_what_takes_away_counts() {
        let range = |page: u64, pages| {
            PageRange::from_pages(
                VirtAddr::new(page * hmm_types::PAGE_SIZE),
                hmm_types::PageCount::new(pages),
            )
        };
        let call = |number, arguments: [u64; 5]| {
            let [a, b, c, d, e] = arguments;
            Call {
                number,
                arguments: [a, b, c, d, e, 0],
            }
        };
        let (target, mover) = (range(100, 4), range(500, 4));
        let takes = |call: Call| call.takes_from(target, mover);
        let fixed = libc::MREMAP_FIXED as u64;
        assert!(takes(call(libc::SYS_munmap, [0x66000, 0x1000, 0, 0, 0])));
        assert!(!takes(call(libc::SYS_munmap, [0x68000, 0x1000, 0, 0, 0])));
        assert!(!takes(call(libc::SYS_madvise, [0x66000, 0x1000, 0, 0, 0])));
        let away = [0x64000, 0x4000, 0x4000, fixed, 0x90_0000];
        assert!(takes(call(libc::SYS_mremap, away)));
        let mover = [500 << 12, 0x4000, 0x4000, fixed, 0x64000];
        assert!(!takes(call(libc::SYS_mremap, mover)));
        let over = [700 << 12, 0x4000, 0x4000, fixed, 0x64000];
        assert!(takes(call(libc::SYS_mremap, over)));
    }

    #[test]
    fn a_sleeping_thread_is_seen() {
        let (pipe, writer) = std::io::pipe().unwrap();
        let sleeper = std::thread::spawn(move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            (thread, pipe)
        });
        let (gone, pipe) = sleeper.join().unwrap();
        assert_eq!(call_of(gone.cast_unsigned()).unwrap(), None);
        let (to, from) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            to.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            let _ = rustix::io::read(&pipe, &mut [0u8; 1]);
        });
        let thread = from.recv().unwrap().cast_unsigned();
        let end = Instant::now() + Duration::from_secs(10);
        while call_of(thread)
            .unwrap()
            .is_none_or(|call| call.number != libc::SYS_read)
        {
            assert!(Instant::now() < end, "the thread is not seen in read(2)");
        }
        drop(writer);
        sleeper.join().unwrap();
    }
}
