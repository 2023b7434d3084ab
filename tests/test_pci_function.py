"""vmm/pci/function.py: configuration space as the specification and pciutils see it."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from vmm.devices.device import Device
from vmm.errors import ShapeError
from vmm.pci import spec
from vmm.pci.function import PciFunction

MASTER_AND_MEMORY = spec.COMMAND_MASTER | spec.COMMAND_MEMORY


@pytest.fixture
def function() -> PciFunction:
    made = PciFunction("f", 0x1234, 0x5678, 0x010802, revision=3, subsystem=(0xABCD, 0xEF01))
    made.add_bar(0, 100, Device("small"))
    made.add_bar(2, 1 << 20, Device("wide"), wide=True)
    made.add_express()
    made.add_capability(spec.CAP_VENDOR, bytes(range(2, 11)), b"\0\xff")
    return made


def dump(function: PciFunction, slot: int = 0) -> str:
    """As `lspci -xxxx` prints it, and `lspci -F` reads it."""
    rows = [
        f"{at:02x}: {function.config[at : at + 16].hex(' ')}"
        for at in range(0, len(function.config), 16)
    ]
    return "\n".join([f"00:{slot:02x}.0 x", *rows, "", ""])


def lspci(tmp_path: Path, *functions: PciFunction) -> str:
    path = tmp_path / "lspci.txt"
    path.write_text("".join(dump(function, slot) for slot, function in enumerate(functions)))
    done = subprocess.run(
        ["lspci", "-F", str(path), "-vvn"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_what_pciutils_reads(function: PciFunction, tmp_path: Path) -> None:
    function.write(spec.COMMAND, 2, 0xFFFF)
    function.place_bar(0, 0xC0000000)
    function.place_bar(2, 0x5_C0000000)
    said = lspci(tmp_path, function)
    for line in (
        "00:00.0 0108: 1234:5678 (rev 03) (prog-if 02 [NVM Express])",
        "Subsystem: abcd:ef01",
        "Control: I/O- Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- "
        "FastB2B- DisINTx+",
        "Status: Cap+ 66MHz-",
        "Region 0: Memory at c0000000 (32-bit, non-prefetchable)",
        "Region 2: Memory at 5c0000000 (64-bit, non-prefetchable)",
        "Capabilities: [40] Express (v2) Root Complex Integrated Endpoint",
        "ExtTag- RBE+ FLReset+",
        "Capabilities: [7c] Vendor Specific Information: Len=02",
    ):
        assert line in said
    assert "Interrupt: pin" not in said


@pytest.mark.parametrize(
    ("register", "size", "writable"),
    [
        (spec.VENDOR_ID, 4, 0), (spec.COMMAND, 2, 0x406), (spec.STATUS, 2, 0),
        (spec.REVISION_ID, 4, 0), (spec.CACHE_LINE_SIZE, 4, 0xFF), (spec.BAR0, 4, 0xFFFFF000),
        (spec.BAR0 + 4, 4, 0), (spec.BAR0 + 8, 4, 0xFFF00000), (spec.BAR0 + 12, 4, 0xFFFFFFFF),
        (spec.BAR0 + 16, 4, 0), (spec.SUBSYSTEM_VENDOR_ID, 4, 0), (0x30, 4, 0), (0x34, 4, 0),
        (spec.INTERRUPT_LINE, 4, 0xFF), (0x7C, 4, 0xFF000000), (0x100, 4, 0), (0xFFC, 4, 0),
    ],
)  # fmt: skip
def test_what_can_be_written(
    function: PciFunction, register: int, size: int, writable: int
) -> None:
    before = function.read(register, size)
    function.write(register, size, (1 << 8 * size) - 1)
    assert function.read(register, size) ^ before == writable & ~before
    function.write(register, size, 0)
    assert function.read(register, size) == before & ~writable
    for at in range(size):  # byte by byte too
        function.write(register + at, 1, 0xFF)
    assert function.read(register, size) == before | writable


def test_bars_are_sized_by_writing_ones(function: PciFunction) -> None:
    """PCI 3.0, section 6.2.5.1."""
    function.write(spec.BAR0, 4, 0xFFFFFFFF)
    assert (~function.read(spec.BAR0, 4) & 0xFFFFFFFF) + 1 == 4096  # a page, for one of 100 bytes
    function.write(spec.BAR0 + 8, 4, 0xFFFFFFFF)
    function.write(spec.BAR0 + 12, 4, 0xFFFFFFFF)
    low, high = function.read(spec.BAR0 + 8, 4), function.read(spec.BAR0 + 12, 4)
    assert low & 0xF == spec.BAR_64
    assert (1 << 64) - (high << 32 | low & ~0xF) == 1 << 20


def test_where_a_bar_is_wanted(function: PciFunction) -> None:
    bar = function.bars[2]
    function.place_bar(2, 0x7_00000000)
    assert function.wanted(bar) is None
    function.write(spec.COMMAND, 2, spec.COMMAND_MEMORY)
    assert function.wanted(bar) == 0x7_00000000


def test_capabilities_fill_no_more_than_there_is() -> None:
    made = PciFunction("f", 1, 2, 3)
    for _ in range(192 // 16):
        made.add_capability(spec.CAP_VENDOR, bytes(14))
    with pytest.raises(ValueError, match="no room for another capability"):
        made.add_capability(spec.CAP_VENDOR, bytes(1))


def test_function_level_reset(function: PciFunction) -> None:
    told: list[str] = []
    function.decode = lambda: told.append("decode")
    function.on_command = lambda: told.append("command")
    function.on_reset = lambda: told.append("reset")
    before = bytes(function.config)
    function.place_bar(0, 0xC0000000)
    function.write(spec.COMMAND, 2, MASTER_AND_MEMORY)
    function.write(spec.INTERRUPT_LINE, 1, 9)
    function.write(0x7F, 1, 0x55)
    told.clear()
    function.write(0x48, 2, spec.DEVCTL_FLR)
    assert told == ["decode", "command", "reset"]
    assert bytes(function.config) == before
    function.write(0x48, 2, 0x0820)  # other bits of the register do nothing but stay
    assert function.read(0x48, 2) == 0x0820
    assert len(told) == 3


def test_save_and_restore(function: PciFunction) -> None:
    function.write(spec.COMMAND, 2, MASTER_AND_MEMORY)
    function.write(spec.BAR0, 4, 0xC0001000)
    state = function.save()
    function.write(0x48, 2, spec.DEVCTL_FLR)
    told: list[str] = []
    function.decode = lambda: told.append("decode")
    function.restore(state)
    assert function.save() == state
    assert told == ["decode"]


def test_a_state_changes_no_constants(function: PciFunction) -> None:
    before = bytes(function.config)
    function.restore({"config": b"\xff" * 4096})
    assert function.read(spec.VENDOR_ID, 4) == 0x56781234
    function.write(0x48, 2, spec.DEVCTL_FLR)
    assert bytes(function.config) == before
    with pytest.raises(ValueError, match="state of f: 3 bytes of configuration space"):
        function.restore({"config": b"abc"})
    with pytest.raises(ShapeError):
        function.restore({"config": None})


def test_a_guest_that_writes_anything_anywhere(function: PciFunction) -> None:
    chance = random.Random(1)
    fixed = {at: function.config[at] for at in (0, 1, 2, 3, 6, 8, 9, 10, 11, 14, 0x34, 0x40, 0x41)}
    for _ in range(20000):
        size = chance.choice((1, 2, 4))
        register = chance.randrange(0x120 // size) * size
        function.write(register, size, chance.getrandbits(8 * size))
        assert 0 <= function.read(register, size) < 1 << 8 * size
        assert {at: function.config[at] for at in fixed} == fixed
