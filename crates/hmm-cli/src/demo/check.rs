//! The same computation on the CPU alone, and the comparison.

use std::sync::atomic::Ordering::Relaxed;

use super::digest::Digest;
use super::index::{Index, Node, address};
use super::kernel::ROUNDS;
use super::touch::Tally;

/// What every node must hold at the end.
pub struct Expected {
    nodes: Vec<ExpectedNode>,
    piece_bytes: usize,
    /// The file's own bytes, from which the texts are checked.
    file: Vec<u8>,
}

struct ExpectedNode {
    /// The digest before the first round and after each one.
    digests: [u64; ROUNDS + 1],
    /// What the device adds in all rounds.
    hits: u64,
    positions: Vec<u64>,
    follower: usize,
}

/// What the comparison found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// Of them, how many differ.
    pub different_bytes: u64,
    /// Number of the first node that differs.
    pub first_different: Option<usize>,
    /// Values that the CPU thread read meanwhile and that were never right.
    pub wrong_meanwhile: u64,
}

impl Verdict {
    /// Whether every byte is right, and was all the time.
    pub const fn is_right(&self) -> bool {
        self.different_bytes == 0 && self.wrong_meanwhile == 0
    }

    fn bytes(&mut self, node: usize, found: &[u8], wanted: &[u8]) {
        let longer = found.len().max(wanted.len());
        let same = found.iter().zip(wanted).filter(|(a, b)| a == b).count();
        self.compared_bytes += longer as u64;
        self.different_bytes += (longer - same) as u64;
        if same < longer {
            self.first_different.get_or_insert(node);
        }
    }

    fn word(&mut self, node: usize, found: u64, wanted: u64) {
        self.bytes(node, &found.to_ne_bytes(), &wanted.to_ne_bytes());
    }

    fn pointer<T>(&mut self, node: usize, found: *const T, wanted: *const T) {
        self.word(node, found.addr() as u64, wanted.addr() as u64);
    }
}

impl Expected {
    /// Computes it, before any device has seen the index.
    pub fn compute(index: &Index<'_>, file: &[u8]) -> Self {
        let mut nodes: Vec<ExpectedNode> = (0..index.nodes.len())
            .map(|at| ExpectedNode {
                digests: [0; ROUNDS + 1],
                hits: 0,
                positions: index.nodes[at].positions.clone(),
                follower: index.follower(at, file),
            })
            .collect();
        for at in 0..nodes.len() {
            let node = &mut nodes[at];
            let text = piece(file, index.piece_bytes, node.positions[0]);
            for round in 0..ROUNDS {
                let mut digest = Digest::begin(node.digests[round], round as u64);
                digest.bytes(text);
                for &position in &node.positions {
                    digest.word(position);
                }
                node.digests[round + 1] = digest.end();
            }
            let (times, follower) = (node.positions.len() * ROUNDS, node.follower);
            nodes[follower].hits += times as u64;
        }
        Self {
            nodes,
            piece_bytes: index.piece_bytes,
            file: file.to_vec(),
        }
    }

    /// After how many rounds a node has this digest.
    pub fn round_of(&self, node: usize, digest: u64) -> Option<usize> {
        self.nodes[node]
            .digests
            .iter()
            .position(|&value| value == digest)
    }

    /// Compares every value of every node. Reading them brings them home.
    pub fn compare(&self, index: &Index<'_>, tally: &[Tally]) -> Verdict {
        let mut verdict = Verdict::default();
        let list_len = index.list_len();
        for (at, (node, wanted)) in index.nodes.iter().zip(&self.nodes).enumerate() {
            let tally = tally.get(at).copied().unwrap_or_default();
            verdict.word(at, node.digest.load(Relaxed), wanted.digests[ROUNDS]);
            verdict.word(at, node.rounds.load(Relaxed), (1 << ROUNDS) - 1);
            verdict.word(at, node.hits.load(Relaxed), wanted.hits + tally.visits);
            verdict.word(at, node.note.load(Relaxed), tally.note);
            let text = piece(&self.file, self.piece_bytes, wanted.positions[0]);
            verdict.bytes(at, &node.text, text);
            verdict.word(
                at,
                node.positions.len() as u64,
                wanted.positions.len() as u64,
            );
            for (&found, &wanted) in node.positions.iter().zip(&wanted.positions) {
                verdict.word(at, found, wanted);
            }
            let last = (at + 1) % list_len == 0 || at + 1 == index.nodes.len();
            let next: *mut Node = if last {
                std::ptr::null_mut()
            } else {
                address(&index.nodes[at + 1])
            };
            let follower = address(&index.nodes[wanted.follower]);
            verdict.pointer(at, node.next.load(Relaxed), next);
            verdict.pointer(at, node.follower.load(Relaxed), follower);
            verdict.pointer(at, node.text_at.load(Relaxed), node.text.as_ptr());
            verdict.pointer(at, node.positions_at.load(Relaxed), node.positions.as_ptr());
            verdict.word(at, node.text_len.load(Relaxed) as u64, text.len() as u64);
            let count = wanted.positions.len() as u64;
            verdict.word(at, node.positions_len.load(Relaxed) as u64, count);
        }
        verdict
    }
}

/// The piece of the file at a position.
fn piece(file: &[u8], piece_bytes: usize, position: u64) -> &[u8] {
    let rest = usize::try_from(position)
        .ok()
        .and_then(|first| file.get(first..));
    let rest = rest.unwrap_or(&[]);
    &rest[..piece_bytes.min(rest.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_is_found() {
        let file: Vec<u8> = (0..100).collect();
        let index = Index::build(&file);
        let expected = Expected::compute(&index, &file);
        let tally = vec![Tally::default(); index.nodes.len()];
        for (node, wanted) in index.nodes.iter().zip(&expected.nodes) {
            node.digest.store(wanted.digests[ROUNDS], Relaxed);
            node.rounds.store((1 << ROUNDS) - 1, Relaxed);
            node.hits.store(wanted.hits, Relaxed);
        }
        assert!(expected.compare(&index, &tally).is_right());
        index.nodes[3].digest.fetch_xor(1 << 40, Relaxed);
        let verdict = expected.compare(&index, &tally);
        assert_eq!(
            (verdict.different_bytes, verdict.first_different),
            (1, Some(3))
        );
    }
}
