//! Invocations of a checked dispatch that are held back.
//!
//! Where those that run need more pages together than the device has, each round brings
//! pages that are gone again before their invocation has all of its own: none may ever
//! end. Then fewer run. The done bits of the others are set, so that they do nothing, and
//! cleared when it is their turn.

use std::sync::atomic::{AtomicU32, Ordering};

/// Who is held back, and how many run.
#[derive(Debug)]
pub(crate) struct Held {
    /// A bit for each invocation, as in the done bits; empty before the first is held.
    words: hmm_mem::Vec<u32>,
    /// Invocations that run at a time.
    width: u32,
}

impl Held {
    /// Nobody.
    pub(crate) const fn none() -> Self {
        Self {
            words: hmm_mem::vec(),
            width: 0,
        }
    }

    /// Holds the latter half of those back that are not done, of the first `invocations`.
    /// How many run now; `None` when there is no more than one.
    pub(crate) fn halve(&mut self, done: &[AtomicU32], invocations: u64) -> Option<u32> {
        let mut rests = hmm_mem::vec_with_capacity(done.len());
        rests.extend((0u64..).step_by(32).zip(done).map(|(first, word)| {
            let bits = match invocations - first {
                beyond @ 0..32 => (1 << beyond) - 1,
                _ => u32::MAX,
            };
            !word.load(Ordering::SeqCst) & bits
        }));
        let running: u32 = rests.iter().map(|rest| rest.count_ones()).sum();
        if running < 2 {
            return None;
        }
        self.width = running / 2;
        self.words.resize(done.len(), 0);
        let mut kept = 0;
        for ((rest, done), held) in rests.iter().zip(done).zip(&mut self.words) {
            let (keep, hold) = split(*rest, self.width - kept);
            kept += keep.count_ones();
            *held |= hold;
            done.fetch_or(hold, Ordering::SeqCst);
        }
        Some(self.width)
    }

    /// All that ran are done: lets twice as many run next. Whether any are left.
    pub(crate) fn release(&mut self, done: &[AtomicU32]) -> bool {
        self.width = self.width.saturating_mul(2);
        let mut released = 0;
        for (held, done) in self.words.iter_mut().zip(done) {
            let (release, hold) = split(*held, self.width - released);
            released += release.count_ones();
            *held = hold;
            done.fetch_and(!release, Ordering::SeqCst);
        }
        released > 0
    }
}

/// The first bits of a word, up to so many, and the others.
fn split(word: u32, most: u32) -> (u32, u32) {
    let mut others = word;
    for _ in 0..most.min(word.count_ones()) {
        others &= others - 1;
    }
    (word & !others, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(done: &[AtomicU32]) -> Vec<u32> {
        done.iter()
            .map(|word| word.load(Ordering::SeqCst))
            .collect()
    }

    #[test]
    fn fewer_run_until_one_does_and_all_have_their_turn() {
        const INVOCATIONS: u64 = 70;
        let done: Vec<AtomicU32> = [0b11, 0, 0].map(AtomicU32::new).into();
        let mut held = Held::none();
        let halves: Vec<u32> = std::iter::from_fn(|| held.halve(&done, INVOCATIONS)).collect();
        assert_eq!(halves, [34, 17, 8, 4, 2, 1]);
        // The third runs; what is beyond the last was not touched.
        assert_eq!(words(&done), [!0b100, u32::MAX, 0b11_1111]);
        let mut ran = 2;
        let mut turns = Vec::new();
        loop {
            let running: u32 = [u32::MAX, u32::MAX, 0b11_1111]
                .iter()
                .zip(words(&done))
                .map(|(all, done)| (all & !done).count_ones())
                .sum();
            turns.push(running);
            ran += running;
            for (word, all) in done.iter().zip([u32::MAX, u32::MAX, 0b11_1111]) {
                word.fetch_or(all, Ordering::SeqCst);
            }
            if !held.release(&done) {
                break;
            }
        }
        assert_eq!(turns, [1, 2, 4, 8, 16, 32, 5]);
        assert_eq!(u64::from(ran), INVOCATIONS);
    }

    #[test]
    fn without_anybody_held_there_is_no_turn() {
        let done = [AtomicU32::new(0)];
        assert!(!Held::none().release(&done));
        assert_eq!(Held::none().halve(&done, 1), None);
    }

    #[test]
    fn words_are_split_at_a_number_of_bits() {
        assert_eq!(split(0b1011_0100, 2), (0b0001_0100, 0b1010_0000));
        assert_eq!(split(u32::MAX, 0), (0, u32::MAX));
        assert_eq!(split(u32::MAX, 99), (u32::MAX, 0));
    }
}
