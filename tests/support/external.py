"""The driver's side of a device that another process serves, and of virtio-fs."""

from __future__ import annotations

import os
import struct
import time

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.memory import GuestMemory
from vmm.virtio.fs import Share
from vmm.virtio.vhost_user import VhostUserDevice

MIB = 1 << 20
LOOKUP, SETATTR, SYMLINK, MKDIR, UNLINK, RMDIR, LINK = 1, 4, 6, 9, 10, 11, 13
OPEN, READ, WRITE, SETXATTR, INIT, CREATE, RENAME2 = 14, 15, 16, 21, 26, 35, 45
ROOT = 1


class External(Driver):
    """The driver's side of a device somebody else serves."""

    def __init__(self, device: VhostUserDevice, *, event_idx: bool = False) -> None:
        self.errors: list[str] = []
        device.on_error = self.errors.append
        super().__init__(device, memory=GuestMemory(8 * MIB, "memfd"), event_idx=event_idx)

    def start(self) -> None:
        if not self.transport.served:
            self.transport.on_driver_ok = lambda: self.device.connect(self.transport.notify_fds)
            self.transport.served = True
        super().start()

    def wait(self, index: int) -> tuple[int, int]:
        limit = time.monotonic() + 20
        while not (done := self.rings[index].used()):
            assert time.monotonic() < limit, self.errors
            time.sleep(0.001)
        return done[0]


class Fuse:
    """A guest's file system driver, as far as it is needed."""

    def __init__(self, share: Share) -> None:
        self.driver = External(share.open())
        self.unique = 0
        self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 0, 0))

    def ask(self, opcode: int, node: int, data: bytes) -> bytes | int:
        """What is answered, or the error (negative)."""
        driver = self.driver
        self.unique += 1
        request = struct.pack("<IIQQIIII", 40 + len(data), opcode, self.unique, node, 0, 0, 0, 0)
        driver.memory.write(BUFFERS, request + data)
        driver.rings[1].add(
            [(BUFFERS, len(request + data), False), (BUFFERS + 0x10000, 8192, True)]
        )
        driver.kick(1)
        driver.wait(1)
        size, error, unique = struct.unpack("<IiQ", driver.memory.read(BUFFERS + 0x10000, 16))
        assert unique == self.unique
        return error or driver.memory.read(BUFFERS + 0x10010, size - 16)

    def find(self, node: int, name: str) -> int:
        answer = self.ask(LOOKUP, node, name.encode() + b"\0")
        assert isinstance(answer, bytes), answer
        return int(struct.unpack_from("<Q", answer)[0])

    def read(self, node: int, flags: int = 0) -> bytes:
        answer = self.ask(OPEN, node, struct.pack("<II", os.O_RDONLY | flags, 0))
        assert isinstance(answer, bytes), answer
        (handle,) = struct.unpack_from("<Q", answer)
        data = self.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
        assert isinstance(data, bytes), data
        return data

    def changes(self, directory: int, file: int, name: bytes) -> dict[str, bytes | int]:
        """What each way of changing something is answered."""
        chmod = struct.pack("<IIQQQQQQIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o777, 0, 0, 0, 0)
        create = struct.pack("<IIII", os.O_CREAT | os.O_RDWR, 0o644, 0, 0)
        truncate = struct.pack("<II", 8, 0) + bytes(80)
        return {
            "mkdir": self.ask(MKDIR, directory, struct.pack("<II", 0o755, 0) + b"new\0"),
            "create": self.ask(CREATE, directory, create + b"n\0"),
            "symlink": self.ask(SYMLINK, directory, b"link\0target\0"),
            "link": self.ask(LINK, directory, struct.pack("<Q", file) + b"hard\0"),
            "write": self.ask(OPEN, file, struct.pack("<II", os.O_WRONLY, 0)),
            "read and write": self.ask(OPEN, file, struct.pack("<II", os.O_RDWR, 0)),
            "truncate": self.ask(OPEN, file, struct.pack("<II", os.O_RDONLY | os.O_TRUNC, 0)),
            "chmod": self.ask(SETATTR, file, chmod),
            "size": self.ask(SETATTR, file, truncate),
            "rename": self.ask(
                RENAME2, directory, struct.pack("<QII", directory, 0, 0) + name + b"\0other\0"
            ),
            "unlink": self.ask(UNLINK, directory, name + b"\0"),
        }
