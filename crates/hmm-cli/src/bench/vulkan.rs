//! The rows of `--device vulkan`: what it costs that a compute shader's pointers are the
//! program's own, against the same shader over the device's own addresses; and how fast
//! pages come to it.

use anyhow::{Context as _, bail, ensure};
use hmm::{
    ByteCount, Hmm, LaunchVulkanError, Program, ProgramOptions, Used, VulkanDevice, VulkanError,
    VulkanOptions, VulkanReport,
};

use super::sample::{Measured, Outcome, Pairs, ROUNDS, gb_per_s, shuffled, timed};
use super::transfer::{Memcpy, SIZE, STAGING, to};
use crate::floor::Area;
use crate::shader;

const ADD_UP: &[u8] = include_bytes!("add_up.spv");
/// The same, 16 bytes at a time.
const STREAM: &[u8] = include_bytes!("stream.spv");
const CHASE: &[u8] = include_bytes!("chase.spv");
/// Invocations of a workgroup of both.
const LOCAL: u32 = 64;
/// Numbers (of 4 bytes) that one invocation adds up.
const RUN: u32 = 4096;
/// What is added up; the rest of the area takes the sums.
const ADDED: ByteCount = ByteCount::mib(255);
/// Chains that are followed at the same time, and how far.
const CHAINS: u32 = 64;
const HOPS: u32 = 4000;
/// Short launches of which the fastest counts.
const LAUNCHES: usize = 5;
/// How often an area may come to other frames than before.
const LINKINGS: usize = 16;
/// Words of an area of chains before its first node: heads and ends. 2 MiB.
const BOARD: usize = 1 << 18;
/// Words from one node of a chain to the next one in memory: 64 KiB.
const FAR: usize = 8192;
/// Words between nodes that are all on the device: a cache line.
const NEAR: usize = 8;

