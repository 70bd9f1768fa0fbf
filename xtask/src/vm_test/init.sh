#!/bin/busybox sh
# The guest's first and only program of its own. It makes the file systems, runs
# the tests of /plan one by one, and says what happens in lines that begin with
# @@: reader.rs reads them.

/bin/busybox mkdir -p /proc /sys /dev /tmp /var/tmp /dax/ext4 /dax/xfs
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib HOME=/tmp

# A line of its own, whatever has been printed before.
say() {
    printf '\n@@ %s\n' "$*"
}

# Says what does not work; the tests that need it will say so, too.
try() {
    "$@" >/tmp/said 2>&1 || say "broken $*: $(head -n 1 /tmp/said)"
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
say "booted $(uname -r)"

while read -r module; do
    try insmod "/modules/$module.ko"
done </modules/order

# Devices come a moment after their modules.
for device in /dev/pmem0 /dev/pmem1 /dev/vda; do
    for _ in $(seq 50); do
        [ -b "$device" ] && break
        sleep 0.2
    done
done

# Pages of an NVDIMM can be mapped once they have descriptions, which lie in the
# NVDIMM, too. This is what `ndctl create-namespace --mode=fsdax` does.
nd=/sys/bus/nd
settle() {
    echo namespace0.0 >$nd/drivers/nd_pmem/unbind &&
        echo 01234567-89ab-cdef-0123-456789abcdef >$nd/devices/pfn0.0/uuid &&
        echo pmem >$nd/devices/pfn0.0/mode &&
        echo 2097152 >$nd/devices/pfn0.0/align &&
        echo namespace0.0 >$nd/devices/pfn0.0/namespace &&
        echo pfn0.0 >$nd/drivers/nd_pmem/bind
}
try settle

# File blocks on multiples of 2 MiB, so that huge pages can be mapped.
try /tools/mke2fs -q -F -t ext4 -b 4096 -E stride=512,stripe_width=512 /dev/pmem0
try mount -t ext4 -o dax=always /dev/pmem0 /dax/ext4
# Sharing of blocks and DAX exclude each other before Linux 6.2.
try /tools/mkfs.xfs -q -f -m reflink=0 -l size=64m -d agcount=2,su=2m,sw=1 /dev/pmem1
try mount -t xfs -o dax=always /dev/pmem1 /dax/xfs
# A disk for I/O that passes by the page cache.
try /tools/mke2fs -q -F -t ext4 /dev/vda
try mount -t ext4 /dev/vda /var/tmp
echo 16 >/proc/sys/vm/nr_hugepages
# Where maps are read as text (before Linux 6.11), that of a test which takes all
# mappings that it may is to be read in seconds under emulation, too.
echo 16384 >/proc/sys/vm/max_map_count
try ifconfig lo 127.0.0.1 up

export HMM_DAX_DIRS=/dax/ext4:/dax/xfs HMM_STRESS_SECONDS=15 TMPDIR=/var/tmp
# The tests' own watchdogs reckon with a real machine; the time limit here is
# what ends a test that hangs.
export HMM_WATCHDOG_WAITS=1

say "show"
grep -E ' /(dax|var)' /proc/mounts
hmm info
say "shown"

while read -r seconds binary name; do
    say "begin $binary $name"
    timeout -s KILL "$seconds" "/tests/$binary" \
        --exact "$name" --nocapture --test-threads=1 </dev/null 2>&1
    say "end $?"
    # What a test has left behind; this shell is spared.
    kill -9 -1
done </plan

say "done"
poweroff -f
