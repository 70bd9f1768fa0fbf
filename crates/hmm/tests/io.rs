//! I/O in flight: the kernel, devices and other processes read and write memory
//! while it is on a device, or while it moves out and home all the time. The
//! data is right, or the page did not move and the report says why; never zeros,
//! never what was there before.
//!
//! For an ordinary user system calls on pages that are away fail with EFAULT
//! (docs/limits.md): there the memory is touched first, or the call is made
//! again.

mod common;

use std::ffi::CString;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{
    HUGE, Map, PAGE, Rng, WORDS, adds_up, all_free, engine, fetch, fork, nothing_staged, on_device,
    pattern, send, wait, watchdog,
};
use hmm::{Hmm, PageRange, Pointer, Report, SoftwareDevice, StayReason};

/// How long I/O runs while pages move.
const LONG: Duration = Duration::from_millis(900);

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().expect("a clean end");
}

fn code(error: &Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// What a system call says that counts bytes.
fn counted(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

/// Touches memory first where the kernel's own faults are not served.
fn make_ready(hmm: &Hmm, map: &Map) {
    if !hmm.serves_kernel_faults() {
        for page in 0..map.pages() {
            map.get(page * WORDS);
        }
    }
}

/// Whether a call has done all that it was to do. What an ordinary user may get
/// instead is EFAULT, or less than was asked for; others may not.
#[track_caller]
fn all_done(hmm: &Hmm, what: &str, result: &Result<usize>, bytes: usize) -> bool {
    match result {
        Ok(done) if *done == bytes => true,
        Ok(done) => {
            assert!(
                !hmm.serves_kernel_faults(),
                "{what}: {done} of {bytes} bytes"
            );
            false
        }
        Err(error) => {
            assert!(
                code(error) == libc::EFAULT && !hmm.serves_kernel_faults(),
                "{what}: {error}"
            );
            false
        }
    }
}

/// The device writes a pattern into all of `map`, where it is.
fn fill_by_device(device: &SoftwareDevice, map: &Map, seed: u64) {
    let first = Pointer::new(map.word(0));
    device
        .launch(map.pages(), |context, page| {
            for index in page * WORDS..(page + 1) * WORDS {
                context.store(first.at(index), pattern(seed, index))?;
            }
            Ok(())
        })
        .expect("a kernel that writes a pattern");
}

/// Stops a thread of a scope also when the other one panics.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a mover did.
#[derive(Debug, Default)]
struct Moves {
    moved: u64,
    pinned: u64,
}

/// Moves parts of `maps` out and home while `body` runs.
fn while_moving<T>(
    hmm: &Hmm,
    device: &SoftwareDevice,
    maps: &[&Map],
    body: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    let seed = common::seed();
    println!("seed {seed}");
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut rng = Rng::new(seed);
            let mut moves = Moves::default();
            while !stop.load(Ordering::Relaxed) {
                let map = maps[rng.below(maps.len())];
                let range = if rng.below(2) == 0 {
                    map.range()
                } else {
                    let first = rng.below(map.pages());
                    map.part(first, 1 + rng.below(map.pages() - first))
                };
                if rng.below(3) == 0 {
                    fetch(hmm, range);
                    continue;
                }
                let report = hmm.migrate(range, device.id()).expect("a migration");
                adds_up(&report, range);
                moves.moved += report.moved.get();
                for stay in &report.stayed {
                    assert!(
                        matches!(
                            stay.reason,
                            StayReason::Pinned
                                | StayReason::Busy
                                | StayReason::Raced
                                | StayReason::SharedCow
                        ),
                        "{report}"
                    );
                    if stay.reason == StayReason::Pinned {
                        moves.pinned += stay.range.pages().get();
                    }
                }
            }
            moves
        });
        let result = {
            let _stop = StopAtEnd(&stop);
            body()
        };
        let moves = mover.join().expect("the mover");
        println!(
            "{} pages moved out meanwhile, {} times one was pinned",
            moves.moved, moves.pinned
        );
        assert!(moves.moved > 0, "nothing moved meanwhile");
        result
    })
}

// Files past the page cache.

/// A file without a name whose reads and writes go straight to memory.
fn direct_file() -> std::result::Result<OwnedFd, String> {
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_DIRECT | libc::O_CLOEXEC;
    // SAFETY: a path that ends with a zero, and a mode.
    let fd = unsafe { libc::open(c"/var/tmp".as_ptr(), flags, 0o600) };
    if fd < 0 {
        return Err(format!(
            "no file with O_DIRECT in /var/tmp: {}",
            Error::last_os_error()
        ));
    }
    // SAFETY: a descriptor that nobody else owns.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // Some file systems take the flag and refuse the I/O.
    let probe = Map::new(1);
    probe.fill(1);
    write_at(&file, &probe, 0, 1).map_err(|error| format!("O_DIRECT in /var/tmp: {error}"))?;
    Ok(file)
}

/// Writes pages of `map` to the same place of a file.
fn write_at(file: &OwnedFd, map: &Map, first: usize, pages: usize) -> Result<usize> {
    let at = i64::try_from(first * PAGE).expect("a small file");
    // SAFETY: in the mapping.
    counted(unsafe { libc::pwrite(file.as_raw_fd(), map.page(first).cast(), pages * PAGE, at) })
}

/// Reads pages of `map` from the same place of a file.
fn read_at(file: &OwnedFd, map: &Map, first: usize, pages: usize) -> Result<usize> {
    let at = i64::try_from(first * PAGE).expect("a small file");
    // SAFETY: in the mapping, which nobody else uses meanwhile.
    counted(unsafe { libc::pread(file.as_raw_fd(), map.page(first).cast(), pages * PAGE, at) })
}

