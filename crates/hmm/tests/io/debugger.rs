//! A debugger: another process that stops a thread and looks.

use super::*;

/// For the peer: stops a thread of the test and has it go on again.
struct Attached {
    thread: i32,
}

impl Attached {
    fn to(thread: i32) -> std::result::Result<Self, i64> {
        // SAFETY: takes no memory; the kernel checks the thread.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0) } < 0 {
            return Err(failed());
        }
        let attached = Self { thread };
        // SAFETY: as above.
        if unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0) } < 0 {
            return Err(failed());
        }
        let mut status = 0;
        // SAFETY: waits for the stop that was just asked for.
        if unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } != thread {
            return Err(failed());
        }
        Ok(attached)
    }

    fn peek(&self, at: *mut u64) -> std::result::Result<u64, i64> {
        let mut value = 0u64;
        // SAFETY: the system call itself stores the word at its last argument.
        let result = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKDATA,
                self.thread,
                at,
                &raw mut value,
            )
        };
        if result < 0 { Err(failed()) } else { Ok(value) }
    }

    fn poke(&self, at: *mut u64, value: u64) -> std::result::Result<(), i64> {
        // SAFETY: writes to the test's memory, which is there for that.
        let result = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_POKEDATA,
                self.thread,
                at,
                value,
            )
        };
        if result < 0 { Err(failed()) } else { Ok(()) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the thread goes on.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.thread, 0, 0) };
    }
}

/// Which word of a page a debugger looks at: another one of each page.
const fn looked_at(page: usize) -> usize {
    page * WORDS + page * 7 % WORDS
}

/// For the peer: reads or writes one word of each page; how many it could.
fn peek_or_poke(control: &Map, copy: &Map, map: &Map, poke: bool) -> i64 {
    let thread = cell(control, THREAD).load(Ordering::Relaxed);
    let attached = match Attached::to(i32::try_from(thread).unwrap_or(0)) {
        Ok(attached) => attached,
        Err(error) => return error,
    };
    let mut done = 0;
    for page in 0..REMOTE_PAGES {
        let index = looked_at(page);
        let result = if poke {
            attached.poke(map.word(index), copy.get(index))
        } else {
            attached
                .peek(map.word(index))
                .map(|value| copy.set(index, value))
        };
        match result {
            Ok(()) => done += 1,
            // The kernel does not wait for a userfaultfd here.
            Err(error) if error == -i64::from(libc::EIO) => {}
            Err(error) => return error,
        }
    }
    done
}

/// For the peer: changes words of a thread that it has stopped and reads them
/// back, again and again.
fn debug_loop(control: &Map, map: &Map, steady: &Map) -> i64 {
    let thread = cell(control, THREAD).load(Ordering::Relaxed);
    let attached = match Attached::to(i32::try_from(thread).unwrap_or(0)) {
        Ok(attached) => attached,
        Err(error) => return error,
    };
    let end = now() + u64::try_from(LONG.as_nanos()).unwrap_or(0);
    let eio = -i64::from(libc::EIO);
    // What each page's word was set to; 0 for not at all.
    let mut last = [0u64; REMOTE_PAGES];
    let (mut rounds, mut refused) = (0, 0);
    while now() < end {
        let page = usize::try_from(rounds).unwrap_or(0) % REMOTE_PAGES;
        rounds += 1;
        let index = looked_at(page);
        match attached.poke(map.word(index), rounds) {
            Ok(()) => last[page] = rounds,
            Err(error) if error == eio => refused += 1,
            Err(error) => return error,
        }
        let other = usize::try_from(rounds * 5).unwrap_or(0) % REMOTE_PAGES;
        let looks = [
            (map, looked_at(other), last[other]),
            (steady, looked_at(other), pattern(100, looked_at(other))),
        ];
        for (map, index, right) in looks {
            match attached.peek(map.word(index)) {
                Ok(value) if right == 0 || value == right => {}
                Ok(value) => {
                    cell(control, WRONG_WORD).store(index as u64, Ordering::Relaxed);
                    cell(control, WRONG_VALUE).store(value, Ordering::Relaxed);
                    cell(control, LAST_SEED).store(right, Ordering::Relaxed);
                    return WRONG;
                }
                Err(error) if error == eio => refused += 1,
                Err(error) => return error,
            }
        }
        cell(control, ROUNDS).store(rounds, Ordering::Relaxed);
        cell(control, REFUSED).store(refused, Ordering::Relaxed);
    }
    0
}

