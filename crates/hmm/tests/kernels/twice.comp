#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

// Each invocation writes a word, and then another one, which may be missing: what it does
// twice comes to the same.
layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Word { uint64_t it; };
layout(push_constant, scalar) uniform Work {
    uint64_t first;
    uint64_t second;
    uint64_t count;
    uint64_t value;
} work;

void main() {
    uint64_t i = uint64_t(gl_GlobalInvocationID.x);
    if (i < work.count) {
        Word(work.first + i * 8).it = work.value + i;
        Word(work.second + i * 8).it = work.value - i;
    }
}
