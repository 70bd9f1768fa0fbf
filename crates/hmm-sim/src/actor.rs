//! Those who act: threads of the program, of its children, and kernels of
//! devices. Each is a state machine, so that it can stop in the middle of an
//! operation while others go on.

use std::fmt;

use hmm_hal::SpaceId;
use hmm_types::{PageRange, VirtAddr};

use crate::program::Action;
use crate::queue::Ticket;

/// Who acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A CPU thread.
    Thread {
        /// Of which process.
        space: SpaceId,
        /// Its number, unique among all processes.
        number: u32,
    },
    /// A kernel on the device with this index.
    Device(usize),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Thread { space, number } if *space == SpaceId::OWN => {
                write!(f, "thread {number}")
            }
            Self::Thread { space, .. } => write!(f, "{space:?}"),
            Self::Device(index) => write!(f, "device {index}"),
        }
    }
}

/// What happens when a system call returns.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then {
    /// The change with this number is over.
    Settle(u64),
    /// Two changes are over.
    SettleBoth(u64, u64),
    /// The child runs.
    Fork(SpaceId),
}

/// What touching pages is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touching {
    /// They get pinned.
    Pin,
    /// They are locked already, and have to be there.
    Lock,
}

/// One part of a MADV_DONTNEED.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub range: PageRange,
    pub ticket: Option<Ticket>,
    pub change: u64,
}

/// What an actor is doing.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Task {
    /// Nothing.
    Idle,
    /// It is running further up the stack.
    Running,
    /// An access that has not succeeded yet.
    Access(VirtAddr, Action),
    /// A system call waits for its event to be read.
    Wait(Ticket, Then),
    /// MADV_DONTNEED: the part under way, and what is left.
    Discard(Option<Piece>, Option<PageRange>),
    /// Touches page after page.
    Touch(PageRange, u64, Touching),
    /// The process is gone.
    Gone,
}

/// One actor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Actor {
    pub kind: Kind,
    pub task: Task,
}
