//! What a device has to offer to be tested.

use std::fmt;

use hmm_device::Injector;
use hmm_hal::{Device, FaultHandler};
use hmm_types::{ByteCount, DeviceId, VirtAddr};

/// How a device is to be for a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Size of its memory.
    pub memory: ByteCount,
    /// Overwrite frames when they are freed.
    pub poison_freed: bool,
}

/// A kernel that each device can run. Addresses are the program's, of 8-byte words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Word `i` becomes `first + i`.
    Fill {
        /// The words.
        to: VirtAddr,
        /// How many.
        count: u64,
        /// What the first one becomes.
        first: u64,
    },
    /// One more in each word.
    Increment {
        /// The words.
        at: VirtAddr,
        /// How many.
        count: u64,
    },
    /// The words' sum is added to another word, atomically.
    Sum {
        /// The words.
        from: VirtAddr,
        /// How many.
        count: u64,
        /// The other one.
        into: VirtAddr,
    },
    /// Words to other words.
    Copy {
        /// From here.
        from: VirtAddr,
        /// To here.
        to: VirtAddr,
        /// How many.
        count: u64,
    },
    /// One more in word `value % bins` for each value, atomically.
    Histogram {
        /// The values.
        from: VirtAddr,
        /// How many.
        count: u64,
        /// The first bin.
        into: VirtAddr,
        /// How many bins.
        bins: u64,
    },
    /// Follows `chains` chains of pointers, each `hops` further, from the pointer with its
    /// number in a table, and writes where it comes to.
    Chase {
        /// The table of first nodes; a node's word is the next one's address.
        starts: VirtAddr,
        /// How many chains.
        chains: u64,
        /// How far.
        hops: u64,
        /// A word for each chain.
        into: VirtAddr,
    },
    /// Writes to the words of one page again and again after one look for it, for a few
    /// milliseconds at least.
    Hammer {
        /// The page.
        page: VirtAddr,
    },
}

/// Why an operation did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nothing is mapped there.
    NotMapped(VirtAddr),
    /// It may not be written to.
    ReadOnly(VirtAddr),
    /// The page did not settle.
    Stuck(VirtAddr),
    /// The device is lost.
    Lost,
    /// The device is closed, or the engine ends.
    Closed,
    /// Something else; the text says what.
    Other(String),
}

/// An opened device.
pub trait Subject: fmt::Debug + Sync + 'static {
    /// As the engine sees it.
    fn device(&self) -> &dyn Device;

    /// Says who resolves its faults.
    fn attach(&self, id: DeviceId, handler: &'static dyn FaultHandler);

    /// Failures to order.
    fn injector(&self) -> &Injector;

    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// [`Failure`], as the device's own errors say.
    fn run(&'static self, operation: Operation) -> Result<(), Failure>;

    /// Ends it.
    fn close(&self);
}
