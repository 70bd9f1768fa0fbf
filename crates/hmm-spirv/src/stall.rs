//! Logging a miss, and waiting for it.

use rspirv::spirv::Op;

use crate::build::{Code, Fresh};
use crate::contract::{control, table};
use crate::runtime::{Kind, Runtime, logged, place};

/// Polls of a stall after which a page is asked for again; a power of two.
const ASK_AGAIN: u32 = 1 << 10;

/// Whether an invocation need not stay parked.
struct Ready {
    served: u32,
    stopped: u32,
}

impl Runtime {
    /// Asks the table until no invocation of the subgroup misses.
    pub(crate) fn stalling(&self, code: &mut Code<'_>, address: u32, kind: Kind) -> u32 {
        let ulong = code.build.ulong();
        let entry = code.local(ulong);
        code.until(|code| {
            let found = self.walk(code, address, Fresh::Yes);
            code.set(entry, found);
            let valid = code.has_bit(found, kind.bit());
            let dead = self.is_dead(code);
            let settled = code.test(Op::LogicalOr, &[valid, dead]);
            let waits = code.test(Op::LogicalNot, &[settled]);
            code.rarely(waits, |code| self.park(code, address, kind));
            all(code, settled)
        });
        let entry = code.get(ulong, entry);
        place(code, entry, address)
    }

    /// Logs a miss and polls until the page is there and no unmap waits.
    fn park(&self, code: &mut Code<'_>, address: u32, kind: Kind) {
        let (uint, bool) = (code.build.uint(), code.build.bool());
        let (no, zero) = (code.build.flag(false), code.build.word(0));
        let fault = logged(code, address, kind);
        self.report(code, fault);
        let gave_up = code.local(bool);
        let polls = code.local(uint);
        let one = code.build.word(1);
        let bound = self.field(code, control::STALL_POLLS);
        let bound = code.read_word(bound, Fresh::No);
        code.set(gave_up, no);
        code.set(polls, zero);
        self.parked(code, |code, calm, stop| {
            let found = self.walk(code, address, Fresh::Yes);
            let valid = code.has_bit(found, kind.bit());
            let served = code.test(Op::LogicalAnd, &[valid, calm]);
            let count = code.get(uint, polls);
            let count = code.word(Op::IAdd, count, one);
            code.set(polls, count);
            // The page may have come and gone since it was asked for.
            let now_and_then = code.word_with(Op::BitwiseAnd, count, ASK_AGAIN - 1);
            let asks = code.test(Op::IEqual, &[now_and_then, zero]);
            let misses = code.test(Op::LogicalNot, &[valid]);
            let asks = code.test(Op::LogicalAnd, &[asks, misses]);
            code.rarely(asks, |code| self.report(code, fault));
            let over = code.test(Op::UGreaterThanEqual, &[count, bound]);
            let stopped = code.test(Op::LogicalOr, &[stop, over]);
            let before = code.get(bool, gave_up);
            let stopped = code.test(Op::LogicalOr, &[stopped, before]);
            // Who is served already must not give up with the others.
            let unserved = code.test(Op::LogicalNot, &[served]);
            let given_up = code.test(Op::LogicalAnd, &[stopped, unserved]);
            code.set(gave_up, given_up);
            Ready { served, stopped }
        });
        let gave_up = code.get(bool, gave_up);
        code.rarely(gave_up, |code| self.stop(code));
    }

    /// Parks while an unmap waits: in a long loop nothing may miss.
    pub(crate) fn make_way(&self, code: &mut Code<'_>) {
        let zero = code.build.word(0);
        let yields = self.field(code, control::YIELD);
        let waiting = code.read_word(yields, Fresh::Yes);
        let waits = code.test(Op::INotEqual, &[waiting, zero]);
        code.rarely(waits, |code| {
            self.parked(code, |_, calm, stop| Ready {
                served: calm,
                stopped: stop,
            });
        });
    }

