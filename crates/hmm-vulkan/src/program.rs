//! Programs: SPIR-V as its author wrote it, with plain pointers of the process.
//!
//! The pass of `hmm-spirv` makes a kernel of it for each way to find what a pointer leads
//! to; each is made when it is needed first. A launch that names what it uses runs
//! without checks, as nothing of that leaves meanwhile: by adding a number where all
//! frames are at one distance from their pages, and else by the page table. A launch that
//! names nothing demands pages as it meets them.

use std::ffi::CString;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use hmm_spirv::{Capability, EntryPoint, KernelInfo, Options};
use hmm_types::{Access, PageRange};

use crate::kernel::{Kernel, KernelCode, Loaded, Variant};
use crate::launch::Near;
use crate::stats::LaunchReport;
use crate::{LaunchError, VulkanDevice, VulkanError};

/// The version that belongs to Vulkan 1.2, as the second word of a module has it.
const NEWEST_SPIRV: u32 = 0x0001_0500;

/// What a launch does about a page that it meets and that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Demand {
    /// Repeats where that is right, and waits elsewhere.
    #[default]
    Fitting,
    /// Invocations that miss a page end, and begin again when it is there.
    Repeat,
    /// Invocations that miss a page wait for it.
    Wait,
}

/// What the author of a program knows of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramOptions<'a> {
    /// The entry point; needed where the module has several.
    pub entry: Option<&'a str>,
    /// An invocation that ends early may begin again even after it has written: what
    /// it does twice comes to the same.
    pub idempotent: bool,
    /// What to do about missing pages.
    pub demand: Demand,
}

/// A program that a device can run. Dropped, its kernels are unloaded.
pub struct Program {
    device: &'static VulkanDevice,
    words: Vec<u32>,
    entry: EntryPoint,
    name: CString,
    info: KernelInfo,
    demand: Result<Variant, String>,
    control_constant: u32,
    kernels: Mutex<Vec<Kernel>>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program")
            .field("entry", &self.entry)
            .field("demand", &self.demand)
            .finish_non_exhaustive()
    }
}

impl VulkanDevice {
    /// Takes a compute shader in: SPIR-V of Vulkan 1.2 whose pointers to the program's
    /// memory are of the class PhysicalStorageBuffer (in GLSL, buffer references).
    ///
    /// # Safety
    /// The words are valid SPIR-V: drivers do not check what they are given. What the
    /// kernel does besides following pointers (to index arrays of its own, say) is in
    /// bounds. Where a launch names what it uses, it uses nothing else.
    ///
    /// # Errors
    /// [`VulkanError::BadKernel`], with what of the module cannot be seen through;
    /// [`VulkanError::Feature`], what it needs and the device has not.
    pub unsafe fn program(
        &'static self,
        words: &[u32],
        options: ProgramOptions<'_>,
    ) -> Result<Program, VulkanError> {
        let bad = |reason: String| VulkanError::BadKernel { reason };
        let info = hmm_spirv::analyse(words).map_err(|error| bad(error.to_string()))?;
        // No device of Vulkan 1.2 takes a newer one, whether its driver says so or not.
        if let Some(&version) = words.get(1)
            && version > NEWEST_SPIRV
        {
            let minor = version >> 8 & 0xff;
            return Err(bad(format!(
                "it is SPIR-V 1.{minor}, and the device takes up to 1.5; compile it for Vulkan 1.2"
            )));
        }
        self.check_capabilities(&info)?;
        let entry = find_entry(&info, options.entry).map_err(bad)?.clone();
        if entry.local_size_spec_ids.iter().any(Option::is_some) {
            return Err(bad(
                "the size of its workgroups is a specialisation constant; make it a plain one"
                    .to_owned(),
            ));
        }
        let name = CString::new(entry.name.as_str()).map_err(|error| bad(error.to_string()))?;
        let no_stall = self.describe().no_stall;
        Ok(Program {
            device: self,
            words: words.to_vec(),
            name,
            demand: demand(&info, options, no_stall),
            control_constant: (0..).find(|id| !info.spec_ids.contains(id)).unwrap_or(0),
            entry,
            info,
            kernels: Mutex::new(Vec::new()),
        })
    }

