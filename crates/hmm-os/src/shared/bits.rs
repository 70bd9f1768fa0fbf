//! One bit for each page of a region.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bits that any thread may change.
#[derive(Debug)]
pub(super) struct Bits(hmm_mem::Vec<AtomicU64>);

impl Bits {
    /// So many bits, none of them set.
    pub(super) fn new(count: usize) -> Self {
        let words = count.div_ceil(64);
        let mut all = hmm_mem::vec_with_capacity(words);
        all.extend((0..words).map(|_| AtomicU64::new(0)));
        Self(all)
    }

    pub(super) fn set(&self, index: usize, on: bool) {
        let bit = 1 << (index % 64);
        if on {
            self.0[index / 64].fetch_or(bit, Ordering::Relaxed);
        } else {
            self.0[index / 64].fetch_and(!bit, Ordering::Relaxed);
        }
    }

    pub(super) fn get(&self, index: usize) -> bool {
        self.0[index / 64].load(Ordering::Relaxed) >> (index % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_independent() {
        let bits = Bits::new(130);
        for index in [0, 63, 64, 129] {
            bits.set(index, true);
        }
        bits.set(63, false);
        let set: Vec<usize> = (0..130).filter(|&index| bits.get(index)).collect();
        assert_eq!(set, [0, 64, 129]);
    }
}
