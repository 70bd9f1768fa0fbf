//! Devices in an engine: their memory is no other device's business, their threads are
//! engine threads, and the engine resolves their faults.

use std::cell::RefCell;
use std::io;

use hmm_core::{Destination, Engine, Executor};
use hmm_device::{Embedder, Join};
use hmm_hal::{DeviceFaultError, FaultHandler, Reach, Resolution};
use hmm_mem::Pages;
use hmm_os::EngineThread;
use hmm_types::{Access, DeviceId, PageCount, PageRange, VirtAddr};

use crate::care;
use crate::host::Host;

/// Where a device lives.
#[derive(Debug)]
pub(crate) struct InEngine(pub(crate) &'static Host);

impl Embedder for InEngine {
    fn exclude(&self, range: PageRange) {
        self.0.threads.run_on_root(move || hmm_os::exclude(range));
    }

    /// On a thread of the device.
    fn exclude_guess(&self, range: PageRange) {
        /// Each waits for the end of a transition, 500 us at most.
        const TRIES: u32 = 200;
        hmm_os::exclude_guess(range);
        // What a driver maps while it works can have left already, as the neighbour of
        // something, or be leaving now. Where it cannot be let go it comes when it is
        // touched.
        let _ = Faults(self.0).with_executor(range.start(), |engine, executor| {
            for _ in 0..TRIES {
                if engine.unwatch_excluded(executor, range) {
                    break;
                }
                engine.wait_for_transition();
            }
            Ok(())
        });
    }

    fn objects_are_loaded(&self) {
        hmm_os::refresh_modules();
    }

    fn include(&self, range: PageRange) {
        self.0.threads.run_on_root(move || hmm_os::include(range));
    }

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>> {
        let thread = self.0.threads.spawn(&name, None, body)?;
        Ok(Box::new(Joining(thread)))
    }
}

struct Joining(EngineThread);

impl Join for Joining {
    fn join(self: Box<Self>) {
        self.0.join();
    }
}

/// The engine, as a device's threads see it.
#[derive(Debug)]
pub(crate) struct Faults(pub(crate) &'static Host);

thread_local! {
    /// What a device's thread needs to have its faults served.
    static EXECUTOR: RefCell<Option<(hmm_mem::Box<Executor>, Pages)>> = const { RefCell::new(None) };
}

impl Faults {
    /// Calls the engine with what this thread of a device needs for it.
    fn with_executor<R>(
        &self,
        address: VirtAddr,
        call: impl FnOnce(&Engine<'static>, &mut Executor) -> Result<R, DeviceFaultError>,
    ) -> Result<R, DeviceFaultError> {
        hmm_os::uncatching(|| {
            EXECUTOR.with_borrow_mut(|executor| {
                if executor.is_none() {
                    let Some(bounce) = care::bounce() else {
                        return Err(DeviceFaultError::Unreachable {
                            address,
                            reason: hmm_types::StayReason::NoSystemMemory,
                        });
                    };
                    let worker = Executor::worker(bounce.range().start());
                    *executor = Some((hmm_mem::boxed(worker), bounce));
                }
                match executor {
                    Some((executor, _)) => call(&self.0.engine, executor),
                    None => unreachable!("made above"),
                }
            })
        })
    }
}

impl FaultHandler for Faults {
    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        if let Ok(page) = PageRange::page_of(address) {
            hmm_os::claim(page);
        }
        self.with_executor(address, |engine, executor| {
            engine.device_fault(executor, device, address, access)
        })
    }

    fn prefetch(&self, device: DeviceId, range: PageRange) {
        // Without an executor nothing is brought, which is allowed.
        let _ = self.with_executor(range.start(), |engine, executor| {
            engine.migrate(executor, range, Destination::Device(device));
            Ok(())
        });
    }

    fn fault_range(
        &self,
        device: DeviceId,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, DeviceFaultError> {
        self.with_executor(range.start(), |engine, executor| {
            engine.fault_range(executor, device, range, access, reach)
        })
    }

    fn command_begins(&self, device: DeviceId) {
        self.0.engine.command_begins(device);
    }

    fn wait_for_progress(&self) {
        self.0.engine.wait_for_transition();
    }
}
