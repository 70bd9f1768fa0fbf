//! The variables and functions that instrumented code uses.

use rspirv::spirv::Op;

use crate::build::{Code, Fresh, Gen, halves};
use crate::contract::{Variant, control, table};
use crate::module::{Function, Inst};

/// Translations that a kernel keeps at a time. More pointers share.
const MAX_SLOTS: usize = 16;
/// Rounds of loops that an invocation does before it looks whether it is to stop.
const FUEL: u32 = 1 << 16;

/// See [`Runtime::end`].
pub(crate) const STOPPED: u32 = 1;
/// See [`Runtime::end`]. This bit of the address is not logged.
pub(crate) const MISSED: u32 = 2;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Read,
    Write,
}

impl Kind {
    pub(crate) const fn bit(self) -> u64 {
        match self {
            Self::Read => table::READABLE,
            Self::Write => table::WRITABLE,
        }
    }
}

/// The TLB entry for the pointers of one origin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) number: usize,
    /// They are followed from place to place, so that the entry is seldom right.
    pub(crate) chased: bool,
}

/// A register TLB entry: Private variables for one pointer.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Start of the page that may be read; odd = none.
    read: u32,
    /// Start of the page that may be written; odd = none.
    write: u32,
    /// Which bits of an address belong to the page's start.
    mask: u32,
    /// What to add to an address in the page.
    delta: u32,
}

/// What may be a group's entry.
#[derive(Clone, Copy, Debug)]
struct Group {
    entry: u32,
    /// Its low word.
    tag: u32,
    /// The tag of the group that was looked for, if it may be read.
    wanted: u32,
}

impl Group {
    /// Whether it is the right one, and allows an access.
    fn allows(self, code: &mut Code<'_>, kind: Kind) -> u32 {
        #[allow(clippy::cast_possible_truncation, reason = "bit 15")]
        const WRITABLE: u32 = table::GROUP_WRITABLE as u32;
        // Exclusive or: bit 47 of an address that is nobody's is no right to write.
        let (mask, wanted) = match kind {
            Kind::Read => (WRITABLE - 1, self.wanted),
            Kind::Write => (
                2 * WRITABLE - 1,
                code.word_with(Op::BitwiseXor, self.wanted, WRITABLE),
            ),
        };
        let tag = code.word_with(Op::BitwiseAnd, self.tag, mask);
        code.test(Op::IEqual, &[tag, wanted])
    }

    /// Where an address in it lies.
    fn place(self, code: &mut Code<'_>, address: u32) -> u32 {
        let memory = code.long_with(Op::BitwiseAnd, self.entry, !0xffff);
        let offset = code.long_with(Op::BitwiseAnd, address, 0xffff);
        code.long(Op::BitwiseOr, memory, offset)
    }
}

/// The variables of a kernel's instrumentation.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) variant: Variant,
    /// The control block's address.
    pub(crate) control: u32,
    /// Control block values that are read once: by the offset there.
    uniform: Vec<(u64, u32)>,
    slots: Vec<Entry>,
    /// Where the access that is under way goes, where pointers are chased.
    place: Option<u32>,
    /// How the invocation has given up: 0 if it has not, [`STOPPED`], or the low word
    /// of the access that missed, as it is logged, with [`MISSED`] set. One word, and
    /// another one for the rest: a round of a loop costs something for each variable
    /// that is set on some way out of it.
    pub(crate) end: u32,
    /// The high word of the access that missed.
    pub(crate) end_high: u32,
    /// Whether it has written.
    pub(crate) wrote: u32,
    fuel: u32,
    stall_fns: Vec<(Kind, u32)>,
    way_fn: Option<u32>,
    /// Holds 0, which the driver does not know, where many returns must not nest.
    pub(crate) zero: Option<u32>,
    /// All variables, for the entry point's interface.
    pub(crate) variables: Vec<u32>,
    /// The functions that were needed.
    pub(crate) functions: Vec<Function>,
}

