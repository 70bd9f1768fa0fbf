//! Ordinary memory on a device, and back.
mod common;

use common::{AnyDevice, Kind, Operation, Work, open};
use hmm::{PageCount, PageRange, StayReason, VirtAddr};

fn filled(pages: usize) -> Vec<u64> {
    (0..pages as u64 * 512).collect()
}

on_each!(memory_goes_and_comes_home_by_itself: software, vulkan);
fn memory_goes_and_comes_home_by_itself(kind: Kind) {
    let (hmm, device) = or_skip!(open(kind, 64));
    let mut data = filled(4096);
    let report = hmm.migrate(&mut data[..], device.id()).unwrap();
    println!("{report}");
    let map = hmm.residency(&data[..]).unwrap();
    println!("{map}");
    assert!(report.is_complete(), "{report}");
    assert_eq!(map.on_device(device.id()), report.moved);
    assert!(data.iter().copied().eq(0..4096 * 512));
    println!("{}", hmm.residency(&data[..]).unwrap());
    assert_eq!(
        hmm.residency(&data[..])
            .unwrap()
            .on_device(device.id())
            .get(),
        0
    );
    println!("{:?}", hmm.statistics());
    hmm.shutdown().unwrap();
}

on_each!(a_kernel_works_on_plain_pointers: software, vulkan, waiting, named);
fn a_kernel_works_on_plain_pointers(kind: Kind) {
    let (hmm, device) = or_skip!(open(kind, 64));
    let mut data = filled(1024);
    let all = Work::new(Operation::Multiply, data.as_mut_ptr()).count(data.len());
    device.run(all.value(3)).unwrap();
    assert!(data.iter().copied().eq((0..1024 * 512).map(|n| n * 3)));
    println!("{:?}", hmm.statistics());
    hmm.shutdown().unwrap();
}

on_each!(bad_input_is_named_and_changes_nothing: software, vulkan);
fn bad_input_is_named_and_changes_nothing(kind: Kind) {
    let (hmm, device) = or_skip!(open(kind, 1));
    let unmapped = PageRange::from_pages(VirtAddr::new(0x1000_0000), PageCount::new(4));
    let error = hmm.migrate(unmapped, device.id()).unwrap_err();
    println!("{error}");
    assert!(matches!(error, hmm::Error::NotMapped { .. }));
    let data = filled(1024);
    let report = hmm.migrate(&data[..], device.id()).unwrap();
    println!("{report}");
    assert_eq!(report.moved.get(), 256);
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::NoDeviceMemory)
    );
    assert!(data.iter().copied().eq(0..1024 * 512));
    hmm.shutdown().unwrap();
}
