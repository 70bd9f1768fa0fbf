//! Just enough Vulkan to run a kernel: one device, one queue, buffers in
//! host-visible memory with device addresses.

use ash::{Device, Entry, Instance, vk};

/// A device with its queue.
pub struct Gpu {
    _entry: Entry,
    instance: Instance,
    device: Device,
    queue: vk::Queue,
    pool: vk::CommandPool,
    memory_type: u32,
    /// What the driver calls itself.
    pub name: String,
}

/// Memory that host and device see.
pub struct Buffer {
    memory: vk::DeviceMemory,
    buffer: vk::Buffer,
    /// Where the device sees it.
    pub address: u64,
    /// Where the host sees it.
    pub host: *mut u8,
    /// Its size.
    pub size: u64,
}

/// A kernel that is ready to run.
pub struct Pipeline {
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
}

/// A dispatch under way.
pub struct Running {
    fence: vk::Fence,
    commands: vk::CommandBuffer,
}

/// SpecId of the control block's address in all tests.
pub const CONTROL: u32 = 1000;

impl Gpu {
    /// Opens the first device with what the kernels need, or says why not.
    pub fn open() -> Result<Self, String> {
        // SAFETY: the loader is an ordinary shared library.
        let entry =
            unsafe { Entry::load() }.map_err(|error| format!("no Vulkan loader: {error}"))?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: the structures live during the call.
        let instance = unsafe { entry.create_instance(&info, None) }
            .map_err(|error| format!("no Vulkan instance: {error}"))?;
        // SAFETY: a live instance.
        let devices = unsafe { instance.enumerate_physical_devices() }
            .map_err(|error| format!("no Vulkan device: {error}"))?;
        let physical = *devices.first().ok_or("no Vulkan device")?;
        // SAFETY: as above.
        let properties = unsafe { instance.get_physical_device_properties(physical) };
        let name = properties.device_name_as_c_str().unwrap_or(c"?");
        let name = format!(
            "{} (driver {:#x}, Vulkan {}.{})",
            name.to_string_lossy(),
            properties.driver_version,
            vk::api_version_major(properties.api_version),
            vk::api_version_minor(properties.api_version)
        );
        if properties.api_version < vk::make_api_version(0, 1, 4, 0) {
            return Err(format!(
                "{name} is too old: lavapipe before Mesa 25 ends long loops silently; set \
                 VK_DRIVER_FILES to a newer one"
            ));
        }
        let memory_type = memory_type(&instance, physical).ok_or("no host-visible memory")?;
        let device = device(&instance, physical)?;
        // SAFETY: queue 0 of family 0 was asked for.
        let queue = unsafe { device.get_device_queue(0, 0) };
        let info = vk::CommandPoolCreateInfo::default();
        // SAFETY: a live device.
        let pool = unsafe { device.create_command_pool(&info, None) }
            .map_err(|error| format!("no command pool: {error}"))?;
        Ok(Self {
            _entry: entry,
            instance,
            device,
            queue,
            pool,
            memory_type,
            name,
        })
    }

