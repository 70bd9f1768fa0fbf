#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Nested functions with accesses, early returns, loops and a switch.
layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(push_constant, scalar) uniform Args { Words data; Words results; uint count; } args;
uint get(Words words, uint i) {
    if (i >= args.count) return 7;
    return words.at[i];
}
uint row(Words words, uint i) {
    uint sum = 0;
    for (uint j = 0; j < 4; j++) {
        for (uint k = 0; k < 3; k++) {
            uint value = get(words, (i + j * 1021 + k * 4099) % (args.count + 3));
            if (value == 13) return sum;
            if (value % 11 == 0) break;
            if (value % 7 == 0) continue;
            sum += value;
        }
    }
    return sum;
}
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.count) return;
    uint result = 0;
    switch (get(args.data, i) % 5) {
    case 0: result = row(args.data, i); break;
    case 1: result = 1 + get(args.data, i * 3 % args.count);
    case 2: result += get(args.data, i * 5 % args.count); break;
    case 3: args.results.at[i] = 99; return;
    default: result = row(args.data, i + 1) + get(args.data, 0);
    }
    args.results.at[i] = result;
}
