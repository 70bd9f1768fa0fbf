//! How a device is opened.
//!
//! What drivers load is loaded first (`loaded.rs`). All of the rest happens on the driver's
//! thread, so that what the driver allocates is in that thread's heap, and the driver's own
//! threads have all signals blocked as that one has.

use std::mem::ManuallyDrop;
use std::sync::{Mutex, PoisonError};

use hmm_device::{Embedder, Reservation, Standalone, block_signals};
use hmm_types::{BLOCK_SIZE, PAGE_SHIFT};

use crate::area::Area;
use crate::config::{Copies, MAX_LEAVES, MAX_LOG_ENTRIES, VulkanConfig};
use crate::device::{Parts, VulkanDevice, without_choice};
use crate::dispatch::Commands;
use crate::driver::Driver;
use crate::footprint::Footprint;
use crate::gate::Gate;
use crate::gpu::Gpu;
use crate::instance::Instance;
use crate::loaded::on_loader;
use crate::memory::Memory;
use crate::physical::{self, ONE_QUEUE};
use crate::pool::Pool;
use crate::queue::CopyQueue;
use crate::staging::Staging;
use crate::table::Table;
use crate::{Choice, VulkanError};

const DRIVER_THREAD: &str = "hmm-vulkan";
const COPY_THREAD: &str = "hmm-vulkan-copy";
const SERVER_THREAD: &str = "hmm-vulkan-miss";
const EXPEL_THREAD: &str = "hmm-vulkan-exp";

impl VulkanDevice {
    /// Opens a device whose threads are plain ones.
    ///
    /// # Errors
    /// [`VulkanError`] when there is no such device, it lacks something, or the system has
    /// not enough of something.
    pub fn open(config: VulkanConfig<'_>) -> Result<&'static Self, VulkanError> {
        Self::open_with(config, &Standalone)
    }

    /// Opens a device in a program that excludes its memory and starts its threads.
    ///
    /// # Errors
    /// As [`VulkanDevice::open`].
    pub fn open_with(
        config: VulkanConfig<'_>,
        embedder: &'static (dyn Embedder + Sync),
    ) -> Result<&'static Self, VulkanError> {
        assert!(
            (2..=MAX_LEAVES).contains(&config.leaves),
            "a page table of {} leaves; 2 to {MAX_LEAVES} can be",
            config.leaves
        );
        assert!(
            config.log_entries.is_power_of_two() && config.log_entries <= MAX_LOG_ENTRIES,
            "a fault log of {} entries; a power of two up to {MAX_LOG_ENTRIES} can be",
            config.log_entries
        );
        rehearse(config.device)?;
        let driver: &'static Driver = hmm_mem::leaked(Driver::new());
        let body = || {
            block_signals();
            driver.serve();
        };
        let spawn = |name: &'static str, body: Box<dyn FnOnce() + Send>| {
            let thread = embedder.spawn(name.to_owned(), body);
            thread.map_err(|error| VulkanError::Spawn {
                thread: name,
                reason: error.kind(),
            })
        };
        let thread = spawn(DRIVER_THREAD, Box::new(body))?;
        let opened = driver.run(|| open_on_thread(config, driver, embedder));
        let device = match opened.unwrap_or(Err(VulkanError::Lost)) {
            Ok(device) => device,
            Err(error) => {
                driver.close();
                thread.join();
                return Err(error);
            }
        };
        device.keep(thread);
        if let Some(staging) = device.parts.queue.staging() {
            let parts = &device.parts;
            let (ready, is_ready) = std::sync::mpsc::channel::<()>();
            let body = move || {
                block_signals();
                // What copies must not migrate: its heap, nor what the driver's threads
                // allocate for them.
                let (before, mut value) = (Footprint::now(), 0);
                staging.warm_up(&parts.gpu, &mut value);
                device.exclude_new(&before, true);
                drop(ready);
                let counters = device.counters();
                staging.serve(
                    &parts.gpu,
                    &parts.memory,
                    counters,
                    value,
                    |fence, error| parts.queue.fail(fence, error),
                );
            };
            match spawn(COPY_THREAD, Box::new(body)) {
                Ok(thread) => device.keep(thread),
                Err(error) => {
                    staging.never_began();
                    device.close();
                    return Err(error);
                }
            }
            // Ends when the other side is dropped. What the program maps in the meantime
            // would be taken for the driver's.
            let _: Result<(), _> = is_ready.recv();
        }
        if device.imports_memory() {
            let (ready, is_ready) = std::sync::mpsc::channel::<()>();
            let body = move || {
                block_signals();
                let before = Footprint::now();
                device.exclude_new(&before, true);
                drop(ready);
                device.expel();
            };
            match spawn(EXPEL_THREAD, Box::new(body)) {
                Ok(thread) => device.keep(thread),
                Err(error) => {
                    device.close();
                    return Err(error);
                }
            }
            let _: Result<(), _> = is_ready.recv();
        }
        let body = move || {
            block_signals();
            device.servers().help(device);
        };
        match spawn(SERVER_THREAD, Box::new(body)) {
            Ok(thread) => device.keep(thread),
            Err(error) => {
                device.close();
                return Err(error);
            }
        }
        Ok(device)
    }
}

