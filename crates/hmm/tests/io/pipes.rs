//! Pipes and sockets.

use super::*;

/// Two ends: what is written to the second comes out of the first.
pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    let ok = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } == 0;
    assert!(ok, "pipe: {}", Error::last_os_error());
    // SAFETY: descriptors that nobody else owns.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

pub(crate) fn sockets() -> (OwnedFd, OwnedFd) {
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
pub(crate) enum Way {
    /// write(2) and read(2).
    Pipe,
    /// send(2) and recv(2).
    Sockets,
}

impl Way {
    pub(crate) fn open(self) -> (OwnedFd, OwnedFd) {
        match self {
            Self::Pipe => pipe(),
            Self::Sockets => sockets(),
        }
    }

    /// Sends all of it, however many calls that takes.
    pub(crate) fn push(self, to: &OwnedFd, map: &Map) -> Result<()> {
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
    pub(crate) fn pull(self, from: &OwnedFd, map: &Map) -> Result<()> {
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
pub(crate) fn pipes_and_sockets_take_and_give_what_is_on_the_device() {
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
pub(crate) fn pipes_and_sockets_are_right_while_pages_move() {
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
