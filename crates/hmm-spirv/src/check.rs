//! Modules that the pass does not handle.

use rspirv::spirv::{AddressingModel, Capability, ExecutionModel, Op};

use crate::access;
use crate::error::SpirvError;
use crate::module::{Inst, Module};
use crate::types::{Type, Types};

/// Capabilities whose instructions reach memory or other shaders in ways that
/// the pass does not see.
const REFUSED: [Capability; 14] = [
    Capability::Kernel,
    Capability::Addresses,
    Capability::Linkage,
    Capability::GenericPointer,
    Capability::FunctionPointersINTEL,
    Capability::IndirectReferencesINTEL,
    Capability::UntypedPointersKHR,
    Capability::CooperativeMatrixKHR,
    Capability::CooperativeMatrixNV,
    Capability::CooperativeVectorNV,
    Capability::RayQueryKHR,
    Capability::RayTracingKHR,
    Capability::ShaderEnqueueAMDX,
    Capability::RawAccessChainsNV,
];

/// Refuses what the pass does not handle.
pub(crate) fn check(module: &Module, types: &Types) -> Result<(), SpirvError> {
    let mut compute = false;
    let mut addressing = None;
    for inst in &module.preamble {
        match inst.op {
            Op::MemoryModel => addressing = inst.args.first().copied(),
            Op::Capability => {
                let capability = inst.args.first().and_then(|&it| Capability::from_u32(it));
                let Some(capability) = capability else {
                    return Err(unsupported(inst, "the capability is unknown"));
                };
                if REFUSED.contains(&capability) {
                    return Err(SpirvError::Capability(capability));
                }
            }
            Op::EntryPoint => {
                if inst.args.first() != Some(&(ExecutionModel::GLCompute as u32)) {
                    return Err(unsupported(
                        inst,
                        "compile compute shaders into a module of their own",
                    ));
                }
                compute = true;
            }
            _ => global(inst, types)?,
        }
    }
    if !compute {
        return Err(SpirvError::NoComputeEntry);
    }
    let addressing = addressing.unwrap_or(0);
    if addressing != AddressingModel::PhysicalStorageBuffer64 as u32 {
        return Err(SpirvError::AddressingModel(addressing));
    }
    for function in &module.functions {
        for inst in function.insts() {
            body(inst, types)?;
        }
    }
    Ok(())
}

fn unsupported(inst: &Inst, why: &'static str) -> SpirvError {
    SpirvError::Unsupported {
        op: inst.op,
        id: inst.name(),
        why,
    }
}

fn global(inst: &Inst, types: &Types) -> Result<(), SpirvError> {
    let known = matches!(
        inst.op,
        Op::Nop
            | Op::Extension
            | Op::ExtInstImport
            | Op::ExtInst
            | Op::ExecutionMode
            | Op::ExecutionModeId
            | Op::SourceContinued
            | Op::Source
            | Op::SourceExtension
            | Op::Name
            | Op::MemberName
            | Op::String
            | Op::Line
            | Op::NoLine
            | Op::ModuleProcessed
            | Op::Decorate
            | Op::MemberDecorate
            | Op::DecorateId
            | Op::DecorateString
            | Op::MemberDecorateString
            | Op::Undef
            | Op::Variable
            | Op::ConstantTrue
            | Op::ConstantFalse
            | Op::Constant
            | Op::ConstantComposite
            | Op::ConstantNull
            | Op::SpecConstantTrue
            | Op::SpecConstantFalse
            | Op::SpecConstant
            | Op::SpecConstantComposite
            | Op::SpecConstantOp
            | Op::TypeVoid
            | Op::TypeBool
            | Op::TypeInt
            | Op::TypeFloat
            | Op::TypeVector
            | Op::TypeMatrix
            | Op::TypeImage
            | Op::TypeSampler
            | Op::TypeSampledImage
            | Op::TypeArray
            | Op::TypeRuntimeArray
            | Op::TypeStruct
            | Op::TypePointer
            | Op::TypeForwardPointer
            | Op::TypeFunction
    );
    if !known {
        return Err(unsupported(
            inst,
            "the pass does not know whether it reaches memory",
        ));
    }
    if types.is_physical(inst.ty) && !matches!(inst.op, Op::ConstantNull | Op::Undef) {
        return Err(unsupported(
            inst,
            "a constant or variable cannot lie in physical memory",
        ));
    }
    Ok(())
}

