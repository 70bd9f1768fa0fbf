#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// A reduction in workgroup memory: has no checked variant.
layout(local_size_x = 64) in;
shared uint parts[64];
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(push_constant, scalar) uniform Args { Words data; Words sums; } args;
void main() {
    uint i = gl_LocalInvocationIndex;
    parts[i] = args.data.at[gl_GlobalInvocationID.x];
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (i < step) parts[i] += parts[i + step];
        barrier();
    }
    if (i == 0) args.sums.at[gl_WorkGroupID.x] = parts[0];
}
