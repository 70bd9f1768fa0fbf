//! Stalling kernels: invocations that miss a page poll until it is there, and the log is
//! served while they do.
//!
//! The thread that serves may need a block that is locked by whoever unmaps and waits for
//! this very kernel. That is why unmapping looks at the control block itself
//! (`gate.rs`): it depends neither on this thread nor on the kernel's end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::chunks::Chunk;
use crate::config::LOG_ENTRIES;
use crate::launch::Launch;
use crate::rounds::parse;
use crate::{KernelError, LaunchError};

/// How long to wait for the end at a time, when nothing was logged.
const POLL: Duration = Duration::from_micros(20);
/// An entry that is counted is written by then, or is a zero: address 0, read.
const WRITTEN: Duration = Duration::from_millis(2);

impl Launch<'_> {
    pub(crate) fn stalled(&mut self) -> Result<(), LaunchError> {
        let device = self.device;
        for index in 0..LOG_ENTRIES {
            device.area().log(index).store(0, Ordering::Relaxed);
        }
        device.gate().begin(true, || true);
        let chunk = Chunk::whole(self.groups);
        let (kernel, push, groups) = (self.kernel, self.push, self.groups);
        let started = self.first_time(|| device.begin_dispatch(&kernel, push, groups, chunk));
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
        let control = device.control();
        let invocations = control.unfinished.load(Ordering::SeqCst);
        let torn = control.torn.load(Ordering::SeqCst);
        if invocations > 0 || torn > 0 {
            return Err(KernelError::GaveUp { invocations, torn }.into());
        }
        Ok(())
    }

    /// On an error the kernel is told to stop.
    fn serve_until_end(&mut self, value: u64) -> Result<(), LaunchError> {
        let device = self.device;
        let stop = || device.control().stop.store(1, Ordering::SeqCst);
        let limit = device.config().dispatch_limit;
        let mut next = 0;
        let mut progress = Instant::now();
        loop {
            let served = self.go_on().and_then(|()| self.serve_new(&mut next));
            match served {
                Ok(true) => progress = Instant::now(),
                Ok(false) => {
                    if device.has_ended(value, POLL)? {
                        return Ok(());
                    }
                    if progress.elapsed() > limit {
                        stop();
                        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                        return Err(KernelError::Runaway { limit_ms }.into());
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
    fn serve_new(&mut self, next: &mut u32) -> Result<bool, LaunchError> {
        let device = self.device;
        let count = device.control().log_count.load(Ordering::SeqCst);
        let end = count.min(LOG_ENTRIES);
        let any = *next < end;
        while *next < end {
            let slot = device.area().log(*next);
            let since = Instant::now();
            let mut entry = slot.load(Ordering::SeqCst);
            while entry == 0 && since.elapsed() < WRITTEN {
                std::hint::spin_loop();
                entry = slot.load(Ordering::SeqCst);
            }
            slot.store(0, Ordering::SeqCst);
            *next += 1;
            let (address, access) = parse(entry);
            device.table().clear_wanted(address, access);
            self.fault(address, access)?;
        }
        if *next == LOG_ENTRIES {
            // All entries have been read. What comes from now on begins anew; what found
            // no room in between asks again when it finds its bit clear.
            *next = 0;
            device.control().log_count.store(0, Ordering::SeqCst);
            if count > LOG_ENTRIES {
                self.report.log_overflows += 1;
            }
            device.table().clear_all_wanted(device.gate());
        }
        Ok(any)
    }
}
