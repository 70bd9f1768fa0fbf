#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Never ends by itself, and has an access on a way round that it does not take.
layout(local_size_x = 64) in;
layout(constant_id = 3) const uint STEP = 2;
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(push_constant, scalar) uniform Args { Words data; } args;
void main() {
    uint i = 1;
    while (i != 0) {
        if (i % 7 == STEP + 10) i ^= args.data.at[i % 5];
        i = i * 3 * STEP | 1;
    }
    args.data.at[gl_GlobalInvocationID.x] = i;
}
