//! Why the kernel will not move a page.
//!
//! The map tells most of it. That a page is locked stands only in the
//! mapping's flags, which /proc/self/smaps prints after having counted every
//! page of every mapping before it: that file is read only when the process
//! has locked anything at all.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::AsFd;

use hmm_types::{MemoryKind, PageCount, PageRange, Permissions, StayReason};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result};

use crate::map::{Map, parse_line};
use crate::text::{Lines, decimal};

/// The reason why the page stays; `None` when it can be copied instead.
pub(crate) fn explain(map: &Map, page: PageRange) -> Option<StayReason> {
    let mut found = None;
    let _ = map.visit(page, &mut |vma| {
        found.get_or_insert(vma);
    });
    let Some(vma) = found else {
        return Some(StayReason::NotMapped);
    };
    match vma.kind {
        MemoryKind::PrivateAnonymous => {}
        MemoryKind::File => return Some(StayReason::FileBacked),
        MemoryKind::Shared => return Some(StayReason::Shared),
        MemoryKind::HugeTlb => return Some(StayReason::HugeTlb),
        _ => return Some(StayReason::Special),
    }
    if !has_access(vma.permissions) {
        return Some(StayReason::NoAccess);
    }
    // What cannot be found out does not stand in the way of a copy.
    if anything_locked().unwrap_or(true) {
        return flags_of(page).unwrap_or(None);
    }
    None
}

const fn has_access(permissions: Permissions) -> bool {
    permissions.read || permissions.write || permissions.execute
}

/// Whether the process has locked any memory.
fn anything_locked() -> Result<bool> {
    counts_any(b"VmLck:")
}

/// Whether anything holds pages of the process for long, for DMA: RDMA, or
/// io_uring with registered buffers.
pub(crate) fn anything_pinned() -> Result<bool> {
    counts_any(b"VmPin:")
}

/// Whether the kernel has a huge page of a size that nobody has reserved.
pub(crate) fn has_huge_page(page_len: PageCount) -> Result<bool> {
    let kib = page_len.bytes().get() >> 10;
    let count = |what: &str| -> Result<u64> {
        // Without the program's heap.
        let mut name = [0u8; 96];
        let mut rest = &mut name[..95];
        write!(rest, "/sys/kernel/mm/hugepages/hugepages-{kib}kB/{what}")
            .map_err(|_| Errno::NAMETOOLONG)?;
        let name = CStr::from_bytes_until_nul(&name).map_err(|_| Errno::INVAL)?;
        let file = open(name, OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())?;
        let mut lines = Lines::new(file.as_fd());
        let line = lines.next()?.ok_or(Errno::IO)?;
        Ok(decimal(line).map_or(0, |(value, _)| value))
    };
    Ok(count("free_hugepages")? > count("resv_hugepages")?)
}

/// Size of a mapping's pages, as the kernel has them.
pub(crate) fn page_bytes(range: PageRange) -> Result<u64> {
    let size = smaps_line(
        |mapping| mapping == range,
        b"KernelPageSize:",
        |rest| decimal(rest.trim_ascii_start()).map_or(0, |(kib, _)| kib << 10),
    )?;
    Ok(size.unwrap_or(0))
}

/// What a line of /proc/self/smaps says about the first mapping that is meant.
fn smaps_line<T>(
    is_meant: impl Fn(PageRange) -> bool,
    key: &[u8],
    read: impl FnOnce(&[u8]) -> T,
) -> Result<Option<T>> {
    let flags = OFlags::CLOEXEC | OFlags::RDONLY;
    let smaps = open(c"/proc/self/smaps", flags, Mode::empty())?;
    let mut lines = Lines::new(smaps.as_fd());
    let mut inside = false;
    while let Some(line) = lines.next()? {
        if let Some(vma) = parse_line(line) {
            inside = is_meant(vma.range);
        } else if inside && let Some(rest) = line.strip_prefix(key) {
            return Ok(Some(read(rest)));
        }
    }
    Ok(None)
}

/// Whether a line of /proc/self/status has another number than 0.
fn counts_any(key: &[u8]) -> Result<bool> {
    let flags = OFlags::CLOEXEC | OFlags::RDONLY;
    let status = open(c"/proc/self/status", flags, Mode::empty())?;
    let mut lines = Lines::new(status.as_fd());
    while let Some(line) = lines.next()? {
        if let Some(rest) = line.strip_prefix(key) {
            let kib = decimal(rest.trim_ascii_start()).map(|(value, _)| value);
            return Ok(kib != Some(0));
        }
    }
    Ok(true)
}

/// What the flags of the page's mapping say.
fn flags_of(page: PageRange) -> Result<Option<StayReason>> {
    let reason = smaps_line(|mapping| mapping.overlaps(page), b"VmFlags:", reason_in)?;
    Ok(reason.flatten())
}

/// Visits the mappings that a forked child finds empty. Reads all of smaps,
/// which takes milliseconds: for forks while pages are away.
pub(crate) fn visit_wiped(visit: &mut dyn FnMut(PageRange)) -> Result<()> {
    visit_flagged(b"wf", visit)
}

/// Visits what of a range a userfaultfd has registered. As slow.
pub(crate) fn visit_registered(range: PageRange, visit: &mut dyn FnMut(PageRange)) -> Result<()> {
    visit_flagged(b"um", &mut |mapping| {
        if let Some(part) = mapping.intersection(range) {
            visit(part);
        }
    })
}

/// Whether a userfaultfd has registered memory of this process.
///
/// # Errors
/// When the process's map cannot be read.
pub fn has_registered_memory() -> std::io::Result<bool> {
    let mut found = false;
    visit_flagged(b"um", &mut |_| found = true)?;
    Ok(found)
}

fn visit_flagged(flag: &[u8], visit: &mut dyn FnMut(PageRange)) -> Result<()> {
    let flags = OFlags::CLOEXEC | OFlags::RDONLY;
    let smaps = open(c"/proc/self/smaps", flags, Mode::empty())?;
    let mut lines = Lines::new(smaps.as_fd());
    let mut range = None;
    while let Some(line) = lines.next()? {
        if let Some(vma) = parse_line(line) {
            range = Some(vma.range);
        } else if let (Some(range), Some(flags)) = (range, line.strip_prefix(b"VmFlags:"))
            && flags.split(|&byte| byte == b' ').any(|word| word == flag)
        {
            visit(range);
        }
    }
    Ok(())
}

fn reason_in(flags: &[u8]) -> Option<StayReason> {
    let has = |name: &[u8]| flags.split(|&byte| byte == b' ').any(|flag| flag == name);
    if has(b"ht") {
        Some(StayReason::HugeTlb)
    } else if has(b"io") || has(b"pf") || has(b"mm") {
        Some(StayReason::Special)
    } else if has(b"sh") {
        Some(StayReason::Shared)
    } else if has(b"lo") {
        Some(StayReason::Locked)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_words() {
        assert_eq!(
            reason_in(b" rd wr mr mw me lo ac "),
            Some(StayReason::Locked)
        );
        assert_eq!(reason_in(b" rd wr sh mr ht "), Some(StayReason::HugeTlb));
        assert_eq!(reason_in(b" rd wr pf io "), Some(StayReason::Special));
        assert_eq!(reason_in(b" rd wr mr mw me ac"), None);
    }
}
