#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// A chain whose step is in the loop's continue construct, reached from two places.
layout(local_size_x = 64) in;
layout(buffer_reference) buffer Node;
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Node { Node next; uint64_t value; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Nodes { Node at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Longs { uint64_t at[]; };
layout(push_constant, scalar) uniform Args { Nodes heads; Longs sums; uint chains; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.chains) return;
    uint64_t sum = 0;
    for (Node node = args.heads.at[i]; uint64_t(node) != 0; node = node.next) {
        uint64_t value = node.value;
        if ((value & 1ul) != 0) continue;
        if (value == 6) { sum += 1; continue; }
        sum += value;
    }
    args.sums.at[i] = sum;
}
