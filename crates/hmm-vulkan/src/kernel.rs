//! Kernels: SPIR-V that was instrumented, as pipelines.

use std::ffi::CStr;
use std::fmt;

use ash::vk;

use crate::device::VulkanDevice;
use crate::footprint::Footprint;
use crate::{MAX_KERNELS, VulkanError};

/// How a kernel finds what a pointer of the program leads to, and what it does about a
/// page that is not there. It says how its code was instrumented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Variant {
    /// An invocation that misses a page logs it and returns; it runs again when the page
    /// is there. For kernels that may begin again until they have written.
    Checked,
    /// An invocation that misses a page logs it and polls until it is there.
    Stall,
    /// The page table is walked, and nothing is checked: everything has to be there.
    Table,
    /// Nothing: addresses are the device's own. Not instrumented.
    Plain,
    /// This is added to each address. The page table is not used, nor waited for.
    Delta(u64),
    /// Each address becomes `base + (address & mask)`. As for `Delta`.
    Masked {
        /// Added.
        base: u64,
        /// The bits of an address that are kept.
        mask: u64,
    },
}

/// A kernel to load: what instrumenting it came to.
#[derive(Clone, Copy, Debug)]
pub struct KernelCode<'a> {
    /// SPIR-V.
    pub words: &'a [u32],
    /// Name of the entry point.
    pub entry: &'a CStr,
    /// Size of a workgroup.
    pub local_size: [u32; 3],
    /// Bytes of push constants that it takes.
    pub push_constant_bytes: u32,
    /// The specialisation constant (64 bits) that becomes the address of the control
    /// block; kernels that use neither table nor log have none.
    pub control_constant: Option<u32>,
    /// How it was instrumented.
    pub variant: Variant,
}

/// A kernel as the driver's thread sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loaded {
    pub(crate) pipeline: Pipeline,
    pub(crate) local_size: [u32; 3],
    pub(crate) push_constant_bytes: u32,
    pub(crate) variant: Variant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: vk::Pipeline,
    pub(crate) layout: vk::PipelineLayout,
}

/// A kernel that a device has loaded. Dropped, it is unloaded.
pub struct Kernel {
    pub(crate) device: &'static VulkanDevice,
    pub(crate) loaded: Loaded,
}

impl Loaded {
    /// Invocations of a workgroup.
    pub(crate) fn invocations(&self) -> u64 {
        self.local_size
            .iter()
            .map(|&size| u64::from(size))
            .product()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let (device, pipeline) = (self.device, self.loaded.pipeline);
        // A device that is closed has unloaded it.
        device.driver().run(move || device.unload(pipeline));
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("loaded", &self.loaded)
            .finish_non_exhaustive()
    }
}

const MAGIC: u32 = 0x0723_0203;

impl VulkanDevice {
    /// Loads a kernel.
    ///
    /// # Safety
    /// The words are valid SPIR-V for this device, and were instrumented as `code` says:
    /// drivers do not check what they are given, and a kernel reaches whatever memory it
    /// names.
    ///
    /// # Errors
    /// [`VulkanError`], when the code is no kernel or the driver refuses it.
    pub unsafe fn load(&'static self, code: &KernelCode<'_>) -> Result<Kernel, VulkanError> {
        let bad = |reason: String| Err(VulkanError::BadKernel { reason });
        let invocations: u64 = code
            .local_size
            .iter()
            .map(|&size| u64::from(size))
            .product();
        let limits = &self.gpu().physical.limits;
        let most = u64::from(limits.max_compute_work_group_invocations);
        if code.words.len() < 5 || code.words[0] != MAGIC {
            return bad("it does not begin as SPIR-V does".to_owned());
        }
        if invocations == 0 || invocations > most {
            return bad(format!(
                "{invocations} invocations in a workgroup; 1 to {most} can be"
            ));
        }
        if code.push_constant_bytes > limits.max_push_constants_size
            || !code.push_constant_bytes.is_multiple_of(4)
        {
            let most = limits.max_push_constants_size;
            let bytes = code.push_constant_bytes;
            return bad(format!(
                "{bytes} bytes of push constants; multiples of 4 up to {most} can be"
            ));
        }
        // Whoever asks waits on its stack, which must not be needed while that may move.
        let mut words = hmm_mem::vec_with_capacity(code.words.len());
        words.extend_from_slice(code.words);
        let code = KernelCode {
            words: &words,
            ..*code
        };
        let made = self.driver().run(|| {
            // It may have had its turn after the device was torn down.
            if self.driver().is_closing() {
                return Err(VulkanError::Lost);
            }
            let before = Footprint::now();
            let made = self.make_pipeline(&code);
            self.exclude_new(&before, true);
            made
        });
        let pipeline = made.unwrap_or(Err(VulkanError::Lost))?;
        Ok(Kernel {
            device: self,
            loaded: Loaded {
                pipeline,
                local_size: code.local_size,
                push_constant_bytes: code.push_constant_bytes,
                variant: code.variant,
            },
        })
    }