/// An engine with a Vulkan device, or why there is none.
fn open() -> anyhow::Result<Result<(Hmm, VulkanDevice), String>> {
    let hmm = Hmm::builder().staging_limit(STAGING).open()?;
    match hmm.add_vulkan_device(VulkanOptions::new(ByteCount::mib(512))) {
        Ok(device) => Ok(Ok((hmm, device))),
        Err(hmm::Error::Vulkan(
            why @ (VulkanError::NoLoader { .. }
            | VulkanError::NoDevice { .. }
            | VulkanError::BadDriver { .. }
            | VulkanError::Feature { .. }),
        )) => {
            hmm.shutdown()?;
            Ok(Err(why.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

fn push(words: [u64; 2], numbers: [u32; 2]) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&words[0].to_le_bytes());
    bytes[8..16].copy_from_slice(&words[1].to_le_bytes());
    bytes[16..20].copy_from_slice(&numbers[0].to_le_bytes());
    bytes[20..].copy_from_slice(&numbers[1].to_le_bytes());
    bytes
}

/// A program that begins again where it has missed a page.
fn program(device: &VulkanDevice, shader: &'static [u8]) -> Result<Program, VulkanError> {
    shader::load(device, shader, ProgramOptions::default())
}

/// The sums: their numbers and where they are.
struct Sums {
    area: Area,
    runs: u32,
}

impl Sums {
    fn new() -> anyhow::Result<Self> {
        let runs = u32::try_from(ADDED.get() / u64::from(RUN * 4))?;
        let area = Area::filled(SIZE, false)?;
        Ok(Self { area, runs })
    }

    fn base(&self) -> u64 {
        self.area.range().start().get()
    }

    fn groups(&self) -> [u32; 3] {
        [self.runs.div_ceil(LOCAL), 1, 1]
    }

    /// The push constants; `distance` is added to both pointers.
    fn push(&self, distance: u64) -> [u8; 24] {
        let numbers = self.base().wrapping_add(distance);
        push([numbers, numbers + ADDED.get()], [self.runs, RUN])
    }

    fn uses(&self) -> Vec<Used> {
        let words: *const [u64] = self.area.words();
        Used::write(words.cast_mut()).into_iter().collect()
    }

    /// Whether all sums are there and right; brings them home.
    fn are_right(&self) -> bool {
        let words = self.area.words();
        let per_run = RUN as usize / 2;
        let (added, sums) = words.split_at(words.len() / 256 * 255);
        let runs = added
            .chunks_exact(per_run)
            .zip(sums.iter().flat_map(halves));
        runs.step_by(97).all(|(run, found)| {
            let numbers = run.iter().flat_map(halves);
            numbers.fold(0u32, u32::wrapping_add) == found
        })
    }
}

/// The two numbers in a word, in the order of memory.
fn halves(word: &u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
    ]
}

/// Seconds of a launch.
fn seconds(report: Result<VulkanReport, LaunchVulkanError>) -> anyhow::Result<f64> {
    Ok(report?.elapsed.as_secs_f64())
}

/// The same of the fastest of some launches: they are short, and memory that has just
/// come is in no cache.
fn fastest(launch: impl Fn() -> Result<VulkanReport, LaunchVulkanError>) -> anyhow::Result<f64> {
    let mut fastest = f64::INFINITY;
    for _ in 0..LAUNCHES {
        fastest = fastest.min(seconds(launch())?);
    }
    Ok(fastest)
}

/// Runs of numbers that lie together, all on the device.
pub fn contiguous() -> anyhow::Result<Outcome> {
    let (hmm, device) = match open()? {
        Ok(opened) => opened,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let sums = Sums::new()?;
    let program = program(&device, ADD_UP)?;
    let (mut unchecked, mut checked) = (Pairs::default(), Pairs::default());
    for round in 0..=ROUNDS {
        to(&hmm, &sums.area, Some(device.id()))?;
        let named = || device.launch_with(&program, sums.groups(), &sums.push(0), &sums.uses());
        // Memory that has just come is in no cache: whoever reads it first is slower.
        let distance = named()?.distance.unwrap_or(0);
        ensure!(distance != 0, "the area's frames do not lie together");
        // They are short, so several of each, and none of them always first.
        for first in 0..3 {
            let (mut direct, mut by_name, mut on_demand) = (0.0, 0.0, 0.0);
            for turn in 0..3 {
                match (first + turn) % 3 {
                    0 => by_name = seconds(named())?,
                    1 => {
                        let push = sums.push(distance);
                        let plain = shader::launch_plain(&program, sums.groups(), &push);
                        direct = seconds(plain)?;
                    }
                    _ => {
                        let demanded = device.launch(&program, sums.groups(), &sums.push(0));
                        on_demand = seconds(demanded)?;
                    }
                }
            }
            if round > 0 {
                unchecked.add(by_name, direct);
                checked.add(direct, on_demand);
            }
        }
        ensure!(sums.are_right(), "a sum is wrong");
    }
    drop(program);
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![
        ("vulkan_unchecked", in_ms(unchecked.measured())),
        ("vulkan_checked", in_ms(checked.measured())),
    ]))
}

fn in_ms(measured: Measured) -> Measured {
    Measured {
        value: measured.value * 1e3,
        floor: measured.floor.map(|floor| floor * 1e3),
        ..measured
    }
}

/// The same with everything at home when the launch begins.
pub fn cold() -> anyhow::Result<Outcome> {
    let (hmm, device) = match open()? {
        Ok(opened) => opened,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let sums = Sums::new()?;
    let program = program(&device, STREAM)?;
    let mut memcpy = Memcpy::new(false)?;
    let (mut demanded, mut named) = (Pairs::default(), Pairs::default());
    for round in 0..=ROUNDS {
        to(&hmm, &sums.area, None)?;
        let floor = memcpy.measure();
        let (time, report) = timed(|| device.launch(&program, sums.groups(), &sums.push(0)));
        report?;
        to(&hmm, &sums.area, None)?;
        let again = memcpy.measure();
        let (named_time, report) =
            timed(|| device.launch_with(&program, sums.groups(), &sums.push(0), &sums.uses()));
        report?;
        ensure!(sums.are_right(), "a sum is wrong");
        if round > 0 {
            demanded.add(floor, gb_per_s(SIZE.get(), time));
            named.add(again, gb_per_s(SIZE.get(), named_time));
        }
    }
    drop(program);
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![
        ("vulkan_stream_cold", demanded.measured()),
        ("vulkan_stream_named", named.measured()),
    ]))
}

/// Chains of pointers through an area. Its first part is the board: where each chain
/// begins, and where it ended. All in one area, so that all is at one distance.
struct Chains {
    area: Area,
    step: usize,
    /// The nodes in the order of the one cycle that they are linked to.
    order: Vec<usize>,
}

impl Chains {
    /// Nodes `step` words apart in one random cycle.
    fn new(step: usize) -> anyhow::Result<Self> {
        let area = Area::new(SIZE, false)?;
        let nodes = (area.words().len() - BOARD) / step;
        let mut chains = Self {
            area,
            step,
            order: shuffled(nodes, 0x51ED),
        };
        chains.link(0);
        Ok(chains)
    }

    /// The address that a place in the order stands for, as the device has it.
    fn address(&self, place: usize, distance: u64) -> u64 {
        let word = self.word(place) as u64;
        let base = self.area.range().start().get();
        base.wrapping_add(distance).wrapping_add(word * 8)
    }

