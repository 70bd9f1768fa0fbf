//! A Vulkan driver (ICD) of one device that lacks what it is told to, so that tests can
//! show what is said of devices that cannot be used. Nothing can be done with that device
//! but asking what it is.
//!
//! The environment variable [`LACKS`] names what it lacks: a feature by its Vulkan name,
//! `queue` (for compute kernels), `1.2` (it knows Vulkan 1.1 only), or `device` (there is
//! none). It cannot be opened in any case: it is lost then.
//!
//! What a driver has to export: Khronos, "Architecture of the Vulkan Loader Interfaces",
//! LoaderDriverInterface.md.
//!
//! ```
//! let manifest = hmm_mock_icd::manifest("/somewhere/libhmm_mock_icd.so");
//! assert!(manifest.contains("\"library_path\": \"/somewhere/libhmm_mock_icd.so\""));
//! ```

use std::ffi::{CStr, c_char};
use std::mem::transmute;
use std::sync::atomic::AtomicUsize;

use ash::vk;

/// The variable that says what the device lacks.
pub const LACKS: &str = "HMM_MOCK_ICD_LACKS";
/// The device's name.
pub const NAME: &str = "Mock device";

/// The text of a manifest for `VK_DRIVER_FILES`: where the driver's library is.
#[must_use]
pub fn manifest(library: &str) -> String {
    format!(
        "{{\"file_format_version\": \"1.0.0\", \"ICD\": {{\"library_path\": \"{library}\", \
         \"api_version\": \"1.3.0\"}}}}"
    )
}

/// What the loader wants in the first word of an object, which it then takes for itself.
const LOADER_MAGIC: usize = 0x01CD_C0DE;
/// The version of the loader's interface that this driver knows.
const INTERFACE: u32 = 5;

/// There is one of each, for all who ask.
static INSTANCE: AtomicUsize = AtomicUsize::new(LOADER_MAGIC);
static DEVICE: AtomicUsize = AtomicUsize::new(LOADER_MAGIC);

fn lacks(what: &str) -> bool {
    std::env::var(LACKS).is_ok_and(|lacks| lacks == what)
}

fn has(what: &str) -> vk::Bool32 {
    if lacks(what) { vk::FALSE } else { vk::TRUE }
}

/// The version of Vulkan that there is.
fn api() -> u32 {
    if lacks("1.2") {
        vk::API_VERSION_1_1
    } else {
        vk::API_VERSION_1_3
    }
}

/// Agrees with the loader on an interface.
///
/// # Safety
/// `version` leads to the loader's.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn vk_icdNegotiateLoaderICDInterfaceVersion(
    version: *mut u32,
) -> vk::Result {
    // SAFETY: the caller's contract.
    unsafe { *version = (*version).min(INTERFACE) };
    vk::Result::SUCCESS
}

/// Where a function of the driver's is.
///
/// # Safety
/// `name` is a text.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn vk_icdGetInstanceProcAddr(
    _instance: vk::Instance,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: the caller's contract.
    let name = unsafe { CStr::from_ptr(name) };
    macro_rules! function {
        ($function:expr, $ty:ty) => {{
            let function: $ty = $function;
            // SAFETY: the loader calls it as what its name says.
            Some(unsafe { transmute::<$ty, unsafe extern "system" fn()>(function) })
        }};
    }
    match name.to_bytes() {
        b"vkCreateInstance" => function!(create_instance, vk::PFN_vkCreateInstance),
        b"vkDestroyInstance" => function!(destroy_instance, vk::PFN_vkDestroyInstance),
        b"vkEnumerateInstanceVersion" => {
            function!(instance_version, vk::PFN_vkEnumerateInstanceVersion)
        }
        b"vkEnumerateInstanceExtensionProperties" => function!(
            instance_extensions,
            vk::PFN_vkEnumerateInstanceExtensionProperties
        ),
        b"vkEnumeratePhysicalDevices" => {
            function!(physical_devices, vk::PFN_vkEnumeratePhysicalDevices)
        }
        b"vkGetPhysicalDeviceProperties" => {
            function!(properties, vk::PFN_vkGetPhysicalDeviceProperties)
        }
        b"vkGetPhysicalDeviceProperties2" => {
            function!(properties2, vk::PFN_vkGetPhysicalDeviceProperties2)
        }
        b"vkGetPhysicalDeviceFeatures" => function!(features, vk::PFN_vkGetPhysicalDeviceFeatures),
        b"vkGetPhysicalDeviceFeatures2" => {
            function!(features2, vk::PFN_vkGetPhysicalDeviceFeatures2)
        }
        b"vkGetPhysicalDeviceMemoryProperties" => {
            function!(memory, vk::PFN_vkGetPhysicalDeviceMemoryProperties)
        }
        b"vkGetPhysicalDeviceQueueFamilyProperties" => {
            function!(queues, vk::PFN_vkGetPhysicalDeviceQueueFamilyProperties)
        }
        b"vkEnumerateDeviceExtensionProperties" => {
            function!(
                device_extensions,
                vk::PFN_vkEnumerateDeviceExtensionProperties
            )
        }
        b"vkCreateDevice" => function!(create_device, vk::PFN_vkCreateDevice),
        // The loader insists on these, and nobody calls them.
        b"vkGetDeviceProcAddr"
        | b"vkGetPhysicalDeviceFormatProperties"
        | b"vkGetPhysicalDeviceImageFormatProperties"
        | b"vkGetPhysicalDeviceSparseImageFormatProperties" => Some(never),
        _ => None,
    }
}