impl Runtime {
    /// `many`: the kernel has so many early returns that they must not nest.
    pub(crate) fn new(build: &mut Gen, variant: Variant, many: bool) -> Self {
        let ulong = build.ulong();
        let [low, high] = halves(0);
        let address = build.global(Op::SpecConstant, ulong, &[low, high]);
        let (long_0, no) = (build.long(0), build.flag(false));
        let (uint, bool) = (build.uint(), build.bool());
        let mut variables = Vec::new();
        let mut variable = |build: &mut Gen, ty, value| {
            let id = build.private(ty, value);
            variables.push(id);
            id
        };
        let fields: &[u64] = match variant {
            Variant::Delta => &[control::DELTA],
            Variant::Masked => &[control::MASK, control::BASE],
            Variant::Table | Variant::Checked | Variant::Stall => &[control::TABLE],
        };
        let uniform = fields
            .iter()
            .map(|&offset| (offset, variable(build, ulong, long_0)))
            .collect();
        let mut runtime = Self {
            variant,
            control: address,
            uniform,
            slots: Vec::new(),
            place: None,
            end: 0,
            end_high: 0,
            wrote: 0,
            fuel: 0,
            stall_fns: Vec::new(),
            way_fn: None,
            zero: None,
            variables: Vec::new(),
            functions: Vec::new(),
        };
        if variant.faults() {
            let (fuel, zero) = (build.word(FUEL), build.word(0));
            runtime.end = variable(build, uint, zero);
            runtime.end_high = variable(build, uint, zero);
            runtime.wrote = variable(build, bool, no);
            runtime.fuel = variable(build, uint, fuel);
        }
        if many && variant.faults() {
            let zero = build.word(0);
            runtime.zero = Some(variable(build, uint, zero));
        }
        runtime.variables = variables;
        runtime
    }

    /// Address of a field of the control block.
    pub(crate) fn field(&self, code: &mut Code<'_>, offset: u64) -> u32 {
        code.long_with(Op::IAdd, self.control, offset)
    }

    /// Reads once what all accesses need.
    pub(crate) fn prologue(&self, code: &mut Code<'_>) {
        for &(offset, variable) in &self.uniform {
            let address = self.field(code, offset);
            let value = code.read_long(address, Fresh::No);
            code.set(variable, value);
        }
        if let Some(variable) = self.zero {
            let address = self.field(code, control::ZERO);
            let value = code.read_word(address, Fresh::No);
            code.set(variable, value);
        }
    }

    fn uniform(&self, code: &mut Code<'_>, offset: u64) -> u32 {
        let ulong = code.build.ulong();
        let found = self.uniform.iter().find(|(field, _)| *field == offset);
        let (_, variable) = found.expect("a field of this variant");
        code.get(ulong, *variable)
    }

    /// The device address for an address, in a function that returns `result`.
    /// Where [`Variant::faults`], the function returns early on a miss. `burns`: it
    /// also does what [`Runtime::burn`] does; of checked kernels only.
    pub(crate) fn translate(
        &mut self,
        code: &mut Code<'_>,
        address: u32,
        kind: Kind,
        slot: Slot,
        burns: bool,
        result: u32,
    ) -> u32 {
        match self.variant {
            Variant::Delta => {
                let delta = self.uniform(code, control::DELTA);
                code.long(Op::IAdd, address, delta)
            }
            Variant::Masked => {
                let mask = self.uniform(code, control::MASK);
                let base = self.uniform(code, control::BASE);
                let offset = code.long(Op::BitwiseAnd, address, mask);
                code.long(Op::IAdd, base, offset)
            }
            Variant::Table => {
                let entry = self.walk(code, address, Fresh::No);
                place(code, entry, address)
            }
            Variant::Checked if slot.chased => self.chased(code, address, kind, burns, result),
            Variant::Checked => self.checked(code, address, kind, slot.number, burns, result),
            Variant::Stall => {
                let ulong = code.build.ulong();
                let function = self.stall_fn(code.build, kind);
                let place = code.op(Op::FunctionCall, ulong, &[function, address]);
                self.leave_if_dead(code, result);
                place
            }
        }
    }

    /// Returns early, from a function that returns `result`, where the
    /// invocation has given up.
    pub(crate) fn leave_if_dead(&self, code: &mut Code<'_>, result: u32) {
        let dead = self.is_dead(code);
        code.rarely(dead, |code| match self.zero {
            None => leave(code, result),
            // A driver moves what follows a plain break into an else. What it
            // must read first it cannot make a part of one condition.
            Some(_) => {
                let zero = self.field(code, control::ZERO);
                let value = code.read_word(zero, Fresh::Yes);
                let none = code.build.word(0);
                let always = code.test(Op::IEqual, &[value, none]);
                code.rarely(always, |code| leave(code, result));
            }
        });
    }

