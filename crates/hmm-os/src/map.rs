//! The kernel's map of the process: what is mapped where, and what backs it.
//!
//! One PROCMAP_QUERY (Linux 6.11) answers for one mapping; older kernels have
//! the text of /proc/self/maps, from which the same is read. Both see a process
//! that changes its map meanwhile as a series of glances, not as one picture.

use std::os::fd::{AsFd, OwnedFd};

use hmm_types::{BLOCK_SIZE, MemoryKind, PAGE_SIZE, PageCount, PageRange, Permissions, VirtAddr};
use linux_raw_sys::general::procmap_query_flags as flag;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result};

use crate::abi;
use crate::refusal;
use crate::text::{Lines, decimal, hex};

/// The largest page that moves.
pub(crate) const GIGABYTE: u64 = 1 << 30;
/// The name of memory that was mapped with MAP_HUGETLB. A private mapping of a
/// file on hugetlbfs is another thing: what is dropped there reads as the file.
const ANONYMOUS_HUGE: &[u8] = b"/anon_hugepage";

/// One mapping of the kernel's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) range: PageRange,
    pub(crate) permissions: Permissions,
    pub(crate) kind: MemoryKind,
    /// Writes reach whatever backs it.
    pub(crate) shared: bool,
    /// How much one page is: a page, and more in hugetlbfs.
    pub(crate) page_len: PageCount,
    /// Pages of hugetlbfs that no file and no other process has, of a size that can
    /// move.
    pub(crate) own_huge_pages: bool,
}

impl Vma {
    pub(crate) const fn is_gigantic(&self) -> bool {
        self.page_len.bytes().get() == GIGABYTE
    }

    /// What is known of it besides, as the text of the map does not tell.
    const fn with_page_bytes(self, bytes: u64) -> Self {
        Self {
            page_len: PageCount::new(if bytes > PAGE_SIZE {
                bytes / PAGE_SIZE
            } else {
                1
            }),
            own_huge_pages: self.own_huge_pages && moves_pages_of(bytes),
            ..self
        }
    }
}

/// The page of a size that an address is in.
pub(crate) fn huge_page_of(address: VirtAddr, page_len: PageCount) -> PageRange {
    let start = address.get() - address.get() % page_len.bytes().get();
    PageRange::from_pages(VirtAddr::new(start), page_len)
}

/// Whether pages of hugetlbfs of a size can move.
pub(crate) const fn moves_pages_of(bytes: u64) -> bool {
    bytes.is_power_of_two() && BLOCK_SIZE <= bytes && bytes <= GIGABYTE
}

/// An open map.
#[derive(Debug)]
pub(crate) struct Map {
    fd: OwnedFd,
    query: bool,
}

impl Map {
    /// Opens the process's map; `allow_query` false forces the text.
    pub(crate) fn open(allow_query: bool) -> Result<Self> {
        let flags = OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = open(c"/proc/self/maps", flags, Mode::empty())?;
        let mut map = Self { fd, query: false };
        map.query = allow_query && map.query_at(VirtAddr::new(0)).is_ok();
        Ok(map)
    }

    /// Whether PROCMAP_QUERY is there and used.
    pub(crate) const fn has_query(&self) -> bool {
        self.query
    }

    /// Visits the mappings that overlap the range, in order and whole.
    pub(crate) fn visit(&self, range: PageRange, visit: &mut dyn FnMut(Vma)) -> Result<()> {
        if !self.query {
            return self.visit_text(range, visit);
        }
        let mut at = range.start();
        while at < range.end() {
            let Some(vma) = self.query_at(at)? else {
                break;
            };
            if vma.range.start() >= range.end() {
                break;
            }
            at = vma.range.end();
            visit(vma);
        }
        Ok(())
    }

    /// The mapping that covers the address, or else the next one in user space.
    fn query_at(&self, at: VirtAddr) -> Result<Option<Vma>> {
        let mut short = [0; 256];
        match self.query_with(at, &mut short) {
            Err(Errno::NAMETOOLONG) => {
                let mut long = [0; 4096];
                match self.query_with(at, &mut long) {
                    Err(Errno::NAMETOOLONG) => self.query_with(at, &mut []),
                    result => result,
                }
            }
            result => result,
        }
    }

