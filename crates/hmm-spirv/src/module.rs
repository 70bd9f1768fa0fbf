//! A module in memory: instructions with their ids told from their literals.

use std::collections::HashMap;

use rspirv::spirv::{MAGIC_NUMBER, Op};

use crate::error::SpirvError;
use crate::grammar;

/// Ids that a module can have (the universal limit of SPIR-V 2.17).
pub(crate) const MAX_BOUND: u32 = 0x3f_ffff;
/// Words of the largest module that is looked at.
const MAX_WORDS: usize = 1 << 24;

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inst {
    pub(crate) op: Op,
    /// The result's type; 0 if there is none.
    pub(crate) ty: u32,
    /// The result; 0 if there is none.
    pub(crate) id: u32,
    /// The words after these.
    pub(crate) args: Vec<u32>,
}

impl Inst {
    pub(crate) fn new(op: Op, ty: u32, id: u32, args: impl Into<Vec<u32>>) -> Self {
        let args = args.into();
        Self { op, ty, id, args }
    }

    /// Without a result.
    pub(crate) fn plain(op: Op, args: impl Into<Vec<u32>>) -> Self {
        Self::new(op, 0, 0, args)
    }

    /// The id to name in an error: the result, else the first word.
    pub(crate) fn name(&self) -> u32 {
        if self.id == 0 {
            self.args.first().copied().unwrap_or(0)
        } else {
            self.id
        }
    }

    /// Whether it ends a block.
    pub(crate) fn is_terminator(&self) -> bool {
        matches!(
            self.op,
            Op::Branch
                | Op::BranchConditional
                | Op::Switch
                | Op::Return
                | Op::ReturnValue
                | Op::Unreachable
        )
    }

    /// Positions of the ids in `args`; checked when the module was read.
    pub(crate) fn ids(&self, wide_switch: bool) -> Vec<usize> {
        grammar::id_positions(self.op, &self.args, wide_switch).unwrap_or_default()
    }

    fn encode(&self, out: &mut Vec<u32>) {
        let start = out.len();
        out.push(0);
        if self.ty != 0 {
            out.push(self.ty);
        }
        if self.id != 0 {
            out.push(self.id);
        }
        out.extend_from_slice(&self.args);
        let words = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
        out[start] = words << 16 | self.op as u32;
    }
}

/// A block: its label, and its instructions up to the terminator.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) label: u32,
    pub(crate) body: Vec<Inst>,
}

impl Block {
    pub(crate) fn terminator(&self) -> &Inst {
        self.body.last().expect("a block ends with a terminator")
    }

    /// The OpLoopMerge or OpSelectionMerge before the terminator.
    pub(crate) fn merge(&self) -> Option<&Inst> {
        let merge = self.body.len().checked_sub(2).map(|at| &self.body[at])?;
        matches!(merge.op, Op::LoopMerge | Op::SelectionMerge).then_some(merge)
    }

    /// The labels that it may branch to.
    pub(crate) fn successors(&self) -> Vec<u32> {
        let end = self.terminator();
        label_positions(end).map(|at| end.args[at]).collect()
    }
}

/// Positions of the labels in a terminator or merge instruction.
pub(crate) fn label_positions(inst: &Inst) -> Box<dyn Iterator<Item = usize> + '_> {
    match inst.op {
        Op::Branch | Op::SelectionMerge => Box::new(0..1),
        Op::LoopMerge => Box::new(0..2),
        Op::BranchConditional => Box::new(1..3),
        // The first target tells the literals' width: selector, default, then pairs.
        Op::Switch => {
            let step = if inst.ty == WIDE_SWITCH { 3 } else { 2 };
            Box::new(std::iter::once(1).chain((2 + step - 1..inst.args.len()).step_by(step)))
        }
        _ => Box::new(std::iter::empty()),
    }
}

/// Marks, in place of the result type that it does not have, an OpSwitch with
/// literals of 64 bits.
pub(crate) const WIDE_SWITCH: u32 = u32::MAX;

/// A function with a body.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) def: Inst,
    pub(crate) params: Vec<Inst>,
    pub(crate) blocks: Vec<Block>,
}

impl Function {
    pub(crate) fn insts(&self) -> impl Iterator<Item = &Inst> {
        self.blocks.iter().flat_map(|block| &block.body)
    }
}

/// A module.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    pub(crate) version: u32,
    generator: u32,
    pub(crate) bound: u32,
    /// Everything before the first function.
    pub(crate) preamble: Vec<Inst>,
    pub(crate) functions: Vec<Function>,
}

impl Module {
    /// Reads a module and checks that its parts fit together as far as the pass
    /// relies on it: every id is defined once and within the bound, and every
    /// branch leads to a block of its function.
    pub(crate) fn parse(words: &[u32]) -> Result<Self, SpirvError> {
        let malformed = |word, what| SpirvError::Malformed { word, what };
        if words.len() < 5 {
            return Err(malformed(words.len(), "no header of five words"));
        }
        if words[0] != MAGIC_NUMBER {
            return Err(malformed(0, "no magic number (or another byte order)"));
        }
        if words.len() > MAX_WORDS {
            return Err(malformed(MAX_WORDS, "too large"));
        }
        let [_, major, minor, _] = words[1].to_be_bytes();
        if major != 1 || !(3..=6).contains(&minor) || words[1] & 0xff00_00ff != 0 {
            return Err(SpirvError::Version { major, minor });
        }
        let bound = words[3];
        if bound == 0 || bound > MAX_BOUND {
            return Err(malformed(3, "an absurd bound of ids"));
        }
        if words[4] != 0 {
            return Err(malformed(4, "an unknown schema"));
        }
        let insts = instructions(words, bound)?;
        let mut module = Self {
            version: words[1],
            generator: words[2],
            bound,
            preamble: Vec::new(),
            functions: Vec::new(),
        };
        module.arrange(insts)?;
        crate::validate::ids(&mut module)?;
        Ok(module)
    }

