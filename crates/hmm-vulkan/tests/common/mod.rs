//! A Vulkan device with the tests' kernels, as the conformance suite sees it.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "one module in many binaries")]

use std::sync::OnceLock;

use hmm_conformance::{Failure, Operation, Setting, Subject};
use hmm_device::Injector;
use hmm_hal::{Device, DeviceFaultError, FaultHandler};
use hmm_types::{Access, DeviceId, PageRange, VirtAddr};
use hmm_vulkan::{
    Kernel, KernelCode, KernelError, LaunchError, LaunchReport, Variant, VulkanConfig,
    VulkanDevice, VulkanError,
};

/// The specialisation constant of the tests' kernels.
const CONTROL: u32 = 9;
/// Invocations of their workgroups.
pub const LOCAL: u32 = 64;
/// Times that a hammering kernel writes.
const HAMMER_TIMES: u64 = 20_000;

pub const CHECKED: &[u8] = include_bytes!("../kernels/operations-checked.spv");
pub const STALL: &[u8] = include_bytes!("../kernels/operations-stall.spv");
pub const TABLE: &[u8] = include_bytes!("../kernels/operations-table.spv");

/// Says aloud that a test cannot run here.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("SKIPPED {}: {}", module_path!(), format_args!($($why)*));
        return;
    }};
}

/// A device, or the test is skipped, with the reason.
#[macro_export]
macro_rules! device {
    ($config:expr) => {
        match $crate::common::open($config) {
            Ok(device) => device,
            Err(reason) => $crate::skip!("{reason}"),
        }
    };
}

/// Opens a device. Where there is no Vulkan at all, says so; any other error fails the
/// test: drivers that are there have to work.
pub fn open(config: VulkanConfig<'_>) -> Result<&'static VulkanDevice, String> {
    match VulkanDevice::open(config) {
        Ok(device) => Ok(device),
        Err(
            error @ (VulkanError::NoLoader { .. }
            | VulkanError::NoDevice { .. }
            | VulkanError::BadDriver { .. }),
        ) => Err(format!("{error} (`cargo xtask vulkan` gets a driver)")),
        Err(error) => panic!("{error}"),
    }
}

/// The words of a kernel's file.
pub fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.chunks_exact(4);
    words
        .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect()
}

/// Loads one of the tests' kernels.
pub fn load(device: &'static VulkanDevice, variant: Variant) -> Kernel {
    try_load(device, variant).expect("the kernel loads")
}

/// The same, or why it cannot be.
pub fn try_load(device: &'static VulkanDevice, variant: Variant) -> Result<Kernel, VulkanError> {
    let bytes = match variant {
        Variant::Checked => CHECKED,
        Variant::Stall => STALL,
        Variant::Table => TABLE,
        other => panic!("there is no kernel for {other:?}"),
    };
    let code = KernelCode {
        words: &words(bytes),
        entry: c"main",
        local_size: [LOCAL, 1, 1],
        push_constant_bytes: 40,
        control_constant: Some(CONTROL),
        variant,
    };
    // SAFETY: made from the tests' own source, for that variant.
    unsafe { device.load(&code) }
}

