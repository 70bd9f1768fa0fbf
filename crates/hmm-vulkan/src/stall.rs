//! Stalling kernels: invocations that miss a page poll until it is there, and the log is
//! served while they do.
//!
//! The thread that serves may need a block that is locked by whoever unmaps and waits for
//! this very kernel. That is why unmapping looks at the control block itself
//! (`gate.rs`): it depends neither on this thread nor on the kernel's end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::chunks::Chunk;
use crate::gate::Manner;
use crate::launch::{Launch, runaway};
use crate::{KernelError, LaunchError};

/// How long to wait for the end at a time, when nothing was logged.
const POLL: Duration = Duration::from_micros(20);
impl Launch<'_> {
    pub(crate) fn stalled(&mut self) -> Result<(), LaunchError> {
        let device = self.device;
        device.gate().begin(Manner::Parks, || true);
        let chunk = Chunk::whole(self.groups);
        let (kernel, push, groups) = (self.kernel, self.push, self.groups);
        let started = device.begin_dispatch(&kernel, push, groups, chunk);
        let done = started.and_then(|value| {
            let done = self.serve_until_end(value);
            device.finish(value).and(done)
        });
        if !device.has_given_up() {
            device.gate().end();
        }
        device
            .control()
            .stop
            .store(u32::from(device.driver().is_closing()), Ordering::SeqCst);
        done?;
        // A page may have been logged again just before it came: with its wanted bit set,
        // no later kernel would log it.
        let late = self.read_log(false);
        self.misses = late;
        let control = device.control();
        let invocations = control.unfinished.load(Ordering::SeqCst);
        let torn = control.torn.load(Ordering::SeqCst);
        if invocations > 0 || torn > 0 {
            // They were told to stop, if the device is being closed.
            self.go_on()?;
            return Err(KernelError::GaveUp { invocations, torn }.into());
        }
        Ok(())
    }

    /// On an error the kernel is told to stop.
    fn serve_until_end(&mut self, value: u64) -> Result<(), LaunchError> {
        let device = self.device;
        let stop = || device.control().stop.store(1, Ordering::SeqCst);
        let limit = device.config().dispatch_limit;
        let mut progress = Instant::now();
        loop {
            let served = self.go_on().and_then(|()| self.serve_new());
            match served {
                Ok(true) => progress = Instant::now(),
                Ok(false) => {
                    if device.has_ended(value, POLL)? {
                        return Ok(());
                    }
                    if progress.elapsed() > limit {
                        stop();
                        return Err(runaway(limit));
                    }
                }
                Err(error) => {
                    stop();
                    return Err(error);
                }
            }
        }
    }

    /// Serves what has been logged since the last time; false when that is nothing.
    fn serve_new(&mut self) -> Result<bool, LaunchError> {
        let misses = self.read_log(true);
        for miss in &misses {
            self.fault(*miss)?;
        }
        let any = !misses.is_empty();
        self.misses = misses;
        Ok(any)
    }
}
