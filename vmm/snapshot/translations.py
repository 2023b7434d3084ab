"""Having processors and KVM forget what they know of page tables, when memory goes back in place.

A guest's page tables are in the memory that goes back, and nobody tells a TLB. With nested paging
its entries outlive KVM_RUN: they are tagged (VPID, ASID), and KVM flushes them by itself only when
CR3 and the like change. With shadow paging KVM has tables of its own, made from the guest's, and
sees the guest's writes to those, not ours.
"""

from __future__ import annotations

from vmm.machine.failure import backend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine import Machine

CR0_PG = 1 << 31
_ADDRESS = 0x000FFFFFFFFFF000
"""Of a page, in CR3."""
_SWITCHES = {"kvm_intel": "ept", "kvm_amd": "npt"}


def shadowed() -> bool:
    """Whether KVM has no nested paging here."""
    module = backend()
    if module not in _SWITCHES:
        return module == "kvm_pvm"
    try:
        with open(f"/sys/module/{module}/parameters/{_SWITCHES[module]}") as file:
            return file.read().strip() in ("N", "0")
    except OSError:
        return False


def roots(machine: Machine) -> list[int]:
    """The GPAs of the pages that each vCPU's translations begin at.

    They are mapped for sure where a translation was made. So to unmap them has KVM flush all that
    the vCPUs know (the MMU notifier's KVM_REQ_TLB_FLUSH), and costs a fault of one page each; to
    write other values to CR3 first would have KVM drop its nested page tables.
    """
    found = []
    for vcpu in machine.vcpus:
        sregs = vcpu.get_sregs()
        if sregs.cr0 & CR0_PG:
            found.append(int(sregs.cr3) & _ADDRESS)
    return found


def remake_slots(machine: Machine) -> None:
    """Take the memory slots away and set them again: KVM drops every shadow page table."""
    regions = list(enumerate(machine.memory.regions))
    for slot, region in regions:
        machine.vm.set_user_memory_region(slot, region.gpa, 0, region.hva)
    for slot, region in regions:
        machine.vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
