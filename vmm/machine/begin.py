"""A VM's first half: what starts a grace period in KVM, and what does not depend on the rest."""

from __future__ import annotations

from vmm import layout
from vmm.errors import HostError, UsageError
from vmm.kvm import Kvm, constants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import MachineConfig
    from vmm.kvm import Vm


def begin(config: MachineConfig) -> tuple[Kvm, Vm]:
    """The open device and a new VM with its interrupt controllers, for the caller to close.

    Registering the controllers starts a grace period in KVM (8 ms at 250 Hz), which the first
    memory slot waits for. So this comes early, and slots late: meanwhile modules and the kernel are
    loaded, or other VMs are begun.
    """
    kvm = Kvm(config.device)
    try:
        limit = kvm.check_extension(constants.CAP_MAX_VCPUS)
        if config.cpus > limit:
            raise UsageError(f"--cpus {config.cpus} is more than this KVM allows ({limit})")
        if not kvm.check_extension(constants.CAP_IMMEDIATE_EXIT):
            raise HostError("this KVM lacks KVM_CAP_IMMEDIATE_EXIT; Linux 4.12 or later is needed")
        vm = kvm.create_vm()
        try:
            vm.set_tss_addr(layout.TSS)
            vm.set_identity_map_addr(layout.IDENTITY_MAP)
            vm.create_irqchip()
            if vm.check_extension(constants.CAP_EXIT_ON_EMULATION_FAILURE):
                vm.enable_cap(constants.CAP_EXIT_ON_EMULATION_FAILURE, 1)
        except BaseException:
            vm.close()
            raise
    except BaseException:
        kvm.close()
        raise
    return kvm, vm
