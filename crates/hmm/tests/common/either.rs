//! A device, whichever: what tests say of devices in general they say of each.

use std::fmt;

use hmm::{
    ByteCount, Context, Demand, DeviceId, Hmm, Injector, KernelError, LaunchVulkanError, Pointer,
    Program, ProgramOptions, SoftwareDevice, Used, VulkanDevice, VulkanError, VulkanOptions,
};

use super::{WORDS, pattern};

/// SPIR-V of `tests/kernels/words.comp`.
pub const WORDS_KERNEL: &[u8] = include_bytes!("../kernels/words.spv");

/// Words that one invocation of the software kernel takes on.
const BATCH: usize = 64;

/// What requests and reports name.
pub trait AnyDevice: fmt::Debug + Sync {
    /// What requests name it by.
    fn id(&self) -> DeviceId;
    /// Size of its memory.
    fn memory(&self) -> ByteCount;
    /// What is free of that.
    fn free_memory(&self) -> ByteCount;
}

macro_rules! any_device {
    ($($device:ty),+) => {
        $(impl AnyDevice for $device {
            fn id(&self) -> DeviceId {
                Self::id(self)
            }

            fn memory(&self) -> ByteCount {
                Self::memory(self)
            }

            fn free_memory(&self) -> ByteCount {
                Self::free_memory(self)
            }
        })+
    };
}
any_device!(SoftwareDevice, VulkanDevice);

/// Which device, and what its kernels do about pages that are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The software device.
    Software,
    /// A Vulkan device; invocations begin again.
    Vulkan,
    /// The same; invocations wait.
    Waiting,
    /// The same; all that a launch uses is named, and nothing checked.
    Named,
}

impl Kind {
    /// The test of this name on this device, as helpers know it.
    pub fn test(self, name: &str) -> String {
        let device = match self {
            Self::Software => "software",
            Self::Vulkan => "vulkan",
            Self::Waiting => "waiting",
            Self::Named => "named",
        };
        format!("{name}::{device}")
    }

    /// Whether kernels can use pages where they are.
    pub fn works_in_place(self) -> bool {
        self == Self::Software
    }
}

/// Makes a test of a function for each of these devices.
#[macro_export]
macro_rules! on_each {
    ($name:ident: $($device:ident),+) => {
        mod $name {
            $(
                #[test]
                fn $device() {
                    super::$name($crate::on_each!(@ $device));
                }
            )+
        }
    };
    (@ software) => { $crate::common::Kind::Software };
    (@ vulkan) => { $crate::common::Kind::Vulkan };
    (@ waiting) => { $crate::common::Kind::Waiting };
    (@ named) => { $crate::common::Kind::Named };
}

/// A device that is there, or a visible skip.
#[macro_export]
macro_rules! or_skip {
    ($opened:expr) => {
        match $opened {
            Ok(opened) => opened,
            Err(why) => $crate::skip!("{why}"),
        }
    };
}

/// An engine with a device of this kind, whose memory is poisoned when freed; or why
/// there is none.
pub fn open(kind: Kind, mib: u64) -> Result<(Hmm, Device), String> {
    let hmm = Hmm::open().expect("an engine");
    let device = add(&hmm, kind, mib)?;
    Ok((hmm, device))
}

/// A device more.
pub fn add(hmm: &Hmm, kind: Kind, mib: u64) -> Result<Device, String> {
    if kind == Kind::Software {
        return Ok(super::device(hmm, mib).into());
    }
    let options = VulkanOptions::new(ByteCount::mib(mib)).poison_freed(true);
    let device = add_vulkan(hmm, options)?;
    Ok(Device::vulkan(kind, device))
}

/// A Vulkan device, or why there is none here.
pub fn add_vulkan(hmm: &Hmm, options: VulkanOptions<'_>) -> Result<VulkanDevice, String> {
    match hmm.add_vulkan_device(options) {
        Ok(device) => Ok(device),
        Err(hmm::Error::Vulkan(
            why @ (VulkanError::NoLoader { .. }
            | VulkanError::NoDevice { .. }
            | VulkanError::BadDriver { .. }),
        )) => Err(format!("{why} (`cargo xtask vulkan` gets a driver)")),
        Err(error) => panic!("{error}"),
    }
}

/// SPIR-V as words.
pub fn spirv(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.chunks_exact(4);
    words
        .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect()
}

/// A program of a shader that a compiler made.
pub fn program(device: &VulkanDevice, bytes: &[u8], options: ProgramOptions<'_>) -> Program {
    // SAFETY: a compiler's output, valid, which follows the pointers that it is given.
    unsafe { device.driver().program(&spirv(bytes), options) }.expect("a program")
}

