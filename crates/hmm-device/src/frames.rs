//! Which frames are free: one bit a frame.
//!
//! ```text
//! chunk      0                 1                 2        (512 frames = 2 MiB)
//! bits    [8 words]         [8 words]         [8 words]   1 = free
//! counts     512               37                0        free frames of the chunk
//! whole       1                 0                0        bitmap: all 512 are free
//! partial     0                 1                0        bitmap: some are free
//! ```
//!
//! A request for a chunk or more takes whole chunks, so that a run is one huge
//! page. A smaller request looks into partly used chunks first, from a cursor
//! (next fit), and breaks a whole chunk only when those have no run that is
//! long enough nearby.

use hmm_mem::Vec;
use hmm_types::{FrameId, FrameRange};

/// Frames in a chunk.
const CHUNK_FRAMES: u32 = 512;
/// Words of the bitmap in a chunk.
const CHUNK_WORDS: usize = 8;
/// Partly used chunks that one request looks into before it takes a whole one,
/// or the longest run seen.
const SCAN_CHUNKS: usize = 16;

/// The free frames of one device. 1.03 bits a frame.
#[derive(Debug)]
pub struct FrameAllocator {
    bits: Vec<u64>,
    counts: Vec<u16>,
    whole: Vec<u64>,
    partial: Vec<u64>,
    frames: u32,
    free: u32,
    /// The chunk that the next small request looks into first.
    small_cursor: usize,
    /// No whole chunk lies before this one.
    whole_cursor: usize,
}

impl FrameAllocator {
    /// `frames` free frames.
    #[must_use]
    pub fn new(frames: u32) -> Self {
        let chunks = frames.div_ceil(CHUNK_FRAMES) as usize;
        let mut this = Self {
            bits: zeroes(chunks * CHUNK_WORDS),
            counts: zeroes(chunks),
            whole: zeroes(chunks.div_ceil(64)),
            partial: zeroes(chunks.div_ceil(64)),
            frames,
            free: 0,
            small_cursor: 0,
            whole_cursor: 0,
        };
        if frames > 0 {
            this.free(FrameRange::new(FrameId::new(0), frames));
        }
        this
    }

    /// Frames that are free.
    #[must_use]
    pub const fn free_frames(&self) -> u32 {
        self.free
    }

    /// Takes a run of at least one and at most `want` frames; `None` when no
    /// frame is free.
    #[must_use]
    pub fn allocate(&mut self, want: u64) -> Option<FrameRange> {
        let want = u32::try_from(want).unwrap_or(u32::MAX).min(self.free);
        if want == 0 {
            return None;
        }
        let run = if want >= CHUNK_FRAMES {
            self.find_large(want)
        } else {
            self.find_small(want)
        };
        self.take(run);
        Some(run)
    }

    /// Takes frames from this one on, at most `want`; `None` when it is not free.
    #[must_use]
    pub fn allocate_at(&mut self, first: FrameId, want: u32) -> Option<FrameRange> {
        let want = want.min(self.frames.saturating_sub(first.get()));
        let mut len = 0;
        while len < want {
            let at = first.get() + len;
            let ones = (self.bits[(at / 64) as usize] >> (at % 64)).trailing_ones();
            len += ones;
            if ones < 64 - at % 64 {
                break;
            }
        }
        let run = (len > 0).then(|| FrameRange::new(first, len.min(want)))?;
        self.take(run);
        Some(run)
    }

    /// Gives frames back.
    ///
    /// # Panics
    /// When one of them is free already, or does not exist.
    pub fn free(&mut self, frames: FrameRange) {
        assert!(
            frames.first().get() + frames.count() <= self.frames,
            "{frames:?} do not exist"
        );
        for (word, mask) in words(frames) {
            assert!(self.bits[word] & mask == 0, "{frames:?} are freed twice");
            self.bits[word] |= mask;
        }
        self.free += frames.count();
        self.recount(frames, true);
        // What was used before is used again first: the kernel clears memory
        // that has never been touched, which takes longer than a copy.
        let chunk = frames.first().index() / CHUNK_FRAMES as usize;
        self.whole_cursor = self.whole_cursor.min(chunk);
    }

    fn take(&mut self, frames: FrameRange) {
        for (word, mask) in words(frames) {
            assert!(
                self.bits[word] & mask == mask,
                "{frames:?} are not all free"
            );
            self.bits[word] &= !mask;
        }
        self.free -= frames.count();
        self.recount(frames, false);
    }

