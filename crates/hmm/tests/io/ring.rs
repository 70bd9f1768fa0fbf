//! io_uring, by its system calls.

use super::*;

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
    needs_move!(hmm, "pins cannot be seen");
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
    needs_move!(hmm, "pins cannot be seen");
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
    needs_move!(hmm, "pins cannot be seen");
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
