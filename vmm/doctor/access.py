"""Why the KVM device cannot be used, and the exact mend."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat

from vmm.kvm import DEV_KVM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.doctor.host import Host

CONTAINER_MEND = "start the container with --device /dev/kvm"


class Problem:
    """Something that is wrong, and what to do about it; one line each."""

    __slots__ = ("mend", "what")

    def __init__(self, what: str, mend: str) -> None:
        self.what = what
        self.mend = mend


def diagnose(path: str, host: Host, message: str) -> list[Problem]:
    """Problems with `path`, which could not be opened as a KVM device for the reason `message`."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        number, text = err.errno, err.strerror
    else:
        return [Problem(message, "name KVM's own device; it is /dev/kvm on every Linux")]
    if number == errno.ENOENT:
        return _missing(path, host)
    if number in (errno.EACCES, errno.EPERM):
        return [_denied(path, host)]
    if number in (errno.ENODEV, errno.ENXIO):
        return [
            Problem(f"{path} has no driver behind it", f"sudo modprobe {host.module}"),
            *_no_hardware(host),
        ]
    return [Problem(f"cannot open {path}: {text}", "see the kernel's log: sudo dmesg | grep kvm")]


def _missing(path: str, host: Host) -> list[Problem]:
    what = f"{path} does not exist"
    if path != DEV_KVM and os.path.exists(DEV_KVM):
        return [Problem(what, f"use {DEV_KVM}, which does")]
    number = _device_number()
    if number is not None and host.container:
        what += f" in this container ({host.container}), though its host has KVM"
        return [Problem(what, CONTAINER_MEND)]
    if number is not None:
        return [Problem(f"{what}, though KVM is loaded", f"sudo mknod {path} c {number}")]
    if host.flag:
        return [
            Problem(
                f"{what}: {host.module} is not loaded",
                f"sudo modprobe {host.module} "
                "(if it says unsupported or disabled: turn on VT-x/SVM in the firmware)",
            )
        ]
    return [Problem(what, f"see below; then sudo modprobe {host.module}"), *_no_hardware(host)]


def _no_hardware(host: Host) -> list[Problem]:
    """The processor shows no virtualization flag."""
    if host.flag:
        return []
    what = "the processor shows neither VT-x (vmx) nor AMD-V (svm) in /proc/cpuinfo"
    if host.nested:
        mend = (
            "this host is a virtual machine: turn on nested virtualization for it (QEMU: -cpu "
            "host; a cloud: an instance type that offers it, or bare metal)"
        )
    else:
        mend = "turn on 'Intel Virtualization Technology' or 'SVM mode' in the firmware (BIOS)"
    return [Problem(what, mend)]


def _denied(path: str, host: Host) -> Problem:
    user = _user_name(os.geteuid())
    try:
        status = os.stat(path)
    except OSError:
        directory = os.path.dirname(os.path.abspath(path))
        return Problem(
            f"{user} may not look into the directory of {path}", f"sudo chmod a+rx {directory}"
        )
    owner, group = _user_name(status.st_uid), _group_name(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    what = f"no permission on {path} for {user} (it is {owner}:{group}, mode {mode:04o})"
    if os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        # The mode allows it: a device cgroup or a security module does not.
        mend = CONTAINER_MEND if host.container else "its use is denied by a cgroup or LSM policy"
        return Problem(what, mend)
    if os.geteuid() == 0 or mode & 0o060 != 0o060 or status.st_gid == 0:
        mend = f"sudo setfacl -m u:{user}:rw {path} (until reboot), or give it to group kvm: "
        mend += f"sudo chgrp kvm {path} && sudo chmod 660 {path}, and sudo usermod -aG kvm {user}"
        return Problem(what, mend)
    if _is_member(user, group):
        return Problem(what, f"{user} is in group {group} already: log in again, or newgrp {group}")
    return Problem(what, f"sudo usermod -aG {group} {user}, then log in again")


def _is_member(user: str, group: str) -> bool:
    """Whether the group database has `user` in `group`, though this process may not yet."""
    try:
        entry = grp.getgrnam(group)
        return user in entry.gr_mem or pwd.getpwnam(user).pw_gid == entry.gr_gid
    except KeyError:
        return False


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _device_number() -> str | None:
    """Major and minor of KVM's misc device, where a driver is registered."""
    try:
        with open("/sys/class/misc/kvm/dev", encoding="ascii") as numbers:
            return numbers.read().strip().replace(":", " ")
    except OSError:
        return None
