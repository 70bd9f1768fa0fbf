// Adds up runs of numbers that lie together, one for each invocation, 16 bytes at a time.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Numbers { uint number; };
layout(buffer_reference, scalar, buffer_reference_align = 16) buffer Fours { uvec4 four; };

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
    uvec4 sum = uvec4(0);
    uint fours = run_len / 4;
    for (uint at = 0; at < fours; ++at) {
        sum += numbers[run * fours + at].four;
    }
    sums[run].number = sum.x + sum.y + sum.z + sum.w;
}
