//! Making new code: ids, types and constants, and blocks of instructions.

use std::collections::HashMap;

use rspirv::spirv::{MemoryAccess, Op, SelectionControl, StorageClass};

use crate::module::{Block, Inst, Module};

/// Hands out ids and the types and constants of new code.
#[derive(Debug)]
pub(crate) struct Gen {
    pub(crate) bound: u32,
    known: HashMap<(Op, u32, Vec<u32>), u32>,
    /// To be added to the module's types and constants.
    pub(crate) globals: Vec<Inst>,
    /// Scope of atomics: the widest that every memory model allows without more
    /// capabilities.
    pub(crate) scope: u32,
    /// Semantics of a barrier for what the host reads and writes.
    pub(crate) fence: u32,
}

impl Gen {
    pub(crate) fn new(module: &Module) -> Self {
        let shared = [
            Op::TypeVoid,
            Op::TypeBool,
            Op::TypeInt,
            Op::TypeVector,
            Op::TypeFunction,
            Op::Constant,
            Op::ConstantTrue,
            Op::ConstantFalse,
        ];
        let mut known = HashMap::new();
        for inst in &module.preamble {
            if shared.contains(&inst.op) {
                known.insert((inst.op, inst.ty, inst.args.clone()), inst.id);
            }
        }
        let memory_model = module.preamble.iter().find(|it| it.op == Op::MemoryModel);
        let vulkan = memory_model.is_some_and(|it| it.args.get(1) == Some(&3));
        Self {
            bound: module.bound,
            known,
            globals: Vec::new(),
            // QueueFamily or Device.
            scope: if vulkan { 5 } else { 1 },
            // AcquireRelease on UniformMemory; made available and visible.
            fence: if vulkan { 0x6048 } else { 0x48 },
        }
    }

    pub(crate) fn id(&mut self) -> u32 {
        let id = self.bound;
        self.bound = self.bound.saturating_add(1);
        id
    }

    /// A type or constant, which may be there already.
    pub(crate) fn shared(&mut self, op: Op, ty: u32, args: &[u32]) -> u32 {
        let key = (op, ty, args.to_vec());
        if let Some(&id) = self.known.get(&key) {
            return id;
        }
        let id = self.global(op, ty, args);
        self.known.insert(key, id);
        id
    }

    /// A global instruction of its own.
    pub(crate) fn global(&mut self, op: Op, ty: u32, args: &[u32]) -> u32 {
        let id = self.id();
        self.globals.push(Inst::new(op, ty, id, args));
        id
    }

    pub(crate) fn void(&mut self) -> u32 {
        self.shared(Op::TypeVoid, 0, &[])
    }

    pub(crate) fn bool(&mut self) -> u32 {
        self.shared(Op::TypeBool, 0, &[])
    }

    pub(crate) fn uint(&mut self) -> u32 {
        self.shared(Op::TypeInt, 0, &[32, 0])
    }

    pub(crate) fn ulong(&mut self) -> u32 {
        self.shared(Op::TypeInt, 0, &[64, 0])
    }

    pub(crate) fn uvec3(&mut self) -> u32 {
        let uint = self.uint();
        self.shared(Op::TypeVector, 0, &[uint, 3])
    }

    pub(crate) fn pointer(&mut self, class: StorageClass, ty: u32) -> u32 {
        self.shared(Op::TypePointer, 0, &[class as u32, ty])
    }

    pub(crate) fn word(&mut self, value: u32) -> u32 {
        let uint = self.uint();
        self.shared(Op::Constant, uint, &[value])
    }

    pub(crate) fn long(&mut self, value: u64) -> u32 {
        let ulong = self.ulong();
        let [low, high] = halves(value);
        self.shared(Op::Constant, ulong, &[low, high])
    }

    pub(crate) fn flag(&mut self, value: bool) -> u32 {
        let bool = self.bool();
        let op = if value {
            Op::ConstantTrue
        } else {
            Op::ConstantFalse
        };
        self.shared(op, bool, &[])
    }

