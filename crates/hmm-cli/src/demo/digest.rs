//! What is computed: the same code runs on the device and on the CPU, over
//! bytes that each side fetches in its own way.

/// A digest that takes bytes and words in order.
#[derive(Clone, Copy, Debug)]
pub struct Digest(u64);

impl Digest {
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

    /// Begins a round with the digest of the round before.
    pub const fn begin(previous: u64, round: u64) -> Self {
        Self(previous ^ (round + 1).wrapping_mul(Self::FACTOR))
    }

    /// Takes in one word.
    pub const fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(Self::FACTOR);
    }

    /// Takes in bytes, one after the other.
    pub fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.word(byte.into());
        }
    }

    /// The digest; never 0, which stands for "not computed yet".
    pub const fn end(self) -> u64 {
        (self.0 ^ self.0 >> 29) | 1
    }
}
