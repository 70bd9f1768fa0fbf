//! A Vulkan device in an engine: compute shaders on the program's own memory, while the
//! CPU uses it as well. On lavapipe, where there is no GPU.
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::either::{add_vulkan, program};
use common::{Map, PAGE, WORDS, watchdog};
use hmm::{
    ByteCount, Demand, Hmm, LaunchVulkanError, Program, ProgramOptions, Used, VulkanDevice,
    VulkanError, VulkanOptions,
};

const WALK: &[u8] = include_bytes!("kernels/walk_write.spv");
const BARRIER: &[u8] = include_bytes!("kernels/barrier.spv");
const CHASE: &[u8] = include_bytes!("kernels/chase.spv");

/// An engine with such a device, or why there is none.
fn open(memory: ByteCount) -> Result<(Hmm, VulkanDevice), String> {
    let hmm = Hmm::open().unwrap();
    let device = add_vulkan(&hmm, VulkanOptions::new(memory).poison_freed(true))?;
    Ok((hmm, device))
}

/// Lists of nodes, one for each of the first pages, through all pages: a node is two
/// words at the start of a page, and the board with the heads is the last page.
fn link(map: &Map, chains: usize) -> usize {
    let nodes = map.pages() - 1;
    for node in 0..nodes {
        let next = node + chains;
        let next = if next < nodes {
            map.page(next).addr() as u64
        } else {
            0
        };
        map.set(node * WORDS, next);
        map.set(node * WORDS + 1, node as u64);
    }
    for chain in 0..chains {
        map.set(nodes * WORDS + chain, map.page(chain).addr() as u64);
    }
    nodes
}

fn push(board: *const u8, chains: usize) -> Vec<u8> {
    let mut bytes = (board.addr() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&u32::try_from(chains).unwrap().to_le_bytes());
    bytes
}

/// The push constants as long as the program wants them.
fn padded(program: &Program, mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(program.info().push_constant_bytes as usize, 0);
    bytes
}

