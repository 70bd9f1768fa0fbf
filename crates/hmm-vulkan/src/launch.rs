//! Launches.
//!
//! One at a time on a device, in the order in which they came, on the driver's thread.
//! What a variant does about pages that are missing is in `rounds.rs` (checked),
//! `stall.rs`, and here for kernels without checks.

use std::time::{Duration, Instant};

use hmm_hal::{FaultHandler, Resolution};
use hmm_types::{Access, DeviceId, PageRange, VirtAddr};

use crate::chunks::{Chunk, product};
use crate::device::VulkanDevice;
use crate::footprint::Footprint;
use crate::gate::Manner;
use crate::kernel::{Kernel, Loaded, Variant};
use crate::log::Miss;
use crate::stats::LaunchReport;
use crate::table::Survey;
use crate::{ImportFailure, KernelError, LaunchError};

/// For how long the engine may say "wait" for one access.
pub const RETRY_TIME: Duration = Duration::from_secs(10);
/// For how long a driver may compile a kernel.
const COMPILE_LIMIT: Duration = Duration::from_secs(120);
/// How often pages of a kernel without checks are asked for before it is given up.
const ROUNDS: u64 = 64;

/// A launch that has its turn.
pub(crate) struct Launch<'a> {
    pub(crate) device: &'static VulkanDevice,
    pub(crate) kernel: Loaded,
    /// The same for ranges whose frames are all at one distance from their pages.
    near: Near,
    pub(crate) groups: [u32; 3],
    pub(crate) push: &'a [u8],
    pub(crate) engine: (DeviceId, &'static dyn FaultHandler),
    pub(crate) report: LaunchReport,
    /// When its kernel began to run.
    begun: Instant,
    /// Room for what is read from the log.
    pub(crate) misses: hmm_mem::Vec<Miss>,
}

/// Kernels for ranges whose frames are all at one distance from their pages.
#[derive(Clone, Copy, Default)]
pub(crate) struct Near {
    pub(crate) by_distance: Option<Loaded>,
    /// The program as it was written: for frames that have the pages' addresses.
    pub(crate) as_it_is: Option<Loaded>,
}

impl Near {
    fn at(self, distance: u64) -> Option<Loaded> {
        self.as_it_is.filter(|_| distance == 0).or(self.by_distance)
    }
}

impl VulkanDevice {
    /// Runs a kernel over a grid of `groups` workgroups, and waits until that is done.
    ///
    /// `uses` names what a kernel of [`Variant::Table`] may touch: it is brought to the
    /// device first, and stays there until the kernel has ended. Kernels that check need
    /// none.
    ///
    /// # Errors
    /// [`LaunchError`]: the first failure ends the launch. Workgroups may have run, wholly
    /// or up to an access that did not happen.
    pub fn launch(
        &'static self,
        kernel: &Kernel,
        groups: [u32; 3],
        push_constants: &[u8],
        uses: &[(PageRange, Access)],
    ) -> Result<LaunchReport, LaunchError> {
        assert!(
            std::ptr::eq(kernel.device, self),
            "the kernel was loaded on another device"
        );
        self.launch_loaded(kernel.loaded, Near::default(), groups, push_constants, uses)
    }

    /// The same, with other kernels for ranges whose frames are all at one distance from
    /// their pages.
    pub(crate) fn launch_loaded(
        &'static self,
        kernel: Loaded,
        near: Near,
        groups: [u32; 3],
        push_constants: &[u8],
        uses: &[(PageRange, Access)],
    ) -> Result<LaunchReport, LaunchError> {
        self.check_launch(&kernel, groups, push_constants, uses)?;
        let &engine = self.engine().ok_or(LaunchError::NotAttached)?;
        // While the kernel runs, the driver's thread reads engine memory only.
        let mut push = hmm_mem::vec_with_capacity(push_constants.len());
        push.extend_from_slice(push_constants);
        let mut ranges = hmm_mem::vec_with_capacity(uses.len());
        ranges.extend_from_slice(uses);
        let done = self.driver().run(move || {
            let mut launch = Launch {
                device: self,
                kernel,
                near,
                groups,
                push: &push,
                engine,
                report: LaunchReport::default(),
                begun: Instant::now(),
                misses: hmm_mem::vec(),
            };
            launch.run(&ranges)
        });
        done.unwrap_or(Err(LaunchError::Closed))
    }