    /// Counts the subgroup as parked until `ready` holds in all of it, and until no unmap
    /// waits or it has stopped. What `ready` gets: whether none waits, and whether the
    /// host wants it to stop.
    fn parked(&self, code: &mut Code<'_>, ready: impl FnOnce(&mut Code<'_>, u32, u32) -> Ready) {
        let bool = code.build.bool();
        let (no, zero) = (code.build.flag(false), code.build.word(0));
        let [one, minus_one] = [code.build.word(1), code.build.word(u32::MAX)];
        let leader = elect(code);
        let left = code.local(bool);
        let parked = self.field(code, control::PARKED);
        let yields = self.field(code, control::YIELD);
        let stop = self.field(code, control::STOP);
        code.set(left, no);
        code.rarely(leader, |code| {
            code.atomic(Op::AtomicIAdd, parked, one);
        });
        code.until(|code| {
            code.fence();
            let waiting = code.read_word(yields, Fresh::Yes);
            let calm = code.test(Op::IEqual, &[waiting, zero]);
            let stop = code.read_word(stop, Fresh::Yes);
            let stop = code.test(Op::INotEqual, &[stop, zero]);
            let Ready { served, stopped } = ready(code, calm, stop);
            let ready = code.test(Op::LogicalOr, &[served, stopped]);
            let ready = all(code, ready);
            code.set(left, ready);
            code.rarely(ready, |code| {
                code.rarely(leader, |code| {
                    code.atomic(Op::AtomicIAdd, parked, minus_one);
                });
                code.fence();
                let waiting = code.read_word(yields, Fresh::Yes);
                let calm = code.test(Op::IEqual, &[waiting, zero]);
                let leave = code.test(Op::LogicalOr, &[calm, stopped]);
                let leave = all(code, leave);
                code.set(left, leave);
                let back = code.test(Op::LogicalNot, &[leave]);
                code.rarely(back, |code| {
                    code.rarely(leader, |code| {
                        code.atomic(Op::AtomicIAdd, parked, one);
                    });
                });
            });
            code.get(bool, left)
        });
    }

    /// Writes a fault to the log, unless it is there.
    pub(crate) fn report(&self, code: &mut Code<'_>, fault: u32) {
        let one = code.build.word(1);
        let leaf = self.leaf(code, fault, Fresh::Yes);
        // Bit 2 * page + access of the leaf's wanted bits.
        let page = code.long_with(
            Op::ShiftRightLogical,
            fault,
            u64::from(table::PAGE_SHIFT) - 1,
        );
        let page = code.low_word(page);
        let page = code.word_with(Op::BitwiseAnd, page, 2 * leaf_entries() - 2);
        let access = code.low_word(fault);
        let access = code.word(Op::BitwiseAnd, access, one);
        let bit = code.word(Op::BitwiseOr, page, access);
        let word = code.word_with(Op::ShiftRightLogical, bit, 5);
        let word = code.widen(word);
        let offset = code.long_with(Op::ShiftLeftLogical, word, 2);
        let offset = code.long_with(Op::IAdd, offset, table::WANTED);
        let at = code.long(Op::IAdd, leaf, offset);
        let shift = code.word_with(Op::BitwiseAnd, bit, 31);
        let bit = code.word(Op::ShiftLeftLogical, one, shift);
        let before = code.atomic(Op::AtomicOr, at, bit);
        let zero = code.build.word(0);
        let before = code.word(Op::BitwiseAnd, before, bit);
        let first = code.test(Op::IEqual, &[before, zero]);
        code.rarely(first, |code| {
            let count = self.field(code, control::LOG_COUNT);
            let index = code.atomic(Op::AtomicIAdd, count, one);
            let capacity = self.field(code, control::LOG_CAPACITY);
            let capacity = code.read_word(capacity, Fresh::No);
            let served = self.field(code, control::LOG_SERVED);
            let served = code.read_word(served, Fresh::Yes);
            let waiting = code.word(Op::ISub, index, served);
            let fits = code.test(Op::ULessThan, &[waiting, capacity]);
            code.rarely(fits, |code| {
                let log = self.field(code, control::LOG);
                let log = code.read_long(log, Fresh::No);
                let last = code.word(Op::ISub, capacity, one);
                let index = code.word(Op::BitwiseAnd, index, last);
                let index = code.widen(index);
                let offset = code.long_with(Op::ShiftLeftLogical, index, 3);
                let at = code.long(Op::IAdd, log, offset);
                code.write_long(at, fault);
            });
        });
    }
}

const fn leaf_entries() -> u32 {
    1 << 18
}
const _: () = assert!(table::LEAF_ENTRIES == leaf_entries() as u64);

/// Whether something holds in every active invocation of the subgroup.
fn all(code: &mut Code<'_>, condition: u32) -> u32 {
    let subgroup = code.build.word(3);
    code.test(Op::GroupNonUniformAll, &[subgroup, condition])
}

/// Whether this is the invocation that acts for its subgroup.
pub(crate) fn elect(code: &mut Code<'_>) -> u32 {
    let subgroup = code.build.word(3);
    code.test(Op::GroupNonUniformElect, &[subgroup])
}
