// One level of a breadth-first search: an invocation for each vertex. Those whose vertex
// has just been reached reach its neighbours. Plain pointers, all of them the program's.
#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(local_size_x = 256) in;

layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Offsets { uint64_t offset; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Edges { uint neighbour; };
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Levels { uint level; };
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Flag { uint set; };

layout(push_constant, scalar) uniform Parameters {
    // The neighbours of vertex v are edges[offsets[v]] to edges[offsets[v + 1] - 1].
    Offsets offsets;
    Edges edges;
    Levels levels;
    // Whether this level has reached anything.
    Flag reached;
    uint vertices;
    uint level;
};

const uint UNREACHED = 0xFFFFFFFFu;

void main() {
    uint vertex = gl_GlobalInvocationID.x;
    // Others may write this word meanwhile, but never `level` to it, nor over `level`.
    if (vertex >= vertices || levels[vertex].level != level) {
        return;
    }
    uint64_t end = offsets[vertex + 1].offset;
    bool any = false;
    for (uint64_t at = offsets[vertex].offset; at < end; ++at) {
        uint neighbour = (edges + at).neighbour;
        // An invocation that misses a page ends there and begins again from the top, with
        // all that it has written still written. That must come to the same, so this does
        // not ask "was it I who reached it?": what an invocation has reached the first
        // time counts as reached the second time too, and the flag is set at the end.
        uint found = atomicCompSwap(levels[neighbour].level, UNREACHED, level + 1);
        any = any || found == UNREACHED || found == level + 1;
    }
    if (any) {
        atomicOr(reached.set, 1u);
    }
}
