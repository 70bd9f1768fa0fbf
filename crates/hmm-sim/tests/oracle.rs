//! The simulator is quiet about an engine that is right, and catches engines
//! that are not.

use hmm_hal::{AddressSpace, Device, DeviceFaultError, Resolution, Transfer};
use hmm_sim::{
    EngineUnderTest, Request, SimClock, SimConfig, SimDevice, SimSpace, SystemOnly, run,
};
use hmm_types::{Access, DeviceId, PageCount, PageRange, VirtAddr};

const OPS: u64 = 300;

#[test]
fn an_engine_that_migrates_nothing_is_right() {
    for seed in 0..300 {
        let config = SimConfig::from_seed(seed, OPS);
        if let Err(failure) = run::<SystemOnly>(&config) {
            panic!(
                "seed {seed}: {}\n{}",
                failure.message,
                failure.log.join("\n")
            );
        }
    }
}

#[test]
fn a_seed_replays() {
    for seed in 0..20 {
        let config = SimConfig::from_seed(seed, OPS);
        assert_eq!(
            run::<SystemOnly>(&config).unwrap(),
            run::<SystemOnly>(&config).unwrap()
        );
    }
}

/// What is wrong with an engine.
trait Fault: Send + Sync + 'static {
    /// Whether it ever serves faults.
    const WORKS: bool = true;
    fn migrate(_space: &SimSpace, _device: &SimDevice, _range: PageRange) {}
    fn shut_down(engine: &SystemOnly) -> bool {
        engine.shutdown()
    }
}

struct Broken<F> {
    good: SystemOnly,
    space: SimSpace,
    devices: Vec<SimDevice>,
    fault: std::marker::PhantomData<F>,
}

impl<F: Fault> EngineUnderTest for Broken<F> {
    fn new(config: &SimConfig, space: SimSpace, devices: Vec<SimDevice>, clock: SimClock) -> Self {
        Self {
            good: SystemOnly::new(config, space.clone(), devices.clone(), clock),
            space,
            devices,
            fault: std::marker::PhantomData,
        }
    }

    fn read(&self) {
        self.good.read();
    }

    fn work(&self) -> bool {
        F::WORKS && self.good.work()
    }

    fn device_fault(
        &self,
        device: DeviceId,
        address: VirtAddr,
        access: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        self.good.device_fault(device, address, access)
    }

    fn request(&self, request: Request) {
        self.good.request(request);
        if let Request::Migrate(range, device) = request {
            F::migrate(&self.space, &self.devices[device.index()], range);
        }
    }

    fn shutdown(&self) -> bool {
        F::shut_down(&self.good)
    }
}

/// The first complaint about an engine among many seeds.
fn complaint<F: Fault>() -> String {
    (0..200)
        .find_map(|seed| run::<Broken<F>>(&SimConfig::from_seed(seed, OPS)).err())
        .expect("nobody noticed")
        .message
}

#[test]
fn lost_pages_are_noticed() {
    struct Loses;
    impl Fault for Loses {
        fn migrate(space: &SimSpace, _: &SimDevice, range: PageRange) {
            if space.capabilities().move_pages {
                space.move_pages(range.slice(0, 1), space.staging().small.start());
            }
        }
    }
    let message = complaint::<Loses>();
    assert!(message.contains("expected"), "{message}");
}

#[test]
fn threads_that_nobody_wakes_are_noticed() {
    struct Sleeps;
    impl Fault for Sleeps {
        const WORKS: bool = false;
    }
    let message = complaint::<Sleeps>();
    assert!(message.contains("for ever"), "{message}");
}

#[test]
fn stale_device_mappings_are_noticed() {
    struct Copies;
    impl Fault for Copies {
        fn migrate(space: &SimSpace, device: &SimDevice, range: PageRange) {
            let page = range.slice(0, 1);
            let present = space.peek(hmm_hal::SpaceId::OWN, page.start()).is_some();
            let Ok(frames) = device.allocate(PageCount::ONE) else {
                return;
            };
            let host = page.start();
            let copied = present
                && device
                    .submit(&[Transfer::ToDevice { host, frames }])
                    .and_then(|fence| device.wait(fence))
                    .is_ok();
            if !copied || device.map(page, frames, Access::Write).is_err() {
                device.free(frames);
            }
        }
    }
    // It leaks the frame, too, which other seeds complain about first.
    let noticed = (0..200)
        .filter_map(|seed| run::<Broken<Copies>>(&SimConfig::from_seed(seed, OPS)).err())
        .any(|failure| failure.message.contains("expected"));
    assert!(noticed);
}

#[test]
fn leaked_frames_are_noticed() {
    struct Leaks;
    impl Fault for Leaks {
        fn migrate(_: &SimSpace, device: &SimDevice, _: PageRange) {
            let _ = device.allocate(PageCount::ONE);
        }
    }
    let message = complaint::<Leaks>();
    assert!(message.contains("still has"), "{message}");
}

#[test]
fn ranges_left_registered_are_noticed() {
    struct Stays;
    impl Fault for Stays {
        fn shut_down(_: &SystemOnly) -> bool {
            true
        }
    }
    let message = complaint::<Stays>();
    assert!(message.contains("still"), "{message}");
}