    fn check_launch(
        &self,
        kernel: &Loaded,
        groups: [u32; 3],
        push: &[u8],
        uses: &[(PageRange, Access)],
    ) -> Result<(), LaunchError> {
        let limit = |what, asked: u64, limit: u64| {
            let fits = asked <= limit;
            let error = LaunchError::Limit { what, asked, limit };
            if fits { Ok(()) } else { Err(error) }
        };
        let limits = &self.gpu().physical.limits;
        for (axis, &groups) in groups.iter().enumerate() {
            let most = limits.max_compute_work_group_count[axis];
            limit("a grid with a side", u64::from(groups), u64::from(most))?;
        }
        let bytes = u64::from(kernel.push_constant_bytes);
        if push.len() as u64 != bytes {
            return Err(LaunchError::Limit {
                what: "a number of bytes of push constants",
                asked: push.len() as u64,
                limit: bytes,
            });
        }
        if kernel.variant == Variant::Table && uses.is_empty() && product(groups) > 0 {
            return Err(LaunchError::NoRanges);
        }
        if self.driver().is_closing() {
            return Err(LaunchError::Closed);
        }
        Ok(())
    }
}

impl Launch<'_> {
    fn run(&mut self, uses: &[(PageRange, Access)]) -> Result<LaunchReport, LaunchError> {
        let device = self.device;
        self.go_on()?;
        if product(self.groups) == 0 {
            return Ok(self.report);
        }
        let start = Instant::now();
        self.engine.1.command_begins(self.engine.0);
        device.set_translation(self.kernel.variant);
        let compiled = self.compile();
        self.begun = Instant::now();
        let dispatches = device.counters().dispatches.get();
        let done = compiled.and_then(|()| match self.kernel.variant {
            Variant::Checked => self.checked(),
            Variant::Stall => self.stalled(),
            Variant::Table => self.resident(uses),
            Variant::Plain | Variant::Delta(_) | Variant::Masked { .. } => self.plain(),
        });
        // No longer than a launch: the next one sees what the program has there then.
        device.drop_imports();
        if done.is_err() {
            // What was logged and not served must not keep a later kernel from logging it.
            device.area().clear_log();
            device.table().clear_all_wanted(device.gate());
        }
        let counters = device.counters();
        counters.launches.add(1);
        counters.faults.add(self.report.faults);
        counters.retries.add(self.report.retries);
        counters.log_overflows.add(self.report.log_overflows);
        if matches!(done, Err(LaunchError::Lost)) {
            device.lose();
        }
        done?;
        self.report.dispatches = counters.dispatches.get() - dispatches;
        self.report.elapsed = start.elapsed();
        Ok(self.report)
    }

    /// Whether there is any sense in going on, and time for it.
    pub(crate) fn go_on(&self) -> Result<(), LaunchError> {
        go_on(self.device)?;
        match self.device.config().launch_limit {
            Some(limit) if self.begun.elapsed() > limit => Err(runaway(limit)),
            _ => Ok(()),
        }
    }

    /// A dispatch from its start to its end.
    pub(crate) fn dispatch(&self, chunk: Chunk) -> Result<(), LaunchError> {
        let device = self.device;
        let manner = match self.kernel.variant {
            Variant::Checked => Some(Manner::Returns),
            Variant::Stall => Some(Manner::Parks),
            Variant::Table => Some(Manner::Unchecked),
            Variant::Plain | Variant::Delta(_) | Variant::Masked { .. } => None,
        };
        if let Some(manner) = manner {
            device.gate().begin(manner, || true);
        }
        let done = device
            .begin_dispatch(&self.kernel, self.push, self.groups, chunk)
            .and_then(|value| device.finish(value));
        // One that has not ended keeps the gate: what unmaps must not go on.
        if manner.is_some() && !device.has_given_up() {
            device.gate().end();
        }
        done
    }

    /// Has the driver compile the kernels, where it does so at their first dispatch:
    /// that is one of nothing. What it maps for them is excluded while nobody waits for a
    /// dispatch's end; code that migrates under a kernel would keep that from ending.
    fn compile(&self) -> Result<(), LaunchError> {
        let device = self.device;
        let Near {
            by_distance,
            as_it_is,
        } = self.near;
        let all = [Some(self.kernel), by_distance, as_it_is];
        for kernel in all.into_iter().flatten() {
            if device.is_first_dispatch(kernel.pipeline) {
                let before = Footprint::now();
                let nothing = Chunk::whole([0; 3]);
                let done = device
                    .begin_dispatch(&kernel, self.push, self.groups, nothing)
                    .and_then(|value| device.finish_within(value, COMPILE_LIMIT));
                device.exclude_new(&before, true);
                done?;
            }
        }
        Ok(())
    }

    /// Has the engine bring a page. `true` when it was asked.
    pub(crate) fn fault(&mut self, miss: Miss) -> Result<bool, LaunchError> {
        let mut tally = Tally::new();
        let brought = bring(self.device, miss, &mut tally);
        self.count(tally);
        if let Ok(true) = brought {
            self.take_up(miss)?;
        }
        brought
    }

    pub(crate) const fn count(&mut self, tally: Tally) {
        self.report.faults += tally.faults;
        self.report.retries += tally.retries;
    }

    /// Imports the page, if that is what the engine has said is to be done.
    fn take_up(&self, miss: Miss) -> Result<(), LaunchError> {
        let Miss { address, access } = miss;
        if !self.device.is_granted(address) {
            return Ok(());
        }
        let done = if self.kernel.variant == Variant::Stall {
            Err(ImportFailure::Runs)
        } else {
            self.device.import_granted(address, access)
        };
        done.map_err(|why| KernelError::NotImported { address, why }.into())
    }

    /// A kernel without checks over the page table: what it uses is brought, and does not
    /// go before it has ended.
    fn resident(&mut self, uses: &[(PageRange, Access)]) -> Result<(), LaunchError> {
        let mut last = None;
        for _ in 0..ROUNDS {
            for &(range, access) in uses {
                for page in range.iter_pages() {
                    let miss = Miss {
                        address: page,
                        access,
                    };
                    if self.fault(miss)? {
                        last = Some(page);
                    }
                }
            }
            if self.dispatch_held(uses)? {
                return Ok(());
            }
        }
        let address = last.unwrap_or(VirtAddr::new(0));
        let rounds = ROUNDS;
        Err(KernelError::Thrash { address, rounds }.into())
    }

    /// A dispatch of pages that stay until its end, if they are there when it begins.
    fn dispatch_held(&mut self, uses: &[(PageRange, Access)]) -> Result<bool, LaunchError> {
        let device = self.device;
        let mut distance = None;
        let held = device
            .gate()
            .begin(Manner::Unchecked, || match device.table().survey(uses) {
                Survey::Missing => false,
                Survey::Apart => true,
                Survey::At(number) => {
                    distance = Some(number);
                    true
                }
            });
        if !held {
            return Ok(false);
        }
        if let Some(distance) = distance
            && let Some(kernel) = self.near.at(distance)
        {
            device.set_translation(Variant::Delta(distance));
            self.kernel = kernel;
            self.report.distance = Some(distance);
        }
        let chunk = Chunk::whole(self.groups);
        let done = device
            .begin_dispatch(&self.kernel, self.push, self.groups, chunk)
            .and_then(|value| device.finish(value));
        // One that has not ended keeps the gate: what unmaps must not go on.
        if !device.has_given_up() {
            device.gate().end();
        }
        done.map(|()| true)
    }

    /// A kernel that uses no table: nobody waits for it but whoever launched it.
    fn plain(&mut self) -> Result<(), LaunchError> {
        self.dispatch(Chunk::whole(self.groups))
    }
}

