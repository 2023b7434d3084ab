"""A network namespace for a test, and frames to send in it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cffi import FFI

CLONE_NEWNET = 0x40000000
_ffi = FFI()
_ffi.cdef("int unshare(int flags); int setns(int fd, int kind);")
_libc = _ffi.dlopen(None)


@contextmanager
def network_namespace() -> Iterator[None]:
    """This thread, and what it starts, in an empty network namespace."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network namespaces here: {os.strerror(_ffi.errno)}")
        try:
            ip("link set lo up")
            yield
        finally:
            assert _libc.setns(before, CLONE_NEWNET) == 0, os.strerror(_ffi.errno)
    finally:
        os.close(before)


def ip(words: str) -> str:
    """`ip WORDS`, in this thread's namespace."""
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def interfaces() -> list[str]:
    """The namespace's interfaces but `lo`."""
    names = [line.split(":")[1].strip() for line in ip("-o link").splitlines()]
    return [name.partition("@")[0] for name in names if name != "lo"]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def address(text: str) -> bytes:
    """An IPv4 address's four bytes."""
    return bytes(map(int, text.split(".")))


def ethernet(to: bytes, source: bytes, kind: int, data: bytes) -> bytes:
    return to + source + struct.pack(">H", kind) + data


def arp_request(mac: bytes, own: str, wanted: str) -> bytes:
    """Who has `wanted`? Tell `own`, at `mac`."""
    head = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1)
    return ethernet(b"\xff" * 6, mac, 0x806, head + mac + address(own) + bytes(6) + address(wanted))


def ipv4(source: str, to: str, protocol: int, data: bytes) -> bytes:
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, protocol, 0,
        address(source), address(to),
    )  # fmt: skip
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + data


def udp(source: int, to: int, data: bytes) -> bytes:
    """Without a checksum, which UDP over IPv4 allows."""
    return struct.pack(">HHHH", source, to, 8 + len(data), 0) + data