/// Operation, source, destination, count, value: as in `operations.comp`.
pub fn arguments(words: [u64; 5]) -> [u8; 40] {
    let mut bytes = [0; 40];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Workgroups for so many invocations.
pub fn groups(invocations: u64) -> [u32; 3] {
    let groups = invocations.div_ceil(u64::from(LOCAL));
    [u32::try_from(groups).expect("few enough"), 1, 1]
}

/// Nothing that Vulkan was asked for was wrong. Where the layer was not asked for, that
/// was not checked.
pub fn assert_silent() {
    if let Some(complaints) = hmm_vulkan::validation_complaints() {
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}

/// A device under test.
#[derive(Debug)]
pub struct Tested {
    pub device: &'static VulkanDevice,
    variant: Variant,
    /// Emptied when the device is closed: kernels are loaded on it.
    kernel: OnceLock<Kernel>,
}

impl Tested {
    pub fn new(device: &'static VulkanDevice, variant: Variant) -> &'static Self {
        let kernel = OnceLock::new();
        kernel.set(load(device, variant)).expect("one kernel");
        Box::leak(Box::new(Self {
            device,
            variant,
            kernel,
        }))
    }

    pub fn open(
        setting: Setting,
        variant: Variant,
        change: impl FnOnce(&mut VulkanConfig<'_>),
    ) -> Result<&'static Self, String> {
        let mut config = VulkanConfig::new(setting.memory);
        config.poison_freed = setting.poison_freed;
        change(&mut config);
        Ok(Self::new(open(config)?, variant))
    }

    pub fn kernel(&self) -> &Kernel {
        self.kernel.get().expect("one kernel")
    }

    /// Runs an operation, and says what it took.
    pub fn launch(&'static self, operation: Operation) -> Result<LaunchReport, LaunchError> {
        let (invocations, words) = encode(operation);
        let uses = match self.variant {
            Variant::Table => uses(operation),
            _ => Vec::new(),
        };
        let push = arguments(words);
        self.device
            .launch(self.kernel(), groups(invocations), &push, &uses)
    }
}

fn encode(operation: Operation) -> (u64, [u64; 5]) {
    match operation {
        Operation::Fill { to, count, first } => (count, [0, 0, to.get(), count, first]),
        Operation::Increment { at, count } => (count, [1, 0, at.get(), count, 0]),
        Operation::Sum { from, count, into } => {
            let stripes = count.div_ceil(64);
            (stripes, [2, from.get(), into.get(), count, 0])
        }
        Operation::Copy { from, to, count } => (count, [3, from.get(), to.get(), count, 0]),
        Operation::Histogram {
            from,
            count,
            into,
            bins,
        } => (count, [4, from.get(), into.get(), count, bins]),
        Operation::Chase {
            starts,
            chains,
            hops,
            into,
        } => (chains, [5, starts.get(), into.get(), hops, chains]),
        Operation::Hammer { page } => (512, [6, 0, page.get(), 512, HAMMER_TIMES]),
    }
}

/// What an operation reads and writes, where that is known beforehand.
fn uses(operation: Operation) -> Vec<(PageRange, Access)> {
    let words = |start: VirtAddr, count: u64| {
        PageRange::covering(start, count * 8).expect("memory of the test")
    };
    match operation {
        Operation::Fill { to, count, .. } => vec![(words(to, count), Access::Write)],
        Operation::Increment { at, count } => vec![(words(at, count), Access::Write)],
        Operation::Sum { from, count, into } => vec![
            (words(from, count), Access::Read),
            (words(into, 1), Access::Write),
        ],
        Operation::Copy { from, to, count } => vec![
            (words(from, count), Access::Read),
            (words(to, count), Access::Write),
        ],
        Operation::Histogram {
            from,
            count,
            into,
            bins,
        } => vec![
            (words(from, count), Access::Read),
            (words(into, bins), Access::Write),
        ],
        Operation::Chase { .. } => panic!("only the kernel knows where that leads"),
        Operation::Hammer { page } => vec![(words(page, 512), Access::Write)],
    }
}

/// A launch's error, in the suite's words.
pub fn failure(error: LaunchError) -> Failure {
    match error {
        LaunchError::Lost => Failure::Lost,
        LaunchError::Closed => Failure::Closed,
        LaunchError::Kernel(KernelError::Fault(fault)) => match fault {
            DeviceFaultError::NotMapped { address } => Failure::NotMapped(address),
            DeviceFaultError::ReadOnly { address } => Failure::ReadOnly(address),
            DeviceFaultError::DeviceLost => Failure::Lost,
            DeviceFaultError::ShuttingDown => Failure::Closed,
            fault => Failure::Other(fault.to_string()),
        },
        LaunchError::Kernel(KernelError::Stuck { address, .. }) => Failure::Stuck(address),
        error => Failure::Other(error.to_string()),
    }
}

impl Subject for Tested {
    fn device(&self) -> &dyn Device {
        self.device
    }

    fn attach(&self, id: DeviceId, handler: &'static dyn FaultHandler) {
        self.device.attach(id, handler).expect("attached once");
    }

    fn injector(&self) -> &Injector {
        self.device.injector()
    }

    fn run(&'static self, operation: Operation) -> Result<(), Failure> {
        self.launch(operation).map(drop).map_err(failure)
    }

    fn close(&self) {
        self.device.close();
        assert_silent();
    }
}