/// Opens a device and gives it back, on the thread that loads what drivers load. What was
/// opened before has been loaded.
fn rehearse(choice: Choice<'_>) -> Result<(), VulkanError> {
    static REHEARSED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let known = format!("{choice:?}");
    let rehearsed = || REHEARSED.lock().unwrap_or_else(PoisonError::into_inner);
    if rehearsed().contains(&known) {
        return Ok(());
    }
    // What is handed to that thread borrows nothing.
    let (index, name) = match choice {
        Choice::First => (None, None),
        Choice::Index(index) => (Some(index), None),
        Choice::Name(name) => (None, Some(name.to_owned())),
    };
    on_loader(move || {
        let choice = match (index, &name) {
            (Some(index), _) => Choice::Index(index),
            (None, Some(name)) => Choice::Name(name),
            (None, None) => Choice::First,
        };
        let instance = Instance::open()?;
        let physical = physical::choose(&instance, choice)?;
        let gpu = Gpu::open(instance, physical)?;
        // SAFETY: nobody else has seen it.
        unsafe { gpu.destroy() };
        Ok::<_, VulkanError>(())
    })??;
    rehearsed().push(known);
    Ok(())
}

fn open_on_thread(
    config: VulkanConfig<'_>,
    driver: &'static Driver,
    embedder: &'static (dyn Embedder + Sync),
) -> Result<&'static VulkanDevice, VulkanError> {
    let before = Footprint::now();
    let instance = Instance::open()?;
    let physical = physical::choose(&instance, config.device)?;
    let gpu = Gpu::open(instance, physical)?;
    let config = without_choice(config);
    let mut making = Making::new(gpu, embedder);
    making.memory(&config)?;
    if config.system_memory && !making.is_in_this_process() {
        return Err(VulkanError::Elsewhere {
            device: making.gpu().name().to_owned(),
        });
    }
    making.queues(&config)?;
    let table = making.table(&config)?;
    let parts = making.into_parts(config, table);
    let gate = Gate::new(Pool::new(config.leaves));
    let device = VulkanDevice::assemble(parts, gate, driver, embedder);
    device.exclude_new(&before, false);
    device.exclude_loaded();
    // What stays when the device is closed was there already when the next one is opened.
    embedder.objects_are_loaded();
    Ok(device)
}

/// What has been made so far, given back when something fails.
struct Making {
    gpu: Option<Gpu>,
    memory: Option<Memory>,
    area: Option<Area>,
    staging: Option<Staging>,
    commands: Option<Commands>,
    reservation: Option<Reservation>,
    embedder: &'static (dyn Embedder + Sync),
}

impl Making {
    const fn new(gpu: Gpu, embedder: &'static (dyn Embedder + Sync)) -> Self {
        Self {
            gpu: Some(gpu),
            memory: None,
            area: None,
            staging: None,
            commands: None,
            reservation: None,
            embedder,
        }
    }

    fn gpu(&self) -> &Gpu {
        match &self.gpu {
            Some(gpu) => gpu,
            None => unreachable!("it is there until `into_parts`"),
        }
    }

