//! The device's side: it gets the address of a list's head and follows what it
//! finds there. Every access goes through the device's page table.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm::{Context, KernelError, LaunchReport};

use super::digest::Digest;
use super::index::Node;

/// How often the device walks all lists.
pub const ROUNDS: usize = 8;

/// Nodes that were visited, in all rounds. Static, so that it shares no page
/// with anything that migrates.
pub static PROGRESS: AtomicU64 = AtomicU64::new(0);

/// Bytes fetched at once, to the kernel's stack.
const PART_BYTES: usize = 256;

/// What all launches did together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Pages that the device faulted for.
    pub faults: u64,
    /// Accesses done in place.
    pub in_place: u64,
    /// Accesses for which the page table was walked.
    pub tlb_misses: u64,
}

impl Totals {
    /// Adds one launch.
    pub fn add(&mut self, report: &LaunchReport) {
        self.faults += report.faults;
        self.in_place += report.in_place + report.thrash_in_place;
        self.tlb_misses += report.tlb_misses;
    }
}

/// The pointer to a field of a node.
fn field<T>(node: *mut Node, offset: usize) -> *mut T {
    node.wrapping_byte_add(offset).cast()
}

macro_rules! at {
    ($node:expr, $field:ident) => {
        field($node, offset_of!(Node, $field))
    };
}

/// Walks the list whose head is at `head`.
pub fn walk(context: &Context, head: *mut *mut Node, round: u64) -> Result<(), KernelError> {
    let mut node: *mut Node = context.load(head)?;
    while !node.is_null() {
        visit(context, node, round)?;
        PROGRESS.fetch_add(1, Ordering::Relaxed);
        node = context.load::<*mut Node>(at!(node, next))?;
    }
    Ok(())
}

fn visit(context: &Context, node: *mut Node, round: u64) -> Result<(), KernelError> {
    let previous: u64 = context.atomic_load::<u64>(at!(node, digest))?;
    let mut digest = Digest::begin(previous, round);

    let text: *const u8 = context.load::<*const u8>(at!(node, text_at))?;
    let text_len: usize = context.load::<usize>(at!(node, text_len))?;
    let mut part = [0u8; PART_BYTES];
    for first in (0..text_len).step_by(PART_BYTES) {
        let part = &mut part[..PART_BYTES.min(text_len - first)];
        context.read_slice(text.wrapping_add(first), part)?;
        digest.bytes(part);
    }

    let positions: *const u64 = context.load::<*const u64>(at!(node, positions_at))?;
    let positions_len: usize = context.load::<usize>(at!(node, positions_len))?;
    const PART: usize = PART_BYTES / 8;
    let mut part = [0u64; PART];
    for first in (0..positions_len).step_by(PART) {
        let part = &mut part[..PART.min(positions_len - first)];
        context.read_slice(positions.wrapping_add(first), part)?;
        for &position in &*part {
            digest.word(position);
        }
    }

    context.atomic_store::<u64>(at!(node, digest), digest.end())?;
    context.fetch_or::<u64>(at!(node, rounds), 1 << round)?;
    let follower: *mut Node = context.load::<*mut Node>(at!(node, follower))?;
    context.fetch_add::<u64>(at!(follower, hits), positions_len as u64)?;
    Ok(())
}
