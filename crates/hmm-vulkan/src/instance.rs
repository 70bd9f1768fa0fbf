//! The loader, an instance, and what the validation layer says.

use std::ffi::{CStr, c_void};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use ash::{Entry, vk};

use crate::VulkanError;
use crate::loaded::Objects;

/// The Vulkan version that is needed: buffer device addresses and timelines are in it.
pub(crate) const API: u32 = vk::API_VERSION_1_2;
pub(crate) const API_NAME: &str = "1.2";
const VALIDATION: &CStr = c"VK_LAYER_KHRONOS_validation";
/// Set (and not to 0), calls are checked by the validation layer.
const SWITCH: &str = "HMM_VULKAN_VALIDATION";

/// What the validation layer has complained about, in this process.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What Vulkan's validation layer has complained about since the process began;
/// `None` where it was not asked for with `HMM_VULKAN_VALIDATION=1`. For tests, which
/// assert that it is empty.
#[must_use]
pub fn validation_complaints() -> Option<Vec<String>> {
    let complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    wants_validation().then(|| complaints.clone())
}

fn wants_validation() -> bool {
    std::env::var_os(SWITCH).is_some_and(|value| !value.is_empty() && value != "0")
}

/// Vulkan in this process.
pub(crate) struct Instance {
    pub(crate) raw: ash::Instance,
    messenger: Option<(ash::ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    /// Keeps the library loaded.
    _entry: Entry,
}

impl Instance {
    pub(crate) fn open() -> Result<Self, VulkanError> {
        let before = Objects::now();
        let opened = Self::open_loaded();
        before.keep_new();
        opened
    }

    fn open_loaded() -> Result<Self, VulkanError> {
        // SAFETY: the loader is the system's library of that name, which may run its
        // initialisers; it stays loaded as long as the entry exists.
        let entry = unsafe { Entry::load() }.map_err(|error| VulkanError::NoLoader {
            reason: error.to_string(),
        })?;
        // SAFETY: a query without arguments.
        let version = unsafe { entry.try_enumerate_instance_version() };
        let version = version.ok().flatten().unwrap_or(vk::API_VERSION_1_0);
        if version < API {
            return Err(VulkanError::ApiTooOld {
                what: "the Vulkan loader".to_owned(),
                found: version_text(version),
                needed: API_NAME,
            });
        }
        let validation = wants_validation();
        if validation && !has_layer(&entry) {
            return Err(VulkanError::NoValidation);
        }
        let application = vk::ApplicationInfo::default()
            .application_name(c"hmm")
            .engine_name(c"hmm")
            .api_version(API);
        let layers = [VALIDATION.as_ptr()];
        let extensions = [ash::ext::debug_utils::NAME.as_ptr()];
        let mut messenger = messenger_info();
        let mut info = vk::InstanceCreateInfo::default().application_info(&application);
        if validation {
            info = info
                .enabled_layer_names(&layers)
                .enabled_extension_names(&extensions)
                .push_next(&mut messenger);
        }
        // SAFETY: all that the structure leads to is alive.
        let raw = unsafe { entry.create_instance(&info, None) }.map_err(|result| match result {
            // The loader's way to say that no driver could be loaded.
            vk::Result::ERROR_INCOMPATIBLE_DRIVER => VulkanError::NoDevice {
                wanted: "can be used, as no driver is installed".to_owned(),
                found: Vec::new(),
            },
            result => VulkanError::Call {
                call: "vkCreateInstance",
                result,
            },
        })?;
        let messenger = validation.then(|| {
            let utils = ash::ext::debug_utils::Instance::new(&entry, &raw);
            // SAFETY: the callback is a function of this crate.
            let made = unsafe { utils.create_debug_utils_messenger(&messenger_info(), None) };
            made.ok().map(|messenger| (utils, messenger))
        });
        Ok(Self {
            raw,
            messenger: messenger.flatten(),
            _entry: entry,
        })
    }
}

impl Instance {
    /// Gives it back.
    ///
    /// # Safety
    /// What was made of it is destroyed, nobody uses it from now on, and nobody calls
    /// this again.
    pub(crate) unsafe fn destroy(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            if let Some((utils, messenger)) = &self.messenger {
                utils.destroy_debug_utils_messenger(*messenger, None);
            }
            self.raw.destroy_instance(None);
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: whoever owns this has destroyed what was made of it, and drops it once.
        unsafe { self.destroy() };
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("validation", &self.messenger.is_some())
            .finish_non_exhaustive()
    }
}

fn has_layer(entry: &Entry) -> bool {
    // SAFETY: a query without arguments.
    let layers = unsafe { entry.enumerate_instance_layer_properties() }.unwrap_or_default();
    layers
        .iter()
        .any(|layer| layer.layer_name_as_c_str() == Ok(VALIDATION))
}

fn messenger_info() -> vk::DebugUtilsMessengerCreateInfoEXT<'static> {
    use vk::{
        DebugUtilsMessageSeverityFlagsEXT as Severity, DebugUtilsMessageTypeFlagsEXT as Type,
    };
    vk::DebugUtilsMessengerCreateInfoEXT::default()
        .message_severity(Severity::WARNING | Severity::ERROR)
        .message_type(Type::VALIDATION)
        .pfn_user_callback(Some(complain))
}

unsafe extern "system" fn complain(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _kind: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    _user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the layer passes a structure that is alive during the call.
    let text = unsafe { data.as_ref().and_then(|data| data.message_as_c_str()) };
    let text = text.map_or_else(String::new, |text| text.to_string_lossy().into_owned());
    let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    complaints.push(text);
    vk::FALSE
}

pub(crate) fn version_text(version: u32) -> String {
    format!(
        "{}.{}.{}",
        vk::api_version_major(version),
        vk::api_version_minor(version),
        vk::api_version_patch(version)
    )
}