#[test]
fn direct_io_finds_what_is_on_the_device() {
    let _dog = watchdog("direct_io_finds_what_is_on_the_device", 60);
    let file = match direct_file() {
        Ok(file) => file,
        Err(why) => skip!("{why}"),
    };
    let (hmm, device) = engine(16);
    for (huge, pages) in [(false, 100), (true, HUGE)] {
        let (from, into, plain) = (
            Map::aligned(pages, huge),
            Map::aligned(pages, huge),
            Map::new(pages),
        );
        from.fill(1);
        send(&hmm, from.range(), &device);
        // By the CPU, and then by the device, over what the file holds.
        for by_device in [false, true] {
            let seed = if by_device { 2 } else { 1 };
            if by_device {
                send(&hmm, from.range(), &device);
                fill_by_device(&device, &from, seed);
            }
            make_ready(&hmm, &from);
            let written = write_at(&file, &from, 0, pages);
            assert!(all_done(&hmm, "write", &written, from.bytes()), "short");
            plain.fill(0);
            read_at(&file, &plain, 0, pages).expect("a read into plain memory");
            plain.check(seed);
            // What is read lands in memory that is away, half away, and not of
            // a whole number of the engine's blocks.
            for away in [pages, pages / 2, 3] {
                into.fill(3);
                send(&hmm, into.part(pages - away, away), &device);
                make_ready(&hmm, &into);
                let read = read_at(&file, &into, 0, pages);
                assert!(all_done(&hmm, "read", &read, into.bytes()), "short");
                into.check(seed);
                send(&hmm, into.range(), &device);
                into.check(seed);
            }
            from.check(seed);
        }
    }
    end(hmm, &device);
}

#[test]
fn direct_io_is_right_while_pages_move() {
    let _dog = watchdog("direct_io_is_right_while_pages_move", 60);
    const PAGES: usize = 48;
    let file = match direct_file() {
        Ok(file) => file,
        Err(why) => skip!("{why}"),
    };
    let (hmm, device) = engine(16);
    let (from, into) = (Map::new(PAGES), Map::new(PAGES));
    into.fill(0);
    let (rounds, again) = while_moving(&hmm, &device, &[&from, &into], || {
        let since = Instant::now();
        let (mut rounds, mut again) = (0u64, 0u64);
        while since.elapsed() < LONG {
            let seed = 10 + rounds + again;
            from.fill(seed);
            let written = write_at(&file, &from, 0, PAGES);
            if !all_done(&hmm, "write", &written, from.bytes()) {
                again += 1;
                continue;
            }
            let read = read_at(&file, &into, 0, PAGES);
            if !all_done(&hmm, "read", &read, into.bytes()) {
                again += 1;
                continue;
            }
            into.check(seed);
            from.check(seed);
            rounds += 1;
        }
        (rounds, again)
    });
    println!("{rounds} rounds, {again} refused");
    assert!(
        rounds > 0 || !hmm.serves_kernel_faults(),
        "no I/O was done in {LONG:?}"
    );
    drop((from, into));
    end(hmm, &device);
}

// io_uring, by its system calls.

const OP_READ_FIXED: u8 = 4;
const OP_WRITE_FIXED: u8 = 5;
const OP_READ: u8 = 22;
const OP_WRITE: u8 = 23;
/// IOSQE_ASYNC: not by this thread but by one of the kernel's.
const FLAG_ASYNC: u8 = 1 << 4;
const FEATURE_SINGLE_MMAP: u32 = 1;
const ENTER_GETEVENTS: u32 = 1;
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;
const OFFSET_SQES: i64 = 0x1000_0000;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QueueOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    /// `flags` of submissions, `overflow` of completions.
    flags: u32,
    /// `dropped` of submissions, `cqes` of completions.
    fifth: u32,
    /// `array` of submissions, `flags` of completions.
    sixth: u32,
    reserved: u32,
    address: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: QueueOffsets,
    cq: QueueOffsets,
}
const _: () = assert!(size_of::<Params>() == 120);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: RawFd,
    offset: u64,
    address: u64,
    len: u32,
    op_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    splice_fd: RawFd,
    padding: [u64; 2],
}
const _: () = assert!(size_of::<Submission>() == 64);

#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// A ring with its queues mapped.
struct Ring {
    fd: OwnedFd,
    params: Params,
    queues: Map,
    entries: Map,
}

