//! Which functions may give up, and whether a kernel may miss after it wrote.

use std::collections::{HashMap, HashSet};

use rspirv::spirv::{Op, StorageClass};

use crate::access::{any_access, physical_access};
use crate::module::{Function, Inst, Module};
use crate::types::{Type, Types};

/// Whether an instruction changes memory that others, or another run of the
/// invocation, may see. Workgroup memory does not outlive the run.
pub(crate) fn writes(inst: &Inst, types: &Types) -> bool {
    if inst.op == Op::ImageWrite {
        return true;
    }
    let Some((pointer, crate::runtime::Kind::Write)) = any_access(inst) else {
        return false;
    };
    match *types.of_value(pointer) {
        Type::Pointer { class, .. } => ![
            StorageClass::Function,
            StorageClass::Private,
            StorageClass::Workgroup,
        ]
        .iter()
        .any(|&own| own as u32 == class),
        _ => true,
    }
}

/// The functions in which an invocation may give up: with accesses or loops, or
/// calls of such functions.
pub(crate) fn leaving(module: &Module, types: &Types) -> HashSet<u32> {
    closure(module, |function| {
        function
            .insts()
            .any(|inst| inst.op == Op::LoopMerge || physical_access(inst, types).is_some())
    })
}

/// The functions for which `own` holds, and those that call such.
fn closure(module: &Module, own: impl Fn(&Function) -> bool) -> HashSet<u32> {
    let functions = &module.functions;
    let mut found: HashSet<u32> = functions
        .iter()
        .filter(|it| own(it))
        .map(|it| it.def.id)
        .collect();
    loop {
        let before = found.len();
        for function in functions {
            let mut calls = function.insts().filter(|it| it.op == Op::FunctionCall);
            if calls.any(|it| found.contains(&it.args[0])) {
                found.insert(function.def.id);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// Whether a function calls itself, however indirectly.
pub(crate) fn recursive(module: &Module) -> Option<u32> {
    let calls: HashMap<u32, Vec<u32>> = module
        .functions
        .iter()
        .map(|function| {
            let calls = function.insts().filter(|it| it.op == Op::FunctionCall);
            (function.def.id, calls.map(|it| it.args[0]).collect())
        })
        .collect();
    calls.keys().copied().find(|&start| {
        let mut seen = HashSet::new();
        let mut todo = calls[&start].clone();
        while let Some(at) = todo.pop() {
            if at == start {
                return true;
            }
            if seen.insert(at) {
                todo.extend(calls.get(&at).into_iter().flatten());
            }
        }
        false
    })
}

/// Whether some path of control flow leads from a write to an access that may
/// miss. Paths that no run takes count, and so do two accesses to one page: the
/// answer errs to the safe side only.
pub(crate) fn may_fault_after_write(module: &Module, types: &Types) -> bool {
    let writing = closure(module, |it| it.insts().any(|inst| writes(inst, types)));
    // Functions that may be entered after a write.
    let mut late: HashSet<u32> = HashSet::new();
    loop {
        let before = late.len();
        for function in &module.functions {
            if walk(function, types, &writing, &mut late) {
                return true;
            }
        }
        if late.len() == before {
            return false;
        }
    }
}

/// Follows one function; whether an access follows a write. Adds what it calls
/// after a write to `late`.
fn walk(
    function: &Function,
    types: &Types,
    writing: &HashSet<u32>,
    late: &mut HashSet<u32>,
) -> bool {
    let blocks: HashMap<u32, usize> = (0..)
        .zip(&function.blocks)
        .map(|(at, block)| (block.label, at))
        .collect();
    let mut dirty = vec![false; function.blocks.len()];
    dirty[0] = late.contains(&function.def.id);
    let mut todo: Vec<usize> = (0..function.blocks.len()).collect();
    while let Some(at) = todo.pop() {
        let mut written = dirty[at];
        for inst in &function.blocks[at].body {
            if written && physical_access(inst, types).is_some() {
                return true;
            }
            if inst.op == Op::FunctionCall {
                if written {
                    late.insert(inst.args[0]);
                }
                written |= writing.contains(&inst.args[0]);
            }
            written |= writes(inst, types);
        }
        for next in function.blocks[at].successors() {
            let next = blocks[&next];
            if written && !dirty[next] {
                dirty[next] = true;
                todo.push(next);
            }
        }
    }
    false
}
