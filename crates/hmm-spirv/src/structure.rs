//! Loops are given a shape that can be left early.
//!
//! No return is allowed in a loop's continue construct (it must lead back to
//! the header), nor anything but OpPhi before the OpLoopMerge of a header. So a
//! continue construct with accesses becomes part of the body, with a new, empty
//! one behind it, and the code of a header moves into a block of its own.

use std::collections::{HashMap, HashSet, VecDeque};

use rspirv::spirv::Op;

use crate::build::Gen;
use crate::error::SpirvError;
use crate::module::{Block, Function, Inst, label_positions};

/// Blocks that a function may grow to.
const MAX_BLOCKS: usize = 1 << 14;
/// Blocks with accesses that are tried in one loop.
const MAX_TRIED: usize = 4;
/// Loops that a function may have.
const MAX_LOOPS: usize = 1 << 10;

/// What a loop's continue construct is copied for.
struct Loop {
    header: u32,
    merge: u32,
    target: u32,
}

impl Loop {
    fn of(block: &Block) -> Option<Self> {
        let merge = block.merge().filter(|merge| merge.op == Op::LoopMerge)?;
        let (header, target) = (block.label, merge.args[1]);
        let merge = merge.args[0];
        Some(Self {
            header,
            merge,
            target,
        })
    }

    fn error(&self, why: &'static str) -> SpirvError {
        let header = self.header;
        SpirvError::Loop { header, why }
    }
}

/// Gives every loop of `function` that shape. `may_leave` says which
/// instructions may make the invocation give up. Returns the labels of the
/// blocks that now hold the headers' code: each round of a loop passes one.
pub(crate) fn make_room(
    function: &mut Function,
    build: &mut Gen,
    copied: &mut Vec<(u32, u32)>,
    may_leave: &dyn Fn(&Inst) -> bool,
) -> Result<HashSet<u32>, SpirvError> {
    let mut todo: VecDeque<u32> = headers(function, 0);
    while let Some(header) = todo.pop_front() {
        let block = function.blocks.iter().find(|it| it.label == header);
        let Some(found) = block.and_then(Loop::of) else {
            continue;
        };
        if !is_left(function, &found, may_leave) {
            continue;
        }
        let before = function.blocks.len();
        hoist(function, build, copied, &found)?;
        todo.extend(headers(function, before));
        if function.blocks.len() > MAX_BLOCKS || todo.len() > MAX_LOOPS {
            return Err(found.error("the function has too many loops or blocks"));
        }
    }
    split_headers(function, build)
}

/// The headers of the loops from a block on.
fn headers(function: &Function, from: usize) -> VecDeque<u32> {
    let blocks = function.blocks.iter().skip(from);
    blocks.filter_map(Loop::of).map(|it| it.header).collect()
}

/// Whether an invocation may want to leave a loop from its continue construct.
fn is_left(function: &Function, found: &Loop, may_leave: &dyn Fn(&Inst) -> bool) -> bool {
    let construct = construct(function, found);
    function.blocks.iter().any(|block| {
        construct.contains(&block.label)
            && (Loop::of(block).is_some() || block.body.iter().any(may_leave))
    })
}

/// The blocks of a loop's continue construct: what is reached from the continue
/// target on the way to the header, or out of the loop.
fn construct(function: &Function, found: &Loop) -> HashSet<u32> {
    let by_label: HashMap<u32, &Block> = function.blocks.iter().map(|it| (it.label, it)).collect();
    let mut reached = HashSet::from([found.target]);
    let mut todo = vec![found.target];
    while let Some(label) = todo.pop() {
        for next in by_label
            .get(&label)
            .map_or_else(Vec::new, |it| it.successors())
        {
            if next != found.header && next != found.merge && reached.insert(next) {
                todo.push(next);
            }
        }
    }
    reached
}

