//! Other processes, which reach for memory by system calls and /proc/PID/mem.

use super::*;

/// Words of the page through which a [`Peer`] is asked.
pub(crate) const ASKED: usize = 0;
pub(crate) const COMMAND: usize = 1;
pub(crate) const ANSWERED: usize = 2;
pub(crate) const ANSWER: usize = 3;
/// Where loops say what they have done, and what was wrong.
pub(crate) const ROUNDS: usize = 4;
pub(crate) const REFUSED: usize = 5;
pub(crate) const WRONG_WORD: usize = 6;
pub(crate) const WRONG_VALUE: usize = 7;
pub(crate) const LAST_SEED: usize = 8;
/// The thread to attach to.
pub(crate) const THREAD: usize = 9;

pub(crate) fn shared(pages: usize) -> Map {
    let map = Map::with(
        pages,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
        -1,
    );
    // Present from the start: the peer has no engine to ask.
    for page in 0..pages {
        map.set(page * WORDS, 0);
    }
    map
}

pub(crate) fn cell(map: &Map, word: usize) -> &AtomicU64 {
    // SAFETY: a word of memory that both processes use as atomics.
    unsafe { AtomicU64::from_ptr(map.word(word)) }
}

/// Another process that does what it is asked to. It is forked before there is
/// an engine, so that none of its pages are ever owed to it.
pub(crate) struct Peer<'a> {
    pid: i32,
    pub(crate) control: &'a Map,
}

impl<'a> Peer<'a> {
    /// `body` gets a command; it may make system calls and touch memory, and
    /// nothing else: other threads' locks are held for ever in there.
    pub(crate) fn start(control: &'a Map, body: impl Fn(u64) -> i64) -> Self {
        let pid = fork(|| {
            // SAFETY: ends this process when the test's thread ends.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let mut last = 0;
            loop {
                let asked = cell(control, ASKED).load(Ordering::Acquire);
                if asked == last {
                    // SAFETY: sleeps.
                    unsafe { libc::usleep(50) };
                    continue;
                }
                last = asked;
                let answer = body(cell(control, COMMAND).load(Ordering::Relaxed));
                cell(control, ANSWER).store(answer.cast_unsigned(), Ordering::Relaxed);
                cell(control, ANSWERED).store(asked, Ordering::Release);
            }
        });
        Self { pid, control }
    }

    /// What it answers: usually a count, or minus an error's number.
    pub(crate) fn ask(&self, command: u64) -> i64 {
        let number = cell(self.control, ASKED).load(Ordering::Relaxed) + 1;
        cell(self.control, COMMAND).store(command, Ordering::Relaxed);
        cell(self.control, ASKED).store(number, Ordering::Release);
        let since = Instant::now();
        while cell(self.control, ANSWERED).load(Ordering::Acquire) != number {
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "the other process does not answer"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
        cell(self.control, ANSWER)
            .load(Ordering::Relaxed)
            .cast_signed()
    }

    /// Has it do its loop; how many rounds it did, of which all were right.
    pub(crate) fn loops(&self, what: &str) -> u64 {
        let answer = self.ask(LOOP);
        let told = |word| cell(self.control, word).load(Ordering::Relaxed);
        let rounds = told(ROUNDS);
        println!("{what}: {rounds} rounds, {} refused", told(REFUSED));
        assert_ne!(
            answer,
            WRONG,
            "{what}: word {} is {:#x} in round {rounds}, after {:#x}",
            told(WRONG_WORD),
            told(WRONG_VALUE),
            told(LAST_SEED)
        );
        assert!(
            answer >= 0,
            "{what}: {}",
            Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(0))
        );
        rounds
    }

    /// Asks for a count.
    pub(crate) fn try_count(&self, command: u64) -> Result<usize> {
        let answer = self.ask(command);
        usize::try_from(answer).map_err(|_| {
            Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(libc::ENOTRECOVERABLE))
        })
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        // SAFETY: this test's child.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        if !std::thread::panicking() {
            wait(self.pid);
        }
    }
}

/// For the peer: an error's number, negative; nothing is allocated.
pub(crate) fn failed() -> i64 {
    // SAFETY: the place where the C library keeps this thread's error.
    -i64::from(unsafe { *libc::__errno_location() })
}

/// For the peer: a count, or minus an error's number.
pub(crate) fn answer(result: isize) -> i64 {
    if result < 0 { failed() } else { result as i64 }
}

/// For the peer: nanoseconds of a clock.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: room for a time.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// What a loop of the peer says that met wrong data.
pub(crate) const WRONG: i64 = -10_000;

/// Ways into another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// process_vm_readv(2) and process_vm_writev(2).
    Calls,
    /// /proc/PID/mem.
    File,
}