/// Push constants of so many words, as long as the program wants them.
pub fn push(program: &Program, words: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(program.info().push_constant_bytes as usize, 0);
    bytes
}

/// What a device does to a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Into the word of `other` with the same number.
    Load,
    /// `value`, and one more each time.
    Store,
    /// `value` more, atomically.
    Add,
    /// `value` times as much.
    Multiply,
    /// The pattern of the seed `value`.
    Fill,
    /// Adds it to `other`, atomically.
    Sum,
    /// From the pattern of its page's seed, which `other` has behind its first word, to
    /// the one of `value`. The first word tells of a word that was something else: its
    /// index, and one.
    Replace,
}

/// What to do to which words.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    operation: Operation,
    words: Pointer<u64>,
    other: Pointer<u64>,
    stride: usize,
    count: usize,
    value: u64,
    first: usize,
    wrap: usize,
}

impl Work {
    /// To one word.
    pub fn new(operation: Operation, at: *mut u64) -> Self {
        Self {
            operation,
            words: Pointer::new(at),
            other: Pointer::new(std::ptr::null_mut()),
            stride: 1,
            count: 1,
            value: 0,
            first: 0,
            wrap: 1,
        }
    }

    /// To so many.
    pub const fn count(mut self, count: usize) -> Self {
        (self.count, self.wrap) = (count, count);
        self
    }

    /// To each so manieth word from there.
    pub const fn stride(mut self, words: usize) -> Self {
        self.stride = words;
        self
    }

    /// To the first of so many pages.
    pub const fn pages(mut self, count: usize) -> Self {
        self.stride = WORDS;
        self.count(count)
    }

    /// So many times over.
    pub const fn times(mut self, times: usize) -> Self {
        self.count = self.wrap * times;
        self
    }

    /// With this value.
    pub const fn value(mut self, value: u64) -> Self {
        self.value = value;
        self
    }

    /// With these other words.
    pub fn other(mut self, other: *mut u64) -> Self {
        self.other = Pointer::new(other);
        self
    }

    /// The first word has this index in its pattern.
    pub const fn first(mut self, index: usize) -> Self {
        self.first = index;
        self
    }

    fn other_words(&self) -> usize {
        match self.operation {
            Operation::Load => self.count,
            Operation::Sum => 1,
            Operation::Replace => 1 + self.count.div_ceil(WORDS),
            _ => 0,
        }
    }

