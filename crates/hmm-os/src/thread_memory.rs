//! Memory of a thread that the kernel itself reads and writes.
//!
//! The kernel pushes signal frames onto stacks, writes the rseq area whenever
//! it has preempted a thread, and walks the robust futex list when one ends. If
//! it meets a page that is away, and only faults of user mode are delivered,
//! the thread is killed. So without all faults that memory stays where it is.
//!
//! Where it is: the C library has told the kernel of each thread's robust list,
//! which lies in the thread's control block. Around that lie the rseq area and
//! the thread's number, and below it, in the same mapping, the stack.

use hmm_mem::Vec;
use hmm_types::{PageRange, VirtAddr};
use rustix::io::Result;

use crate::map::Map;
use crate::tasks::Tasks;

/// The thread's number lies so close before the robust list's head, at most.
const BEFORE_HEAD: u64 = 64;
/// Sizes of the robust list's head, and of the rseq area as it was first. Not
/// more: a control block ends where its page does.
const HEAD_SIZE: u64 = 24;
const RSEQ_SIZE: u64 = 32;
/// What the kernel uses of the rseq area (Linux 6.3).
const AT_RSEQ_FEATURE_SIZE: u64 = 27;

/// Finds the memory of the process's threads.
#[derive(Debug)]
pub(crate) struct ThreadMemory {
    tasks: Tasks,
    pid: u32,
    /// From the robust list's head to the rseq area, where there is one.
    rseq: Option<i64>,
}

impl ThreadMemory {
    pub(crate) fn open() -> Result<Self> {
        Ok(Self {
            tasks: Tasks::open()?,
            pid: std::process::id(),
            rseq: rseq_from_head(),
        })
    }

    /// All of it, in no order.
    pub(crate) fn find(&self, map: &Map) -> Result<Vec<PageRange>> {
        let mut found = hmm_mem::vec();
        self.tasks.any(|thread| {
            self.of_thread(thread, map, &mut found)?;
            Ok(false)
        })?;
        found.extend(mapping_at(map, main_stack())?);
        Ok(found)
    }

    fn of_thread(&self, thread: u32, map: &Map, found: &mut Vec<PageRange>) -> Result<()> {
        // A thread that has just begun or ended has none.
        let Some(head) = robust_list(thread) else {
            return Ok(());
        };
        let mut low = head.saturating_sub(BEFORE_HEAD);
        let mut high = head.saturating_add(HEAD_SIZE);
        if let Some(rseq) = self.rseq {
            let rseq = head.saturating_add_signed(rseq);
            low = low.min(rseq);
            // SAFETY: reads the auxiliary vector.
            let size = unsafe { libc::getauxval(AT_RSEQ_FEATURE_SIZE) };
            high = high.max(rseq.saturating_add(size.max(RSEQ_SIZE)));
        }
        if thread != self.pid
            && let Some(mapping) = mapping_at(map, head)?
        {
            // Its stack; the first thread's is elsewhere.
            low = mapping.start().get();
        }
        found.extend(PageRange::covering(VirtAddr::new(low), high - low));
        Ok(())
    }
}

fn mapping_at(map: &Map, address: u64) -> Result<Option<PageRange>> {
    let Ok(page) = PageRange::page_of(VirtAddr::new(address)) else {
        return Ok(None);
    };
    let mut found = None;
    map.visit(page, &mut |vma| found = Some(vma.range))?;
    Ok(found)
}

/// Where a thread's robust list begins; `None` when it has none, or is gone.
fn robust_list(thread: u32) -> Option<u64> {
    let (mut head, mut len) = (0u64, 0usize);
    // SAFETY: get_robust_list(2) writes an address and a length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            thread,
            &raw mut head,
            &raw mut len,
        )
    };
    (result == 0 && head != 0).then_some(head)
}

/// An address in the first thread's stack: the kernel has put random bytes
/// for the C library there.
fn main_stack() -> u64 {
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_RANDOM) }
}

/// How far the rseq area lies behind the robust list's head: the same in all
/// threads. The C library tells it in relation to the thread pointer.
fn rseq_from_head() -> Option<i64> {
    let symbol = |name: &std::ffi::CStr| {
        // SAFETY: looks a name up.
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    };
    let offset = symbol(c"__rseq_offset")?.cast::<libc::ptrdiff_t>();
    // SAFETY: glibc 2.35 and later declare the symbol as a constant ptrdiff_t.
    let offset = unsafe { offset.read() } as i64;
    let head = robust_list(0)?;
    Some(thread_pointer()?.wrapping_sub(head).cast_signed() + offset)
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps, reason = "not known on every processor")]
fn thread_pointer() -> Option<u64> {
    let pointer: u64;
    // SAFETY: the ABI has the thread control block's address in its first word.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly)) };
    Some(pointer)
}

#[cfg(target_arch = "aarch64")]
#[allow(clippy::unnecessary_wraps, reason = "not known on every processor")]
fn thread_pointer() -> Option<u64> {
    let pointer: u64;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mrs {}, tpidr_el0", out(reg) pointer, options(nostack, nomem)) };
    Some(pointer)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const fn thread_pointer() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_and_control_blocks_are_found() {
        let memory = ThreadMemory::open().unwrap();
        let map = Map::open(true).unwrap();
        let has = |found: &[PageRange], address: u64| {
            found
                .iter()
                .any(|range| range.contains(VirtAddr::new(address)))
        };
        let (to, from) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            let local = 0u64;
            let stack = std::ptr::from_ref(&local).addr() as u64;
            to.send([stack, thread_pointer().unwrap()]).unwrap();
            wait.recv().unwrap();
        });
        let theirs = from.recv().unwrap();
        let local = 0u64;
        let ours = [
            std::ptr::from_ref(&local).addr() as u64,
            thread_pointer().unwrap(),
            main_stack(),
        ];
        let found = memory.find(&map).unwrap();
        for address in ours.into_iter().chain(theirs) {
            assert!(has(&found, address), "{address:#x} in {found:?}");
        }
        let heap = vec![0u8; 1 << 20];
        assert!(!has(&found, heap.as_ptr().addr() as u64 + (1 << 19)));
        done.send(()).unwrap();
        other.join().unwrap();
    }
}
