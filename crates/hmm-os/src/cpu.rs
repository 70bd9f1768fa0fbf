//! Processors.

use std::os::fd::AsFd;

use crate::tasks::open_file;
use crate::text::{Lines, decimal};

/// The processor that a thread of this process runs on, or ran on last; `None`
/// when there is no such thread. Takes some microseconds.
#[must_use]
pub fn cpu_of_thread(thread: u32) -> Option<usize> {
    /// Of what follows the name in parentheses, proc(5) counts it as field 39.
    const PROCESSOR: usize = 39 - 3;
    let file = open_file(thread, "stat").ok()??;
    let mut lines = Lines::new(file.as_fd());
    let line = lines.next().ok()??;
    let name_end = line.iter().rposition(|&byte| byte == b')')?;
    let mut fields = line[name_end + 1..]
        .trim_ascii()
        .split(|&byte| byte == b' ');
    let (cpu, _) = decimal(fields.nth(PROCESSOR)?)?;
    usize::try_from(cpu).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_where_it_must_be() {
        let allowed = crate::allowed_cpus();
        let pinned = *allowed.last().unwrap();
        let found = std::thread::spawn(move || {
            let mut set = rustix::thread::CpuSet::new();
            set.set(pinned);
            rustix::thread::sched_setaffinity(None, &set).unwrap();
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            cpu_of_thread(thread.cast_unsigned())
        });
        assert_eq!(found.join().unwrap(), Some(pinned));
        assert_eq!(cpu_of_thread(u32::MAX), None);
    }
}
