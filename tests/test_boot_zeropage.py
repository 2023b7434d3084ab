"""vmm.boot.zeropage: struct boot_params, field by field (Documentation/arch/x86/zero-page.rst)."""

from __future__ import annotations

import struct

import pytest

from tests.support.boot_files import bzimage
from vmm import layout
from vmm.boot.e820 import memory_map
from vmm.boot.zeropage import write_zero_page
from vmm.layout import GIB, MIB
from vmm.memory import GuestMemory


@pytest.mark.parametrize("with_header", [True, False])
def test_fields(with_header: bool) -> None:
    header = bzimage(cmdline_size=1234)[0x1F1:0x26C] if with_header else None
    with GuestMemory(5 * GIB) as memory:
        gpa = write_zero_page(memory, header=header, initrd=(0x7F000000, 12345), rsdp=0xE0000)
        assert gpa == layout.ZERO_PAGE
        page = memory.read(gpa, 4096)
        entries = memory_map(memory)
    assert struct.unpack_from("<Q", page, 0x070) == (0xE0000,)
    assert struct.unpack_from("<III", page, 0x0C0) == (0, 0, 0)  # ext_ramdisk, ext_cmd_line_ptr
    assert struct.unpack_from("<H", page, 0x1FE) == (0xAA55,)
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206) == (0x020F,)
    assert page[0x210] == 0xFF  # type_of_loader: undefined
    assert page[0x211] & 1  # LOADED_HIGH
    assert struct.unpack_from("<II", page, 0x218) == (0x7F000000, 12345)
    assert struct.unpack_from("<I", page, 0x228) == (layout.CMDLINE,)
    assert struct.unpack_from("<I", page, 0x238) == (1234 if with_header else 2047,)
    assert page[0x1E8] == len(entries)
    for number, entry in enumerate(entries):
        assert struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) == entry
    assert page[0x1EF] == 0  # sentinel: else the kernel clears what a loader has not set


def test_nothing_given() -> None:
    with GuestMemory(16 * MIB) as memory:
        page = memory.read(write_zero_page(memory, header=None, initrd=(0, 0), rsdp=None), 4096)
    assert struct.unpack_from("<Q", page, 0x070) == (0,)
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)


def test_an_initrd_above_4_gib_has_its_high_halves() -> None:
    with GuestMemory(16 * MIB) as memory:
        initrd = (0x1_2345_6000, 0x2_0000_1000)
        page = memory.read(write_zero_page(memory, header=None, initrd=initrd, rsdp=None), 4096)
    assert struct.unpack_from("<II", page, 0x218) == (0x23456000, 0x1000)
    assert struct.unpack_from("<II", page, 0x0C0) == (1, 2)
