//! This program's own compute shaders: `.comp` files, compiled by `shaders.sh`, whose
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    #[test]
    fn shaders_are_what_their_sources_say() {
        for name in ["demo/walk", "bench/add_up", "bench/chase", "bench/stream"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name);
            let made = format!("hmm-cli-{}.spv", std::process::id());
            let made = std::env::temp_dir().join(made);
            let compiled = Command::new("glslangValidator")
                .args(["--quiet", "-V", "--target-env", "vulkan1.2"])
                .arg(path.with_extension("comp"))
                .arg("-o")
                .arg(&made)
                .status();
            let Ok(status) = compiled else {
                eprintln!("SKIPPED shaders: no glslangValidator (Debian: glslang-tools)");
                return;
            };
            assert!(status.success(), "{name}.comp does not compile");
            let new = std::fs::read(&made).expect("what was compiled");
            let _ = std::fs::remove_file(&made);
            let old = std::fs::read(path.with_extension("spv")).expect("the shader");
            // Word 2 is the compiler's version: another one may choose other ids.
            if old[8..12] != new[8..12] {
                eprintln!("SKIPPED shaders: compiled by another version of glslang");
                return;
            }
            assert!(
                old == new,
                "{name}.spv is not what {name}.comp says: run shaders.sh"
            );
        }
    }
}
