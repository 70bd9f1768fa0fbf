//! Opening a device, and every way in which that fails. What can end the process, or
//! needs another environment, runs in a process of its own.

mod common;

use std::process::Command;
use std::sync::Mutex;

use common::{Tested, arguments, assert_silent, groups, load, try_load};
use hmm_conformance::{Engine, Operation, Subject};
use hmm_device::{Embedder, Join, Standalone};
use hmm_hal::Device;
use hmm_types::{ByteCount, PageRange, VirtAddr};
use hmm_vulkan::{AddressPolicy, Choice, Variant, VulkanConfig, VulkanDevice, VulkanError};

/// Tells a child of a test what it is to do.
const ROLE: &str = "HMM_VULKAN_TEST_ROLE";

fn config(mib: u64) -> VulkanConfig<'static> {
    VulkanConfig::new(ByteCount::mib(mib))
}

/// Runs a test of this file again, in a process with other variables, and returns what it
/// printed.
fn in_child(test: &str, role: &str, variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, role)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}

fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

#[test]
fn without_a_driver_the_error_says_so() {
    if role().is_some() {
        let error = VulkanDevice::open(config(8)).unwrap_err();
        println!("error: {error}");
        let error = hmm_vulkan::list().map(|all| all.len());
        println!("list: {error:?}");
        return;
    }
    let nowhere = [
        ("VK_DRIVER_FILES", "/nowhere"),
        ("HMM_VULKAN_VALIDATION", ""),
    ];
    let text = in_child("without_a_driver_the_error_says_so", "open", &nowhere);
    let known = ["no Vulkan device", "there is no Vulkan here"];
    assert!(known.iter().any(|error| text.contains(error)), "{text}");
}

/// Kernels are loaded, and dropped, while the device is closed: an error at worst.
#[test]
fn a_kernel_that_comes_too_late_is_refused() {
    for _ in 0..8 {
        let device = device!(config(4));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                std::thread::spawn(move || {
                    let mut loaded = 0;
                    loop {
                        match try_load(device, Variant::Checked) {
                            Ok(kernel) => drop(kernel),
                            Err(VulkanError::Lost) => return loaded,
                            Err(error) => panic!("{error}"),
                        }
                        loaded += 1;
                    }
                })
            })
            .collect();
        std::thread::sleep(std::time::Duration::from_millis(20));
        device.close();
        let loaded: Vec<u32> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        println!("{loaded:?} kernels before");
    }
    assert_silent();
}

/// How pointers become the device's depends on how much memory there is, and on where.
#[test]
fn a_device_says_how_pointers_become_its_own() {
    let small = device!(VulkanConfig::new(ByteCount::kib(1024)));
    assert_eq!(small.policy(), AddressPolicy::Table);
    let refused = small.offers_identity().unwrap_err().to_string();
    assert!(refused.contains("less than 2 MiB"), "{refused}");
    small.close();

    let device = device!(config(8));
    assert_eq!(device.policy(), AddressPolicy::Delta);
    let offered = device.offers_identity();
    println!("identity: {offered:?}");
    // Asking has changed nothing.
    assert_eq!(offered, device.offers_identity());
    assert_eq!(device.policy(), AddressPolicy::Delta);
    assert_eq!(device.map_identical().map(|_| ()), offered);
    let expected = match offered {
        Ok(()) => AddressPolicy::Identity,
        Err(VulkanError::NoIdentity { .. }) => AddressPolicy::Delta,
        Err(error) => panic!("{error}"),
    };
    assert_eq!(device.policy(), expected);
    device.close();
    assert_silent();
}

#[test]
fn a_device_says_what_it_is() {
    let device = device!(config(8));
    let about = device.describe();
    assert_eq!(device.info().name, about.name);
    assert_eq!(device.info().memory, ByteCount::mib(8));
    assert!(about.problem.is_none());
    assert!(about.memory.get() > 0 && !about.driver.is_empty() && !about.api.is_empty());
    let all = hmm_vulkan::list().unwrap();
    assert!(all.iter().any(|one| one.name == about.name));
    println!("{about:#?}");
    if about.is_cpu {
        assert!(about.host_visible && about.no_stall.is_none());
    }
    device.close();
    assert_silent();
}

