//! The logical device with its queues.

use std::fmt;
use std::mem::ManuallyDrop;

use ash::vk;
use hmm_sync::{Mutex, Rank};

use crate::VulkanError;
use crate::instance::Instance;
use crate::loaded::Objects;
use crate::physical::{Physical, QueueChoice};

/// A queue, which one thread at a time may submit to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    handle: vk::Queue,
    pub(crate) family: u32,
}

/// An opened device.
pub(crate) struct Gpu {
    pub(crate) device: ash::Device,
    pub(crate) import: Option<ash::ext::external_memory_host::Device>,
    pub(crate) physical: Physical,
    pub(crate) compute: Queue,
    pub(crate) copies: Queue,
    /// One for both queues: they may be the same.
    submitting: Mutex<()>,
    /// What was switched on.
    pub(crate) features: Features,
    instance: ManuallyDrop<Instance>,
}

impl Gpu {
    pub(crate) fn open(instance: Instance, physical: Physical) -> Result<Self, VulkanError> {
        let before = Objects::now();
        let opened = Self::open_loaded(instance, physical);
        before.keep_new();
        opened
    }

    fn open_loaded(instance: Instance, physical: Physical) -> Result<Self, VulkanError> {
        let priorities = [1.0, 1.0];
        let (compute, copies) = (physical.compute, physical.copies);
        let of_family = |family, count| {
            vk::DeviceQueueCreateInfo::default()
                .queue_family_index(family)
                .queue_priorities(&priorities[..count])
        };
        let queues = if compute.family == copies.family {
            vec![of_family(compute.family, 1 + copies.index as usize)]
        } else {
            vec![of_family(compute.family, 1), of_family(copies.family, 1)]
        };
        let mut extensions = Vec::new();
        if physical.description.imports_host {
            extensions.push(ash::ext::external_memory_host::NAME.as_ptr());
        }
        let features = Features::of(&instance, &physical);
        let mut wanted = features;
        let mut chain = vk::PhysicalDeviceFeatures2::default()
            .features(wanted.basic)
            .push_next(&mut wanted.eleven)
            .push_next(&mut wanted.twelve);
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut chain);
        // SAFETY: all that the structure leads to is alive, and supported.
        let device = unsafe { instance.raw.create_device(physical.handle, &info, None) };
        let device = device.map_err(|result| VulkanError::Call {
            call: "vkCreateDevice",
            result,
        })?;
        let queue = |choice: QueueChoice| Queue {
            // SAFETY: the device was made with that queue.
            handle: unsafe { device.get_device_queue(choice.family, choice.index) },
            family: choice.family,
        };
        let (compute, copies) = (queue(compute), queue(copies));
        let import = physical
            .description
            .imports_host
            .then(|| ash::ext::external_memory_host::Device::new(&instance.raw, &device));
        Ok(Self {
            import,
            physical,
            compute,
            copies,
            submitting: Mutex::new(Rank::Device, ()),
            features,
            device,
            instance: ManuallyDrop::new(instance),
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.physical.description.name
    }

    /// Submits one command buffer, whose end sets a timeline to `value`.
    pub(crate) fn submit(
        &self,
        queue: Queue,
        commands: vk::CommandBuffer,
        timeline: vk::Semaphore,
        value: u64,
    ) -> Result<(), vk::Result> {
        let (commands, timelines, values) = ([commands], [timeline], [value]);
        let mut signal =
            vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
        let info = vk::SubmitInfo::default()
            .command_buffers(&commands)
            .signal_semaphores(&timelines)
            .push_next(&mut signal);
        let _one_at_a_time = self.submitting.lock();
        // SAFETY: the commands are recorded, and whoever has them waits for the timeline
        // before they are changed; the lock keeps other threads off the queue.
        unsafe {
            self.device
                .queue_submit(queue.handle, &[info], vk::Fence::null())
        }
    }

    /// A timeline that stands at 0.
    pub(crate) fn timeline(&self) -> Result<vk::Semaphore, VulkanError> {
        let mut kind =
            vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: the structure is complete.
        unsafe { self.device.create_semaphore(&info, None) }.map_err(|result| VulkanError::Call {
            call: "vkCreateSemaphore",
            result,
        })
    }

    /// Waits until a timeline has come to `value`, for a time; false when it has not.
    pub(crate) fn wait(
        &self,
        timeline: vk::Semaphore,
        value: u64,
        patience: std::time::Duration,
    ) -> Result<bool, vk::Result> {
        let (timelines, values) = ([timeline], [value]);
        let info = vk::SemaphoreWaitInfo::default()
            .semaphores(&timelines)
            .values(&values);
        let timeout_ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: the semaphore is a living timeline of this device.
        match unsafe { self.device.wait_semaphores(&info, timeout_ns) } {
            Ok(()) => Ok(true),
            Err(vk::Result::TIMEOUT) => Ok(false),
            Err(result) => Err(result),
        }
    }

    /// A pool with one command buffer that is recorded again and again.
    pub(crate) fn commands(
        &self,
        queue: Queue,
    ) -> Result<(vk::CommandPool, vk::CommandBuffer), VulkanError> {
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(queue.family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        let failed = |call| move |result| VulkanError::Call { call, result };
        // SAFETY: the family is one that the device has queues of.
        let pool = unsafe { self.device.create_command_pool(&info, None) }
            .map_err(failed("vkCreateCommandPool"))?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(pool)
            .command_buffer_count(1);
        // SAFETY: the pool was just made, and is this thread's.
        match unsafe { self.device.allocate_command_buffers(&info) } {
            Ok(buffers) => Ok((pool, buffers[0])),
            Err(result) => {
                // SAFETY: nobody knows the pool.
                unsafe { self.device.destroy_command_pool(pool, None) };
                Err(failed("vkAllocateCommandBuffers")(result))
            }
        }
    }
}

impl Gpu {
    /// Gives the device back, and the instance with it.
    ///
    /// # Safety
    /// What was made of it is destroyed, nobody uses it from now on, and nobody calls
    /// this again.
    pub(crate) unsafe fn destroy(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy();
        }
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("name", &self.physical.description.name)
            .finish_non_exhaustive()
    }
}

/// Features to switch on: what this crate needs, and what kernels may use of what the
/// device has. Others (robust access, captures) cost something where they are on.
#[derive(Clone, Copy)]
pub(crate) struct Features {
    pub(crate) basic: vk::PhysicalDeviceFeatures,
    pub(crate) eleven: vk::PhysicalDeviceVulkan11Features<'static>,
    pub(crate) twelve: vk::PhysicalDeviceVulkan12Features<'static>,
}

// SAFETY: the structures lead nowhere (`p_next` is null but while a device is made).
unsafe impl Send for Features {}
// SAFETY: as for Send; they never change.
unsafe impl Sync for Features {}

impl Features {
    fn of(instance: &Instance, physical: &Physical) -> Self {
        let mut eleven = vk::PhysicalDeviceVulkan11Features::default();
        let mut twelve = vk::PhysicalDeviceVulkan12Features::default();
        let mut all = vk::PhysicalDeviceFeatures2::default()
            .push_next(&mut eleven)
            .push_next(&mut twelve);
        // SAFETY: a query that fills the structures chained to it.
        unsafe {
            let raw = &instance.raw;
            raw.get_physical_device_features2(physical.handle, &mut all);
        }
        let has = all.features;
        Self {
            basic: vk::PhysicalDeviceFeatures {
                shader_int64: has.shader_int64,
                shader_int16: has.shader_int16,
                shader_float64: has.shader_float64,
                ..Default::default()
            },
            eleven: vk::PhysicalDeviceVulkan11Features {
                storage_buffer16_bit_access: eleven.storage_buffer16_bit_access,
                variable_pointers: eleven.variable_pointers,
                variable_pointers_storage_buffer: eleven.variable_pointers_storage_buffer,
                ..Default::default()
            },
            twelve: vk::PhysicalDeviceVulkan12Features {
                buffer_device_address: vk::TRUE,
                timeline_semaphore: vk::TRUE,
                storage_buffer8_bit_access: twelve.storage_buffer8_bit_access,
                shader_int8: twelve.shader_int8,
                shader_float16: twelve.shader_float16,
                shader_buffer_int64_atomics: twelve.shader_buffer_int64_atomics,
                shader_subgroup_extended_types: twelve.shader_subgroup_extended_types,
                scalar_block_layout: twelve.scalar_block_layout,
                runtime_descriptor_array: twelve.runtime_descriptor_array,
                vulkan_memory_model: twelve.vulkan_memory_model,
                vulkan_memory_model_device_scope: twelve.vulkan_memory_model_device_scope,
                ..Default::default()
            },
        }
    }
}
