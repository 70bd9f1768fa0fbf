//! Early returns that do not nest.

use std::collections::HashMap;

use rspirv::spirv::Op;

use crate::build::{Code, Gen};
use crate::module::{Block, Function, Inst};
use crate::structure::rename_predecessors;

/// Puts a function's body into a loop of one round. Drivers take returns apart:
/// in a loop they become breaks, elsewhere all that follows goes into an else,
/// deeper with each; lavapipe ignores conditions beyond 80 levels. `again` is a
/// variable that holds 0, which no driver may know: it would take the loop apart.
pub(crate) fn wrap_in_loop(function: &mut Function, build: &mut Gen, again: u32) {
    let [header, inner, next, merge] = [(); 4].map(|()| build.id());
    let first = &mut function.blocks[0];
    let entry = first.label;
    let locals = first.body.iter().take_while(|it| it.op == Op::Variable);
    let body = first.body.split_off(locals.count());
    rename_predecessors(function, &HashMap::from([(entry, inner)]));
    let mut code = Code::new(build, entry);
    for local in std::mem::take(&mut function.blocks[0].body) {
        code.push(local);
    }
    code.act(Op::Branch, &[header]);
    code.begin(header);
    let (uint, zero) = (code.build.uint(), code.build.word(0));
    let value = code.get(uint, again);
    let repeats = code.test(Op::INotEqual, &[value, zero]);
    code.act(Op::LoopMerge, &[merge, next, 0]);
    code.act(Op::BranchConditional, &[repeats, next, inner]);
    code.begin(inner);
    body.into_iter().for_each(|inst| code.push(inst));
    function.blocks.splice(0..1, code.finish());
    let block = |label, op, args: &[u32]| Block {
        label,
        body: vec![Inst::plain(op, args)],
    };
    function.blocks.push(block(next, Op::Branch, &[header]));
    function.blocks.push(block(merge, Op::Unreachable, &[]));
}
