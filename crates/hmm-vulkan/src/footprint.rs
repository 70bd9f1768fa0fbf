//! What a driver takes of the process, so that it never migrates.
//!
//! A driver's threads (their stacks, their heaps) and its tables must stay where they
//! are: unmapping waits for a kernel, with a lock held that a fault's answer needs, so
//! the kernel's end must not depend on such an answer. Nobody tells what a driver has
//! mapped, so the process's mappings are compared before and after the calls in which it
//! does so: when it is opened, and when a kernel is compiled (with llvmpipe, at its first
//! dispatch).
//!
//! Addresses do not tell everything: what the program unmaps meanwhile, a compiler can get.
//! So a mapping is an old one only if what may be done with it is the same as before (what
//! a kernel needs of a compiler's work is its code and its constants, and no program writes
//! there), and a small one only if it has not changed, or grown.
//!
//! Stacks of threads that have ended are used again by new ones, so the driver's threads
//! are looked up as well: the kernel knows where each one's stack is.
//!
//! What other threads of the program map in that very moment is taken along, and then
//! does not migrate either. So open devices early. Heaps (glibc's arenas) are excluded as
//! a whole, 64 MiB each: those that are new, and the one of the driver's thread. One that a
//! thread of the program has left behind when it ended can be a driver's thread's later,
//! and is not recognised. If a driver's thread shares the main heap with the program,
//! which glibc does only when it has run out of arenas, that heap cannot be excluded:
//! [`Taken::shares_heap`] says so.

use std::fs;
use std::time::{Duration, Instant};

use hmm_types::{PageRange, VirtAddr};

/// Size and alignment of one of glibc's heaps outside of the main one.
const HEAP: u64 = 64 << 20;
/// Larger mappings that appear while a kernel runs are more likely the program's.
const LATE_MAX: u64 = 16 << 20;
/// What is smaller has not shrunk, but was unmapped and is something else.
const SMALL: u64 = 64 << 10;

/// Memory that may migrate, as of some moment.
#[derive(Debug)]
pub(crate) struct Footprint {
    movable: Vec<Mapping>,
    threads: Vec<u32>,
}

/// A mapping that may migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// As in /proc/PID/maps.
    access: [u8; 4],
}

impl Mapping {
    fn contains(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// Whether it is a heap that is not the main one: it begins at a multiple of its size,
    /// and holds all of that.
    fn is_heap(&self, maps: &str) -> bool {
        let end = self.start + HEAP;
        self.start.is_multiple_of(HEAP) && is_held(maps, self.end, end)
    }
}

/// What has appeared since then.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) ranges: Vec<PageRange>,
    /// The calling thread allocates from the program's main heap.
    pub(crate) shares_heap: bool,
}

impl Footprint {
    /// The process's mappings now; none where there is no /proc.
    pub(crate) fn now() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self {
            movable: movable(&maps),
            threads: threads(),
        }
    }

    /// What was mapped since `self`. With `late`, small pieces and heaps only.
    pub(crate) fn taken(&self, late: bool) -> Taken {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mut taken = self.compare(&maps, heap_address(), late);
        let new = threads();
        let new = new.iter().filter(|thread| !self.threads.contains(thread));
        let movable = movable(&maps);
        for stack in new.filter_map(|&thread| stack_of(thread)) {
            let known = taken.ranges.iter();
            let mut known = known.filter(|range| range.contains(VirtAddr::new(stack)));
            let mapping = movable.iter().find(|mapping| mapping.contains(stack));
            if let (None, Some(&Mapping { start, end, .. })) = (known.next(), mapping) {
                let range = PageRange::new(VirtAddr::new(start), end - start);
                taken.ranges.extend(range.ok());
            }
        }
        taken
    }

    fn compare(&self, maps: &str, heap_of_thread: u64, late: bool) -> Taken {
        let after = movable(maps);
        let mut found: Vec<[u64; 2]> = Vec::new();
        let mut shares_heap = true;
        for mapping in &after {
            let &Mapping { start, end, .. } = mapping;
            let heap = mapping.is_heap(maps);
            if mapping.contains(heap_of_thread) {
                shares_heap = !heap;
                if heap {
                    found.push([start, start + HEAP]);
                    continue;
                }
            }
            for new in self.new_of(mapping) {
                if heap && end - start <= HEAP {
                    // Of one that was there before only the program knows the rest.
                    if new[0] == start {
                        found.push([start, start + HEAP]);
                    }
                } else if !late || new[1] - new[0] <= LATE_MAX {
                    found.push(new);
                }
            }
        }
        found.sort_unstable();
        let mut ranges: Vec<PageRange> = Vec::new();
        let mut merged: Vec<[u64; 2]> = Vec::new();
        for [start, end] in found {
            match merged.last_mut() {
                Some(last) if last[1] >= start => last[1] = last[1].max(end),
                _ => merged.push([start, end]),
            }
        }
        for [start, end] in merged {
            let start = VirtAddr::new(start);
            ranges.extend(PageRange::new(start, end - start.get()).ok());
        }
        Taken {
            ranges,
            shares_heap,
        }
    }

    /// The parts of a mapping that are new.
    fn new_of(&self, mapping: &Mapping) -> Vec<[u64; 2]> {
        let whole = [mapping.start, mapping.end];
        let is_small = mapping.end - mapping.start <= SMALL;
        let grown = |known: &Mapping| mapping.start <= known.start && known.end <= mapping.end;
        let old = self.movable.iter();
        let old = old.filter(|known| known.access == mapping.access && (!is_small || grown(known)));
        minus(whole, old.map(|known| [known.start, known.end]))
    }
}

