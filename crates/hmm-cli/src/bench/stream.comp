// Adds up runs of numbers that lie together, one for each invocation, 16 bytes at a time:
// as two words, which a CPU that plays the device loads at half the price of four numbers.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Numbers { uint number; };
layout(buffer_reference, scalar, buffer_reference_align = 16) buffer Fours { u64vec2 pairs; };

layout(push_constant, scalar) uniform Parameters {
    Fours numbers;
    Numbers sums;
    uint runs;
    uint run_len;
};

void main() {
    uint run = gl_GlobalInvocationID.x;
    if (run >= runs) {
        return;
    }
    uvec2 sum = uvec2(0);
    uint fours = run_len / 4;
    for (uint at = 0; at < fours; ++at) {
        u64vec2 pairs = numbers[run * fours + at].pairs;
        sum += uvec2(pairs) + uvec2(pairs >> 32);
    }
    sums[run].number = sum.x + sum.y;
}