#[test]
fn a_debugger_peeks_and_pokes() {
    let _dog = watchdog("a_debugger_peeks_and_pokes", 60);
    debug(false);
}

#[test]
#[ignore = "a limit: the kernel holds the page by reference only (docs/limits.md)"]
fn a_debugger_peeks_and_pokes_while_pages_move() {
    let _dog = watchdog("a_debugger_peeks_and_pokes_while_pages_move", 60);
    debug(true);
}

/// While pages are at rest, or while they move.
fn debug(moving: bool) {
    let (control, copy) = (shared(1), shared(REMOTE_PAGES));
    let (map, steady) = (Map::new(REMOTE_PAGES), Map::new(REMOTE_PAGES));
    let peer = Peer::start(&control, |command| match command {
        READ_ALL => peek_or_poke(&control, &copy, &map, false),
        WRITE_ALL => peek_or_poke(&control, &copy, &map, true),
        _ => debug_loop(&control, &map, &steady),
    });
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        // The thread that is stopped: one that holds nothing anybody needs.
        scope.spawn(|| {
            // SAFETY: takes no arguments.
            let thread = unsafe { libc::gettid() };
            cell(&control, THREAD).store(u64::from(thread.cast_unsigned()), Ordering::Relaxed);
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        while cell(&control, THREAD).load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        let (hmm, device) = engine(16);
        map.fill(110);
        steady.fill(100);
        // At home: whether this is allowed at all.
        match peer.try_count(READ_ALL) {
            Ok(done) => assert_eq!(done, REMOTE_PAGES, "memory at home"),
            Err(error) => skip!("ptrace: {error}"),
        }
        for index in (0..REMOTE_PAGES).map(looked_at) {
            assert_eq!(copy.get(index), pattern(110, index), "memory at home");
        }
        if moving {
            debug_while_moving(&hmm, &device, &peer, &map, &steady);
        } else {
            debug_at_rest(&hmm, &device, &peer, &map, &copy);
        }
        steady.check(100);
        end(hmm, &device);
    });
    drop(peer);
}

fn debug_at_rest(hmm: &Hmm, device: &SoftwareDevice, peer: &Peer<'_>, map: &Map, copy: &Map) {
    let words = || (0..REMOTE_PAGES).map(looked_at);
    for seed in [111, 112] {
        map.fill(seed);
        send(hmm, map.range(), device);
        copy.fill(0);
        for touched in [false, true] {
            let done = peer.try_count(READ_ALL).expect("PTRACE_PEEKDATA");
            println!("peeked at {done} of {REMOTE_PAGES} pages, touched {touched}");
            for index in words() {
                let value = copy.get(index);
                let none = value == pattern(0, index) && done < REMOTE_PAGES;
                assert!(
                    value == pattern(seed, index) || none,
                    "word {index} looks like {value:#x}"
                );
            }
            if touched {
                assert_eq!(done, REMOTE_PAGES, "pages that were touched");
            }
            for page in 0..REMOTE_PAGES {
                map.get(page * WORDS);
            }
        }
        send(hmm, map.range(), device);
        copy.fill(seed + 10);
        for touched in [false, true] {
            let done = peer.try_count(WRITE_ALL).expect("PTRACE_POKEDATA");
            println!("poked {done} of {REMOTE_PAGES} pages, touched {touched}");
            let changed = words()
                .filter(|&index| map.get(index) == pattern(seed + 10, index))
                .count();
            assert!(
                changed == done || touched && changed == REMOTE_PAGES,
                "{done} words were changed, {changed} are"
            );
            assert!(!touched || done == REMOTE_PAGES, "pages that were touched");
        }
        // Nothing else has changed.
        words().for_each(|index| map.set(index, pattern(seed, index)));
        map.check(seed);
    }
}

fn debug_while_moving(
    hmm: &Hmm,
    device: &SoftwareDevice,
    peer: &Peer<'_>,
    map: &Map,
    steady: &Map,
) {
    while_moving(hmm, device, &[map, steady], || {
        peer.loops("ptrace");
    });
}
