"""What this host's KVM is, and which tests that makes possible."""

from __future__ import annotations

import os
from collections.abc import Set


def backend() -> str | None:
    """The KVM vendor module behind /dev/kvm ("kvm_amd"), None if /dev/kvm cannot be opened."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return None
    for name in ("kvm_intel", "kvm_amd", "kvm_pvm"):
        if os.path.isdir(f"/sys/module/{name}"):
            return name
    return "unknown"


def runs_linux() -> bool:
    """Whether stock Linux reaches user space in a guest of this host's KVM (PVM: no)."""
    return backend() in ("kvm_intel", "kvm_amd")


def emulated() -> bool:
    """Whether the host's processor is QEMU's TCG, whose AMD-V lacks some debugging features."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
        return "TCG" in cpuinfo.read()


def lane() -> str | None:
    """The lane this pytest is: "native", "nested", or None when a person runs it."""
    return os.environ.get("VMM_LANE") or None


def for_lane(lane: str | None, needs: Set[str]) -> bool:
    """Whether a test with these markers belongs to `lane`.

    The native lane takes what the host can run and leaves the rest to the nested one; the nested
    lane takes what needs a KVM at all (and runs the KVM layer on a second back end that way).
    """
    if lane == "native" and not runs_linux():
        return "needs_linux_kvm" not in needs and (
            "needs_kvm" not in needs or backend() is not None
        )
    if lane == "nested":
        if "one_lane" in needs and os.environ.get("VMM_NATIVE_KVM"):
            return False
        return bool(needs & {"needs_kvm", "needs_linux_kvm"}) and "native_only" not in needs
    return True


def unmet(needs: Set[str]) -> str | None:
    """Why a test with these markers cannot run here, None if it can."""
    here = backend()
    if needs - {"one_lane"} and here is None:
        return "no usable /dev/kvm"
    if "needs_linux_kvm" in needs and not runs_linux():
        return f"{here} cannot run stock Linux; `make test` runs this in the nested lane"
    if "native_only" in needs and here != "kvm_pvm":
        return f"for the PVM back end; this host has {here}"
    return None


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
