"""Guests that keep their monitor busy: each floods one device, or does nothing, as fast as it can.

A guest is an ELF kernel with a PVH note (benchmarks.guests.pvh_elf) in 32-bit code. It negotiates
with its device over virtio-mmio, then makes chains available and notifies for ever. The rings are
put into its memory before it starts; every entry of an avail ring names the same chain.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from benchmarks import guests
from vmm import Machine, MachineConfig
from vmm.layout import MIB, VIRTIO_MMIO_BASE
from vmm.virtio import blk, mmio, spec
from vmm.virtio.console import F_MULTIPORT
from vmm.virtio.vsock_packet import HEADER

MEMORY = 16 * MIB
SIZE = 32
"""Entries of a queue; all that are used are made available again before each notify."""
RINGS, DATA = 0x400000, 0x600000
_RING = 0x10000
SPIN = b"\xeb\xfe"  # 1: jmp 1b
WRITE = 2  # VIRTQ_DESC_F_WRITE


def _store(gpa: int, value: int) -> bytes:
    """mov dword [gpa], value"""
    return b"\xc7\x05" + struct.pack("<II", gpa, value & 0xFFFFFFFF)


def _refill(avail: int) -> bytes:
    """mov ax, [used index]; add ax, SIZE; mov [avail index], ax"""
    used = struct.pack("<I", avail + 0x1002)
    added = struct.pack("<H", SIZE)
    return b"\x66\xa1" + used + b"\x66\x05" + added + b"\x66\xa3" + struct.pack("<I", avail + 2)


def _for_ever(code: bytes) -> bytes:
    return code + b"\xe9" + struct.pack("<i", -len(code) - 5)  # jmp to the begin


class Flood:
    """Code for the only virtio device of a machine, and what is in memory when it starts.

    Args:
        queues: how many of the device's queues are enabled, from the first on.
        features: what is accepted of the device's own.

    Attributes:
        memory: (gpa, bytes) of what is there at the start.
        begin: code that resets the device, negotiates and enables the queues.
    """

    def __init__(self, queues: int, features: int = 0) -> None:
        self.memory: list[tuple[int, bytes]] = []
        registers = VIRTIO_MMIO_BASE
        features |= 1 << spec.F_VERSION_1
        code = b"".join(_store(registers + mmio.STATUS, value) for value in (0, 1, 3))
        for half in (0, 1):
            code += _store(registers + mmio.DRIVER_FEATURES_SEL, half)
            code += _store(registers + mmio.DRIVER_FEATURES, features >> 32 * half)
        code += _store(registers + mmio.STATUS, 11)
        for index in range(queues):
            code += _store(registers + mmio.QUEUE_SEL, index)
            code += _store(registers + mmio.QUEUE_NUM, SIZE)
            for register, gpa in (
                (mmio.QUEUE_DESC, self.desc(index)),
                (mmio.QUEUE_DRIVER, self.avail(index)),
                (mmio.QUEUE_DEVICE, self.avail(index) + 0x1000),
            ):
                code += _store(registers + register, gpa) + _store(registers + register + 4, 0)
            code += _store(registers + mmio.QUEUE_READY, 1)
        self.begin = code + _store(registers + mmio.STATUS, 15)
        self._loop = b""

    @staticmethod
    def desc(index: int) -> int:
        """GPA of queue `index`'s descriptors."""
        return RINGS + _RING * index

    @staticmethod
    def avail(index: int) -> int:
        """GPA of its avail ring; the used ring is 4 KiB on."""
        return RINGS + _RING * index + 0x2000

    def chain(self, index: int, *buffers: tuple[int, int, int]) -> None:
        """Have every entry of queue `index` be these (gpa, bytes, flags), each time around."""
        rows = b""
        for number, (gpa, size, flags) in enumerate(buffers):
            more = number + 1 < len(buffers)
            rows += struct.pack("<QIHH", gpa, size, flags | more, number + 1 if more else 0)
        self.memory.append((self.desc(index), rows))
        self._loop += _refill(self.avail(index))
        self.notify(index)

    def notify(self, index: int) -> None:
        """Have queue `index` be notified."""
        self._loop += _store(VIRTIO_MMIO_BASE + mmio.QUEUE_NOTIFY, index)

    def read(self, register: int) -> None:
        """Have `register` of the device be read."""
        self._loop += b"\xa1" + struct.pack("<I", VIRTIO_MMIO_BASE + register)  # mov eax, [..]

    def code(self, after: bytes | None = None) -> bytes:
        """The guest; with `after`, it floods once, and then runs that."""
        if after is not None:
            return self.begin + self._loop + after
        return self.begin + _for_ever(self._loop)


