//! Entry points: what runs before and after the kernel proper.

use std::collections::HashMap;

use rspirv::spirv::{BuiltIn, Decoration, ExecutionMode, Op, StorageClass};

use crate::build::{Code, Fresh, Gen};
use crate::contract::{Variant, control};
use crate::error::SpirvError;
use crate::module::{Function, Inst, Module, WIDE_SWITCH};
use crate::runtime::{MISSED, Runtime};
use crate::stall::elect;
use crate::types::Types;

/// Variables that hold built-in values, and decorations for new ones.
#[derive(Debug)]
pub(crate) struct Builtins {
    known: HashMap<u32, u32>,
    /// Constants that are built-in values: the workgroup's size.
    pub(crate) workgroup_size: Option<u32>,
    pub(crate) decorations: Vec<Inst>,
    added: Vec<u32>,
}

impl Builtins {
    pub(crate) fn new(module: &Module) -> Self {
        let mut known = HashMap::new();
        let variables = module.preamble.iter().filter(|it| it.op == Op::Variable);
        let variables: Vec<u32> = variables.map(|it| it.id).collect();
        let mut workgroup_size = None;
        for inst in &module.preamble {
            if let (Op::Decorate, &[id, kind, value]) = (inst.op, inst.args.as_slice())
                && kind == Decoration::BuiltIn as u32
            {
                if variables.contains(&id) {
                    known.insert(value, id);
                } else if value == BuiltIn::WorkgroupSize as u32 {
                    workgroup_size = Some(id);
                }
            }
        }
        Self {
            known,
            workgroup_size,
            decorations: Vec::new(),
            added: Vec::new(),
        }
    }

    /// The value of a built-in variable of type `ty`.
    fn read(
        &mut self,
        code: &mut Code<'_>,
        types: &Types,
        builtin: BuiltIn,
        ty: u32,
    ) -> Result<u32, SpirvError> {
        let class = StorageClass::Input;
        let variable = if let Some(&variable) = self.known.get(&(builtin as u32)) {
            let pointer = types.of.get(&variable).copied().unwrap_or(0);
            if types.pointee(pointer).is_some_and(|its| its != ty) {
                return Err(SpirvError::Unsupported {
                    op: Op::Variable,
                    id: variable,
                    why: "a built-in variable has signed components; declare it unsigned",
                });
            }
            variable
        } else {
            let pointer = code.build.pointer(class, ty);
            let id = code.build.global(Op::Variable, pointer, &[class as u32]);
            let args = [id, Decoration::BuiltIn as u32, builtin as u32];
            self.decorations.push(Inst::plain(Op::Decorate, args));
            self.known.insert(builtin as u32, id);
            self.added.push(id);
            id
        };
        Ok(code.get(ty, variable))
    }
}

/// Wraps every entry point of a module.
pub(crate) fn wrap(
    module: &mut Module,
    build: &mut Gen,
    runtime: &mut Runtime,
    types: &Types,
    writes: bool,
) -> Result<Vec<Inst>, SpirvError> {
    let mut builtins = Builtins::new(module);
    let groups = private_groups(module, build)?;
    let mut wrappers = HashMap::new();
    let entries: Vec<u32> = module
        .preamble
        .iter()
        .filter(|it| it.op == Op::EntryPoint)
        .map(|it| it.args[1])
        .collect();
    for &entry in &entries {
        if wrappers.contains_key(&entry) {
            continue;
        }
        let size = group_size(module, &builtins, entry);
        let mut wrapper = Wrapper {
            runtime,
            types,
            builtins: &mut builtins,
            size,
            groups,
            writes,
        };
        let function = wrapper.function(build, entry)?;
        wrappers.insert(entry, function.def.id);
        module.functions.push(function);
    }
    for inst in &mut module.preamble {
        match inst.op {
            Op::EntryPoint => {
                inst.args[1] = wrappers[&inst.args[1]];
                if module.version >> 8 & 0xff >= 4 {
                    inst.args.extend(&runtime.variables);
                }
                inst.args.extend(&builtins.added);
            }
            Op::ExecutionMode | Op::ExecutionModeId => {
                if let Some(&wrapper) = wrappers.get(&inst.args[0]) {
                    inst.args[0] = wrapper;
                }
            }
            _ => {}
        }
    }
    Ok(builtins.decorations)
}

/// How many invocations a workgroup has in each direction.
#[derive(Clone, Copy, Debug)]
enum Size {
    /// By number.
    Numbers([u32; 3]),
    /// By the ids of constants.
    Ids([u32; 3]),
    /// By the id of a constant vector.
    Vector(u32),
}

fn group_size(module: &Module, builtins: &Builtins, entry: u32) -> Size {
    if let Some(id) = builtins.workgroup_size {
        return Size::Vector(id);
    }
    let mode = |op: Op, mode: ExecutionMode| {
        module
            .preamble
            .iter()
            .find_map(|it| match *it.args.as_slice() {
                [id, kind, x, y, z] if it.op == op && id == entry && kind == mode as u32 => {
                    Some([x, y, z])
                }
                _ => None,
            })
    };
    mode(Op::ExecutionModeId, ExecutionMode::LocalSizeId)
        .map(Size::Ids)
        .or_else(|| mode(Op::ExecutionMode, ExecutionMode::LocalSize).map(Size::Numbers))
        .unwrap_or(Size::Numbers([1; 3]))
}

