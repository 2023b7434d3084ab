"""System calls that helper programs do without, as data: lists of calls that fail with EPERM.

A list of what is allowed would be stricter, and wrong with the next release of a program that is
not ours. These are the ways out: into other processes, the kernel, other files than those named.
"""

from __future__ import annotations

ALWAYS = (
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease",
    "pidfd_getfd", "kcmp", "kexec_load", "kexec_file_load", "bpf", "perf_event_open",
    "init_module", "finit_module", "delete_module", "create_module", "get_kernel_syms",
    "query_module", "add_key", "keyctl", "request_key", "swapon", "swapoff", "reboot", "acct",
    "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "iopl", "ioperm", "quotactl",
    "quotactl_fd", "syslog", "open_by_handle_at", "lookup_dcookie", "vhangup", "nfsservctl",
    "uselib", "_sysctl", "modify_ldt", "personality", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "userfaultfd", "fanotify_init", "move_pages", "migrate_pages", "ustat",
    "sysfs", "vserver",
)  # fmt: skip
"""What no helper calls, or one that goes on without (io_uring, userfaultfd)."""

MOUNTS = (
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "setns", "unshare", "sethostname", "setdomainname",
    "mknod", "mknodat",
)  # fmt: skip
"""What only those call that sandbox themselves."""

METADATA = (
    "chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "setxattr",
    "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "utime", "utimes",
    "futimesat", "utimensat", "truncate",
)  # fmt: skip
"""What changes files by name that Landlock lets anybody change: owners, modes, attributes, times;
before its ABI 3 their lengths."""

PROCESSES = (
    "sched_setscheduler", "sched_setparam", "sched_setattr", "sched_setaffinity", "setpriority",
    "ioprio_set", "shmget", "shmat", "shmctl", "msgget", "msgsnd", "msgrcv", "msgctl", "semget",
    "semop", "semtimedop", "semctl", "mq_open", "mq_unlink",
)  # fmt: skip
"""What acts on processes of the same user, or on what is theirs."""

SOCKETS = ("socket", "connect", "bind")
"""New sockets; those that are given stay."""

SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")
"""Signals, where Landlock cannot keep them in (before ABI 6)."""

CLONE_NEW = 0x7E020000 | 0x80
"""Flags of clone(2) for namespaces: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID,
NEWNET, NEWTIME."""
