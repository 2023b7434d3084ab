"""What a host must have in common with the one a snapshot was made on."""

from __future__ import annotations

import os

from vmm.cpu import features, policy
from vmm.errors import SnapshotError
from vmm.kvm import constants
from vmm.kvm.cpuid import CpuidEntry
from vmm.machine.failure import backend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.kvm import Kvm

CPUINFO = "/proc/cpuinfo"
_FIELDS = {
    "vendor_id": "vendor",
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "model name": "name",
}
_MOVING = features.flags("osxsave ospke apic monitor")
"""Bits of CPUID that follow what the guest does."""
_SAME = ("kernel", "kvm", "vendor", "family", "model", "stepping")


def facts(cpuinfo: str = CPUINFO) -> dict[str, Any]:
    """This host: kernel, KVM's vendor module, and the first processor."""
    found: dict[str, Any] = {
        "machine": os.uname().machine,
        "kernel": os.uname().release,
        "kvm": backend(),
    }
    with open(cpuinfo, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, colon, value = line.partition(":")
            if not colon:
                break  # the second processor
            key = _FIELDS.get(name.strip())
            if key is not None:
                text = value.strip()
                found[key] = int(text) if text.isdecimal() else text
    return found


def guest_features(cpuid: Sequence[Sequence[int]]) -> list[str]:
    """Names of the features a vCPU's CPUID (as saved) gives its guest for good."""
    entries = [CpuidEntry(*entry) for entry in cpuid]
    table = {(entry.function, entry.index): entry for entry in entries}
    return features.names_in(features.read(table) & ~_MOVING)


def check(kvm: Kvm, made_on: dict[str, Any], names: Sequence[str], what: str) -> None:
    """Whether a guest made on the host `made_on`, with features `names`, goes on here.

    Raises:
        SnapshotError: `what` cannot; it says why.
    """
    here = facts()
    for key, text in (
        ("machine", "a {} host"),
        ("vendor", "a host with a processor of {}"),
        ("kvm", "KVM's back end {}"),
    ):
        if made_on.get(key) != here.get(key):
            raise SnapshotError(
                f"{what} was made on {text.format(made_on.get(key) or 'unknown')}, "
                f"and this is {text.format(here.get(key) or 'unknown')}"
            )
    if all(made_on.get(key) == here.get(key) for key in _SAME):
        return
    deadline = bool(kvm.check_extension(constants.CAP_TSC_DEADLINE_TIMER))
    able = policy.offered(kvm.supported_cpuid(), tsc_deadline=deadline)
    missing = [name for name in names if not able >> features.BITS.get(name, 1 << 12) & 1]
    if missing and here["kvm"] == "kvm_pvm":
        shown = _shown_by_pvm(kvm)
        missing = [name for name in missing if name not in shown]
    if missing:
        raise SnapshotError(
            f"{what}: its guest uses {' '.join(missing)}, which this host's KVM cannot give it; "
            "make it of a machine with a more modest --cpu, for example --cpu x86-64-v2"
        )


def _shown_by_pvm(kvm: Kvm) -> set[str]:
    """Features that guests of the PVM back end see on this host, whatever their CPUID table says:
    bits of the processor that neither KVM nor /proc/cpuinfo may count as usable (rdseed, which
    Linux turns off on processors with an erratum)."""
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(kvm.supported_cpuid())
        entries = vcpu.get_cpuid2()
    table = {(entry.function, entry.index): entry for entry in entries}
    return set(features.names_in(features.read(table)))
