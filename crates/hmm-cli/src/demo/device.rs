//! The device of a demo: software, or Vulkan with the walk as a compute shader.

use std::mem::offset_of;

use anyhow::Context as _;
use hmm::{
    ByteCount, DeviceId, Hmm, Program, ProgramOptions, SoftwareDevice, SoftwareOptions,
    VulkanChoice, VulkanDevice, VulkanOptions,
};

use super::index::{Index, Node};
use super::kernel::{self, PROGRESS, Totals};
use crate::args::DeviceKind;

/// Threads of the software device that run the kernels.
const WORKERS: usize = 2;
/// `walk.comp`, compiled by `cargo xtask shaders`.
const WALK: &[u8] = include_bytes!("walk.spv");
/// Bytes of its push constants.
const PARAMETERS: usize = 60;

/// The device that walks the lists.
pub enum Walker {
    /// Its workers run `kernel::walk`.
    Software(SoftwareDevice),
    /// It runs `walk.comp`.
    Vulkan(VulkanDevice, Box<Program>),
}

impl Walker {
    /// Adds the device to the engine.
    pub fn open(hmm: &Hmm, kind: &DeviceKind, memory: ByteCount) -> anyhow::Result<Self> {
        let choice = match kind {
            DeviceKind::Software => {
                let options = SoftwareOptions::new(memory).workers(WORKERS);
                return Ok(Self::Software(hmm.add_software_device(options)?));
            }
            DeviceKind::Vulkan => VulkanChoice::First,
            DeviceKind::VulkanNamed(name) => VulkanChoice::Name(name),
        };
        let device = hmm
            .add_vulkan_device(VulkanOptions::new(memory).device(choice))
            .context("`hmm info` lists the Vulkan devices")?;
        let program = crate::shader::load(&device, WALK, ProgramOptions::default())?;
        Ok(Self::Vulkan(device, Box::new(program)))
    }

    /// What requests name it by.
    pub const fn id(&self) -> DeviceId {
        match self {
            Self::Software(device) => device.id(),
            Self::Vulkan(device, _) => device.id(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Software(device) => device.name(),
            Self::Vulkan(device, _) => device.name(),
        }
    }

    /// Size of its memory.
    pub fn memory(&self) -> ByteCount {
        match self {
            Self::Software(device) => device.memory(),
            Self::Vulkan(device, _) => device.memory(),
        }
    }

    /// Walks all lists once.
    pub fn walk(&self, index: &Index<'_>, round: u64, totals: &mut Totals) -> anyhow::Result<()> {
        let heads = index.heads_pointer();
        match self {
            Self::Software(device) => {
                let lists = index.heads.len();
                let report = device.launch(lists, |context, list| {
                    kernel::walk(context, heads.at(list), round)
                })?;
                totals.add(&report);
            }
            Self::Vulkan(device, program) => {
                let parameters = parameters(heads.get().addr(), index.heads.len(), round);
                let local = program.local_size()[0];
                let groups = u32::try_from(index.heads.len())?.div_ceil(local);
                let report = device.launch(program, [groups, 1, 1], &parameters)?;
                totals.faults += report.faults;
                let nodes = index.nodes.len() as u64;
                PROGRESS.fetch_add(nodes, std::sync::atomic::Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// The push constants, as `walk.comp` declares them.
fn parameters(heads: usize, lists: usize, round: u64) -> [u8; PARAMETERS] {
    let mut bytes = [0; PARAMETERS];
    let (longs, offsets) = bytes.split_at_mut(24);
    for (place, word) in longs
        .chunks_exact_mut(8)
        .zip([heads as u64, lists as u64, round])
    {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let fields = [
        offset_of!(Node, next),
        offset_of!(Node, follower),
        offset_of!(Node, text_at),
        offset_of!(Node, text_len),
        offset_of!(Node, positions_at),
        offset_of!(Node, positions_len),
        offset_of!(Node, digest),
        offset_of!(Node, rounds),
        offset_of!(Node, hits),
    ];
    for (place, field) in offsets.chunks_exact_mut(4).zip(fields) {
        let field = u32::try_from(field).unwrap_or(u32::MAX);
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}
