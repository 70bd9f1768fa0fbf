//! Breadth-first search on a device whose memory is too small for the graph:
//! `cargo run --release -p hmm --example bfs`.
//!
//! The graph lies in ordinary `Vec`s. The compute shader `bfs/level.comp` gets pointers to
//! them and follows these; what it misses comes to the device, and what does not fit there
//! any more goes home.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use clap::Parser;
use hmm::{
    ByteCount, Demand, Hmm, LaunchVulkanError, Program, ProgramOptions, VulkanChoice, VulkanDevice,
    VulkanError, VulkanOptions,
};

#[path = "bfs/graph.rs"]
mod graph;
#[path = "bfs/show.rs"]
mod show;

use graph::{Graph, UNREACHED};
use show::{Level, Outcome};

/// `level.comp`, compiled by `cargo xtask shaders`.
const LEVEL: &[u8] = include_bytes!("bfs/level.spv");
/// Bytes of its push constants.
const PARAMETERS: usize = 40;

/// Searches a graph breadth first on a Vulkan device that has too little memory for it.
#[derive(Debug, Parser)]
#[command(
    name = "bfs",
    after_help = "What happens:
  A graph as Graph500 has it (Kronecker, or RMAT) is built in three ordinary Vecs. The
  CPU searches it alone. Then a compute shader does, on the same Vecs, a level in each
  launch: pages come to the device as it follows pointers to them, and others are
  evicted to make room. The levels are compared at the end, vertex by vertex.

Examples:
  cargo run --release -p hmm --example bfs
  ... --example bfs -- --scale 18 --device-memory 8    smaller
  ... --example bfs -- --device-memory 1024            all fits: nothing is evicted
  ... --example bfs -- --device llvmpipe               a device by a part of its name
  ... --example bfs -- --json | jq .evicted_pages

Without a GPU, `eval \"$(cargo xtask vulkan)\"` gets Mesa's lavapipe first. It is the CPU,
so do not expect it to be faster than the CPU alone.

Exit status: 0 when every level is right; 1 when not, or on an error; 2 for arguments
that make no sense."
)]
pub struct Options {
    /// The graph has 2^SCALE vertices
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(4..=23))]
    pub scale: u32,
    /// Edges for each vertex; each is stored twice, once for either end
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub degree: u32,
    /// Memory of the device, in MiB; one invocation needs the levels (4 bytes a vertex) and
    /// the longest list of neighbours at a time
    #[arg(long, value_name = "MIB", default_value_t = 32,
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub device_memory: u64,
    /// The first device with this in its name [default: the first that can be used]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = search(&options).and_then(|outcome| {
        outcome.print(options.json)?;
        Ok(outcome.is_right())
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(advice) = advice(&*error) {
                eprintln!("{advice}");
            }
            ExitCode::FAILURE
        }
    }
}

/// What to do about an error.
fn advice(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if let Some(LaunchVulkanError::Kernel(_)) = error.downcast_ref() {
        return Some("If the device has too little memory: --device-memory gives it more.");
    }
    match error.downcast_ref::<hmm::Error>()? {
        hmm::Error::Vulkan(
            VulkanError::NoLoader { .. }
            | VulkanError::NoDevice { .. }
            | VulkanError::BadDriver { .. }
            | VulkanError::ApiTooOld { .. }
            | VulkanError::Feature { .. },
        ) => Some(
            "This example takes a Vulkan 1.2 driver: a GPU's own, or Mesa's lavapipe, which\n\
             `eval \"$(cargo xtask vulkan)\"` gets. `cargo run -- info` lists what there is.",
        ),
        hmm::Error::Open(_) => Some("`cargo run -- info` says what is missing."),
        _ => None,
    }
}

