"""What Python's mmap and os modules lack, from the C library.

By ctypes, and loaded when used: cffi would parse declarations for tens of milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import struct

SYS_PROCESS_MADVISE = 440
MAP_FIXED = 0x10
IOV_MAX = 1024
IOVEC = struct.Struct("<QQ")
"""struct iovec: base and length."""

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def map_over(address: int, size: int, prot: int, flags: int, fd: int, offset: int = 0) -> None:
    """mmap(2) with MAP_FIXED: what is mapped at `address` is replaced at once. Raises OSError."""
    if _mmap(address, size, prot, flags | MAP_FIXED, fd, offset) != address:
        _fail()


def advise_many(vector: bytes, advice: int) -> None:
    """process_madvise(2) on this process's own ranges, `vector` an array of at most IOV_MAX iovecs.

    Any advice needs Linux 6.13; raises OSError where the kernel will not.
    """
    pidfd = os.pidfd_open(os.getpid())
    try:
        done = _syscall(
            ctypes.c_long(SYS_PROCESS_MADVISE),
            ctypes.c_long(pidfd),
            ctypes.c_char_p(vector),
            ctypes.c_size_t(len(vector) // IOVEC.size),
            ctypes.c_long(advice),
            ctypes.c_long(0),
        )
        if done < 0:
            _fail()
    finally:
        os.close(pidfd)


def _fail() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
