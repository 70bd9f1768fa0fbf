//! Translation before every access of a function.

use std::collections::{HashMap, HashSet};

use rspirv::spirv::{MemoryAccess, Op, StorageClass};

use crate::access::{Origins, Part, memory_operand_at, parts, physical_access};
use crate::build::Code;
use crate::error::SpirvError;
use crate::flat;
use crate::module::{Block, Function, Inst};
use crate::reach;
use crate::runtime::{Kind, Runtime, Slot};
use crate::structure;
use crate::types::{Type, Types};
use crate::{build::Gen, contract::Variant};

/// Puts translations into functions.
#[derive(Debug)]
pub(crate) struct Rewriter<'a> {
    pub(crate) build: &'a mut Gen,
    pub(crate) runtime: &'a mut Runtime,
    pub(crate) types: &'a mut Types,
    /// Functions in which an invocation may give up.
    pub(crate) leaving: &'a HashSet<u32>,
    /// Ids that are copies of others: the original and the copy.
    pub(crate) copied: Vec<(u32, u32)>,
    /// TLB slots by where pointers come from.
    slots: HashMap<(u32, Vec<u32>), usize>,
}

impl<'a> Rewriter<'a> {
    pub(crate) fn new(
        build: &'a mut Gen,
        runtime: &'a mut Runtime,
        types: &'a mut Types,
        leaving: &'a HashSet<u32>,
    ) -> Self {
        Self {
            build,
            runtime,
            types,
            leaving,
            copied: Vec::new(),
            slots: HashMap::new(),
        }
    }

    /// Rewrites one function. Returns it unchanged where nothing is to be done.
    pub(crate) fn function(&mut self, mut function: Function) -> Result<Function, SpirvError> {
        let faults = self.runtime.variant.faults();
        let unchanged = function.clone();
        let mut rounds = HashSet::new();
        let mut burning = HashSet::new();
        if faults {
            let (types, leaving) = (&*self.types, self.leaving);
            let may_leave = |inst: &Inst| {
                physical_access(inst, types).is_some()
                    || (inst.op == Op::FunctionCall && leaving.contains(&inst.args[0]))
            };
            let before = self.copied.len();
            rounds = structure::make_room(&mut function, self.build, &mut self.copied, &may_leave)?;
            for &(old, new) in &self.copied[before..] {
                self.types.copy(old, new);
            }
            if self.runtime.variant == Variant::Checked {
                let types = &*self.types;
                let accesses = |inst: &Inst| physical_access(inst, types).is_some();
                let passed = structure::passed(&function, &rounds, &accesses);
                rounds.retain(|round| !passed.contains_key(round));
                burning = passed.into_values().collect();
            }
        }
        let types = &*self.types;
        let origins = Origins::new(&unchanged, types);
        // Copies come from where their originals came from.
        let original: HashMap<u32, u32> =
            self.copied.iter().map(|&(old, new)| (new, old)).collect();
        let mut moved = HashMap::new();
        let mut blocks = Vec::new();
        for Block { label, body } in std::mem::take(&mut function.blocks) {
            let mut code = Code::new(self.build, label);
            let mut site = Site {
                runtime: self.runtime,
                types,
                result: function.def.ty,
                burns: burning.contains(&label),
            };
            if rounds.contains(&label) {
                site.runtime.burn(&mut code, function.def.ty);
            }
            for inst in body {
                if let Some((pointer, kind)) = physical_access(&inst, types) {
                    let mut at = pointer;
                    while let Some(&old) = original.get(&at) {
                        at = old;
                    }
                    let free = self.slots.len();
                    let key = (function.def.id, origins.of(at));
                    let slot = *self.slots.entry(key).or_insert(free);
                    let slot = Slot {
                        number: slot,
                        chased: origins.chases(at),
                    };
                    site.access(&mut code, &inst, kind, slot)?;
                } else {
                    let calls = faults
                        && inst.op == Op::FunctionCall
                        && self.leaving.contains(&inst.args[0]);
                    site.note_write(&mut code, &inst);
                    code.push(inst);
                    if calls {
                        site.runtime.leave_if_dead(&mut code, function.def.ty);
                    }
                }
            }
            if code.open.label != label {
                moved.insert(label, code.open.label);
            }
            blocks.extend(code.finish());
        }
        function.blocks = blocks;
        structure::rename_predecessors(&mut function, &moved);
        if let Some(again) = self.runtime.zero
            && self.leaving.contains(&function.def.id)
        {
            flat::wrap_in_loop(&mut function, self.build, again);
        }
        Ok(function)
    }
}

/// A place in a function that makes accesses.
struct Site<'a> {
    runtime: &'a mut Runtime,
    types: &'a Types,
    /// What the function returns.
    result: u32,
    /// The next access stands for all in a round of a loop.
    burns: bool,
}

