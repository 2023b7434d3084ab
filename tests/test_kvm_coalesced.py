"""vmm/kvm/coalesced.py: guest writes that wait in the ring, by port and by memory."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator

import pytest

from tests.support.guests import MMIO, Guest, Io, Mmio
from vmm.errors import KvmError
from vmm.kvm import constants, ioctls
from vmm.kvm.coalesced import RING_MAX, CoalescedRing
from vmm.kvm.ffi import ffi, new

pytestmark = pytest.mark.needs_kvm

PORT = 0x300
Seen = list[tuple[int, bytes, bool]]


@contextlib.contextmanager
def ring_of(guest: Guest) -> Iterator[tuple[CoalescedRing, Seen]]:
    """The guest's ring, and what was taken from it."""
    seen: Seen = []
    ring = CoalescedRing(guest.vcpu, lambda *write: seen.append(write))
    try:
        yield ring, seen
    finally:
        ring.close()


def out_bytes(count: int, port: int = PORT) -> str:
    """Writes 0, 1, ... (modulo 256) to a port, and ends."""
    return f"""
        xor %ebx, %ebx
        mov ${port}, %edx
    1:  mov %bl, %al
        out %al, %dx
        inc %ebx
        cmp ${count}, %ebx
        jb 1b
        done 9
    """


@pytest.mark.parametrize("mode", ["long", "user"])
def test_bytes_to_a_port_wait_and_go_as_one(mode: str) -> None:
    with Guest(out_bytes(16), mode) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        assert guest.done() == 9
        assert seen == []
        ring.drain()
        assert seen == [(PORT, bytes(range(16)), True)]
        ring.drain()
        assert len(seen) == 1


@pytest.mark.parametrize("mode", ["long", "user"])
def test_memory_writes_of_each_size(mode: str) -> None:
    source = f"""
        mov ${MMIO}, %edi
        movabs $0x8877665544332211, %rax
        mov %al, (%rdi)
        mov %ax, 2(%rdi)
        mov %eax, 4(%rdi)
        mov %rax, 8(%rdi)
        done 9
    """
    data = bytes.fromhex("1122334455667788")
    with Guest(source, mode) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(MMIO, 16, pio=False)
        assert guest.done() == 9
        ring.drain()
        parts = [(0, 1), (2, 2), (4, 4), (8, 8)]
        assert seen == [(MMIO + offset, data[:size], False) for offset, size in parts]


def test_ports_and_memory_keep_their_order() -> None:
    source = f"""
        mov ${MMIO}, %edi; mov ${PORT}, %edx
        mov $1, %al; out %al, %dx
        mov $2, %al; out %al, %dx
        mov $3, %al; mov %al, (%rdi)
        mov $4, %al; out %al, %dx
        mov $5, %ax; out %ax, %dx
        done 9
    """
    with Guest(source) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 2, pio=True)
        guest.vm.coalesce(MMIO, 4, pio=False)
        assert guest.done() == 9
        ring.drain()
    assert seen == [
        (PORT, b"\x01\x02", True),
        (MMIO, b"\x03", False),
        (PORT, b"\x04", True),
        (PORT, b"\x05\0", True),
    ]


def test_the_same_number_as_port_and_as_address_are_two_things() -> None:
    source = (
        f"mov ${MMIO}, %edi; mov $1, %al; mov %al, (%rdi); mov ${PORT}, %edx; out %al, %dx; done"
    )
    with Guest(source) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=False)  # an address that nobody writes to
        guest.vm.coalesce(MMIO, 1, pio=True)  # and a port there is not
        assert guest.mmio() == Mmio(MMIO, 1, b"\x01")
        assert guest.io() == Io(PORT, 1, b"\x01")
        ring.drain()
        assert seen == []


def test_reads_exit_and_come_after_the_writes() -> None:
    source = f"mov ${PORT}, %edx; mov $7, %al; out %al, %dx; in %dx, %al; done 9"
    with Guest(source) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        assert guest.io() == Io(PORT, 1, None)
        ring.drain()
        assert seen == [(PORT, b"\x07", True)]


def test_a_full_ring_exits_instead() -> None:
    """One place stays free, as `first == last` is an empty ring.

    Linux 6.1 finds it full earlier, as its arithmetic overflows: (first - last - 1) % 170.
    """
    with Guest(out_bytes(RING_MAX + 10)) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        access = guest.io()
        assert access.port == PORT and access.data is not None
        full = access.data[0]
        assert full in (RING_MAX - 1, (1 << 32) % RING_MAX - 1)
        ring.drain()
        assert seen == [(PORT, bytes(range(full)), True)]


def test_nothing_is_lost_over_many_rounds() -> None:
    count = RING_MAX * 5 + 3
    written = b""
    with Guest(out_bytes(count)) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        while True:
            access = guest.io()
            ring.drain()
            written += b"".join(data for _, data, _ in seen)
            seen.clear()
            assert access.data is not None
            if access.port != PORT:
                break
            written += access.data
    assert written == bytes(n % 256 for n in range(count))


def test_another_thread_may_drain() -> None:
    with Guest(out_bytes(5)) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        assert guest.done() == 9
        thread = threading.Thread(target=ring.drain)
        thread.start()
        thread.join()
        assert seen == [(PORT, bytes(range(5)), True)]


def test_a_zone_that_was_removed_exits() -> None:
    source = f"mov ${PORT}, %edx; 1: mov $7, %al; out %al, %dx; in $0x80, %al; jmp 1b"
    with Guest(source) as guest, ring_of(guest) as (ring, seen):
        guest.vm.coalesce(PORT, 1, pio=True)
        assert guest.io() == Io(0x80, 1, None)
        guest.vm.coalesce(PORT, 1, pio=True, register=False)
        assert guest.io() == Io(PORT, 1, b"\x07")
        ring.drain()
        assert seen == [(PORT, b"\x07", True)]


def test_it_is_the_page_the_kernel_names() -> None:
    with Guest(out_bytes(3)) as guest:
        guest.vm.coalesce(PORT, 1, pio=True)
        guest.done()
        page = guest.vm.check_extension(constants.CAP_COALESCED_MMIO)
        ring = ffi.from_buffer(
            "struct kvm_coalesced_mmio_ring *", guest.vcpu.run_map[page * 4096 :]
        )
        assert (ring.first, ring.last) == (0, 3)
        entry = ring.coalesced_mmio[2]
        assert (entry.phys_addr, entry.len, entry.pio, entry.data[0]) == (PORT, 1, 1, 2)


def test_the_ring_holds_as_many_as_the_kernels() -> None:
    """KVM_COALESCED_MMIO_MAX of linux/kvm.h."""
    head = ffi.sizeof("struct kvm_coalesced_mmio_ring")
    assert (4096 - head) // ffi.sizeof("struct kvm_coalesced_mmio") == RING_MAX


def test_a_zone_that_is_neither_is_refused() -> None:
    zone = new("kvm_coalesced_mmio_zone")
    zone.addr, zone.size, zone.pio = PORT, 1, 2
    with Guest("done") as guest, pytest.raises(KvmError, match=r"KVM_REGISTER_COALE") as caught:
        ioctls.ioctl_struct(guest.vm.fd, ioctls.REGISTER_COALESCED_MMIO, zone)
    assert caught.value.errno == errno.EINVAL


def test_closed_it_lets_the_vcpu_be_unmapped() -> None:
    with Guest("done") as guest:
        ring = CoalescedRing(guest.vcpu, print)
        ring.close()
        guest.vcpu.close()
        assert guest.vcpu.run_map.closed