unsafe extern "system" fn never() {
    std::process::abort();
}

unsafe extern "system" fn create_instance(
    _info: *const vk::InstanceCreateInfo<'_>,
    _allocator: *const vk::AllocationCallbacks<'_>,
    instance: *mut vk::Instance,
) -> vk::Result {
    let object: *const AtomicUsize = &raw const INSTANCE;
    // SAFETY: the caller wants a handle there, which is a pointer.
    unsafe { instance.cast::<*const AtomicUsize>().write(object) };
    vk::Result::SUCCESS
}

unsafe extern "system" fn destroy_instance(
    _instance: vk::Instance,
    _allocator: *const vk::AllocationCallbacks<'_>,
) {
}

unsafe extern "system" fn instance_version(version: *mut u32) -> vk::Result {
    // SAFETY: the caller wants it there.
    unsafe { *version = api() };
    vk::Result::SUCCESS
}

unsafe extern "system" fn instance_extensions(
    _layer: *const c_char,
    count: *mut u32,
    _extensions: *mut vk::ExtensionProperties,
) -> vk::Result {
    // SAFETY: the caller wants their number there.
    unsafe { *count = 0 };
    vk::Result::SUCCESS
}

unsafe extern "system" fn device_extensions(
    _device: vk::PhysicalDevice,
    _layer: *const c_char,
    count: *mut u32,
    _extensions: *mut vk::ExtensionProperties,
) -> vk::Result {
    // SAFETY: as above.
    unsafe { *count = 0 };
    vk::Result::SUCCESS
}

unsafe extern "system" fn physical_devices(
    _instance: vk::Instance,
    count: *mut u32,
    devices: *mut vk::PhysicalDevice,
) -> vk::Result {
    let there = u32::from(!lacks("device"));
    // SAFETY: the caller has room for as many as it says, or asks how many there are.
    unsafe {
        if !devices.is_null() && there.min(*count) == 1 {
            let object: *const AtomicUsize = &raw const DEVICE;
            devices.cast::<*const AtomicUsize>().write(object);
        }
        *count = there;
    }
    vk::Result::SUCCESS
}

unsafe extern "system" fn properties(
    _device: vk::PhysicalDevice,
    properties: *mut vk::PhysicalDeviceProperties,
) {
    let mut own = vk::PhysicalDeviceProperties {
        api_version: api(),
        device_type: vk::PhysicalDeviceType::DISCRETE_GPU,
        ..Default::default()
    };
    own.limits.max_memory_allocation_count = 4096;
    for (to, &byte) in own.device_name.iter_mut().zip(NAME.as_bytes()) {
        *to = byte.cast_signed();
    }
    // SAFETY: the caller wants them there.
    unsafe { *properties = own };
}