#[test]
fn every_node_is_changed_once_while_the_cpu_looks_on() {
    const CHAINS: usize = 100;
    const ROUNDS: u64 = 5;
    let _dog = watchdog("every_node_is_changed_once_while_the_cpu_looks_on", 200);
    let (hmm, device) = or_skip!(open(ByteCount::mib(8)));
    // More than the device holds.
    let map = Map::new(4096);
    let nodes = link(&map, CHAINS);
    let program = program(&device, WALK, ProgramOptions::default());
    let parameters = padded(&program, push(map.page(nodes), CHAINS));
    let stop = AtomicBool::new(false);
    let looks = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) {
                at = (at + 577) % nodes;
                let value = map.get(at * WORDS + 1);
                assert!(
                    (at as u64..=at as u64 + ROUNDS).contains(&value),
                    "node {at}: {value}"
                );
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..ROUNDS {
            device.launch(&program, [2, 1, 1], &parameters).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{} looks, {:?}", looks.into_inner(), device.stats());
    assert!(hmm.statistics().evicted_pages > 0);
    for node in 0..nodes {
        assert_eq!(
            map.get(node * WORDS + 1),
            node as u64 + ROUNDS,
            "node {node}"
        );
    }
    drop(program);
    drop(map);
    assert_eq!(device.free_memory(), device.memory());
    hmm.shutdown().unwrap();
}

#[test]
fn what_is_named_is_found_by_a_constant() {
    const CHAINS: usize = 64;
    let _dog = watchdog("what_is_named_is_found_by_a_constant", 100);
    let (hmm, device) = or_skip!(open(ByteCount::mib(16)));
    let map = Map::new(2000);
    let nodes = link(&map, CHAINS);
    let program = program(&device, WALK, ProgramOptions::default());
    let parameters = padded(&program, push(map.page(nodes), CHAINS));
    let all = std::ptr::slice_from_raw_parts_mut(map.at(), map.pages() * PAGE);
    let used = [Used::write(all).unwrap()];
    for round in 1..=4 {
        let report = device
            .launch_with(&program, [1, 1, 1], &parameters, &used)
            .unwrap();
        assert!(report.distance.is_some(), "round {round}: {report:?}");
        assert_eq!(report.dispatches, 1);
        assert_eq!(on_device_of(&hmm, &map, &device), map.pages() as u64);
        // Some go home, and come back to where they were.
        for node in (0..nodes).step_by(97) {
            assert_eq!(map.get(node * WORDS + 1), node as u64 + round);
        }
    }
    // More than the device holds.
    let large = Map::new(8192);
    large.fill(1);
    let all = std::ptr::slice_from_raw_parts_mut(large.at(), large.pages() * PAGE);
    let refused = device.launch_with(
        &program,
        [1, 1, 1],
        &parameters,
        &[Used::write(all).unwrap()],
    );
    assert!(
        matches!(refused, Err(LaunchVulkanError::Kernel(_))),
        "{refused:?}"
    );
    large.check(1);
    drop(program);
    hmm.shutdown().unwrap();
    for node in 0..nodes {
        assert_eq!(map.get(node * WORDS + 1), node as u64 + 4);
    }
}

fn on_device_of(hmm: &Hmm, map: &Map, device: &VulkanDevice) -> u64 {
    hmm.residency(map.range())
        .unwrap()
        .on_device(device.id())
        .get()
}

#[test]
fn what_cannot_be_run_is_refused_with_a_reason() {
    let _dog = watchdog("what_cannot_be_run_is_refused_with_a_reason", 100);
    let (hmm, device) = or_skip!(open(ByteCount::mib(4)));
    let again = ProgramOptions {
        demand: Demand::Repeat,
        ..ProgramOptions::default()
    };
    for (shader, why) in [(WALK, "after it has written"), (BARRIER, "barrier")] {
        let program = program(&device, shader, again);
        let reason = program.on_demand().unwrap_err().to_owned();
        assert!(reason.contains(why), "{reason}");
        let parameters = padded(&program, Vec::new());
        let refused = device.launch(&program, [1, 1, 1], &parameters).unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
    // SAFETY: refused before any driver sees it.
    let refused = unsafe { device.driver().program(&[1, 2, 3], again) }.unwrap_err();
    assert!(
        matches!(refused, VulkanError::BadKernel { .. }),
        "{refused}"
    );
    // A pointer to nothing is an error of the launch, and of nothing else.
    let chase = program(&device, CHASE, again);
    let refused = device.launch(&chase, [1, 1, 1], &[0x10; 1]);
    assert!(
        matches!(refused, Err(LaunchVulkanError::Limit { .. })),
        "{refused:?}"
    );
    let walk = program(&device, WALK, ProgramOptions::default());
    let nothing = padded(&walk, push(std::ptr::without_provenance(0x10_0000), 1));
    let refused = device.launch(&walk, [1, 1, 1], &nothing);
    assert!(
        matches!(refused, Err(LaunchVulkanError::Kernel(_))),
        "{refused:?}"
    );
    // And the device goes on.
    let map = Map::new(10);
    let nodes = link(&map, 1);
    let parameters = padded(&walk, push(map.page(nodes), 1));
    device.launch(&walk, [1, 1, 1], &parameters).unwrap();
    assert_eq!(map.get(1), 1);
    drop((walk, chase));
    assert!(device.remove().unwrap());
    hmm.shutdown().unwrap();
}

#[test]
fn a_lost_device_gives_back_what_can_be_read() {
    let _dog = watchdog("a_lost_device_gives_back_what_can_be_read", 100);
    let (hmm, device) = or_skip!(open(ByteCount::mib(4)));
    let map = Map::new(100);
    map.fill(3);
    hmm.migrate(map.range(), device.id()).unwrap();
    device
        .driver()
        .injector()
        .lose(hmm::LossMode::MemoryReadable);
    let walk = program(&device, WALK, ProgramOptions::default());
    let parameters = padded(&walk, push(map.page(0), 1));
    let lost = device.launch(&walk, [1, 1, 1], &parameters);
    assert_eq!(lost.unwrap_err(), LaunchVulkanError::Lost);
    map.check(3);
    drop(walk);
    hmm.shutdown().unwrap();
}