    /// One invocation of the software kernel.
    fn batch(&self, context: &Context, number: usize) -> Result<(), KernelError> {
        let from = number * BATCH;
        let upto = self.count.min(from + BATCH);
        if self.operation == Operation::Multiply && self.stride == 1 {
            let mut words = [0u64; BATCH];
            let words = &mut words[..upto - from];
            context.read_slice(self.words.at(from).cast_const(), words)?;
            for word in &mut *words {
                *word = word.wrapping_mul(self.value);
            }
            return context.write_slice(self.words.at(from), words);
        }
        for number in from..upto {
            let word = number % self.wrap * self.stride;
            let (at, index) = (self.words.at(word), self.first + word);
            match self.operation {
                Operation::Load => context.store(self.other.at(number), context.load(at)?)?,
                Operation::Store => context.store(at, self.value + number as u64)?,
                Operation::Add => context.fetch_add(at, self.value).map(drop)?,
                Operation::Multiply => {
                    context.store(at, context.load(at)?.wrapping_mul(self.value))?;
                }
                Operation::Fill => context.store(at, pattern(self.value, index))?,
                Operation::Sum => {
                    let word = context.load(at)?;
                    context.fetch_add(self.other.get(), word).map(drop)?;
                }
                Operation::Replace => {
                    let seed = context.load(self.other.at(1 + number / WORDS))?;
                    if context.load(at)? != pattern(seed, index) {
                        context.store(self.other.get(), 1 + index as u64)?;
                    } else {
                        context.store(at, pattern(self.value, index))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// As `words.comp` has it.
    fn push(&self) -> [u64; 8] {
        [
            self.words.get().addr() as u64,
            self.other.get().addr() as u64,
            self.stride as u64,
            self.count as u64,
            self.value,
            self.first as u64,
            self.wrap as u64,
            self.operation as u64,
        ]
    }

    /// All of it, named; `None` when it names nothing that a process can have.
    fn uses(&self) -> Option<Vec<Used>> {
        let slice = std::ptr::slice_from_raw_parts_mut::<u64>;
        let words = slice(self.words.get(), (self.wrap - 1) * self.stride + 1);
        let others = slice(self.other.get(), self.other_words());
        let reads = matches!(self.operation, Operation::Load | Operation::Sum);
        let words = match reads {
            true => Used::read(words.cast_const())?,
            false => Used::write(words)?,
        };
        let others = (!others.is_empty()).then(|| Used::write(others));
        Some(
            [Some(words), others.flatten()]
                .into_iter()
                .flatten()
                .collect(),
        )
    }
}

/// Why a kernel did not come to its end.
#[derive(Clone, Debug)]
pub struct Failure {
    /// For people.
    pub text: String,
    /// With the names of its parts.
    pub parts: String,
    /// The device is lost, or was removed.
    pub lost: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    fn new(error: &(impl fmt::Display + fmt::Debug), lost: bool) -> Self {
        Self {
            text: error.to_string(),
            parts: format!("{error:?}"),
            lost,
        }
    }

    /// Whether its parts have this name.
    pub fn is(&self, name: &str) -> bool {
        self.parts.contains(name)
    }

    /// Whether people are told of this address.
    pub fn names(&self, at: *const u64) -> bool {
        self.text.contains(&format!("{:#x}", at.addr()))
    }
}

impl From<LaunchVulkanError> for Failure {
    fn from(error: LaunchVulkanError) -> Self {
        let lost = matches!(error, LaunchVulkanError::Lost | LaunchVulkanError::Closed);
        Self::new(&error, lost)
    }
}

impl From<hmm::LaunchError> for Failure {
    fn from(error: hmm::LaunchError) -> Self {
        let lost = matches!(error, hmm::LaunchError::Lost | hmm::LaunchError::Closed);
        Self::new(&error, lost)
    }
}

/// A device with kernels.
#[derive(Debug)]
pub enum Device {
    /// The software device.
    Software(SoftwareDevice),
    /// A Vulkan device, with `words.comp`.
    Vulkan(Kind, VulkanDevice, Box<Program>),
}

impl From<SoftwareDevice> for Device {
    fn from(device: SoftwareDevice) -> Self {
        Self::Software(device)
    }
}

/// Nothing that Vulkan was asked for was wrong. Where the layer was not asked for, that
/// was not checked.
pub fn assert_silent() {
    if let Some(complaints) = hmm_vulkan::validation_complaints() {
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_silent();
        }
    }
}

impl Device {
    /// A Vulkan device with the tests' kernel.
    pub fn vulkan(kind: Kind, device: VulkanDevice) -> Self {
        let demand = match kind {
            Kind::Waiting => Demand::Wait,
            _ => Demand::Repeat,
        };
        let options = ProgramOptions {
            demand,
            ..ProgramOptions::default()
        };
        let program = program(&device, WORDS_KERNEL, options);
        Self::Vulkan(kind, device, Box::new(program))
    }

    /// Does the work, and waits for its end.
    pub fn run(&self, work: Work) -> Result<(), Failure> {
        let (kind, device, program) = match self {
            Self::Software(device) => {
                let groups = work.count.div_ceil(BATCH);
                device.launch(groups, |context, number| work.batch(context, number))?;
                return Ok(());
            }
            Self::Vulkan(kind, device, program) => (kind, device, program),
        };
        let groups = work.count.div_ceil(program.local_size()[0] as usize);
        let groups = [u32::try_from(groups).expect("few enough"), 1, 1];
        let push = push(program, &work.push());
        let done = match (kind, work.uses()) {
            (Kind::Named, Some(uses)) => device.launch_with(program, groups, &push, &uses),
            _ => device.launch(program, groups, &push),
        };
        done?;
        Ok(())
    }

    /// Which one it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Software(_) => Kind::Software,
            Self::Vulkan(kind, ..) => *kind,
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Software(device) => device.name(),
            Self::Vulkan(_, device, _) => device.name(),
        }
    }

    /// Failures to order.
    pub fn injector(&self) -> &'static Injector {
        match self {
            Self::Software(device) => device.injector(),
            Self::Vulkan(_, device, _) => device.driver().injector(),
        }
    }

    /// As the devices have it.
    pub fn remove(&self) -> Result<bool, hmm::Error> {
        match self {
            Self::Software(device) => device.remove(),
            Self::Vulkan(_, device, _) => device.remove(),
        }
    }
}

impl AnyDevice for Device {
    fn id(&self) -> DeviceId {
        match self {
            Self::Software(device) => device.id(),
            Self::Vulkan(_, device, _) => device.id(),
        }
    }

    fn memory(&self) -> ByteCount {
        match self {
            Self::Software(device) => device.memory(),
            Self::Vulkan(_, device, _) => device.memory(),
        }
    }

    fn free_memory(&self) -> ByteCount {
        match self {
            Self::Software(device) => device.free_memory(),
            Self::Vulkan(_, device, _) => device.free_memory(),
        }
    }
}
