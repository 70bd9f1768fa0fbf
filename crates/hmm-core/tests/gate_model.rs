//! The gate's protocol, model-checked: `RUSTFLAGS="--cfg hmm_shuttle"` swaps the
//! locks for shuttle's, which explores interleavings of the engine's own code.
//!
//! A tiny address space of a few pages stands for the kernel. One thread works
//! like a program (touches, unmaps, drops pages), one migrates to a device and
//! back, one is a device, one handles events. What must hold:
//! * when munmap has returned, the device maps nothing of the range;
//! * a touch reads what was last written, wherever the page has been;
//! * everything ends, and in the end no frame and no staging page is in use.
#![cfg(hmm_shuttle)]

use hmm_core::{Destination, Engine, Executor, Settings};
use hmm_hal::{
    AddressSpace, Capabilities, Clock, Device, DeviceError, DeviceInfo, Dropped, Event, FaultKind,
    Fence, Mapping, Presence, Progress, RegisterError, SpaceError, SpaceId, StagingLayout, Stop,
    Transfer,
};
use hmm_types::{
    Access, ByteCount, FrameId, FrameRange, MemoryKind, PageCount, PageRange, Permissions,
    StayReason, VirtAddr,
};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;

const BASE: u64 = 64 << 20;
const PAGES: u64 = 3;
const STAGING: u64 = 128 << 20;
const BOUNCE: u64 = 256 << 20;
const FRAMES: u32 = 4;
/// Looks after which a thread that waits is taken to hang.
const PATIENCE: u32 = 20_000;

/// Memory of the model: one number for each page that is present.
#[derive(Default)]
struct Tables {
    pages: std::collections::BTreeMap<u64, u64>,
    bounce: std::collections::BTreeMap<u64, u64>,
    mapped: bool,
    registered: bool,
    events: std::collections::VecDeque<Event>,
    unread_changes: u32,
    waiting: std::collections::BTreeSet<u64>,
}

#[derive(Clone)]
struct Space(Arc<Mutex<Tables>>);

fn app() -> PageRange {
    PageRange::from_pages(VirtAddr::new(BASE), PageCount::new(PAGES))
}

fn done(pages: u64, stop: Option<Stop>) -> Progress {
    Progress {
        done: PageCount::new(pages),
        stop,
    }
}

impl Space {
    fn change(&self, event: Event, apply: impl FnOnce(&mut Tables)) {
        {
            let mut tables = self.0.lock().unwrap();
            apply(&mut tables);
            tables.unread_changes += 1;
            tables.events.push_back(event);
        }
        // The thread goes on when its event was read.
        let mut looks = 0;
        while self.0.lock().unwrap().unread_changes > 0 {
            thread::yield_now();
            looks += 1;
            assert!(looks < PATIENCE, "an event is not read for ever");
        }
    }

    /// A CPU touch; `None` when nothing is mapped.
    fn touch(&self, page: u64, write: Option<u64>) -> Option<u64> {
        let address = BASE + page * 4096;
        loop {
            let mut tables = self.0.lock().unwrap();
            if !tables.mapped {
                return None;
            }
            if !tables.registered {
                tables.pages.entry(address).or_insert(0);
            }
            if let Some(value) = tables.pages.get_mut(&address) {
                if let Some(new) = write {
                    *value = new;
                }
                return Some(*value);
            }
            if tables.waiting.insert(address) {
                tables.events.push_back(Event::Fault {
                    space: SpaceId::OWN,
                    address: VirtAddr::new(address),
                    kind: FaultKind::Missing,
                    access: Access::Read,
                    thread: 1,
                });
            }
            drop(tables);
            let mut looks = 0;
            while self.0.lock().unwrap().waiting.contains(&address) {
                thread::yield_now();
                looks += 1;
                assert!(looks < PATIENCE, "a touch of page {page} waits for ever");
            }
        }
    }
}

