//! Memory at a Vulkan device's own addresses.
mod common;

use common::either::{add_vulkan, assert_silent, program, push};
use common::watchdog;
use hmm::{ByteCount, Hmm, ProgramOptions, Used, VulkanError, VulkanOptions};

/// Follows pointers to their end, and adds up what it passes.
const CHASE: &[u8] = include_bytes!("kernels/chase.spv");
const WORDS: usize = 512;
const NODES: usize = 700;

/// Where no driver lets it be, the reason is said, and nothing has changed.
#[test]
fn pointers_to_it_are_the_devices() {
    let _dog = watchdog("pointers_to_it_are_the_devices", 100);
    let hmm = Hmm::open().unwrap();
    let device = or_skip!(add_vulkan(
        &hmm,
        VulkanOptions::new(ByteCount::mib(8)).poison_freed(true)
    ));
    let memory = match device.map_identical() {
        Ok(memory) => memory,
        Err(error @ VulkanError::NoIdentity { .. }) => {
            assert!(error.to_string().contains(device.name()), "{error}");
            hmm.shutdown().unwrap();
            skip!("{error}");
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(memory.len(), 8 << 20);
    let again = device.map_identical().unwrap_err();
    assert!(matches!(again, VulkanError::NoIdentity { .. }), "{again}");
    let words: *mut u64 = memory.cast();
    let word = |index: usize| words.wrapping_add(index);
    // SAFETY: a word of the mapping, which this test alone uses.
    let set = |index, value| unsafe { word(index).write_volatile(value) };
    // SAFETY: the same.
    let get = |index| unsafe { word(index).read_volatile() };
    // A chain all over it, in a page of its own each.
    let node = |number: usize| number * 37 % NODES * WORDS;
    let head = NODES * WORDS;
    for number in 0..NODES {
        let next = match number + 1 {
            NODES => 0,
            next => word(node(next)).expose_provenance() as u64,
        };
        set(node(number), next);
        set(node(number) + 1, number as u64);
    }
    let first = word(node(0)).expose_provenance() as u64;
    let all = Used::write(memory).unwrap();
    let program = program(&device, CHASE, ProgramOptions::default());
    let addresses = [head, head + 1].map(|index| word(index).addr() as u64);
    let push = push(&program, &[addresses[0], addresses[1], 1]);
    let sum: u64 = (0..NODES as u64).sum();
    for round in 0..3 {
        set(head, first);
        set(head + 1, round);
        let report = device
            .launch_with(&program, [1, 1, 1], &push, &[all])
            .unwrap();
        assert_eq!(report.distance, Some(0));
        assert_eq!(get(head + 1), sum);
        // On demand, too: pages that are not named are looked up.
        set(head + 1, round);
        device.launch(&program, [1, 1, 1], &push).unwrap();
        assert_eq!(get(head + 1), sum);
    }
    drop(program);
    assert!(device.remove().unwrap());
    assert!((0..NODES).all(|number| get(node(number) + 1) == number as u64));
    assert_silent();
    hmm.shutdown().unwrap();
}
