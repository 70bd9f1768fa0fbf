//! Copies by the device's queue, through staging memory that both see.
//!
//! Whoever submits leaves the transfers in a ring; one thread takes them, in order, and
//! is the only one that calls the driver for them. So neither `submit` nor `wait`
//! allocates, whatever the driver does.

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ash::vk;
use hmm_hal::{DeviceError, Fence, Transfer};
use hmm_sync::{Condvar, Mutex, Rank};
use hmm_types::PAGE_SHIFT;

use crate::VulkanError;
use crate::buffer::{Buffer, Use};
use crate::gpu::Gpu;
use crate::memory::Memory;
use crate::queue::{frames_of, pointer};
use crate::stats::Counters;

/// Submissions that wait; who comes then waits too.
const RING: usize = 64;
/// Transfers of one submission (`docs/writing-a-device.md`).
const TRANSFERS: usize = 32;
/// Bytes that go through staging at a time.
const STAGING_BYTES: u64 = 4 << 20;
/// Less than this is not worth an import.
const IMPORTED_BYTES: u64 = 64 << 10;
/// How long to sleep at a time before looking again; nobody relies on it.
const NAP: Duration = Duration::from_millis(200);
/// How long one copy may take before the device counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
struct Submission {
    fence: u64,
    len: usize,
    transfers: [Option<Transfer>; TRANSFERS],
}

#[derive(Debug)]
struct State {
    ring: hmm_mem::Vec<Submission>,
    first: usize,
    len: usize,
    issued: u64,
    done: u64,
    /// A failure found no place to be remembered: no fence can be trusted.
    unsure: bool,
}

/// The ring, and what the thread copies with.
#[derive(Debug)]
pub(crate) struct Staging {
    state: Mutex<State>,
    work: Condvar,
    changed: Condvar,
    /// Not under the lock: a thread of the program closes a device, and must not take one
    /// that a handler may need.
    closed: AtomicBool,
    /// The thread has ended, with all that was submitted done.
    ended: AtomicBool,
    buffer: Buffer,
    /// What goes to the device is read where it is.
    imports: bool,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    timeline: vk::Semaphore,
}

impl Staging {
    pub(crate) fn new(gpu: &Gpu, imports: bool) -> Result<Self, VulkanError> {
        let buffer = Buffer::new(gpu, STAGING_BYTES, Use::Staging)?;
        let rest = gpu.commands(gpu.copies).and_then(|(pool, commands)| {
            let timeline = gpu.timeline().inspect_err(|_| {
                // SAFETY: nobody knows the pool.
                unsafe { gpu.device.destroy_command_pool(pool, None) };
            })?;
            Ok((pool, commands, timeline))
        });
        let (pool, commands, timeline) = rest.inspect_err(|_| {
            // SAFETY: nobody uses the buffer.
            unsafe { buffer.destroy(gpu) };
        })?;
        let mut ring = hmm_mem::vec_with_capacity(RING);
        let empty = Submission {
            fence: 0,
            len: 0,
            transfers: [None; TRANSFERS],
        };
        ring.resize(RING, empty);
        Ok(Self {
            state: Mutex::new(
                Rank::Device,
                State {
                    ring,
                    first: 0,
                    len: 0,
                    issued: 0,
                    done: 0,
                    unsure: false,
                },
            ),
            work: Condvar::new(),
            changed: Condvar::new(),
            closed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            buffer,
            imports,
            pool,
            commands,
            timeline,
        })
    }

    /// Leaves transfers for the thread, or only a fence.
    pub(crate) fn push(&self, transfers: &[Transfer]) -> Result<Fence, DeviceError> {
        assert!(
            transfers.len() <= TRANSFERS,
            "{} transfers",
            transfers.len()
        );
        let mut state = self.state.lock();
        while state.len == RING && !self.is_closed() {
            state = self.changed.wait_timeout(state, NAP);
        }
        if self.is_closed() {
            return Err(DeviceError::Lost);
        }
        state.issued += 1;
        let fence = state.issued;
        let place = (state.first + state.len) % RING;
        let submission = &mut state.ring[place];
        submission.fence = fence;
        submission.len = transfers.len();
        for (place, transfer) in submission.transfers.iter_mut().zip(transfers) {
            *place = Some(*transfer);
        }
        state.len += 1;
        self.work.notify_one();
        Ok(Fence(fence))
    }