    /// A variable of each invocation that starts as `value`.
    pub(crate) fn private(&mut self, ty: u32, value: u32) -> u32 {
        let pointer = self.pointer(StorageClass::Private, ty);
        self.global(
            Op::Variable,
            pointer,
            &[StorageClass::Private as u32, value],
        )
    }
}

/// The words of a 64-bit literal.
pub(crate) fn halves(value: u64) -> [u32; 2] {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

/// Whether a load must read what the host has just written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// Any value since the dispatch began will do.
    No,
    /// Nothing that was read before.
    Yes,
}

/// Blocks in the making.
#[derive(Debug)]
pub(crate) struct Code<'a> {
    pub(crate) build: &'a mut Gen,
    blocks: Vec<Block>,
    /// Variables, which stand before all other code of a function.
    locals: Vec<Inst>,
    /// The block that new instructions go to.
    pub(crate) open: Block,
}

impl<'a> Code<'a> {
    /// Begins a block called `label`.
    pub(crate) fn new(build: &'a mut Gen, label: u32) -> Self {
        let open = Block {
            label,
            body: Vec::new(),
        };
        Self {
            build,
            blocks: Vec::new(),
            locals: Vec::new(),
            open,
        }
    }

    /// The blocks; the last must have a terminator.
    pub(crate) fn finish(mut self) -> Vec<Block> {
        self.blocks.push(self.open);
        self.blocks[0].body.splice(0..0, self.locals);
        self.blocks
    }

    /// Adds a variable of the function.
    pub(crate) fn local(&mut self, ty: u32) -> u32 {
        let class = StorageClass::Function;
        let pointer = self.build.pointer(class, ty);
        let id = self.build.id();
        let args = [class as u32];
        self.locals.push(Inst::new(Op::Variable, pointer, id, args));
        id
    }

    pub(crate) fn push(&mut self, inst: Inst) {
        self.open.body.push(inst);
    }

    /// An instruction without a result.
    pub(crate) fn act(&mut self, op: Op, args: &[u32]) {
        self.push(Inst::plain(op, args));
    }

    /// An instruction with a result.
    pub(crate) fn op(&mut self, op: Op, ty: u32, args: &[u32]) -> u32 {
        let id = self.build.id();
        self.push(Inst::new(op, ty, id, args));
        id
    }

    /// The open block has ended; the next one is `label`.
    pub(crate) fn begin(&mut self, label: u32) {
        let next = Block {
            label,
            body: Vec::new(),
        };
        self.blocks.push(std::mem::replace(&mut self.open, next));
    }

    /// Runs `then` where `condition` holds. It is rarely so: the code is better
    /// skipped than predicated.
    pub(crate) fn rarely(&mut self, condition: u32, then: impl FnOnce(&mut Self)) {
        let (yes, merge) = (self.build.id(), self.build.id());
        let control = SelectionControl::DONT_FLATTEN.bits();
        self.act(Op::SelectionMerge, &[merge, control]);
        self.act(Op::BranchConditional, &[condition, yes, merge]);
        self.begin(yes);
        then(self);
        if !self.open.body.last().is_some_and(Inst::is_terminator) {
            self.act(Op::Branch, &[merge]);
        }
        self.begin(merge);
    }

    /// Runs `body`, which says when it is done, until it is.
    pub(crate) fn until(&mut self, body: impl FnOnce(&mut Self) -> u32) {
        let [header, inner, more, merge] = [(); 4].map(|()| self.build.id());
        self.act(Op::Branch, &[header]);
        self.begin(header);
        self.act(Op::LoopMerge, &[merge, more, 0]);
        self.act(Op::Branch, &[inner]);
        self.begin(inner);
        let done = body(self);
        self.act(Op::BranchConditional, &[done, merge, more]);
        self.begin(more);
        self.act(Op::Branch, &[header]);
        self.begin(merge);
    }

    /// An operation on 64 bits.
    pub(crate) fn long(&mut self, op: Op, left: u32, right: u32) -> u32 {
        let ulong = self.build.ulong();
        self.op(op, ulong, &[left, right])
    }

