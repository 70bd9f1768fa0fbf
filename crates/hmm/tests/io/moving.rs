//! What all of them need: a mover, and memory made ready for system calls.

use super::*;

/// How long I/O runs while pages move.
pub(crate) const LONG: Duration = Duration::from_millis(900);

pub(crate) fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().expect("a clean end");
}

pub(crate) fn code(error: &Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// What a system call says that counts bytes.
pub(crate) fn counted(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

/// Touches memory first where the kernel's own faults are not served.
pub(crate) fn make_ready(hmm: &Hmm, map: &Map) {
    if !hmm.serves_kernel_faults() {
        for page in 0..map.pages() {
            map.get(page * WORDS);
        }
    }
}

/// Whether a call has done all that it was to do. What an ordinary user may get
/// instead is EFAULT, or less than was asked for; others may not.
#[track_caller]
pub(crate) fn all_done(hmm: &Hmm, what: &str, result: &Result<usize>, bytes: usize) -> bool {
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
pub(crate) fn fill_by_device(device: &SoftwareDevice, map: &Map, seed: u64) {
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
pub(crate) struct StopAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a mover did.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    moved: u64,
    pinned: u64,
}

/// Moves parts of `maps` out and home while `body` runs.
pub(crate) fn while_moving<T>(
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
