//! A process's memory for people: what is mapped, what of it is where, and what
//! the engine could do with it. Read from /proc/PID/smaps; not for the fault path.

use std::io;
use std::path::{Path, PathBuf};

use hmm_types::{ByteCount, MemoryKind, PageRange, Permissions, StayReason};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::map::{moves_pages_of, parse_line};

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedMemory {
    /// Where it is.
    pub range: PageRange,
    /// What it allows.
    pub permissions: Permissions,
    /// Whether writes reach what backs it, or other processes.
    pub shared: bool,
    /// What backs it.
    pub kind: MemoryKind,
    /// The file or the kernel's name for it; empty for plain memory.
    pub name: String,
    /// Size of its pages as the kernel has them: 4 KiB, or a huge page of
    /// hugetlbfs.
    pub page_size: ByteCount,
    /// The file's pages are persistent memory itself (DAX): no page cache.
    pub dax: bool,
    /// In system memory now. Pages of hugetlbfs count.
    pub resident: ByteCount,
    /// Of that, in transparent huge pages.
    pub huge: ByteCount,
    /// In swap. What is on a device is in neither.
    pub swapped: ByteCount,
    /// Private pages of a file mapping that were copied on write.
    pub copied: ByteCount,
    /// Locked with mlock(2).
    pub locked: bool,
    /// Memory of hugetlbfs that was mapped without a file, for this process only.
    pub own_huge_pages: bool,
    /// A region that an engine shares with other processes.
    pub shared_region: bool,
    /// Some userfaultfd has it registered; an engine does so with what has
    /// migrated.
    pub watched: bool,
}

impl MappedMemory {
    /// Whether a device can use it in place, as a mirror does.
    #[must_use]
    pub const fn can_be_mirrored(&self) -> bool {
        self.permissions.read && !matches!(self.kind, MemoryKind::Special)
    }

    /// Why it does not migrate to device memory; `None` when it does. Single
    /// pages of it may still stay: pinned ones, say.
    #[must_use]
    pub const fn stays(&self) -> Option<StayReason> {
        match self.kind {
            MemoryKind::PrivateAnonymous if self.locked => Some(StayReason::Locked),
            MemoryKind::PrivateAnonymous if !self.permissions.read && !self.permissions.write => {
                Some(StayReason::NoAccess)
            }
            MemoryKind::PrivateAnonymous => None,
            MemoryKind::File => Some(StayReason::FileBacked),
            MemoryKind::Shared if self.shared_region => None,
            MemoryKind::Shared => Some(StayReason::Shared),
            MemoryKind::HugeTlb if self.shared_region => None,
            MemoryKind::HugeTlb if self.own_huge_pages && moves_pages_of(self.page_size.get()) => {
                None
            }
            MemoryKind::HugeTlb => Some(StayReason::HugeTlb),
            _ => Some(StayReason::Special),
        }
    }
}

/// The memory of a process, or of this one, in the order of its addresses. Takes
/// the right to trace the process.
///
/// ```
/// let memory = hmm_os::memory_of(None)?;
/// let here = hmm_types::VirtAddr::of(&memory);
/// assert!(memory.iter().any(|mapped| mapped.range.contains(here)));
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// When there is no such process, or it may not be looked at.
pub fn memory_of(pid: Option<u32>) -> io::Result<Vec<MappedMemory>> {
    let process = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let place = PathBuf::from("/proc").join(process);
    let text = std::fs::read(place.join("smaps"))?;
    let mut memory: Vec<MappedMemory> = Vec::new();
    for line in text.split(|&byte| byte == b'\n') {
        if let Some(vma) = parse_line(line) {
            let name = name_of(line);
            memory.push(MappedMemory {
                range: vma.range,
                permissions: vma.permissions,
                shared: vma.shared,
                kind: vma.kind,
                dax: vma.kind == MemoryKind::File && is_dax(&place, vma.range),
                shared_region: is_region(&name),
                name,
                page_size: ByteCount::new(hmm_types::PAGE_SIZE),
                own_huge_pages: vma.own_huge_pages,
                resident: ByteCount::new(0),
                huge: ByteCount::new(0),
                swapped: ByteCount::new(0),
                copied: ByteCount::new(0),
                locked: false,
                watched: false,
            });
        } else if let (Some(mapped), Some((key, value))) = (memory.last_mut(), field(line)) {
            mapped.note(key, value);
        }
    }
    Ok(memory)
}

