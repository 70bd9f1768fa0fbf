//! The pass as a whole.

use std::collections::HashSet;

use rspirv::spirv::{Capability, Decoration, Op};

use crate::access;
use crate::analyse::{self, KernelInfo};
use crate::build::Gen;
use crate::check;
use crate::contract::Variant;
use crate::entry;
use crate::error::SpirvError;
use crate::module::{Inst, MAX_BOUND, Module};
use crate::reach;
use crate::read;
use crate::rewrite::Rewriter;
use crate::runtime::Runtime;
use crate::types::Types;

/// What to make of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How accesses are translated.
    pub variant: Variant,
    /// SpecId of the 64-bit constant that is the control block's device address.
    /// The kernel must not use it.
    pub control_spec_id: u32,
}

/// An instrumented kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Instrumented {
    /// The module.
    pub words: Vec<u32>,
    /// What the kernel was.
    pub info: KernelInfo,
    /// What the instrumented module needs of a device.
    pub capabilities: Vec<Capability>,
}

/// Early returns that may nest in what a driver makes of them.
const FEW: usize = 24;

/// Places at which a kernel may stall. lavapipe compiles 40 within seconds, and
/// 100 not within minutes.
const MAX_STALLS: usize = 48;

/// Puts address translation into a kernel.
///
/// # Errors
/// Why the module is refused, for this variant or for all.
pub fn instrument(words: &[u32], options: Options) -> Result<Instrumented, SpirvError> {
    let mut module = read(words)?;
    let mut types = Types::new(&module);
    check::check(&module, &types)?;
    let info = analyse::info(&module, &types)?;
    let variant = options.variant;
    if info.spec_ids.contains(&options.control_spec_id) {
        return Err(SpirvError::SpecIdTaken(options.control_spec_id));
    }
    if variant == Variant::Checked {
        works_alone(&module)?;
    }
    let leaving = if variant.faults() {
        reach::leaving(&module, &types)
    } else {
        HashSet::new()
    };
    let writes = module
        .functions
        .iter()
        .flat_map(|it| it.insts())
        .any(|it| reach::writes(it, &types));
    let mut build = Gen::new(&module);
    let places = returns(&module, &types, &leaving)?;
    if variant == Variant::Stall && places > MAX_STALLS {
        return Err(SpirvError::TooManyStalls {
            places,
            max: MAX_STALLS,
        });
    }
    let mut runtime = Runtime::new(&mut build, variant, places > FEW);
    let mut rewriter = Rewriter::new(&mut build, &mut runtime, &mut types, &leaving);
    module.functions = std::mem::take(&mut module.functions)
        .into_iter()
        .map(|function| rewriter.function(function))
        .collect::<Result<_, _>>()?;
    let copied = std::mem::take(&mut rewriter.copied);
    decorate_copies(&mut module, &copied);
    let mut decorations = entry::wrap(&mut module, &mut build, &mut runtime, &types, writes)?;
    module.functions.append(&mut runtime.functions);
    let spec = [
        runtime.control,
        Decoration::SpecId as u32,
        options.control_spec_id,
    ];
    decorations.push(Inst::plain(Op::Decorate, spec));
    let capabilities = add_capabilities(&mut module, variant);
    add_globals(&mut module, decorations, build.globals);
    module.bound = build.bound;
    if module.bound > MAX_BOUND {
        return Err(SpirvError::TooLarge { max: MAX_BOUND });
    }
    let words = module.encode();
    Ok(Instrumented {
        words,
        info,
        capabilities,
    })
}

/// How many places of a module an invocation may give up at.
fn returns(module: &Module, types: &Types, leaving: &HashSet<u32>) -> Result<usize, SpirvError> {
    let mut count = 0;
    for inst in module.functions.iter().flat_map(|it| it.insts()) {
        if access::physical_access(inst, types).is_some() {
            count += access::parts(inst, types)?.len();
        } else if inst.op == Op::FunctionCall && leaving.contains(&inst.args[0]) {
            count += 1;
        }
    }
    Ok(count)
}

/// Refuses a kernel whose invocations cannot be run one by one.
fn works_alone(module: &Module) -> Result<(), SpirvError> {
    let mut insts = module.functions.iter().flat_map(|it| it.insts());
    let together = |it: &&Inst| it.op == Op::ControlBarrier || analyse::is_subgroup(it.op);
    match insts.find(together) {
        Some(inst) => Err(SpirvError::Together {
            op: inst.op,
            id: inst.name(),
        }),
        None => Ok(()),
    }
}

/// Copies of values are decorated like their originals.
fn decorate_copies(module: &mut Module, copied: &[(u32, u32)]) {
    // Copies of copies come later in the list than what they are copied from.
    for &(old, new) in copied {
        let same: Vec<Inst> = module
            .preamble
            .iter()
            .filter(|it| it.op == Op::Decorate && it.args[0] == old)
            .cloned()
            .collect();
        let at = section(module, |it| it.op == Op::Decorate);
        for mut inst in same {
            inst.args[0] = new;
            module.preamble.insert(at, inst);
        }
    }
}

/// Behind the last instruction of a kind.
fn section(module: &Module, kind: impl Fn(&Inst) -> bool) -> usize {
    let last = module.preamble.iter().rposition(kind);
    last.map_or(0, |at| at + 1)
}

fn add_capabilities(module: &mut Module, variant: Variant) -> Vec<Capability> {
    let mut wanted = vec![Capability::Int64];
    if variant == Variant::Stall {
        wanted.extend([Capability::GroupNonUniform, Capability::GroupNonUniformVote]);
    }
    for capability in wanted {
        let inst = Inst::plain(Op::Capability, [capability as u32]);
        if !module.preamble.contains(&inst) {
            module.preamble.insert(0, inst);
        }
    }
    let all = module.preamble.iter().filter(|it| it.op == Op::Capability);
    all.filter_map(|it| Capability::from_u32(it.args[0]))
        .collect()
}

fn add_globals(module: &mut Module, decorations: Vec<Inst>, globals: Vec<Inst>) {
    // Annotations stand before all types, and everything else before these.
    let is_type = |it: &Inst| {
        it.id != 0 && it.op != Op::ExtInstImport && it.op != Op::String && it.op != Op::ExtInst
    };
    let first = module
        .preamble
        .iter()
        .position(|it| is_type(it) || it.op == Op::TypeForwardPointer);
    let at = first.unwrap_or(module.preamble.len());
    module.preamble.splice(at..at, decorations);
    module.preamble.extend(globals);
}
