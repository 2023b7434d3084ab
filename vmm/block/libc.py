"""What Python's os module lacks, from the C library (cffi, ABI mode)."""

from __future__ import annotations

import errno
import os
from typing import Any

from cffi import FFI

_ffi = FFI()
_ffi.cdef("int fallocate(int fd, int mode, long offset, long len);")
_libc: Any = _ffi.dlopen(None)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_* `mode`, offsets in bytes; raises OSError."""
    while _libc.fallocate(fd, mode, offset, size):
        number = _ffi.errno
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