/// Makes a loop's continue construct part of its body, once for every block
/// that continues.
fn hoist(
    function: &mut Function,
    build: &mut Gen,
    copied: &mut Vec<(u32, u32)>,
    found: &Loop,
) -> Result<(), SpirvError> {
    let inside = construct(function, found);
    let continues: Vec<u32> = function
        .blocks
        .iter()
        .filter(|it| !inside.contains(&it.label) && it.successors().contains(&found.target))
        .map(|it| it.label)
        .collect();
    let is_header = found.target == found.header;
    if !is_header {
        for label in &continues {
            can_go_on(function, found, *label)?;
        }
        if continues.len() > 1 {
            stays_inside(function, found, &inside)?;
        }
    }
    let next = build.id();
    // What goes into the new continue target: block and, in it, new names.
    let mut copies = vec![HashMap::new()];
    if !is_header {
        for &from in continues.iter().skip(1) {
            let names = copy(function, build, &inside, found.target, from);
            copied.extend(names.iter().map(|(&old, &new)| (old, new)));
            copies.push(names);
        }
        if let Some(&first) = continues.first() {
            let others: HashSet<u32> = continues.iter().skip(1).copied().collect();
            keep_phis(function, found.target, |from| {
                from == first || !others.contains(&from)
            });
        }
    }
    let merge_phis = phi_pairs(function, found.merge, &inside);
    for (phi, value, from) in merge_phis {
        for names in copies.iter().skip(1) {
            let pair = [rename(names, value), rename(names, from)];
            edit_phi(function, phi, |args| args.extend(pair));
        }
    }
    back_edges(function, build, found, &inside, &copies, next);
    for block in &mut function.blocks {
        if block.label == found.header {
            let at = block.body.len() - 2;
            block.body[at].args[1] = next;
        }
    }
    Ok(())
}

/// Leads the edges back to the header through the new continue target `next`.
fn back_edges(
    function: &mut Function,
    build: &mut Gen,
    found: &Loop,
    inside: &HashSet<u32>,
    copies: &[HashMap<u32, u32>],
    next: u32,
) {
    let backs: HashSet<u32> = function
        .blocks
        .iter()
        .filter(|it| {
            let original = inside.contains(&it.label)
                || copies
                    .iter()
                    .any(|names| names.values().any(|&new| new == it.label));
            original && it.successors().contains(&found.header)
        })
        .map(|it| it.label)
        .collect();
    let pairs = phi_pairs(function, found.header, inside);
    let phis: Vec<u32> = phis(function, found.header);
    let mut body = Vec::new();
    for phi in phis {
        let mut args = Vec::new();
        for &(_, value, from) in pairs.iter().filter(|(it, ..)| *it == phi) {
            for names in copies {
                let from = rename(names, from);
                if backs.contains(&from) {
                    args.extend([rename(names, value), from]);
                }
            }
        }
        let ty = function
            .insts()
            .find(|it| it.id == phi)
            .map_or(0, |it| it.ty);
        let value = build.id();
        if args.is_empty() {
            body.push(Inst::new(Op::Undef, ty, value, []));
        } else {
            body.push(Inst::new(Op::Phi, ty, value, args));
        }
        edit_phi(function, phi, |args| {
            let mut kept: Vec<u32> = args
                .chunks(2)
                .filter(|pair| !inside.contains(&pair[1]))
                .flatten()
                .copied()
                .collect();
            kept.extend([value, next]);
            *args = kept;
        });
    }
    for block in function
        .blocks
        .iter_mut()
        .filter(|it| backs.contains(&it.label))
    {
        let end = block.body.last_mut().expect("a terminator");
        for at in label_positions(end).collect::<Vec<_>>() {
            if end.args[at] == found.header {
                end.args[at] = next;
            }
        }
    }
    body.push(Inst::plain(Op::Branch, [found.header]));
    function.blocks.push(Block { label: next, body });
}

/// A branch to the continue target was a way out; now it goes on.
fn can_go_on(function: &Function, found: &Loop, label: u32) -> Result<(), SpirvError> {
    let block = function.blocks.iter().find(|it| it.label == label);
    let Some(block) = block else {
        return Ok(());
    };
    let selects = block.merge().is_some_and(|it| it.op == Op::SelectionMerge);
    let others = block.successors();
    let others = others
        .iter()
        .filter(|&&it| it != found.target && it != found.merge);
    if !selects && others.count() > 0 {
        return Err(found.error("a conditional branch both continues it and stays in its body"));
    }
    Ok(())
}