    /// Waits until the thread has come to a fence. On a closed device too: it may still
    /// write to the host's memory.
    pub(crate) fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        while state.done < fence.0 && !self.has_ended() {
            state = self.changed.wait_timeout(state, NAP);
        }
        if state.unsure || state.done < fence.0 {
            return Err(DeviceError::Lost);
        }
        Ok(())
    }

    /// The thread's first copy, of nothing in particular: what it and the driver allocate
    /// for one is there from now on.
    pub(crate) fn warm_up(&self, gpu: &Gpu, value: &mut u64) {
        let whole = (self.buffer.handle, 0);
        // If it fails, so will the first that matters, which says so.
        let _ = self.execute(gpu, value, |device, commands| {
            // SAFETY: the commands are being recorded; the range lies in the buffer.
            unsafe { device.cmd_fill_buffer(commands, whole.0, whole.1, STAGING_BYTES, 0) };
        });
    }

    /// Body of the thread. `failed` keeps a failure until it is asked for.
    pub(crate) fn serve(
        &self,
        gpu: &Gpu,
        memory: &Memory,
        counters: &Counters,
        mut value: u64,
        failed: impl Fn(u64, DeviceError) -> Result<(), DeviceError>,
    ) {
        // Once the device is lost, a copy may be under way for ever: nothing goes
        // through the staging memory any more.
        let mut lost = false;
        loop {
            let submission = {
                let mut state = self.state.lock();
                while state.len == 0 && !self.is_closed() {
                    state = self.work.wait_timeout(state, NAP);
                }
                if state.len == 0 {
                    self.ended.store(true, Ordering::SeqCst);
                    self.changed.notify_all();
                    return;
                }
                state.ring[state.first]
            };
            let mut sure = true;
            for transfer in submission.transfers[..submission.len].iter().flatten() {
                let done = if lost {
                    Err(vk::Result::ERROR_DEVICE_LOST)
                } else {
                    self.transfer(gpu, memory, counters, *transfer, &mut value)
                };
                if let Err(result) = done {
                    lost |= result == vk::Result::ERROR_DEVICE_LOST;
                    let error = if lost {
                        DeviceError::Lost
                    } else {
                        DeviceError::CopyFailed
                    };
                    sure = failed(submission.fence, error).is_ok();
                    break;
                }
            }
            let mut state = self.state.lock();
            state.first = (state.first + 1) % RING;
            state.len -= 1;
            state.done = submission.fence;
            state.unsure |= !sure;
            self.changed.notify_all();
        }
    }

    fn transfer(
        &self,
        gpu: &Gpu,
        memory: &Memory,
        counters: &Counters,
        transfer: Transfer,
        value: &mut u64,
    ) -> Result<(), vk::Result> {
        let frames = frames_of(transfer);
        let place = memory.offset_of(frames);
        let total = u64::from(frames.count()) << PAGE_SHIFT;
        let mut at = 0;
        while at < total {
            let len = STAGING_BYTES.min(total - at);
            #[allow(
                clippy::cast_possible_truncation,
                reason = "4 MiB, and an offset in memory"
            )]
            let (bytes, offset) = (len as usize, at as usize);
            let staging = self.buffer.host;
            let frames_part = (memory.buffer.handle, place + at);
            match transfer {
                Transfer::ToDevice { host, .. } => {
                    let from = pointer(host).wrapping_add(offset);
                    if len >= IMPORTED_BYTES && self.imports {
                        // SAFETY: the trait's contract for host memory: it is there, whole
                        // pages, and left alone until the fence, which is later.
                        let imported = unsafe { Buffer::import(gpu, from, len, Use::Staging) };
                        if let Ok(buffer) = imported {
                            let done = self.execute(gpu, value, |device, commands| {
                                copy(device, commands, (buffer.handle, 0), frames_part, len);
                            });
                            // One that may still be under way keeps it.
                            if done != Err(vk::Result::ERROR_DEVICE_LOST) {
                                // SAFETY: the copy has ended or never begun, and nobody
                                // else knows the buffer.
                                unsafe { buffer.destroy(gpu) };
                            }
                            done?;
                            counters.copies_imported.add(1);
                            at += len;
                            continue;
                        }
                    }
                    // SAFETY: the trait's contract for host memory; staging is this
                    // thread's, mapped, and no copy uses it now.
                    unsafe { ptr::copy_nonoverlapping(from, staging, bytes) };
                    self.execute(gpu, value, |device, commands| {
                        copy(device, commands, (self.buffer.handle, 0), frames_part, len);
                    })?;
                }
                Transfer::ToHost { host, .. } => {
                    self.execute(gpu, value, |device, commands| {
                        copy(device, commands, frames_part, (self.buffer.handle, 0), len);
                    })?;
                    let to = pointer(host).wrapping_add(offset);
                    // SAFETY: as above.
                    unsafe { ptr::copy_nonoverlapping(staging, to, bytes) };
                }
                Transfer::Zero { .. } => self.execute(gpu, value, |device, commands| {
                    let (buffer, offset) = frames_part;
                    // SAFETY: the commands are being recorded; the range lies in the buffer.
                    unsafe { device.cmd_fill_buffer(commands, buffer, offset, len, 0) };
                })?,
                Transfer::FromProgram { .. } => {
                    unreachable!("the device does not read the program's pages")
                }
            }
            at += len;
        }
        Ok(())
    }

    fn execute(
        &self,
        gpu: &Gpu,
        value: &mut u64,
        record: impl FnOnce(&ash::Device, vk::CommandBuffer),
    ) -> Result<(), vk::Result> {
        let all = vk::PipelineStageFlags::ALL_COMMANDS;
        let before = vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
            .dst_access_mask(vk::AccessFlags::TRANSFER_READ | vk::AccessFlags::TRANSFER_WRITE);
        let after = vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::MEMORY_READ);
        let begin = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        let (device, commands) = (&gpu.device, self.commands);
        // SAFETY: the buffer is this thread's, and was waited for when it was used last.
        unsafe {
            device.begin_command_buffer(commands, &begin)?;
            let none = vk::DependencyFlags::empty();
            device.cmd_pipeline_barrier(commands, all, all, none, &[before], &[], &[]);
            record(device, commands);
            let host = vk::PipelineStageFlags::HOST | all;
            device.cmd_pipeline_barrier(commands, all, host, none, &[after], &[], &[]);
            device.end_command_buffer(commands)?;
        }
        *value += 1;
        gpu.submit(gpu.copies, commands, self.timeline, *value)?;
        let since = Instant::now();
        while !gpu.wait(self.timeline, *value, Duration::from_secs(1))? {
            if since.elapsed() > PATIENCE {
                return Err(vk::Result::ERROR_DEVICE_LOST);
            }
        }
        Ok(())
    }

    /// Ends the thread when it has done what waits.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Who misses this looks again after a nap.
        self.work.notify_all();
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits for the thread's end. A thread that was never started counts as ended.
    pub(crate) fn wait_for_thread(&self) {
        let mut state = self.state.lock();
        while !self.has_ended() {
            state = self.changed.wait_timeout(state, NAP);
        }
    }

    /// There will be no thread.
    pub(crate) fn never_began(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Gives everything back.
    ///
    /// # Safety
    /// The thread has ended, and nobody calls this again.
    pub(crate) unsafe fn destroy(&self, gpu: &Gpu) {
        // SAFETY: the caller's contract.
        unsafe {
            gpu.device.destroy_semaphore(self.timeline, None);
            gpu.device.destroy_command_pool(self.pool, None);
            self.buffer.destroy(gpu);
        }
    }
}

fn copy(
    device: &ash::Device,
    commands: vk::CommandBuffer,
    from: (vk::Buffer, u64),
    to: (vk::Buffer, u64),
    len: u64,
) {
    let region = vk::BufferCopy {
        src_offset: from.1,
        dst_offset: to.1,
        size: len,
    };
    // SAFETY: the commands are being recorded; both ranges lie in their buffers.
    unsafe { device.cmd_copy_buffer(commands, from.0, to.0, &[region]) };
}