impl MappedMemory {
    fn note(&mut self, key: &str, value: &str) {
        let kib = || value.strip_suffix(" kB")?.trim().parse::<u64>().ok();
        let bytes = || ByteCount::new(kib().unwrap_or(0) << 10);
        let more = |sum: ByteCount| ByteCount::new(sum.get() + bytes().get());
        match key {
            "KernelPageSize" => {
                self.page_size = bytes();
                if self.page_size.get() > hmm_types::PAGE_SIZE {
                    self.kind = MemoryKind::HugeTlb;
                }
            }
            "Rss" | "Shared_Hugetlb" | "Private_Hugetlb" => self.resident = more(self.resident),
            "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => self.huge = more(self.huge),
            "Swap" => self.swapped = bytes(),
            "Anonymous" if self.kind == MemoryKind::File => self.copied = bytes(),
            "VmFlags" => {
                let has = |flag| value.split_ascii_whitespace().any(|word| word == flag);
                self.locked = has("lo");
                self.watched = has("um") || has("uw") || has("ui");
                if has("io") || has("pf") {
                    self.kind = MemoryKind::Special;
                }
            }
            _ => {}
        }
    }
}

/// `Key:   value`.
fn field(line: &[u8]) -> Option<(&str, &str)> {
    let (key, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
    Some((key, value.trim()))
}

/// What stands behind the five columns of numbers.
fn name_of(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut rest = text.as_ref();
    for _ in 0..5 {
        rest = rest
            .trim_start()
            .split_once(' ')
            .map_or("", |(_, rest)| rest);
    }
    rest.trim_start().to_owned()
}

/// By the name that its owner gave it: `/memfd:NAME (deleted)`.
fn is_region(name: &str) -> bool {
    let memfd = name.strip_prefix("/memfd:");
    memfd.is_some_and(|rest| rest.split(' ').next() == Some(crate::shared::NAME))
}

/// By the file that is really mapped, whatever its name leads to by now.
fn is_dax(process: &Path, range: PageRange) -> bool {
    const STATX_ATTR_DAX: u64 = 0x0020_0000;
    let (start, end) = (range.start().get(), range.end().get());
    let file = process.join(format!("map_files/{start:x}-{end:x}"));
    statx(CWD, &file, AtFlags::empty(), StatxFlags::TYPE)
        .is_ok_and(|found| found.stx_attributes.bits() & STATX_ATTR_DAX != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_of_several_kinds() {
        let memory = memory_of(None).unwrap();
        let kinds = [
            MemoryKind::PrivateAnonymous,
            MemoryKind::File,
            MemoryKind::Special,
        ];
        for kind in kinds {
            assert!(memory.iter().any(|mapped| mapped.kind == kind), "{kind:?}");
        }
        let exe = std::env::current_exe().unwrap();
        let own = memory.iter().find(|mapped| Path::new(&mapped.name) == exe);
        let own = own.expect("the executable is mapped");
        assert!(own.resident.get() > 0 && !own.dax);
        assert_eq!(own.stays(), Some(StayReason::FileBacked));
        assert!(own.can_be_mirrored());
    }

    #[test]
    fn fields_are_read() {
        let mut mapped = memory_of(None).unwrap().remove(0);
        mapped.kind = MemoryKind::PrivateAnonymous;
        mapped.resident = ByteCount::new(0);
        mapped.own_huge_pages = false;
        mapped.permissions = Permissions::READ_WRITE;
        for line in [
            "KernelPageSize:     2048 kB",
            "Rss:                   4 kB",
            "Private_Hugetlb:    2048 kB",
            "VmFlags: rd wr mr mw me lo ht um",
        ] {
            let (key, value) = field(line.as_bytes()).unwrap();
            mapped.note(key, value);
        }
        assert_eq!(mapped.kind, MemoryKind::HugeTlb);
        assert_eq!(mapped.page_size, ByteCount::mib(2));
        assert_eq!(mapped.resident.get(), (2052) << 10);
        assert!(mapped.locked && mapped.watched);
        assert_eq!(mapped.stays(), Some(StayReason::HugeTlb));
        mapped.own_huge_pages = true;
        assert_eq!(mapped.stays(), None);
        mapped.page_size = ByteCount::mib(1024);
        assert_eq!(mapped.stays(), None);
        mapped.page_size = ByteCount::kib(64);
        assert_eq!(mapped.stays(), Some(StayReason::HugeTlb));
    }

    #[test]
    fn regions_have_their_name() {
        assert!(is_region("/memfd:hmm-shared (deleted)"));
        assert!(!is_region("/memfd:hmm-shared-by-others (deleted)"));
        assert!(!is_region("/tmp/hmm-shared"));
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(memory_of(Some(u32::MAX - 1)).is_err());
    }
}
