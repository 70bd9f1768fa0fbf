//! The engine: `hmm-core`, driven as the threads of the library drive it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hmm_core::{Destination, Engine, Executor, MigrationReport};
use hmm_hal::{AddressSpace, DeviceFaultError, Resolution};
use hmm_types::{Access, DeviceId, PageCount, PageRange, VirtAddr};

use crate::clock::SimClock;
use crate::config::SimConfig;
use crate::device::SimDevice;
use crate::engine::{EngineUnderTest, Request};
use crate::space::SimSpace;

/// Pages that a handler hands to children in one turn.
const DRAIN_PAGES: u64 = 24;
/// Children get their turn once in so many turns of the handlers.
const DRAIN_ONCE_IN: u64 = 4;
/// Every so many turns, handlers take themselves for the only one.
const ALONE_ONCE_IN: u64 = 2;
/// Attempts to bring everything home, each of which may fail by chance.
const HOME_ATTEMPTS: u32 = 200;

/// What calls of one kind bring along. Calls nest, so there are several.
#[derive(Debug)]
struct Pool {
    free: Mutex<VecDeque<Executor>>,
    make: fn(VirtAddr) -> Executor,
}

impl Pool {
    fn new(make: fn(VirtAddr) -> Executor) -> Self {
        Self {
            free: Mutex::default(),
            make,
        }
    }

    fn free(&self) -> std::sync::MutexGuard<'_, VecDeque<Executor>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call with an executor that no other call uses.
    fn with<R>(&self, core: &CoreEngine, call: impl FnOnce(&mut Executor) -> R) -> R {
        let free = self.free().pop_front();
        let mut executor = free.unwrap_or_else(|| {
            let area = core.areas.fetch_add(1, Ordering::Relaxed);
            (self.make)(core.space.bounce(area).start())
        });
        let result = call(&mut executor);
        self.free().push_back(executor);
        result
    }
}

/// `hmm-core` as the engine under test.
///
/// The engine borrows its parts, so handles to them are leaked: a few hundred
/// bytes for each run. What the handles lead to is emptied after the run.
#[derive(Debug)]
pub struct CoreEngine {
    engine: Engine<'static>,
    space: SimSpace,
    handlers: Pool,
    workers: Pool,
    /// Bounce areas given out.
    areas: AtomicU64,
    turns: AtomicU64,
}

impl CoreEngine {
    fn check_report(range: PageRange, report: &MigrationReport) {
        assert!(
            report.total() == range.pages(),
            "a request for {range} reports {report:?}"
        );
    }

    /// Brings everything home, several times if need be: copies fail.
    fn everything_home(&self, attempt: impl Fn(&mut Executor) -> bool) -> bool {
        self.workers.with(self, |worker| {
            (0..HOME_ATTEMPTS).any(|_| {
                let done = attempt(worker);
                if !done {
                    self.space.relax();
                }
                done
            })
        })
    }
}

impl EngineUnderTest for CoreEngine {
    fn new(config: &SimConfig, space: SimSpace, devices: Vec<SimDevice>, clock: SimClock) -> Self {
        let engine = Engine::new(
            Box::leak(Box::new(space.clone())),
            Box::leak(Box::new(clock)),
            config.settings,
        );
        for (index, device) in devices.into_iter().enumerate() {
            let added = engine.add_device(Box::leak(Box::new(device)));
            assert!(
                added == Ok(DeviceId::new(index)),
                "device {index}: {added:?}"
            );
        }
        Self {
            engine,
            space,
            handlers: Pool::new(Executor::handler),
            workers: Pool::new(Executor::worker),
            areas: AtomicU64::new(0),
            turns: AtomicU64::new(0),
        }
    }

    fn read(&self) {
        self.handlers
            .with(self, |handler| self.engine.pump(handler));
    }

    fn work(&self) -> bool {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        let free = self.handlers.free().len();
        let mut served = 0;
        for _ in 0..free {
            self.handlers.with(self, |handler| {
                handler.set_alone(turn.is_multiple_of(ALONE_ONCE_IN));
                while self.engine.serve(handler).is_some() {
                    served += 1;
                }
            });
        }
        let mut ahead = false;
        if free > 0 {
            self.handlers
                .with(self, |handler| ahead = self.engine.read_ahead(handler));
        }
        let owes = self.engine.owes_children();
        if owes && turn.is_multiple_of(DRAIN_ONCE_IN) {
            self.handlers.with(self, |handler| {
                self.engine.drain_children(handler, DRAIN_PAGES)
            });
        }
        served > 0 || owes || ahead
    }

    fn command_begins(&self, device: DeviceId) {
        self.engine.command_begins(device);
    }

    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        self.workers.with(self, |worker| {
            self.engine.device_fault(worker, device, address, access)
        })
    }

    fn request(&self, request: Request) {
        let (range, report) = self.workers.with(self, |worker| match request {
            Request::Migrate(range, device) | Request::Prefetch(range, device) => {
                let to = Destination::Device(device);
                (range, self.engine.migrate(worker, range, to))
            }
            Request::Evict(range) => {
                let to = Destination::System;
                (range, self.engine.migrate(worker, range, to))
            }
            Request::Exclusive(range, device) => {
                (range, self.engine.exclusive(worker, range, device))
            }
        });
        Self::check_report(range, &report);
    }

    fn before_fork(&self) {
        self.engine.begin_shut_down();
        self.everything_home(|worker| self.engine.bring_all_home_before_fork(worker));
    }

    fn after_fork(&self) {
        self.engine.reopen();
    }

    fn check(&self) {
        self.engine.check();
    }

    fn shutdown(&self) -> bool {
        let clean = self.everything_home(|worker| self.engine.shut_down(worker));
        if clean {
            let held = self.engine.staging_held();
            assert!(held == PageCount::ZERO, "{held} of staging are still held");
        }
        clean
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let rows = self.engine.statistics().snapshot().rows();
        rows.into_iter()
            .map(|(name, count, _)| (name, count))
            .collect()
    }
}