    fn check_capabilities(&self, info: &KernelInfo) -> Result<(), VulkanError> {
        let missing = info
            .capabilities
            .iter()
            .find_map(|&capability| self.gpu().missing(capability));
        missing.map_or(Ok(()), |feature| {
            Err(VulkanError::Feature {
                device: self.gpu().name().to_owned(),
                feature,
            })
        })
    }
}

fn find_entry<'a>(info: &'a KernelInfo, name: Option<&str>) -> Result<&'a EntryPoint, String> {
    let names = || {
        let all: Vec<&str> = info
            .entry_points
            .iter()
            .map(|it| it.name.as_str())
            .collect();
        all.join(", ")
    };
    match (name, &info.entry_points[..]) {
        (None, [one]) => Ok(one),
        (None, _) => Err(format!(
            "it has several entry points ({}); name one",
            names()
        )),
        (Some(name), all) => {
            let found = all.iter().find(|entry| entry.name == name);
            found.ok_or_else(|| format!("it has no entry point `{name}`, but {}", names()))
        }
    }
}

/// What the program is to do about missing pages, or why it cannot do anything.
fn demand(
    info: &KernelInfo,
    options: ProgramOptions<'_>,
    no_stall: Option<&'static str>,
) -> Result<Variant, String> {
    let no_repeat = if info.control_barriers {
        Some("its invocations wait for each other (a control barrier)")
    } else if info.subgroup_operations {
        Some("its invocations exchange values (subgroup operations)")
    } else if info.may_fault_after_write && !options.idempotent {
        Some(
            "an invocation may miss a page after it has written, and nobody says that it is idempotent",
        )
    } else {
        None
    };
    let repeat = no_repeat.map_or(Ok(Variant::Checked), Err);
    let wait = no_stall.map_or(Ok(Variant::Stall), Err);
    let chosen = match options.demand {
        Demand::Repeat => repeat.map_err(|why| format!("it cannot begin again: {why}")),
        Demand::Wait => wait.map_err(|why| format!("the device cannot wait for a page: {why}")),
        Demand::Fitting => match (repeat, wait) {
            (Ok(variant), _) | (_, Ok(variant)) => Ok(variant),
            (Err(again), Err(wait)) => Err(format!(
                "it cannot begin again ({again}), and the device cannot wait for a page ({wait})"
            )),
        },
    };
    chosen.map_err(|why| format!("{why}; name all that the launch uses"))
}

impl Program {
    /// What the pass has found out about it.
    #[must_use]
    pub const fn info(&self) -> &KernelInfo {
        &self.info
    }

    /// Size of its workgroups.
    #[must_use]
    pub const fn local_size(&self) -> [u32; 3] {
        self.entry.local_size
    }

    /// What it does about pages that are missing, or why a launch has to name all that it
    /// uses.
    ///
    /// # Errors
    /// The reason.
    pub fn on_demand(&self) -> Result<Variant, &str> {
        self.demand.as_ref().copied().map_err(String::as_str)
    }

    /// Runs it over a grid of `groups` workgroups, and waits until that is done.
    ///
    /// `uses` names all memory that it follows pointers to, as whole pages: that is
    /// brought to the device and stays there until the end, so nothing is checked. With
    /// nothing named, pages come when they are missed.
    ///
    /// # Errors
    /// [`LaunchError`]: the first failure ends the launch. Workgroups may have run, wholly
    /// or up to an access that did not happen.
    pub fn launch(
        &self,
        groups: [u32; 3],
        push_constants: &[u8],
        uses: &[(PageRange, Access)],
    ) -> Result<LaunchReport, LaunchError> {
        let not_made = |error| self.not_made(error);
        if uses.is_empty() {
            let variant = self
                .demand
                .clone()
                .map_err(|reason| LaunchError::NotMade { reason })?;
            let kernel = self.kernel(variant).map_err(not_made)?;
            return self.device.launch_loaded(
                kernel,
                Near::default(),
                groups,
                push_constants,
                uses,
            );
        }
        let by_table = self.kernel(Variant::Table).map_err(not_made)?;
        let by_distance = self.kernel(Variant::Delta(0)).map_err(not_made)?;
        let as_it_is = if self.device.has_identity() {
            Some(self.kernel(Variant::Plain).map_err(not_made)?)
        } else {
            None
        };
        let near = Near {
            by_distance: Some(by_distance),
            as_it_is,
        };
        self.device
            .launch_loaded(by_table, near, groups, push_constants, uses)
    }

