#!/bin/sh
# Compiles the tests' kernels; needs Debian's glslang-tools. What it makes is committed,
# so that the tests do not need it.
set -eu
cd "$(dirname "$0")"
spirv=../../../hmm-spirv/tests/kernels
for source in *.comp $spirv/barrier.comp $spirv/chase.comp $spirv/increment.comp \
    $spirv/runaway.comp $spirv/saxpy.comp $spirv/sum.comp $spirv/walk_write.comp; do
    made="$(basename "$source" .comp).spv"
    glslangValidator -V --quiet --target-env vulkan1.2 -o "$made" "$source"
done
