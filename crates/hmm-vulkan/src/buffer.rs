//! Buffers that kernels reach by device address.

use ash::vk;
use hmm_types::ByteCount;

use crate::VulkanError;
use crate::gpu::Gpu;

/// A buffer with its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) handle: vk::Buffer,
    memory: vk::DeviceMemory,
    pub(crate) device: u64,
    /// Where the CPU finds it; null where it does not.
    pub(crate) host: *mut u8,
    /// The CPU reads it about as fast as its own memory.
    pub(crate) quick_to_read: bool,
}

// SAFETY: the pointer leads to memory that belongs to no thread; it is only used through
// raw pointers and atomics.
unsafe impl Send for Buffer {}
// SAFETY: as for Send; the fields never change.
unsafe impl Sync for Buffer {}

/// What the CPU is to do with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Frames: the device's own memory, seen by the CPU or not.
    Frames,
    /// Tables and logs: written by both while a kernel runs.
    Shared,
    /// Staging for copies, and what is copied without.
    Staging,
    /// The program's memory.
    InPlace,
}

impl Use {
    const fn name(self) -> &'static str {
        match self {
            Self::Frames => "its frames",
            Self::Shared => "its page table and logs",
            Self::Staging => "staging",
            Self::InPlace => "memory in place",
        }
    }

    /// Memory that will do, best first.
    fn wishes(self) -> &'static [vk::MemoryPropertyFlags] {
        use vk::MemoryPropertyFlags as Flags;
        const SEEN: Flags =
            Flags::from_raw(Flags::HOST_VISIBLE.as_raw() | Flags::HOST_COHERENT.as_raw());
        const LOCAL_SEEN: Flags = Flags::from_raw(SEEN.as_raw() | Flags::DEVICE_LOCAL.as_raw());
        const CACHED: Flags = Flags::from_raw(SEEN.as_raw() | Flags::HOST_CACHED.as_raw());
        const LOCAL_CACHED: Flags = Flags::from_raw(CACHED.as_raw() | Flags::DEVICE_LOCAL.as_raw());
        match self {
            Self::Frames => &[LOCAL_CACHED, LOCAL_SEEN, Flags::DEVICE_LOCAL],
            // A kernel's look at the table, and its atomics, are best in its own memory.
            Self::Shared => &[LOCAL_CACHED, LOCAL_SEEN, CACHED, SEEN],
            Self::Staging | Self::InPlace => &[CACHED, SEEN],
        }
    }
}

const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw(),
);

impl Buffer {
    /// A buffer in memory of the driver's.
    pub(crate) fn new(gpu: &Gpu, size: u64, purpose: Use) -> Result<Self, VulkanError> {
        let handle = create(gpu, size, false, purpose)?;
        // SAFETY: the buffer was just made.
        let needs = unsafe { gpu.device.get_buffer_memory_requirements(handle) };
        let kinds = gpu.physical.memory.memory_types_as_slice();
        let fitting = purpose.wishes().iter().flat_map(|&wish| {
            kinds.iter().zip(0u32..).filter(move |(kind, index)| {
                needs.memory_type_bits & 1 << index != 0 && kind.property_flags.contains(wish)
            })
        });
        for (kind, index) in fitting {
            let mut flags = vk::MemoryAllocateFlagsInfo::default()
                .flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
            let info = vk::MemoryAllocateInfo::default()
                .allocation_size(needs.size)
                .memory_type_index(index)
                .push_next(&mut flags);
            // SAFETY: the structure is complete.
            let Ok(memory) = (unsafe { gpu.device.allocate_memory(&info, None) }) else {
                continue;
            };
            let buffer = Self {
                handle,
                memory,
                device: 0,
                host: std::ptr::null_mut(),
                quick_to_read: kind
                    .property_flags
                    .contains(vk::MemoryPropertyFlags::HOST_CACHED),
            };
            let visible = kind
                .property_flags
                .contains(vk::MemoryPropertyFlags::HOST_VISIBLE);
            return buffer.finish(gpu, visible);
        }
        // SAFETY: nobody knows the buffer.
        unsafe { gpu.device.destroy_buffer(handle, None) };
        Err(out_of_memory(gpu, size, purpose))
    }

