"""Why the KVM device cannot be used, and the exact mend. Loaded when that is so."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm.host import Host

DEV_KVM = "/dev/kvm"
GROUP = "kvm"
"""The group distributions give the device to."""
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
            Problem(f"{path} has no driver behind it", as_root(f"modprobe {host.module}")),
            *_no_hardware(host),
        ]
    return [
        Problem(
            f"cannot open {path}: {text}", f"see the kernel's log: {as_root('dmesg')} | grep kvm"
        )
    ]


def _missing(path: str, host: Host) -> list[Problem]:
    what = f"{path} does not exist"
    if path != DEV_KVM and os.path.exists(DEV_KVM):
        return [Problem(what, f"use {DEV_KVM}, which does")]
    number = _device_number()
    if number is not None and host.container:
        what += f" in this container ({host.container}), though its host has KVM"
        return [Problem(what, CONTAINER_MEND)]
    if number is not None:
        return [Problem(f"{what}, though KVM is loaded", as_root(f"mknod {path} c {number}"))]
    if host.flag:
        return [
            Problem(
                f"{what}: {host.module} is not loaded",
                f"{as_root(f'modprobe {host.module}')} "
                "(if it says unsupported or disabled: turn on VT-x/SVM in the firmware)",
            )
        ]
    return [
        Problem(what, f"see below; then {as_root(f'modprobe {host.module}')}"),
        *_no_hardware(host),
    ]


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
            f"{user} may not look into the directory of {path}", as_root(f"chmod a+rx {directory}")
        )
    owner, group = _user_name(status.st_uid), _group_name(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    what = f"no permission on {path} for {user} (it is {owner}:{group}, mode {mode:04o})"
    if os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        # The mode allows it: a device cgroup or a security module does not.
        mend = CONTAINER_MEND if host.container else "its use is denied by a cgroup or LSM policy"
        return Problem(what, mend)
    return Problem(what, permission_mend(path, GROUP))


def device_mend(path: str, module: str, number: int) -> str:
    """What to do where opening `path`, a device of the kernel's `module`, failed with errno."""
    if number in (errno.EACCES, errno.EPERM):
        return permission_mend(path)
    if number == errno.EBUSY:
        return "end the program that has it open"
    from vmm.kvm.host import Host

    mend = as_root(f"modprobe {module}")
    if Host().container:
        mend += f" on the host, and start the container with --device {path}"
    return mend


def permission_mend(path: str, give_to: str = "") -> str:
    """How this user gets to read and write the device `path`, which is there.

    `give_to` is the group it is to be given to, made where there is none, if its own is root's.
    """
    user = _user_name(os.geteuid())
    status = os.stat(path)
    group, mode = _group_name(status.st_gid), stat.S_IMODE(status.st_mode)
    if os.geteuid() != 0 and mode & 0o060 == 0o060 and status.st_gid != 0:
        if _is_member(user, group):
            return f"{user} is in group {group} already: log in again, or newgrp {group}"
        return f"{as_root(f'usermod -aG {group} {user}')}, then log in again"
    at_once = as_root(_at_once(path, user))
    if not give_to or os.geteuid() == 0:
        return f"{at_once} (until reboot)"
    commands = [f"chgrp {give_to} {path}", f"chmod 660 {path}", f"usermod -aG {give_to} {user}"]
    if not _is_group(give_to):
        commands.insert(0, f"groupadd -r {give_to}")
    name = os.path.basename(path)
    return (
        f"{at_once} (until reboot); or for good: {as_root(*commands)}, then log in again, with "
        f'KERNEL=="{name}", GROUP="{give_to}", MODE="0660" in /etc/udev/rules.d/65-{name}.rules'
    )


def _at_once(path: str, user: str) -> str:
    """The command that gives `path` to `user`: by an access list where there are tools for them."""
    from shutil import which

    return f"setfacl -m u:{user}:rw {path}" if which("setfacl") else f"chown {user} {path}"


def as_root(*commands: str) -> str:
    """Commands for root, one after the other, as this user is to type them."""
    from shutil import which

    if os.geteuid() == 0:
        return " && ".join(commands)
    if which("sudo"):
        return " && ".join(f"sudo {command}" for command in commands)
    return f"as root: {' && '.join(commands)}"


def _is_member(user: str, group: str) -> bool:
    """Whether the group database has `user` in `group`, though this process may not yet."""
    try:
        entry = grp.getgrnam(group)
        return user in entry.gr_mem or pwd.getpwnam(user).pw_gid == entry.gr_gid
    except KeyError:
        return False


def _is_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


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