    /// Frames, and what is shared with kernels. Where the device is the CPU they lie in
    /// one reservation of this process, which is excluded before anybody can use it.
    fn memory(&mut self, config: &VulkanConfig<'_>) -> Result<(), VulkanError> {
        let gpu = self.gpu();
        let frames = Memory::frames_in(gpu, config.memory)?;
        let description = &gpu.physical.description;
        if !(description.is_cpu && description.imports_host && config.own_memory) {
            self.memory = Some(Memory::new(self.gpu(), frames)?);
            self.area = Some(Area::new(self.gpu(), config)?);
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "2 MiB")]
        let block = BLOCK_SIZE as usize;
        let frames_bytes = ((frames as usize) << PAGE_SHIFT).next_multiple_of(block);
        let area_bytes = Area::bytes(config.leaves).next_multiple_of(block);
        let reservation = Reservation::new(frames_bytes + area_bytes, self.embedder)?;
        let area_base = reservation.base().wrapping_add(frames_bytes);
        let reservation = self.reservation.insert(reservation);
        let gpu = match &self.gpu {
            Some(gpu) => gpu,
            None => unreachable!("it is there until `into_parts`"),
        };
        // SAFETY: both lie in the reservation, which is zero and outlives them.
        unsafe {
            self.memory = Some(Memory::import(gpu, frames, reservation)?);
            self.area = Some(Area::import(gpu, area_base, config)?);
        }
        Ok(())
    }

    /// Whether the device's addresses are this process's. A driver can make calls of
    /// another process, whose processor the device is (Mesa's Venus).
    fn is_in_this_process(&self) -> bool {
        let is_cpu = self.gpu().physical.description.is_cpu;
        let area = self.area.as_ref().map(|area| &area.buffer);
        is_cpu && area.is_some_and(|buffer| buffer.host.addr() as u64 == buffer.device)
    }

    fn queues(&mut self, config: &VulkanConfig<'_>) -> Result<(), VulkanError> {
        let gpu = self.gpu();
        let by_cpu = self
            .memory
            .as_ref()
            .is_some_and(|memory| memory.buffer.quick_to_read && !memory.buffer.host.is_null());
        let staged =
            config.copies != Copies::Fitting || !(by_cpu && gpu.physical.description.is_cpu);
        let (pool, commands) = gpu.commands(gpu.compute)?;
        let timeline = match gpu.timeline() {
            Ok(timeline) => timeline,
            Err(error) => {
                // SAFETY: nobody knows the pool.
                unsafe { gpu.device.destroy_command_pool(pool, None) };
                return Err(error);
            }
        };
        let staging = if staged {
            let imports = config.copies == Copies::QueueImports;
            Some(Staging::new(
                gpu,
                imports && gpu.physical.description.imports_pages(),
            )?)
        } else {
            None
        };
        self.commands = Some(Commands {
            pool,
            commands,
            timeline,
        });
        self.staging = staging;
        if let Some(gpu) = &mut self.gpu
            && staged
            && !gpu.physical.description.transfer_queue
        {
            gpu.physical.description.no_stall.get_or_insert(ONE_QUEUE);
        }
        Ok(())
    }

    fn table(&self, config: &VulkanConfig<'_>) -> Result<Table, VulkanError> {
        let Some(area) = &self.area else {
            unreachable!("`memory` made it");
        };
        let slow = !area.buffer.quick_to_read;
        let table = Table::new(area.root(), area.leaves(), config.leaves, slow);
        table.ok_or_else(|| VulkanError::OutOfMemory {
            device: self.gpu().name().to_owned(),
            what: "its page table's copy in engine memory",
            size: hmm_types::ByteCount::mib(2 * u64::from(config.leaves)),
        })
    }

    fn into_parts(mut self, config: VulkanConfig<'static>, table: Table) -> Parts {
        let (Some(gpu), Some(memory), Some(area), Some(commands)) = (
            self.gpu.take(),
            self.memory.take(),
            self.area.take(),
            self.commands.take(),
        ) else {
            unreachable!("`memory` and `queues` made them");
        };
        Parts {
            config,
            name: leaked_text(gpu.name()),
            gpu: ManuallyDrop::new(gpu),
            memory,
            area,
            table,
            queue: CopyQueue::new(self.staging.take()),
            commands,
            reservation: self.reservation.take(),
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let Some(gpu) = self.gpu.take() else {
            return; // all of it is a device's now
        };
        let buffers = [
            self.memory.take().map(|memory| memory.buffer),
            self.area.take().map(|area| area.buffer),
        ];
        // SAFETY: nobody else has seen any of it, and nothing was submitted.
        unsafe {
            if let Some(staging) = self.staging.take() {
                staging.destroy(&gpu);
            }
            if let Some(commands) = self.commands.take() {
                gpu.device.destroy_semaphore(commands.timeline, None);
                gpu.device.destroy_command_pool(commands.pool, None);
            }
            for buffer in buffers.iter().flatten() {
                buffer.destroy(&gpu);
            }
            gpu.destroy();
            if let Some(memory) = self.reservation.take() {
                memory.release();
                self.embedder.include(memory.range());
            }
        }
    }
}

/// A copy of a text in engine memory, for the rest of the process's life.
fn leaked_text(text: &str) -> &'static str {
    let mut bytes = hmm_mem::vec_with_capacity(text.len());
    bytes.extend_from_slice(text.as_bytes());
    let bytes: &'static [u8] = hmm_mem::Vec::leak(bytes);
    std::str::from_utf8(bytes).unwrap_or("Vulkan device")
}
