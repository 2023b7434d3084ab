"""What a person can do about a KVM error, by ioctl and errno."""

from __future__ import annotations

import errno

_HINTS: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor may hold the processor's VT-x/AMD-V",
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is short of memory",
    ("KVM_CREATE_VCPU", errno.EINVAL): "more vCPUs than KVM_CAP_MAX_VCPUS; see `vmm doctor`",
    ("KVM_CREATE_VCPU", errno.EEXIST): "a vCPU of this number exists",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has an irqchip, or vCPUs, already",
    ("KVM_CREATE_IRQCHIP", errno.ENOTTY): "this KVM has no in-kernel irqchip; see `vmm doctor`",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the range overlaps another memory slot",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "sizes and addresses must be page-aligned",
    ("KVM_SET_CPUID2", errno.EINVAL): "a CPUID entry is not acceptable to this KVM",
    ("KVM_SET_CPUID2", errno.E2BIG): "too many CPUID entries",
    ("KVM_SET_TSC_KHZ", errno.EINVAL): "this host cannot scale the TSC; leave its frequency alone",
    ("KVM_RUN", errno.EFAULT): "the guest used an address whose host memory is not accessible",
    ("KVM_IRQFD", errno.EBUSY): "the eventfd is bound to a GSI already",
    ("KVM_IOEVENTFD", errno.EEXIST): "that address has an ioeventfd already",
}

_GENERAL: dict[int, str] = {
    errno.ENOTTY: "this KVM does not know the call; see `vmm doctor`",
    errno.ENOMEM: "the host is short of memory",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system is out of file descriptors: raise fs.file-max",
}


def hint_for(ioctl: str, number: int) -> str:
    """One clause of advice, or an empty string."""
    return _HINTS.get((ioctl, number)) or _GENERAL.get(number, "")
