//! This program's own compute shaders: `.comp` files, compiled by `cargo xtask shaders`, whose
//! `.spv` files are part of the program. The unsafe act is to hand one to a driver.

use hmm::{LaunchVulkanError, Program, ProgramOptions, VulkanDevice, VulkanError, VulkanReport};

/// Takes one of them in.
pub fn load(
    device: &VulkanDevice,
    shader: &'static [u8],
    options: ProgramOptions<'_>,
) -> Result<Program, VulkanError> {
    let words = shader.chunks_exact(4).map(|word| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(word);
        u32::from_le_bytes(bytes)
    });
    let words: Vec<u32> = words.collect();
    // SAFETY: a compiler has made it, and spirv-val has found it valid; it has no arrays
    // of its own, and follows the pointers that it is given.
    unsafe { device.driver().program(&words, options) }
}

/// Runs one of them over the device's own addresses, all of which are there: nothing
/// else works on the memory meanwhile.
pub fn launch_plain(
    program: &Program,
    groups: [u32; 3],
    push_constants: &[u8],
) -> Result<VulkanReport, LaunchVulkanError> {
    // SAFETY: the benchmarks have just brought the memory there, and wait here.
    unsafe { program.launch_plain(groups, push_constants) }
}