    /// Brings the chunks' counts and bitmaps in step with their bits.
    fn recount(&mut self, frames: FrameRange, freed: bool) {
        let mut next = frames.first().get();
        let end = next + frames.count();
        while next < end {
            let chunk = (next / CHUNK_FRAMES) as usize;
            let cut = (next / CHUNK_FRAMES + 1) * CHUNK_FRAMES;
            let Ok(changed) = u16::try_from(cut.min(end) - next) else {
                unreachable!("a chunk has 512 frames");
            };
            let count = &mut self.counts[chunk];
            *count = if freed {
                *count + changed
            } else {
                *count - changed
            };
            let (word, mask) = (chunk / 64, 1 << (chunk % 64));
            self.whole[word] &= !mask;
            self.partial[word] &= !mask;
            if u32::from(*count) == CHUNK_FRAMES {
                self.whole[word] |= mask;
            } else if *count > 0 {
                self.partial[word] |= mask;
            }
            next = cut;
        }
    }

    fn find_large(&mut self, want: u32) -> FrameRange {
        let Some(chunk) = next_bit(&self.whole, self.whole_cursor) else {
            return self.find_small(CHUNK_FRAMES - 1);
        };
        let mut len = CHUNK_FRAMES;
        let mut next = chunk + 1;
        while len < want && self.is_whole(next) {
            len += CHUNK_FRAMES;
            next += 1;
        }
        if len < want && next < self.counts.len() {
            // The head of the chunk behind, as far as it is free.
            len += self.run_at(next);
        }
        let len = len.min(want);
        self.whole_cursor = next;
        FrameRange::new(FrameId::new(chunk_start(chunk)), len)
    }

    fn find_small(&mut self, want: u32) -> FrameRange {
        let mut best: Option<FrameRange> = None;
        let mut from = self.small_cursor;
        let mut first_seen = None;
        for _ in 0..SCAN_CHUNKS {
            let Some(chunk) = next_bit(&self.partial, from) else {
                break;
            };
            if first_seen == Some(chunk) {
                break;
            }
            first_seen.get_or_insert(chunk);
            let run = self.best_run(chunk, want);
            if best.is_none_or(|best| best.count() < run.count()) {
                best = Some(run);
                self.small_cursor = chunk;
            }
            if run.count() >= want {
                return run;
            }
            from = chunk + 1;
        }
        if let Some(chunk) = next_bit(&self.whole, self.whole_cursor) {
            self.small_cursor = chunk;
            return FrameRange::new(FrameId::new(chunk_start(chunk)), want);
        }
        match best {
            Some(run) => run,
            None => unreachable!("frames are free, but no chunk has any"),
        }
    }

    fn is_whole(&self, chunk: usize) -> bool {
        self.counts
            .get(chunk)
            .is_some_and(|&count| u32::from(count) == CHUNK_FRAMES)
    }

    /// Free frames at the very start of a chunk.
    fn run_at(&self, chunk: usize) -> u32 {
        let mut len = 0;
        for word in &self.bits[chunk * CHUNK_WORDS..(chunk + 1) * CHUNK_WORDS] {
            len += word.trailing_ones();
            if *word != u64::MAX {
                break;
            }
        }
        len
    }

    /// The first run of `want` free frames in the chunk, or else the longest
    /// one. The chunk has free frames.
    fn best_run(&self, chunk: usize, want: u32) -> FrameRange {
        let words = &self.bits[chunk * CHUNK_WORDS..(chunk + 1) * CHUNK_WORDS];
        let (mut best_start, mut best_len) = (0, 0);
        let (mut start, mut len) = (0u32, 0u32);
        let mut base = 0u32;
        'chunk: for &word in words {
            let mut at = 0;
            while at < 64 {
                let rest = word >> at;
                let ones = (!rest).trailing_zeros().min(64 - at);
                if ones > 0 {
                    if len == 0 {
                        start = base + at;
                    }
                    len += ones;
                    if len > best_len {
                        (best_start, best_len) = (start, len);
                    }
                    if len >= want {
                        break 'chunk;
                    }
                    at += ones;
                }
                if at < 64 {
                    len = 0;
                    at += (word >> at).trailing_zeros().min(64 - at);
                }
            }
            base += 64;
        }
        FrameRange::new(
            FrameId::new(chunk_start(chunk) + best_start),
            best_len.min(want),
        )
    }
}

fn zeroes<T: Default + Clone>(len: usize) -> Vec<T> {
    let mut all = hmm_mem::vec_with_capacity(len);
    all.resize(len, T::default());
    all
}

fn chunk_start(chunk: usize) -> u32 {
    match u32::try_from(chunk * CHUNK_FRAMES as usize) {
        Ok(start) => start,
        Err(_) => unreachable!("chunks hold frames, whose numbers have 32 bits"),
    }
}

/// The words of the bitmap that hold a run, with the run's bits in each.
fn words(frames: FrameRange) -> impl Iterator<Item = (usize, u64)> {
    let first = frames.first().get();
    let end = first + frames.count();
    (first / 64..end.div_ceil(64)).map(move |word| {
        let from = first.saturating_sub(word * 64).min(63);
        let to = (end - word * 64).min(64);
        (word as usize, (u64::MAX << from) & (u64::MAX >> (64 - to)))
    })
}

