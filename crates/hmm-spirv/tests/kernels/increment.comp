#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Every invocation adds one to one element.
layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(push_constant, scalar) uniform Args { Words data; uint count; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i < args.count) {
        args.data.at[i] += 1;
    }
}