    fn query_with(&self, at: VirtAddr, name: &mut [u8]) -> Result<Option<Vma>> {
        #[allow(clippy::cast_possible_truncation, reason = "at most PATH_MAX bytes")]
        let name_size = name.len() as u32;
        let mut query = abi::procmap_query {
            size: size_of::<abi::procmap_query>() as u64,
            query_flags: flag::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64,
            query_addr: at.get(),
            vma_start: 0,
            vma_end: 0,
            vma_flags: 0,
            vma_page_size: 0,
            vma_offset: 0,
            inode: 0,
            dev_major: 0,
            dev_minor: 0,
            vma_name_size: name_size,
            build_id_size: 0,
            vma_name_addr: if name.is_empty() {
                0
            } else {
                name.as_mut_ptr().expose_provenance() as u64
            },
            build_id_addr: 0,
        };
        // SAFETY: the structure is the one that PROCMAP_QUERY takes; the name
        // goes into a buffer of the caller's with its length beside it.
        match unsafe { abi::ioctl(self.fd.as_fd(), abi::PROCMAP_QUERY, &mut query) } {
            Err(Errno::NOENT) => return Ok(None),
            result => result?,
        };
        let start = VirtAddr::new(query.vma_start);
        let Ok(range) = PageRange::new(start, query.vma_end - query.vma_start) else {
            return Ok(None); // vsyscall, above user space
        };
        let len = (query.vma_name_size as usize).min(name.len());
        let name = &name[..len];
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        let has = |bit: flag| query.vma_flags & bit as u64 != 0;
        let kind = if query.vma_page_size > PAGE_SIZE {
            MemoryKind::HugeTlb
        } else {
            classify(name, query.inode, has(flag::PROCMAP_QUERY_VMA_SHARED))
        };
        let shared = has(flag::PROCMAP_QUERY_VMA_SHARED);
        let vma = Vma {
            range,
            permissions: Permissions {
                read: has(flag::PROCMAP_QUERY_VMA_READABLE),
                write: has(flag::PROCMAP_QUERY_VMA_WRITABLE),
                execute: has(flag::PROCMAP_QUERY_VMA_EXECUTABLE),
            },
            kind,
            shared,
            page_len: PageCount::ONE,
            own_huge_pages: !shared && name.starts_with(ANONYMOUS_HUGE),
        };
        Ok(Some(vma.with_page_bytes(query.vma_page_size)))
    }

    fn visit_text(&self, range: PageRange, visit: &mut dyn FnMut(Vma)) -> Result<()> {
        let mut lines = Lines::new(self.fd.as_fd());
        while let Some(line) = lines.next()? {
            let Some(vma) = parse_line(line) else {
                continue;
            };
            if vma.range.start() >= range.end() {
                break;
            }
            if vma.range.overlaps(range) {
                let bytes = match vma.kind {
                    // The text does not tell the size.
                    MemoryKind::HugeTlb => refusal::page_bytes(vma.range).unwrap_or(0),
                    _ => PAGE_SIZE,
                };
                visit(vma.with_page_bytes(bytes));
            }
        }
        Ok(())
    }
}

