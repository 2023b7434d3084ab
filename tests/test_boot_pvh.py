"""vmm.boot.pvh: hvm_start_info, read back (Xen's public/arch-x86/hvm/start_info.h)."""

from __future__ import annotations

import struct
from itertools import pairwise

from vmm import layout
from vmm.boot.e820 import memory_map
from vmm.boot.pvh import write_start_info
from vmm.layout import GIB, MIB
from vmm.memory import GuestMemory


def test_start_info_with_an_initrd() -> None:
    with GuestMemory(5 * GIB) as memory:
        gpa = write_start_info(memory, initrd=(0x7F000000, 12345), rsdp=0xE0000)
        info = struct.unpack("<IIIIQQQQII", memory.read(gpa, 56))
        magic, version, flags, modules, modlist, cmdline, rsdp, memmap, count, _ = info
        assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
        assert (cmdline, rsdp) == (layout.CMDLINE, 0xE0000)
        module = struct.unpack("<QQQQ", memory.read(modlist, 32))
        assert module == (0x7F000000, 12345, 0, 0)
        table = list(struct.iter_unpack("<QQII", memory.read(memmap, 24 * count)))
        assert table == [(*entry, 0) for entry in memory_map(memory)]
        places = sorted([(gpa, 56), (modlist, 32), (memmap, 24 * count)])
        for (start, size), (following, _) in pairwise(places):
            assert start + size <= following
        assert places[-1][0] + places[-1][1] <= layout.ZERO_PAGE


def test_start_info_with_nothing() -> None:
    with GuestMemory(16 * MIB) as memory:
        gpa = write_start_info(memory, initrd=(0, 0), rsdp=None)
        info = struct.unpack("<IIIIQQQQII", memory.read(gpa, 56))
    assert info[3:5] == (0, 0)
    assert info[6] == 0