unsafe extern "system" fn properties2(
    device: vk::PhysicalDevice,
    all: *mut vk::PhysicalDeviceProperties2<'_>,
) {
    // SAFETY: the caller wants them there, and has chained what else it wants to know.
    unsafe {
        properties(device, &raw mut (*all).properties);
        each(
            (*all).p_next.cast::<vk::BaseOutStructure<'_>>(),
            |structure| {
                if (*structure).s_type == vk::StructureType::PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES {
                    let eleven = structure.cast::<vk::PhysicalDeviceVulkan11Properties<'_>>();
                    (*eleven).max_memory_allocation_size = 1 << 30;
                    (*eleven).subgroup_supported_stages = vk::ShaderStageFlags::COMPUTE;
                    (*eleven).subgroup_supported_operations =
                        vk::SubgroupFeatureFlags::VOTE | vk::SubgroupFeatureFlags::BALLOT;
                }
            },
        );
    }
}

unsafe extern "system" fn features(
    _device: vk::PhysicalDevice,
    features: *mut vk::PhysicalDeviceFeatures,
) {
    // SAFETY: the caller wants them there.
    unsafe {
        *features = vk::PhysicalDeviceFeatures {
            shader_int64: has("shaderInt64"),
            ..Default::default()
        };
    }
}

unsafe extern "system" fn features2(
    device: vk::PhysicalDevice,
    all: *mut vk::PhysicalDeviceFeatures2<'_>,
) {
    // SAFETY: as in `properties2`.
    unsafe {
        features(device, &raw mut (*all).features);
        each(
            (*all).p_next.cast::<vk::BaseOutStructure<'_>>(),
            |structure| {
                if (*structure).s_type == vk::StructureType::PHYSICAL_DEVICE_VULKAN_1_2_FEATURES {
                    let twelve = structure.cast::<vk::PhysicalDeviceVulkan12Features<'_>>();
                    (*twelve).buffer_device_address = has("bufferDeviceAddress");
                    (*twelve).timeline_semaphore = has("timelineSemaphore");
                }
            },
        );
    }
}

/// Visits a chain of structures.
///
/// # Safety
/// It is one.
unsafe fn each(
    first: *mut vk::BaseOutStructure<'_>,
    mut visit: impl FnMut(*mut vk::BaseOutStructure<'_>),
) {
    let mut at = first.cast::<vk::BaseOutStructure<'_>>();
    while !at.is_null() {
        visit(at);
        // SAFETY: the caller's contract.
        at = unsafe { (*at).p_next.cast::<vk::BaseOutStructure<'_>>() };
    }
}

unsafe extern "system" fn memory(
    _device: vk::PhysicalDevice,
    memory: *mut vk::PhysicalDeviceMemoryProperties,
) {
    let mut own = vk::PhysicalDeviceMemoryProperties {
        memory_type_count: 1,
        memory_heap_count: 1,
        ..Default::default()
    };
    own.memory_types[0].property_flags = vk::MemoryPropertyFlags::DEVICE_LOCAL
        | vk::MemoryPropertyFlags::HOST_VISIBLE
        | vk::MemoryPropertyFlags::HOST_COHERENT;
    own.memory_heaps[0] = vk::MemoryHeap {
        size: 1 << 30,
        flags: vk::MemoryHeapFlags::DEVICE_LOCAL,
    };
    // SAFETY: the caller wants it there.
    unsafe { *memory = own };
}

unsafe extern "system" fn queues(
    _device: vk::PhysicalDevice,
    count: *mut u32,
    families: *mut vk::QueueFamilyProperties,
) {
    let flags = if lacks("queue") {
        vk::QueueFlags::TRANSFER
    } else {
        vk::QueueFlags::COMPUTE | vk::QueueFlags::TRANSFER
    };
    // SAFETY: the caller has room for as many as it says, or asks how many there are.
    unsafe {
        if !families.is_null() && *count > 0 {
            *families = vk::QueueFamilyProperties {
                queue_flags: flags,
                queue_count: 1,
                ..Default::default()
            };
        }
        *count = 1;
    }
}

unsafe extern "system" fn create_device(
    _device: vk::PhysicalDevice,
    _info: *const vk::DeviceCreateInfo<'_>,
    _allocator: *const vk::AllocationCallbacks<'_>,
    _made: *mut vk::Device,
) -> vk::Result {
    vk::Result::ERROR_DEVICE_LOST
}
