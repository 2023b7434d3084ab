"""What a confined monitor may ask of the kernel: lists of system calls, as data.

Each call has the tests that its arguments must pass (vmm.sandbox.seccomp). Not on the list, and so
refused with EPERM: to start a program or a process, to make a socket that reaches anybody, to make,
rename or remove a file, to trace, to mount, and whatever else a running machine never asks for.
DEADLY calls, which nobody makes by accident, end the process.

The monitor's list was made from what the tests of the command ask for on Linux 6.1 and 6.18 with
glibc 2.36, and read call by call; a few that newer C libraries make are in it besides.
"""

from __future__ import annotations

OWN_PID = 0x7FFFFFF1
"""Stands for the confined process's number, which is put in its place when the filter is loaded
(no process has this one: PID_MAX_LIMIT is 2^22)."""

BROKER_PID = 0x7FFFFFF2
"""The same for its broker."""

CLONE_THREAD = 0x10D00
"""CLONE_VM, CLONE_FILES, CLONE_SIGHAND and CLONE_THREAD, which make a thread of it."""
_PROT_EXEC, _WRITE_EXEC = 4, 6
_AF_UNIX, _SOL_SOCKET = 1, 1
_STREAM = (1, 1 | 0o2000000, 1 | 0o4000, 1 | 0o2004000)
"""SOCK_STREAM, with SOCK_CLOEXEC and SOCK_NONBLOCK or without."""

KVM_IOCTLS = {
    "KVM_RUN": 0xAE80,  # first: a busy guest makes most of it
    "KVM_IRQ_LINE": 0x4008AE61,
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_GET_EMULATED_CPUID": 0xC008AE09,
    "KVM_GET_MSR_FEATURE_INDEX_LIST": 0xC004AE0A,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_REGISTER_COALESCED_MMIO": 0x4010AE67,
    "KVM_UNREGISTER_COALESCED_MMIO": 0x4010AE68,
    "KVM_SET_GSI_ROUTING": 0x4008AE6A,
    "KVM_IRQFD": 0x4020AE76,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_TRANSLATE": 0xC018AE85,
    "KVM_INTERRUPT": 0x4004AE86,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_NMI": 0xAE9A,
    "KVM_SET_GUEST_DEBUG": 0x4048AE9B,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_SET_TSC_KHZ": 0xAEA2,
    "KVM_GET_TSC_KHZ": 0xAEA3,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SIGNAL_MSI": 0x4020AEA5,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_KVMCLOCK_CTRL": 0xAEAD,
    "KVM_GET_NESTED_STATE": 0xC080AEBE,
    "KVM_SET_NESTED_STATE": 0x4080AEBF,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_GET_SREGS2": 0x8140AECC,
    "KVM_SET_SREGS2": 0x4140AECD,
    "KVM_GET_XSAVE2": 0x9000AECF,
    "KVM_SET_DEVICE_ATTR": 0x4018AEE1,
    "KVM_GET_DEVICE_ATTR": 0x4018AEE2,
    "KVM_HAS_DEVICE_ATTR": 0x4018AEE3,
}
"""Of a machine that is built: no other machine, vCPU or device is made."""

OTHER_IOCTLS = {
    # Terminals, pipes, descriptors.
    "TCGETS": 0x5401,
    "TCSETS": 0x5402,
    "TCSETSW": 0x5403,
    "TCSETSF": 0x5404,
    "TCGETS2": 0x802C542A,  # of glibc from 2.42 on
    "TCSETS2": 0x402C542B,
    "TCSETSW2": 0x402C542C,
    "TCSETSF2": 0x402C542D,
    "TIOCGPGRP": 0x540F,
    "TIOCOUTQ": 0x5411,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
    # Disks.
    "BLKGETSIZE64": 0x80081272,
    "BLKSSZGET": 0x1268,
    "BLKDISCARD": 0x1277,
    "BLKZEROOUT": 0x127F,
    "FICLONE": 0x40049409,
    # Taps that are there; neither TUNSETIFF nor what makes one persistent.
    "TUNSETOFFLOAD": 0x400454D0,
    "TUNSETVNETHDRSZ": 0x400454D8,
    "TUNSETQUEUE": 0x400454D9,
    # vhost.
    "VHOST_GET_FEATURES": 0x8008AF00,
    "VHOST_SET_FEATURES": 0x4008AF00,
    "VHOST_SET_OWNER": 0xAF01,
    "VHOST_SET_MEM_TABLE": 0x4008AF03,
    "VHOST_SET_VRING_NUM": 0x4008AF10,
    "VHOST_SET_VRING_ADDR": 0x4028AF11,
    "VHOST_SET_VRING_BASE": 0x4008AF12,
    "VHOST_GET_VRING_BASE": 0xC008AF12,
    "VHOST_SET_VRING_KICK": 0x4008AF20,
    "VHOST_SET_VRING_CALL": 0x4008AF21,
    "VHOST_SET_VRING_ERR": 0x4008AF22,
    "VHOST_NET_SET_BACKEND": 0x4008AF30,
    "VHOST_VSOCK_SET_GUEST_CID": 0x4008AF60,
    "VHOST_VSOCK_SET_RUNNING": 0x4004AF61,
    # The page tables of a machine that may be rolled back; pages of one that is restored.
    "PAGEMAP_SCAN": 0xC0606610,
    "UFFDIO_COPY": 0xC028AA03,
    "UFFDIO_ZEROPAGE": 0xC020AA04,
    "UFFDIO_WAKE": 0x8010AA02,
}

