// Adds up runs of numbers that lie together, one for each invocation.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Numbers { uint number; };

layout(push_constant, scalar) uniform Parameters {
    Numbers numbers;
    Numbers sums;
    uint runs;
    uint run_len;
};

void main() {
    uint run = gl_GlobalInvocationID.x;
    if (run >= runs) {
        return;
    }
    uint sum = 0;
    for (uint at = 0; at < run_len; ++at) {
        sum += numbers[run * run_len + at].number;
    }
    sums[run].number = sum;
}
