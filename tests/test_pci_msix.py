"""vmm/pci/msix.py: what is sent, when, and what waits."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from vmm.pci import spec
from vmm.pci.function import PciFunction
from vmm.pci.msix import Msix

VECTORS = 5
CAPABILITY = 0x40
CONTROL = CAPABILITY + spec.MSIX_CONTROL
PBA = 0x800
ADDRESS = spec.MSI_ADDRESS | 1 << 12


class Rig:
    """A function with MSI-X alone.

    Attributes:
        connected: what KVM would be told, in order: (vector, address, data).
    """

    def __init__(self, vectors: int = VECTORS) -> None:
        self.function = PciFunction("f", 1, 2, 3)
        self.msix = Msix(self.function, 2, vectors)
        self.function.on_command = self.msix.update
        self.connected: list[tuple[int, int, int]] = []
        self.msix.connect = self._connect

    def _connect(self, vector: int, fd: int, address: int, data: int) -> None:
        assert fd == self.msix.fd(vector) >= 0
        self.connected.append((vector, address, data))

    def control(self, value: int, command: int = spec.COMMAND_MASTER) -> None:
        self.function.write(spec.COMMAND, 2, command)
        self.function.write(CONTROL, 2, value)

    def message(self, vector: int, data: int, mask: int = 0, address: int = ADDRESS) -> None:
        """In the order Linux writes it."""
        base = spec.MSIX_ENTRY * vector
        for offset, value in (
            (0, address & 0xFFFFFFFF), (4, address >> 32), (8, data), (12, mask),
        ):  # fmt: skip
            self.msix.write(base + offset, 4, value)

    def mask(self, vector: int, value: int) -> None:
        self.msix.write(spec.MSIX_ENTRY * vector + 12, 4, value)

    def sent(self) -> dict[int, int]:
        """How many messages of each vector since the last call."""
        found = {}
        for vector in range(self.msix.vectors):
            fd = self.msix.fd(vector)
            if fd >= 0:
                try:
                    found[vector] = os.eventfd_read(fd)
                except BlockingIOError:
                    continue
        return found

    def pending(self) -> int:
        return self.msix.read(PBA, 8)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.msix.close()


def test_the_capability(rig: Rig) -> None:
    config = rig.function.config
    assert config[CAPABILITY] == spec.CAP_MSIX
    assert rig.function.read(CONTROL, 2) == VECTORS - 1
    assert rig.function.read(CAPABILITY + 4, 4) == 2  # the table: BAR 2, offset 0
    assert rig.function.read(CAPABILITY + 8, 4) == PBA | 2
    rig.control(0xFFFF)
    assert rig.function.read(CONTROL, 2) == VECTORS - 1 | 0xC000
    assert rig.function.bars[2].size == 4096


@pytest.mark.parametrize(("vectors", "size"), [(1, 4096), (128, 4096), (129, 8192), (2048, 65536)])
def test_the_bar_has_room_for_all(vectors: int, size: int) -> None:
    rig = Rig(vectors)
    pba = rig.function.read(CAPABILITY + 8, 4) & ~7
    assert spec.MSIX_ENTRY * vectors <= pba
    assert pba + (vectors + 63) // 64 * 8 <= rig.function.bars[2].size == size
    last = spec.MSIX_ENTRY * (vectors - 1)
    rig.msix.write(last + 8, 4, 0x1234)
    assert rig.msix.read(last + 8, 4) == 0x1234
    rig.control(spec.MSIX_ENABLE)
    rig.msix.raise_vector(vectors - 1)
    assert rig.msix.read(pba + (vectors - 1) // 64 * 8, 8) == 1 << (vectors - 1) % 64
    rig.msix.close()


@pytest.mark.parametrize("vectors", [0, 2049])
def test_how_many_there_can_be(vectors: int) -> None:
    with pytest.raises(ValueError, match="not 1 to 2048"):
        Rig(vectors)


def test_all_are_masked_at_first(rig: Rig) -> None:
    for vector in range(VECTORS):
        assert rig.msix.read(spec.MSIX_ENTRY * vector + 12, 4) == 1
    rig.control(spec.MSIX_ENABLE)
    rig.msix.raise_vector(1)
    assert rig.sent() == {}
    assert rig.pending() == 1 << 1


def test_a_message_is_sent(rig: Rig) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.message(3, 0x51)
    assert rig.connected == [(3, ADDRESS, 0x51)]  # once, not at each of the four writes
    rig.msix.raise_vector(3)
    rig.msix.raise_vector(3)
    assert rig.sent() == {3: 2}
    assert rig.pending() == 0


def test_nothing_while_disabled(rig: Rig) -> None:
    rig.control(0)
    rig.message(3, 0x51)
    rig.msix.raise_vector(3)
    assert rig.connected == []
    rig.control(spec.MSIX_ENABLE)
    assert rig.connected == [(3, ADDRESS, 0x51)]
    assert rig.sent() == {}  # what was raised then is over


@pytest.mark.parametrize("how", ["vector", "function", "master"])
def test_masked_vectors_wait(rig: Rig, how: str) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.message(2, 0x44)

    def close(closed: bool) -> None:
        if how == "vector":
            rig.mask(2, int(closed))
        elif how == "function":
            rig.control(spec.MSIX_ENABLE | (spec.MSIX_FUNCTION_MASK if closed else 0))
        else:
            rig.control(spec.MSIX_ENABLE, 0 if closed else spec.COMMAND_MASTER)

    close(True)
    rig.msix.raise_vector(2)
    rig.msix.raise_vector(2)
    assert rig.sent() == {}
    assert rig.pending() == 1 << 2
    close(False)
    assert rig.sent() == {2: 1}
    assert rig.pending() == 0
    assert rig.connected == [(2, ADDRESS, 0x44)]


def test_a_new_message_while_masked(rig: Rig) -> None:
    """As Linux moves an interrupt to another processor."""
    rig.control(spec.MSIX_ENABLE)
    rig.message(1, 0x40)
    for number in range(4):
        rig.mask(1, 1)
        rig.msix.raise_vector(1)
        rig.message(1, 0x41 + number, mask=0, address=spec.MSI_ADDRESS | number << 12)
        assert rig.connected[-1] == (1, spec.MSI_ADDRESS | number << 12, 0x41 + number)
        assert rig.sent() == {1: 1}
    assert len(rig.connected) == 5


def test_disabling_forgets_what_waits(rig: Rig) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.msix.raise_vector(1)
    rig.control(0)
    assert rig.pending() == 0
    rig.message(1, 0x40)
    rig.control(spec.MSIX_ENABLE)
    assert rig.sent() == {}


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED00000, 0xFEF00000, 1 << 32 | ADDRESS])
def test_a_message_that_would_be_a_write_to_memory(rig: Rig, address: int) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.message(1, 0x40, address=address)
    rig.msix.raise_vector(1)
    assert rig.connected == []
    assert rig.sent() == {}


def test_vectors_that_are_not_there(rig: Rig) -> None:
    rig.control(spec.MSIX_ENABLE)
    for vector in (VECTORS, 0xFFFF):
        rig.msix.raise_vector(vector)
    assert rig.pending() == 0


@pytest.mark.parametrize("size", [1, 2])
def test_only_whole_words_are_written(rig: Rig, size: int) -> None:
    rig.msix.write(8, size, 0x12)
    rig.msix.write(10, 4, 0x12)
    assert rig.msix.read(8, 4) == 0
    rig.msix.write(8, 8, 0x00000000_00001234)
    assert rig.msix.read(8, 8) == 0x1234
    rig.msix.write(8, 8, (1 << 64) - 1)
    assert rig.msix.read(8, 8) == 1 << 32 | 0xFFFFFFFF  # of vector control, the mask is there


def test_pending_bits_are_read_only(rig: Rig) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.msix.raise_vector(4)
    rig.msix.write(PBA, 8, 0)
    rig.msix.write(PBA, 4, 0xFFFFFFFF)
    assert rig.pending() == 1 << 4
    assert rig.msix.read(PBA, 1) == 1 << 4


def test_save_and_restore(rig: Rig) -> None:
    rig.control(spec.MSIX_ENABLE)
    rig.message(1, 0x40)
    rig.message(2, 0x41, mask=1)
    rig.msix.raise_vector(2)
    again = Rig()
    again.function.restore(rig.function.save())
    again.msix.restore(rig.msix.save())
    assert again.connected == [(1, ADDRESS, 0x40)]
    assert again.pending() == 1 << 2
    again.mask(2, 0)
    assert again.sent() == {2: 1}
    with pytest.raises(ValueError, match="not 5 vectors"):
        again.msix.restore({"table": b"", "pending": 0})
    again.msix.close()


def test_anything_anywhere(rig: Rig) -> None:
    chance = random.Random(3)
    for _ in range(20000):
        what = chance.randrange(4)
        size = chance.choice((1, 2, 4, 4, 8))
        offset = chance.randrange(4096 - size) & ~(size - 1 if chance.random() < 0.8 else 0)
        if chance.random() < 0.7:
            offset %= spec.MSIX_ENTRY * VECTORS
        if what == 0:
            rig.msix.write(offset, size, chance.getrandbits(8 * size))
        elif what == 1:
            assert 0 <= rig.msix.read(offset, size) < 1 << 8 * size
        elif what == 2:
            rig.control(chance.getrandbits(16), chance.getrandbits(16))
        else:
            rig.msix.raise_vector(chance.randrange(VECTORS + 2))
    for vector, address, _ in rig.connected:
        assert vector < VECTORS
        assert address >> 20 == 0xFEE
    rig.control(spec.MSIX_ENABLE)
    rig.message(0, 0x40, mask=1)
    rig.message(0, 0x40)
    rig.sent()
    rig.msix.raise_vector(0)
    assert rig.sent() == {0: 1}
