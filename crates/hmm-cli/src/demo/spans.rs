//! Which pages the structure is on.

use hmm::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

use super::index::Index;

/// Pages that lie together, each with a part of the structure.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// From the first of them to the last one.
    pub range: PageRange,
}

/// All spans, in order of address.
pub fn of(index: &Index<'_>) -> Vec<Span> {
    let mut pages: Vec<u64> = Vec::new();
    let mut add = |first: usize, bytes: usize| {
        let last = (first + bytes.max(1) - 1) as u64 / PAGE_SIZE;
        pages.extend(first as u64 / PAGE_SIZE..=last);
    };
    for node in &index.nodes {
        add(std::ptr::from_ref(&**node).addr(), size_of_val(&**node));
        add(node.text.as_ptr().addr(), node.text.len());
        add(
            node.positions.as_ptr().addr(),
            size_of_val(node.positions.as_slice()),
        );
    }
    pages.sort_unstable();
    pages.dedup();
    pages
        .chunk_by(|before, after| after - before == 1)
        .map(|run| Span {
            range: PageRange::from_pages(
                VirtAddr::new(run[0] * PAGE_SIZE),
                PageCount::new(run[run.len() - 1] - run[0] + 1),
            ),
        })
        .collect()
}
