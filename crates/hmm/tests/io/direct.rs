//! Files past the page cache.

use super::*;

/// A file without a name whose reads and writes go straight to memory.
pub(crate) fn direct_file() -> std::result::Result<OwnedFd, String> {
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
    needs_move!(hmm, "pins cannot be seen");
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