/// What serving misses came to.
pub(crate) struct Tally {
    faults: u64,
    retries: u64,
}

impl Tally {
    pub(crate) const fn new() -> Self {
        Self {
            faults: 0,
            retries: 0,
        }
    }

    pub(crate) const fn add(&mut self, other: Self) {
        self.faults += other.faults;
        self.retries += other.retries;
    }
}

/// A kernel that has not ended in time.
pub(crate) fn runaway(limit: Duration) -> LaunchError {
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    KernelError::Runaway { limit_ms }.into()
}

fn go_on(device: &VulkanDevice) -> Result<(), LaunchError> {
    if device.driver().is_closing() {
        return Err(LaunchError::Closed);
    }
    match device.injector().loss() {
        None => Ok(()),
        Some(_) => Err(LaunchError::Lost),
    }
}

/// Has the engine bring a page. `true` when it was asked.
pub(crate) fn bring(
    device: &VulkanDevice,
    miss: Miss,
    tally: &mut Tally,
) -> Result<bool, LaunchError> {
    let Miss { address, access } = miss;
    let &(id, engine) = device.engine().ok_or(LaunchError::NotAttached)?;
    let mut since = None;
    let mut rounds = 0;
    loop {
        if device.table().allows(address, access) {
            return Ok(rounds > 0);
        }
        go_on(device)?;
        rounds += 1;
        tally.faults += 1;
        // An engine that panics must not be taken for a kernel that fails.
        let bomb = hmm_device::AbortOnUnwind("the engine resolved a device fault");
        let resolution = engine.device_fault(id, address, access);
        bomb.defuse();
        match resolution {
            Ok(Resolution::Mapped) => return Ok(true),
            Ok(Resolution::Retry) => {
                tally.retries += 1;
                let since = since.get_or_insert_with(Instant::now);
                if since.elapsed() > RETRY_TIME {
                    return Err(KernelError::Stuck { address, rounds }.into());
                }
                engine.wait_for_progress();
            }
            Err(error) => return Err(KernelError::Fault(error).into()),
        }
    }
}
