"""KVM: one class a kind of descriptor (Documentation/virt/kvm/api.rst).

Kvm (/dev/kvm) makes a Vm, which makes Vcpus; each method is one ioctl.
"""

from __future__ import annotations

from vmm.kvm.cpuid import CpuidEntry
from vmm.kvm.system import DEV_KVM, Kvm
from vmm.kvm.vcpu import Vcpu
from vmm.kvm.vm import Vm

__all__ = ["DEV_KVM", "CpuidEntry", "Kvm", "Vcpu", "Vm"]