    /// Whether the invocation has given up.
    pub(crate) fn is_dead(&self, code: &mut Code<'_>) -> u32 {
        let (uint, zero) = (code.build.uint(), code.build.word(0));
        let end = code.get(uint, self.end);
        code.test(Op::INotEqual, &[end, zero])
    }

    /// Notes that the invocation gives up for no miss.
    pub(crate) fn stop(&self, code: &mut Code<'_>) {
        let stopped = code.build.word(STOPPED);
        code.set(self.end, stopped);
    }

    /// Where the table's leaf for an address lies.
    pub(crate) fn leaf(&self, code: &mut Code<'_>, address: u32, fresh: Fresh) -> u32 {
        let root = self.uniform(code, control::TABLE);
        let uint = code.build.uint();
        // Half of the words are compared at half of the price.
        let high = code.long_with(Op::ShiftRightLogical, address, 32);
        let high = code.low_word(high);
        let last = code.build.word(1 << 15);
        let inside = code.test(Op::ULessThan, &[high, last]);
        let index = code.long_with(Op::ShiftRightLogical, address, u64::from(table::ROOT_SHIFT));
        let index = code.low_word(index);
        let beyond = code.build.word(1 << 17);
        let index = code.op(Op::Select, uint, &[inside, index, beyond]);
        let index = code.widen(index);
        let offset = code.long_with(Op::ShiftLeftLogical, index, 3);
        let at = code.long(Op::IAdd, root, offset);
        code.read_long(at, fresh)
    }

    /// The table's entry for an address.
    pub(crate) fn walk(&self, code: &mut Code<'_>, address: u32, fresh: Fresh) -> u32 {
        let leaf = self.leaf(code, address, fresh);
        self.entry(code, leaf, address, fresh)
    }

    fn entry(&self, code: &mut Code<'_>, leaf: u32, address: u32, fresh: Fresh) -> u32 {
        let shift = u64::from(table::PAGE_SHIFT) - 3;
        let offset = code.long_with(Op::ShiftRightLogical, address, shift);
        let offset = code.long_with(Op::BitwiseAnd, offset, (table::LEAF_ENTRIES - 1) << 3);
        let at = code.long(Op::IAdd, leaf, offset);
        code.read_long(at, fresh)
    }

    /// What the table has for the group that an address is in.
    fn group(&self, code: &mut Code<'_>, address: u32) -> Group {
        let ulong = code.build.ulong();
        let root = self.uniform(code, control::TABLE);
        let groups = code.long_with(Op::IAdd, root, table::GROUPS_AT);
        let shift = u64::from(table::GROUP_SHIFT) - 3;
        let offset = code.long_with(Op::ShiftRightLogical, address, shift);
        let offset = code.long_with(Op::BitwiseAnd, offset, (table::GROUPS - 1) << 3);
        let at = code.op(Op::IAdd, ulong, &[groups, offset]);
        let entry = code.read_long(at, Fresh::No);
        // Half of the words are compared at half of the price. Bit 32 of the address,
        // which is in the entry's place already, gives way to the right to read.
        let high = code.long_with(Op::ShiftRightLogical, address, 32);
        let high = code.low_word(high);
        debug_assert_eq!(table::GROUP_READABLE, 1);
        let wanted = code.word_with(Op::BitwiseOr, high, 1);
        let tag = code.low_word(entry);
        Group { entry, tag, wanted }
    }