impl Ring {
    fn open(entries: u32) -> Result<Self> {
        let mut params = Params::default();
        // SAFETY: the structure is the one that the call fills.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        let fd = RawFd::try_from(fd).expect("a descriptor");
        // SAFETY: a descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if params.features & FEATURE_SINGLE_MMAP == 0 {
            return Err(Error::from_raw_os_error(libc::ENOSYS));
        }
        let map = |bytes: usize, offset: i64| {
            let pages = bytes.div_ceil(PAGE);
            // SAFETY: a new mapping of the ring's memory.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    pages * PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_POPULATE,
                    fd.as_raw_fd(),
                    offset,
                )
            };
            if at == libc::MAP_FAILED {
                Err(Error::last_os_error())
            } else {
                Ok(Map::adopt(at.cast(), pages))
            }
        };
        let submissions = params.sq.sixth as usize + params.sq_entries as usize * 4;
        let completions =
            params.cq.fifth as usize + params.cq_entries as usize * size_of::<Completion>();
        let queues = map(submissions.max(completions), 0)?;
        let entries = map(
            params.sq_entries as usize * size_of::<Submission>(),
            OFFSET_SQES,
        )?;
        Ok(Self {
            fd,
            params,
            queues,
            entries,
        })
    }

    fn number(&self, offset: u32) -> &AtomicU32 {
        let at = self.queues.at().wrapping_add(offset as usize);
        // SAFETY: one of the ring's numbers, which the kernel uses as atomics.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    fn register(&self, buffers: &[&Map]) -> Result<()> {
        let buffers: Vec<libc::iovec> = buffers
            .iter()
            .map(|map| libc::iovec {
                iov_base: map.at().cast(),
                iov_len: map.bytes(),
            })
            .collect();
        // SAFETY: buffers of the test that live as long as they are registered.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.fd.as_raw_fd(),
                REGISTER_BUFFERS,
                buffers.as_ptr(),
                buffers.len(),
            )
        };
        if result < 0 {
            Err(Error::last_os_error())
        } else {
            Ok(())
        }
    }

    fn unregister(&self) {
        // SAFETY: takes no argument.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.fd.as_raw_fd(),
                UNREGISTER_BUFFERS,
                std::ptr::null::<u8>(),
                0,
            )
        };
        assert_eq!(result, 0, "unregister: {}", Error::last_os_error());
    }

    /// Does some I/O and waits for it; what each came to, in order.
    fn run(&self, submissions: &[Submission]) -> Vec<Result<usize>> {
        let count = u32::try_from(submissions.len()).expect("a few");
        assert!(count <= self.params.sq_entries, "too many at once");
        let tail = self.number(self.params.sq.tail);
        let mask = self.params.sq_entries - 1;
        for (number, submission) in (0..count).zip(submissions) {
            let index = tail.load(Ordering::Relaxed) & mask;
            let slot = self
                .entries
                .at()
                .cast::<Submission>()
                .wrapping_add(index as usize);
            let mut submission = *submission;
            submission.user_data = number.into();
            // SAFETY: a free slot of the ring's own memory.
            unsafe { slot.write(submission) };
            self.number(self.params.sq.sixth + 4 * index)
                .store(index, Ordering::Relaxed);
            tail.fetch_add(1, Ordering::Release);
        }
        let (mut left, mut submit) = (count, count);
        let mut results: Vec<Option<Result<usize>>> = submissions.iter().map(|_| None).collect();
        let head = self.number(self.params.cq.head);
        while left > 0 {
            // SAFETY: submits what is in the ring; no signal mask.
            let entered = unsafe {
                libc::syscall(
                    libc::SYS_io_uring_enter,
                    self.fd.as_raw_fd(),
                    submit,
                    left,
                    ENTER_GETEVENTS,
                    std::ptr::null::<u8>(),
                    0,
                )
            };
            match u32::try_from(entered) {
                Ok(entered) => submit -= entered.min(submit),
                Err(_) => {
                    let error = Error::last_os_error();
                    assert_eq!(code(&error), libc::EINTR, "io_uring_enter: {error}");
                }
            }
            while head.load(Ordering::Relaxed)
                != self.number(self.params.cq.tail).load(Ordering::Acquire)
            {
                let index = head.load(Ordering::Relaxed) & (self.params.cq_entries - 1);
                let at = self
                    .queues
                    .at()
                    .wrapping_add(self.params.cq.fifth as usize)
                    .cast::<Completion>()
                    .wrapping_add(index as usize);
                // SAFETY: a completion that the kernel has published.
                let completion = unsafe { at.read() };
                head.fetch_add(1, Ordering::Release);
                let number = usize::try_from(completion.user_data).expect("a number given above");
                results[number] = Some(
                    usize::try_from(completion.result)
                        .map_err(|_| Error::from_raw_os_error(-completion.result)),
                );
                left -= 1;
            }
        }
        results
            .into_iter()
            .map(|result| result.expect("each is answered once"))
            .collect()
    }
}

/// I/O between some pages of memory and the same place of a file.
fn submission(opcode: u8, fd: &OwnedFd, map: &Map, first: usize, pages: usize) -> Submission {
    Submission {
        opcode,
        fd: fd.as_raw_fd(),
        offset: (first * PAGE) as u64,
        address: map.page(first).expose_provenance() as u64,
        len: u32::try_from(pages * PAGE).expect("a small buffer"),
        ..Submission::default()
    }
}

