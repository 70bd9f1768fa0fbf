//! Accesses through physical pointers, and their parts.

use std::collections::HashMap;

use rspirv::spirv::{MemoryAccess, Op};

use crate::error::SpirvError;
use crate::module::{Function, Inst};
use crate::runtime::Kind;
use crate::types::{Type, Types};

/// Parts that one load or store may be split into.
const MAX_PARTS: usize = 64;
/// How far a pointer is followed to where it comes from.
const MAX_ORIGIN_STEPS: usize = 64;

/// Which word of an atomic instruction is its pointer.
pub(crate) const fn atomic_pointer(op: Op) -> Option<usize> {
    match op {
        Op::AtomicLoad
        | Op::AtomicStore
        | Op::AtomicExchange
        | Op::AtomicCompareExchange
        | Op::AtomicIIncrement
        | Op::AtomicIDecrement
        | Op::AtomicIAdd
        | Op::AtomicISub
        | Op::AtomicSMin
        | Op::AtomicUMin
        | Op::AtomicSMax
        | Op::AtomicUMax
        | Op::AtomicAnd
        | Op::AtomicOr
        | Op::AtomicXor
        | Op::AtomicFMinEXT
        | Op::AtomicFMaxEXT
        | Op::AtomicFAddEXT => Some(0),
        _ => None,
    }
}

/// The pointer and kind of an access to memory of any storage class.
pub(crate) fn any_access(inst: &Inst) -> Option<(u32, Kind)> {
    let pointer = *inst.args.first()?;
    match inst.op {
        Op::Load | Op::AtomicLoad => Some((pointer, Kind::Read)),
        Op::Store => Some((pointer, Kind::Write)),
        op => atomic_pointer(op).map(|_| (pointer, Kind::Write)),
    }
}

/// The pointer and kind of an access through a physical pointer.
pub(crate) fn physical_access(inst: &Inst, types: &Types) -> Option<(u32, Kind)> {
    any_access(inst).filter(|(pointer, _)| types.points_to_memory(*pointer))
}

/// A part of a value that lies on one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Which member of which member it is.
    pub(crate) path: Vec<u32>,
    pub(crate) ty: u32,
    pub(crate) align_bytes: u32,
}

/// The parts of a load or store. A single one without a path: the whole value.
pub(crate) fn parts(inst: &Inst, types: &Types) -> Result<Vec<Part>, SpirvError> {
    let pointer_type = types.of.get(&inst.args[0]).copied().unwrap_or(0);
    let ty = types.pointee(pointer_type).unwrap_or(0);
    if atomic_pointer(inst.op).is_some() {
        // Atomics are naturally aligned, or undefined everywhere.
        let align_bytes = types.size(ty).unwrap_or(0);
        let path = Vec::new();
        return Ok(vec![Part {
            path,
            ty,
            align_bytes,
        }]);
    }
    let (mask, align) = memory_operands(inst);
    let align =
        align.filter(|align| mask & MemoryAccess::ALIGNED.bits() != 0 && align.is_power_of_two());
    let Some(align) = align else {
        return Err(SpirvError::Invalid {
            op: inst.op,
            id: inst.name(),
            what: "it goes through a physical pointer and has no Aligned operand",
        });
    };
    let mut split = Split {
        inst,
        types,
        parts: Vec::new(),
    };
    split.value(ty, align, &mut Vec::new())?;
    Ok(split.parts)
}

/// The mask and the alignment of a load or store.
fn memory_operands(inst: &Inst) -> (u32, Option<u32>) {
    let at = memory_operand_at(inst.op);
    let word = |at: usize| inst.args.get(at).copied();
    (word(at).unwrap_or(0), word(at + 1))
}

/// Where a load's or store's memory operands begin.
pub(crate) const fn memory_operand_at(op: Op) -> usize {
    if matches!(op, Op::Load) { 1 } else { 2 }
}

struct Split<'a> {
    inst: &'a Inst,
    types: &'a Types,
    parts: Vec<Part>,
}

