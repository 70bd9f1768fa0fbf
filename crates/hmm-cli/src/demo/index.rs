//! The structure: boxes that point to each other, in ordinary heap memory.

use std::collections::HashMap;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};

use hmm::Pointer;

/// Different pieces at most, so that large files get longer pieces.
const MOST_PIECES: usize = 1 << 18;
/// Shortest piece.
const LEAST_PIECE_BYTES: usize = 16;
/// Lists that the nodes are chained in: what a kernel's groups walk.
const LISTS: usize = 64;

/// A piece of the file.
///
/// The device finds everything by following pointers, so what it follows is a
/// field of its own. Everything that changes while others look is atomic, on
/// both sides.
#[derive(Debug)]
pub struct Node {
    /// The next node of the list, or null.
    pub next: AtomicPtr<Node>,
    /// The node of the piece that comes after this one's first occurrence.
    pub follower: AtomicPtr<Node>,
    /// Start and length of `text`, for the device.
    pub text_at: AtomicPtr<u8>,
    /// Bytes of `text`.
    pub text_len: AtomicUsize,
    /// Start and length of `positions`, for the device.
    pub positions_at: AtomicPtr<u64>,
    /// Items of `positions`.
    pub positions_len: AtomicUsize,
    /// What the device computes from all of it; 0 before the first round.
    pub digest: AtomicU64,
    /// A bit for each round that has visited the node.
    pub rounds: AtomicU64,
    /// Counted up by the device and by the CPU at the same time.
    pub hits: AtomicU64,
    /// Written by the CPU only, while the device moves the page to and fro.
    pub note: AtomicU64,
    /// The piece.
    pub text: Vec<u8>,
    /// Where in the file it occurs, in bytes.
    pub positions: Vec<u64>,
}

/// All nodes, and the ways to them.
#[derive(Debug)]
pub struct Index<'f> {
    /// Length of a piece; the last one may be shorter.
    pub piece_bytes: usize,
    /// In order of first appearance.
    #[allow(
        clippy::vec_box,
        reason = "nodes point to each other and must stay where they are while the vector grows"
    )]
    pub nodes: Vec<Box<Node>>,
    /// Number of a piece's node: how the CPU finds it.
    pub by_text: HashMap<&'f [u8], usize>,
    /// First node of each list: how the device does.
    pub heads: Vec<AtomicPtr<Node>>,
}

impl<'f> Index<'f> {
    /// Cuts the file into pieces and chains them up.
    pub fn build(file: &'f [u8]) -> Self {
        let piece_bytes = file
            .len()
            .div_ceil(MOST_PIECES)
            .next_multiple_of(LEAST_PIECE_BYTES);
        let mut nodes = Vec::new();
        let mut by_text = HashMap::new();
        for (number, piece) in file.chunks(piece_bytes).enumerate() {
            let at = *by_text.entry(piece).or_insert_with(|| {
                nodes.push(Box::new(Node::new(piece)));
                nodes.len() - 1
            });
            let node: &mut Box<Node> = &mut nodes[at];
            node.positions.push((number * piece_bytes) as u64);
        }
        let mut index = Self {
            piece_bytes,
            nodes,
            by_text,
            heads: Vec::new(),
        };
        index.link(file);
        index
    }

    fn link(&mut self, file: &'f [u8]) {
        for (at, node) in self.nodes.iter().enumerate() {
            node.text_at.store(node.text.as_ptr().cast_mut(), Relaxed);
            node.text_len.store(node.text.len(), Relaxed);
            node.positions_at
                .store(node.positions.as_ptr().cast_mut(), Relaxed);
            node.positions_len.store(node.positions.len(), Relaxed);
            let follower = &self.nodes[self.follower(at, file)];
            node.follower.store(address(follower), Relaxed);
        }
        let list_len = self.list_len();
        for list in self.nodes.chunks(list_len) {
            for pair in list.windows(2) {
                pair[0].next.store(address(&pair[1]), Relaxed);
            }
        }
        let lists = self.nodes.chunks(list_len);
        self.heads = lists
            .map(|list| AtomicPtr::new(address(&list[0])))
            .collect();
    }

    /// Nodes in a list; the last list may be shorter.
    pub fn list_len(&self) -> usize {
        self.nodes.len().div_ceil(LISTS).max(1)
    }

    /// Number of the node whose piece follows another one's first occurrence;
    /// the first node follows the last piece.
    pub fn follower(&self, at: usize, file: &[u8]) -> usize {
        let node = &self.nodes[at];
        let first = node.positions.first().copied().unwrap_or(0);
        let next = usize::try_from(first).unwrap_or(0) + self.piece_bytes;
        file.get(next..)
            .and_then(|rest| rest.chunks(self.piece_bytes).next())
            .and_then(|piece| self.by_text.get(piece).copied())
            .unwrap_or(0)
    }

    /// The heads, for the device: they are ordinary memory as well.
    pub fn heads_pointer(&self) -> Pointer<*mut Node> {
        Pointer::of(self.heads.as_ptr().cast())
    }
}

impl Node {
    fn new(piece: &[u8]) -> Self {
        Self {
            next: AtomicPtr::new(ptr::null_mut()),
            follower: AtomicPtr::new(ptr::null_mut()),
            text_at: AtomicPtr::new(ptr::null_mut()),
            text_len: AtomicUsize::new(0),
            positions_at: AtomicPtr::new(ptr::null_mut()),
            positions_len: AtomicUsize::new(0),
            digest: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            note: AtomicU64::new(0),
            text: piece.to_vec(),
            positions: Vec::new(),
        }
    }
}

/// The plain pointer that the device follows. All that is written through it
/// is atomic, so a shared reference is enough to have it from.
pub fn address(node: &Node) -> *mut Node {
    ptr::from_ref(node).cast_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_has_one_node_and_all_its_positions() {
        let file: Vec<u8> = [[1u8; 16], [2; 16], [1; 16], [3; 16]].concat();
        let index = Index::build(&file[..60]);
        assert_eq!(index.piece_bytes, 16);
        let texts: Vec<usize> = index.nodes.iter().map(|node| node.text.len()).collect();
        assert_eq!(texts, [16, 16, 12]);
        assert_eq!(index.nodes[0].positions, [0, 32]);
        assert_eq!(index.follower(0, &file[..60]), 1);
        assert_eq!(index.follower(1, &file[..60]), 0);
        assert_eq!(index.follower(2, &file[..60]), 0);
        assert_eq!(index.heads.len(), 3);
    }
}
