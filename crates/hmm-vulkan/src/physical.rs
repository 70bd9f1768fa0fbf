//! The devices that there are, and what they can do.

use std::fmt;

use ash::vk;
use hmm_types::{ByteCount, PAGE_SIZE};

use crate::VulkanError;
use crate::imports::MAX_IMPORTS;
use crate::instance::{API, API_NAME, Instance, version_text};
use crate::loaded::on_loader;

/// Why kernels cannot wait for pages that come by the kernels' own queue.
pub(crate) const ONE_QUEUE: &str =
    "it has one queue: a page's copy would wait for the kernel that waits for it";

/// Which device to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<'a> {
    /// The first one that can be used; processors come last.
    First,
    /// The one with this number in [`list`].
    Index(usize),
    /// The first one whose name contains this, in any case.
    Name(&'a str),
}

impl fmt::Display for Choice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("can be used"),
            Self::Index(index) => write!(f, "has number {index}"),
            Self::Name(name) => write!(f, "has `{name}` in its name"),
        }
    }
}

/// What a Vulkan device is, for people.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its driver, with the driver's version.
    pub driver: String,
    /// The Vulkan version that it knows.
    pub api: String,
    /// Whether it is this machine's processor.
    pub is_cpu: bool,
    /// Size of its largest heap of device-local memory.
    pub memory: ByteCount,
    /// Whether the CPU can use that memory in place.
    pub host_visible: bool,
    /// Whether it can use memory of the process (`VK_EXT_external_memory_host`).
    pub imports_host: bool,
    /// What the address and the size of such memory must be a multiple of.
    pub import_alignment: ByteCount,
    /// Whether copies have a queue beside the kernels'.
    pub transfer_queue: bool,
    /// Why kernels cannot wait for a page while they run; `None` when they can.
    pub no_stall: Option<&'static str>,
    /// Why it cannot be used; `None` when it can.
    pub problem: Option<VulkanError>,
}

/// A queue family, and a queue of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueChoice {
    pub(crate) family: u32,
    pub(crate) index: u32,
}

/// A device with what opening it needs.
#[derive(Clone)]
pub(crate) struct Physical {
    pub(crate) handle: vk::PhysicalDevice,
    pub(crate) description: Description,
    pub(crate) memory: vk::PhysicalDeviceMemoryProperties,
    pub(crate) limits: vk::PhysicalDeviceLimits,
    pub(crate) largest_allocation: u64,
    pub(crate) compute: QueueChoice,
    /// The same as `compute` when there is no other.
    pub(crate) copies: QueueChoice,
}

impl Description {
    /// Whether it can import single pages of the process.
    #[must_use]
    pub fn imports_pages(&self) -> bool {
        self.imports_host && self.import_alignment <= ByteCount::new(PAGE_SIZE)
    }
}

impl Physical {
    /// How many imports there may be at a time: drivers count allocations.
    pub(crate) fn most_imports(&self) -> usize {
        let most = self.limits.max_memory_allocation_count / 2;
        (most as usize).clamp(1, MAX_IMPORTS)
    }
}

/// The Vulkan devices of this machine, usable or not.
///
/// # Errors
/// [`VulkanError`], when there is no Vulkan at all.
pub fn list() -> Result<Vec<Description>, VulkanError> {
    on_loader(|| {
        let instance = Instance::open()?;
        let all = all(&instance)?;
        Ok(all.into_iter().map(|one| one.description).collect())
    })?
}

pub(crate) fn all(instance: &Instance) -> Result<Vec<Physical>, VulkanError> {
    // SAFETY: a query on a living instance.
    let handles = unsafe { instance.raw.enumerate_physical_devices() };
    let handles = match handles {
        Ok(handles) => handles,
        // What the loader says where drivers are installed, and none has a device.
        Err(vk::Result::ERROR_INITIALIZATION_FAILED) => Vec::new(),
        Err(result) => {
            return Err(VulkanError::Call {
                call: "vkEnumeratePhysicalDevices",
                result,
            });
        }
    };
    let all = handles.into_iter();
    Ok(all.map(|handle| examine(instance, handle)).collect())
}