/// The first set bit at `from` or behind, else the first one of all.
fn next_bit(map: &[u64], from: usize) -> Option<usize> {
    let find = |from: usize| {
        let mut word = from / 64;
        let mut bits = map.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *map.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    };
    find(from).or_else(|| find(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_requests_get_whole_chunks() {
        let mut frames = FrameAllocator::new(4 * 512 + 100);
        let page = frames.allocate(1).unwrap();
        assert_eq!(page.count(), 1);
        let run = frames.allocate(1024).unwrap();
        assert_eq!((run.first().get() % 512, run.count()), (0, 1024));
        let rest = frames.allocate(u64::MAX).unwrap();
        assert_eq!((rest.first().get() % 512, rest.count()), (0, 1024));
        let mut got = 1 + 1024 + 1024;
        while let Some(run) = frames.allocate(512) {
            got += run.count();
        }
        assert_eq!(got, 4 * 512 + 100);
        assert_eq!(frames.free_frames(), 0);
    }

    #[test]
    fn small_requests_fill_the_chunk_in_use() {
        let mut frames = FrameAllocator::new(512 * 64);
        for _ in 0..512 {
            assert!(frames.allocate(1).unwrap().first().get() < 512);
        }
        assert_eq!(frames.allocate(16).unwrap().first().get(), 512);
    }

    #[test]
    fn frames_can_be_had_where_they_are_wanted() {
        let mut frames = FrameAllocator::new(1000);
        let mut at = |first, want| {
            let run = frames.allocate_at(FrameId::new(first), want)?;
            Some((run.first().get(), run.count()))
        };
        assert_eq!(at(100, 300), Some((100, 300)));
        assert_eq!(at(100, 1), None);
        assert_eq!(at(60, 300), Some((60, 40)));
        assert_eq!(at(990, 300), Some((990, 10)));
        assert_eq!(at(1000, 1), None);
        assert_eq!(at(5000, 1), None);
        assert_eq!(at(0, 0), None);
        assert_eq!(frames.free_frames(), 1000 - 350);
        frames.free(FrameRange::new(FrameId::new(60), 340));
        let run = frames.allocate_at(FrameId::new(64), 64).unwrap();
        assert_eq!((run.first().get(), run.count()), (64, 64));
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn double_free_is_noticed() {
        let mut frames = FrameAllocator::new(100);
        let run = frames.allocate(10).unwrap();
        frames.free(run.slice(3, 1));
        frames.free(run);
    }

    #[test]
    #[should_panic(expected = "do not exist")]
    fn foreign_frames_are_noticed() {
        FrameAllocator::new(100).free(FrameRange::new(FrameId::new(99), 2));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u64),
        Free {
            which: usize,
            first: u32,
            count: u32,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop_oneof![1u64..4, 1u64..600, 500u64..2000].prop_map(Step::Allocate),
            (0usize..64, 0u32..700, 1u32..700).prop_map(|(which, first, count)| Step::Free {
                which,
                first,
                count
            }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_plain_array(
            size in 1u32..3000,
            steps in proptest::collection::vec(step(), 1..200),
        ) {
            let mut frames = FrameAllocator::new(size);
            let mut used = vec![false; size as usize];
            let mut runs: std::vec::Vec<FrameRange> = std::vec::Vec::new();
            for step in steps {
                match step {
                    Step::Allocate(want) => match frames.allocate(want) {
                        None => prop_assert!(used.iter().all(|&used| used)),
                        Some(run) => {
                            prop_assert!(u64::from(run.count()) <= want);
                            for frame in run.iter() {
                                prop_assert!(!used[frame.index()]);
                                used[frame.index()] = true;
                            }
                            runs.push(run);
                        }
                    },
                    Step::Free { which, first, count } => {
                        if runs.is_empty() {
                            continue;
                        }
                        let run = runs.swap_remove(which % runs.len());
                        let first = first % run.count();
                        let count = count.min(run.count() - first);
                        if first > 0 {
                            runs.push(run.slice(0, first));
                        }
                        if first + count < run.count() {
                            runs.push(run.slice(first + count, run.count() - first - count));
                        }
                        let part = run.slice(first, count);
                        for frame in part.iter() {
                            used[frame.index()] = false;
                        }
                        frames.free(part);
                    }
                }
                let free = used.iter().filter(|&&used| !used).count();
                prop_assert_eq!(frames.free_frames() as usize, free);
                for (chunk, part) in used.chunks(512).enumerate() {
                    let free = part.iter().filter(|&&used| !used).count();
                    prop_assert_eq!(usize::from(frames.counts[chunk]), free);
                    let bit = |map: &[u64]| map[chunk / 64] >> (chunk % 64) & 1 == 1;
                    prop_assert_eq!(bit(&frames.whole), free == 512);
                    prop_assert_eq!(bit(&frames.partial), free > 0 && free < 512);
                }
            }
        }
    }
}