/// Turns the built-in number of workgroups, which is that of one dispatch, into
/// a variable that is set to that of the whole launch.
fn private_groups(module: &mut Module, build: &mut Gen) -> Result<Option<u32>, SpirvError> {
    let builtin = [Decoration::BuiltIn as u32, BuiltIn::NumWorkgroups as u32];
    let decorates = |it: &Inst| it.op == Op::Decorate && it.args.get(1..) == Some(&builtin[..]);
    let Some(variable) = module.preamble.iter().find(|it| decorates(it)) else {
        return Ok(None);
    };
    let variable = variable.args[0];
    module.preamble.retain(|it| !decorates(it));
    let uvec3 = build.uvec3();
    let class = StorageClass::Private;
    let pointer = build.pointer(class, uvec3);
    // It keeps its id, and moves behind its new type.
    module.preamble.retain(|it| it.id != variable);
    build
        .globals
        .push(Inst::new(Op::Variable, pointer, variable, [class as u32]));
    if module.minor() < 4 {
        for inst in module
            .preamble
            .iter_mut()
            .filter(|it| it.op == Op::EntryPoint)
        {
            // The function's id, then the name, then the interface.
            let name = inst
                .args
                .iter()
                .skip(2)
                .position(|it| it.to_le_bytes().contains(&0));
            let interface = name.map_or(inst.args.len(), |at| at + 3);
            let mut tail = inst.args.split_off(interface);
            tail.retain(|&it| it != variable);
            inst.args.extend(tail);
        }
    }
    let uint = build.uint();
    let component = build.pointer(class, uint);
    for block in module.functions.iter_mut().flat_map(|it| &mut it.blocks) {
        for inst in &mut block.body {
            let chain = matches!(inst.op, Op::AccessChain | Op::InBoundsAccessChain);
            let used = inst.ids(inst.ty == WIDE_SWITCH).into_iter();
            let uses = used.filter(|&at| inst.args[at] == variable).count();
            if chain && uses == 1 && inst.args[0] == variable {
                inst.ty = component;
            } else if uses > 0 && inst.op != Op::Load {
                return Err(SpirvError::Unsupported {
                    op: inst.op,
                    id: inst.name(),
                    why: "it takes the address of NumWorkgroups; copy that into a variable first",
                });
            }
        }
    }
    Ok(Some(variable))
}

struct Wrapper<'a> {
    runtime: &'a mut Runtime,
    types: &'a Types,
    builtins: &'a mut Builtins,
    size: Size,
    groups: Option<u32>,
    /// Whether the module writes to memory at all.
    writes: bool,
}