/// The heap that this thread allocates from, if it is none of the main one.
pub(crate) fn heap_of_this_thread() -> Option<PageRange> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let here = heap_address();
    let all = movable(&maps);
    let mapping = all.iter().find(|mapping| mapping.contains(here))?;
    let heap = PageRange::new(VirtAddr::new(mapping.start), HEAP).ok()?;
    mapping.is_heap(&maps).then_some(heap)
}

/// An address in the heap that this thread allocates from.
fn heap_address() -> u64 {
    let probe = Box::new(0u64);
    (&raw const *probe).addr() as u64
}

/// The private mappings in the text of /proc/PID/maps that are writable, or readable and
/// no file's (code that a driver has made): others never migrate.
fn movable(maps: &str) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let access: [u8; 4] = words.next()?.as_bytes().try_into().ok()?;
        let of_a_file = words.nth(2)? != "0";
        let address = |hex| u64::from_str_radix(hex, 16).ok();
        let [read, write, _, private] = access;
        let movable = private == b'p' && (write == b'w' || (read == b'r' && !of_a_file));
        let (start, end) = (address(start)?, address(end)?);
        movable.then_some(Mapping { start, end, access })
    };
    maps.lines().filter_map(parse).collect()
}

/// Whether address space is held from one address to the other, and of no use yet.
fn is_held(maps: &str, from: u64, upto: u64) -> bool {
    let holds = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let (end, access) = rest.split_once(' ')?;
        let address = |hex| u64::from_str_radix(hex, 16).ok();
        // What follows may have become one mapping with it.
        let whole = address(start)? == from && address(end)? >= upto;
        Some(whole && access.starts_with("---p"))
    };
    from >= upto || maps.lines().any(|line| holds(line) == Some(true))
}

/// The threads of this process.
fn threads() -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .collect()
}

/// An address in a thread's stack. `None` when it has ended, or its stack is not known in
/// the time that there is.
fn stack_of(thread: u32) -> Option<u64> {
    // It may not have begun to run: on a busy machine that takes a while.
    const LIMIT: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    loop {
        let call = fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).ok()?;
        if let Some(address) = thread_descriptor(thread).or_else(|| stack_pointer(&call)) {
            return Some(address);
        }
        if begun.elapsed() > LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where the C library keeps what it knows of a thread, which it does at the end of the
/// thread's stack. `None` before the thread has said it to the kernel.
fn thread_descriptor(thread: u32) -> Option<u64> {
    let (mut list, mut len) = (0u64, 0usize);
    let thread = i32::try_from(thread).ok()?;
    // SAFETY: the kernel writes one address and one length.
    let done = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            thread,
            &raw mut list,
            &raw mut len,
        )
    };
    (done == 0 && list != 0).then_some(list)
}

/// The stack pointer of a thread that waits for something, from its /proc/PID/syscall:
/// `NUMBER ARGUMENTS... STACK-POINTER INSTRUCTION-POINTER`, or `running`.
fn stack_pointer(call: &str) -> Option<u64> {
    let stack = call.split_ascii_whitespace().rev().nth(1)?;
    u64::from_str_radix(stack.trim_start_matches("0x"), 16).ok()
}