def _notifies() -> Flood:
    flood = Flood(1)
    flood.notify(0)
    return flood


def _hvc() -> Flood:
    flood = Flood(2)
    flood.memory.append((DATA, b"x" * 63 + b"\n"))
    flood.chain(1, (DATA, 64, 0))
    return flood


def _port() -> Flood:
    flood = Flood(6, 1 << F_MULTIPORT)
    flood.chain(5, (DATA, 4096, 0))
    return flood


def _net() -> Flood:
    flood = Flood(2)
    flood.memory.append((DATA, bytes(12) + b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5"))
    flood.chain(1, (DATA, 12 + 1514, 0))
    return flood


def _disk() -> Flood:
    flood = Flood(1)
    flood.memory.append((DATA, struct.pack("<IIQ", blk.T_IN, 0, 0)))
    flood.chain(0, (DATA, 16, 0), (DATA + 0x1000, 4096, WRITE), (DATA + 64, 1, WRITE))
    return flood


def _vsock() -> Flood:
    flood = Flood(2)
    request = HEADER.pack(3, 2, 1000, 1000, 0, 1, 1, 0, 1 << 16, 0)
    flood.memory.append((DATA, request))
    flood.chain(1, (DATA, HEADER.size, 0))
    flood.chain(0, (DATA + 0x1000, 4096, WRITE))
    return flood


def _uart() -> bytes:
    return _for_ever(b"\x66\xba\xf8\x03\xb0\x78\xee")  # mov dx, 0x3f8; mov al, 'x'; out dx, al


def _registers() -> Flood:
    flood = Flood(1)
    flood.read(mmio.MAGIC_VALUE)
    return flood


def _large() -> Flood:
    """Reads of as much as a request can name."""
    flood = Flood(1)
    flood.memory.append((DATA, struct.pack("<IIQ", blk.T_IN, 0, 0)))
    rows = [(DATA + 0x100000, MIB, WRITE)] * (SIZE - 2)
    flood.chain(0, (DATA, 16, 0), *rows, (DATA + 64, 1, WRITE))
    return flood


def _long() -> Flood:
    """Output of as much as a chain can name."""
    flood = Flood(2)
    flood.chain(1, *[(DATA, MIB, 0)] * SIZE)
    return flood


FLOODS = {
    "registers": (_registers, {"rng": True}),
    "large reads": (_large, {"drives": ["{image},snapshot"]}),
    "long output": (_long, {"console": "hvc,none"}),
    "notifies": (_notifies, {"rng": True}),
    "hvc": (_hvc, {"console": "hvc,none"}),
    "throttled reads": (_disk, {"drives": ["{image},snapshot,iops=1000000"]}),
    "port": (_port, {"ports": ["name=port,file={scratch}/port"]}),
    "net": (_net, {"nets": ["lan=neighbours"]}),
    "disk": (_disk, {"drives": ["{image},readonly"]}),
    "vsock": (_vsock, {"vsock": "cid=3,path={scratch}/vsock"}),
}
"""Each flood's guest, and the options of its machine."""
NAMES = ("uart", *FLOODS)


def machine(name: str, scratch: str, *, after: bytes | None = None, **options: object) -> Machine:
    """A machine whose guest floods as `name` (of NAMES) says; files are made in `scratch`.

    Args:
        after: what the guest runs when it has flooded once, instead of flooding for ever.
        options: keywords of MachineConfig, beside and instead of the flood's own.
    """
    if name == "uart":
        return idle(_uart(), scratch, **options)
    make, wanted = FLOODS[name]
    flood = make()
    image = os.path.join(scratch, "disk.img")
    if "drives" in wanted:
        with open(image, "ab") as file:
            file.truncate(64 * MIB)
    values: dict[str, object] = {}
    for key, value in wanted.items():
        if isinstance(value, list):
            values[key] = [each.format(image=image, scratch=scratch) for each in value]
        elif isinstance(value, str):
            values[key] = value.format(image=image, scratch=scratch)
        else:
            values[key] = value
    made = idle(flood.code(after), scratch, **{**values, **options})
    for gpa, data in flood.memory:
        made.memory.write(gpa, data)
    return made


def idle(code: bytes, scratch: str, **options: object) -> Machine:
    """A machine that runs `code`, 32-bit, as its kernel."""
    kernel = os.path.join(scratch, f"guest-{len(os.listdir(scratch))}.elf")
    Path(kernel).write_bytes(guests.pvh_elf(code))
    config = MachineConfig(kernel, memory=MEMORY, **options)  # type: ignore[arg-type]
    return Machine(config)
