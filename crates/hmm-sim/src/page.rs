//! One simulated page.

/// Bytes that stand for the 4096 of a page: the others are never looked at.
pub const SIM_PAGE_BYTES: usize = 64;

/// What a page holds.
pub type Payload = [u8; SIM_PAGE_BYTES];

/// A page that is not there, or was never written.
pub(crate) const ZEROS: Payload = [0; SIM_PAGE_BYTES];

/// A page in a page table of the CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub data: Payload,
    /// The pin that a device's DMA holds on it.
    pub pin: Option<u64>,
    /// Shared copy-on-write with a child, alive or not.
    pub cow_shared: bool,
    /// Write-protected through userfaultfd.
    pub write_protected: bool,
    /// Mapped by a huge entry.
    pub huge: bool,
    /// Not a page but a marker: touching it raises SIGBUS.
    pub poisoned: bool,
    /// Not a page but a protection that it has left behind, as those of hugetlbfs
    /// do: a hole that looks like a page.
    pub left_protection: bool,
}

impl Page {
    /// What lost data leaves behind.
    pub(crate) const fn poison() -> Self {
        Self {
            poisoned: true,
            ..Self::new([0xbd; SIM_PAGE_BYTES])
        }
    }

    /// What a write-protected page of hugetlbfs leaves behind.
    pub(crate) const fn left_protection() -> Self {
        Self {
            write_protected: true,
            left_protection: true,
            ..Self::new(ZEROS)
        }
    }

    pub(crate) const fn new(data: Payload) -> Self {
        Self {
            data,
            pin: None,
            cow_shared: false,
            write_protected: false,
            huge: false,
            poisoned: false,
            left_protection: false,
        }
    }
}