impl AddressSpace for Space {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            move_pages: true,
            fork_events: true,
            kernel_faults: true,
            write_protect: true,
            tells_guards: true,
            poison: true,
        }
    }

    fn staging(&self) -> StagingLayout {
        StagingLayout {
            small: PageRange::from_pages(VirtAddr::new(STAGING), PageCount::new(512)),
            huge: None,
        }
    }

    fn mappings(&self, range: PageRange, visit: &mut dyn FnMut(Mapping)) -> Result<(), SpaceError> {
        if let Some(range) = range.intersection(app())
            && self.0.lock().unwrap().mapped
        {
            visit(Mapping {
                page_len: PageCount::ONE,
                huge_pages: false,
                shared_region: false,
                range,
                whole: app(),
                vma: app(),
                kind: MemoryKind::PrivateAnonymous,
                permissions: Permissions::READ_WRITE,
                engine_owned: false,
                thread_memory: false,
            });
        }
        Ok(())
    }

    fn presence(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<(), SpaceError> {
        let tables = self.0.lock().unwrap();
        for page in range.iter_pages() {
            let presence = if tables.pages.contains_key(&page.get()) {
                Presence::Present { huge: false }
            } else {
                Presence::Hole
            };
            visit(PageRange::from_pages(page, PageCount::ONE), presence);
        }
        Ok(())
    }

    fn explain_refusal(&self, _: PageRange) -> Option<StayReason> {
        None
    }

    fn register(&self, _: PageRange) -> Result<(), RegisterError> {
        let mut tables = self.0.lock().unwrap();
        if !tables.mapped {
            return Err(RegisterError::Unsuitable);
        }
        tables.registered = true;
        Ok(())
    }

    fn unregister(&self, _: PageRange) {
        self.0.lock().unwrap().registered = false;
    }

    fn registered(&self, range: PageRange, visit: &mut dyn FnMut(PageRange)) {
        visit(range);
    }

    fn move_pages(&self, from: PageRange, to: VirtAddr) -> Progress {
        let mut tables = self.0.lock().unwrap();
        if tables.unread_changes > 0 {
            return done(0, Some(Stop::Again));
        }
        for (index, page) in (0u64..).zip(from.iter_pages()) {
            let target = to.plus_pages(index).get();
            if tables.pages.contains_key(&target) {
                return done(index, Some(Stop::Exists));
            }
            if let Some(value) = tables.pages.remove(&page.get()) {
                tables.pages.insert(target, value);
            }
        }
        done(from.pages().get(), None)
    }

    fn copy_pages(&self, _: SpaceId, from: VirtAddr, to: PageRange) -> Progress {
        let mut tables = self.0.lock().unwrap();
        if tables.unread_changes > 0 {
            return done(0, Some(Stop::Again));
        }
        for (index, page) in (0u64..).zip(to.iter_pages()) {
            let source = from.plus_pages(index).get();
            let value = tables
                .bounce
                .get(&source)
                .or(tables.pages.get(&source))
                .copied();
            if tables.pages.contains_key(&page.get()) {
                return done(index, Some(Stop::Exists));
            }
            tables
                .pages
                .insert(page.get(), value.expect("bounce was filled"));
        }
        done(to.pages().get(), None)
    }

    fn zero_pages(&self, _: SpaceId, range: PageRange) -> Progress {
        let mut tables = self.0.lock().unwrap();
        if tables.unread_changes > 0 {
            return done(0, Some(Stop::Again));
        }
        if !tables.mapped {
            return done(0, Some(Stop::NotMapped));
        }
        for (index, page) in (0u64..).zip(range.iter_pages()) {
            if tables.pages.contains_key(&page.get()) {
                return done(index, Some(Stop::Exists));
            }
            tables.pages.insert(page.get(), 0);
        }
        done(range.pages().get(), None)
    }

    fn poison_pages(&self, _: SpaceId, _: PageRange) -> Progress {
        unreachable!("nothing is lost here")
    }

    fn wake(&self, _: SpaceId, range: PageRange) {
        let mut tables = self.0.lock().unwrap();
        for page in range.iter_pages() {
            tables.waiting.remove(&page.get());
        }
    }

    fn write_protect(&self, range: PageRange, _: bool) -> Progress {
        done(range.pages().get(), None)
    }

    fn allow_writes(&self, _: SpaceId, range: PageRange) -> Progress {
        done(range.pages().get(), None)
    }

    fn read_pages(&self, _: PageRange, _: VirtAddr) -> Progress {
        unreachable!("pages are moved here")
    }

    fn discard(&self, _: PageRange) -> Result<Dropped, SpaceError> {
        unreachable!("staging is never full here")
    }

    fn unshare(&self, _: PageRange) -> Result<(), SpaceError> {
        Ok(())
    }

    fn provision(&self, _: PageRange) -> bool {
        false
    }

    fn read_event(&self) -> Option<Event> {
        let mut tables = self.0.lock().unwrap();
        let event = tables.events.pop_front()?;
        if !matches!(event, Event::Fault { .. }) {
            tables.unread_changes -= 1;
        }
        Some(event)
    }

    fn await_change(&self, _: PageRange, _: PageRange) -> bool {
        unreachable!("nothing is remapped here")
    }

    fn is_quiet(&self) -> bool {
        self.0.lock().unwrap().unread_changes == 0
    }

    fn release(&self, _: SpaceId) {}

    fn relax(&self) {
        thread::yield_now();
    }
}