/// Reads one line of /proc/self/maps, or the first line of an entry of
/// /proc/self/smaps; `None` for any other line and above user space.
pub(crate) fn parse_line(line: &[u8]) -> Option<Vma> {
    let (start, rest) = hex(line)?;
    let (end, rest) = hex(rest.strip_prefix(b"-")?)?;
    let (modes, rest) = rest.strip_prefix(b" ")?.split_at_checked(4)?;
    let (_offset, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (_major, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (_minor, rest) = hex(rest.strip_prefix(b":")?)?;
    let (inode, rest) = decimal(rest.strip_prefix(b" ")?)?;
    let name = rest.trim_ascii_start();
    let range = PageRange::new(VirtAddr::new(start), end.checked_sub(start)?).ok()?;
    Some(Vma {
        range,
        permissions: Permissions {
            read: modes[0] == b'r',
            write: modes[1] == b'w',
            execute: modes[2] == b'x',
        },
        kind: classify(name, inode, modes[3] == b's'),
        shared: modes[3] == b's',
        page_len: PageCount::ONE,
        own_huge_pages: modes[3] != b's' && name.starts_with(ANONYMOUS_HUGE),
    })
}

/// What backs a mapping, by its name. The text cannot tell pages of hugetlbfs
/// but by the usual names; PROCMAP_QUERY knows the page size and does not ask.
fn classify(name: &[u8], inode: u64, shared: bool) -> MemoryKind {
    let begins = |prefixes: &[&[u8]]| prefixes.iter().any(|&prefix| name.starts_with(prefix));
    if begins(&[ANONYMOUS_HUGE, b"/dev/hugepages/"]) {
        MemoryKind::HugeTlb
    } else if begins(&[
        b"/dev/shm/",
        b"/memfd:",
        b"/SYSV",
        b"/dev/zero",
        b"[anon_shmem:",
    ]) {
        MemoryKind::Shared
    } else if inode != 0 {
        // A name too long to be told is a path; one that is no path belongs to
        // a descriptor such as io_uring's.
        let path = name.is_empty() || begins(&[b"/"]);
        if path && !begins(&[b"/dev/", b"/[aio]"]) {
            MemoryKind::File
        } else {
            MemoryKind::Special
        }
    } else if shared {
        MemoryKind::Shared
    } else if name.is_empty() || begins(&[b"[heap]", b"[stack", b"[anon:"]) {
        MemoryKind::PrivateAnonymous
    } else {
        MemoryKind::Special
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: &str) -> Option<MemoryKind> {
        parse_line(line.as_bytes()).map(|vma| vma.kind)
    }

    #[test]
    fn lines_name_their_kind() {
        use MemoryKind::{File, HugeTlb, PrivateAnonymous, Shared, Special};
        let cases = [
            ("1000-3000 rw-p 00000000 00:00 0 ", Some(PrivateAnonymous)),
            (
                "1000-3000 rw-p 00000000 00:00 0      [heap]",
                Some(PrivateAnonymous),
            ),
            (
                "1000-3000 rw-p 00000000 00:00 0      [anon:glibc: malloc]",
                Some(PrivateAnonymous),
            ),
            ("1000-3000 r-xp 00000000 00:00 0      [vdso]", Some(Special)),
            (
                "1000-3000 r-xp 00000000 fe:01 42     /bin/my program",
                Some(File),
            ),
            (
                "1000-3000 rw-s 00000000 00:01 1031   /dev/zero (deleted)",
                Some(Shared),
            ),
            (
                "1000-3000 rw-s 00000000 00:01 1031   /memfd:x (deleted)",
                Some(Shared),
            ),
            (
                "1000-3000 rw-s 00000000 00:06 87     /dev/nvidia0",
                Some(Special),
            ),
            (
                "1000-3000 rw-s 00000000 00:0f 87     anon_inode:[io_uring]",
                Some(Special),
            ),
            (
                "200000-400000 rw-p 00000000 00:10 9  /anon_hugepage (deleted)",
                Some(HugeTlb),
            ),
            (
                "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]",
                None,
            ),
            ("Size:                  8 kB", None),
            ("VmFlags: rd wr mr mw me ac", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(kind(line), expected, "{line}");
        }
    }

    #[test]
    fn both_sources_agree() {
        let query = Map::open(true).unwrap();
        if !query.has_query() {
            println!("SKIPPED: this kernel has no PROCMAP_QUERY (Linux 6.11)");
            return;
        }
        let all = PageRange::span(VirtAddr::new(PAGE_SIZE), VirtAddr::new(hmm_types::USER_END));
        let list = |map: &Map| {
            let mut list = Vec::with_capacity(4096);
            map.visit(all, &mut |vma| list.push(vma)).unwrap();
            list
        };
        // Other tests' threads change the map now and then.
        for _ in 0..100 {
            let (one, other) = (list(&query), list(&Map::open(false).unwrap()));
            assert!(one.len() > 5);
            if one == other {
                return;
            }
        }
        assert_eq!(list(&query), list(&Map::open(false).unwrap()));
    }
}
