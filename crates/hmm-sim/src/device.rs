//! A simulated device.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hmm_hal::{Device, DeviceError, DeviceInfo, Fence, Transfer};
use hmm_sync::{Mutex, MutexGuard, Rank};
use hmm_types::{
    Access, ByteCount, FrameId, FrameRange, PAGE_SIZE, PageCount, PageRange, VirtAddr,
};

use crate::calls::Touch;
use crate::config::{Rates, SimConfig};
use crate::frames::Frames;
use crate::hook::HookPoint;
use crate::memory::take_range;
use crate::page::{Payload, SIM_PAGE_BYTES, ZEROS};
use crate::rng::SimRng;
use crate::space::SimSpace;

/// Reading a frame fails at most so often until it is freed.
const MAX_MISREADS: u32 = 2;

#[derive(Clone, Copy, Debug)]
enum Target {
    Frame(FrameId),
    Host(VirtAddr),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    target: Target,
    access: Access,
}

#[derive(Debug)]
struct Job {
    fence: Fence,
    depth: u32,
    transfers: Vec<Transfer>,
}

/// How an access of a kernel went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// It happened.
    Done,
    /// The device asks the engine.
    Faults,
    /// In place: the device waits like a thread of the program.
    Stopped,
    /// In place: the data is lost.
    Poisoned,
}

/// What a device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Pages copied into frames.
    pub to_device: PageCount,
    /// Pages copied out of frames.
    pub to_host: PageCount,
    /// Frames cleared.
    pub zeroed: PageCount,
    /// Accesses of kernels that went to frames.
    pub frame_accesses: u64,
    /// Accesses of kernels that went to host memory.
    pub host_accesses: u64,
}

#[derive(Debug)]
struct DeviceState {
    rng: SimRng,
    rates: Rates,
    frames: Frames,
    table: BTreeMap<VirtAddr, Entry>,
    queue: VecDeque<Job>,
    next_fence: u64,
    /// Failed submissions that nobody has been told of, with the depth of
    /// nesting at which they were made: whoever waits at that depth made them.
    failed: Vec<(Fence, u32)>,
    lost: bool,
    /// How often reading a frame has failed since it was allocated.
    misread: BTreeMap<FrameId, u32>,
    counters: DeviceCounters,
}

/// A device with memory, a page table, a copy queue and kernels. Copies are
/// the same device.
#[derive(Clone, Debug)]
pub struct SimDevice {
    space: SimSpace,
    info: DeviceInfo,
    index: usize,
    host_view: bool,
    state: Arc<Mutex<DeviceState>>,
}

impl SimDevice {
    /// Device number `index` of a run.
    #[must_use]
    pub fn new(config: &SimConfig, index: usize, space: &SimSpace) -> Self {
        Self {
            space: space.clone(),
            index,
            host_view: config.host_view,
            info: DeviceInfo {
                reads_program: false,
                unwatched_memory: true,
                name: "simulated",
                memory: ByteCount::new(u64::from(config.frames) * PAGE_SIZE),
                coherent: config.coherent && index + 1 == config.devices,
                atomics: true,
                system_memory: true,
            },
            state: Arc::new(Mutex::new(
                Rank::Device,
                DeviceState {
                    rng: SimRng::new(config.seed, 16 + index as u64),
                    rates: config.rates,
                    frames: Frames::new(config.frames),
                    table: BTreeMap::new(),
                    queue: VecDeque::new(),
                    next_fence: 1,
                    failed: Vec::new(),
                    lost: false,
                    misread: BTreeMap::new(),
                    counters: DeviceCounters::default(),
                },
            )),
        }
    }