struct Gpu {
    space: Space,
    frames: Mutex<Vec<(bool, u64)>>,
    table: Mutex<std::collections::BTreeMap<u64, u32>>,
}

impl Gpu {
    fn maps_anything(&self) -> bool {
        !self.table.lock().unwrap().is_empty()
    }

    /// One load or store of a kernel: atomic with respect to unmapping.
    fn access(&self, page: u64, add: u64) -> Option<u64> {
        let table = self.table.lock().unwrap();
        let frame = *table.get(&(BASE + page * 4096))?;
        let mut frames = self.frames.lock().unwrap();
        let (used, value) = &mut frames[frame as usize];
        assert!(*used, "the device used a frame that was freed");
        *value += add;
        Some(*value)
    }
}

impl Device for Gpu {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            reads_program: false,
            unwatched_memory: false,
            name: "model",
            memory: ByteCount::new(u64::from(FRAMES) * 4096),
            coherent: false,
            atomics: true,
            system_memory: false,
        }
    }

    fn allocate(&self, _: PageCount) -> Result<FrameRange, DeviceError> {
        let mut frames = self.frames.lock().unwrap();
        let free = frames
            .iter()
            .position(|frame| !frame.0)
            .ok_or(DeviceError::OutOfMemory)?;
        frames[free].0 = true;
        Ok(FrameRange::new(FrameId::new(free as u32), 1))
    }

    fn free(&self, range: FrameRange) {
        let mut frames = self.frames.lock().unwrap();
        for frame in range.iter() {
            assert!(frames[frame.index()].0, "a frame was freed twice");
            frames[frame.index()] = (false, u64::MAX / 2);
        }
    }

    fn free_pages(&self) -> PageCount {
        PageCount::from(
            self.frames
                .lock()
                .unwrap()
                .iter()
                .filter(|frame| !frame.0)
                .count(),
        )
    }

    fn map(&self, range: PageRange, frames: FrameRange, _: Access) -> Result<(), DeviceError> {
        let mut table = self.table.lock().unwrap();
        for (page, frame) in range.iter_pages().zip(frames.iter()) {
            table.insert(page.get(), frame.get());
        }
        Ok(())
    }

    fn map_host(&self, _: PageRange, _: VirtAddr, _: Access) -> Result<(), DeviceError> {
        unreachable!("nothing is used in place here")
    }

    fn unmap(&self, range: PageRange) {
        let mut table = self.table.lock().unwrap();
        for page in range.iter_pages() {
            table.remove(&page.get());
        }
    }

    fn submit(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        let mut frames = self.frames.lock().unwrap();
        let mut tables = self.space.0.lock().unwrap();
        for transfer in transfers {
            match *transfer {
                Transfer::FromProgram { .. } => unreachable!("this device cannot"),
                Transfer::ToDevice { host, frames: to } => {
                    for (index, frame) in (0u64..).zip(to.iter()) {
                        frames[frame.index()].1 = tables.pages[&host.plus_pages(index).get()];
                    }
                }
                Transfer::ToHost { frames: from, host } => {
                    for (index, frame) in (0u64..).zip(from.iter()) {
                        let value = frames[frame.index()].1;
                        let at = host.plus_pages(index).get();
                        if at >= BOUNCE {
                            tables.bounce.insert(at, value);
                        } else {
                            tables.pages.insert(at, value);
                        }
                    }
                }
                Transfer::Zero { frames: to } => {
                    for frame in to.iter() {
                        frames[frame.index()].1 = 0;
                    }
                }
            }
        }
        Ok(Fence(0))
    }

    fn wait(&self, _: Fence) -> Result<(), DeviceError> {
        thread::yield_now();
        Ok(())
    }
}

