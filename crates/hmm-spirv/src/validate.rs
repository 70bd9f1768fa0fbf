//! What the pass relies on in a module: ids that are defined once, types
//! without cycles, branches that stay in their function.
//!
//! It is no replacement for `spirv-val`: a module that breaks other rules comes
//! out as broken as it went in, but the pass neither panics nor hangs on it.

use std::collections::{HashMap, HashSet};

use rspirv::spirv::Op;

use crate::error::SpirvError;
use crate::grammar;
use crate::module::{Function, Inst, Module, WIDE_SWITCH, label_positions};

fn invalid(inst: &Inst, what: &'static str) -> SpirvError {
    SpirvError::Invalid {
        op: inst.op,
        id: inst.name(),
        what,
    }
}

/// Checks a module; marks the switches on 64 bits on the way.
pub(crate) fn ids(module: &mut Module) -> Result<(), SpirvError> {
    let types = definitions(module)?;
    type_order(module)?;
    let wide: HashSet<u32> = module
        .preamble
        .iter()
        .filter(|inst| inst.op == Op::TypeInt && inst.args.first() == Some(&64))
        .map(|inst| inst.id)
        .collect();
    for inst in &module.preamble {
        operands(inst, &types, false)?;
    }
    let functions: HashSet<u32> = module.functions.iter().map(|it| it.def.id).collect();
    for function in &mut module.functions {
        for inst in std::iter::once(&function.def).chain(&function.params) {
            operands(inst, &types, false)?;
        }
        for inst in function.blocks.iter_mut().flat_map(|block| &mut block.body) {
            let selector = inst.args.first().and_then(|id| types.get(id));
            let is_wide = inst.op == Op::Switch && selector.is_some_and(|ty| wide.contains(ty));
            operands(inst, &types, is_wide)?;
            if is_wide {
                inst.ty = WIDE_SWITCH;
            }
            if inst.op == Op::FunctionCall && !functions.contains(&inst.args[0]) {
                return Err(invalid(inst, "it calls what is no function"));
            }
        }
        branches(function)?;
    }
    Ok(())
}

/// The type of every id that is defined; 0 where there is none.
fn definitions(module: &Module) -> Result<HashMap<u32, u32>, SpirvError> {
    let mut types = HashMap::new();
    let mut define = |id: u32, ty: u32, inst: &Inst| {
        if id != 0 && types.insert(id, ty).is_some() {
            return Err(invalid(inst, "its id is defined twice"));
        }
        Ok(())
    };
    for inst in &module.preamble {
        define(inst.id, inst.ty, inst)?;
    }
    for function in &module.functions {
        define(function.def.id, function.def.ty, &function.def)?;
        for param in &function.params {
            define(param.id, param.ty, param)?;
        }
        for block in &function.blocks {
            if block.label >= module.bound {
                return Err(invalid(&function.def, "a label is out of bound"));
            }
            define(block.label, 0, &function.def)?;
            for inst in &block.body {
                define(inst.id, inst.ty, inst)?;
            }
        }
    }
    Ok(types)
}

/// A type is made of types before it; only pointers may lead back.
fn type_order(module: &Module) -> Result<(), SpirvError> {
    let pointers: HashSet<u32> = module
        .preamble
        .iter()
        .filter(|inst| inst.op == Op::TypePointer)
        .map(|inst| inst.id)
        .collect();
    let mut types = HashSet::new();
    let mut seen = HashSet::new();
    for inst in &module.preamble {
        let is_type = inst.id != 0 && inst.ty == 0 && format!("{:?}", inst.op).starts_with("Type");
        if is_type && inst.op != Op::TypePointer {
            for at in inst.ids(false) {
                let id = inst.args[at];
                if !seen.contains(&id) && !pointers.contains(&id) {
                    return Err(invalid(inst, "it is made of what is not yet defined"));
                }
            }
        }
        if is_type {
            types.insert(inst.id);
        } else if inst.ty != 0 && !types.contains(&inst.ty) {
            return Err(invalid(inst, "its type is no type"));
        }
        seen.insert(inst.id);
    }
    for function in &module.functions {
        let all = std::iter::once(&function.def).chain(&function.params);
        for inst in all.chain(function.insts()) {
            if inst.ty != 0 && !types.contains(&inst.ty) {
                return Err(invalid(inst, "its type is no type"));
            }
        }
    }
    Ok(())
}

fn operands(inst: &Inst, types: &HashMap<u32, u32>, wide: bool) -> Result<(), SpirvError> {
    let positions = grammar::id_positions(inst.op, &inst.args, wide)
        .ok_or_else(|| invalid(inst, "it has too few or too many operands"))?;
    if positions
        .iter()
        .any(|&at| !types.contains_key(&inst.args[at]))
    {
        return Err(invalid(inst, "it names an id that is not defined"));
    }
    Ok(())
}

fn branches(function: &Function) -> Result<(), SpirvError> {
    let labels: HashSet<u32> = function.blocks.iter().map(|block| block.label).collect();
    let entry = function.blocks[0].label;
    for block in &function.blocks {
        for (at, inst) in block.body.iter().enumerate() {
            let is_merge = matches!(inst.op, Op::LoopMerge | Op::SelectionMerge);
            if is_merge && at + 2 != block.body.len() {
                return Err(invalid(inst, "it does not stand before the terminator"));
            }
            if inst.op == Op::Phi && inst.args.len() % 2 != 0 {
                return Err(invalid(inst, "it has a value without a block"));
            }
            if !(inst.is_terminator() || is_merge) {
                continue;
            }
            for position in label_positions(inst) {
                let label = inst.args[position];
                if !labels.contains(&label) || label == entry {
                    return Err(invalid(inst, "it leads to no block of its function"));
                }
            }
        }
    }
    Ok(())
}
