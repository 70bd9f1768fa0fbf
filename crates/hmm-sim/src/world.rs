//! One run: everything that takes part, and whose turn it is.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use hmm_hal::{DeviceFaultError, Resolution, SpaceId};
use hmm_types::{PageCount, VirtAddr};

use crate::actor::{Actor, Kind, Task};
use crate::clock::SimClock;
use crate::config::SimConfig;
use crate::device::SimDevice;
use crate::engine::EngineUnderTest;
use crate::hook::HookPoint;
use crate::oracle::Oracle;
use crate::program::{Chooser, Op};
use crate::rng::SimRng;
use crate::space::SimSpace;

/// Actors that a hook lets run, at most.
const MAX_NESTED_STEPS: u64 = 3;
/// Turns until everybody must have finished.
const MAX_DRAIN_STEPS: u32 = 50_000;
/// The engine's invariants are checked every so many turns.
const CHECK_STEPS: u64 = 16;

/// What a run did; all from the seed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Turns taken.
    pub steps: u64,
    /// Operations started.
    pub ops: u64,
    /// Operations that ran inside of a call of the engine.
    pub nested_ops: u64,
    /// Accesses of CPUs that were compared.
    pub cpu_accesses: u64,
    /// Accesses of devices that were compared.
    pub device_accesses: u64,
    /// Times a CPU thread stopped at a page.
    pub stops: u64,
    /// Faults of devices that the engine answered.
    pub device_faults: u64,
    /// Of these, the answers that the page can neither move nor be used.
    pub unreachable: u64,
    /// Forks.
    pub forks: u64,
    /// Devices that were lost.
    pub losses: u64,
    /// Pages copied to devices.
    pub to_device: PageCount,
    /// Pages copied back.
    pub to_host: PageCount,
    /// Accesses of kernels to frames; the others went to system memory.
    pub frame_accesses: u64,
    /// What the engine has counted.
    pub engine: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Adds what another run did.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.ops += other.ops;
        self.nested_ops += other.nested_ops;
        self.cpu_accesses += other.cpu_accesses;
        self.device_accesses += other.device_accesses;
        self.stops += other.stops;
        self.device_faults += other.device_faults;
        self.unreachable += other.unreachable;
        self.forks += other.forks;
        self.losses += other.losses;
        self.to_device += other.to_device;
        self.to_host += other.to_host;
        self.frame_accesses += other.frame_accesses;
        for (name, count) in &other.engine {
            *self.engine.entry(name).or_default() += count;
        }
    }
}

/// A run that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The run's seed.
    pub seed: u64,
    /// What went wrong.
    pub message: String,
    /// What was started, in order.
    pub log: Vec<String>,
}

/// A pin, as the program sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pinned {
    pub pin: u64,
    pub page: VirtAddr,
    /// The program dropped the page itself.
    pub orphan: bool,
}

/// What changes as the run goes on. Never locked while the engine runs.
#[derive(Debug)]
pub(crate) struct Scene {
    pub rng: SimRng,
    pub oracle: Oracle,
    pub actors: Vec<Actor>,
    pub pins: Vec<Pinned>,
    pub report: Report,
    pub next_thread: u32,
    /// Goes up with every change of a mapping.
    pub epoch: u64,
    /// Nobody starts anything new.
    pub closing: bool,
    /// A fork that the kernel does not report is going on.
    pub fork_guard: bool,
    /// For each device the epoch in which its kernel began.
    pub begun: Vec<u64>,
    /// For each device what the engine last said about a fault of it.
    pub answers: Vec<Option<Result<Resolution, DeviceFaultError>>>,
    log: Vec<String>,
    failure: Option<String>,
}

impl Scene {
    pub(crate) fn fail(&mut self, message: String) {
        self.failure.get_or_insert(message);
    }