struct NoClock;

impl Clock for NoClock {
    fn now_ns(&self) -> u64 {
        0
    }
}

fn bounce(number: u64) -> VirtAddr {
    VirtAddr::new(BOUNCE + number * (1 << 20))
}

fn model() {
    let space = Space(Arc::new(Mutex::new(Tables {
        mapped: true,
        ..Tables::default()
    })));
    let space: &'static Space = Box::leak(Box::new(space));
    let gpu: &'static Gpu = Box::leak(Box::new(Gpu {
        space: space.clone(),
        frames: Mutex::new(vec![(false, 0); FRAMES as usize]),
        table: Mutex::new(std::collections::BTreeMap::new()),
    }));
    let settings = Settings {
        fault_granule: PageCount::new(1),
        device_granule: PageCount::new(1),
        readahead: false,
        ..Settings::default()
    };
    let engine: &'static Engine<'static> =
        Box::leak(Box::new(Engine::new(space, &NoClock, settings)));
    let id = engine.add_device(gpu).unwrap();
    let stop = Arc::new(shuttle::sync::atomic::AtomicBool::new(false));

    let handlers: Vec<_> = (0..2)
        .map(|number| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut executor = Executor::handler(bounce(number));
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    engine.pump(&mut executor);
                    while engine.serve(&mut executor).is_some() {}
                    engine.read_ahead(&mut executor);
                    thread::yield_now();
                }
            })
        })
        .collect();
    let migrator = thread::spawn(move || {
        let mut executor = Executor::worker(bounce(8));
        for round in 0..3 {
            let to = if round == 1 {
                Destination::System
            } else {
                Destination::Device(id)
            };
            let report = engine.migrate(&mut executor, app(), to);
            assert_eq!(report.total(), app().pages());
        }
    });
    let kernel = thread::spawn(move || {
        let mut added = 0;
        for step in 0..4 {
            // Page 0 belongs to the device in this model: nobody else writes it.
            added += u64::from(gpu.access(0, 1).is_some());
            let _ = gpu.access(step % PAGES, 0);
            thread::yield_now();
        }
        added
    });
    let program = thread::spawn(move || {
        for value in 1..3 {
            assert_eq!(space.touch(1, Some(value)), Some(value));
            assert_eq!(space.touch(1, None), Some(value), "a write was lost");
        }
        space.change(
            Event::Remove {
                space: SpaceId::OWN,
                range: app().slice(2, 1),
            },
            |tables| {
                tables.pages.remove(&(BASE + 2 * 4096));
            },
        );
        assert_eq!(space.touch(2, None), Some(0), "a dropped page came back");
        assert_eq!(space.touch(1, None), Some(2), "a write was lost");
    });
    program.join().unwrap();
    let added = kernel.join().unwrap();
    migrator.join().unwrap();
    assert_eq!(
        space.touch(0, None),
        Some(added),
        "the device's additions are not all there"
    );

    // munmap: when it returns, the device maps nothing of the range.
    let mut executor = Executor::worker(bounce(9));
    engine.migrate(&mut executor, app(), Destination::Device(id));
    space.change(
        Event::Unmap {
            space: SpaceId::OWN,
            range: app(),
        },
        |tables| {
            tables.mapped = false;
            tables.registered = false;
            for page in app().iter_pages() {
                tables.pages.remove(&page.get());
            }
        },
    );
    // Somebody may still hold the gate to apply it, but nobody else has it.
    engine.check();
    assert!(!gpu.maps_anything(), "the device maps what is unmapped");
    assert!(engine.shut_down(&mut executor));
    assert_eq!(
        engine.staging_held(),
        PageCount::ZERO,
        "staging pages leaked"
    );
    assert_eq!(gpu.free_pages().get(), u64::from(FRAMES), "frames leaked");
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    for handler in handlers {
        handler.join().unwrap();
    }
}

#[test]
fn no_interleaving_of_the_gate_loses_a_page() {
    let iterations = std::env::var("HMM_SHUTTLE_ITERATIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(30_000);
    shuttle::check_random(model, iterations);
}
