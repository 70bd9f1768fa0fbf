// The device's side of `hmm demo` as a compute shader: walks one list for each
// invocation and changes its nodes. Plain pointers; see kernel.rs for the same in Rust.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_8bit_storage : require
#extension GL_EXT_shader_atomic_int64 : require

layout(local_size_x = 8) in;

layout(buffer_reference, scalar, buffer_reference_align = 1) buffer Bytes { uint8_t byte; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Words { uint64_t word; };

layout(push_constant, scalar) uniform Parameters {
    Words heads;
    uint64_t lists;
    uint64_t round;
    // Where the fields of a node are, in bytes.
    uint next, follower, text_at, text_len, positions_at, positions_len, digest, rounds, hits;
};

const uint64_t FACTOR = 0x9E3779B97F4A7C15ul;

uint64_t take(uint64_t digest, uint64_t word) {
    return ((digest << 5 | digest >> 59) ^ word) * FACTOR;
}

Words field(uint64_t node, uint offset) {
    return Words(node + offset);
}

void visit(uint64_t node) {
    Words kept = field(node, digest);
    uint64_t value = atomicAdd(kept.word, 0ul) ^ ((round + 1ul) * FACTOR);
    Bytes text = Bytes(field(node, text_at).word);
    uint64_t len = field(node, text_len).word;
    for (uint64_t at = 0ul; at < len; ++at) {
        value = take(value, uint64_t(text[uint(at)].byte));
    }
    Words positions = Words(field(node, positions_at).word);
    uint64_t count = field(node, positions_len).word;
    for (uint64_t at = 0ul; at < count; ++at) {
        value = take(value, positions[uint(at)].word);
    }
    atomicExchange(kept.word, (value ^ value >> 29) | 1ul);
    atomicOr(field(node, rounds).word, 1ul << round);
    atomicAdd(field(field(node, follower).word, hits).word, count);
}

void main() {
    if (gl_GlobalInvocationID.x >= lists) {
        return;
    }
    uint64_t node = heads[gl_GlobalInvocationID.x].word;
    while (node != 0ul) {
        visit(node);
        node = field(node, next).word;
    }
}
