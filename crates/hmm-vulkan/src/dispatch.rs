//! One dispatch: recorded, submitted, waited for.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ash::vk;

use crate::chunks::Chunk;
use crate::device::VulkanDevice;
use crate::kernel::Loaded;
use crate::{KernelError, LaunchError};

/// How long to wait at a time.
const NAP: Duration = Duration::from_millis(100);
/// How long a kernel that was told to stop may go on before the device counts as lost.
const GRACE: Duration = Duration::from_secs(10);

/// What the driver's thread dispatches with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Commands {
    pub(crate) pool: vk::CommandPool,
    pub(crate) commands: vk::CommandBuffer,
    pub(crate) timeline: vk::Semaphore,
}

pub(crate) fn failed(call: &'static str) -> impl Fn(vk::Result) -> LaunchError {
    move |result| match result {
        vk::Result::ERROR_DEVICE_LOST => LaunchError::Lost,
        result => LaunchError::Call { call, result },
    }
}

impl VulkanDevice {
    /// Begins a dispatch. Returns the point of the timeline where it has ended.
    pub(crate) fn begin_dispatch(
        &self,
        kernel: &Loaded,
        push: &[u8],
        groups: [u32; 3],
        chunk: Chunk,
    ) -> Result<u64, LaunchError> {
        let Commands {
            commands, timeline, ..
        } = self.commands();
        self.control().prepare(groups, chunk.base, chunk.groups);
        self.counters().dispatches.add(1);
        let device = &self.gpu().device;
        let all = vk::PipelineStageFlags::ALL_COMMANDS;
        let compute = vk::PipelineStageFlags::COMPUTE_SHADER;
        let shader = vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE;
        let before = vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
            .dst_access_mask(shader);
        let after = vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::SHADER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::MEMORY_READ);
        let begin = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the buffer is this thread's, and was waited for when it was used last;
        // pipeline and layout belong together and are alive as long as the kernel.
        unsafe {
            device
                .begin_command_buffer(commands, &begin)
                .map_err(failed("vkBeginCommandBuffer"))?;
            let none = vk::DependencyFlags::empty();
            device.cmd_pipeline_barrier(commands, all, compute, none, &[before], &[], &[]);
            let pipeline = kernel.pipeline.pipeline;
            device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, pipeline);
            if !push.is_empty() {
                let stage = vk::ShaderStageFlags::COMPUTE;
                device.cmd_push_constants(commands, kernel.pipeline.layout, stage, 0, push);
            }
            let (base, groups) = (chunk.base, chunk.groups);
            device.cmd_dispatch_base(
                commands, base[0], base[1], base[2], groups[0], groups[1], groups[2],
            );
            let host = vk::PipelineStageFlags::HOST | all;
            device.cmd_pipeline_barrier(commands, compute, host, none, &[after], &[], &[]);
            device
                .end_command_buffer(commands)
                .map_err(failed("vkEndCommandBuffer"))?;
        }
        let value = self.next_tick();
        self.gpu()
            .submit(self.gpu().compute, commands, timeline, value)
            .map_err(failed("vkQueueSubmit"))?;
        Ok(value)
    }

    /// Waits for a dispatch's end. One that takes too long is told to stop; one that
    /// does not even do that makes the device a lost one, with the dispatch still there.
    pub(crate) fn finish(&self, value: u64) -> Result<(), LaunchError> {
        self.finish_within(value, self.config().dispatch_limit)
    }

    /// The same with another bound.
    pub(crate) fn finish_within(&self, value: u64, limit: Duration) -> Result<(), LaunchError> {
        let since = Instant::now();
        let mut stopped = false;
        while !self.has_ended(value, NAP)? {
            let elapsed = since.elapsed();
            if !stopped && elapsed > limit {
                self.control().stop.store(1, Ordering::SeqCst);
                stopped = true;
            }
            if elapsed > limit + GRACE {
                self.give_up();
                return Err(LaunchError::Lost);
            }
        }
        if stopped && !self.driver().is_closing() {
            self.control().stop.store(0, Ordering::SeqCst);
            let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            return Err(KernelError::Runaway { limit_ms }.into());
        }
        Ok(())
    }

    /// Whether a dispatch has ended, or does so in this time.
    pub(crate) fn has_ended(&self, value: u64, patience: Duration) -> Result<bool, LaunchError> {
        let ended = self.gpu().wait(self.commands().timeline, value, patience);
        ended.map_err(failed("vkWaitSemaphores"))
    }
}