    /// On the driver's thread.
    fn make_pipeline(&self, code: &KernelCode<'_>) -> Result<Pipeline, VulkanError> {
        if self.has_given_up() {
            return Err(VulkanError::Lost);
        }
        if self.lock_kernels().len() >= MAX_KERNELS {
            return Err(VulkanError::TooManyKernels);
        }
        let device = &self.gpu().device;
        let failed = |call| move |result| VulkanError::Call { call, result };
        let ranges = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(code.push_constant_bytes)];
        let used = usize::from(code.push_constant_bytes > 0);
        let info = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&ranges[..used]);
        // SAFETY: the structure is complete.
        let layout = unsafe { device.create_pipeline_layout(&info, None) }
            .map_err(failed("vkCreatePipelineLayout"))?;
        let made = self.compile(code, layout);
        match made {
            Ok(pipeline) => {
                let pipeline = Pipeline { pipeline, layout };
                self.lock_kernels().push((pipeline, false));
                Ok(pipeline)
            }
            Err(error) => {
                // SAFETY: nobody knows it.
                unsafe { device.destroy_pipeline_layout(layout, None) };
                Err(error)
            }
        }
    }

    fn compile(
        &self,
        code: &KernelCode<'_>,
        layout: vk::PipelineLayout,
    ) -> Result<vk::Pipeline, VulkanError> {
        let device = &self.gpu().device;
        let info = vk::ShaderModuleCreateInfo::default().code(code.words);
        // SAFETY: the words are SPIR-V, as the caller of `load` says.
        let module = unsafe { device.create_shader_module(&info, None) };
        let module = module.map_err(|result| VulkanError::Call {
            call: "vkCreateShaderModule",
            result,
        })?;
        let address = self.control_address().to_ne_bytes();
        let entries = [vk::SpecializationMapEntry {
            constant_id: code.control_constant.unwrap_or(0),
            offset: 0,
            size: address.len(),
        }];
        let used = usize::from(code.control_constant.is_some());
        let constants = vk::SpecializationInfo::default()
            .map_entries(&entries[..used])
            .data(&address);
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(code.entry)
            .specialization_info(&constants);
        let info = vk::ComputePipelineCreateInfo::default()
            .flags(vk::PipelineCreateFlags::DISPATCH_BASE)
            .stage(stage)
            .layout(layout);
        let none = vk::PipelineCache::null();
        // SAFETY: all that the structure leads to is alive.
        let made = unsafe { device.create_compute_pipelines(none, &[info], None) };
        // SAFETY: a pipeline does not need its module.
        unsafe { device.destroy_shader_module(module, None) };
        match made {
            Ok(pipelines) => Ok(pipelines[0]),
            Err((_, result)) => Err(VulkanError::Call {
                call: "vkCreateComputePipelines",
                result,
            }),
        }
    }

    /// On the driver's thread.
    pub(crate) fn unload(&self, pipeline: Pipeline) {
        if self.has_given_up() {
            return; // a dispatch runs for ever, and drivers wait for its end
        }
        let mut kernels = self.lock_kernels();
        let Some(index) = kernels.iter().position(|&(known, _)| known == pipeline) else {
            return;
        };
        kernels.swap_remove(index);
        // SAFETY: it was in the list, so it is alive; no dispatch runs, as this thread
        // waits for each.
        unsafe {
            let device = &self.gpu().device;
            device.destroy_pipeline(pipeline.pipeline, None);
            device.destroy_pipeline_layout(pipeline.layout, None);
        }
    }
}
