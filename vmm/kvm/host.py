"""The host without its KVM device: back end, processor, what it runs in."""

from __future__ import annotations

import os
import platform

VENDOR_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": ""}
"""KVM's vendor modules and the flag in /proc/cpuinfo each needs."""

BACKENDS = {
    "kvm_intel": "VT-x",
    "kvm_amd": "AMD-V",
    "kvm_pvm": "PVM, without hardware virtualization",
}
"""What a back end is, for people."""


class Host:
    """What /proc and /sys say.

    Attributes:
        backend: the vendor module that is there, "" if none is.
        nested: this host is a virtual machine itself.
        flag: the processor's virtualization flag, `vmx`, `svm` or "".
        container: what kind of container this process is in, "" if none is seen.
        kernel, processor: for the reader.
    """

    def __init__(self, sys_module: str = "/sys/module", cpuinfo: str = "/proc/cpuinfo") -> None:
        fields = _first_processor(cpuinfo)
        flags = fields.get("flags", "").split()
        self.kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
        self.processor = fields.get("model name", "unknown processor")
        self.vendor = fields.get("vendor_id", "")
        self.nested = "hypervisor" in flags
        self.flag = next((flag for flag in ("vmx", "svm") if flag in flags), "")
        self.backend = _backend(sys_module, self.flag)
        self.container = _container()

    @property
    def module(self) -> str:
        """The vendor module this processor takes, whether it is there or not."""
        if self.flag:
            return "kvm_intel" if self.flag == "vmx" else "kvm_amd"
        return "kvm_intel" if self.vendor == "GenuineIntel" else "kvm_amd"


def _backend(sys_module: str, flag: str) -> str:
    """A module built into the kernel has its directory even where it found no hardware, so that
    among several the loaded one counts, then the one the processor has the flag for."""
    there = [name for name in VENDOR_MODULES if os.path.isdir(f"{sys_module}/{name}")]

    def rank(name: str) -> tuple[bool, bool]:
        loaded = os.path.exists(f"{sys_module}/{name}/initstate")
        needs = VENDOR_MODULES[name]
        return loaded, needs in ("", flag)

    return max(there, key=rank, default="")


def _first_processor(path: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    try:
        with open(path, encoding="ascii", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        pass
    return fields


def _container() -> str:
    try:
        with open("/run/systemd/container", encoding="ascii") as kind:
            return kind.read().strip() or "container"
    except (OSError, UnicodeDecodeError):
        pass
    if os.path.exists("/.dockerenv"):
        return "docker"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else ""
