"""/dev/kvm: what this KVM can do, and new VMs."""

from __future__ import annotations

import errno
import os

from vmm.errors import HostError
from vmm.kvm import constants, cpuid, ioctls
from vmm.kvm.ffi import new
from vmm.kvm.ioctls import ioctl, ioctl_struct
from vmm.kvm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.ioctls import Ioctl

DEV_KVM = "/dev/kvm"


class Kvm:
    """An open /dev/kvm.

    Args:
        path: the device, for tests and unusual hosts.

    Raises:
        HostError: it is missing, may not be opened, or speaks another API version; the message
            says what to do.

    >>> with Kvm() as kvm:  # doctest: +SKIP
    ...     kvm.api_version
    12
    """

    __slots__ = ("_caps", "fd", "path")

    def __init__(self, path: str = DEV_KVM) -> None:
        self.path = path
        self.fd = -1
        self._caps: dict[int, int] = {}
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            raise HostError(_cannot_open(path, err)) from None
        try:
            version = ioctl(self.fd, ioctls.GET_API_VERSION)
        except HostError:
            self.close()
            raise HostError(f"{path} is not a KVM device") from None
        if version != constants.API_VERSION:
            self.close()
            raise HostError(f"{path} has KVM API version {version}; this needs 12")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION; 12 since Linux 2.6.22."""
        return ioctl(self.fd, ioctls.GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if absent, else 1 or the capability's own number. Cached."""
        value = self._caps.get(cap)
        if value is None:
            value = self._caps[cap] = ioctl(self.fd, ioctls.CHECK_EXTENSION, cap)
        return value

    def vcpu_mmap_size(self) -> int:
        """Bytes of the mapping shared with a vCPU (struct kvm_run and its rings)."""
        return ioctl(self.fd, ioctls.GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM: a VM without memory, interrupt controllers or vCPUs."""
        while True:
            try:
                fd = ioctl(self.fd, ioctls.CREATE_VM, 0)
            except HostError as err:
                # A signal during creation is no failure (KVM registers an MMU notifier).
                if getattr(err, "errno", 0) == errno.EINTR:
                    continue
                raise
            return Vm(fd, self)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: every leaf KVM and this host can give a guest."""
        return self._cpuid(ioctls.GET_SUPPORTED_CPUID)

    def emulated_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_EMULATED_CPUID: features KVM emulates though the host lacks them."""
        return self._cpuid(ioctls.GET_EMULATED_CPUID)

    def _cpuid(self, call: Ioctl) -> list[CpuidEntry]:
        table = new("kvm_cpuid2", cpuid.MAX_ENTRIES)
        table.nent = cpuid.MAX_ENTRIES
        ioctl_struct(self.fd, call, table)
        return cpuid.from_struct(table)

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: MSRs that make up a vCPU's state."""
        return self._msr_list(ioctls.GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that describe features (VMX, microcode, ...)."""
        return self._msr_list(ioctls.GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, call: Ioctl) -> list[int]:
        table = new("kvm_msr_list", 1024)
        table.nmsrs = 1024
        ioctl_struct(self.fd, call, table)
        return [table.indices[i] for i in range(table.nmsrs)]

    def feature_msrs(self, indices: list[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system: values of feature MSRs, those that can be read."""
        from vmm.kvm.vcpu import read_msrs

        return read_msrs(self.fd, indices)


def _cannot_open(path: str, err: OSError) -> str:
    """One line: what `vmm doctor` says is wrong first, and its mend."""
    from vmm.kvm.access import diagnose
    from vmm.kvm.host import Host

    problem = diagnose(path, Host(), f"cannot open {path}: {err.strerror}")[0]
    return f"{problem.what}; {problem.mend} (`vmm doctor` tells more)"