#[test]
fn a_device_is_chosen_by_number_or_name() {
    let first = device!(config(8));
    let name = first.describe().name;
    first.close();
    let all = hmm_vulkan::list().unwrap();
    let number = all.iter().position(|one| one.name == name).unwrap();
    let word = name.split_whitespace().next().unwrap().to_uppercase();
    for choice in [Choice::Index(number), Choice::Name(&word)] {
        let mut config = config(8);
        config.device = choice;
        let device = VulkanDevice::open(config).unwrap();
        assert_eq!(device.describe().name, name);
        device.close();
    }
    for choice in [Choice::Index(99), Choice::Name("no such device")] {
        let mut config = config(8);
        config.device = choice;
        let error = VulkanDevice::open(config).unwrap_err();
        assert!(matches!(error, VulkanError::NoDevice { .. }), "{error}");
        // It names those that there are.
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert_silent();
}

#[test]
fn memory_that_makes_no_sense_is_refused_with_the_limit() {
    let device = device!(config(8));
    device.close();
    for asked in [ByteCount::new(4095), ByteCount::new(1 << 50)] {
        let error = VulkanDevice::open(VulkanConfig::new(asked)).unwrap_err();
        let VulkanError::MemorySize { limit, .. } = error else {
            panic!("{error}");
        };
        assert!(error.to_string().contains(&limit.to_string()), "{error}");
    }
    assert_silent();
}

/// Devices can be opened and closed again and again; what they were is given back.
#[test]
fn nothing_is_left_behind() {
    let mappings = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    let mut before = 0;
    for round in 0..6 {
        let device = device!(config(64));
        let tested = Tested::new(device, Variant::Checked);
        let engine = Engine::new(tested, 4);
        let to = engine.address(0);
        tested
            .launch(Operation::Fill {
                to,
                count: 99,
                first: 0,
            })
            .unwrap();
        tested.close();
        if round == 2 {
            before = mappings();
        }
    }
    let after = mappings();
    // The engine's pages of each round, and what the C library keeps.
    assert!(after <= before + 24, "{before} mappings, then {after}");
}

/// The objects that are loaded, by name, and where the C library has what it knows of them.
fn link_maps() -> Vec<(String, u64)> {
    /// What `struct link_map` of link.h begins with.
    #[repr(C)]
    struct LinkMap {
        address: usize,
        name: *const std::ffi::c_char,
        dynamic: *const std::ffi::c_void,
        next: *const LinkMap,
    }
    // SAFETY: the handle of the program itself, which is the first of the list; nothing is
    // unloaded meanwhile.
    let mut at: *const LinkMap = unsafe { libc::dlopen(std::ptr::null(), libc::RTLD_LAZY) }.cast();
    let mut all = Vec::new();
    while !at.is_null() {
        // SAFETY: a member of that list, whose name is a text.
        let (name, next) = unsafe { (std::ffi::CStr::from_ptr((*at).name), (*at).next) };
        all.push((name.to_string_lossy().into_owned(), at.addr() as u64));
        at = next;
    }
    all
}

/// An embedder that notes what is excluded.
#[derive(Default, Debug)]
struct Noting {
    excluded: Mutex<Vec<PageRange>>,
    untouched: Mutex<Vec<PageRange>>,
    /// Was excluded, and is not any more.
    claimed: Mutex<Vec<PageRange>>,
}

impl Noting {
    fn is_excluded(&self, address: u64) -> bool {
        let excluded = self.excluded.lock().unwrap();
        let mut all = excluded.iter();
        all.any(|range| range.contains(VirtAddr::new(address)))
    }

    /// As if these addresses were the program's now.
    fn claim(&self, addresses: &[u64]) {
        let mut excluded = self.excluded.lock().unwrap();
        let is_claimed = |range: &PageRange| {
            let mut all = addresses.iter();
            all.any(|&address| range.contains(VirtAddr::new(address)))
        };
        let (claimed, left) = excluded.drain(..).partition(is_claimed);
        *excluded = left;
        self.claimed.lock().unwrap().extend::<Vec<_>>(claimed);
    }
}

impl Embedder for Noting {
    fn exclude(&self, range: PageRange) {
        if access_of(range.start()).is_some_and(|access| access.starts_with("---")) {
            self.untouched.lock().unwrap().push(range);
        }
        self.excluded.lock().unwrap().push(range);
    }

    fn include(&self, range: PageRange) {
        for list in [&self.claimed, &self.excluded] {
            let mut list = list.lock().unwrap();
            if let Some(index) = list.iter().position(|&known| known == range) {
                list.swap_remove(index);
                return;
            }
        }
        panic!("{range:?} was not excluded before");
    }

    fn spawn(
        &self,
        name: String,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<Box<dyn Join>> {
        Standalone.spawn(name, body)
    }
}

/// Where code is that a driver has made: private memory that is no file's.
fn made_code() -> Vec<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let code = maps.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let made = words[1] == "r-xp" && words[4] == "0" && words.len() == 5;
        let (start, _) = words[0].split_once('-')?;
        made.then(|| u64::from_str_radix(start, 16).unwrap())
    });
    code.collect()
}

