"""What CPUID tells each vCPU.

`build` takes KVM_GET_SUPPORTED_CPUID's table through a policy (`policy`, `features`, `xsave`) and
adds the topology (`topology`):

    tables = build(system.supported_cpuid(), "host,-avx512f", cpus=4)
    for vcpu, table in zip(vcpus, tables):
        vcpu.set_cpuid(table)
"""

from __future__ import annotations

from vmm.cpu import policy as _policy
from vmm.cpu import topology as _topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.kvm.cpuid import CpuidEntry

__all__ = ["build", "host_brand"]


def build(
    supported: Iterable[CpuidEntry],
    policy: str = "host",
    cpus: int = 1,
    *,
    tsc_deadline: bool = True,
    brand: str = "",
) -> list[list[CpuidEntry]]:
    """A CPUID table for each of `cpus` vCPUs; table n is for APIC id n.

    `supported` is not changed. Tables share the entries that are the same for all: take them as
    read-only. `tsc_deadline`: KVM_CAP_TSC_DEADLINE_TIMER, with the in-kernel APIC. `brand`: the
    host processor's name (`host_brand`), for the policies that show the host's processor.

    UsageError: `policy` cannot be read, or not be had on this host (see `vmm.cpu.policy`).
    """
    resolved = _policy.resolve(supported, policy, tsc_deadline=tsc_deadline, brand=brand)
    base = _topology.apply(resolved, cpus)
    return [base, *(_topology.for_vcpu(base, vcpu) for vcpu in range(1, cpus))]


def host_brand() -> str:
    """The first "model name" of /proc/cpuinfo, or an empty string."""
    with open("/proc/cpuinfo", "rb", buffering=0) as cpuinfo:
        head = cpuinfo.read(4096)
    at = head.find(b"model name")
    if at < 0:
        return ""
    line = head[at : head.find(b"\n", at)]
    return line.partition(b":")[2].strip().decode("ascii", "replace")
