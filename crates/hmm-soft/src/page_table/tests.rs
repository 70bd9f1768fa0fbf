use std::collections::BTreeMap;

use hmm_types::{PAGE_SIZE, PageCount};
use proptest::prelude::*;

use super::*;

/// Kind, permission, and the frame's number or the host page's address.
type Seen = (u32, bool, u64);

fn look(table: &PageTable, page: u64) -> Option<Seen> {
    let address = VirtAddr::new(page * PAGE_SIZE).addr();
    let found = table.leaf(address)?;
    // SAFETY: the test's table is not released before its end.
    let (leaf, directory) = unsafe { (&*found.leaf, &*found.directory) };
    let entry = leaf.entry(address);
    let target = match entry.0 & KIND_MASK {
        0 => return None,
        KIND_FRAME => entry.frame_offset() as u64 / PAGE_SIZE,
        KIND_STAGED => directory.host_page(address) as u64,
        _ => page * PAGE_SIZE,
    };
    Some((entry.0 & KIND_MASK, entry.0 & WRITABLE != 0, target))
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_pages(VirtAddr::new(first * PAGE_SIZE), PageCount::new(count))
}

#[test]
fn a_page_costs_four_bytes() {
    let table = PageTable::new().unwrap();
    let range = pages(1 << 30, 512 * 512);
    let frames = FrameRange::new(FrameId::new(0), 512 * 512);
    assert_eq!(
        table.prepare_frames(range, frames, Access::Write),
        Ok(false)
    );
    table.set_frames(range, frames, Access::Write);
    assert!(
        table.bytes() < 512 * 512 * 4 + 32 * 1024,
        "{}",
        table.bytes()
    );
    // SAFETY: nobody else has the table.
    unsafe { table.release() };
    assert_eq!(look(&table, 1 << 30), None);
}

#[test]
fn only_real_changes_conflict() {
    let table = PageTable::new().unwrap();
    let range = pages(1000, 4);
    let frames = |first| FrameRange::new(FrameId::new(first), 4);
    let prepare = |first, access| table.prepare_frames(range, frames(first), access);
    assert_eq!(prepare(8, Access::Read), Ok(false));
    table.set_frames(range, frames(8), Access::Read);
    assert_eq!(prepare(8, Access::Read), Ok(false));
    assert_eq!(prepare(8, Access::Write), Ok(false), "a permission more");
    assert_eq!(prepare(9, Access::Read), Ok(true), "other frames");
    table.set_frames(range, frames(8), Access::Write);
    assert_eq!(prepare(8, Access::Read), Ok(true), "a permission less");
    let in_place = table.prepare_host(range, range.start(), Access::Write);
    assert_eq!(in_place, Ok(true), "another place");
    assert!(table.clear(range));
    assert!(!table.clear(range));
    assert_eq!(prepare(9, Access::Read), Ok(false));
}

proptest! {
    #[test]
    fn behaves_like_a_map(
        steps in proptest::collection::vec(
            (0u8..4, 1u64..2000, 1u64..1200, 0u32..100_000, any::<bool>()),
            1..40,
        ),
    ) {
        const BASE: u64 = (1 << 27) - 1000;
        let table = PageTable::new().unwrap();
        let mut model: BTreeMap<u64, Seen> = BTreeMap::new();
        for (what, first, count, target, write) in steps {
            let range = pages(BASE + first, count);
            let access = if write { Access::Write } else { Access::Read };
            let each = (BASE + first..BASE + first + count).zip(0u64..);
            match what {
                0 => {
                    let any = table.clear(range);
                    let before = model.len();
                    model.retain(|&page, _| !range.contains(VirtAddr::new(page * PAGE_SIZE)));
                    prop_assert_eq!(any, model.len() != before);
                }
                1 => {
                    let frames = FrameRange::new(FrameId::new(target), u32::try_from(count).unwrap());
                    table.prepare_frames(range, frames, access).unwrap();
                    table.set_frames(range, frames, access);
                    for (page, index) in each {
                        model.insert(page, (KIND_FRAME, write, u64::from(target) + index));
                    }
                }
                _ => {
                    let host = if what == 2 {
                        range.start()
                    } else {
                        VirtAddr::new((u64::from(target) + 1) * PAGE_SIZE)
                    };
                    table.prepare_host(range, host, access).unwrap();
                    table.set_host(range, host, access);
                    let kind = if what == 2 { KIND_IN_PLACE } else { KIND_STAGED };
                    for (page, index) in each {
                        model.insert(page, (kind, write, host.plus_pages(index).get()));
                    }
                }
            }
        }
        for page in BASE..BASE + 4000 {
            prop_assert_eq!(look(&table, page), model.get(&page).copied());
        }
        // SAFETY: nobody else has the table.
        unsafe { table.release() };
    }
}