impl Split<'_> {
    fn unsplittable(&self, ty: u32, why: &'static str) -> SpirvError {
        let (op, id) = (self.inst.op, self.inst.name());
        SpirvError::Unsplittable { op, id, ty, why }
    }

    fn value(&mut self, ty: u32, align: u32, path: &mut Vec<u32>) -> Result<(), SpirvError> {
        let (op, id) = (self.inst.op, self.inst.name());
        if self.parts.len() >= MAX_PARTS {
            return Err(SpirvError::Aggregate {
                op,
                id,
                max: MAX_PARTS,
            });
        }
        let kind = self.types.get(ty);
        if self.types.has_row_major(ty) {
            return Err(self.unsplittable(ty, "it holds a row-major matrix"));
        }
        // A pointer says nothing of a matrix's stride once it was a number; a
        // structure's does.
        let holds_matrix = self.types.is_matrix(ty);
        let size = self.types.size(ty);
        if let Some(size_bytes) = size.filter(|&size| size <= align.min(4096) && !holds_matrix) {
            if size_bytes == 0 {
                return Err(self.unsplittable(ty, "it has no size"));
            }
            let path = path.clone();
            self.parts.push(Part {
                path,
                ty,
                align_bytes: align,
            });
            return Ok(());
        }
        match *kind {
            Type::Scalar { bytes: size_bytes } => Err(SpirvError::Straddles {
                op,
                id,
                size_bytes,
                align_bytes: align,
            }),
            Type::Pointer { .. } => Err(SpirvError::Straddles {
                op,
                id,
                size_bytes: 8,
                align_bytes: align,
            }),
            Type::Vector { component, count } => {
                let size = self.types.size(component);
                self.row(component, count, size, align, path)
            }
            // Columns are at least as far apart as they are long.
            Type::Matrix { column, count } => {
                let Type::Vector { component, .. } = *self.types.get(column) else {
                    return Err(self.unsplittable(ty, "its columns are no vectors"));
                };
                let size = self.types.size(component);
                self.row(column, count, size, align, path)
            }
            Type::Array {
                element,
                count,
                stride,
            } if stride > 0 => self.row(element, count, Some(stride), align, path),
            Type::Struct { ref members } => {
                for (member, &inner) in (0..).zip(members) {
                    let Some(offset) = self.types.offset(ty, member) else {
                        return Err(self.unsplittable(ty, "a member has no offset"));
                    };
                    path.push(member);
                    self.value(inner, common(align, offset), path)?;
                    path.pop();
                }
                Ok(())
            }
            Type::Array { .. } | Type::Other => {
                Err(self.unsplittable(ty, "its layout is not known"))
            }
        }
    }

    fn row(
        &mut self,
        inner: u32,
        count: u32,
        stride: Option<u32>,
        align: u32,
        path: &mut Vec<u32>,
    ) -> Result<(), SpirvError> {
        let stride = stride.ok_or_else(|| self.unsplittable(inner, "its size is not known"))?;
        for index in 0..count {
            path.push(index);
            self.value(inner, common(align, stride), path)?;
            path.pop();
        }
        Ok(())
    }
}

/// The alignment of what lies `offset` behind something aligned.
fn common(align: u32, offset: u32) -> u32 {
    if offset == 0 {
        align
    } else {
        align.min(1 << offset.trailing_zeros())
    }
}

/// Where a function's pointers come from: accesses through pointers of one
/// origin are likely to hit the same page again.
#[derive(Debug)]
pub(crate) struct Origins<'a> {
    defs: HashMap<u32, &'a Inst>,
    stores: Vec<&'a Inst>,
    types: &'a Types,
}

impl<'a> Origins<'a> {
    pub(crate) fn new(function: &'a Function, types: &'a Types) -> Self {
        let defs = function.insts().filter(|inst| inst.id != 0);
        let defs = defs.map(|inst| (inst.id, inst)).collect();
        let stores = function.insts().filter(|inst| inst.op == Op::Store);
        let stores = stores.collect();
        Self {
            defs,
            stores,
            types,
        }
    }

    /// Two pointers with the same answer come from the same variable, member or
    /// call.
    pub(crate) fn of(&self, pointer: u32) -> Vec<u32> {
        let at = self.source(pointer);
        match self.defs.get(&at) {
            Some(inst) if inst.op == Op::Load => self.variable(inst),
            _ => vec![at],
        }
    }

    /// Whether a pointer is out of memory, or out of a variable that such are put into:
    /// the next access through it is likely to be somewhere else.
    pub(crate) fn chases(&self, pointer: u32) -> bool {
        let loaded = |id| {
            self.defs
                .get(&self.source(id))
                .filter(|it| it.op == Op::Load)
        };
        let Some(load) = loaded(pointer) else {
            return false;
        };
        let of_memory = |load: &Inst| self.types.points_to_memory(load.args[0]);
        let variable = self.variable(load);
        of_memory(load)
            || self.stores.iter().any(|store| {
                let there = self.variable(store) == variable;
                there && loaded(store.args[1]).is_some_and(|load| of_memory(load))
            })
    }

    /// What a pointer was computed from: a load, or whatever else is known of it last.
    fn source(&self, pointer: u32) -> u32 {
        let mut at = pointer;
        for _ in 0..MAX_ORIGIN_STEPS {
            let Some(inst) = self.defs.get(&at) else {
                break;
            };
            let next = match inst.op {
                Op::AccessChain
                | Op::InBoundsAccessChain
                | Op::PtrAccessChain
                | Op::InBoundsPtrAccessChain
                | Op::CopyObject
                | Op::Bitcast
                | Op::ConvertUToPtr
                | Op::ConvertPtrToU => inst.args.first(),
                // Arithmetic on addresses has the pointer on its left, as a rule.
                Op::IAdd | Op::ISub => inst.args.first(),
                _ => None,
            };
            match next {
                Some(&next) => at = next,
                None => break,
            }
        }
        at
    }

    /// The variable and the constant path that a pointer is loaded from, or put into.
    fn variable(&self, access: &Inst) -> Vec<u32> {
        let source = access.args[0];
        if self.types.points_to_memory(source) {
            // A pointer out of memory: as many as there are loads of it.
            return vec![access.id];
        }
        match self.defs.get(&source) {
            Some(chain) if matches!(chain.op, Op::AccessChain | Op::InBoundsAccessChain) => {
                let indices = chain.args.iter().skip(1);
                let base = chain.args.first().copied();
                let known = indices.map(|&id| self.types.constant(id).unwrap_or(u32::MAX));
                base.into_iter().chain(known).collect()
            }
            _ => vec![source],
        }
    }
}
