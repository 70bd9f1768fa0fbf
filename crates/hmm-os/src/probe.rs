//! What this machine and this user offer, for `hmm info`: one line a facility,
//! and for what is missing, what would help.

use std::fs;

use rustix::fs::{Access, CWD};
use rustix::io::Errno;

use crate::map::Map;
use crate::pagemap::Pagemap;
use crate::uffd::{FEATURES, Reach, handshake, open_descriptor};

/// One fact about the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// What was found.
    pub value: String,
    /// Whether the engine has what it wants.
    pub ok: bool,
    /// What helps, where it has not.
    pub remedy: Option<String>,
}

/// What a machine offers.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// The facts, in the order in which to show them.
    pub findings: Vec<Finding>,
}

impl Machine {
    /// Looks at everything; changes nothing. Not for the fault path.
    #[must_use]
    pub fn probe() -> Self {
        let mut machine = Self::default();
        machine.kernel_and_user();
        machine.userfaultfd();
        machine.queries();
        machine.huge_pages();
        machine.limits();
        machine.hardware();
        machine
    }

    /// Whether everything the engine wants is there.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.findings.iter().all(|finding| finding.ok)
    }

    fn note(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.check(name, value, true, "");
    }

    fn check(
        &mut self,
        name: impl Into<String>,
        value: impl Into<String>,
        ok: bool,
        remedy: impl Into<String>,
    ) {
        self.findings.push(Finding {
            name: name.into(),
            value: value.into(),
            ok,
            remedy: (!ok).then(|| remedy.into()),
        });
    }

    fn present(&mut self, name: &str, ok: bool, remedy: &str) {
        self.check(name, if ok { "yes" } else { "no" }, ok, remedy);
    }

    fn kernel_and_user(&mut self) {
        self.note("kernel", read("/proc/sys/kernel/osrelease"));
        let user = rustix::process::getuid();
        self.note("user id", user.as_raw().to_string());
        let ptrace = has_cap_sys_ptrace();
        let sysctl = read("/proc/sys/vm/unprivileged_userfaultfd");
        let device = rustix::fs::accessat(
            CWD,
            "/dev/userfaultfd",
            Access::READ_OK | Access::WRITE_OK,
            rustix::fs::AtFlags::EACCESS,
        )
        .is_ok();
        let any = ptrace || device || sysctl == "1";
        self.check(
            "CAP_SYS_PTRACE",
            if ptrace { "yes" } else { "no" },
            ptrace,
            "without it forked children cannot be served, so everything comes home before a \
             fork; grant it with `setcap cap_sys_ptrace+ep PROGRAM`, or run as root",
        );
        let remedy = "faults inside of system calls are not delivered, and read(2) into a page on a \
             device fails; `chmod 666 /dev/userfaultfd`, or `sysctl vm.unprivileged_userfaultfd=1`";
        self.check(
            "/dev/userfaultfd",
            if device {
                "accessible"
            } else {
                "not accessible"
            },
            any,
            remedy,
        );
        self.check("vm.unprivileged_userfaultfd", sysctl, any, remedy);
    }

    fn userfaultfd(&mut self) {
        let opened = open_descriptor(Reach::Full)
            .map(|fd| (fd, "full"))
            .or_else(|_| open_descriptor(Reach::UserMode).map(|fd| (fd, "user mode only")));
        let (fd, reach) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.check(
                    "userfaultfd",
                    format!("not available ({error})"),
                    false,
                    "the kernel needs CONFIG_USERFAULTFD; a container's seccomp profile must allow \
                     userfaultfd(2)",
                );
                return;
            }
        };
        self.note("userfaultfd", reach);
        let offered = handshake(std::os::fd::AsFd::as_fd(&fd), 0).unwrap_or(0);
        for (bit, name) in FEATURES {
            let (needed, remedy) = match name {
                "PAGEFAULT_FLAG_WP" => {
                    (true, "Linux 5.7 or later; without it no page is duplicated")
                }
                "EVENT_FORK" | "EVENT_REMAP" | "EVENT_REMOVE" | "EVENT_UNMAP" | "THREAD_ID" => {
                    (true, "Linux 4.14 or later")
                }
                "MOVE" => (
                    true,
                    "Linux 6.8 or later; without it pages are copied twice",
                ),
                "POISON" => (
                    true,
                    "Linux 6.6 or later; without it the process ends where a page is lost with its device",
                ),
                _ => (false, ""),
            };
            let has = offered & bit != 0;
            let value = if has { "offered" } else { "not offered" };
            self.check(format!("userfaultfd {name}"), value, has || !needed, remedy);
        }
    }

    fn queries(&mut self) {
        let scan = Pagemap::open(true).is_ok_and(|pagemap| pagemap.has_scan());
        self.present(
            "PAGEMAP_SCAN",
            scan,
            "Linux 6.7 or later; the plain page map is slower",
        );
        let query = Map::open(true).is_ok_and(|map| map.has_query());
        self.present(
            "PROCMAP_QUERY",
            query,
            "Linux 6.11 or later; /proc/self/maps is slower",
        );
        // A length of zero: the kernel only looks whether it knows the advice.
        // SAFETY: no memory is named.
        let populate = unsafe {
            rustix::mm::madvise(
                std::ptr::null_mut(),
                0,
                rustix::mm::Advice::LinuxPopulateWrite,
            )
        };
        self.present(
            "MADV_POPULATE_WRITE",
            populate.is_ok(),
            "Linux 5.14 or later; pages shared with a forked child stay until they are written",
        );
        // SAFETY: a query changes nothing.
        let commands =
            unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
        let expedited = i64::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
        self.present(
            "membarrier",
            commands >= 0 && commands & expedited != 0,
            "Linux 4.14 or later, and a seccomp profile that allows membarrier(2)",
        );
    }

    fn huge_pages(&mut self) {
        let setting = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = setting
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map_or("not there", |(chosen, _)| chosen);
        self.check(
            "transparent huge pages",
            chosen,
            matches!(chosen, "always" | "madvise"),
            "moving small pages is ten times slower; \
             `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        );
        let mut sizes: Vec<_> = fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        sizes.sort();
        for size in sizes {
            let count = read(&format!("/sys/kernel/mm/hugepages/{size}/nr_hugepages"));
            self.note(size.replacen("hugepages-", "hugetlbfs pages of ", 1), count);
        }
    }

    fn limits(&mut self) {
        let maps = read("/proc/sys/vm/max_map_count");
        let enough = maps.parse::<u64>().is_ok_and(|count| count >= 65_530);
        self.check(
            "vm.max_map_count",
            maps,
            enough,
            "migrating parts of mappings splits them; `sysctl vm.max_map_count=262144`",
        );
        for (name, resource, least, remedy) in [
            (
                "RLIMIT_NOFILE",
                rustix::process::Resource::Nofile,
                256,
                "each forked child needs a descriptor; `ulimit -n 1024`",
            ),
            (
                "RLIMIT_AS",
                rustix::process::Resource::As,
                8 << 30,
                "staging memory reserves address space; `ulimit -v unlimited`",
            ),
            ("RLIMIT_MEMLOCK", rustix::process::Resource::Memlock, 0, ""),
        ] {
            let limit = rustix::process::getrlimit(resource).current;
            let value = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
            self.check(
                name,
                value,
                limit.is_none_or(|limit| limit >= least),
                remedy,
            );
        }
    }

    fn hardware(&mut self) {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.note("CPUs", cpus.to_string());
        let info = read("/proc/meminfo");
        for (name, key) in [
            ("memory", "MemTotal:"),
            ("memory available", "MemAvailable:"),
        ] {
            let value = info.lines().find_map(|line| line.strip_prefix(key));
            self.note(name, value.map_or("unknown", str::trim));
        }
    }
}

/// A small file's text, or what stands in for it.
fn read(path: &str) -> String {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => "not there".to_owned(),
            _ => "not readable".to_owned(),
        },
    }
}

fn has_cap_sys_ptrace() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = read("/proc/self/status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> CAP_SYS_PTRACE & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_missing_has_a_remedy() {
        let machine = Machine::probe();
        assert!(machine.findings.len() > 25);
        for finding in &machine.findings {
            println!(
                "{:32} {:20} {}",
                finding.name,
                finding.value,
                finding.remedy.as_deref().unwrap_or("")
            );
            assert_eq!(finding.ok, finding.remedy.is_none());
            assert_ne!(finding.remedy.as_deref(), Some(""));
        }
    }
}