    /// Allocates zeroed memory.
    pub fn buffer(&self, size: u64) -> Buffer {
        let usage =
            vk::BufferUsageFlags::STORAGE_BUFFER | vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage);
        let mut flags =
            vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
        // SAFETY: a live device; the buffer is bound once, to memory of its own of
        // the size asked for, which is mapped whole.
        unsafe {
            let buffer = self.device.create_buffer(&info, None).expect("a buffer");
            let needs = self.device.get_buffer_memory_requirements(buffer);
            // Frames are aligned to 64 KiB within the buffer; so must it be.
            let info = vk::MemoryAllocateInfo::default()
                .allocation_size(needs.size)
                .memory_type_index(self.memory_type)
                .push_next(&mut flags);
            let memory = self.device.allocate_memory(&info, None).expect("memory");
            self.device
                .bind_buffer_memory(buffer, memory, 0)
                .expect("bound memory");
            let host = self
                .device
                .map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())
                .expect("mapped memory")
                .cast::<u8>();
            host.write_bytes(0, usize::try_from(size).expect("a size"));
            let info = vk::BufferDeviceAddressInfo::default().buffer(buffer);
            let address = self.device.get_buffer_device_address(&info);
            Buffer {
                memory,
                buffer,
                address,
                host,
                size,
            }
        }
    }

    /// Frees memory that no dispatch uses.
    pub fn free(&self, buffer: Buffer) {
        // SAFETY: the caller's promise.
        unsafe {
            self.device.destroy_buffer(buffer.buffer, None);
            self.device.free_memory(buffer.memory, None);
        }
    }

    /// Compiles a kernel whose control block is at `control`.
    pub fn pipeline(&self, words: &[u32], control: u64, push_bytes: u32) -> Pipeline {
        let range = vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(push_bytes.next_multiple_of(4));
        let ranges = [range];
        let info = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&ranges);
        let entries = [vk::SpecializationMapEntry::default()
            .constant_id(CONTROL)
            .size(8)];
        let value = control.to_le_bytes();
        let special = vk::SpecializationInfo::default()
            .map_entries(&entries)
            .data(&value);
        let module = vk::ShaderModuleCreateInfo::default().code(words);
        // SAFETY: the module is a valid one (spirv-val's tests), all structures
        // live during the calls.
        unsafe {
            let layout = self
                .device
                .create_pipeline_layout(&info, None)
                .expect("a layout");
            let module = self
                .device
                .create_shader_module(&module, None)
                .expect("a module");
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main")
                .specialization_info(&special);
            let info = vk::ComputePipelineCreateInfo::default()
                .flags(vk::PipelineCreateFlags::DISPATCH_BASE)
                .stage(stage)
                .layout(layout);
            let made =
                self.device
                    .create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            let pipeline = made.expect("a pipeline")[0];
            self.device.destroy_shader_module(module, None);
            Pipeline { layout, pipeline }
        }
    }

    /// Starts a dispatch of the groups from `base` on.
    pub fn start(&self, pipeline: &Pipeline, push: &[u8], base: u32, groups: u32) -> Running {
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(self.pool)
            .command_buffer_count(1);
        let begin = vk::CommandBufferBeginInfo::default();
        // SAFETY: objects of this device, used by this thread alone.
        unsafe {
            let commands = self
                .device
                .allocate_command_buffers(&info)
                .expect("commands")[0];
            let d = &self.device;
            d.begin_command_buffer(commands, &begin).expect("begun");
            d.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, pipeline.pipeline);
            if !push.is_empty() {
                d.cmd_push_constants(
                    commands,
                    pipeline.layout,
                    vk::ShaderStageFlags::COMPUTE,
                    0,
                    push,
                );
            }
            d.cmd_dispatch_base(commands, base, 0, 0, groups, 1, 1);
            let barrier = [vk::MemoryBarrier::default()
                .src_access_mask(vk::AccessFlags::SHADER_WRITE)
                .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
            d.cmd_pipeline_barrier(
                commands,
                vk::PipelineStageFlags::COMPUTE_SHADER,
                vk::PipelineStageFlags::HOST,
                vk::DependencyFlags::empty(),
                &barrier,
                &[],
                &[],
            );
            d.end_command_buffer(commands).expect("ended");
            let fence = d
                .create_fence(&vk::FenceCreateInfo::default(), None)
                .expect("a fence");
            let list = [commands];
            let submit = vk::SubmitInfo::default().command_buffers(&list);
            d.queue_submit(self.queue, &[submit], fence)
                .expect("submitted");
            Running { fence, commands }
        }
    }

    /// Whether a dispatch has ended.
    pub fn has_ended(&self, running: &Running) -> bool {
        // SAFETY: a fence of this device.
        unsafe { self.device.get_fence_status(running.fence) }.expect("a device that is not lost")
    }

    /// Waits for a dispatch and forgets it.
    pub fn finish(&self, running: Running) {
        // SAFETY: the fence is signalled before anything is freed.
        unsafe {
            self.device
                .wait_for_fences(&[running.fence], true, 60_000_000_000)
                .expect("an end within a minute");
            self.device.destroy_fence(running.fence, None);
            self.device
                .free_command_buffers(self.pool, &[running.commands]);
        }
    }

    /// Throws a kernel away.
    pub fn drop_pipeline(&self, pipeline: Pipeline) {
        // SAFETY: no dispatch of it runs: all are finished first.
        unsafe {
            self.device.destroy_pipeline(pipeline.pipeline, None);
            self.device.destroy_pipeline_layout(pipeline.layout, None);
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: the last use; buffers that tests leave go with the process.
        unsafe {
            let _ = self.device.device_wait_idle();
            self.device.destroy_command_pool(self.pool, None);
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

fn memory_type(instance: &Instance, physical: vk::PhysicalDevice) -> Option<u32> {
    // SAFETY: a device of this instance.
    let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
    let wanted = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    (0..)
        .zip(memory.memory_types_as_slice())
        .find(|(_, it)| it.property_flags.contains(wanted))
        .map(|(index, _)| index)
}

fn device(instance: &Instance, physical: vk::PhysicalDevice) -> Result<Device, String> {
    let queue = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
    let features = vk::PhysicalDeviceFeatures::default()
        .shader_int64(true)
        .shader_int16(true);
    let mut eleven =
        vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(true);
    let mut twelve = vk::PhysicalDeviceVulkan12Features::default()
        .buffer_device_address(true)
        .scalar_block_layout(true)
        .shader_int8(true)
        .storage_buffer8_bit_access(true);
    let info = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queue)
        .enabled_features(&features)
        .push_next(&mut eleven)
        .push_next(&mut twelve);
    // SAFETY: the structures live during the call.
    unsafe { instance.create_device(physical, &info, None) }
        .map_err(|error| format!("no device with the features needed: {error}"))
}