pub(crate) fn choose(instance: &Instance, choice: Choice<'_>) -> Result<Physical, VulkanError> {
    let all = all(instance)?;
    let found: Vec<String> = all.iter().map(|one| one.description.name.clone()).collect();
    let chosen = match choice {
        Choice::Index(index) => all.into_iter().nth(index),
        Choice::Name(name) => {
            let name = name.to_lowercase();
            let mut all = all.into_iter();
            all.find(|one| one.description.name.to_lowercase().contains(&name))
        }
        Choice::First => {
            let rank = |one: &Physical| (one.description.problem.is_some(), one.description.is_cpu);
            all.into_iter().min_by_key(rank)
        }
    };
    let chosen = chosen.ok_or_else(|| VulkanError::NoDevice {
        wanted: choice.to_string(),
        found,
    })?;
    match chosen.description.problem {
        None => Ok(chosen),
        Some(problem) => Err(problem),
    }
}

fn text(words: Result<&std::ffi::CStr, std::ffi::FromBytesUntilNulError>) -> String {
    words.map_or_else(
        |_| "?".to_owned(),
        |words| words.to_string_lossy().into_owned(),
    )
}

fn examine(instance: &Instance, handle: vk::PhysicalDevice) -> Physical {
    // SAFETY: queries on a device of this instance.
    let (basic, memory, families, extensions) = unsafe {
        (
            instance.raw.get_physical_device_properties(handle),
            instance.raw.get_physical_device_memory_properties(handle),
            instance
                .raw
                .get_physical_device_queue_family_properties(handle),
            instance
                .raw
                .enumerate_device_extension_properties(handle)
                .unwrap_or_default(),
        )
    };
    let name = text(basic.device_name_as_c_str());
    let is_cpu = basic.device_type == vk::PhysicalDeviceType::CPU;
    let compute = compute_queue(&families);
    let copies = compute.map(|compute| copy_queue(&families, compute));
    let mut physical = Physical {
        handle,
        description: Description {
            name: name.clone(),
            driver: "?".to_owned(),
            api: version_text(basic.api_version),
            is_cpu,
            memory: ByteCount::new(local_heap(&memory)),
            host_visible: local_and_visible(&memory),
            imports_host: extensions.iter().any(|extension| {
                extension.extension_name_as_c_str() == Ok(ash::ext::external_memory_host::NAME)
            }),
            import_alignment: ByteCount::new(PAGE_SIZE),
            transfer_queue: copies.is_some() && copies != compute,
            no_stall: None,
            problem: None,
        },
        memory,
        limits: basic.limits,
        largest_allocation: 1 << 30,
        compute: compute.unwrap_or(QueueChoice {
            family: 0,
            index: 0,
        }),
        copies: copies.unwrap_or(QueueChoice {
            family: 0,
            index: 0,
        }),
    };
    if basic.api_version < API {
        physical.description.problem = Some(VulkanError::ApiTooOld {
            what: name,
            found: version_text(basic.api_version),
            needed: API_NAME,
        });
        return physical;
    }
    let missing = compute.is_none().then_some("a queue for compute kernels");
    examine_modern(instance, &mut physical, missing);
    physical
}

/// What only a device of Vulkan 1.2 can be asked.
fn examine_modern(instance: &Instance, physical: &mut Physical, missing: Option<&'static str>) {
    let mut eleven = vk::PhysicalDeviceVulkan11Properties::default();
    let mut twelve = vk::PhysicalDeviceVulkan12Properties::default();
    let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceProperties2::default()
        .push_next(&mut eleven)
        .push_next(&mut twelve);
    if physical.description.imports_host {
        properties = properties.push_next(&mut host);
    }
    let mut features12 = vk::PhysicalDeviceVulkan12Features::default();
    let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut features12);
    // SAFETY: queries that fill the structures chained to them.
    unsafe {
        let raw = &instance.raw;
        raw.get_physical_device_properties2(physical.handle, &mut properties);
        raw.get_physical_device_features2(physical.handle, &mut features);
    }
    let int64 = features.features.shader_int64 == vk::TRUE;
    let description = &mut physical.description;
    let info = text(twelve.driver_info_as_c_str());
    description.driver = format!("{} {info}", text(twelve.driver_name_as_c_str()));
    if description.imports_host {
        let alignment = host.min_imported_host_pointer_alignment;
        description.import_alignment = ByteCount::new(alignment);
    }
    physical.largest_allocation = eleven.max_memory_allocation_size;
    let vote = vk::SubgroupFeatureFlags::VOTE | vk::SubgroupFeatureFlags::BALLOT;
    if !eleven
        .subgroup_supported_stages
        .contains(vk::ShaderStageFlags::COMPUTE)
        || !eleven.subgroup_supported_operations.contains(vote)
    {
        description.no_stall = Some("its subgroups cannot vote");
    } else if !(description.transfer_queue || description.is_cpu && description.host_visible) {
        description.no_stall = Some(ONE_QUEUE);
    }
    let features = [
        (
            features12.buffer_device_address == vk::TRUE,
            "bufferDeviceAddress",
        ),
        (
            features12.timeline_semaphore == vk::TRUE,
            "timelineSemaphore",
        ),
        (int64, "shaderInt64"),
    ];
    let missing = missing.or_else(|| {
        let missing = features.iter().find(|(there, _)| !there);
        missing.map(|&(_, feature)| feature)
    });
    if twelve.driver_id == vk::DriverId::MESA_LLVMPIPE && mesa_major(&info) < Some(23) {
        description.problem = Some(VulkanError::BadDriver {
            device: description.name.clone(),
            driver: description.driver.clone(),
            reason: "before Mesa 23 it ends loops silently after 65,535 iterations; Debian 12 has a \
                     newer one in its backports",
        });
    } else if let Some(feature) = missing {
        description.problem = Some(VulkanError::Feature {
            device: description.name.clone(),
            feature,
        });
    }
}