/// A file in memory, through the page cache: the kernel copies.
fn cached_file() -> OwnedFd {
    // SAFETY: a name that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"io".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", Error::last_os_error());
    // SAFETY: a descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Files with and without O_DIRECT, as far as there are.
fn files() -> Vec<(&'static str, OwnedFd)> {
    let mut files = vec![("cached", cached_file())];
    match direct_file() {
        Ok(file) => files.push(("direct", file)),
        Err(why) => eprintln!("only cached files: {why}"),
    }
    files
}

/// Registers buffers; an ordinary user touches them first, and again if they
/// have left meanwhile.
fn register(hmm: &Hmm, ring: &Ring, maps: &[&Map]) -> Result<()> {
    let mut result = Ok(());
    for _ in 0..100 {
        for map in maps {
            make_ready(hmm, map);
        }
        result = ring.register(maps);
        match &result {
            Err(error) if code(error) == libc::EFAULT && !hmm.serves_kernel_faults() => {}
            _ => break,
        }
    }
    result
}

/// The pages stay, all of them, and pinned is why.
#[track_caller]
fn stays_pinned(hmm: &Hmm, device: &SoftwareDevice, range: PageRange) {
    let report = hmm.migrate(range, device.id()).expect("a migration");
    adds_up(&report, range);
    assert!(
        report.moved.get() == 0
            && report.already.get() == 0
            && report
                .stayed
                .iter()
                .all(|stay| stay.reason == StayReason::Pinned),
        "pinned pages: {report}"
    );
}

/// A pin is given up some time after the buffers are: moves when it is.
fn send_unpinned(hmm: &Hmm, device: &SoftwareDevice, range: PageRange) {
    let since = Instant::now();
    loop {
        let report = hmm.migrate(range, device.id()).expect("a migration");
        if report.is_complete() {
            return;
        }
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "still pinned: {report}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn registered_buffers_are_pinned_and_stay() {
    let _dog = watchdog("registered_buffers_are_pinned_and_stay", 60);
    const FEW: usize = 20;
    let ring = match Ring::open(8) {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring: {error}"),
    };
    let (hmm, device) = engine(16);
    for (huge, pages) in [(false, 40), (true, HUGE)] {
        for (kind, file) in files() {
            let what = format!("{kind} file, huge {huge}");
            let (whole, into) = (Map::aligned(pages, huge), Map::aligned(pages, huge));
            whole.fill(20);
            into.fill(21);
            // Neighbours of the registered pages are in the same mapping.
            let (first, count) = (pages / 4, pages / 2);
            let part = Map::adopt(whole.page(first), count);
            send(&hmm, whole.range(), &device);
            send(&hmm, into.range(), &device);
            if let Err(error) = register(&hmm, &ring, &[&part, &into]) {
                part.leak();
                skip!("registering buffers: {error}");
            }
            // Registering has brought them home; now they stay.
            for map in [&part, &into] {
                assert_eq!(on_device(&hmm, map.range(), &device), 0, "{what}");
            }
            // Some of a huge page's are enough: refusals take their time.
            let few = [part.part(count - FEW, FEW), into.part(pages - FEW, FEW)];
            let stay_pinned = || {
                for range in few {
                    stays_pinned(&hmm, &device, range);
                }
            };
            stay_pinned();
            // Others of the same mapping go, unless the kernel pins the huge
            // page as a whole.
            let report = hmm.migrate(whole.range(), device.id()).expect("migrated");
            adds_up(&report, whole.range());
            for stay in &report.stayed {
                assert_eq!(stay.reason, StayReason::Pinned, "{what}: {report}");
            }
            if !huge {
                assert_eq!(report.stayed_pages.get(), count as u64, "{what}: {report}");
            }
            whole.check(20);
            for round in 0..3 {
                let seed = 22 + round;
                // The I/O sees what the CPU writes now, and the CPU what it read.
                part.fill(seed);
                stay_pinned();
                let write = submission(OP_WRITE_FIXED, &file, &part, 0, count);
                let mut read = submission(OP_READ_FIXED, &file, &into, 0, count);
                read.buffer = 1;
                for one in [write, read] {
                    for result in ring.run(&[one]) {
                        let done = result.unwrap_or_else(|error| panic!("{what}: {error}"));
                        assert_eq!(done, count * PAGE, "{what}: short");
                    }
                    stay_pinned();
                }
                into.check_part(0, count, seed);
                into.check_part(count, pages - count, 21);
                part.check(seed);
                // And the device, which uses them in place.
                let some = Map::adopt(part.at(), FEW);
                fill_by_device(&device, &some, 50 + seed);
                some.leak();
                let results = ring.run(&[write]);
                assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
                let results = ring.run(&[read]);
                assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
                into.check_part(0, FEW, 50 + seed);
                into.check_part(FEW, count - FEW, seed);
            }
            part.fill(20);
            // `part` counts its words from its own start.
            part.leak();
            ring.unregister();
            send_unpinned(&hmm, &device, into.range());
            send_unpinned(&hmm, &device, whole.range());
            into.check_part(0, FEW, 50 + 24);
            whole.check_part(0, first, 20);
            whole.check_part(first + count, pages - first - count, 20);
        }
    }
    drop(ring);
    end(hmm, &device);
}

#[test]
fn fixed_io_is_right_while_everything_around_moves() {
    let _dog = watchdog("fixed_io_is_right_while_everything_around_moves", 60);
    const PAGES: usize = 64;
    let ring = match Ring::open(8) {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring: {error}"),
    };
    let (hmm, device) = engine(16);
    let (from, into, other) = (Map::new(PAGES), Map::new(PAGES), Map::new(PAGES));
    other.fill(30);
    for (kind, file) in files() {
        from.fill(31);
        into.fill(32);
        let rounds = while_moving(&hmm, &device, &[&from, &into, &other], || {
            let since = Instant::now();
            let mut rounds = 0;
            while since.elapsed() < LONG / 2 {
                // Registered while they move; given up every few rounds.
                if let Err(error) = register(&hmm, &ring, &[&from, &into]) {
                    assert!(
                        code(&error) == libc::EFAULT && !hmm.serves_kernel_faults(),
                        "registering buffers: {error}"
                    );
                    continue;
                }
                for _ in 0..4 {
                    let seed = 100 + rounds;
                    from.fill(seed);
                    // In parts, at the same time.
                    for (opcode, map, buffer) in
                        [(OP_WRITE_FIXED, &from, 0), (OP_READ_FIXED, &into, 1)]
                    {
                        let parts: Vec<Submission> = (0..4)
                            .map(|quarter| {
                                let first = quarter * PAGES / 4;
                                let mut part = submission(opcode, &file, map, first, PAGES / 4);
                                part.buffer = buffer;
                                if quarter == 3 {
                                    part.flags = FLAG_ASYNC;
                                }
                                part
                            })
                            .collect();
                        for result in ring.run(&parts) {
                            let done = result.unwrap_or_else(|error| panic!("{kind}: {error}"));
                            assert_eq!(done, PAGES / 4 * PAGE, "{kind}: short");
                        }
                    }
                    into.check(seed);
                    from.check(seed);
                    rounds += 1;
                }
                ring.unregister();
            }
            rounds
        });
        println!("{kind}: {rounds} rounds");
        other.check(30);
    }
    drop((ring, from, into, other));
    end(hmm, &device);
}

#[test]
fn plain_io_uring_requests_are_right_while_pages_move() {
    let _dog = watchdog("plain_io_uring_requests_are_right_while_pages_move", 60);
    const PAGES: usize = 64;
    let ring = match Ring::open(8) {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring: {error}"),
    };
    let (hmm, device) = engine(16);
    let (from, into) = (Map::new(PAGES), Map::new(PAGES));
    for (kind, file) in files() {
        from.fill(40);
        into.fill(41);
        // At rest first: all away, and used by kernel threads as well.
        for flags in [0, FLAG_ASYNC] {
            for (opcode, map) in [(OP_WRITE, &from), (OP_READ, &into)] {
                send(&hmm, map.range(), &device);
                make_ready(&hmm, map);
                let mut all = submission(opcode, &file, map, 0, PAGES);
                all.flags = flags;
                for result in ring.run(&[all]) {
                    assert!(all_done(&hmm, kind, &result, PAGES * PAGE), "{kind}: short");
                }
            }
            into.check(40);
            into.fill(41);
        }
        let (rounds, again) = while_moving(&hmm, &device, &[&from, &into], || {
            let since = Instant::now();
            let (mut rounds, mut again) = (0u64, 0u64);
            while since.elapsed() < LONG / 2 {
                let seed = 100 + rounds + again;
                from.fill(seed);
                let done =
                    [(OP_WRITE, &from), (OP_READ, &into)]
                        .into_iter()
                        .all(|(opcode, map)| {
                            let parts: Vec<Submission> = (0..8)
                                .map(|number| {
                                    let first = number * PAGES / 8;
                                    let mut part = submission(opcode, &file, map, first, PAGES / 8);
                                    if number % 2 == 1 {
                                        part.flags = FLAG_ASYNC;
                                    }
                                    part
                                })
                                .collect();
                            // All answers are looked at, also after a refusal.
                            let parts = ring.run(&parts).into_iter();
                            parts
                                .filter(|result| !all_done(&hmm, kind, result, PAGES / 8 * PAGE))
                                .count()
                                == 0
                        });
                if done {
                    into.check(seed);
                    from.check(seed);
                    rounds += 1;
                } else {
                    again += 1;
                }
            }
            (rounds, again)
        });
        println!("{kind}: {rounds} rounds, {again} refused");
        assert!(
            rounds > 0 || !hmm.serves_kernel_faults(),
            "{kind}: no I/O was done"
        );
    }
    drop((ring, from, into));
    end(hmm, &device);
}

// Pipes and sockets.

/// Two ends: what is written to the second comes out of the first.
fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    let ok = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } == 0;
    assert!(ok, "pipe: {}", Error::last_os_error());
    // SAFETY: descriptors that nobody else owns.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors.
    let ok = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } == 0;
    assert!(ok, "socketpair: {}", Error::last_os_error());
    // SAFETY: descriptors that nobody else owns.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

