//! What is left of a huge page that has lost its first page.
mod common;

use common::{HUGE, Map, all_free, engine, fetch, fork, send, wait, watchdog};

/// `UFFDIO_MOVE` looks at the first page of a huge page for whether another process
/// shares any of it; after a fork only a write to that page says that none does.
#[test]
fn pages_of_a_huge_page_move_without_its_first() {
    let _dog = watchdog("pages_of_a_huge_page_move_without_its_first", 60);
    let (hmm, device) = engine(8);
    let map = Map::aligned(HUGE, true);
    map.fill(1);
    assert_eq!(wait(fork(|| i32::from(map.wrong(0, HUGE, 1).is_some()))), 0);
    assert!(map.advise(0, 1, libc::MADV_DONTNEED));
    map.fill_part(1, HUGE - 1, 2);
    send(&hmm, map.part(1, HUGE - 1), &device);
    map.check_part(1, HUGE - 1, 2);
    map.check_zero(0, 1);
    fetch(&hmm, map.range());
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}
