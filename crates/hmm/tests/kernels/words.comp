#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_atomic_int64 : require

// What `tests/common/either.rs` has a device do to words. Each invocation does it to one
// word, and writes at most once, last: it may begin again.
layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Word { uint64_t it; };
layout(push_constant, scalar) uniform Work {
    uint64_t words;
    uint64_t other;
    uint64_t stride;
    uint64_t count;
    uint64_t value;
    uint64_t first;
    uint64_t wrap;
    uint64_t operation;
} work;

const uint LOAD = 0;
const uint STORE = 1;
const uint ADD = 2;
const uint MULTIPLY = 3;
const uint FILL = 4;
const uint SUM = 5;
const uint REPLACE = 6;

// As in `tests/common/mod.rs`.
uint64_t pattern(uint64_t seed, uint64_t index) {
    uint64_t x = seed ^ (index * 0x9e3779b97f4a7c15ul);
    x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ul;
    return x ^ (x >> 29);
}

void main() {
    uint64_t i = uint64_t(gl_GlobalInvocationID.x);
    if (i >= work.count) {
        return;
    }
    uint64_t k = i % work.wrap * work.stride;
    uint64_t index = work.first + k;
    Word word = Word(work.words + k * 8);
    Word other = Word(work.other);
    switch (uint(work.operation)) {
    case LOAD:
        Word(work.other + i * 8).it = word.it;
        break;
    case STORE:
        word.it = work.value + i;
        break;
    case ADD:
        atomicAdd(word.it, work.value);
        break;
    case MULTIPLY:
        word.it *= work.value;
        break;
    case FILL:
        word.it = pattern(work.value, index);
        break;
    case SUM:
        atomicAdd(other.it, word.it);
        break;
    case REPLACE: {
        // From the pattern with its page's seed (behind the first word of `other`) to
        // the one with the new seed; the first word tells of another one.
        uint64_t old = pattern(Word(work.other + 8 + i / 512 * 8).it, index);
        if (word.it != old) {
            atomicMax(other.it, index + 1);
        } else {
            word.it = pattern(work.value, index);
        }
        break;
    }
    }
}