/// The parts of a range that lie in none of `others`, which are in order.
fn minus(range: [u64; 2], others: impl Iterator<Item = [u64; 2]>) -> Vec<[u64; 2]> {
    let mut parts = Vec::new();
    let [mut start, end] = range;
    for [from, to] in others {
        if to <= start || from >= end {
            continue;
        }
        if from > start {
            parts.push([start, from]);
        }
        start = start.max(to);
    }
    if start < end {
        parts.push([start, end]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(VirtAddr::new(start), end - start).unwrap()
    }

    #[test]
    fn what_is_new_is_found() {
        let before = "1000-3000 r-xp 0 8:1 7 /lib/x\n50000-80000 rw-p 0 0:0 0\n";
        let after = "1000-3000 r-xp 0 8:1 7 /lib/x\n40000-90000 rw-p 0 0:0 0\n\
                     a0000-b0000 r-xp 0 0:0 0\nb0000-c0000 r-xp 0 8:1 8 /lib/y\nc0000-d0000 rw-p 0 0:0 0 [stack]\n\
                     40000000-42000000 rw-p 0 0:0 0\n42000000-44000000 ---p 0 0:0 0\n\
                     48000000-48001000 rw-p 0 0:0 0\n";
        let footprint = Footprint {
            movable: movable(before),
            threads: Vec::new(),
        };
        let taken = footprint.compare(after, 0x5_0100, false);
        assert!(taken.shares_heap);
        let small = [
            range(0x4_0000, 0x5_0000),
            range(0x8_0000, 0x9_0000),
            range(0xa_0000, 0xb_0000),
            range(0xc_0000, 0xd_0000),
        ];
        assert_eq!(taken.ranges[..4], small);
        // A heap counts as a whole, what of it is not yet in use too.
        assert_eq!(taken.ranges[4], range(0x4000_0000, 0x4400_0000));
        // What lies like one and is none is not followed by more of it.
        assert_eq!(taken.ranges[5..], [range(0x4800_0000, 0x4800_1000)]);
    }

    #[test]
    fn what_took_the_place_of_something_else_is_new() {
        let before = "1000-3000 rw-p 0 0:0 0\n4000-6000 rw-p 0 0:0 0\n8000-9000 r--p 0 0:0 0\n\
                      100000-200000 rw-p 0 0:0 0\n";
        // Constants where a thread had its signal stack, something that has moved, and
        // what has grown on both sides.
        let after = "2000-4000 r--p 0 0:0 0\n5000-6000 rw-p 0 0:0 0\n7000-a000 r--p 0 0:0 0\n\
                     100000-180000 rw-p 0 0:0 0\n180000-184000 r-xp 0 0:0 0\n184000-240000 rw-p 0 0:0 0\n";
        let footprint = Footprint {
            movable: movable(before),
            threads: Vec::new(),
        };
        let expected = [
            range(0x2000, 0x4000),
            range(0x5000, 0x6000),
            range(0x7000, 0x8000),
            range(0x9000, 0xa000),
            range(0x18_0000, 0x18_4000),
            range(0x20_0000, 0x24_0000),
        ];
        assert_eq!(footprint.compare(after, 0, true).ranges, expected);
    }

    #[test]
    fn the_threads_own_heap_is_taken_even_if_it_is_old() {
        let maps = "80000000-80021000 rw-p 0 0:0 0\n80021000-84000000 ---p 0 0:0 0\n";
        let footprint = Footprint {
            movable: movable(maps),
            threads: Vec::new(),
        };
        let taken = footprint.compare(maps, 0x8000_0010, true);
        let whole = vec![range(0x8000_0000, 0x8400_0000)];
        assert_eq!(
            taken,
            Taken {
                ranges: whole,
                shares_heap: false
            }
        );
        // Large pieces are not a compiler's.
        let more = "40001000-48000000 rw-p 0 0:0 0\n80000000-80021000 rw-p 0 0:0 0\n\
                    80021000-84001000 ---p 0 0:0 0\n";
        assert_eq!(footprint.compare(more, 0x8000_0010, true).ranges.len(), 1);
        assert_eq!(footprint.compare(more, 0x8000_0010, false).ranges.len(), 2);
    }

    #[test]
    fn a_new_mapping_of_this_process_is_found() {
        let before = Footprint::now();
        let memory = vec![1u8; 8 << 20];
        let taken = before.taken(false);
        let middle = VirtAddr::new(memory.as_ptr().addr() as u64 + (4 << 20));
        assert!(taken.ranges.iter().any(|range| range.contains(middle)));
    }

    #[test]
    fn a_new_threads_stack_is_found_wherever_it_is() {
        use std::sync::atomic::{AtomicBool, Ordering};

        for busy in [false, true] {
            // A stack that has been used before, and is no new mapping.
            std::thread::spawn(|| ()).join().unwrap();
            let before = Footprint::now();
            let (sender, receiver) = std::sync::mpsc::channel();
            let (end, ends) = std::sync::mpsc::channel::<()>();
            let works = AtomicBool::new(busy);
            let taken = std::thread::scope(|scope| {
                let works = &works;
                scope.spawn(move || {
                    let local = 0u8;
                    sender.send((&raw const local).addr() as u64).unwrap();
                    while works.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                    let _ = ends.recv();
                });
                let stack = VirtAddr::new(receiver.recv().unwrap());
                let taken = before.taken(false);
                works.store(false, Ordering::Relaxed);
                drop(end);
                taken.ranges.iter().any(|range| range.contains(stack))
            });
            assert!(taken, "busy: {busy}");
        }
    }
}
