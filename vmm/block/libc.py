"""What Python's os module lacks, from the C library (cffi, ABI mode)."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from cffi import FFI

AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_DIO = struct.Struct("<II")  # stx_dio_mem_align, stx_dio_offset_align
_STATX_DIO_AT = 0x98

_ffi = FFI()
_ffi.cdef(
    "int fallocate(int fd, int mode, long offset, long len);"
    "int statx(int dirfd, const char *path, int flags, unsigned mask, void *statxbuf);"
)
_libc: Any = _ffi.dlopen(None)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_* `mode`, offsets in bytes; raises OSError."""
    while _libc.fallocate(fd, mode, offset, size):
        number = _ffi.errno
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def dio_offset_align(fd: int) -> int | None:
    """The alignment in bytes that O_DIRECT wants of offsets and lengths in an open file (statx(2),
    STATX_DIOALIGN, Linux 6.1); 0: it is not possible there, None: the kernel does not say."""
    answer = _ffi.new("char[]", _STATX_SIZE)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, answer):
        return None
    data = bytes(_ffi.buffer(answer))
    if not int.from_bytes(data[:4], "little") & STATX_DIOALIGN:  # stx_mask
        return None
    return int(_STATX_DIO.unpack_from(data, _STATX_DIO_AT)[1])