/// How bytes get from one end to the other.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// write(2) and read(2).
    Pipe,
    /// send(2) and recv(2).
    Sockets,
}

impl Way {
    fn open(self) -> (OwnedFd, OwnedFd) {
        match self {
            Self::Pipe => pipe(),
            Self::Sockets => sockets(),
        }
    }

    /// Sends all of it, however many calls that takes.
    fn push(self, to: &OwnedFd, map: &Map) -> Result<()> {
        let mut sent = 0;
        while sent < map.bytes() {
            let (at, left) = (map.at().wrapping_add(sent), map.bytes() - sent);
            // SAFETY: in the mapping.
            sent += counted(unsafe {
                match self {
                    Self::Pipe => libc::write(to.as_raw_fd(), at.cast(), left),
                    Self::Sockets => {
                        libc::send(to.as_raw_fd(), at.cast(), left, libc::MSG_NOSIGNAL)
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Receives all of it.
    fn pull(self, from: &OwnedFd, map: &Map) -> Result<()> {
        let mut got = 0;
        while got < map.bytes() {
            let (at, left) = (map.at().wrapping_add(got), map.bytes() - got);
            // SAFETY: in the mapping, which nobody else uses meanwhile.
            let more = counted(unsafe {
                match self {
                    Self::Pipe => libc::read(from.as_raw_fd(), at.cast(), left),
                    Self::Sockets => libc::recv(from.as_raw_fd(), at.cast(), left, 0),
                }
            })?;
            if more == 0 {
                return Err(Error::from_raw_os_error(libc::EPIPE));
            }
            got += more;
        }
        Ok(())
    }
}

#[test]
fn pipes_and_sockets_take_and_give_what_is_on_the_device() {
    let _dog = watchdog("pipes_and_sockets_take_and_give_device_pages", 60);
    const PAGES: usize = 200;
    let (hmm, device) = engine(16);
    let (from, into) = (Map::new(PAGES), Map::new(PAGES));
    for way in [Way::Pipe, Way::Sockets] {
        for by_device in [false, true] {
            let seed = 60 + u64::from(by_device);
            from.fill(60);
            into.fill(62);
            send(&hmm, from.range(), &device);
            send(&hmm, into.range(), &device);
            if by_device {
                fill_by_device(&device, &from, seed);
            }
            make_ready(&hmm, &from);
            make_ready(&hmm, &into);
            let (output, input) = way.open();
            std::thread::scope(|scope| {
                let (from, input) = (&from, input);
                let writer = scope.spawn(move || way.push(&input, from));
                way.pull(&output, &into)
                    .unwrap_or_else(|error| panic!("{way:?}: receiving: {error}"));
                let pushed = writer.join().expect("the sender");
                pushed.unwrap_or_else(|error| panic!("{way:?}: sending: {error}"));
            });
            into.check(seed);
            from.check(seed);
        }
    }
    drop((from, into));
    end(hmm, &device);
}

#[test]
fn pipes_and_sockets_are_right_while_pages_move() {
    let _dog = watchdog("pipes_and_sockets_are_right_while_pages_move", 60);
    // More than fits into a pipe: both ends are in the middle of a call.
    const PAGES: usize = 64;
    let (hmm, device) = engine(16);
    if !hmm.serves_kernel_faults() {
        skip!("faults of the kernel are not served without privilege");
    }
    let (from, into) = (Map::new(PAGES), Map::new(PAGES));
    into.fill(0);
    for way in [Way::Pipe, Way::Sockets] {
        let (output, input) = way.open();
        let rounds = while_moving(&hmm, &device, &[&from, &into], || {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (stop, from) = (&stop, &from);
                // Dropping its end at a panic ends the receiver's wait.
                scope.spawn(move || {
                    for round in 1.. {
                        from.fill(round);
                        // One that the receiver still waits for is sent.
                        let last = stop.load(Ordering::Relaxed);
                        if let Err(error) = way.push(&input, from) {
                            // The receiver has gone.
                            assert_eq!(code(&error), libc::EPIPE, "{way:?}: {error}");
                            return;
                        }
                        from.check(round);
                        if last {
                            return;
                        }
                    }
                });
                let output = output;
                let _stop = StopAtEnd(stop);
                let since = Instant::now();
                let mut rounds = 0;
                while since.elapsed() < LONG {
                    rounds += 1;
                    way.pull(&output, &into)
                        .unwrap_or_else(|error| panic!("{way:?}: {error}"));
                    into.check(rounds);
                }
                rounds
            })
        });
        println!("{way:?}: {rounds} rounds");
    }
    drop((from, into));
    end(hmm, &device);
}

// Memory that something holds without pinning it.

/// Has a pipe hold pages of `map`.
fn vmsplice(to: &OwnedFd, map: &Map, first: usize, pages: usize, flags: u32) -> Result<usize> {
    let part = libc::iovec {
        iov_base: map.page(first).cast(),
        iov_len: pages * PAGE,
    };
    // SAFETY: pages of the mapping, which outlives what the test reads.
    counted(unsafe { libc::vmsplice(to.as_raw_fd(), &raw const part, 1, flags) })
}

/// Pages that a pipe holds at most.
const PIPE_PAGES: usize = 16;

#[test]
fn vmsplice_gives_what_is_on_the_device() {
    let _dog = watchdog("vmsplice_gives_what_is_on_the_device", 60);
    let (hmm, device) = engine(16);
    let (map, into) = (Map::new(PIPE_PAGES), Map::new(PIPE_PAGES));
    for flags in [0, libc::SPLICE_F_GIFT] {
        for (round, away) in [PIPE_PAGES, PIPE_PAGES / 2, 1].into_iter().enumerate() {
            let seed = 70 + round as u64;
            map.fill(seed);
            into.fill(1);
            send(&hmm, map.part(PIPE_PAGES - away, away), &device);
            if away == PIPE_PAGES {
                fill_by_device(&device, &map, seed + 10);
                fill_by_device(&device, &map, seed);
            }
            make_ready(&hmm, &map);
            let (output, input) = pipe();
            let spliced = vmsplice(&input, &map, 0, PIPE_PAGES, flags);
            assert!(
                all_done(&hmm, "vmsplice", &spliced, map.bytes()),
                "flags {flags}: short"
            );
            Way::Pipe
                .pull(&output, &into)
                .unwrap_or_else(|error| panic!("reading the pipe: {error}"));
            into.check(seed);
            map.check(seed);
            send(&hmm, map.range(), &device);
            map.check(seed);
        }
    }
    drop((map, into));
    end(hmm, &device);
}

/// Migrates what a pipe holds. Returns the report of that, and what the pipe
/// gives after other memory has come and gone.
fn migrate_what_a_pipe_holds(flags: u32) -> (Report, Map, Map) {
    let (hmm, device) = engine(16);
    let (map, into, other) = (Map::new(PIPE_PAGES), Map::new(PIPE_PAGES), Map::new(512));
    map.fill(80);
    let (output, input) = pipe();
    let spliced = vmsplice(&input, &map, 0, PIPE_PAGES, flags).expect("vmsplice");
    assert_eq!(spliced, map.bytes(), "all fits into the pipe");
    let report = hmm.migrate(map.range(), device.id()).expect("a migration");
    adds_up(&report, map.range());
    // The pages that were the program's are used for others that come home.
    for round in 0..4 {
        other.fill(81 + round);
        send(&hmm, other.range(), &device);
        fetch(&hmm, other.range());
        other.check(81 + round);
    }
    // Never touched so far, and in a mapping that the engine watches: a hole.
    make_ready(&hmm, &into);
    Way::Pipe
        .pull(&output, &into)
        .unwrap_or_else(|error| panic!("reading the pipe: {error}"));
    map.check(80);
    send(&hmm, map.range(), &device);
    map.check(80);
    drop(other);
    end(hmm, &device);
    (report, map, into)
}

/// What a pipe gives then is not promised (docs/limits.md); the memory is.
#[test]
fn memory_that_a_pipe_holds_is_right_wherever_it_goes() {
    let _dog = watchdog("memory_that_a_pipe_holds_is_right_wherever_it_goes", 60);
    for flags in [0, libc::SPLICE_F_GIFT] {
        let (report, map, into) = migrate_what_a_pipe_holds(flags);
        let wrong = into.wrong(0, PIPE_PAGES, 80);
        println!("flags {flags}: {report}; first wrong word in the pipe: {wrong:?}");
        map.check(80);
    }
}

#[test]
#[ignore = "a limit: a pipe holds its pages by reference only (docs/limits.md)"]
fn a_pipe_gives_what_was_spliced_although_it_moved() {
    let _dog = watchdog("a_pipe_gives_what_was_spliced_although_it_moved", 60);
    for flags in [0, libc::SPLICE_F_GIFT] {
        let (report, _map, into) = migrate_what_a_pipe_holds(flags);
        assert_eq!(
            into.wrong(0, PIPE_PAGES, 80),
            None,
            "flags {flags}: the pipe gives something else: {report}"
        );
    }
}

/// The kernel cannot split a huge page of which something holds a part, so it
/// cannot move a part of it either. That is said, and soon.
#[test]
fn a_part_of_a_huge_page_that_a_pipe_holds() {
    let _dog = watchdog("a_part_of_a_huge_page_that_a_pipe_holds", 60);
    let (hmm, device) = engine(16);
    let map = Map::aligned(2 * HUGE, true);
    map.fill(85);
    let (output, input) = pipe();
    let spliced = vmsplice(&input, &map, 100, PIPE_PAGES, 0).expect("vmsplice");
    assert_eq!(spliced, PIPE_PAGES * PAGE, "all fits into the pipe");
    let since = Instant::now();
    let range = map.part(50, 200);
    let report = hmm.migrate(range, device.id()).expect("a migration");
    adds_up(&report, range);
    println!("{report}, in {:?}", since.elapsed());
    assert!(
        since.elapsed() < Duration::from_secs(5),
        "took {:?}: {report}",
        since.elapsed()
    );
    map.check(85);
    drop((output, input));
    send(&hmm, map.range(), &device);
    map.check(85);
    drop(map);
    end(hmm, &device);
}

const SO_ZEROCOPY: i32 = 60;
const MSG_ZEROCOPY: i32 = 0x400_0000;

/// A connection over the loopback device whose sender leaves data where it is.
fn zerocopy_pair() -> Result<(std::net::TcpStream, std::net::TcpStream)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let sender = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    let on = 1i32;
    // SAFETY: the option is a number.
    let ok = unsafe {
        libc::setsockopt(
            sender.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_ZEROCOPY,
            (&raw const on).cast(),
            4,
        )
    } == 0;
    if ok {
        Ok((sender, receiver))
    } else {
        Err(Error::last_os_error())
    }
}

/// Sends `map` from where it is. True when the receiver got what was in it;
/// `migrate` says whether it migrates between the two.
fn zerocopy_round(hmm: &Hmm, device: &SoftwareDevice, migrate: bool) -> Result<bool> {
    const PAGES: usize = 128;
    let (sender, receiver) = zerocopy_pair()?;
    receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (map, into, other) = (Map::new(PAGES), Map::new(PAGES), Map::new(512));
    map.fill(90);
    if !migrate {
        send(hmm, map.range(), device);
        make_ready(hmm, &map);
    }
    let mut sent = 0;
    let flags = MSG_ZEROCOPY | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    while sent < map.bytes() {
        let (at, left) = (map.at().wrapping_add(sent), map.bytes() - sent);
        // SAFETY: in the mapping, which is not written until all has arrived.
        match counted(unsafe { libc::send(sender.as_raw_fd(), at.cast(), left, flags) }) {
            Ok(more) => sent += more,
            // The queues are full: what is in them will do.
            Err(error) if code(&error) == libc::EAGAIN && sent > 0 => break,
            Err(error) => return Err(error),
        }
    }
    if migrate {
        let report = hmm.migrate(map.range(), device.id()).expect("a migration");
        adds_up(&report, map.range());
        println!("{sent} bytes under way: {report}");
        for round in 0..4 {
            other.fill(91 + round);
            send(hmm, other.range(), device);
            fetch(hmm, other.range());
        }
    }
    let mut got = 0;
    make_ready(hmm, &into);
    while got < sent {
        let (at, left) = (into.at().wrapping_add(got), sent - got);
        // SAFETY: in the mapping, which nobody else uses.
        let more = counted(unsafe { libc::recv(receiver.as_raw_fd(), at.cast(), left, 0) })?;
        assert_ne!(more, 0, "the sender has not gone");
        got += more;
    }
    map.check(90);
    let whole = sent / PAGE;
    let wrong = into.wrong(0, whole, 90);
    println!("{sent} bytes arrived; the first wrong word: {wrong:?}");
    Ok(wrong.is_none())
}

#[test]
fn sending_without_a_copy_finds_what_is_on_the_device() {
    let _dog = watchdog("sending_without_a_copy_finds_what_is_on_the_device", 60);
    let (hmm, device) = engine(16);
    match zerocopy_round(&hmm, &device, false) {
        Ok(right) => assert!(right, "the receiver got something else"),
        Err(error) if code(&error) == libc::EFAULT => panic!("MSG_ZEROCOPY: {error}"),
        Err(error) => skip!("MSG_ZEROCOPY: {error}"),
    }
    end(hmm, &device);
}

/// The sender must not change the memory until it hears that all was sent; it
/// does not. But the engine moves it.
#[test]
#[ignore = "a limit: a socket holds its pages by reference only (docs/limits.md)"]
fn what_is_sent_without_a_copy_arrives_although_it_moves() {
    let _dog = watchdog("what_is_sent_without_a_copy_arrives_although_it_moves", 60);
    let (hmm, device) = engine(16);
    match zerocopy_round(&hmm, &device, true) {
        Ok(right) => assert!(right, "the receiver got something else"),
        Err(error) if code(&error) == libc::EFAULT => panic!("MSG_ZEROCOPY: {error}"),
        Err(error) => skip!("MSG_ZEROCOPY: {error}"),
    }
    end(hmm, &device);
}

// Other processes.

/// Words of the page through which a [`Peer`] is asked.
const ASKED: usize = 0;
const COMMAND: usize = 1;
const ANSWERED: usize = 2;
const ANSWER: usize = 3;
/// Where loops say what they have done, and what was wrong.
const ROUNDS: usize = 4;
const REFUSED: usize = 5;
const WRONG_WORD: usize = 6;
const WRONG_VALUE: usize = 7;
const LAST_SEED: usize = 8;
/// The thread to attach to.
const THREAD: usize = 9;

fn shared(pages: usize) -> Map {
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

fn cell(map: &Map, word: usize) -> &AtomicU64 {
    // SAFETY: a word of memory that both processes use as atomics.
    unsafe { AtomicU64::from_ptr(map.word(word)) }
}

/// Another process that does what it is asked to. It is forked before there is
/// an engine, so that none of its pages are ever owed to it.
struct Peer<'a> {
    pid: i32,
    control: &'a Map,
}

impl<'a> Peer<'a> {
    /// `body` gets a command; it may make system calls and touch memory, and
    /// nothing else: other threads' locks are held for ever in there.
    fn start(control: &'a Map, body: impl Fn(u64) -> i64) -> Self {
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
    fn ask(&self, command: u64) -> i64 {
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

    /// Asks for a count.
    fn try_count(&self, command: u64) -> Result<usize> {
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
fn failed() -> i64 {
    // SAFETY: the place where the C library keeps this thread's error.
    -i64::from(unsafe { *libc::__errno_location() })
}

/// For the peer: a count, or minus an error's number.
fn answer(result: isize) -> i64 {
    if result < 0 { failed() } else { result as i64 }
}

/// For the peer: nanoseconds of a clock.
fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: room for a time.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// What a loop of the peer says that met wrong data.
const WRONG: i64 = -10_000;

/// Ways into another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// process_vm_readv(2) and process_vm_writev(2).
    Calls,
    /// /proc/PID/mem.
    File,
}

/// For the peer: moves bytes between its own memory and the test's.
fn reach(how: Reach, pid: i32, file: RawFd, local: *mut u8, remote: *mut u8, write: bool) -> i64 {
    reach_bytes(how, pid, file, local, remote, write, REMOTE_PAGES * PAGE)
}

fn reach_bytes(
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
const REMOTE_PAGES: usize = 32;

const READ_ALL: u64 = 1;
const WRITE_ALL: u64 = 2;
const LOOP: u64 = 3;

/// A test of one way into this process's memory: while pages are at rest, or
/// while they move.
fn another_process_reaches(how: Reach, moving: bool) {
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

fn reach_at_rest(
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

fn reach_while_moving(
    hmm: &Hmm,
    device: &SoftwareDevice,
    how: Reach,
    peer: &Peer<'_>,
    map: &Map,
    steady: &Map,
) {
    while_moving(hmm, device, &[map, steady], || {
        let answer = peer.ask(LOOP);
        let told = |word| cell(peer.control, word).load(Ordering::Relaxed);
        println!(
            "{how:?}: {} rounds, {} refused",
            told(ROUNDS),
            told(REFUSED)
        );
        assert_ne!(
            answer,
            WRONG,
            "{how:?}: word {} is {:#x} in round {} with seed {}",
            told(WRONG_WORD).cast_signed(),
            told(WRONG_VALUE),
            told(ROUNDS),
            told(LAST_SEED)
        );
        assert!(
            answer >= 0,
            "{how:?}: {}",
            Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(0))
        );
        assert!(
            told(ROUNDS) > 0 || how == Reach::File || !hmm.serves_kernel_faults(),
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
fn reached(hmm: &Hmm, how: Reach, what: &str, map: &Map, go: impl Fn() -> Result<usize>) -> usize {
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
fn peer_loop(
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
fn another_process_reads_and_writes_by_system_calls() {
    let _dog = watchdog("another_process_reads_and_writes_by_system_calls", 60);
    another_process_reaches(Reach::Calls, false);
}

#[test]
fn another_process_reads_and_writes_by_system_calls_while_pages_move() {
    let _dog = watchdog("another_process_reads_and_writes_while_pages_move", 60);
    another_process_reaches(Reach::Calls, true);
}

#[test]
fn another_process_reads_and_writes_by_proc_mem() {
    let _dog = watchdog("another_process_reads_and_writes_by_proc_mem", 60);
    another_process_reaches(Reach::File, false);
}

#[test]
#[ignore = "a limit: the kernel holds the page by reference only (docs/limits.md)"]
fn another_process_reads_and_writes_by_proc_mem_while_pages_move() {
    let _dog = watchdog("another_process_uses_proc_mem_while_pages_move", 60);
    another_process_reaches(Reach::File, true);
}

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
        let answer = peer.ask(LOOP);
        let told = |word| cell(peer.control, word).load(Ordering::Relaxed);
        println!("{} rounds, {} refused", told(ROUNDS), told(REFUSED));
        assert_ne!(
            answer,
            WRONG,
            "word {} is {:#x} instead of {:#x}, in round {}",
            told(WRONG_WORD),
            told(WRONG_VALUE),
            told(LAST_SEED),
            told(ROUNDS)
        );
        assert_eq!(
            answer,
            0,
            "{}",
            Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(0))
        );
    });
}
