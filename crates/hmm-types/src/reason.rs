//! Why a page stayed where it was.

use std::fmt;

/// Why a page did not move when a migration asked for it. The data is right
/// wherever it is; a reason says what stood in the way and what would help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StayReason {
    /// Nothing is mapped there.
    NotMapped,
    /// Mapped without any access (`PROT_NONE`).
    NoAccess,
    /// Pinned for DMA: O_DIRECT, io_uring fixed buffers or RDMA in flight.
    Pinned,
    /// Shared copy-on-write with a forked process, and un-sharing failed.
    SharedCow,
    /// Locked in memory with mlock(2).
    Locked,
    /// Pages of a file.
    FileBacked,
    /// Shared memory: other processes may map it.
    Shared,
    /// Huge pages of hugetlbfs.
    HugeTlb,
    /// Device files, vdso and other special mappings.
    Special,
    /// Memory of the engine itself, or of a loaded program or library.
    EngineOwned,
    /// A thread's stack or control block, which the kernel itself uses, where
    /// the engine cannot serve faults of the kernel (without privileges).
    ThreadMemory,
    /// Another userfaultfd owns the mapping.
    ForeignUserfaultfd,
    /// The device's memory is full.
    NoDeviceMemory,
    /// System memory is exhausted.
    NoSystemMemory,
    /// A limit of the process (mappings, memory) or of the engine is reached.
    Limit,
    /// The device is lost or was removed.
    DeviceLost,
    /// A copy failed; the page is where it was.
    CopyFailed,
    /// The page was on another way at that moment, more often than the retry
    /// limit allows.
    Busy,
    /// The program removed or remapped the memory during the migration.
    Raced,
    /// Given back with madvise(2) a moment ago and not written since.
    Discarded,
    /// The request was cancelled, or the engine is shutting down.
    Cancelled,
}

impl StayReason {
    /// All reasons, for tables and statistics.
    pub const ALL: [Self; 21] = [
        Self::NotMapped,
        Self::NoAccess,
        Self::Pinned,
        Self::SharedCow,
        Self::Locked,
        Self::FileBacked,
        Self::Shared,
        Self::HugeTlb,
        Self::Special,
        Self::EngineOwned,
        Self::ThreadMemory,
        Self::ForeignUserfaultfd,
        Self::NoDeviceMemory,
        Self::NoSystemMemory,
        Self::Limit,
        Self::DeviceLost,
        Self::CopyFailed,
        Self::Busy,
        Self::Raced,
        Self::Discarded,
        Self::Cancelled,
    ];

    /// What a user can do about it.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::NotMapped => "check the pointer and the length",
            Self::NoAccess => "allow access with mprotect first",
            Self::Pinned => "wait until the I/O on it is done, then migrate again",
            Self::SharedCow => "write to it once, or wait until the forked child is gone",
            Self::Locked => "munlock it, or let the device use it in place",
            Self::FileBacked => "copy it into anonymous memory, or use it in place",
            Self::Shared => "use it in place",
            Self::HugeTlb => "use it in place",
            Self::Special => "use it in place",
            Self::EngineOwned => "leave it; the engine and loaded code need it here",
            Self::ThreadMemory => "keep the data on the heap, or run as root: see `hmm info`",
            Self::ForeignUserfaultfd => "let the other user of userfaultfd unregister it",
            Self::NoDeviceMemory => "evict something, or give the device more memory",
            Self::NoSystemMemory => "free system memory",
            Self::Limit => "see the limits: vm.max_map_count, ulimit -v, the engine's bounds",
            Self::DeviceLost => "remove the device and add it again",
            Self::CopyFailed => "migrate again; see the statistics",
            Self::Busy => "migrate again",
            Self::Raced => "do not unmap memory while it migrates",
            Self::Discarded => "write to it, or wait, then migrate again",
            Self::Cancelled => "ask again",
        }
    }
}

impl fmt::Display for StayReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMapped => "not mapped",
            Self::NoAccess => "no access allowed",
            Self::Pinned => "pinned for I/O",
            Self::SharedCow => "shared copy-on-write",
            Self::Locked => "locked in memory",
            Self::FileBacked => "file-backed",
            Self::Shared => "shared memory",
            Self::HugeTlb => "hugetlbfs",
            Self::Special => "special mapping",
            Self::EngineOwned => "engine's or program's own",
            Self::ThreadMemory => "thread's stack or control block",
            Self::ForeignUserfaultfd => "another owner of userfaultfd",
            Self::NoDeviceMemory => "no device memory",
            Self::NoSystemMemory => "no system memory",
            Self::Limit => "limit reached",
            Self::DeviceLost => "device lost",
            Self::CopyFailed => "copy failed",
            Self::Busy => "busy",
            Self::Raced => "changed meanwhile",
            Self::Discarded => "given back with madvise",
            Self::Cancelled => "cancelled",
        })
    }
}
