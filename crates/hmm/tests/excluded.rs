//! Mappings that have something in them that must stay.
mod common;

use common::{Map, all_free, engine, fetch, send, watchdog};

/// A part of a mapping has to be watched alone then, with more of the mapping behind it.
#[test]
fn what_lies_beside_excluded_memory_migrates() {
    let _dog = watchdog("what_lies_beside_excluded_memory_migrates", 60);
    let map = Map::new(600);
    map.fill(1);
    // The program's threads may do so only as long as there is no engine.
    hmm_os::exclude(map.part(0, 1));
    let (hmm, device) = engine(8);
    let report = hmm.migrate(map.part(100, 50), device.id()).unwrap();
    assert_eq!(report.moved.get(), 50, "{report}");
    map.check(1);
    // And all around it, in turn.
    for (first, pages) in [(50, 100), (1, 599), (300, 10)] {
        send(&hmm, map.part(first, pages), &device);
        map.check(1);
    }
    fetch(&hmm, map.part(1, 599));
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}