    pub(crate) fn log(&mut self, depth: u32, kind: Kind, what: &str) {
        let indent = "  ".repeat(depth as usize);
        let line = format!("{:6} {indent}{kind}: {what}", self.report.steps);
        self.log.push(line);
    }
}

#[derive(Debug)]
pub(crate) struct World<E> {
    pub config: SimConfig,
    pub space: SimSpace,
    pub devices: Vec<SimDevice>,
    clock: SimClock,
    engine: OnceLock<E>,
    scene: Mutex<Scene>,
}

/// Runs one seed.
///
/// # Errors
/// [`Failure`], when a process saw something that it must not see, somebody
/// waits for ever, or something panicked.
pub fn run<E: EngineUnderTest>(config: &SimConfig) -> Result<Report, Box<Failure>> {
    let world = Arc::new(World::<E>::new(config));
    let weak: Weak<World<E>> = Arc::downgrade(&world);
    world.space.set_hook(Some(Arc::new(move |point| {
        if let Some(world) = weak.upgrade() {
            world.on_hook(point);
        }
    })));
    let ran = catch_unwind(AssertUnwindSafe(|| world.play()));
    world.space.set_hook(None);
    let mut scene = world.scene();
    if let Err(panic) = &ran {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        scene.fail(format!("panic: {text}"));
    }
    let result = match scene.failure.take() {
        None => Ok(std::mem::take(&mut scene.report)),
        Some(message) => Err(Box::new(Failure {
            seed: config.seed,
            message,
            log: std::mem::take(&mut scene.log),
        })),
    };
    drop(scene);
    if ran.is_ok() {
        world.space.dismantle();
        world.devices.iter().for_each(SimDevice::dismantle);
    } else {
        // Its locks may be poisoned: do not run the engine's destructors.
        std::mem::forget(world);
    }
    result
}

impl<E: EngineUnderTest> World<E> {
    fn new(config: &SimConfig) -> Self {
        let space = SimSpace::new(config);
        let devices: Vec<_> = (0..config.devices)
            .map(|index| SimDevice::new(config, index, &space))
            .collect();
        let threads = (1..=config.threads).map(|number| Kind::Thread {
            space: SpaceId::OWN,
            number,
        });
        let kernels = (0..config.devices).map(Kind::Device);
        Self {
            config: *config,
            space,
            devices,
            clock: SimClock::default(),
            engine: OnceLock::new(),
            scene: Mutex::new(Scene {
                rng: SimRng::new(config.seed, 3),
                oracle: Oracle::default(),
                actors: threads
                    .chain(kernels)
                    .map(|kind| Actor {
                        kind,
                        task: Task::Idle,
                    })
                    .collect(),
                pins: Vec::new(),
                report: Report::default(),
                next_thread: config.threads + 1,
                epoch: 0,
                closing: false,
                fork_guard: false,
                begun: vec![0; config.devices],
                answers: vec![None; config.devices],
                log: Vec::new(),
                failure: None,
            }),
        }
    }

    pub(crate) fn scene(&self) -> MutexGuard<'_, Scene> {
        self.scene.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn engine(&self) -> &E {
        match self.engine.get() {
            Some(engine) => engine,
            None => unreachable!("simulator: there is no engine yet"),
        }
    }

    pub(crate) fn failed(&self) -> bool {
        self.scene().failure.is_some()
    }

    fn play(&self) {
        let engine = E::new(
            &self.config,
            self.space.clone(),
            self.devices.clone(),
            self.clock.clone(),
        );
        self.engine.get_or_init(|| engine);
        while !self.failed() && self.scene().report.ops < self.config.ops {
            self.step();
            if self.scene().report.steps.is_multiple_of(CHECK_STEPS) {
                self.engine().check();
            }
        }
        self.scene().closing = true;
        self.drain();
        if !self.failed() {
            self.finish();
        }
        let mut scene = self.scene();
        for device in &self.devices {
            let counters = device.counters();
            scene.report.to_device += counters.to_device;
            scene.report.to_host += counters.to_host;
            scene.report.frame_accesses += counters.frame_accesses;
        }
        scene.report.engine = self.engine().counters().into_iter().collect();
    }

