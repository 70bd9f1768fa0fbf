//! Whatever bytes come: an answer, no panic, and in time.

use hmm_spirv::{Options, Variant, instrument};
use proptest::prelude::*;

const KERNELS: [&[u8]; 4] = [
    include_bytes!("kernels/functions.spv"),
    include_bytes!("kernels/chase_continue.spv"),
    include_bytes!("kernels/structs.spv"),
    include_bytes!("kernels/barrier.spv"),
];

fn words(kernel: &[u8]) -> Vec<u32> {
    let words = kernel.chunks_exact(4);
    words
        .map(|it| u32::from_le_bytes([it[0], it[1], it[2], it[3]]))
        .collect()
}

fn all_variants(words: &[u32]) {
    for variant in Variant::ALL {
        // Either answer will do.
        let _ = instrument(
            words,
            Options {
                variant,
                control_spec_id: 1000,
            },
        );
    }
}

/// What happens to a module.
#[derive(Clone, Debug)]
enum Change {
    Set(usize, u32),
    Flip(usize, u32),
    Copy(usize, usize),
    Remove(usize),
    Insert(usize, u32),
    Cut(usize),
}

fn change() -> impl Strategy<Value = Change> {
    let at = 0..4000usize;
    prop_oneof![
        4 => (at.clone(), 0..200u32).prop_map(|(at, to)| Change::Set(at, to)),
        2 => (at.clone(), 0..32u32).prop_map(|(at, bit)| Change::Flip(at, bit)),
        4 => (at.clone(), at.clone()).prop_map(|(from, to)| Change::Copy(from, to)),
        1 => at.clone().prop_map(Change::Remove),
        1 => (at.clone(), any::<u32>()).prop_map(|(at, word)| Change::Insert(at, word)),
        1 => at.prop_map(Change::Cut),
    ]
}

fn apply(words: &mut Vec<u32>, change: &Change) {
    let len = words.len().max(1);
    if words.is_empty() {
        return;
    }
    match *change {
        Change::Set(at, to) => words[at % len] = to,
        Change::Flip(at, bit) => words[at % len] ^= 1 << bit,
        Change::Copy(from, to) => words[to % len] = words[from % len],
        Change::Remove(at) => {
            words.remove(at % len);
        }
        Change::Insert(at, word) => words.insert(at % len, word),
        Change::Cut(at) => words.truncate(at % len),
    }
}

/// Where the instructions of a module begin.
fn starts(words: &[u32]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 5;
    while at < words.len() {
        starts.push(at);
        at += (words[at] >> 16).max(1) as usize;
    }
    starts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn noise(words in prop::collection::vec(any::<u32>(), 0..200)) {
        all_variants(&words);
    }

    #[test]
    fn noise_behind_a_header(body in prop::collection::vec(0..400u32, 0..200), bound in 1..100u32) {
        let mut words = vec![0x0723_0203, 0x0001_0500, 0, bound, 0];
        words.extend(body.iter().map(|it| if it % 3 == 0 { (it % 7) << 16 | it } else { *it }));
        all_variants(&words);
    }

    #[test]
    fn changed_words(kernel in 0..KERNELS.len(), changes in prop::collection::vec(change(), 1..4)) {
        let mut words = words(KERNELS[kernel]);
        for change in &changes {
            apply(&mut words, change);
        }
        all_variants(&words);
    }

    /// Whole instructions vanish, are doubled or change their operands: more of
    /// these get past the reader.
    #[test]
    fn changed_instructions(
        kernel in 0..KERNELS.len(),
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, 1..8usize, any::<prop::sample::Index>()), 1..4),
    ) {
        let mut words = words(KERNELS[kernel]);
        for (pick, what, operand, source) in picks {
            let starts = starts(&words);
            if starts.is_empty() { break; }
            let at = starts[pick.index(starts.len())];
            let len = ((words[at] >> 16).max(1) as usize).min(words.len() - at);
            let inst = words[at..at + len].to_vec();
            match what {
                0 => { words.drain(at..at + len); }
                1 => { words.splice(at..at, inst); }
                _ => {
                    // An id that some instruction names, in place of another.
                    let from = starts[source.index(starts.len())];
                    let from = (from + operand).min(words.len() - 1);
                    let to = at + 1 + operand % len.max(2).saturating_sub(1);
                    if to < at + len { words[to] = words[from]; }
                }
            }
        }
        all_variants(&words);
    }
}
