//! Checked kernels: invocations that missed a page are run again when it is there.
//!
//! The grid is cut into short dispatches. Each is repeated until nothing is unfinished:
//! the misses that it logged are served in between, while nothing runs, so that the
//! engine may unmap whatever it wants meanwhile. Invocations that are done have set their
//! bit, and do nothing in a repetition. Where pages go as fast as they come, fewer
//! invocations run at a time (`held.rs`).

use std::sync::atomic::Ordering;
use std::time::Instant;

use hmm_types::VirtAddr;

use crate::chunks::{Chunk, Chunks};
use crate::config::DISPATCH_INVOCATIONS;
use crate::held::Held;
use crate::launch::{Launch, Tally};
use crate::log::Miss;
use crate::{KernelError, LaunchError};

/// How often in a row invocations may end early and log nothing. (A page can go between
/// a dispatch and its repetition; its log entry then comes with the next.)
const SILENT_LIMIT: u64 = 64;

/// What one look at the log came to.
struct Served {
    asked: bool,
    last: VirtAddr,
}

impl Launch<'_> {
    pub(crate) fn checked(&mut self) -> Result<(), LaunchError> {
        let invocations = self.kernel.invocations();
        let mut chunks = Chunks::new(self.groups, invocations, DISPATCH_INVOCATIONS);
        while let Some(chunk) = chunks.next() {
            self.device.area().clear_done(chunk.count() * invocations);
            let start = Instant::now();
            self.go_on()?;
            self.dispatch(chunk)?;
            chunks.took(chunk, start.elapsed());
            self.repeat(chunk)?;
        }
        Ok(())
    }

    /// Serves misses and dispatches again until all invocations have come to their end.
    fn repeat(&mut self, chunk: Chunk) -> Result<(), LaunchError> {
        // An invocation may fault once for each page that the device can hold; when the
        // engine has been asked twice as often, pages go as fast as they come.
        let frames = u64::from(self.device.frames());
        let most = 2 * frames + 1024;
        let invocations = chunk.count() * self.kernel.invocations();
        let mut held = Held::none();
        let (mut left, mut rounds, mut silent) = (u32::MAX, 0, 0);
        let counters = self.device.counters();
        let mut before = counters.pages_come();
        loop {
            let control = self.device.control();
            let unfinished = control.unfinished.load(Ordering::SeqCst);
            let torn = control.torn.load(Ordering::SeqCst);
            if unfinished == 0 && torn == 0 {
                if !held.release(self.device.area().done(invocations)) {
                    return Ok(());
                }
                (left, rounds, silent, before) = (u32::MAX, 0, 0, counters.pages_come());
                self.go_on()?;
                self.report.repeats += 1;
                self.dispatch(chunk)?;
                continue;
            }
            // Before anything else: when the device is being closed all are told to stop.
            self.go_on()?;
            if torn > 0 {
                let invocations = unfinished;
                return Err(KernelError::GaveUp { invocations, torn }.into());
            }
            if unfinished < left {
                (left, rounds, before) = (unfinished, 0, counters.pages_come());
            }
            let full = before + frames;
            let served = self.serve_log(full)?;
            rounds += 1;
            // The last pages took the place of the first, and nobody has ended by them.
            if counters.pages_come() > full
                && let Some(running) = held.halve(self.device.area().done(invocations), invocations)
            {
                (left, rounds, before) = (running, 0, counters.pages_come());
            }
            silent = if served.asked { 0 } else { silent + 1 };
            if silent > SILENT_LIMIT {
                let error = KernelError::Silent {
                    invocations: unfinished,
                    rounds: silent,
                };
                return Err(error.into());
            }
            if rounds > most {
                let address = served.last;
                return Err(KernelError::Thrash { address, rounds }.into());
            }
            self.report.repeats += 1;
            self.dispatch(chunk)?;
        }
    }

    /// Until so many pages have come to the device: more pages would only take the
    /// place of those that have just come. What is left is logged again.
    fn serve_log(&mut self, full: u64) -> Result<Served, LaunchError> {
        let misses = self.read_log(false);
        let served = Served {
            asked: !misses.is_empty(),
            last: misses.last().map_or(VirtAddr::new(0), |miss| miss.address),
        };
        // Imports are this thread's, as it is the driver's.
        if self.device.imports_memory() {
            for miss in &misses {
                self.fault(*miss)?;
                if self.device.counters().pages_come() > full {
                    break;
                }
            }
            self.misses = misses;
            return Ok(served);
        }
        let mut tally = Tally::new();
        let servers = self.device.servers();
        let (misses, done) = servers.serve(self.device, misses, full, &mut tally);
        self.misses = misses;
        self.count(tally);
        done?;
        Ok(served)
    }

    /// What kernels have missed since the last time; from now on it is logged anew.
    pub(crate) fn read_log(&mut self, runs: bool) -> hmm_mem::Vec<Miss> {
        let device = self.device;
        let mut misses = std::mem::replace(&mut self.misses, hmm_mem::vec());
        misses.clear();
        let complete = device.area().read_log(runs, &mut misses);
        for miss in &misses {
            device.table().clear_wanted(miss.address, miss.access);
        }
        if !complete {
            self.report.log_overflows += 1;
            device.table().clear_all_wanted(device.gate());
        }
        misses
    }
}