    /// Runs it as it was written, over pointers that are the device's own addresses
    /// already ([`LaunchReport::distance`] tells them): what translation is measured
    /// against.
    ///
    /// # Safety
    /// All that it follows pointers to is there, and stays until the end.
    ///
    /// # Errors
    /// As [`Program::launch`].
    pub unsafe fn launch_plain(
        &self,
        groups: [u32; 3],
        push_constants: &[u8],
    ) -> Result<LaunchReport, LaunchError> {
        let kernel = self
            .kernel(Variant::Plain)
            .map_err(|error| self.not_made(error))?;
        self.device
            .launch_loaded(kernel, Near::default(), groups, push_constants, &[])
    }

    /// The kernel for a variant, which stays loaded as long as the program.
    fn kernel(&self, variant: Variant) -> Result<Loaded, VulkanError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.iter().find(|it| it.loaded.variant == variant) {
            return Ok(kernel.loaded);
        }
        let made = self.words_for(variant)?;
        let code = KernelCode {
            words: made.as_ref().unwrap_or(&self.words),
            entry: &self.name,
            local_size: self.entry.local_size,
            push_constant_bytes: self.info.push_constant_bytes,
            control_constant: made.is_some().then_some(self.control_constant),
            variant,
        };
        // SAFETY: the words were valid, as whoever made the program says, and the pass
        // has kept them so, for this variant.
        let kernel = unsafe { self.device.load(&code) }?;
        let loaded = kernel.loaded;
        kernels.push(kernel);
        Ok(loaded)
    }
}

impl Program {
    /// Why there is no kernel.
    fn not_made(&self, error: VulkanError) -> LaunchError {
        match error {
            VulkanError::Lost if self.device.driver().is_closing() => LaunchError::Closed,
            VulkanError::Lost => LaunchError::Lost,
            error => LaunchError::NotMade {
                reason: error.to_string(),
            },
        }
    }

    /// What the pass makes of it; `None` where nothing is translated.
    fn words_for(&self, variant: Variant) -> Result<Option<Vec<u32>>, VulkanError> {
        let variant = match variant {
            Variant::Plain => return Ok(None),
            Variant::Checked => hmm_spirv::Variant::Checked,
            Variant::Stall => hmm_spirv::Variant::Stall,
            Variant::Table => hmm_spirv::Variant::Table,
            Variant::Delta(_) => hmm_spirv::Variant::Delta,
            Variant::Masked { .. } => hmm_spirv::Variant::Masked,
        };
        let options = Options {
            variant,
            control_spec_id: self.control_constant,
        };
        let made = hmm_spirv::instrument(&self.words, options);
        let made = made.map_err(|error| VulkanError::BadKernel {
            reason: error.to_string(),
        })?;
        Ok(Some(made.words))
    }
}

impl crate::gpu::Gpu {
    /// The feature that a capability needs and the device has not, by Vulkan's name.
    fn missing(&self, capability: Capability) -> Option<&'static str> {
        let features = &self.features;
        let (there, name) = match capability {
            Capability::Int64 => (features.basic.shader_int64, "shaderInt64"),
            Capability::Int16 => (features.basic.shader_int16, "shaderInt16"),
            Capability::Float64 => (features.basic.shader_float64, "shaderFloat64"),
            Capability::Int8 => (features.twelve.shader_int8, "shaderInt8"),
            Capability::Float16 => (features.twelve.shader_float16, "shaderFloat16"),
            Capability::Int64Atomics => (
                features.twelve.shader_buffer_int64_atomics,
                "shaderBufferInt64Atomics",
            ),
            Capability::StorageBuffer8BitAccess => (
                features.twelve.storage_buffer8_bit_access,
                "storageBuffer8BitAccess",
            ),
            Capability::StorageBuffer16BitAccess => (
                features.eleven.storage_buffer16_bit_access,
                "storageBuffer16BitAccess",
            ),
            // Compilers declare it for arrays behind pointers too.
            Capability::RuntimeDescriptorArray => (
                features.twelve.runtime_descriptor_array,
                "runtimeDescriptorArray",
            ),
            Capability::VulkanMemoryModel => {
                (features.twelve.vulkan_memory_model, "vulkanMemoryModel")
            }
            // The pass refuses what it does not know, and the rest is always there.
            _ => return None,
        };
        (there == ash::vk::FALSE).then_some(name)
    }
}