    /// One turn: of the reader, of a worker, or of an actor.
    pub(crate) fn step(&self) {
        let turn = {
            let mut scene = self.scene();
            scene.report.steps += 1;
            self.clock.advance(1 + scene.rng.below(100_000));
            scene.rng.below(5)
        };
        match turn {
            0 => self.engine().read(),
            1 => {
                self.engine().work();
            }
            _ => self.act(false),
        }
    }

    /// An actor's turn; with `only_kernel` it does what needs no engine.
    fn act(&self, only_kernel: bool) {
        let depth = self.space.depth();
        let (index, kind, task, op) = {
            let mut guard = self.scene();
            let scene = &mut *guard;
            let index = scene.rng.index(scene.actors.len());
            let Actor { kind, task } = scene.actors[index];
            if only_kernel && matches!(kind, Kind::Device(_)) {
                return;
            }
            let op = match task {
                Task::Running | Task::Gone => return,
                Task::Idle if scene.closing || scene.report.ops >= self.config.ops => return,
                Task::Idle => {
                    let chooser = Chooser {
                        config: &self.config,
                        oracle: &scene.oracle,
                        kind,
                    };
                    let op = chooser.choose(&mut scene.rng);
                    if op == Op::Idle || only_kernel && op.needs_engine() {
                        return;
                    }
                    scene.report.ops += 1;
                    scene.report.nested_ops += u64::from(depth > 0);
                    scene.log(depth, kind, &format!("{op:?}"));
                    Some(op)
                }
                _ => None,
            };
            scene.actors[index].task = Task::Running;
            (index, kind, task, op)
        };
        let task = match op {
            Some(op) => self.start(kind, op),
            None => task,
        };
        let task = self.advance(kind, task);
        self.scene().actors[index].task = task;
    }

    /// The engine called down without a lock.
    fn on_hook(&self, point: HookPoint) {
        if self.engine.get().is_none() {
            return;
        }
        let depth = self.space.depth();
        if point.has_gate() {
            let steps = self.scene().rng.below(MAX_NESTED_STEPS);
            (0..steps).for_each(|_| self.act(true));
            return;
        }
        let steps = {
            let mut scene = self.scene();
            // Loops that wait run others only when they are not nested: else
            // one that hangs would take for ever to say so.
            let deepest = if point.needs_reader() {
                1
            } else {
                self.config.nesting
            };
            if scene.failure.is_some() || depth > deepest.min(self.config.nesting) {
                0
            } else if scene.rng.one_in(self.config.interleave) {
                1 + scene.rng.below(MAX_NESTED_STEPS)
            } else {
                0
            }
        };
        for _ in 0..steps {
            self.step();
        }
        if point.needs_reader() {
            self.engine().read();
        }
        if point == HookPoint::WaitForFault {
            self.engine().work();
        }
    }

    /// Lets everybody finish.
    pub(crate) fn drain(&self) {
        for _ in 0..MAX_DRAIN_STEPS {
            if self.failed() {
                return;
            }
            let quiet = self
                .scene()
                .actors
                .iter()
                .all(|actor| matches!(actor.task, Task::Idle | Task::Gone));
            if quiet && !self.engine().work() && !self.space.has_unread() {
                return;
            }
            self.step();
        }
        let waits = self.space.describe_waits();
        let mut scene = self.scene();
        let stuck: Vec<_> = scene
            .actors
            .iter()
            .filter(|actor| !matches!(actor.task, Task::Idle | Task::Gone))
            .map(|actor| format!("{}: {:?}", actor.kind, actor.task))
            .collect();
        let answers = format!("{:?}", scene.answers);
        scene.fail(format!(
            "somebody waits for ever: {stuck:?}; {waits}; faults of devices: {answers}"
        ));
    }
}
