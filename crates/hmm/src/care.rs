//! The bodies of the engine's threads.
//!
//! | thread | how many | does |
//! |---|---|---|
//! | `hmm-handler-N` | one a processor, 2 to 4 | reads events, serves CPU faults |
//! | `hmm-worker-N` | 2 | requests; in between what can wait: children, staging |
//! | `hmm-watch` | 1 | ends the process when a handler hangs |

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hmm_core::Executor;
use hmm_mem::Pages;
use hmm_os::Wakeup;
use hmm_types::PageCount;

use crate::host::Host;
use crate::jobs::{Outcome, Request};

/// How long a handler sleeps without events while changes of mappings may still be
/// under way. Otherwise it does not look again by itself: a timer costs each fault a
/// few hundredths of its time.
const UNSETTLED_NAP_MS: u32 = 1;
/// How long one sleeps that is not on duty.
const HANDLER_REST: Duration = Duration::from_secs(1);
/// How long a worker sleeps without requests before it looks around.
const WORKER_NAP: Duration = Duration::from_millis(500);
/// Pages given to children between two requests.
const DRAIN_PAGES: u64 = 4096;
/// Small staging pages that workers keep ready.
const READY_PAGES: PageCount = PageCount::new(1024);
/// How often the watch looks, and how many looks without progress it allows a
/// handler that is at work: half a minute.
const WATCH_NAP: Duration = Duration::from_secs(1);
const WATCH_PATIENCE: u32 = 30;

/// What a handler tells the watch: odd while it is at work.
#[derive(Debug)]
pub(crate) struct Heartbeat(AtomicU64);

impl Heartbeat {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn begin(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    /// Another fault is served, but there are more.
    fn go_on(&self) {
        self.0.fetch_add(2, Ordering::Release);
    }

    fn end(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// An executor's bounce memory, or `None` when the arena is full.
pub(crate) fn bounce() -> Option<Pages> {
    Pages::new(PageCount::new(hmm_core::BOUNCE_PAGES))
}

/// Body of a handler thread.
pub(crate) fn handle(host: &'static Host, bounce: &Pages, number: usize) {
    let heartbeat = &host.heartbeats[number];
    let mut executor = Executor::handler(bounce.range().start()).relieved_by(host);
    loop {
        // Reading ahead may have meant to read faults, which nobody else can serve.
        let has_work = || executor.has_faults() || host.engine.is_ahead_planned();
        while !(host.rota.is_on_duty(number)
            || has_work()
            || host.space.needs_another()
            || host.is_stopping())
        {
            host.rota.rest(number, HANDLER_REST);
        }
        if !has_work() {
            let wakeup = if host.engine.is_unsettled() {
                host.space.wait(Some(UNSETTLED_NAP_MS))
            } else if host.rota.is_alone(number) {
                host.space.wait_for_own()
            } else {
                host.space.wait(None)
            };
            if wakeup == Wakeup::Interrupted {
                return;
            }
        }
        heartbeat.begin();
        executor.set_alone(host.rota.is_alone(number));
        host.engine.pump(&mut executor);
        while let Some(thread) = host.engine.serve(&mut executor) {
            heartbeat.go_on();
            host.rota.served(number, thread, &host.handler_cpus);
        }
        host.engine.read_ahead(&mut executor);
        heartbeat.end();
        if host.engine.owes_children() {
            host.jobs.nudge();
        }
    }
}

/// Body of a worker thread.
pub(crate) fn work(host: &'static Host, bounce: &Pages) {
    let mut executor = Executor::worker(bounce.range().start());
    loop {
        let nap = if host.engine.owes_children() {
            Duration::ZERO
        } else {
            WORKER_NAP
        };
        match host.jobs.next(nap) {
            Some((number, request)) => {
                let outcome = carry_out(host, &mut executor, request);
                host.jobs.finish(number, outcome);
            }
            None if host.jobs.is_closed() => return,
            None => {
                host.engine.drain_children(&mut executor, DRAIN_PAGES);
                host.engine.trim_staging();
                if host.engine.capabilities().move_pages && host.has_devices() {
                    host.engine.provision_staging(READY_PAGES);
                }
            }
        }
    }
}

fn carry_out(host: &Host, executor: &mut Executor, request: Request) -> Outcome {
    match request {
        Request::Migrate {
            range,
            whole,
            since,
            to,
        } => {
            let engine = &host.engine;
            Outcome::Report(engine.migrate_part(executor, range, whole, since, to))
        }
        Request::Exclusive(range, device) => {
            Outcome::Report(host.engine.exclusive(executor, range, device))
        }
        Request::Snapshot(range) => Outcome::Entries(host.engine.snapshot(range)),
        Request::Check(range, access) => {
            Outcome::Checked(host.engine.permitted(range, access).map(drop))
        }
        Request::Vacate(device) => Outcome::Clean(host.engine.vacate_device(executor, device)),
        Request::RemoveDevice(device) => {
            Outcome::Clean(host.engine.remove_device(executor, device))
        }
        Request::ShutDown => Outcome::Clean(host.engine.shut_down(executor)),
    }
}

/// Body of the watch: a hung fault is worse than an end with a message.
///
/// It also has a handler look for work now and then. Nothing depends on that, and in
/// test builds it does not happen: what was forgotten hangs there, and is found.
/// Elsewhere that costs a second instead.
pub(crate) fn watch(host: &'static Host) {
    let mut seen = [(0u64, 0u32); 8];
    while !host.is_stopping() {
        host.nap(WATCH_NAP);
        if !cfg!(debug_assertions) {
            host.rota.call_all();
            host.space.nudge();
        }
        for (heartbeat, (last, looks)) in host.heartbeats.iter().zip(&mut seen) {
            let now = heartbeat.0.load(Ordering::Acquire);
            if now % 2 == 1 && now == *last {
                *looks += 1;
                host.rota.call_all();
                if *looks >= WATCH_PATIENCE {
                    hmm_os::die(
                        "a handler thread has served one fault for half a minute: a \
                         device or the kernel does not answer; the process ends now, as threads \
                         that wait for pages would hang for ever",
                    );
                }
            } else {
                (*last, *looks) = (now, 0);
            }
        }
    }
}
