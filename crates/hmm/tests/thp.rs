//! Transparent huge pages stay huge across a round trip.
mod common;

use common::{HUGE, Map, WORDS, adds_up, all_free, engine, fetch, send, watchdog};

/// KiB of huge pages in the mapping that begins at `map`, as smaps says.
fn huge_kib(map: &Map) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (start, end) = (map.at() as usize, map.at() as usize + map.bytes());
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let head = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'));
        if let Some((from, to)) = head
            && let (Ok(from), Ok(to)) = (
                usize::from_str_radix(from, 16),
                usize::from_str_radix(to, 16),
            )
        {
            inside = from < end && start < to;
        } else if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
            sum += rest
                .trim()
                .trim_end_matches(" kB")
                .parse::<u64>()
                .expect("a number");
        }
    }
    sum
}

/// What is brought along may come a moment after what was touched.
fn settles_at(hmm: &hmm::Hmm, map: &Map, kib: u64) {
    for _ in 0..200 {
        if huge_kib(map) == kib {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!(
        "{} KiB of huge pages instead of {kib}: {:#?}",
        huge_kib(map),
        hmm.statistics()
    );
}

fn huge_map(blocks: usize) -> Option<Map> {
    let map = Map::aligned(blocks * HUGE, true);
    map.fill(1);
    (huge_kib(&map) == blocks as u64 * 2048).then_some(map)
}

#[test]
fn huge_pages_stay_huge_across_a_round_trip() {
    let _dog = watchdog("huge_pages_stay_huge_across_a_round_trip", 60);
    let (hmm, device) = engine(32);
    needs_move!(hmm, "huge pages come home as small ones");
    let Some(map) = huge_map(4) else {
        skip!("the kernel gives no transparent huge pages here")
    };
    for round in 0..5 {
        let report = send(&hmm, map.range(), &device);
        assert_eq!(
            report.huge.get(),
            4 * HUGE as u64,
            "round {round}: {report:?}"
        );
        assert_eq!(huge_kib(&map), 0);
        let report = fetch(&hmm, map.range());
        assert!(report.is_complete(), "{report}");
        assert_eq!(
            huge_kib(&map),
            4 * 2048,
            "round {round}: {:#?}",
            hmm.statistics()
        );
        map.check(1);
    }
    assert_eq!(hmm.statistics().huge_pages_lost, 0);
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn a_touch_of_one_byte_brings_the_huge_page_home() {
    let _dog = watchdog("a_touch_of_one_byte_brings_the_huge_page_home", 60);
    let (hmm, device) = engine(32);
    needs_move!(hmm, "huge pages come home as small ones");
    let Some(map) = huge_map(2) else {
        skip!("the kernel gives no transparent huge pages here")
    };
    send(&hmm, map.range(), &device);
    assert_eq!(map.get(300 * WORDS), common::pattern(1, 300 * WORDS));
    settles_at(&hmm, &map, 2048);
    map.check(1);
    settles_at(&hmm, &map, 2 * 2048);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn part_of_a_huge_page_moves_and_the_data_is_right() {
    let _dog = watchdog("part_of_a_huge_page_moves_and_the_data_is_right", 60);
    let (hmm, device) = engine(32);
    let Some(map) = huge_map(2) else {
        skip!("the kernel gives no transparent huge pages here")
    };
    let report = send(&hmm, map.part(100, 600), &device);
    adds_up(&report, map.part(100, 600));
    map.check(1);
    assert!(map.advise(200, 10, libc::MADV_DONTNEED));
    send(&hmm, map.range(), &device);
    map.check_part(0, 200, 1);
    map.check_zero(200, 10);
    map.check_part(210, 2 * HUGE - 210, 1);
    drop(map);
    hmm.shutdown().unwrap();
}