/// What a construct that is copied defines must not be used elsewhere.
fn stays_inside(
    function: &Function,
    found: &Loop,
    inside: &HashSet<u32>,
) -> Result<(), SpirvError> {
    let blocks = |is_in: bool| {
        function
            .blocks
            .iter()
            .filter(move |it| inside.contains(&it.label) == is_in)
    };
    let defined: HashSet<u32> = blocks(true)
        .flat_map(|it| &it.body)
        .map(|it| it.id)
        .filter(|&id| id != 0)
        .collect();
    for block in blocks(false) {
        let own_phis = block.label == found.header || block.label == found.merge;
        for inst in &block.body {
            let wide = inst.ty == crate::module::WIDE_SWITCH;
            let uses = inst.ids(wide).into_iter().any(|at| {
                let carried = inst.op == Op::Phi && own_phis && at % 2 == 0;
                defined.contains(&inst.args[at])
                    && !(carried && inside.contains(&inst.args[at + 1]))
            });
            if uses {
                return Err(found.error(
                    "several blocks continue it, and code outside of its continue construct uses \
                     what is computed there",
                ));
            }
        }
    }
    Ok(())
}

/// Copies the blocks `inside` for the block `from` that continues: old ids by
/// new ones.
fn copy(
    function: &mut Function,
    build: &mut Gen,
    inside: &HashSet<u32>,
    target: u32,
    from: u32,
) -> HashMap<u32, u32> {
    let originals: Vec<Block> = function
        .blocks
        .iter()
        .filter(|it| inside.contains(&it.label))
        .cloned()
        .collect();
    let mut names = HashMap::new();
    for block in &originals {
        names.insert(block.label, build.id());
        for inst in block.body.iter().filter(|it| it.id != 0) {
            names.insert(inst.id, build.id());
        }
    }
    for mut block in originals {
        let is_target = block.label == target;
        block.label = rename(&names, block.label);
        for inst in &mut block.body {
            if is_target && inst.op == Op::Phi {
                let pairs = inst.args.chunks(2).filter(|pair| pair[1] == from);
                inst.args = pairs.flatten().copied().collect();
            }
            inst.id = rename(&names, inst.id);
            let wide = inst.ty == crate::module::WIDE_SWITCH;
            for at in inst.ids(wide) {
                inst.args[at] = rename(&names, inst.args[at]);
            }
        }
        function.blocks.push(block);
    }
    let new_target = rename(&names, target);
    for block in function.blocks.iter_mut().filter(|it| it.label == from) {
        let end = block.body.last_mut().expect("a terminator");
        for at in label_positions(end).collect::<Vec<_>>() {
            if end.args[at] == target {
                end.args[at] = new_target;
            }
        }
    }
    names
}

fn rename(names: &HashMap<u32, u32>, id: u32) -> u32 {
    names.get(&id).copied().unwrap_or(id)
}

fn phis(function: &Function, label: u32) -> Vec<u32> {
    let block = function.blocks.iter().find(|it| it.label == label);
    let body = block.map_or(&[][..], |it| &it.body);
    let phis = body.iter().filter(|it| it.op == Op::Phi);
    phis.map(|it| it.id).collect()
}

/// The phis of block `label` with what comes to them from the blocks `from`.
fn phi_pairs(function: &Function, label: u32, from: &HashSet<u32>) -> Vec<(u32, u32, u32)> {
    let block = function.blocks.iter().find(|it| it.label == label);
    let body = block.map_or(&[][..], |it| &it.body);
    let phis = body.iter().filter(|it| it.op == Op::Phi);
    phis.flat_map(|phi| phi.args.chunks(2).map(|pair| (phi.id, pair[0], pair[1])))
        .filter(|(_, _, block)| from.contains(block))
        .collect()
}