    /// Minor version: 3 to 6.
    pub(crate) const fn minor(&self) -> u32 {
        self.version >> 8 & 0xff
    }

    fn arrange(&mut self, insts: Vec<Inst>) -> Result<(), SpirvError> {
        let mut insts = insts.into_iter().peekable();
        let stray = |inst: &Inst, what| SpirvError::Invalid {
            op: inst.op,
            id: inst.name(),
            what,
        };
        while let Some(inst) = insts.next_if(|inst| inst.op != Op::Function) {
            if is_body(inst.op) {
                return Err(stray(&inst, "it stands outside of a function"));
            }
            self.preamble.push(inst);
        }
        while let Some(def) = insts.next() {
            if matches!(def.op, Op::Line | Op::NoLine) {
                continue;
            }
            if def.op != Op::Function {
                return Err(stray(&def, "it stands between functions"));
            }
            let mut function = Function {
                def,
                params: Vec::new(),
                blocks: Vec::new(),
            };
            let mut open = false;
            loop {
                let Some(inst) = insts.next() else {
                    return Err(stray(&function.def, "the function has no end"));
                };
                match inst.op {
                    // Lines name source code; blocks that are split lose them anyway.
                    Op::Line | Op::NoLine => {}
                    Op::FunctionEnd if !open => break,
                    Op::FunctionParameter if function.blocks.is_empty() => {
                        function.params.push(inst);
                    }
                    Op::Label if !open => {
                        function.blocks.push(Block {
                            label: inst.id,
                            body: Vec::new(),
                        });
                        open = true;
                    }
                    Op::Label | Op::FunctionEnd => {
                        return Err(stray(&inst, "the block before it has no terminator"));
                    }
                    Op::Function | Op::FunctionParameter => {
                        return Err(stray(&inst, "it stands in a function's body"));
                    }
                    _ => {
                        let Some(block) = function.blocks.last_mut().filter(|_| open) else {
                            return Err(stray(&inst, "it stands outside of a block"));
                        };
                        open = !inst.is_terminator();
                        block.body.push(inst);
                    }
                }
            }
            if function.blocks.is_empty() {
                return Err(stray(&function.def, "the function has no body"));
            }
            self.functions.push(function);
        }
        Ok(())
    }

    /// The module as words.
    pub(crate) fn encode(&self) -> Vec<u32> {
        let mut out = vec![MAGIC_NUMBER, self.version, self.generator, self.bound, 0];
        for inst in &self.preamble {
            inst.encode(&mut out);
        }
        for function in &self.functions {
            function.def.encode(&mut out);
            for param in &function.params {
                param.encode(&mut out);
            }
            for block in &function.blocks {
                Inst::new(Op::Label, 0, block.label, []).encode(&mut out);
                for inst in &block.body {
                    if inst.ty == WIDE_SWITCH {
                        Inst::plain(inst.op, inst.args.clone()).encode(&mut out);
                    } else {
                        inst.encode(&mut out);
                    }
                }
            }
            Inst::plain(Op::FunctionEnd, []).encode(&mut out);
        }
        out
    }

    /// Ids by the instruction of the preamble that defines them.
    pub(crate) fn globals(&self) -> HashMap<u32, &Inst> {
        let defined = self.preamble.iter().filter(|inst| inst.id != 0);
        defined.map(|inst| (inst.id, inst)).collect()
    }
}

/// Whether an instruction belongs into a function only.
fn is_body(op: Op) -> bool {
    matches!(
        op,
        Op::Label
            | Op::FunctionEnd
            | Op::FunctionParameter
            | Op::FunctionCall
            | Op::Load
            | Op::Store
            | Op::AccessChain
            | Op::Phi
            | Op::Branch
            | Op::Return
    )
}

/// Cuts words into instructions.
fn instructions(words: &[u32], bound: u32) -> Result<Vec<Inst>, SpirvError> {
    let mut insts = Vec::new();
    let mut at = 5;
    while at < words.len() {
        let malformed = |what| SpirvError::Malformed { word: at, what };
        let count = (words[at] >> 16) as usize;
        let opcode = (words[at] & 0xffff) as u16;
        let all = at
            .checked_add(count)
            .filter(|_| count > 0)
            .and_then(|end| words.get(at + 1..end))
            .ok_or_else(|| malformed("an instruction's word count is wrong"))?;
        let unknown = SpirvError::UnknownOpcode { opcode, word: at };
        let op = Op::from_u32(u32::from(opcode)).ok_or(unknown)?;
        let mut rest = all;
        let mut take = |wanted: bool| -> Result<u32, SpirvError> {
            if !wanted {
                return Ok(0);
            }
            let (&id, after) = rest
                .split_first()
                .ok_or_else(|| malformed("an instruction is too short"))?;
            rest = after;
            if id == 0 || id >= bound {
                return Err(malformed("an id is out of bound"));
            }
            Ok(id)
        };
        let (has_type, has_result) = grammar::results(op);
        let ty = take(has_type)?;
        let id = take(has_result)?;
        insts.push(Inst::new(op, ty, id, rest));
        at += count;
    }
    Ok(insts)
}
