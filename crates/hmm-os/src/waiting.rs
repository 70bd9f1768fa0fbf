//! How handlers wait until something can be read, and how others end that.
//!
//! To wait for two descriptors costs each fault a few hundredths of its time. So
//! where several handlers share the work, one of them may wait for the process's own
//! userfaultfd and for nothing else ([`LinuxSpace::wait_for_own`]). It is *deaf*: it
//! hears of no nudge, no child and no peer. There is one at most, and only while
//! there are neither children nor peers; who comes then is for the others
//! ([`LinuxSpace::needs_another`]).

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::config::Wakeup;
use crate::space::LinuxSpace;

/// How long anybody waits without looking for children that have exited.
const CHILD_NAP_MS: u32 = 1000;

/// What those who wait and those who end that tell each other.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Somebody waits for the userfaultfd alone, or is about to.
    deaf: AtomicBool,
    /// Nobody may any more.
    ending: AtomicBool,
    interrupted: AtomicBool,
}

impl LinuxSpace {
    /// Waits until something can be read, for `timeout_ms` at most if one is
    /// given: a timer costs each fault some hundred nanoseconds. Where children
    /// are served, [`Wakeup::Events`] also says that one has exited, which the
    /// kernel does not tell. Takes no lock: any number of threads may wait, and
    /// all of them wake.
    pub fn wait(&self, timeout_ms: Option<u32>) -> Wakeup {
        let parts = self.parts();
        let mut set = [
            PollFd::new(&parts.uffd, PollFlags::IN),
            PollFd::new(parts.children.poll_descriptor(), PollFlags::IN),
        ];
        let timeout_ms =
            timeout_ms.or_else(|| (parts.children.count() > 0).then_some(CHILD_NAP_MS));
        let timeout = timeout_ms.map(|ms| Timespec {
            tv_sec: (ms / 1000).into(),
            tv_nsec: (i64::from(ms) % 1000) * 1_000_000,
        });
        match poll(&mut set, timeout.as_ref()) {
            Ok(0) | Err(_) => {
                if parts.children.any_gone() {
                    Wakeup::Events
                } else {
                    Wakeup::TimedOut
                }
            }
            Ok(_)
                if set[0].revents().is_empty()
                    && self.waiting.interrupted.load(Ordering::Acquire) =>
            {
                Wakeup::Interrupted
            }
            Ok(_) => {
                if !set[1].revents().is_empty() {
                    let nudge = parts.children.nudge_descriptor();
                    let _ = rustix::io::read(nudge, &mut [0u8; 8]);
                }
                Wakeup::Events
            }
        }
    }

    /// The same, but nothing except faults and events of this process ends it, so it
    /// is faster. For one thread of several: where that will not do, it is
    /// [`LinuxSpace::wait`]. Others must not all rest at a time at which
    /// [`LinuxSpace::needs_another`].
    pub fn wait_for_own(&self) -> Wakeup {
        let waiting = &self.waiting;
        // One at most, before it is looked who is there: whoever comes later finds it
        // deaf.
        let first = !waiting.deaf.swap(true, Ordering::SeqCst);
        let may = first && !waiting.ending.load(Ordering::SeqCst) && !self.serves_others();
        if may {
            let mut set = [PollFd::new(&self.parts().uffd, PollFlags::IN)];
            let _ = poll(&mut set, None);
        }
        if first {
            waiting.deaf.store(false, Ordering::SeqCst);
        }
        if may { Wakeup::Events } else { self.wait(None) }
    }

    /// Whether somebody waits for the userfaultfd alone while there are others to
    /// hear.
    pub fn needs_another(&self) -> bool {
        self.waiting.deaf.load(Ordering::SeqCst) && self.serves_others()
    }

    /// Whether there are children or, perhaps, peers.
    fn serves_others(&self) -> bool {
        let parts = self.parts();
        parts.children.count() > 0 || parts.regions.may_have_peers()
    }

    /// Ends one [`LinuxSpace::wait`], present or future, with
    /// [`Wakeup::Events`].
    pub fn nudge(&self) {
        let descriptor = self.parts().children.nudge_descriptor();
        let _ = rustix::io::write(descriptor, &1u64.to_ne_bytes());
    }

    /// Ends every present and future [`LinuxSpace::wait`], until
    /// [`LinuxSpace::resume`]. Those who wait must go on until they hear of it, and
    /// read what there is.
    pub fn interrupt(&self) {
        let parts = self.parts();
        self.waiting.ending.store(true, Ordering::SeqCst);
        // Who hears nothing else hears of a drop, and until that is read it waits here.
        while self.waiting.deaf.load(Ordering::SeqCst) {
            parts.bell.empty();
        }
        // Only now may readers leave.
        self.waiting.interrupted.store(true, Ordering::Release);
        let descriptor = parts.children.interrupt_descriptor();
        let _ = rustix::io::write(descriptor, &1u64.to_ne_bytes());
    }

    /// Lets [`LinuxSpace::wait`] wait again.
    pub fn resume(&self) {
        let descriptor = self.parts().children.interrupt_descriptor();
        let _ = rustix::io::read(descriptor, &mut [0u8; 8]);
        self.waiting.interrupted.store(false, Ordering::Release);
        self.waiting.ending.store(false, Ordering::SeqCst);
    }
}
