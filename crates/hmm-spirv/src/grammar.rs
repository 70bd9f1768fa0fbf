//! Which words of an instruction are ids.

use std::collections::HashMap;
use std::sync::OnceLock;

use rspirv::grammar::{
    INSTRUCTION_TABLE, Instruction, LogicalOperand, OperandKind, OperandQuantifier,
};
use rspirv::spirv::Op;

fn grammar(op: Op) -> Option<&'static Instruction<'static>> {
    static TABLE: OnceLock<HashMap<u32, &'static Instruction<'static>>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut table = HashMap::new();
        for instruction in INSTRUCTION_TABLE.iter() {
            table
                .entry(instruction.opcode as u32)
                .or_insert(instruction);
        }
        table
    });
    table.get(&(op as u32)).copied()
}

/// Whether an instruction begins with a result type, and with a result.
pub(crate) fn results(op: Op) -> (bool, bool) {
    let Some(grammar) = grammar(op) else {
        return (false, false);
    };
    let has = |kind: OperandKind| grammar.operands.iter().take(2).any(|it| it.kind == kind);
    (has(OperandKind::IdResultType), has(OperandKind::IdResult))
}

/// Positions of the ids among the words after result type and result, or
/// `None` if the words do not fit the instruction. `wide_switch` says that the
/// literals of an OpSwitch have two words.
pub(crate) fn id_positions(op: Op, args: &[u32], wide_switch: bool) -> Option<Vec<usize>> {
    let mut walk = Walk {
        args,
        at: 0,
        ids: Vec::new(),
    };
    match op {
        // Literals follow whose number depends on a literal.
        Op::Decorate | Op::ExecutionMode | Op::MemberDecorate | Op::DecorateString => {
            walk.id()?;
            walk.words(1)?;
            return Some(walk.ids);
        }
        Op::DecorateId | Op::ExecutionModeId => {
            walk.id()?;
            walk.words(1)?;
            walk.rest_ids();
            return Some(walk.ids);
        }
        Op::SpecConstantOp => {
            walk.spec_constant_op()?;
            return Some(walk.ids);
        }
        _ => {}
    }
    let operands = grammar(op)?.operands.iter().filter(|operand| {
        !matches!(
            operand.kind,
            OperandKind::IdResultType | OperandKind::IdResult
        )
    });
    for LogicalOperand { kind, quantifier } in operands {
        match quantifier {
            OperandQuantifier::One => walk.operand(*kind, wide_switch)?,
            OperandQuantifier::ZeroOrOne if walk.at < args.len() => {
                walk.operand(*kind, wide_switch)?;
            }
            OperandQuantifier::ZeroOrOne => {}
            OperandQuantifier::ZeroOrMore => {
                while walk.at < args.len() {
                    walk.operand(*kind, wide_switch)?;
                }
            }
        }
    }
    (walk.at == args.len()).then_some(walk.ids)
}

struct Walk<'a> {
    args: &'a [u32],
    at: usize,
    ids: Vec<usize>,
}

impl Walk<'_> {
    fn words(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count)?;
        (self.at <= self.args.len()).then_some(())
    }

    fn id(&mut self) -> Option<()> {
        self.ids.push(self.at);
        self.words(1)
    }

    fn rest_ids(&mut self) {
        self.ids.extend(self.at..self.args.len());
        self.at = self.args.len();
    }

    fn string(&mut self) -> Option<()> {
        let rest = self.args.get(self.at..)?;
        let ends = |word: &u32| word.to_le_bytes().contains(&0);
        let words = rest.iter().position(ends)? + 1;
        self.words(words)
    }

    fn operand(&mut self, kind: OperandKind, wide_switch: bool) -> Option<()> {
        match kind {
            OperandKind::IdRef | OperandKind::IdScope | OperandKind::IdMemorySemantics => self.id(),
            OperandKind::PairIdRefIdRef => {
                self.id()?;
                self.id()
            }
            OperandKind::PairIdRefLiteralInteger => {
                self.id()?;
                self.words(1)
            }
            OperandKind::PairLiteralIntegerIdRef => {
                self.words(if wide_switch { 2 } else { 1 })?;
                self.id()
            }
            OperandKind::LiteralString => self.string(),
            OperandKind::LiteralContextDependentNumber => {
                let left = self.args.len() - self.at.min(self.args.len());
                (1..=2).contains(&left).then_some(())?;
                self.words(left)
            }
            OperandKind::MemoryAccess => self.memory_access(),
            OperandKind::ImageOperands => {
                self.words(1)?;
                self.rest_ids();
                Some(())
            }
            OperandKind::LoopControl => {
                self.words(1)?;
                self.at = self.args.len();
                Some(())
            }
            _ => self.words(1),
        }
    }

    fn memory_access(&mut self) -> Option<()> {
        let mask = *self.args.get(self.at)?;
        self.words(1)?;
        if mask & 0x2 != 0 {
            self.words(1)?;
        }
        for id in [0x8, 0x10, 0x1_0000, 0x2_0000] {
            if mask & id != 0 {
                self.id()?;
            }
        }
        Some(())
    }

    fn spec_constant_op(&mut self) -> Option<()> {
        let op = Op::from_u32(*self.args.first()?)?;
        let ids = match op {
            Op::CompositeExtract => 1,
            Op::CompositeInsert | Op::VectorShuffle => 2,
            _ => self.args.len() - 1,
        };
        self.words(1)?;
        for _ in 0..ids {
            self.id()?;
        }
        self.at = self.args.len();
        Some(())
    }
}
