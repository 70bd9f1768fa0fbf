//! The engine keeps the program's data on the simulated machine.

use hmm_sim::{CoreEngine, SimConfig, run};

const SEEDS: u64 = 300;
const OPS: u64 = 400;

#[test]
fn the_engine_is_right_for_many_programs() {
    let mut evicted = 0;
    for seed in 0..SEEDS {
        match run::<CoreEngine>(&SimConfig::from_seed(seed, OPS)) {
            Ok(report) => evicted += report.engine["evicted_pages"],
            Err(failure) => panic!(
                "seed {seed}: {}\nreplay: cargo run --release -p hmm-sim -- --seed {seed} --ops {OPS}",
                failure.message
            ),
        }
    }
    assert!(evicted > 0, "no program of {SEEDS} filled a device");
}

/// Programs that once went wrong in ways that few do: pages of hugetlbfs that vanish
/// under a copy, are remapped while they are registered, make room for pinned small
/// pages, or are wanted by one device while another is lost with them; small pages that are remapped in the range of a drop.
#[test]
fn the_engine_is_right_where_it_was_not() {
    const ONCE_WRONG: [u64; 11] = [
        71443, 84956, 101_147, 102_282, 104_047, 106_982, 130_907, 159_922, 193_354, 707_715,
        912_062,
    ];
    for seed in ONCE_WRONG {
        if let Err(failure) = run::<CoreEngine>(&SimConfig::from_seed(seed, OPS)) {
            panic!("seed {seed}: {}", failure.message);
        }
    }
}

#[test]
fn the_engine_is_right_with_a_coherent_device() {
    for seed in 0..SEEDS {
        let config = SimConfig {
            coherent: true,
            ..SimConfig::from_seed(seed, OPS)
        };
        if let Err(failure) = run::<CoreEngine>(&config) {
            panic!(
                "seed {seed}: {}\nreplay: cargo run --release -p hmm-sim -- --coherent --seed {seed} --ops {OPS}",
                failure.message
            );
        }
    }
}

#[test]
fn the_engine_is_right_with_pages_of_several_blocks() {
    let mut whole = 0;
    for seed in 0..SEEDS {
        match run::<CoreEngine>(&SimConfig::from_seed(seed, OPS).with_gigantic()) {
            Ok(report) => whole += report.engine["huge_pages"],
            Err(failure) => panic!(
                "seed {seed}: {}\nreplay: cargo run --release -p hmm-sim -- --gigantic --seed {seed} --ops {OPS}",
                failure.message
            ),
        }
    }
    assert!(whole > 0, "no program of {SEEDS} moved such a page");
}

#[test]
fn a_seed_of_the_engine_replays() {
    for seed in 0..20 {
        let config = SimConfig::from_seed(seed, OPS);
        let twice = [(); 2].map(|()| run::<CoreEngine>(&config).map_err(|it| it.message));
        assert_eq!(twice[0], twice[1], "seed {seed}");
    }
}