    /// The same with a constant.
    pub(crate) fn long_with(&mut self, op: Op, left: u32, right: u64) -> u32 {
        let right = self.build.long(right);
        self.long(op, left, right)
    }

    /// An operation on 32 bits.
    pub(crate) fn word(&mut self, op: Op, left: u32, right: u32) -> u32 {
        let uint = self.build.uint();
        self.op(op, uint, &[left, right])
    }

    /// The same with a constant.
    pub(crate) fn word_with(&mut self, op: Op, left: u32, right: u32) -> u32 {
        let right = self.build.word(right);
        self.word(op, left, right)
    }

    /// A comparison or a logical operation.
    pub(crate) fn test(&mut self, op: Op, args: &[u32]) -> u32 {
        let bool = self.build.bool();
        self.op(op, bool, args)
    }

    /// Whether any bit of `mask` is set in a 64-bit value.
    pub(crate) fn has_bit(&mut self, value: u32, mask: u64) -> u32 {
        let bits = self.long_with(Op::BitwiseAnd, value, mask);
        let zero = self.build.long(0);
        self.test(Op::INotEqual, &[bits, zero])
    }

    pub(crate) fn low_word(&mut self, long: u32) -> u32 {
        let uint = self.build.uint();
        self.op(Op::UConvert, uint, &[long])
    }

    pub(crate) fn widen(&mut self, word: u32) -> u32 {
        let ulong = self.build.ulong();
        self.op(Op::UConvert, ulong, &[word])
    }

    /// Reads a variable.
    pub(crate) fn get(&mut self, ty: u32, variable: u32) -> u32 {
        self.op(Op::Load, ty, &[variable])
    }

    /// Writes a variable.
    pub(crate) fn set(&mut self, variable: u32, value: u32) {
        self.act(Op::Store, &[variable, value]);
    }

    fn at(&mut self, ty: u32, address: u32) -> u32 {
        let class = StorageClass::PhysicalStorageBuffer;
        let pointer = self.build.pointer(class, ty);
        self.op(Op::ConvertUToPtr, pointer, &[address])
    }

    fn read(&mut self, ty: u32, bytes: u32, address: u32, fresh: Fresh) -> u32 {
        let pointer = self.at(ty, address);
        let mut access = MemoryAccess::ALIGNED;
        if fresh == Fresh::Yes {
            access |= MemoryAccess::VOLATILE;
        }
        self.op(Op::Load, ty, &[pointer, access.bits(), bytes])
    }

    /// Reads 32 bits of memory at a device address.
    pub(crate) fn read_word(&mut self, address: u32, fresh: Fresh) -> u32 {
        let uint = self.build.uint();
        self.read(uint, 4, address, fresh)
    }

    /// Reads 64 bits of memory at a device address.
    pub(crate) fn read_long(&mut self, address: u32, fresh: Fresh) -> u32 {
        let ulong = self.build.ulong();
        self.read(ulong, 8, address, fresh)
    }

    /// Writes 64 bits of memory at a device address.
    pub(crate) fn write_long(&mut self, address: u32, value: u32) {
        let ulong = self.build.ulong();
        let pointer = self.at(ulong, address);
        let access = MemoryAccess::ALIGNED.bits();
        self.act(Op::Store, &[pointer, value, access, 8]);
    }

    /// An atomic operation on 32 bits at a device address: what was there.
    pub(crate) fn atomic(&mut self, op: Op, address: u32, value: u32) -> u32 {
        let uint = self.build.uint();
        let pointer = self.at(uint, address);
        let scope = self.build.scope;
        let (scope, relaxed) = (self.build.word(scope), self.build.word(0));
        self.op(op, uint, &[pointer, scope, relaxed, value])
    }

    /// Orders what is before against what is after, the host's accesses included.
    pub(crate) fn fence(&mut self) {
        let (scope, semantics) = (self.build.scope, self.build.fence);
        let (scope, semantics) = (self.build.word(scope), self.build.word(semantics));
        self.act(Op::MemoryBarrier, &[scope, semantics]);
    }
}
