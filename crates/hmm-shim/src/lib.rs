//! Virtual HMM devices for unmodified programs: a library for `LD_PRELOAD`,
//! which `hmm run` sets up.
//!
//! The program sees `/dev/hmm_dmirror0` and `1`, devices with private memory,
//! and `2` and `3`, whose memory the CPU uses in place, as the test driver of
//! Linux has them (`lib/test_hmm.c`). What it does with them is done by an
//! engine inside of the process.
//!
//! # How it stands in the way of nothing
//! An open device is a descriptor of its own kind, a memfd, which the kernel
//! keeps like any other: dup, close, close_range, exec and passing it on need
//! no help, and whatever number it has, its inode tells what it is. So only a
//! few calls are looked at: `open`, `ioctl`, `mmap`, `close`, `dup2`, `read` (for
//! the page map), `stat`, `access`, `_exit` and their kin. All but those with a
//! path go straight on while no device is open. This library uses none of the
//! program's heap.
//!
//! # Modules
//! | module | noun |
//! |---|---|
//! | `calls` | the calls that a device is used with |
//! | `closes` | those that close descriptors |
//! | `status` | those that ask what a path or a descriptor is |
//! | `real` | the same calls of whoever comes next, libc as a rule |
//! | `files` | open device files |
//! | `engine` | the engine of this process, through forks |
//! | `driver` | the driver's commands |
//! | `uapi` | the driver's numbers and structure |
//! | `pagemap` | what is on a device, in /proc/self/pagemap |
//! | `heap` | this library's own heap |
//! | `times` | where the time of migrations goes |
//! | `user` | the program's memory, which may not be there |

mod calls;
mod closes;
mod driver;
mod engine;
mod errno;
mod files;
mod heap;
mod pagemap;
mod real;
mod references;
mod status;
mod times;
mod uapi;
mod user;
