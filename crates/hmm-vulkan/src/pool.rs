//! Which leaves of the page table are free.

/// Numbers of free leaves; leaf 0 is the empty one, and never handed out.
#[derive(Debug)]
pub(crate) struct Pool {
    free: hmm_mem::Vec<u32>,
    /// Leaves below this have been handed out before.
    fresh: u32,
    leaves: u32,
}

impl Pool {
    /// `leaves` in all, the empty one among them.
    pub(crate) const fn new(leaves: u32) -> Self {
        Self {
            free: hmm_mem::vec(),
            fresh: 1,
            leaves,
        }
    }

    /// A leaf, used ones first: their memory is there already.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let leaf = self.fresh;
            (leaf < self.leaves).then(|| {
                self.fresh += 1;
                leaf
            })
        })
    }

    /// Gives one back, whose entries are all zero.
    pub(crate) fn put(&mut self, leaf: u32) {
        self.free.push(leaf);
    }

    /// No leaf from this one on has ever been used.
    pub(crate) const fn fresh(&self) -> u32 {
        self.fresh
    }
}