    /// A buffer in memory of this process, which stays the caller's.
    ///
    /// # Safety
    /// The memory is mapped, aligned to a page, and stays until the buffer is destroyed.
    pub(crate) unsafe fn import(
        gpu: &Gpu,
        host: *mut u8,
        size: u64,
        purpose: Use,
    ) -> Result<Self, VulkanError> {
        let handle_type = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let failed = |call| move |result| VulkanError::Call { call, result };
        let Some(import) = &gpu.import else {
            return Err(VulkanError::Feature {
                device: gpu.name().to_owned(),
                feature: "VK_EXT_external_memory_host",
            });
        };
        let mut fitting = vk::MemoryHostPointerPropertiesEXT::default();
        // SAFETY: a query about a pointer, which is not followed.
        let asked = unsafe {
            (import.fp().get_memory_host_pointer_properties_ext)(
                gpu.device.handle(),
                handle_type,
                host.cast(),
                &raw mut fitting,
            )
        };
        asked
            .result()
            .map_err(failed("vkGetMemoryHostPointerPropertiesEXT"))?;
        let handle = create(gpu, size, true, purpose)?;
        // SAFETY: the buffer was just made.
        let needs = unsafe { gpu.device.get_buffer_memory_requirements(handle) };
        let bits = fitting.memory_type_bits & needs.memory_type_bits;
        let kinds = gpu.physical.memory.memory_types_as_slice();
        // What the host writes there is to be seen without further ado.
        let coherent = |cached| {
            let wish = vk::MemoryPropertyFlags::HOST_COHERENT | cached;
            let mut kinds = kinds.iter().zip(0u32..);
            kinds.find(|(kind, index)| bits & 1 << index != 0 && kind.property_flags.contains(wish))
        };
        let kind = coherent(vk::MemoryPropertyFlags::HOST_CACHED)
            .or_else(|| coherent(vk::MemoryPropertyFlags::empty()));
        let Some((_, kind)) = kind else {
            // SAFETY: nobody knows the buffer.
            unsafe { gpu.device.destroy_buffer(handle, None) };
            let result = vk::Result::ERROR_INVALID_EXTERNAL_HANDLE;
            return Err(failed("vkGetMemoryHostPointerPropertiesEXT")(result));
        };
        let mut flags =
            vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
        let mut from = vk::ImportMemoryHostPointerInfoEXT::default()
            .handle_type(handle_type)
            .host_pointer(host.cast());
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(size)
            .memory_type_index(kind)
            .push_next(&mut flags)
            .push_next(&mut from);
        // SAFETY: the memory is as the caller says; the driver checks the rest.
        match unsafe { gpu.device.allocate_memory(&info, None) } {
            Ok(memory) => Self {
                handle,
                memory,
                device: 0,
                host,
                quick_to_read: true,
            }
            .finish(gpu, false),
            Err(result) => {
                // SAFETY: nobody knows the buffer.
                unsafe { gpu.device.destroy_buffer(handle, None) };
                Err(failed("vkAllocateMemory (import)")(result))
            }
        }
    }

    /// Binds, maps and asks for the address.
    fn finish(mut self, gpu: &Gpu, map: bool) -> Result<Self, VulkanError> {
        // SAFETY: buffer and memory were made for each other, and nobody else knows them.
        let done = unsafe {
            gpu.device
                .bind_buffer_memory(self.handle, self.memory, 0)
                .and_then(|()| {
                    if map {
                        let (whole, none) = (vk::WHOLE_SIZE, vk::MemoryMapFlags::empty());
                        self.host = gpu.device.map_memory(self.memory, 0, whole, none)?.cast();
                        self.host.expose_provenance();
                    }
                    Ok(())
                })
        };
        if let Err(result) = done {
            // SAFETY: nobody else knows it.
            unsafe { self.destroy(gpu) };
            let call = "vkBindBufferMemory or vkMapMemory";
            return Err(VulkanError::Call { call, result });
        }
        let info = vk::BufferDeviceAddressInfo::default().buffer(self.handle);
        // SAFETY: the buffer was made for this, and is bound.
        self.device = unsafe { gpu.device.get_buffer_device_address(&info) };
        Ok(self)
    }

    /// Gives it back.
    ///
    /// # Safety
    /// Neither host nor device uses it from now on, and nobody calls this again.
    pub(crate) unsafe fn destroy(&self, gpu: &Gpu) {
        // SAFETY: the caller's contract.
        unsafe {
            gpu.device.destroy_buffer(self.handle, None);
            gpu.device.free_memory(self.memory, None);
        }
    }
}

fn create(gpu: &Gpu, size: u64, import: bool, purpose: Use) -> Result<vk::Buffer, VulkanError> {
    let families = [gpu.compute.family, gpu.copies.family];
    let mut external = vk::ExternalMemoryBufferCreateInfo::default()
        .handle_types(vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT);
    let mut info = vk::BufferCreateInfo::default().size(size).usage(USAGE);
    if families[0] != families[1] {
        info = info
            .sharing_mode(vk::SharingMode::CONCURRENT)
            .queue_family_indices(&families);
    }
    if import {
        info = info.push_next(&mut external);
    }
    // SAFETY: the structure is complete.
    unsafe { gpu.device.create_buffer(&info, None) }.map_err(|_| out_of_memory(gpu, size, purpose))
}

fn out_of_memory(gpu: &Gpu, size: u64, purpose: Use) -> VulkanError {
    VulkanError::OutOfMemory {
        device: gpu.name().to_owned(),
        what: purpose.name(),
        size: ByteCount::new(size),
    }
}
