# The nested lane's init, after /proc, /sys and /dev are mounted and modules inserted (busybox sh).
#
# Makes the host's root file system this machine's (read-only underneath: what is written here goes
# to memory and is gone with the machine), then runs what the host asks for on /dev/hvc0:
#
#     run SCRIPT TOKEN               SCRIPT's output goes to vport0p1, its input is /dev/null
#     terminal SCRIPT TOKEN ROWS COLUMNS    SCRIPT has a terminal that is hvc0's other end
#
# Each is answered, where its output went, by the byte 0x1e, TOKEN, a space, the exit status and a
# newline. SCRIPT is a file in the directory shared as /run/lane. vport0p1 is a plain port, no
# terminal: programs behave as they do when their output goes to a file.

die() {
    echo "lane: $*"
    poweroff -f
}

P9=trans=virtio,version=9p2000.L,msize=1048576
mkdir -p /lower /over /root-view /new
mount -t 9p -o $P9,cache=loose,ro root /lower || die "cannot mount the host's root"
mount -t tmpfs over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work root /new ||
    die "cannot lay a writable layer over the host's root"
mount --bind /new /root-view

mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 pts /new/dev/pts
ln -sf /proc/self/fd /new/dev/fd
ln -sf /proc/self/fd/0 /new/dev/stdin
ln -sf /proc/self/fd/1 /new/dev/stdout
ln -sf /proc/self/fd/2 /new/dev/stderr
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t tmpfs -o mode=1777 tmp /new/tmp
mount -t tmpfs -o mode=755 run /new/run

# Directories the work needs that those file systems now hide (a clone below /tmp, say).
for kept in $(sed -n 's/.*lane.keep=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' '); do
    mkdir -p "/new$kept" && mount --bind "/root-view$kept" "/new$kept"
done

mkdir -p /new/run/lane
# No caching here: both sides write, and each must see the other's files at once.
mount -t 9p -o $P9,cache=none lane /new/run/lane || die "cannot mount the lane's directory"

# Not a mere chroot: that may not make user namespaces, as passt does. From here on it is `.`
cd /new && mount --move . / || die "cannot make the host's root this machine's"

hostname vmm-nested
ip link set lo up
# Guests larger than this machine: they touch little of their memory.
echo 1 >/proc/sys/vm/overcommit_memory

# Opened first: the driver forgets its settings when the last opener closes.
exec 3<>/dev/hvc0
stty -F /dev/hvc0 raw -echo
exec 4>/dev/vport0p1
printf '\036ready 0\n' >&4
# While one VM is open, KVM's static keys stay as they are. Their patching (int3, then the rest)
# at each first and last VM sometimes hangs TCG's processors for good: all spin in exc_int3.
hold_vm() {
    chroot . perl -e 'sysopen(K, "/dev/kvm", 2) and ioctl(K, 0xAE01, 0) and sleep' 3>&- 4>&- &
}
# The host looks whether these are still written, one for each processor: where one of ours gets no
# more interrupts, nobody else can tell.
beat() {
    for cpu in $(seq 0 $(($(nproc) - 1))); do
        # Asleep between two signs of life, on that processor: its timer must wake it.
        chroot . taskset -c "$cpu" sh -c "while :; do echo >run/lane/beat$cpu; sleep 10; done" 3>&- 4>&- &
    done
}
while read -r kind script token rows columns <&3; do
    hold_vm
    beat
    if [ "$kind" = terminal ]; then
        stty -F /dev/hvc0 sane rows "$rows" columns "$columns"
        # script gives it a pseudo-terminal set like hvc0: the end of a session hangs its terminal up, which for hvc0
        # would throw away output and shut us out.
        chroot . script -qec "/bin/sh /run/lane/$script" /dev/null <&3 >&3 2>&3 3>&- 4>&-
        status=$?
        stty -F /dev/hvc0 raw -echo
        answer=3
    else
        setsid chroot . /bin/sh "/run/lane/$script" </dev/null >&4 2>&4 3>&- 4>&-
        status=$?
        answer=4
    fi
    kill -9 -1 2>/dev/null
    printf '\036%s %d\n' "$token" "$status" >&$answer
done
die "the host closed hvc0"