fn edit_phi(function: &mut Function, phi: u32, edit: impl FnOnce(&mut Vec<u32>)) {
    let mut all = function.blocks.iter_mut().flat_map(|it| &mut it.body);
    if let Some(inst) = all.find(|it| it.id == phi) {
        edit(&mut inst.args);
    }
}

/// Keeps what comes to the phis of block `label` from some blocks only.
fn keep_phis(function: &mut Function, label: u32, keep: impl Fn(u32) -> bool) {
    for block in function.blocks.iter_mut().filter(|it| it.label == label) {
        for inst in block.body.iter_mut().filter(|it| it.op == Op::Phi) {
            let pairs = inst.args.chunks(2).filter(|pair| keep(pair[1]));
            inst.args = pairs.flatten().copied().collect();
        }
    }
}

/// Moves the code of loop headers into blocks of their own.
fn split_headers(function: &mut Function, build: &mut Gen) -> Result<HashSet<u32>, SpirvError> {
    let mut rounds = HashSet::new();
    let mut moved = HashMap::new();
    let mut blocks = Vec::with_capacity(function.blocks.len());
    for mut block in std::mem::take(&mut function.blocks) {
        let Some(found) = Loop::of(&block) else {
            blocks.push(block);
            continue;
        };
        let end = block.terminator();
        let exits = [found.merge, found.target];
        let stays = block
            .successors()
            .iter()
            .filter(|it| !exits.contains(it))
            .count();
        if end.op != Op::Branch && stays > 1 {
            return Err(found.error("its header branches to two places of its body"));
        }
        let label = build.id();
        let phis = block.body.iter().take_while(|it| it.op == Op::Phi).count();
        let mut body = block.body.split_off(phis);
        let merge = body.remove(body.len() - 2);
        block.body.extend([merge, Inst::plain(Op::Branch, [label])]);
        moved.insert(block.label, label);
        rounds.insert(label);
        blocks.push(block);
        blocks.push(Block { label, body });
    }
    function.blocks = blocks;
    rename_predecessors(function, &moved);
    Ok(rounds)
}

/// Where every round of a loop has an access, which can do on the side what is done
/// once a round: the blocks of such by the label of the round.
pub(crate) fn passed(
    function: &Function,
    rounds: &HashSet<u32>,
    accesses: &dyn Fn(&Inst) -> bool,
) -> HashMap<u32, u32> {
    let by_label: HashMap<u32, &Block> = function.blocks.iter().map(|it| (it.label, it)).collect();
    let mut passed = HashMap::new();
    for found in function.blocks.iter().filter_map(Loop::of) {
        let header = by_label[&found.header];
        let Some(&round) = header.successors().iter().find(|it| rounds.contains(it)) else {
            continue;
        };
        // Whether a round can end without this block; what it goes through.
        let walk = |without: Option<u32>| {
            let mut order = vec![round];
            let mut next = 0;
            while let Some(&at) = order.get(next) {
                next += 1;
                if at == found.target || Some(at) == without {
                    continue;
                }
                for to in by_label
                    .get(&at)
                    .map_or_else(Vec::new, |it| it.successors())
                {
                    if to != found.merge && to != found.header && !order.contains(&to) {
                        order.push(to);
                    }
                }
            }
            order
        };
        let holds = |label: &u32| {
            let block = by_label.get(label);
            block.is_some_and(|it| it.body.iter().any(accesses))
        };
        let mut candidates = walk(None).into_iter().filter(holds).take(MAX_TRIED);
        let always = candidates.find(|&it| !walk(Some(it)).contains(&found.target));
        passed.extend(always.map(|it| (round, it)));
    }
    passed
}

/// Tells the phis of a function that blocks now end under another label.
pub(crate) fn rename_predecessors(function: &mut Function, moved: &HashMap<u32, u32>) {
    let all = function.blocks.iter_mut().flat_map(|it| &mut it.body);
    for phi in all.filter(|it| it.op == Op::Phi) {
        for from in phi.args.iter_mut().skip(1).step_by(2) {
            *from = rename(moved, *from);
        }
    }
}
