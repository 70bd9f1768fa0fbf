//! Ordinary memory on a software device, and back.
use hmm::{ByteCount, Hmm, PageCount, PageRange, Pointer, SoftwareOptions, StayReason, VirtAddr};

fn filled(pages: usize) -> Vec<u64> {
    (0..pages as u64 * 512).collect()
}

#[test]
fn memory_goes_and_comes_home_by_itself() {
    let hmm = Hmm::open().unwrap();
    let device = hmm
        .add_software_device(SoftwareOptions::new(ByteCount::mib(64)))
        .unwrap();
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

#[test]
fn a_kernel_works_on_plain_pointers() {
    let hmm = Hmm::open().unwrap();
    let device = hmm
        .add_software_device(SoftwareOptions::new(ByteCount::mib(64)))
        .unwrap();
    let mut data = filled(1024);
    let first = Pointer::new(data.as_mut_ptr());
    let report = device
        .launch(1024, |context, group| {
            for index in group * 512..(group + 1) * 512 {
                let value = context.load(first.at(index))?;
                context.store(first.at(index), value * 3)?;
            }
            Ok(())
        })
        .unwrap();
    println!("{report:?}");
    assert!(data.iter().copied().eq((0..1024 * 512).map(|n| n * 3)));
    println!("{:?}", hmm.statistics());
    hmm.shutdown().unwrap();
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let hmm = Hmm::open().unwrap();
    let device = hmm
        .add_software_device(SoftwareOptions::new(ByteCount::mib(1)))
        .unwrap();
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
