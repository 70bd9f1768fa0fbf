//! How to open an address space, why that fails, and what it tells.

use hmm_hal::RegisterError;

use crate::staging::StagingConfig;

/// Kernel facilities to do without, so that the substitutes which older
/// kernels and lesser privileges need are exercised on any machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disable {
    /// UFFDIO_MOVE (Linux 6.8).
    pub move_pages: bool,
    /// PAGEMAP_SCAN (Linux 6.7).
    pub pagemap_scan: bool,
    /// PROCMAP_QUERY (Linux 6.11).
    pub procmap_query: bool,
    /// Fork events (need CAP_SYS_PTRACE).
    pub fork_events: bool,
    /// Write protection (Linux 5.7).
    pub write_protect: bool,
    /// Faults of the kernel itself (need CAP_SYS_PTRACE,
    /// vm.unprivileged_userfaultfd or access to /dev/userfaultfd).
    pub privileged: bool,
}

/// How to open a [`crate::LinuxSpace`].
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenConfig {
    /// Sizes of the staging arenas.
    pub staging: StagingConfig,
    /// What to do without.
    pub disable: Disable,
}

/// Why the address space could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The kernel gives no userfaultfd.
    #[error(
        "userfaultfd is not available (error {errno}): the kernel needs CONFIG_USERFAULTFD, and a \
         container's seccomp profile must allow userfaultfd(2)"
    )]
    Userfaultfd {
        /// The kernel's error number.
        errno: i32,
    },
    /// The kernel's userfaultfd reports no changes of mappings.
    #[error(
        "this kernel's userfaultfd does not report mremap, madvise and munmap; use Linux 5.7 or later"
    )]
    Features,
    /// No address space for staging memory.
    #[error(
        "cannot reserve address space for staging memory (error {errno}): raise `ulimit -v`, or \
         ask for less staging memory"
    )]
    Staging {
        /// The kernel's error number.
        errno: i32,
    },
    /// Staging memory could not be registered.
    #[error("cannot register staging memory: {0}")]
    Register(RegisterError),
    /// A file that describes the process cannot be opened.
    #[error("cannot open {file} (error {errno}); mount /proc, and raise `ulimit -n` if it is 24")]
    Proc {
        /// Which file.
        file: &'static str,
        /// The kernel's error number.
        errno: i32,
    },
    /// No descriptor to wait with.
    #[error("cannot make a descriptor to wait for events with (error {errno}); raise `ulimit -n`")]
    Descriptor {
        /// The kernel's error number.
        errno: i32,
    },
}

/// What ended a [`crate::LinuxSpace::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// Something may be there to read: call `read_event`.
    Events,
    /// [`crate::LinuxSpace::interrupt`] was called, and nothing else has happened.
    Interrupted,
    /// Nothing has happened in the given time.
    TimedOut,
}

/// What an address space has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages read from the kernel.
    pub messages: u64,
    /// Times that a fork had to wait because the process was out of descriptors.
    pub forks_deferred: u64,
    /// Huge staging slots that got small pages for want of contiguous memory.
    pub thp_provision_failed: u64,
    /// Forked children that are served now.
    pub children: u64,
}
