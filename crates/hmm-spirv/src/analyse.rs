//! What a host must know of a kernel.

use rspirv::spirv::{Capability, Decoration, ExecutionMode, Op, StorageClass};

use crate::access::physical_access;
use crate::error::SpirvError;
use crate::module::{Inst, Module};
use crate::reach;
use crate::types::Types;
use crate::{check, read};

/// What a module is and needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelInfo {
    /// The compute shaders in it.
    pub entry_points: Vec<EntryPoint>,
    /// Whether invocations wait for each other (OpControlBarrier).
    pub control_barriers: bool,
    /// Whether invocations of a subgroup exchange values.
    pub subgroup_operations: bool,
    /// Whether an invocation may miss after it has written to memory: then
    /// running it again repeats what it wrote. It errs to `true`.
    pub may_fault_after_write: bool,
    /// Loads, stores and atomics through physical pointers.
    pub accesses: usize,
    /// What the module declares that it needs of a device.
    pub capabilities: Vec<Capability>,
    /// The extensions that it declares.
    pub extensions: Vec<String>,
    /// Bytes of push constants that it declares.
    pub push_constant_bytes: u32,
    /// Ids of its specialisation constants, ascending.
    pub spec_ids: Vec<u32>,
}

/// A compute shader.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EntryPoint {
    /// Its name.
    pub name: String,
    /// Invocations of a workgroup, before specialisation.
    pub local_size: [u32; 3],
    /// The specialisation constants that set them.
    pub local_size_spec_ids: [Option<u32>; 3],
}

/// Says what a kernel is and needs; refuses what no variant can handle.
///
/// # Errors
/// Why the module is refused.
pub fn analyse(words: &[u32]) -> Result<KernelInfo, SpirvError> {
    let module = read(words)?;
    let types = Types::new(&module);
    check::check(&module, &types)?;
    info(&module, &types)
}

pub(crate) fn info(module: &Module, types: &Types) -> Result<KernelInfo, SpirvError> {
    let insts = || module.functions.iter().flat_map(|it| it.insts());
    let accesses: Vec<&Inst> = insts()
        .filter(|inst| physical_access(inst, types).is_some())
        .collect();
    for inst in &accesses {
        crate::access::parts(inst, types)?;
    }
    let mut capabilities = Vec::new();
    let mut extensions = Vec::new();
    let mut push_constant_bytes = 0;
    for inst in &module.preamble {
        match inst.op {
            Op::Capability => capabilities.extend(Capability::from_u32(inst.args[0])),
            Op::Extension => extensions.push(text(&inst.args)),
            Op::Variable if inst.args[0] == StorageClass::PushConstant as u32 => {
                let block = types.pointee(inst.ty).and_then(|ty| types.size(ty));
                push_constant_bytes = push_constant_bytes.max(block.unwrap_or(u32::MAX));
            }
            _ => {}
        }
    }
    let spec_ids = spec_ids(module);
    let entry_points = module
        .preamble
        .iter()
        .filter(|it| it.op == Op::EntryPoint)
        .map(|inst| entry_point(module, inst, &spec_ids))
        .collect();
    let mut ids: Vec<u32> = spec_ids.into_iter().map(|(_, spec)| spec).collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(KernelInfo {
        entry_points,
        control_barriers: insts().any(|it| it.op == Op::ControlBarrier),
        subgroup_operations: insts().any(|it| is_subgroup(it.op)),
        may_fault_after_write: reach::may_fault_after_write(module, types),
        accesses: accesses.len(),
        capabilities,
        extensions,
        push_constant_bytes,
        spec_ids: ids,
    })
}

/// Whether an instruction exchanges values within a subgroup.
pub(crate) const fn is_subgroup(op: Op) -> bool {
    matches!(op as u32, 333..=366 | 4421 | 4422 | 4428..=4432)
}

/// Specialisation constants: the id in the module and the host's.
fn spec_ids(module: &Module) -> Vec<(u32, u32)> {
    let kind = Decoration::SpecId as u32;
    let decorations = module.preamble.iter().filter(|it| it.op == Op::Decorate);
    decorations
        .filter_map(|it| match *it.args.as_slice() {
            [id, its, spec] if its == kind => Some((id, spec)),
            _ => None,
        })
        .collect()
}

fn entry_point(module: &Module, inst: &Inst, spec_ids: &[(u32, u32)]) -> EntryPoint {
    let name = text(&inst.args[2..]);
    let globals = module.globals();
    let by_ids = |ids: &[u32]| {
        let mut sizes = [(1, None); 3];
        for (size, id) in sizes.iter_mut().zip(ids) {
            let value = globals.get(id).and_then(|it| it.args.first());
            let spec = spec_ids.iter().find(|it| it.0 == *id).map(|it| it.1);
            *size = (value.copied().unwrap_or(1), spec);
        }
        sizes
    };
    let (ids_mode, mode) = (
        ExecutionMode::LocalSizeId as u32,
        ExecutionMode::LocalSize as u32,
    );
    let builtins = crate::entry::Builtins::new(module);
    let vector = builtins.workgroup_size.and_then(|id| globals.get(&id));
    let sizes = vector.map(|it| by_ids(&it.args)).or_else(|| {
        module
            .preamble
            .iter()
            .find_map(|it| match *it.args.as_slice() {
                [id, kind, x, y, z] if id == inst.args[1] => match it.op {
                    Op::ExecutionModeId if kind == ids_mode => Some(by_ids(&[x, y, z])),
                    Op::ExecutionMode if kind == mode => Some([x, y, z].map(|size| (size, None))),
                    _ => None,
                },
                _ => None,
            })
    });
    let sizes = sizes.unwrap_or([(1, None); 3]);
    let (local_size, local_size_spec_ids) = (sizes.map(|it| it.0), sizes.map(|it| it.1));
    EntryPoint {
        name,
        local_size,
        local_size_spec_ids,
    }
}

/// A literal string.
fn text(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    let bytes: Vec<u8> = bytes.take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