    fn state(&self) -> MutexGuard<'_, DeviceState> {
        self.state.lock()
    }

    /// One access of a kernel; `edit` sees the page's bytes. False when it did
    /// not happen.
    pub fn touch(
        &self,
        address: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> bool {
        self.attempt(address, access, edit) == Attempt::Done
    }

    pub(crate) fn attempt(
        &self,
        address: VirtAddr,
        access: Access,
        edit: &mut dyn FnMut(&mut Payload),
    ) -> Attempt {
        let mut state = self.state();
        if state.lost {
            return Attempt::Faults;
        }
        let Some(&entry) = state.table.get(&address.page_floor()) else {
            return Attempt::Faults;
        };
        if access == Access::Write && entry.access == Access::Read {
            return Attempt::Faults;
        }
        match entry.target {
            Target::Frame(frame) => {
                state.counters.frame_accesses += 1;
                edit(state.frames.data(frame));
                Attempt::Done
            }
            Target::Host(page) => {
                state.counters.host_accesses += 1;
                match self.space.touch_in_place(self.index, page, access, edit) {
                    Touch::Done => Attempt::Done,
                    Touch::Stopped => Attempt::Stopped,
                    Touch::Segv => Attempt::Faults,
                    Touch::Sigbus => Attempt::Poisoned,
                }
            }
        }
    }

    /// The device is lost from now on.
    pub fn lose(&self) {
        self.state().lost = true;
    }

    /// Whether it is lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.state().lost
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> DeviceCounters {
        self.state().counters
    }

    /// Nothing goes wrong any more by chance.
    pub(crate) fn calm(&self) {
        self.state().rates = Rates::default();
    }

    /// Forgets everything: the run is over, but somebody may keep a handle.
    pub(crate) fn dismantle(&self) {
        let mut state = self.state();
        state.table.clear();
        state.frames = Frames::new(0);
        state.queue.clear();
    }

    /// Checks that the engine has given everything back.
    ///
    /// # Errors
    /// What is left over.
    pub fn check_empty(&self) -> Result<(), String> {
        let state = self.state();
        let used = state.frames.used();
        if !used.is_empty() {
            return Err(format!("the device still has {used:?}"));
        }
        let mapped: Vec<_> = state.table.iter().collect();
        if !mapped.is_empty() {
            return Err(format!("the device still maps {mapped:?}"));
        }
        Ok(())
    }

    fn map_pages(
        &self,
        range: PageRange,
        access: Access,
        target: impl Fn(u64) -> Target,
    ) -> Result<(), DeviceError> {
        let mut state = self.state();
        for (index, page) in (0..).zip(range.iter_pages()) {
            // The new one first: it may be the frame that is mapped already.
            let target = target(index);
            if let Target::Frame(frame) = target {
                state.frames.count_mapping(frame, true);
            }
            let old = state.table.insert(page, Entry { target, access });
            state.forget_entry(old);
        }
        let once_in = state.rates.map_fails;
        let failed = state.rng.one_in(once_in);
        if failed || state.lost {
            state.unmap(range);
            return Err(if failed {
                DeviceError::OutOfMemory
            } else {
                DeviceError::Lost
            });
        }
        Ok(())
    }
}

impl DeviceState {
    fn forget_entry(&mut self, old: Option<Entry>) {
        if let Some(Entry {
            target: Target::Frame(frame),
            ..
        }) = old
        {
            self.frames.count_mapping(frame, false);
        }
    }

    fn unmap(&mut self, range: PageRange) {
        for (_, entry) in take_range(&mut self.table, range) {
            self.forget_entry(Some(entry));
        }
    }

    /// Runs the jobs up to a fence.
    fn run(&mut self, space: &SimSpace, fence: Fence) {
        while self.queue.front().is_some_and(|job| job.fence <= fence) {
            let Some(job) = self.queue.pop_front() else {
                return;
            };
            let mut ok = true;
            for &transfer in &job.transfers {
                let once_in = self.rates.copy_fails;
                let scrambled = self.rng.one_in(once_in) && self.may_fail(transfer);
                ok &= self.transfer(space, transfer, scrambled);
            }
            if !ok {
                self.note_misreads(&job.transfers);
                self.failed.push((job.fence, job.depth));
            }
        }
    }

    /// Reading a frame fails a few times, but not for ever: else data would be
    /// lost, and nobody to blame.
    fn may_fail(&self, transfer: Transfer) -> bool {
        let Transfer::ToHost { frames, .. } = transfer else {
            return true;
        };
        frames.iter().all(|frame| {
            self.misread
                .get(&frame)
                .is_none_or(|&times| times < MAX_MISREADS)
        })
    }

    fn note_misreads(&mut self, transfers: &[Transfer]) {
        for transfer in transfers {
            if let Transfer::ToHost { frames, .. } = transfer {
                for frame in frames.iter() {
                    *self.misread.entry(frame).or_default() += 1;
                }
            }
        }
    }

    fn transfer(&mut self, space: &SimSpace, transfer: Transfer, scrambled: bool) -> bool {
        let garbage = [0xdd; SIM_PAGE_BYTES];
        let mut ok = !scrambled;
        match transfer {
            Transfer::FromProgram { .. } => unreachable!("the simulated device does not say so"),
            Transfer::ToDevice { host, frames } => {
                for (index, frame) in (0..).zip(frames.iter()) {
                    let data = space.host_read(host.plus_pages(index));
                    ok &= data.is_some();
                    *self.frames.data(frame) = data.filter(|_| !scrambled).unwrap_or(garbage);
                }
                self.counters.to_device += frames.pages();
            }
            Transfer::ToHost { frames, host } => {
                for (index, frame) in (0..).zip(frames.iter()) {
                    let data = if scrambled {
                        garbage
                    } else {
                        *self.frames.data(frame)
                    };
                    ok &= space.host_write(host.plus_pages(index), data);
                }
                self.counters.to_host += frames.pages();
            }
            Transfer::Zero { frames } => {
                for frame in frames.iter() {
                    *self.frames.data(frame) = if scrambled { garbage } else { ZEROS };
                }
                self.counters.zeroed += frames.pages();
            }
        }
        ok
    }
}