_FCNTL = {
    "F_DUPFD": 0,
    "F_GETFD": 1,
    "F_SETFD": 2,
    "F_GETFL": 3,
    "F_SETFL": 4,
    "F_GETLK": 5,
    "F_SETLK": 6,
    "F_OFD_GETLK": 36,
    "F_OFD_SETLK": 37,
    "F_OFD_SETLKW": 38,
    "F_SETLEASE": 1024,
    "F_GETLEASE": 1025,
    "F_DUPFD_CLOEXEC": 1030,
    "F_SETPIPE_SZ": 1031,
    "F_GETPIPE_SZ": 1032,
    "F_ADD_SEALS": 1033,
    "F_GET_SEALS": 1034,
}
"""None that has signals sent (F_SETOWN and its kin)."""
LEASE_FCNTL = {"F_SETSIG": 10, "F_SETOWN_EX": 15}
"""Besides, where memory is mapped from a snapshot's files (vmm.snapshot.lease)."""

_PRCTL = {"PR_GET_NAME": 16, "PR_SET_NAME": 15, "PR_SET_VMA": 0x53564D41}

MONITOR: dict[str, tuple[tuple[int, str, tuple[int, ...]], ...]] = {
    "ioctl": ((1, "in", (*KVM_IOCTLS.values(), *OTHER_IOCTLS.values())),),
    # Descriptors that are open.
    **dict.fromkeys(
        (
            "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev",
            "preadv2", "pwritev2", "lseek", "close", "close_range", "dup", "dup2", "dup3",
            "fsync", "fdatasync", "sync_file_range", "ftruncate", "fallocate", "fadvise64",
            "copy_file_range", "sendfile", "flock", "getdents64",
            "poll", "ppoll", "select", "pselect6",
            "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "eventfd2", "pipe2",
            "timerfd_create", "timerfd_settime", "timerfd_gettime", "memfd_create",
            "accept4", "recvfrom", "recvmsg", "sendmsg", "shutdown", "getsockname", "getpeername",
            "getsockopt",
        ),
        (),
    ),
    "fcntl": ((1, "in", tuple(_FCNTL.values())),),
    "socketpair": ((0, "in", (_AF_UNIX,)), (1, "in", _STREAM)),
    "sendto": ((5, "in", (0,)),),  # to nobody but the other end
    "setsockopt": ((1, "in", (_SOL_SOCKET,)),),
    # Files: what Landlock has a rule for is opened, what there is can be looked at.
    **dict.fromkeys(
        (
            "open", "openat", "stat", "lstat", "fstat", "newfstatat", "statx", "statfs", "fstatfs",
            "access", "faccessat", "faccessat2", "readlink", "readlinkat", "getcwd",
        ),
        (),
    ),
    # Memory, none of it to be written and executed.
    **dict.fromkeys(
        (
            "munmap", "mremap", "madvise", "process_madvise", "brk", "mincore", "msync", "munlock",
            "membarrier", "mseal",
        ),
        (),
    ),
    "mmap": ((2, "not all", (_WRITE_EXEC,)),),
    "mprotect": ((2, "without", (_PROT_EXEC,)),),
    # Threads, of this process.
    **dict.fromkeys(
        (
            "futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "getcpu",
            "exit", "exit_group", "gettid", "restart_syscall",
            "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigpending",
            "sigaltstack", "alarm", "setitimer",
        ),
        (),
    ),
    "clone": ((0, "with", (CLONE_THREAD,)),),
    "tgkill": ((0, "in", (OWN_PID,)),),
    "kill": ((0, "in", (OWN_PID,)),),
    "pidfd_open": ((0, "in", (OWN_PID,)),),
    "prlimit64": ((0, "in", (0,)),),
    "prctl": ((0, "in", tuple(_PRCTL.values())),),
    # What there is to know.
    **dict.fromkeys(
        (
            "getpid", "getppid", "getpgrp", "getpgid", "getsid", "getuid", "geteuid", "getgid",
            "getegid", "getgroups", "wait4", "waitid", "uname", "sysinfo", "getrusage", "getrlimit",
            "times", "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep",
            "gettimeofday", "time", "getrandom", "umask",
        ),
        (),
    ),
}  # fmt: skip

ENOSYS = ("clone3", "openat2", "fchmodat2", "map_shadow_stack")
"""Fail as in a kernel that does not have them: the C library then asks in another way, whose
arguments a filter can see."""

DEADLY = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp",
    "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot",
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "add_key", "request_key", "keyctl",
    "mount", "umount2", "pivot_root", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount",
    "fspick", "mount_setattr", "setns", "unshare", "chroot", "swapon", "swapoff",
    "open_by_handle_at", "iopl", "ioperm", "modify_ldt", "acct", "syslog", "quotactl",
)  # fmt: skip
"""End the process at once (SIGSYS)."""

CONNECT: dict[str, tuple[tuple[int, str, tuple[int, ...]], ...]] = {
    "socket": ((0, "in", (_AF_UNIX,)), (1, "in", _STREAM)),
}
"""Besides, where a broker does the connecting."""

BROKERED = (
    "open", "openat", "connect", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "rmdir",
    "unlink", "unlinkat",
)  # fmt: skip
"""What a broker is asked first (vmm.sandbox.broker)."""
