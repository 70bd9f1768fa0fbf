//! The software device shows what every device has to.

use hmm_conformance::{Failure, Operation, Setting, Subject};
use hmm_device::Injector;
use hmm_hal::{Device, DeviceFaultError, FaultHandler};
use hmm_soft::{Context, KernelError, LaunchError, Pointer, SoftConfig, SoftDevice};
use hmm_types::{DeviceId, VirtAddr};

#[derive(Debug)]
struct Soft(&'static SoftDevice);

fn open(setting: Setting) -> Result<&'static Soft, String> {
    let mut config = SoftConfig::new(setting.memory);
    config.workers = 3;
    config.poison_freed = setting.poison_freed;
    let device = SoftDevice::open(config).map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(Soft(device))))
}

fn words(address: VirtAddr) -> Pointer<u64> {
    Pointer::new(std::ptr::with_exposed_provenance_mut(address.addr()))
}

impl Soft {
    fn launch<K>(&self, count: u64, kernel: K) -> Result<(), Failure>
    where
        K: Fn(&Context, usize) -> Result<(), KernelError> + Sync,
    {
        let groups = usize::try_from(count).expect("64 bits");
        match self.0.launch(groups, kernel) {
            Ok(_) => Ok(()),
            Err(LaunchError::Lost) => Err(Failure::Lost),
            Err(LaunchError::Closed) => Err(Failure::Closed),
            Err(LaunchError::Kernel { error, .. }) => Err(match error {
                KernelError::Fault(DeviceFaultError::NotMapped { address }) => {
                    Failure::NotMapped(address)
                }
                KernelError::Fault(DeviceFaultError::ReadOnly { address }) => {
                    Failure::ReadOnly(address)
                }
                KernelError::Fault(DeviceFaultError::DeviceLost) => Failure::Lost,
                KernelError::Fault(DeviceFaultError::ShuttingDown) => Failure::Closed,
                KernelError::Stuck { address, .. } => Failure::Stuck(address),
                error => Failure::Other(error.to_string()),
            }),
            Err(error) => Err(Failure::Other(error.to_string())),
        }
    }
}

impl Subject for Soft {
    fn device(&self) -> &dyn Device {
        self.0
    }

    fn attach(&self, id: DeviceId, handler: &'static dyn FaultHandler) {
        self.0.attach(id, handler).expect("attached once");
    }

    fn injector(&self) -> &Injector {
        self.0.injector()
    }

    fn run(&'static self, operation: Operation) -> Result<(), Failure> {
        match operation {
            Operation::Fill { to, count, first } => self.launch(count, |context, index| {
                context.store(words(to).at(index), first + index as u64)
            }),
            Operation::Increment { at, count } => self.launch(count, |context, index| {
                context.fetch_add(words(at).at(index), 1).map(drop)
            }),
            Operation::Sum { from, count, into } => self.launch(count, |context, index| {
                let value: u64 = context.load(words(from).at(index))?;
                context.fetch_add(words(into).get(), value).map(drop)
            }),
            Operation::Copy { from, to, count } => self.launch(count, |context, index| {
                let value: u64 = context.load(words(from).at(index))?;
                context.store(words(to).at(index), value)
            }),
            Operation::Histogram {
                from,
                count,
                into,
                bins,
            } => self.launch(count, |context, index| {
                let value: u64 = context.load(words(from).at(index))?;
                let bin = usize::try_from(value % bins).expect("64 bits");
                context.fetch_add(words(into).at(bin), 1).map(drop)
            }),
            Operation::Chase {
                starts,
                chains,
                hops,
                into,
            } => self.launch(chains, |context, index| {
                let mut node: u64 = context.load(words(starts).at(index))?;
                for _ in 0..hops {
                    node = context.load(words(VirtAddr::new(node)).get())?;
                }
                context.store(words(into).at(index), node)
            }),
            Operation::Hammer { page } => self.launch(512, |context, index| {
                for round in 0..2000 {
                    context.store(words(page).at(index), round)?;
                }
                Ok(())
            }),
        }
    }

    fn close(&self) {
        self.0.close();
    }
}

hmm_conformance::conformance_tests!(open);