/// From `Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)`; `None` when it is not to be found, which
/// is taken for too old.
fn mesa_major(info: &str) -> Option<u32> {
    let version = info.strip_prefix("Mesa ")?;
    version.split('.').next()?.parse().ok()
}

fn families_with(
    families: &[vk::QueueFamilyProperties],
    wanted: vk::QueueFlags,
    unwanted: vk::QueueFlags,
) -> Option<u32> {
    let fits = |family: &vk::QueueFamilyProperties| {
        family.queue_flags.contains(wanted)
            && !family.queue_flags.intersects(unwanted)
            && family.queue_count > 0
    };
    let index = families.iter().position(fits)?;
    u32::try_from(index).ok()
}

fn compute_queue(families: &[vk::QueueFamilyProperties]) -> Option<QueueChoice> {
    let compute = vk::QueueFlags::COMPUTE;
    let family = families_with(families, compute, vk::QueueFlags::GRAPHICS)
        .or_else(|| families_with(families, compute, vk::QueueFlags::empty()))?;
    Some(QueueChoice { family, index: 0 })
}

/// A queue for copies alone, a second one for kernels, or the kernels' own.
fn copy_queue(families: &[vk::QueueFamilyProperties], compute: QueueChoice) -> QueueChoice {
    let others = vk::QueueFlags::COMPUTE | vk::QueueFlags::GRAPHICS;
    if let Some(family) = families_with(families, vk::QueueFlags::TRANSFER, others) {
        return QueueChoice { family, index: 0 };
    }
    if families[compute.family as usize].queue_count > 1 {
        return QueueChoice {
            family: compute.family,
            index: 1,
        };
    }
    compute
}

fn local_heap(memory: &vk::PhysicalDeviceMemoryProperties) -> u64 {
    let heaps = memory.memory_heaps_as_slice().iter();
    let local = heaps.filter(|heap| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
    local.map(|heap| heap.size).max().unwrap_or(0)
}

fn local_and_visible(memory: &vk::PhysicalDeviceMemoryProperties) -> bool {
    use vk::MemoryPropertyFlags as Flags;
    let both = Flags::DEVICE_LOCAL | Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
    let largest = local_heap(memory);
    memory.memory_types_as_slice().iter().any(|kind| {
        kind.property_flags.contains(both)
            && memory.memory_heaps[kind.heap_index as usize].size == largest
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_mesa_are_read() {
        assert_eq!(mesa_major("Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)"), Some(25));
        assert_eq!(mesa_major("Mesa 22.3.6 (LLVM 15.0.6)"), Some(22));
        // Unknown counts as too old.
        assert!(mesa_major("something else") < Some(23));
    }

    #[test]
    fn a_queue_of_its_own_is_preferred_for_copies() {
        let family = |flags, count| vk::QueueFamilyProperties {
            queue_flags: flags,
            queue_count: count,
            ..Default::default()
        };
        let (graphics, compute) = (vk::QueueFlags::GRAPHICS, vk::QueueFlags::COMPUTE);
        let transfer = vk::QueueFlags::TRANSFER;
        let all = [
            family(graphics | compute | transfer, 1),
            family(compute | transfer, 4),
            family(transfer, 2),
        ];
        let of = |families: &[_]| {
            let compute = compute_queue(families).unwrap();
            let copies = copy_queue(families, compute);
            [compute.family, compute.index, copies.family, copies.index]
        };
        assert_eq!(of(&all), [1, 0, 2, 0]);
        assert_eq!(of(&all[..2]), [1, 0, 1, 1]);
        assert_eq!(of(&all[..1]), [0, 0, 0, 0]);
        assert!(compute_queue(&all[2..]).is_none());
    }
}
