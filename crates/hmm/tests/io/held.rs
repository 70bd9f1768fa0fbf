//! Memory that something holds without pinning it.

use super::*;

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
fn migrate_what_a_pipe_holds(flags: u32, builder: Builder) -> (Report, Map, Map) {
    let (hmm, device) = engine_of(builder, 16);
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

/// What a pipe gives then is not promised if pages are used again; the memory is.
#[test]
fn memory_that_a_pipe_holds_is_right_wherever_it_goes() {
    let _dog = watchdog("memory_that_a_pipe_holds_is_right_wherever_it_goes", 60);
    for flags in [0, libc::SPLICE_F_GIFT] {
        let (report, map, into) = migrate_what_a_pipe_holds(flags, Hmm::builder());
        let wrong = into.wrong(0, PIPE_PAGES, 80);
        println!("flags {flags}: {report}; first wrong word in the pipe: {wrong:?}");
        map.check(80);
    }
}

#[test]
fn a_pipe_gives_what_was_spliced_although_it_moved() {
    let _dog = watchdog("a_pipe_gives_what_was_spliced_although_it_moved", 60);
    for flags in [0, libc::SPLICE_F_GIFT] {
        let builder = Hmm::builder().reuse_pages(false);
        let (report, _map, into) = migrate_what_a_pipe_holds(flags, builder);
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
fn what_is_sent_without_a_copy_arrives_although_it_moves() {
    let _dog = watchdog("what_is_sent_without_a_copy_arrives_although_it_moves", 60);
    let (hmm, device) = engine_of(Hmm::builder(), 16);
    // Known only now that there is such a socket.
    hmm.stop_reusing_pages();
    match zerocopy_round(&hmm, &device, true) {
        Ok(right) => assert!(right, "the receiver got something else"),
        Err(error) if code(&error) == libc::EFAULT => panic!("MSG_ZEROCOPY: {error}"),
        Err(error) => skip!("MSG_ZEROCOPY: {error}"),
    }
    end(hmm, &device);
}