/// Builds the graph, has the CPU and the device search it, and compares.
pub fn search(options: &Options) -> Result<Outcome, Box<dyn Error>> {
    let hmm = Hmm::open()?;
    let device = open(&hmm, options)?;
    let program = load(&device)?;

    eprintln!("building the graph");
    let graph = Graph::kronecker(options.scale, options.degree);
    let (source, digest) = (graph.source(), graph.digest());
    eprintln!("searching on the CPU alone");
    let start = Instant::now();
    let expected = graph.search(source);
    let cpu = start.elapsed();

    eprintln!("searching on {}", device.name());
    let mut found = vec![UNREACHED; expected.len()];
    found[source as usize] = 0;
    let mut levels = Vec::new();
    search_on(&hmm, &device, &program, &graph, &mut found, &mut levels)?;

    // The CPU just looks: the levels come home by themselves, page by page.
    let wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
    for (number, level) in (0u32..).zip(&mut levels) {
        level.vertices = found.iter().filter(|&&of| of == number).count() as u64;
    }
    let pages_to_system = hmm.statistics().pages_to_system;
    let (name, memory) = (device.name().to_owned(), device.memory());
    drop(program);
    hmm.shutdown()?;
    Ok(Outcome {
        vertices: graph.vertices(),
        edges: graph.edges.len() as u64,
        bytes: ByteCount::new(graph.bytes()),
        source,
        device: name,
        memory,
        levels,
        cpu,
        pages_to_system,
        wrong: wrong as u64,
        graph_is_whole: graph.digest() == digest,
    })
}

fn open(hmm: &Hmm, options: &Options) -> Result<VulkanDevice, hmm::Error> {
    let memory = ByteCount::mib(options.device_memory);
    let choice = options.device.as_deref();
    let choice = choice.map_or(VulkanChoice::First, VulkanChoice::Name);
    hmm.add_vulkan_device(VulkanOptions::new(memory).device(choice))
}

fn load(device: &VulkanDevice) -> Result<Program, VulkanError> {
    let words = LEVEL.chunks_exact(4);
    let words: Vec<u32> = words
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let options = ProgramOptions {
        // Where a page is missing an invocation ends, and begins again when it has come.
        demand: Demand::Repeat,
        // It may have written by then. That is right here, as a vertex that is reached
        // twice at one level is no different from one that is reached once, and the flag
        // is only ever set: `level.comp` says what it does so that this holds.
        idempotent: true,
        ..ProgramOptions::default()
    };
    // SAFETY: a compiler has made it, and spirv-val has found it valid; it has no arrays
    // of its own, and follows the pointers that it is given.
    unsafe { device.driver().program(&words, options) }
}

/// A launch for each level, until one reaches nothing more.
fn search_on(
    hmm: &Hmm,
    device: &VulkanDevice,
    program: &Program,
    graph: &Graph,
    found: &mut [u32],
    levels: &mut Vec<Level>,
) -> Result<(), Box<dyn Error>> {
    // All that the CPU looks at in between.
    let reached = Box::new(AtomicU32::new(0));
    // The program's own pointers, as they are.
    let pointers = [
        graph.offsets.as_ptr().expose_provenance(),
        graph.edges.as_ptr().expose_provenance(),
        found.as_mut_ptr().expose_provenance(),
        reached.as_ptr().expose_provenance(),
    ];
    let vertices = graph.vertices();
    let groups = vertices.div_ceil(program.local_size()[0]);
    for level in 0..vertices {
        let before = hmm.statistics();
        let start = Instant::now();
        reached.store(0, Ordering::Relaxed);
        let parameters = parameters(pointers, [vertices, level]);
        let report = device.launch(program, [groups, 1, 1], &parameters)?;
        let goes_on = reached.load(Ordering::Relaxed) != 0;
        let elapsed = start.elapsed();
        let after = hmm.statistics();
        levels.push(Level {
            vertices: 0,
            dispatches: report.dispatches,
            repeats: report.repeats,
            pages_to_device: after.pages_to_device - before.pages_to_device,
            evicted_pages: after.evicted_pages - before.evicted_pages,
            elapsed,
        });
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// The push constants, as `level.comp` declares them.
fn parameters(pointers: [usize; 4], numbers: [u32; 2]) -> [u8; PARAMETERS] {
    let mut bytes = [0; PARAMETERS];
    let (words, rest) = bytes.split_at_mut(32);
    for (place, pointer) in words.chunks_exact_mut(8).zip(pointers) {
        place.copy_from_slice(&(pointer as u64).to_le_bytes());
    }
    for (place, number) in rest.chunks_exact_mut(4).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}
