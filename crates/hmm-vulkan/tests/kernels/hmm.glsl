// The contract of docs/vulkan.md by hand: what the pass puts into kernels, for tests of
// the device that do not need the pass. One of CHECKED, STALL, TABLE is defined.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_atomic_int64 : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require

layout(constant_id = 9) const uint64_t CONTROL = 0ul;

layout(buffer_reference, std430, buffer_reference_align = 8) coherent volatile buffer Word {
    uint64_t value;
};
layout(buffer_reference, std430, buffer_reference_align = 4) coherent volatile buffer Half {
    uint value;
};
layout(buffer_reference, std430, buffer_reference_align = 8) coherent volatile buffer Control {
    uint stop;
    uint yielding;
    uint log_count;
    uint log_capacity;
    uint running;
    uint parked;
    uint unfinished;
    uint torn;
    uint64_t table;
    uint64_t log;
    uint64_t done;
    uint64_t delta;
    uint64_t mask;
    uint64_t base;
    uint base_group[3];
    uint log_served;
    uint groups[3];
    uint dispatched[3];
    uint stall_polls;
    uint end;
};

const uint READ = 0u;
const uint WRITE = 1u;

uint64_t hmm_leaf(uint64_t address) {
    uint64_t slot = (address >> 47) != 0ul ? 131072ul : address >> 30;
    return Word(Control(CONTROL).table + slot * 8ul).value;
}

bool hmm_lookup(uint64_t address, uint access, out uint64_t place) {
    uint64_t page = (address >> 12) & 0x3fffful;
    uint64_t entry = Word(hmm_leaf(address) + page * 8ul).value;
    uint64_t needed = access == WRITE ? 3ul : 1ul;
    place = (entry & ~0xffful) | (address & 0xffful);
    return (entry & needed) == needed;
}

void hmm_log(uint64_t address, uint access) {
    uint64_t bit = ((address >> 12) & 0x3fffful) * 2ul + uint64_t(access);
    uint mask = 1u << uint(bit & 31ul);
    Half wanted = Half(hmm_leaf(address) + 0x200000ul + (bit >> 5) * 4ul);
    if ((atomicOr(wanted.value, mask) & mask) == 0u) {
        uint index = atomicAdd(Control(CONTROL).log_count, 1u);
        uint capacity = Control(CONTROL).log_capacity;
        if (index - Control(CONTROL).log_served < capacity) {
            Word(Control(CONTROL).log + uint64_t(index & (capacity - 1u)) * 8ul).value =
                (address & ~1ul) | uint64_t(access);
        }
    }
}

#if defined(CHECKED)

// Whether this invocation has something to do in this dispatch.
bool hmm_begin(out uint64_t word, out uint mask) {
    Control control = Control(CONTROL);
    uvec3 group = gl_WorkGroupID
        - uvec3(control.base_group[0], control.base_group[1], control.base_group[2]);
    uint64_t number = (uint64_t(group.z) * control.dispatched[1] + group.y)
        * control.dispatched[0] + group.x;
    uint64_t size = gl_WorkGroupSize.x * gl_WorkGroupSize.y * gl_WorkGroupSize.z;
    uint64_t index = number * size + gl_LocalInvocationIndex;
    word = control.done + (index >> 5) * 4ul;
    mask = 1u << uint(index & 31ul);
    return (Half(word).value & mask) == 0u;
}

bool hmm_at(uint64_t address, uint access, out uint64_t place) {
    if (hmm_lookup(address, access, place)) {
        return true;
    }
    hmm_log(address, access);
    return false;
}

#elif defined(STALL)

bool hmm_at(uint64_t address, uint access, out uint64_t place) {
    Control control = Control(CONTROL);
    for (;;) {
        bool there = hmm_lookup(address, access, place);
        if (subgroupAll(there)) {
            return true;
        }
        if (subgroupElect()) {
            atomicAdd(control.parked, 1u);
        }
        bool settled = false;
        uint polls = 0u;
        do {
            there = hmm_lookup(address, access, place);
            if (!there) {
                hmm_log(address, access);
            }
            settled = there && control.yielding == 0u;
            polls += 1u;
            if (subgroupAny(polls > control.stall_polls || control.stop != 0u)) {
                if (subgroupElect()) {
                    atomicAdd(control.parked, 0xffffffffu);
                }
                return false;
            }
        } while (!subgroupAll(settled));
        if (subgroupElect()) {
            atomicAdd(control.parked, 0xffffffffu);
        }
        // Whoever unmaps meanwhile sees this subgroup run, or has set `yielding` before
        // it did; then the look-up above is made again behind the next park.
        while (subgroupAny(control.yielding != 0u)) {
            if (subgroupElect()) {
                atomicAdd(control.parked, 1u);
            }
            while (subgroupAny(control.yielding != 0u && control.stop == 0u)) {
            }
            if (subgroupElect()) {
                atomicAdd(control.parked, 0xffffffffu);
            }
            if (subgroupAny(control.stop != 0u)) {
                return false;
            }
        }
    }
}

#else

bool hmm_at(uint64_t address, uint access, out uint64_t place) {
    hmm_lookup(address, access, place);
    return true;
}

#endif
