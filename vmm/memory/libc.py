"""What Python's mmap and os modules lack, from the C library (cffi, ABI mode); loaded when used."""

from __future__ import annotations

import os
import struct
from typing import Any

from cffi import FFI

SYS_PROCESS_MADVISE = 440
MAP_FIXED = 0x10
IOV_MAX = 1024
IOVEC = struct.Struct("<QQ")
"""struct iovec: base and length."""

_ffi = FFI()
_ffi.cdef(
    "void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);"
    "long syscall(long number, ...);"
)
_libc: Any = _ffi.dlopen(None)


def map_over(address: int, size: int, prot: int, flags: int, fd: int, offset: int = 0) -> None:
    """mmap(2) with MAP_FIXED: what is mapped at `address` is replaced at once. Raises OSError."""
    at = _ffi.cast("void *", address)
    if _libc.mmap(at, size, prot, flags | MAP_FIXED, fd, offset) != at:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))


def advise_many(vector: bytes, advice: int) -> None:
    """process_madvise(2) on this process's own ranges, `vector` an array of at most IOV_MAX iovecs.

    Any advice needs Linux 6.13; raises OSError where the kernel will not.
    """
    pidfd = os.pidfd_open(os.getpid())
    try:
        number, count = _ffi.cast("long", pidfd), len(vector) // IOVEC.size
        done = _libc.syscall(
            _ffi.cast("long", SYS_PROCESS_MADVISE),
            number,
            _ffi.from_buffer(vector),
            _ffi.cast("size_t", count),
            _ffi.cast("int", advice),
            _ffi.cast("unsigned int", 0),
        )
        if done < 0:
            raise OSError(_ffi.errno, os.strerror(_ffi.errno))
    finally:
        os.close(pidfd)