    fn word(&self, place: usize) -> usize {
        BOARD + self.order[place % self.order.len()] * self.step
    }

    /// Where in the order a chain begins.
    fn first(&self, chain: usize) -> usize {
        chain * (self.order.len() / CHAINS as usize)
    }

    /// Links all nodes; `distance` is added to all pointers.
    fn link(&mut self, distance: u64) {
        for place in 0..self.order.len() {
            let (word, next) = (self.word(place), self.address(place + 1, distance));
            self.area.words_mut()[word] = next;
        }
        for chain in 0..CHAINS as usize {
            let head = self.address(self.first(chain), distance);
            self.area.words_mut()[chain] = head;
        }
        self.area.words_mut()[CHAINS as usize..BOARD].fill(0);
    }

    /// Links the nodes by the device's own addresses, on the device. What the CPU writes
    /// goes home, and may come to other frames when it returns: then once more.
    fn link_on(
        &mut self,
        hmm: &Hmm,
        device: &VulkanDevice,
        program: &Program,
        mut distance: Option<u64>,
    ) -> anyhow::Result<u64> {
        for _ in 0..LINKINGS {
            let linked = distance.context("the area's frames do not lie together")?;
            self.link(linked);
            to(hmm, &self.area, Some(device.id()))?;
            // Follows no chain: tells where the frames are.
            let nothing = push([0, 0], [0, 0]);
            let report = device.launch_with(program, [1, 1, 1], &nothing, &self.uses())?;
            distance = report.distance;
            if distance == Some(linked) {
                return Ok(linked);
            }
        }
        bail!("the area came to other frames {LINKINGS} times")
    }

    fn uses(&self) -> Vec<Used> {
        let words: *const [u64] = self.area.words();
        Used::write(words.cast_mut()).into_iter().collect()
    }

    /// Whether all chains have been followed to where they end.
    fn ends_are_right(&self, distance: u64) -> bool {
        let ends = &self.area.words()[CHAINS as usize..];
        (0..CHAINS as usize)
            .all(|chain| ends[chain] == self.address(self.first(chain) + HOPS as usize, distance))
    }

    fn push(&self, distance: u64) -> [u8; 24] {
        let heads = self.area.range().start().get().wrapping_add(distance);
        push([heads, heads + u64::from(CHAINS) * 8], [CHAINS, HOPS])
    }
}

/// Chains through memory that is all on the device: checked, against plain pointers.
pub fn chase() -> anyhow::Result<Outcome> {
    let (hmm, device) = match open()? {
        Ok(opened) => opened,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let mut chains = Chains::new(NEAR)?;
    let program = program(&device, CHASE)?;
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        chains.link(0);
        to(&hmm, &chains.area, Some(device.id()))?;
        let named = device.launch_with(&program, [1, 1, 1], &chains.push(0), &chains.uses())?;
        let value = fastest(|| device.launch(&program, [1, 1, 1], &chains.push(0)))?;
        ensure!(chains.ends_are_right(0), "a chain ends elsewhere");
        // The same chains of the device's own addresses.
        let distance = chains.link_on(&hmm, &device, &program, named.distance)?;
        let push = chains.push(distance);
        let floor = fastest(|| shader::launch_plain(&program, [1, 1, 1], &push))?;
        ensure!(
            chains.ends_are_right(distance),
            "a chain of the device's own addresses ends elsewhere"
        );
        if round > 0 {
            pairs.add(floor, value);
        }
    }
    drop(program);
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![(
        "vulkan_checked_chase",
        in_ms(pairs.measured()),
    )]))
}

/// How many dispatches it takes to follow chains through memory that is at home.
pub fn dispatches() -> anyhow::Result<Outcome> {
    let (hmm, device) = match open()? {
        Ok(opened) => opened,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let chains = Chains::new(FAR)?;
    let count = |demand| -> anyhow::Result<Measured> {
        to(&hmm, &chains.area, None)?;
        let options = ProgramOptions {
            demand,
            ..ProgramOptions::default()
        };
        let program = shader::load(&device, CHASE, options)?;
        let report = device.launch(&program, [1, 1, 1], &chains.push(0))?;
        Ok(Measured {
            value: report.dispatches as f64,
            floor: None,
            ratio: None,
        })
    };
    let measured = vec![
        ("vulkan_chase_repeat", count(hmm::Demand::Repeat)?),
        ("vulkan_chase_wait", count(hmm::Demand::Wait)?),
    ];
    hmm.shutdown()?;
    Ok(Outcome::Measured(measured))
}
