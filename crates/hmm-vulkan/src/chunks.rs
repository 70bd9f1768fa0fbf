//! How a grid is cut into dispatches: boxes of workgroups that together are the grid.
//!
//! A dispatch should be short, as unmapping waits for its end, and long enough to be worth
//! its submission. How long one takes is measured, and the next is cut accordingly.

use std::time::Duration;

/// What a dispatch should take.
const TARGET: Duration = Duration::from_millis(8);
/// Invocations of the first dispatch.
const FIRST_INVOCATIONS: u64 = 1 << 14;

/// A box of workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) base: [u32; 3],
    pub(crate) groups: [u32; 3],
}

impl Chunk {
    /// The whole grid.
    pub(crate) const fn whole(groups: [u32; 3]) -> Self {
        Self {
            base: [0; 3],
            groups,
        }
    }

    /// Its workgroups.
    pub(crate) fn count(&self) -> u64 {
        product(self.groups)
    }
}

/// The rest of a grid.
#[derive(Debug)]
pub(crate) struct Chunks {
    groups: [u32; 3],
    next: Option<[u32; 3]>,
    /// Workgroups that the next chunk may have.
    size: u64,
    most: u64,
}

impl Chunks {
    /// All of a grid whose workgroups have so many invocations, in chunks of at most
    /// `most_invocations`.
    pub(crate) fn new(groups: [u32; 3], invocations: u64, most_invocations: u64) -> Self {
        let most = (most_invocations / invocations).max(1);
        Self {
            groups,
            next: (product(groups) > 0).then_some([0; 3]),
            size: (FIRST_INVOCATIONS / invocations).clamp(1, most),
            most,
        }
    }

    /// A chunk took this long.
    pub(crate) fn took(&mut self, chunk: Chunk, time: Duration) {
        if time > TARGET {
            self.size = (chunk.count() / 2).max(1);
        } else if time < TARGET / 2 && chunk.count() > self.size / 2 {
            self.size = (self.size * 2).min(self.most);
        }
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let base = self.next?;
        let [x, y, z] = self.groups;
        let [left_x, left_y, left_z] = [x - base[0], y - base[1], z - base[2]];
        let fit = |room: u64, left: u32| u32::try_from(room).unwrap_or(u32::MAX).clamp(1, left);
        let slice = u64::from(x) * u64::from(y);
        // Whole slices, whole rows, or a part of a row, as far as they are left.
        let groups = if base[0] == 0 && base[1] == 0 && self.size >= slice {
            [x, y, fit(self.size / slice, left_z)]
        } else if base[0] == 0 && self.size >= u64::from(x) {
            [x, fit(self.size / u64::from(x), left_y), 1]
        } else {
            [fit(self.size, left_x), 1, 1]
        };
        let mut next = base;
        if groups[0] < left_x {
            next[0] += groups[0];
        } else if groups[1] < left_y {
            next = [0, base[1] + groups[1], base[2]];
        } else {
            next = [0, 0, base[2] + groups[2]];
        }
        self.next = (next[2] < z).then_some(next);
        Some(Chunk { base, groups })
    }
}

/// How many workgroups a grid has.
pub(crate) fn product(groups: [u32; 3]) -> u64 {
    groups.iter().fold(1u64, |product, &groups| {
        product.saturating_mul(u64::from(groups))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workgroup_is_in_one_chunk() {
        for groups in [
            [1, 1, 1],
            [7, 5, 3],
            [100, 1, 1],
            [1, 1, 40],
            [3, 17, 2],
            [0, 4, 4],
        ] {
            for most in [1, 3, 10, 1000] {
                let mut seen = vec![0u8; usize::try_from(product(groups)).unwrap()];
                let mut chunks = Chunks::new(groups, 1, most);
                let mut rounds = 0;
                while let Some(chunk) = chunks.next() {
                    assert!(chunk.count() <= most, "{chunk:?} of {groups:?}");
                    for z in chunk.base[2]..chunk.base[2] + chunk.groups[2] {
                        for y in chunk.base[1]..chunk.base[1] + chunk.groups[1] {
                            for x in chunk.base[0]..chunk.base[0] + chunk.groups[0] {
                                let index = (z * groups[1] + y) * groups[0] + x;
                                seen[index as usize] += 1;
                            }
                        }
                    }
                    // As if some were slow and some quick.
                    rounds += 1;
                    let ms = if rounds % 3 == 0 { 20 } else { 1 };
                    chunks.took(chunk, Duration::from_millis(ms));
                }
                assert!(seen.iter().all(|&times| times == 1), "{groups:?} by {most}");
            }
        }
    }

    #[test]
    fn chunks_grow_while_they_are_quick() {
        let mut chunks = Chunks::new([1 << 20, 1, 1], 64, 1 << 20);
        let first = chunks.next().unwrap();
        assert_eq!(first.count(), FIRST_INVOCATIONS / 64);
        chunks.took(first, Duration::from_millis(1));
        let second = chunks.next().unwrap();
        assert_eq!(second.count(), 2 * first.count());
        chunks.took(second, Duration::from_millis(50));
        assert_eq!(chunks.next().unwrap().count(), first.count());
    }
}