    /// A function of one address that returns what `body` leaves.
    fn function(
        &mut self,
        build: &mut Gen,
        body: impl FnOnce(&mut Self, &mut Code<'_>, u32) -> u32,
    ) -> u32 {
        let ulong = build.ulong();
        let ty = build.shared(Op::TypeFunction, 0, &[ulong, ulong]);
        let [id, param, label] = [(); 3].map(|()| build.id());
        let mut code = Code::new(build, label);
        let value = body(self, &mut code, param);
        code.act(Op::ReturnValue, &[value]);
        self.functions.push(Function {
            def: Inst::new(Op::Function, ulong, id, [0, ty]),
            params: vec![Inst::new(Op::FunctionParameter, ulong, param, [])],
            blocks: code.finish(),
        });
        id
    }

    fn stall_fn(&mut self, build: &mut Gen, kind: Kind) -> u32 {
        if let Some((_, id)) = self.stall_fns.iter().find(|(it, _)| *it == kind) {
            return *id;
        }
        let id = self.function(build, |it, code, address| it.stalling(code, address, kind));
        self.stall_fns.push((kind, id));
        id
    }

    /// [`Runtime::make_way`] as a function: of an address like the others, for nothing.
    fn way_fn(&mut self, build: &mut Gen) -> u32 {
        if let Some(id) = self.way_fn {
            return id;
        }
        let id = self.function(build, |it, code, nothing| {
            it.make_way(code);
            nothing
        });
        self.way_fn = Some(id);
        id
    }

    fn place(&mut self, build: &mut Gen) -> u32 {
        if let Some(place) = self.place {
            return place;
        }
        let (ulong, zero) = (build.ulong(), build.long(0));
        let place = build.private(ulong, zero);
        self.variables.push(place);
        self.place = Some(place);
        place
    }

    fn slot(&mut self, build: &mut Gen, slot: usize) -> Entry {
        let (ulong, none, zero) = (build.ulong(), build.long(1), build.long(0));
        while self.slots.len() <= slot {
            let new = Entry {
                read: build.private(ulong, none),
                write: build.private(ulong, none),
                mask: build.private(ulong, zero),
                delta: build.private(ulong, zero),
            };
            self.variables
                .extend([new.read, new.write, new.mask, new.delta]);
            self.slots.push(new);
        }
        self.slots[slot]
    }

    /// Looks into the slot first; fills it, or gives up.
    ///
    /// All of the slow path, its return included, is inside of one condition: a
    /// flag that is looked at afterwards costs as much as the look into the slot. So
    /// does a condition of its own for a loop that may have to stop.
    fn checked(
        &mut self,
        code: &mut Code<'_>,
        address: u32,
        kind: Kind,
        slot: usize,
        burns: bool,
        result: u32,
    ) -> u32 {
        let (ulong, bool) = (code.build.ulong(), code.build.bool());
        let slot = self.slot(code.build, slot % MAX_SLOTS);
        let tag = match kind {
            Kind::Read => slot.read,
            Kind::Write => slot.write,
        };
        let mask = code.get(ulong, slot.mask);
        let tag = code.get(ulong, tag);
        let page = code.long(Op::BitwiseAnd, address, mask);
        let slow = code.test(Op::INotEqual, &[page, tag]);
        self.slow(code, slow, burns, result, |it, code| {
            let group = it.group(code, address);
            let page = it.walk(code, address, Fresh::No);
            let wide = group.allows(code, Kind::Read);
            let (small, large) = (code.build.long(!0xfff), code.build.long(!0xffff));
            let mask = code.op(Op::Select, ulong, &[wide, large, small]);
            let entry = code.op(Op::Select, ulong, &[wide, group.entry, page]);
            let memory = code.long(Op::BitwiseAnd, entry, mask);
            let start = code.long(Op::BitwiseAnd, address, mask);
            let none = code.build.long(1);
            for (tag, kind) in [(slot.read, Kind::Read), (slot.write, Kind::Write)] {
                // A page's entry does not speak for its neighbours: it may have become
                // writable since the group was looked at.
                let [group, page] = [group.allows(code, kind), code.has_bit(page, kind.bit())];
                let allowed = code.op(Op::Select, bool, &[wide, group, page]);
                let start = code.op(Op::Select, ulong, &[allowed, start, none]);
                code.set(tag, start);
            }
            code.set(slot.mask, mask);
            let delta = code.long(Op::ISub, memory, start);
            code.set(slot.delta, delta);
            it.refuse(code, page, address, kind, result);
        });
        let delta = code.get(ulong, slot.delta);
        code.long(Op::IAdd, address, delta)
    }

    /// Looks into the groups first, as they are few: 32 KiB of them for 256 MiB. Where
    /// pointers are followed from place to place a slot is seldom right, and a page's
    /// entry seldom in a cache.
    fn chased(
        &mut self,
        code: &mut Code<'_>,
        address: u32,
        kind: Kind,
        burns: bool,
        result: u32,
    ) -> u32 {
        let ulong = code.build.ulong();
        let variable = self.place(code.build);
        let group = self.group(code, address);
        let there = group.place(code, address);
        code.set(variable, there);
        let allowed = group.allows(code, kind);
        let slow = code.test(Op::LogicalNot, &[allowed]);
        self.slow(code, slow, burns, result, |it, code| {
            let entry = it.walk(code, address, Fresh::No);
            let there = place(code, entry, address);
            code.set(variable, there);
            it.refuse(code, entry, address, kind, result);
        });
        code.get(ulong, variable)
    }

    /// Does `then` where `slow` holds, and also what [`Runtime::burn`] does if it `burns`.
    fn slow(
        &self,
        code: &mut Code<'_>,
        slow: u32,
        burns: bool,
        result: u32,
        then: impl FnOnce(&Self, &mut Code<'_>),
    ) {
        let empty = burns.then(|| self.spend(code));
        let slow = match empty {
            Some(empty) => code.test(Op::LogicalOr, &[slow, empty]),
            None => slow,
        };
        code.rarely(slow, |code| {
            if let Some(empty) = empty {
                code.rarely(empty, |code| self.refuel(code, result));
            }
            then(self, code);
        });
    }

    /// Gives up, in a function that returns `result`, if an entry does not allow the access.
    fn refuse(&self, code: &mut Code<'_>, entry: u32, address: u32, kind: Kind, result: u32) {
        let allowed = code.has_bit(entry, kind.bit());
        let refused = code.test(Op::LogicalNot, &[allowed]);
        code.rarely(refused, |code| {
            let fault = logged(code, address, kind);
            let high = code.long_with(Op::ShiftRightLogical, fault, 32);
            let high = code.low_word(high);
            code.set(self.end_high, high);
            let low = code.low_word(fault);
            let low = code.word_with(Op::BitwiseOr, low, MISSED);
            code.set(self.end, low);
            leave(code, result);
        });
    }

    /// Once in many rounds of a loop: returns early, from a function that returns
    /// `result`, if the host wants it to stop. A stalled kernel parks if an unmap waits.
    pub(crate) fn burn(&mut self, code: &mut Code<'_>, result: u32) {
        let way = (self.variant == Variant::Stall).then(|| self.way_fn(code.build));
        let empty = self.spend(code);
        code.rarely(empty, |code| {
            self.refuel(code, result);
            if let Some(function) = way {
                let (ulong, nothing) = (code.build.ulong(), code.build.long(0));
                code.op(Op::FunctionCall, ulong, &[function, nothing]);
            }
        });
    }

    /// Counts a round; whether it is time to look.
    fn spend(&self, code: &mut Code<'_>) -> u32 {
        let (uint, zero) = (code.build.uint(), code.build.word(0));
        let left = code.get(uint, self.fuel);
        let left = code.word_with(Op::ISub, left, 1);
        code.set(self.fuel, left);
        code.test(Op::IEqual, &[left, zero])
    }

    /// Begins to count anew, or returns early.
    fn refuel(&self, code: &mut Code<'_>, result: u32) {
        let (full, zero) = (code.build.word(FUEL), code.build.word(0));
        code.set(self.fuel, full);
        let stop = self.field(code, control::STOP);
        let stop = code.read_word(stop, Fresh::Yes);
        let stopped = code.test(Op::INotEqual, &[stop, zero]);
        code.rarely(stopped, |code| {
            self.stop(code);
            leave(code, result);
        });
    }
}

/// Ends a function that returns `result` here.
fn leave(code: &mut Code<'_>, result: u32) {
    if result == code.build.void() {
        code.act(Op::Return, &[]);
    } else {
        let nothing = code.op(Op::Undef, result, &[]);
        code.act(Op::ReturnValue, &[nothing]);
    }
}

/// Where an address lies, by the table's entry for its page.
pub(crate) fn place(code: &mut Code<'_>, entry: u32, address: u32) -> u32 {
    let frame = code.long_with(Op::BitwiseAnd, entry, !0xfff);
    let offset = code.long_with(Op::BitwiseAnd, address, 0xfff);
    code.long(Op::BitwiseOr, frame, offset)
}

/// A fault as it is logged: the address with the access in bit 0.
pub(crate) fn logged(code: &mut Code<'_>, address: u32, kind: Kind) -> u32 {
    match kind {
        Kind::Read => code.long_with(Op::BitwiseAnd, address, !1),
        Kind::Write => code.long_with(Op::BitwiseOr, address, 1),
    }
}