impl Device for SimDevice {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn allocate(&self, pages: PageCount) -> Result<FrameRange, DeviceError> {
        assert!(pages > PageCount::ZERO, "no frames asked for");
        let mut guard = self.state();
        let state = &mut *guard;
        if state.lost {
            return Err(DeviceError::Lost);
        }
        if state.rng.one_in(state.rates.device_full) {
            return Err(DeviceError::OutOfMemory);
        }
        state
            .frames
            .allocate(&mut state.rng, pages)
            .ok_or(DeviceError::OutOfMemory)
    }

    fn free(&self, frames: FrameRange) {
        let mut state = self.state();
        for job in &state.queue {
            for transfer in &job.transfers {
                let (Transfer::FromProgram { frames: used, .. }
                | Transfer::ToDevice { frames: used, .. }
                | Transfer::ToHost { frames: used, .. }
                | Transfer::Zero { frames: used }) = *transfer;
                assert!(
                    frames
                        .iter()
                        .all(|frame| used.iter().all(|other| other != frame)),
                    "{frames:?} are freed while {transfer:?} is under way"
                );
            }
        }
        state.frames.free(frames);
        for frame in frames.iter() {
            state.misread.remove(&frame);
        }
    }

    fn free_pages(&self) -> PageCount {
        self.state().frames.free_pages()
    }

    fn map(&self, range: PageRange, frames: FrameRange, access: Access) -> Result<(), DeviceError> {
        assert!(
            range.pages() == frames.pages(),
            "{range} is mapped to {frames:?}"
        );
        self.map_pages(range, access, |index| {
            Target::Frame(frames.frame(u32::try_from(index).unwrap_or(u32::MAX)))
        })
    }

    fn map_host(
        &self,
        range: PageRange,
        host: VirtAddr,
        access: Access,
    ) -> Result<(), DeviceError> {
        assert!(
            host == range.start() || SimSpace::is_engine_memory(host),
            "{range} is mapped to foreign host memory {host}"
        );
        self.map_pages(range, access, |index| Target::Host(host.plus_pages(index)))
    }

    fn unmap(&self, range: PageRange) {
        self.state().unmap(range);
    }

    fn with_host_view(&self, frames: FrameRange, read: &mut dyn FnMut(VirtAddr)) -> bool {
        let mut state = self.state();
        state.frames.check_used(frames);
        if !self.host_view || state.lost || state.rng.one_in(4) {
            return false;
        }
        let view = SimSpace::view(self.index);
        for (index, frame) in (0..).zip(frames.iter()) {
            assert!(
                !state.frames.is_mapped(frame),
                "the engine reads {frame:?} while the device may write there"
            );
            let data = *state.frames.data(frame);
            let shown = self.space.host_write(view.plus_pages(index), data);
            assert!(shown, "simulator: a view of a device is engine memory");
        }
        state.counters.to_host += frames.pages();
        drop(state);
        read(view);
        true
    }

    fn submit(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        self.space.shared.hook.call(HookPoint::Submit);
        let mut state = self.state();
        for transfer in transfers {
            let (Transfer::FromProgram { frames, .. }
            | Transfer::ToDevice { frames, .. }
            | Transfer::ToHost { frames, .. }
            | Transfer::Zero { frames }) = *transfer;
            state.frames.check_used(frames);
        }
        if state.lost {
            return Err(DeviceError::Lost);
        }
        let once_in = state.rates.submit_fails;
        if state.rng.one_in(once_in) && transfers.iter().all(|&it| state.may_fail(it)) {
            state.note_misreads(transfers);
            return Err(DeviceError::CopyFailed);
        }
        let fence = Fence(state.next_fence);
        state.next_fence += 1;
        state.queue.push_back(Job {
            fence,
            depth: self.space.depth(),
            transfers: transfers.to_vec(),
        });
        if state.rng.one_in(2) {
            state.run(&self.space, fence);
        }
        Ok(fence)
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        self.space.shared.hook.call(HookPoint::Wait);
        let depth = self.space.depth();
        let (failed, lost) = {
            let mut state = self.state();
            state.run(&self.space, fence);
            let before = state.failed.len();
            state.failed.retain(|&(at, by)| at > fence || by != depth);
            (state.failed.len() != before, state.lost)
        };
        self.space.shared.hook.call(HookPoint::Wait);
        if lost {
            Err(DeviceError::Lost)
        } else if failed {
            Err(DeviceError::CopyFailed)
        } else {
            Ok(())
        }
    }
}