/// For the peer: moves bytes between its own memory and the test's.
pub(crate) fn reach(
    how: Reach,
    pid: i32,
    file: RawFd,
    local: *mut u8,
    remote: *mut u8,
    write: bool,
) -> i64 {
    reach_bytes(how, pid, file, local, remote, write, REMOTE_PAGES * PAGE)
}

pub(crate) fn reach_bytes(
    how: Reach,
    pid: i32,
    file: RawFd,
    local: *mut u8,
    remote: *mut u8,
    write: bool,
    bytes: usize,
) -> i64 {
    match how {
        Reach::Calls => {
            let local = libc::iovec {
                iov_base: local.cast(),
                iov_len: bytes,
            };
            let remote = libc::iovec {
                iov_base: remote.cast(),
                iov_len: bytes,
            };
            let call = if write {
                libc::process_vm_writev
            } else {
                libc::process_vm_readv
            };
            // SAFETY: memory that is this process's; the kernel checks the other's.
            answer(unsafe { call(pid, &raw const local, 1, &raw const remote, 1, 0) })
        }
        Reach::File => {
            let Ok(at) = i64::try_from(remote.expose_provenance()) else {
                return -i64::from(libc::EINVAL);
            };
            // SAFETY: as above.
            answer(unsafe {
                if write {
                    libc::pwrite(file, local.cast(), bytes, at)
                } else {
                    libc::pread(file, local.cast(), bytes, at)
                }
            })
        }
    }
}

/// Pages of memory that peers reach for.
pub(crate) const REMOTE_PAGES: usize = 32;

pub(crate) const READ_ALL: u64 = 1;
pub(crate) const WRITE_ALL: u64 = 2;
pub(crate) const LOOP: u64 = 3;

/// A test of one way into this process's memory: while pages are at rest, or
/// while they move.
pub(crate) fn another_process_reaches(how: Reach, moving: bool) {
    let (control, copy) = (shared(1), shared(REMOTE_PAGES));
    // Empty at the fork, so that no page is shared with the peer.
    let (map, steady) = (Map::new(REMOTE_PAGES), Map::new(REMOTE_PAGES));
    let pid = std::process::id().cast_signed();
    let path = CString::new(format!("/proc/{pid}/mem")).expect("no zero in it");
    let bytes = map.bytes() as i64;
    let peer = Peer::start(&control, |command| {
        let file = if how == Reach::File {
            // SAFETY: a path that ends with a zero.
            unsafe { libc::open(path.as_ptr(), libc::O_RDWR) }
        } else {
            -1
        };
        if how == Reach::File && file < 0 {
            return failed();
        }
        let go = |map: &Map, write| reach(how, pid, file, copy.at(), map.at(), write);
        let result = match command {
            READ_ALL => go(&map, false),
            WRITE_ALL => go(&map, true),
            _ => peer_loop(&control, &copy, &map, &steady, &go, bytes),
        };
        if file >= 0 {
            // SAFETY: opened above.
            unsafe { libc::close(file) };
        }
        result
    });
    let (hmm, device) = engine(16);
    if moving {
        needs_move!(hmm, "what holds pages cannot be seen");
    }
    steady.fill(100);
    map.fill(101);
    // At home: whether this is allowed at all.
    match peer.try_count(READ_ALL) {
        Ok(done) => assert_eq!(done, map.bytes(), "short"),
        Err(error) => skip!("{how:?} of another process: {error}"),
    }
    copy.check(101);
    if moving {
        reach_while_moving(&hmm, &device, how, &peer, &map, &steady);
    } else {
        reach_at_rest(&hmm, &device, how, &peer, &map, &copy);
    }
    drop(peer);
    drop((map, steady));
    end(hmm, &device);
}

pub(crate) fn reach_at_rest(
    hmm: &Hmm,
    device: &SoftwareDevice,
    how: Reach,
    peer: &Peer<'_>,
    map: &Map,
    copy: &Map,
) {
    for by_device in [false, true] {
        let seed = 102 + u64::from(by_device);
        map.fill(seed);
        send(hmm, map.range(), device);
        if by_device {
            fill_by_device(device, map, seed + 10);
            fill_by_device(device, map, seed);
        }
        copy.fill(0);
        let done = reached(hmm, how, "read", map, || peer.try_count(READ_ALL));
        assert_eq!(done, map.bytes(), "{how:?}: short read");
        copy.check(seed);
        // And back, over pages that are all away again.
        copy.fill(seed + 20);
        send(hmm, map.range(), device);
        let done = reached(hmm, how, "write", map, || peer.try_count(WRITE_ALL));
        assert_eq!(done, map.bytes(), "{how:?}: short write");
        map.check(seed + 20);
        send(hmm, map.range(), device);
        map.check(seed + 20);
    }
}

