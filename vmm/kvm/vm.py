"""A VM descriptor: memory slots, interrupt controllers, events, vCPUs."""

from __future__ import annotations

import os

from vmm.forked import drop_in_child
from vmm.kvm import constants, ioctls
from vmm.kvm.ffi import address_of, ffi, new
from vmm.kvm.ioctls import ioctl, ioctl_struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    from vmm.kvm.system import Kvm
    from vmm.kvm.vcpu import Vcpu


class Vm:
    """One virtual machine in the kernel. Made by `Kvm.create_vm`; close it after its vCPUs.

    Every method is one ioctl, named after it (Documentation/virt/kvm/api.rst), and raises
    `KvmError` with the ioctl's name, the errno and a hint.
    """

    __slots__ = ("__weakref__", "fd", "kvm")

    def __init__(self, fd: int, kvm: Kvm) -> None:
        self.fd = fd
        self.kvm = kvm
        drop_in_child(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor. The VM is gone once its vCPUs and irqfds are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on the VM (some capabilities depend on it)."""
        return ioctl(self.fd, ioctls.CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        enable = new("kvm_enable_cap")
        enable.cap = cap
        enable.flags = flags
        for position, value in enumerate(args):
            enable.args[position] = value
        ioctl_struct(self.fd, ioctls.ENABLE_CAP, enable)

    def create_vcpu(self, number: int) -> Vcpu:
        """KVM_CREATE_VCPU; `number` is its APIC id."""
        from vmm.kvm.vcpu import Vcpu

        return Vcpu(ioctl(self.fd, ioctls.CREATE_VCPU, number), number, self)

    # --- memory ----------------------------------------------------------------------------------

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: map `size` bytes at `hva` to `gpa`; size 0 removes the slot.

        Flags: MEM_LOG_DIRTY_PAGES, MEM_READONLY (guest writes exit as MMIO).
        """
        region = new("kvm_userspace_memory_region")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size
        region.userspace_addr = hva
        ioctl_struct(self.fd, ioctls.SET_USER_MEMORY_REGION, region)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        *,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2): the same, with a guest_memfd."""
        region = new("kvm_userspace_memory_region2")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size
        region.userspace_addr = hva
        region.guest_memfd = guest_memfd
        region.guest_memfd_offset = guest_memfd_offset
        ioctl_struct(self.fd, ioctls.SET_USER_MEMORY_REGION2, region)

    def get_dirty_log(self, slot: int, pages: int) -> bytearray:
        """KVM_GET_DIRTY_LOG: one bit a page, bit 0 of byte 0 first; length a multiple of 8.

        Pages found dirty are write-protected and cleared again, unless manual protection is
        enabled (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): then `clear_dirty_log` does that.
        """
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = new("kvm_dirty_log")
        log.slot = slot
        log.dirty_bitmap = address_of(bitmap)
        ioctl_struct(self.fd, ioctls.GET_DIRTY_LOG, log)
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytearray) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear and re-protect the pages set in `bitmap`.

        `first_page` is a multiple of 64, and so is `pages` unless it reaches the slot's end.
        """
        if len(bitmap) * 8 < pages:
            raise ValueError(f"bitmap of {len(bitmap)} bytes is too short for {pages} pages")
        log = new("kvm_clear_dirty_log")
        log.slot = slot
        log.first_page = first_page
        log.num_pages = pages
        log.dirty_bitmap = address_of(bitmap)
        ioctl_struct(self.fd, ioctls.CLEAR_DIRTY_LOG, log)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages under 4 GiB that Intel hosts need for real mode."""
        ioctl(self.fd, ioctls.SET_TSS_ADDR, ffi.cast("int", gpa).__int__())

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page, likewise; before the first vCPU."""
        ioctl_struct(self.fd, ioctls.SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", gpa))

    # --- interrupt controllers -------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and, for each later vCPU, a local APIC."""
        ioctl(self.fd, ioctls.CREATE_IRQCHIP)

    def get_irqchip(self, chip: int) -> Any:
        """KVM_GET_IRQCHIP: state of IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        state = new("kvm_irqchip")
        state.chip_id = chip
        ioctl_struct(self.fd, ioctls.GET_IRQCHIP, state)
        return state

    def set_irqchip(self, state: Any) -> None:
        """KVM_SET_IRQCHIP."""
        ioctl_struct(self.fd, ioctls.SET_IRQCHIP, state)

    def create_pit2(self, flags: int = constants.PIT_SPEAKER_DUMMY) -> None:
        """KVM_CREATE_PIT2: the i8254 in the kernel."""
        config = new("kvm_pit_config")
        config.flags = flags
        ioctl_struct(self.fd, ioctls.CREATE_PIT2, config)

    def get_pit2(self) -> Any:
        """KVM_GET_PIT2."""
        state = new("kvm_pit_state2")
        ioctl_struct(self.fd, ioctls.GET_PIT2, state)
        return state

    def set_pit2(self, state: Any) -> None:
        """KVM_SET_PIT2."""
        ioctl_struct(self.fd, ioctls.SET_PIT2, state)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: drive interrupt line `gsi` to 0 or 1."""
        state = new("kvm_irq_level")
        state.irq = gsi
        state.level = level
        ioctl_struct(self.fd, ioctls.IRQ_LINE, state)

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: deliver a message now; how many vCPUs took it (0: blocked)."""
        msi = new("kvm_msi")
        msi.address_lo = address & 0xFFFFFFFF
        msi.address_hi = address >> 32
        msi.data = data
        return ioctl_struct(self.fd, ioctls.SIGNAL_MSI, msi)

    def set_gsi_routing(self, routes: Sequence[tuple[int, int, int, int]]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table.

        A route is (gsi, IRQ_ROUTING_IRQCHIP, chip, pin) or (gsi, IRQ_ROUTING_MSI, address, data).
        """
        table = new("kvm_irq_routing", len(routes))
        table.nr = len(routes)
        for position, (gsi, kind, first, second) in enumerate(routes):
            entry = table.entries[position]
            entry.gsi = gsi
            entry.type = kind
            if kind == constants.IRQ_ROUTING_IRQCHIP:
                entry.u.irqchip.irqchip = first
                entry.u.irqchip.pin = second
            else:
                entry.u.msi.address_lo = first & 0xFFFFFFFF
                entry.u.msi.address_hi = first >> 32
                entry.u.msi.data = second
        ioctl_struct(self.fd, ioctls.SET_GSI_ROUTING, table)

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int = -1, deassign: bool = False) -> None:
        """KVM_IRQFD: a write to eventfd `fd` raises `gsi`.

        With `resample_fd` the line stays up until EOI, which that eventfd then tells.
        """
        irqfd = new("kvm_irqfd")
        irqfd.fd = fd
        irqfd.gsi = gsi
        if deassign:
            irqfd.flags = constants.IRQFD_FLAG_DEASSIGN
        elif resample_fd >= 0:
            irqfd.flags = constants.IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resample_fd
        ioctl_struct(self.fd, ioctls.IRQFD, irqfd)

    def ioeventfd(
        self,
        fd: int,
        addr: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD: a guest write to `addr` signals eventfd `fd` and does not exit.

        Args:
            length: 1, 2, 4 or 8 bytes; 0 for any (KVM_CAP_IOEVENTFD_ANY_LENGTH).
            datamatch: only writes of this value.
            pio: `addr` is a port, not a GPA.
            deassign: remove it; the other arguments as when it was made.
        """
        event = new("kvm_ioeventfd")
        event.fd = fd
        event.addr = addr
        event.len = length
        flags = constants.IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= constants.IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        if deassign:
            flags |= constants.IOEVENTFD_FLAG_DEASSIGN
        event.flags = flags
        ioctl_struct(self.fd, ioctls.IOEVENTFD, event)

    def coalesce(self, addr: int, size: int, *, pio: bool, register: bool = True) -> None:
        """KVM_(UN)REGISTER_COALESCED_MMIO: writes there wait in a ring until the next exit.

        With `pio` (KVM_CAP_COALESCED_PIO) `addr` is a port. See `Vcpu.coalesced_ring`.
        """
        zone = new("kvm_coalesced_mmio_zone")
        zone.addr = addr
        zone.size = size
        zone.pio = 1 if pio else 0
        call = ioctls.REGISTER_COALESCED_MMIO if register else ioctls.UNREGISTER_COALESCED_MMIO
        ioctl_struct(self.fd, call, zone)

    # --- clock and devices -----------------------------------------------------------------------

    def get_clock(self) -> Any:
        """KVM_GET_CLOCK: kvmclock in nanoseconds, with realtime and TSC where known."""
        data = new("kvm_clock_data")
        ioctl_struct(self.fd, ioctls.GET_CLOCK, data)
        return data

    def set_clock(self, data: Any) -> None:
        """KVM_SET_CLOCK."""
        ioctl_struct(self.fd, ioctls.SET_CLOCK, data)

    def create_device(self, kind: int, flags: int = 0) -> int:
        """KVM_CREATE_DEVICE: the descriptor of an in-kernel device."""
        device = new("kvm_create_device")
        device.type = kind
        device.flags = flags
        ioctl_struct(self.fd, ioctls.CREATE_DEVICE, device)
        return int(device.fd)
