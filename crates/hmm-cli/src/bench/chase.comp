// Follows pointers, a chain for each invocation, and says where it has come to.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(local_size_x = 64) in;

layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Words { uint64_t word; };

layout(push_constant, scalar) uniform Parameters {
    // The first node of each chain; a node begins with the address of the next one.
    Words heads;
    Words ends;
    uint chains;
    uint hops;
};

void main() {
    uint chain = gl_GlobalInvocationID.x;
    if (chain >= chains) {
        return;
    }
    uint64_t node = heads[chain].word;
    for (uint hop = 0; hop < hops; ++hop) {
        node = Words(node).word;
    }
    ends[chain].word = node;
}
