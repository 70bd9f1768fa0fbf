//! What the checks need from the system beyond a Rust toolchain.

use std::env;

use anyhow::{Result, bail};

use crate::process::Invocation;

/// A program, and the Debian package that brings it.
#[derive(Debug)]
pub struct Package {
    /// Its name, or the path of another file of the package.
    pub program: &'static str,
    pub debian: &'static str,
    pub purpose: &'static str,
}

/// Runs the library's tests as an ordinary user.
pub const SETPRIV: Package = Package {
    program: "setpriv",
    debian: "util-linux",
    purpose: "to run tests as an ordinary user",
};

/// Runs a kernel's self-test in a session of its own.
pub const SETSID: Package = Package {
    program: "setsid",
    debian: "util-linux",
    purpose: "to end a hanging test with all of its processes",
};

/// Compiles the kernel's self-tests.
pub const GCC: Package = Package {
    program: "gcc",
    debian: "build-essential",
    purpose: "to compile the kernel's self-tests",
};

/// Builds them as the kernel does.
pub const MAKE: Package = Package {
    program: "make",
    debian: "make",
    purpose: "to build the kernel's self-tests",
};

/// Emulates a machine with another kernel.
pub const QEMU: Package = Package {
    program: "qemu-system-x86_64",
    debian: "qemu-system-x86",
    purpose: "to run other kernels in a virtual machine",
};

/// What compiles the workspace's shaders.
pub const SHADERS: [Package; 2] = [
    Package {
        program: "glslangValidator",
        debian: "glslang-tools",
        purpose: "to compile shaders",
    },
    Package {
        program: "spirv-val",
        debian: "spirv-tools",
        purpose: "to check shaders",
    },
];

/// What the Vulkan device's tests need beside a driver and those.
pub const VULKAN: [Package; 2] = [
    Package {
        program: if cfg!(target_arch = "aarch64") {
            "/usr/lib/aarch64-linux-gnu/libvulkan.so.1"
        } else {
            "/usr/lib/x86_64-linux-gnu/libvulkan.so.1"
        },
        debian: "libvulkan1",
        purpose: "to find Vulkan's drivers",
    },
    Package {
        program: "/usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json",
        debian: "vulkan-validationlayers",
        purpose: "to check calls of Vulkan",
    },
];

impl Package {
    fn is_there(&self) -> bool {
        env::var_os("PATH").is_some_and(|path| {
            env::split_paths(&path).any(|directory| directory.join(self.program).is_file())
        })
    }

    /// Makes sure that the program is there: installs it as root on Debian and
    /// its relatives, and elsewhere says what is missing.
    pub fn provide(&self) -> Result<()> {
        if self.is_there() {
            return Ok(());
        }
        let Self {
            program,
            debian,
            purpose,
        } = self;
        let missing = format!("`{program}` is missing ({purpose}); install the package {debian}");
        if !rustix::process::getuid().is_root() {
            bail!("{missing}");
        }
        let install = || {
            Invocation::new("apt-get")
                .args(["install", "--yes", "--no-install-recommends", debian])
                .env("DEBIAN_FRONTEND", "noninteractive")
                .quiet()
        };
        // A new machine may never have looked at its mirror.
        let update = || Invocation::new("apt-get").args(["-qq", "update"]).quiet();
        let installed = install().or_else(|| update().and_then(|_| install()));
        if installed.is_none() || !self.is_there() {
            bail!("{missing}");
        }
        eprintln!("installed {debian} {purpose}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_needs_nothing() {
        let shell = Package {
            program: "sh",
            debian: "dash",
            purpose: "for this test",
        };
        shell.provide().unwrap();
    }
}