impl Wrapper<'_> {
    fn function(&mut self, build: &mut Gen, entry: u32) -> Result<Function, SpirvError> {
        let void = build.void();
        let ty = build.shared(Op::TypeFunction, 0, &[void]);
        let [id, label] = [(); 2].map(|()| build.id());
        let mut code = Code::new(build, label);
        self.runtime.prologue(&mut code);
        if let Some(variable) = self.groups {
            let groups = self.words(&mut code, control::GROUPS);
            let uvec3 = code.build.uvec3();
            let groups = code.op(Op::CompositeConstruct, uvec3, &groups);
            code.set(variable, groups);
        }
        match self.runtime.variant {
            Variant::Checked => self.checked(&mut code, entry)?,
            Variant::Stall => self.stalling(&mut code, entry),
            Variant::Delta | Variant::Masked | Variant::Table => {
                code.op(Op::FunctionCall, void, &[entry]);
            }
        }
        code.act(Op::Return, &[]);
        Ok(Function {
            def: Inst::new(Op::Function, void, id, [0, ty]),
            params: Vec::new(),
            blocks: code.finish(),
        })
    }

    /// Three words of the control block.
    fn words(&self, code: &mut Code<'_>, offset: u64) -> [u32; 3] {
        [0, 4, 8].map(|more| {
            let address = self.runtime.field(code, offset + more);
            code.read_word(address, Fresh::No)
        })
    }

    /// Runs the kernel where it is not done; notes how it ended.
    fn checked(&mut self, code: &mut Code<'_>, entry: u32) -> Result<(), SpirvError> {
        let (void, bool, ulong) = (code.build.void(), code.build.bool(), code.build.ulong());
        let (zero, no) = (code.build.long(0), code.build.flag(false));
        let index = self.index(code)?;
        let done = self.runtime.field(code, control::DONE);
        let done = code.read_long(done, Fresh::No);
        let asked = code.test(Op::INotEqual, &[done, zero]);
        let word = code.word_with(Op::ShiftRightLogical, index, 5);
        let word = code.widen(word);
        let word = code.long_with(Op::ShiftLeftLogical, word, 2);
        let at = code.op(Op::IAdd, ulong, &[done, word]);
        let shift = code.word_with(Op::BitwiseAnd, index, 31);
        let one = code.build.word(1);
        let bit = code.word(Op::ShiftLeftLogical, one, shift);
        let skip = code.local(bool);
        code.set(skip, no);
        code.rarely(asked, |code| {
            let before = code.read_word(at, Fresh::No);
            let before = code.word(Op::BitwiseAnd, before, bit);
            let none = code.build.word(0);
            let is_done = code.test(Op::INotEqual, &[before, none]);
            code.set(skip, is_done);
        });
        let skipped = code.get(bool, skip);
        let runs = code.test(Op::LogicalNot, &[skipped]);
        code.rarely(runs, |code| {
            code.op(Op::FunctionCall, void, &[entry]);
            let dead = self.runtime.is_dead(code);
            code.rarely(dead, |code| self.gave_up(code));
            let finished = code.test(Op::LogicalNot, &[dead]);
            let notes = code.test(Op::LogicalAnd, &[finished, asked]);
            code.rarely(notes, |code| {
                code.atomic(Op::AtomicOr, at, bit);
            });
        });
        Ok(())
    }

    /// Counts an invocation that gave up, and logs its miss.
    fn gave_up(&self, code: &mut Code<'_>) {
        let (bool, uint) = (code.build.bool(), code.build.uint());
        let (one, zero) = (code.build.word(1), code.build.word(0));
        let end = code.get(uint, self.runtime.end);
        let missed = code.word_with(Op::BitwiseAnd, end, MISSED);
        let missed = code.test(Op::INotEqual, &[missed, zero]);
        code.rarely(missed, |code| {
            let high = code.get(uint, self.runtime.end_high);
            let high = code.widen(high);
            let high = code.long_with(Op::ShiftLeftLogical, high, 32);
            let low = code.word_with(Op::BitwiseAnd, end, !MISSED);
            let low = code.widen(low);
            let fault = code.long(Op::BitwiseOr, high, low);
            self.runtime.report(code, fault);
        });
        let unfinished = self.runtime.field(code, control::UNFINISHED);
        code.atomic(Op::AtomicIAdd, unfinished, one);
        // A checked invocation that missed is run again, and the kernel was found
        // or promised to bear that. One that was stopped is torn if it can write.
        let torn = match self.runtime.variant {
            Variant::Stall => code.get(bool, self.runtime.wrote),
            _ if self.writes => code.test(Op::LogicalNot, &[missed]),
            _ => return,
        };
        code.rarely(torn, |code| {
            let torn = self.runtime.field(code, control::TORN);
            code.atomic(Op::AtomicIAdd, torn, one);
        });
    }

    /// Runs the kernel as one of the active subgroups.
    fn stalling(&mut self, code: &mut Code<'_>, entry: u32) {
        let void = code.build.void();
        let [one, minus_one] = [1, u32::MAX].map(|it| code.build.word(it));
        let active = self.runtime.field(code, control::ACTIVE);
        let leader = elect(code);
        code.rarely(leader, |code| {
            code.atomic(Op::AtomicIAdd, active, one);
        });
        code.fence();
        code.op(Op::FunctionCall, void, &[entry]);
        code.fence();
        let dead = self.runtime.is_dead(code);
        code.rarely(dead, |code| self.gave_up(code));
        code.rarely(leader, |code| {
            code.atomic(Op::AtomicIAdd, active, minus_one);
        });
    }

    /// Which invocation of the dispatch this is.
    fn index(&mut self, code: &mut Code<'_>) -> Result<u32, SpirvError> {
        let (uint, uvec3) = (code.build.uint(), code.build.uvec3());
        let group = self
            .builtins
            .read(code, self.types, BuiltIn::WorkgroupId, uvec3)?;
        let local = self
            .builtins
            .read(code, self.types, BuiltIn::LocalInvocationIndex, uint)?;
        let base = self.words(code, control::BASE_GROUP);
        let dispatched = self.words(code, control::DISPATCHED);
        let mut linear = code.build.word(0);
        for axis in [2u32, 1, 0] {
            let at = code.op(Op::CompositeExtract, uint, &[group, axis]);
            let at = code.word(Op::ISub, at, base[axis as usize]);
            let row = code.word(Op::IMul, linear, dispatched[axis as usize]);
            linear = code.word(Op::IAdd, row, at);
        }
        let sizes = match self.size {
            Size::Numbers(sizes) => sizes.map(|size| code.build.word(size)),
            Size::Ids(ids) => ids,
            Size::Vector(id) => {
                [0, 1, 2].map(|axis| code.op(Op::CompositeExtract, uint, &[id, axis]))
            }
        };
        let mut size = sizes[0];
        for more in &sizes[1..] {
            size = code.word(Op::IMul, size, *more);
        }
        let first = code.word(Op::IMul, linear, size);
        Ok(code.word(Op::IAdd, first, local))
    }
}
