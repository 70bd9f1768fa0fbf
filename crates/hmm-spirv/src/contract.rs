//! What host and kernel agree on: page table, control block, variants.

/// How a kernel gets from an address to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Variant {
    /// Unchecked: a constant is added.
    Delta,
    /// Unchecked: the low bits are an offset into a window.
    Masked,
    /// Unchecked: the page table is walked, and must hold every page.
    Table,
    /// A miss is logged and the invocation returns; the host runs it again.
    Checked,
    /// A miss is logged and the invocation waits for the page.
    Stall,
}

impl Variant {
    /// All variants.
    pub const ALL: [Self; 5] = [
        Self::Delta,
        Self::Masked,
        Self::Table,
        Self::Checked,
        Self::Stall,
    ];

    /// Whether an access can miss.
    #[must_use]
    pub const fn faults(self) -> bool {
        matches!(self, Self::Checked | Self::Stall)
    }
}

/// Byte offsets of the control block's fields (`u32` unless said otherwise).
pub mod control {
    /// Host: nonzero has every invocation give up at its next miss or loop check.
    pub const STOP: u64 = 0;
    /// Host: unmaps that wait; who is parked stays parked.
    pub const YIELD: u64 = 4;
    /// Kernel: entries that it wanted to log so far, which wraps around. An entry
    /// is written at its number modulo [`LOG_CAPACITY`], or nowhere if
    /// [`LOG_SERVED`] was that far behind.
    pub const LOG_COUNT: u64 = 8;
    /// Host: entries that the log has room for, a power of two.
    pub const LOG_CAPACITY: u64 = 12;
    /// Kernel: subgroups that have begun and not ended (stall).
    pub const ACTIVE: u64 = 16;
    /// Kernel: of those, the ones that poll (stall).
    pub const PARKED: u64 = 20;
    /// Kernel: invocations that returned early.
    pub const UNFINISHED: u64 = 24;
    /// Kernel: of those, the ones that had written.
    pub const TORN: u64 = 28;
    /// Host, `u64`: device address of the page table's root.
    pub const TABLE: u64 = 32;
    /// Host, `u64`: device address of the log of `u64` entries.
    pub const LOG: u64 = 40;
    /// Host, `u64`: device address of the done bits of this dispatch; 0 = nobody asks.
    pub const DONE: u64 = 48;
    /// Host, `u64`: what [`Delta`](crate::Variant::Delta) adds.
    pub const DELTA: u64 = 56;
    /// Host, `u64`: which bits of an address [`Masked`](crate::Variant::Masked) keeps.
    pub const MASK: u64 = 64;
    /// Host, `u64`: where the window of [`Masked`](crate::Variant::Masked) begins.
    pub const BASE: u64 = 72;
    /// Host, 3 x `u32`: what vkCmdDispatchBase added.
    pub const BASE_GROUP: u64 = 80;
    /// Host: entries of the log that it has served. It writes `!0` over them
    /// first, so that what is not yet written shows.
    pub const LOG_SERVED: u64 = 92;
    /// Host, 3 x `u32`: workgroups of the whole launch.
    pub const GROUPS: u64 = 96;
    /// Host, 3 x `u32`: workgroups of this dispatch.
    pub const DISPATCHED: u64 = 108;
    /// Host: bound of one stall, in polls.
    pub const STALL_POLLS: u64 = 120;
    /// Host: 0. Kernels read it where a driver must not know that it is 0.
    pub const ZERO: u64 = 124;
    /// Size of the block.
    pub const SIZE: u64 = 128;
}

/// The page table's layout.
pub mod table {
    /// log2 of what a root entry spans.
    pub const ROOT_SHIFT: u32 = 30;
    /// Root entries; the last is for every address of 2^47 and above.
    pub const ROOT_ENTRIES: u64 = (1 << 17) + 1;
    /// log2 of what a leaf entry spans.
    pub const PAGE_SHIFT: u32 = 12;
    /// Entries of a leaf.
    pub const LEAF_ENTRIES: u64 = 1 << 18;
    /// Byte offset of a leaf's wanted bits: bit `2 * page + access`.
    pub const WANTED: u64 = LEAF_ENTRIES * 8;
    /// Size of a leaf with its wanted bits.
    pub const LEAF_SIZE: u64 = WANTED + LEAF_ENTRIES / 4;
    /// Entry bit: may be read.
    pub const READABLE: u64 = 1;
    /// Entry bit: may be written.
    pub const WRITABLE: u64 = 2;

    /// log2 of what a group spans: 16 pages that lie together in memory, aligned alike,
    /// with the same rights.
    pub const GROUP_SHIFT: u32 = 16;
    /// Byte offset of the groups behind the root. A group's entry stands at its number
    /// modulo [`GROUPS`], if there is no other one: page entries say all that groups say.
    pub const GROUPS_AT: u64 = (ROOT_ENTRIES * 8).next_multiple_of(4096);
    /// Entries for groups, `u64` each: the device address; in bits 1 to 14 bits 33 to 46
    /// of the address that they are for; [`GROUP_READABLE`] and [`GROUP_WRITABLE`].
    pub const GROUPS: u64 = 1 << 17;
    /// Group entry bit: may be read. So 0 is no entry.
    pub const GROUP_READABLE: u64 = 1;
    /// Group entry bit: may be written.
    pub const GROUP_WRITABLE: u64 = 1 << 15;
    /// Size of the root with the groups.
    pub const ROOT_SIZE: u64 = GROUPS_AT + GROUPS * 8;
}