pub(crate) fn reach_while_moving(
    hmm: &Hmm,
    device: &SoftwareDevice,
    how: Reach,
    peer: &Peer<'_>,
    map: &Map,
    steady: &Map,
) {
    while_moving(hmm, device, &[map, steady], || {
        let rounds = peer.loops(&format!("{how:?}"));
        assert!(
            rounds > 0 || how == Reach::File || !hmm.serves_kernel_faults(),
            "{how:?}: nothing was done"
        );
    });
    steady.check(100);
    let last = cell(peer.control, LAST_SEED).load(Ordering::Relaxed);
    if last != 0 {
        map.check(last);
    }
}

/// What a process gets that reaches for pages that are away. Where the kernel
/// cannot wait for them, it is refused, gets nothing wrong, and finds them once
/// they were touched.
pub(crate) fn reached(
    hmm: &Hmm,
    how: Reach,
    what: &str,
    map: &Map,
    go: impl Fn() -> Result<usize>,
) -> usize {
    let result = go();
    if let Ok(done) = result
        && done == map.bytes()
    {
        return done;
    }
    // The kernel does not wait for a userfaultfd in reads of /proc/PID/mem.
    assert!(
        how == Reach::File || !hmm.serves_kernel_faults(),
        "{how:?}: {what}: {result:?}"
    );
    println!("{how:?}: {what} of pages that are away: {result:?}");
    for page in 0..map.pages() {
        map.get(page * WORDS);
    }
    go().unwrap_or_else(|error| panic!("{how:?}: {what} of pages that were touched: {error}"))
}

/// For the peer: writes ever new patterns to one mapping of the test and reads
/// them back, and reads another one that stays the same.
pub(crate) fn peer_loop(
    control: &Map,
    copy: &Map,
    map: &Map,
    steady: &Map,
    go: &impl Fn(&Map, bool) -> i64,
    bytes: i64,
) -> i64 {
    let end = now() + u64::try_from(LONG.as_nanos()).unwrap_or(0);
    let mut seed = 1000;
    let mut refused = 0;
    let mut rounds = 0;
    let refusal = |result: i64| {
        result == -i64::from(libc::EFAULT)
            || result == -i64::from(libc::EIO)
            || (0..bytes).contains(&result)
    };
    cell(control, LAST_SEED).store(0, Ordering::Relaxed);
    while now() < end {
        seed += 1;
        copy.fill(seed);
        let written = go(map, true);
        if written != bytes {
            if !refusal(written) {
                return written;
            }
            // What is in there now is a mixture.
            cell(control, LAST_SEED).store(0, Ordering::Relaxed);
            refused += 1;
            cell(control, REFUSED).store(refused, Ordering::Relaxed);
            continue;
        }
        cell(control, LAST_SEED).store(seed, Ordering::Relaxed);
        for (map, seed) in [(map, seed), (steady, 100)] {
            copy.fill(1);
            let read = go(map, false);
            if read != bytes {
                if !refusal(read) {
                    return read;
                }
                refused += 1;
                cell(control, REFUSED).store(refused, Ordering::Relaxed);
                continue;
            }
            if let Some(word) = copy.wrong(0, REMOTE_PAGES, seed) {
                cell(control, WRONG_WORD).store(word as u64, Ordering::Relaxed);
                cell(control, WRONG_VALUE).store(copy.get(word), Ordering::Relaxed);
                cell(control, LAST_SEED).store(seed, Ordering::Relaxed);
                return WRONG;
            }
        }
        rounds += 1;
        cell(control, ROUNDS).store(rounds, Ordering::Relaxed);
    }
    0
}

#[test]
pub(crate) fn another_process_reads_and_writes_by_system_calls() {
    let _dog = watchdog("another_process_reads_and_writes_by_system_calls", 60);
    another_process_reaches(Reach::Calls, false);
}

#[test]
pub(crate) fn another_process_reads_and_writes_by_system_calls_while_pages_move() {
    let _dog = watchdog("another_process_reads_and_writes_while_pages_move", 60);
    another_process_reaches(Reach::Calls, true);
}

#[test]
pub(crate) fn another_process_reads_and_writes_by_proc_mem() {
    let _dog = watchdog("another_process_reads_and_writes_by_proc_mem", 60);
    another_process_reaches(Reach::File, false);
}

#[test]
#[ignore = "a limit: the kernel holds the page by reference only (docs/limits.md)"]
pub(crate) fn another_process_reads_and_writes_by_proc_mem_while_pages_move() {
    let _dog = watchdog("another_process_uses_proc_mem_while_pages_move", 60);
    another_process_reaches(Reach::File, true);
}