impl Site<'_> {
    /// Notes before a write that the invocation has written. A checked invocation
    /// need not know: see [`crate::entry`].
    fn note_write(&mut self, code: &mut Code<'_>, inst: &Inst) {
        if self.runtime.variant == Variant::Stall && reach::writes(inst, self.types) {
            let yes = code.build.flag(true);
            code.set(self.runtime.wrote, yes);
        }
    }

    fn access(
        &mut self,
        code: &mut Code<'_>,
        inst: &Inst,
        kind: Kind,
        slot: Slot,
    ) -> Result<(), SpirvError> {
        let parts = parts(inst, self.types)?;
        // A stalled access may let the host unmap what was translated before it,
        // so each part is stored at once. Elsewhere none is stored before all are
        // known not to miss.
        if self.runtime.variant == Variant::Stall || inst.op == Op::Load {
            let mut values = Vec::new();
            for part in &parts {
                let pointer = self.place(code, inst, part, kind, slot);
                values.push(self.perform(code, inst, part, pointer));
            }
            self.assemble(code, inst, &parts, values);
        } else {
            let pointers: Vec<u32> = parts
                .iter()
                .map(|part| self.place(code, inst, part, kind, slot))
                .collect();
            for (part, pointer) in parts.iter().zip(pointers) {
                self.perform(code, inst, part, pointer);
            }
        }
        Ok(())
    }

    /// The translated pointer to a part.
    fn place(
        &mut self,
        code: &mut Code<'_>,
        inst: &Inst,
        part: &Part,
        kind: Kind,
        slot: Slot,
    ) -> u32 {
        let mut pointer = inst.args[0];
        let mut ty = self.types.of.get(&pointer).copied().unwrap_or(0);
        if !part.path.is_empty() {
            ty = code
                .build
                .pointer(StorageClass::PhysicalStorageBuffer, part.ty);
            let mut args = vec![pointer];
            for &index in &part.path {
                args.push(code.build.word(index));
            }
            pointer = code.op(Op::AccessChain, ty, &args);
        }
        let ulong = code.build.ulong();
        let address = code.op(Op::ConvertPtrToU, ulong, &[pointer]);
        let burns = std::mem::take(&mut self.burns);
        let place = self
            .runtime
            .translate(code, address, kind, slot, burns, self.result);
        code.op(Op::ConvertUToPtr, ty, &[place])
    }

    /// The access itself; what was loaded.
    fn perform(&mut self, code: &mut Code<'_>, inst: &Inst, part: &Part, pointer: u32) -> u32 {
        self.note_write(code, inst);
        let mut args = inst.args.clone();
        args[0] = pointer;
        if part.path.is_empty() {
            code.push(Inst::new(inst.op, inst.ty, inst.id, args));
            return inst.id;
        }
        // The mask says that the next word is the alignment.
        let mask = memory_operand_at(inst.op);
        debug_assert_ne!(args[mask] & MemoryAccess::ALIGNED.bits(), 0);
        args[mask + 1] = part.align_bytes;
        if inst.op == Op::Load {
            let id = code.build.id();
            code.push(Inst::new(Op::Load, part.ty, id, args));
            return id;
        }
        let mut from = vec![args[1]];
        from.extend(&part.path);
        args[1] = code.op(Op::CompositeExtract, part.ty, &from);
        code.push(Inst::plain(inst.op, args));
        0
    }

    /// Makes the value of a load that was split.
    fn assemble(&self, code: &mut Code<'_>, inst: &Inst, parts: &[Part], values: Vec<u32>) {
        if inst.op != Op::Load || parts.first().is_none_or(|part| part.path.is_empty()) {
            return;
        }
        let mut left = parts.iter().zip(values).peekable();
        let mut made = self.composite(code, inst.ty, &mut Vec::new(), &mut left);
        if let Some(last) = code.open.body.last_mut() {
            // The outermost value is the load's result.
            debug_assert_eq!(last.id, made);
            last.id = inst.id;
            made = inst.id;
        }
        debug_assert_eq!(made, inst.id);
    }

    fn composite<'p>(
        &self,
        code: &mut Code<'_>,
        ty: u32,
        path: &mut Vec<u32>,
        left: &mut std::iter::Peekable<impl Iterator<Item = (&'p Part, u32)>>,
    ) -> u32 {
        if let Some((_, value)) = left.next_if(|(part, _)| part.path == *path) {
            return value;
        }
        let members: Vec<u32> = match *self.types.get(ty) {
            Type::Vector { component, count } => vec![component; count as usize],
            Type::Matrix { column, count } => vec![column; count as usize],
            Type::Array { element, count, .. } => vec![element; count as usize],
            Type::Struct { ref members } => members.clone(),
            _ => Vec::new(),
        };
        let mut values = Vec::new();
        for (index, member) in (0..).zip(members) {
            path.push(index);
            values.push(self.composite(code, member, path, left));
            path.pop();
        }
        code.op(Op::CompositeConstruct, ty, &values)
    }
}
