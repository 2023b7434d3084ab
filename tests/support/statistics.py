"""KVM's own counters of a VM (KVM_GET_STATS_FD)."""

from __future__ import annotations

import fcntl
import os
import struct

from vmm import Machine

GET_STATS_FD = 0xAECE
_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id, desc and data offset
_DESCRIPTOR = struct.Struct("<IhHII")  # flags, exponent, size, offset, bucket_size; then the name


def counter(machine: Machine, name: str) -> int:
    """The counter `name`; KeyError where this kernel has none."""
    fd = fcntl.ioctl(machine.vm.fd, GET_STATS_FD)
    try:
        _, name_size, count, _, at, data = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        size = _DESCRIPTOR.size + name_size
        descriptors = os.pread(fd, size * count, at)
        for start in range(0, len(descriptors), size):
            offset = _DESCRIPTOR.unpack_from(descriptors, start)[3]
            found = descriptors[start + _DESCRIPTOR.size : start + size].rstrip(b"\0").decode()
            if found == name:
                return int.from_bytes(os.pread(fd, 8, data + offset), "little")
    finally:
        os.close(fd)
    raise KeyError(name)
