//! The kernel's maps, with and without the newer interfaces.

mod common;

use common::{Area, CONFIG, open};
use hmm_hal::{AddressSpace, Mapping};
use hmm_os::{Disable, LinuxSpace, OpenConfig};
use hmm_types::{MemoryKind, PAGE_SIZE, PageRange, Permissions, USER_END, VirtAddr};

fn old_kernel() -> LinuxSpace {
    let disable = Disable {
        pagemap_scan: true,
        procmap_query: true,
        ..Disable::default()
    };
    LinuxSpace::open(OpenConfig { disable, ..CONFIG }).unwrap()
}

fn mappings(space: &LinuxSpace, range: PageRange) -> Vec<Mapping> {
    let mut list = Vec::with_capacity(4096);
    space
        .mappings(range, &mut |mapping| list.push(mapping))
        .unwrap();
    list
}

fn of(space: &LinuxSpace, address: VirtAddr) -> Mapping {
    let list = mappings(space, PageRange::page_of(address).unwrap());
    assert_eq!(list.len(), 1, "{list:?}");
    list[0]
}

#[test]
fn every_kind_is_recognised() {
    static mut DATA: [u64; 4096] = [3; 4096];
    let Some(os) = open() else { return };
    for space in [&os.space, &old_kernel()] {
        let heap = vec![1u8; 1000];
        let on_stack = 5u64;
        for address in [
            VirtAddr::of(heap.as_ptr()),
            VirtAddr::of(&raw const on_stack),
        ] {
            let mapping = of(space, address);
            assert_eq!(mapping.kind, MemoryKind::PrivateAnonymous);
            assert_eq!(mapping.permissions, Permissions::READ_WRITE);
            assert!(!mapping.engine_owned);
        }
        let code = of(space, VirtAddr::new(mappings as *const () as u64));
        assert_eq!(
            (code.kind, code.permissions.execute),
            (MemoryKind::File, true)
        );
        let data = of(space, VirtAddr::of(&raw const DATA));
        assert!(data.engine_owned, "statics of a loaded object stay");
        let shared = Area::map(4, false, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        assert_eq!(of(space, shared.range.start()).kind, MemoryKind::Shared);
        let none = Area::new(4, false);
        none.protect(1, 1, libc::PROT_NONE);
        let parts = mappings(space, none.range);
        assert_eq!(parts.len(), 3);
        assert_eq!(parts[1].range, none.page(1));
        assert_eq!(parts[1].permissions, Permissions::default());
        none.unmap(2, 1);
        assert_eq!(mappings(space, none.range).len(), 3);
        assert_eq!(mappings(space, none.page(2)), []);
        let staging = space.staging().small;
        assert!(
            mappings(space, staging)
                .iter()
                .all(|part| part.engine_owned)
        );
        let arena = VirtAddr::of(&*hmm_mem::boxed(1u64));
        assert!(of(space, arena).engine_owned);
        // SAFETY: asks for a number.
        let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
        assert_eq!(of(space, VirtAddr::new(vdso)).kind, MemoryKind::Special);
    }
}

#[test]
fn a_mapping_that_is_partly_excluded_is_visited_in_parts() {
    let Some(os) = open() else { return };
    let area = Area::new(16, false);
    let pinned = area.range.slice(5, 3);
    hmm_os::exclude(pinned);
    let parts: Vec<_> = mappings(&os.space, area.range)
        .iter()
        .map(|part| (part.range, part.engine_owned))
        .collect();
    hmm_os::include(pinned);
    assert_eq!(
        parts,
        [
            (area.range.slice(0, 5), false),
            (pinned, true),
            (area.range.slice(8, 8), false)
        ]
    );
    assert_eq!(mappings(&os.space, area.range).len(), 1);
}

#[test]
fn old_and_new_interfaces_agree() {
    let Some(os) = open() else { return };
    let old = old_kernel();
    assert_eq!(old.fast_queries(), (false, false));
    let all = PageRange::span(VirtAddr::new(PAGE_SIZE), VirtAddr::new(USER_END));
    let same = |_| mappings(&os.space, all) == mappings(&old, all);
    assert!((0..100).any(same), "the two never gave the same map");

    let area = Area::new(1500, false);
    (0..1500)
        .filter(|page| page % 7 < 3 || page / 100 == 9)
        .for_each(|page| area.set(page, 1));
    let spans = |space: &LinuxSpace| {
        let mut spans = Vec::new();
        space
            .presence(area.range, &mut |span, presence| {
                spans.push((span, presence))
            })
            .unwrap();
        spans
    };
    let (new, old) = (spans(&os.space), spans(&old));
    assert!(new.len() > 300);
    assert_eq!(new, old);
}