/// What a driver gives back the program can get, and a kernel be given a pointer to it. When
/// the driver has it again it is the driver's.
#[test]
fn what_a_driver_gets_again_is_excluded_again() {
    let noting: &'static Noting = Box::leak(Box::default());
    device!(config(8)).close();
    let device = VulkanDevice::open_with(config(8), noting).unwrap();
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, 4);
    let push = arguments([0, 0, engine.address(0).get(), 0, 0]);
    let (mut earlier, mut again) = (Vec::new(), 0);
    for _ in 0..20 {
        let before = made_code();
        let kernel = load(device, Variant::Checked);
        device.launch(&kernel, groups(1), &push, &[]).unwrap();
        let code = made_code();
        let code: Vec<u64> = code.into_iter().filter(|at| !before.contains(at)).collect();
        for &code in &code {
            assert!(noting.is_excluded(code), "{code:#x}, {again} times before");
            again += usize::from(earlier.contains(&code));
        }
        drop(kernel);
        noting.claim(&code);
        earlier.extend(code);
    }
    println!("a place of code was used again {again} times");
    assert!(again > 0 || !device.describe().is_cpu || !device.describe().imports_host);
    tested.close();
}

/// What the device and its driver need does not migrate.
#[test]
fn memory_and_the_drivers_own_are_excluded() {
    let noting: &'static Noting = Box::leak(Box::default());
    // Is there one at all? Its threads' stacks are used again by those of the next.
    device!(config(8)).close();
    let device = VulkanDevice::open_with(config(8), noting).unwrap();
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, 4);
    let to = engine.address(0);
    tested
        .launch(Operation::Fill {
            to,
            count: 99,
            first: 0,
        })
        .unwrap();
    let is_excluded = |address| noting.is_excluded(address);
    // A driver can make the calls of a CPU's driver in another process (Mesa's Venus).
    let is_here = device.describe().is_cpu && device.describe().imports_host;
    if is_here {
        let untouched = noting.untouched.lock().unwrap();
        assert!(
            untouched.iter().any(|range| range.bytes().get() > 8 << 20),
            "the device's memory is not excluded before it can be used: {untouched:?}"
        );
    }
    // A call from one object to another one looks there, for the first time.
    let known = link_maps().into_iter().filter(|(name, _)| {
        let name = name.rsplit('/').next().unwrap_or_default();
        name.starts_with("libvulkan") || name.starts_with("libVkLayer")
    });
    let known: Vec<_> = known.collect();
    assert!(!known.is_empty(), "{:?}", link_maps());
    for (name, at) in known {
        assert!(is_excluded(at), "{name} at {at:#x} is not in {noting:?}");
    }
    // The stack of every thread that the driver has started.
    let mut found = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.starts_with("llvmpipe") || name.contains("lvp") {
            let status = std::fs::read_to_string(task.join("syscall")).unwrap_or_default();
            let words: Vec<&str> = status.split_whitespace().collect();
            if let [.., stack, _] = words[..] {
                let stack = u64::from_str_radix(stack.trim_start_matches("0x"), 16).unwrap();
                assert!(is_excluded(stack), "the stack of {name} at {stack:#x}");
                found += 1;
            }
        }
    }
    assert!(!is_here || found > 0, "no thread of the driver was found");
    let code = made_code();
    for &code in &code {
        assert!(is_excluded(code), "the driver's code at {code:#x}");
    }
    assert!(
        !is_here || !code.is_empty(),
        "no code of the driver was found"
    );
    assert!(device.stats().driver_ranges > 0);
    assert!(!device.stats().shares_heap);
    tested.close();
    // Nothing stays excluded but what another thread may have been given.
    let left = noting.excluded.lock().unwrap();
    assert!(left.is_empty(), "{left:?}");
}

/// The access rights of the mapping that an address lies in.
fn access_of(address: VirtAddr) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let inside = (start..end).contains(&address.get());
        inside.then(|| words.next().unwrap_or_default().to_owned())
    })
}

/// Without this the other tests' silence would prove nothing.
#[test]
fn the_validation_layer_does_complain() {
    if role().is_some() {
        let device = VulkanDevice::open(config(8)).unwrap();
        // A kernel whose push constants do not fit its layout.
        let words = common::words(common::CHECKED);
        let code = hmm_vulkan::KernelCode {
            words: &words,
            entry: c"main",
            local_size: [common::LOCAL, 1, 1],
            push_constant_bytes: 8,
            control_constant: Some(9),
            variant: Variant::Checked,
        };
        // SAFETY: it is never launched.
        let kernel = unsafe { device.load(&code) };
        println!("complaints: {:?}", hmm_vulkan::validation_complaints());
        drop(kernel);
        return;
    }
    if hmm_vulkan::validation_complaints().is_none() {
        skip!("HMM_VULKAN_VALIDATION is not set (`cargo xtask vulkan` says how)");
    }
    device!(config(8)).close();
    let text = in_child("the_validation_layer_does_complain", "complain", &[]);
    assert!(text.contains("complaints: Some([\""), "{text}");
    assert!(text.contains("VUID"), "{text}");
}
