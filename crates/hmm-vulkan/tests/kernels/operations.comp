#version 460
#extension GL_GOOGLE_include_directive : require

// The operations of the conformance suite, and some to be slow with. All are right for
// repetition: what they write they have looked up before, and that comes last.
layout(local_size_x = 64) in;
// Behind the size, which would count as 1 in there.
#include "hmm.glsl"

layout(push_constant, std430) uniform Arguments {
    uint64_t operation;
    uint64_t from;
    uint64_t to;
    uint64_t count;
    uint64_t value;
};

const uint64_t FILL = 0ul;
const uint64_t INCREMENT = 1ul;
const uint64_t SUM = 2ul;
const uint64_t COPY = 3ul;
const uint64_t HISTOGRAM = 4ul;
const uint64_t CHASE = 5ul;
const uint64_t HAMMER = 6ul;
const uint64_t SPIN = 7ul;
const uint64_t SUM_STRIPE = 64ul;

// False when a page was missing.
bool run(uint64_t index) {
    uint64_t place;
    uint64_t source;
    if (operation == CHASE) {
        // One pointer each: `count` hops from the node number `index` of a table.
        if (index >= value) {
            return true;
        }
        if (!hmm_at(from + index * 8ul, READ, place)) return false;
        uint64_t node = Word(place).value;
        for (uint64_t hop = 0ul; hop < count; hop++) {
            if (!hmm_at(node, READ, place)) return false;
            node = Word(place).value;
        }
        if (!hmm_at(to + index * 8ul, WRITE, place)) return false;
        Word(place).value = node;
        return true;
    }
    if (operation == SPIN) {
        while (Control(CONTROL).stop == 0u) {
        }
        return true;
    }
    if (operation == SUM) {
        uint64_t first = index * SUM_STRIPE;
        if (first >= count) {
            return true;
        }
        uint64_t sum = 0ul;
        for (uint64_t word = first; word < min(first + SUM_STRIPE, count); word++) {
            if (!hmm_at(from + word * 8ul, READ, place)) return false;
            sum += Word(place).value;
        }
        if (!hmm_at(to, WRITE, place)) return false;
        atomicAdd(Word(place).value, sum);
        return true;
    }
    if (index >= count) {
        return true;
    }
    if (operation == FILL) {
        if (!hmm_at(to + index * 8ul, WRITE, place)) return false;
        Word(place).value = value + index;
    } else if (operation == INCREMENT) {
        if (!hmm_at(to + index * 8ul, WRITE, place)) return false;
        Word(place).value = Word(place).value + 1ul;
    } else if (operation == COPY) {
        if (!hmm_at(from + index * 8ul, READ, source)) return false;
        uint64_t word = Word(source).value;
        if (!hmm_at(to + index * 8ul, WRITE, place)) return false;
        Word(place).value = word;
    } else if (operation == HISTOGRAM) {
        if (!hmm_at(from + index * 8ul, READ, source)) return false;
        uint64_t bin = Word(source).value % value;
        if (!hmm_at(to + bin * 8ul, WRITE, place)) return false;
        atomicAdd(Word(place).value, 1ul);
    } else if (operation == HAMMER) {
        // Writes to one page for a long time after one look.
        if (!hmm_at(to + (index & 511ul) * 8ul, WRITE, place)) return false;
        for (uint64_t time = 0ul; time < value; time++) {
            Word(place).value = time;
        }
    }
    return true;
}

void main() {
    uint64_t index = uint64_t(gl_GlobalInvocationID.x);
#if defined(CHECKED)
    uint64_t word;
    uint mask;
    if (!hmm_begin(word, mask)) {
        return;
    }
    if (run(index)) {
        atomicOr(Half(word).value, mask);
    } else {
        atomicAdd(Control(CONTROL).unfinished, 1u);
    }
#elif defined(STALL)
    if (subgroupElect()) {
        atomicAdd(Control(CONTROL).running, 1u);
    }
    bool done = run(index);
    if (!done) {
        atomicAdd(Control(CONTROL).unfinished, 1u);
    }
    if (subgroupElect()) {
        atomicAdd(Control(CONTROL).running, 0xffffffffu);
    }
#else
    run(index);
#endif
}
