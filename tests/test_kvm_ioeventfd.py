"""KVM_IOEVENTFD: guest writes that signal an eventfd and do not exit, by port and by memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from tests.support.guests import MMIO, Guest, Io, Mmio
from vmm.errors import KvmError

pytestmark = pytest.mark.needs_kvm

PORT = 0x300
REGISTERS = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def count(event: int) -> int:
    """How often it was signalled since last asked."""
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def writes(pio: bool, *values: int, size: int = 2) -> str:
    """A guest that writes each value, and ends."""
    source = f"mov ${PORT}, %edx; mov ${MMIO}, %edi\n"
    for value in values:
        register = REGISTERS[size]
        source += f"mov ${value}, %eax;"
        source += f"out {register}, %dx\n" if pio else f"mov {register}, (%rdi)\n"
    return source + "done 9"


def seen(guest: Guest) -> list[int]:
    """The values of the writes that did exit, up to the guest's end."""
    values: list[int] = []
    while True:
        reason_is_io = guest.run() == 2
        access: Io | Mmio = guest.port_access() if reason_is_io else guest.memory_access()
        assert access.data is not None
        if isinstance(access, Io) and access.port != PORT:
            return values
        values.append(int.from_bytes(access.data, "little"))


@pytest.mark.parametrize("mode", ["long", "user"])
@pytest.mark.parametrize(
    ("pio", "size"),
    [(True, 1), (True, 2), (True, 4), (False, 1), (False, 2), (False, 4), (False, 8)],
)
def test_a_write_signals_and_does_not_exit(mode: str, pio: bool, size: int, event: int) -> None:
    with Guest(writes(pio, 1, 2, 3, size=size), mode) as guest:
        guest.vm.ioeventfd(event, PORT if pio else MMIO, size, pio=pio)
        assert seen(guest) == []
        assert count(event) == 3


@pytest.mark.parametrize("pio", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_length_zero_is_any_length(pio: bool, size: int, event: int) -> None:
    with Guest(writes(pio, 1, 2, size=size)) as guest:
        guest.vm.ioeventfd(event, PORT if pio else MMIO, 0, pio=pio)
        assert seen(guest) == []
        assert count(event) == 2


@pytest.mark.parametrize("pio", [True, False])
@pytest.mark.parametrize("mode", ["long", "user"])
def test_only_a_matching_value_signals(mode: str, pio: bool, event: int) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with Guest(writes(pio, 7, 8, 9, 7, 9), mode) as guest:
            addr = PORT if pio else MMIO
            guest.vm.ioeventfd(event, addr, 2, pio=pio, datamatch=7)
            guest.vm.ioeventfd(other, addr, 2, pio=pio, datamatch=9)
            assert seen(guest) == [8]
            assert (count(event), count(other)) == (2, 2)
    finally:
        os.close(other)


@pytest.mark.parametrize("pio", [True, False])
def test_zero_is_a_value_to_match(pio: bool, event: int) -> None:
    with Guest(writes(pio, 0, 1, 0)) as guest:
        guest.vm.ioeventfd(event, PORT if pio else MMIO, 2, pio=pio, datamatch=0)
        assert seen(guest) == [1]
        assert count(event) == 2


@pytest.mark.parametrize("pio", [True, False])
def test_another_length_or_address_exits(pio: bool, event: int) -> None:
    with Guest(writes(pio, 7, 8)) as guest:
        guest.vm.ioeventfd(event, PORT if pio else MMIO, 4, pio=pio)
        guest.vm.ioeventfd(event, (PORT if pio else MMIO) + 2, 2, pio=pio)
        assert seen(guest) == [7, 8]
        assert count(event) == 0


@pytest.mark.parametrize("pio", [True, False])
@pytest.mark.parametrize("datamatch", [None, 5])
def test_removed_it_exits_again(pio: bool, datamatch: int | None, event: int) -> None:
    with Guest(writes(pio, 5, 5)) as guest:
        addr = PORT if pio else MMIO
        guest.vm.ioeventfd(event, addr, 2, pio=pio, datamatch=datamatch)
        guest.vm.ioeventfd(event, addr, 2, pio=pio, datamatch=datamatch, deassign=True)
        assert seen(guest) == [5, 5]
        assert count(event) == 0
        with pytest.raises(KvmError) as caught:
            guest.vm.ioeventfd(event, addr, 2, pio=pio, datamatch=datamatch, deassign=True)
        assert caught.value.errno == errno.ENOENT


def test_reads_exit(event: int) -> None:
    with Guest(f"mov ${PORT}, %edx; in %dx, %ax; done 9") as guest:
        guest.vm.ioeventfd(event, PORT, 2, pio=True)
        assert guest.io() == Io(PORT, 2, None)
        assert count(event) == 0


def test_closing_the_eventfd_leaves_a_quiet_write() -> None:
    """KVM holds a reference to it: nothing exits, nothing breaks."""
    fd = os.eventfd(0)
    with Guest(writes(True, 1)) as guest:
        guest.vm.ioeventfd(fd, PORT, 2, pio=True)
        os.close(fd)
        assert seen(guest) == []


@pytest.mark.parametrize("pio", [True, False])
def test_the_same_address_twice_is_refused(pio: bool, event: int) -> None:
    with Guest("done") as guest:
        guest.vm.ioeventfd(event, PORT, 2, pio=pio)
        with pytest.raises(KvmError, match=r"KVM_IOEVENTFD: .*has an ioeventfd already") as caught:
            guest.vm.ioeventfd(event, PORT, 2, pio=pio)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("size", [3, 16])
def test_an_impossible_length_is_refused(size: int, event: int) -> None:
    with Guest("done") as guest, pytest.raises(KvmError, match=r"KVM_IOEVENTFD: .*EINVAL"):
        guest.vm.ioeventfd(event, PORT, size, pio=True)


def test_something_else_than_an_eventfd_is_refused() -> None:
    with Guest("done") as guest, pytest.raises(KvmError, match=r"KVM_IOEVENTFD: .*EINVAL"):
        guest.vm.ioeventfd(guest.kvm.fd, PORT, 2, pio=True)