fn body(inst: &Inst, types: &Types) -> Result<(), SpirvError> {
    if !is_known(inst.op) {
        return Err(unsupported(
            inst,
            "the pass does not know whether it reaches memory",
        ));
    }
    let physical = |at: usize| {
        inst.args
            .get(at)
            .is_some_and(|&id| types.points_to_memory(id))
    };
    let any = || inst.ids(false).into_iter().any(physical);
    if inst.op == Op::ExtInst {
        // Instructions of a set without semantics read nothing.
        return if any() && !types.is_inert(inst.args[0]) {
            Err(unsupported(
                inst,
                "it takes a physical pointer; load into a variable first",
            ))
        } else {
            Ok(())
        };
    }
    if matches!(inst.op, Op::CopyMemory | Op::CopyMemorySized) && any() {
        return Err(unsupported(
            inst,
            "it copies through a physical pointer; load and store instead",
        ));
    }
    if matches!(inst.op, Op::PtrEqual | Op::PtrNotEqual | Op::PtrDiff) && any() {
        return Err(unsupported(
            inst,
            "convert physical pointers to integers and compare these",
        ));
    }
    if row_major_chain(inst, types) {
        return Err(unsupported(
            inst,
            "it leads to a part of a row-major matrix; take single components, or column_major",
        ));
    }
    let hands_on = matches!(
        inst.op,
        Op::Load
            | Op::AccessChain
            | Op::InBoundsAccessChain
            | Op::PtrAccessChain
            | Op::InBoundsPtrAccessChain
            | Op::CopyObject
            | Op::CopyLogical
            | Op::Bitcast
            | Op::Phi
            | Op::Select
            | Op::FunctionCall
            | Op::CompositeConstruct
            | Op::CompositeExtract
            | Op::CompositeInsert
    );
    let takes = hands_on
        || access::atomic_pointer(inst.op).is_some()
        || matches!(inst.op, Op::Store | Op::ConvertPtrToU | Op::ReturnValue);
    let makes = hands_on || matches!(inst.op, Op::ConvertUToPtr | Op::Undef);
    if (!takes && any()) || (!makes && types.is_physical(inst.ty)) {
        return Err(unsupported(
            inst,
            "physical pointers are not seen through it",
        ));
    }
    Ok(())
}

/// Whether a pointer leads to something whose parts do not lie together.
fn row_major_chain(inst: &Inst, types: &Types) -> bool {
    let chain = matches!(
        inst.op,
        Op::AccessChain | Op::InBoundsAccessChain | Op::PtrAccessChain | Op::InBoundsPtrAccessChain
    );
    let pointee = |ty: Option<&u32>| ty.and_then(|&ty| types.pointee(ty));
    let base = inst
        .args
        .first()
        .and_then(|base| pointee(types.of.get(base)));
    let result = pointee(Some(&inst.ty));
    chain
        && types.is_physical(inst.ty)
        && base.is_some_and(|ty| types.has_row_major(ty))
        && result
            .is_some_and(|ty| matches!(types.get(ty), Type::Vector { .. } | Type::Matrix { .. }))
}

/// Whether the pass knows what an instruction in a function does.
fn is_known(op: Op) -> bool {
    if access::atomic_pointer(op).is_some() {
        return true;
    }
    matches!(
        op as u32,
        // Nop, Undef; ExtInst; FunctionCall to PtrAccessChain without Image-
        // TexelPointer's neighbours of the Kernel capability.
        0 | 1 | 12 | 57 | 59..=68 | 70
        // Composites and images.
        | 77..=84 | 86..=107
        // Conversions; not the generic pointers' and the saturated ones.
        | 109..=117 | 120 | 124
        // Arithmetic, logic, comparison, bits.
        | 126..=152 | 154..=191 | 194..=205
        // Barriers.
        | 224 | 225
        // Control flow.
        | 245..=247 | 249..=251 | 253..=255
        // Subgroups.
        | 333..=366 | 4421 | 4422 | 4428..=4432
        // CopyLogical, pointer comparison, integer dot products, clock, hints.
        | 400..=403 | 4450..=4455 | 5056 | 5630 | 5631
    )
}
