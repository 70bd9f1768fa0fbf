#!/bin/sh
# Compiles the tests' kernels; needs Debian's glslang-tools and spirv-tools. What it
# makes is committed, so that the tests need neither.
set -eu
cd "$(dirname "$0")"
for variant in checked stall table; do
    upper=$(echo "$variant" | tr a-z A-Z)
    glslangValidator --target-env vulkan1.2 -Os -V -D"$upper" operations.comp -o "operations-$variant.spv"
    spirv-val --target-env vulkan1.2 "operations-$variant.spv"
done
