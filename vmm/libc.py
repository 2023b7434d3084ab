"""System calls that Python's os module lacks, by the C library's syscall(2); x86-64.

The declaration is cffi's, made when the package is built: a start has cffi's run time loaded
anyway, where ctypes would cost it two milliseconds.
"""

from __future__ import annotations

import os

from vmm._libc import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Buffer

_libc: Any = ffi.dlopen(None)
raw: Any = _libc.syscall
"""The function itself, for calls by the dozen: a number and six integers; -1 where it fails."""
_ZEROS = (0, 0, 0, 0, 0, 0)


def syscall(number: int, *arguments: int | Buffer) -> int:
    """Make the system call `number` with up to six arguments; its result.

    A buffer (bytes, bytearray, mmap) is passed as its address; the kernel may write to it, so give
    a bytearray where it does. The other threads run meanwhile. Raises OSError.
    """
    words = list(arguments)
    kept = []
    for at, argument in enumerate(words):
        if not isinstance(argument, int):
            pointer = ffi.from_buffer(argument)
            kept.append(pointer)
            words[at] = int(ffi.cast("long", pointer))
    result = int(raw(number, *words, *_ZEROS[len(words) :]))
    if result == -1:
        number = ffi.errno
        raise OSError(number, os.strerror(number))
    return result


def address_of(buffer: Buffer) -> int:
    """The address of a buffer's first byte; the caller keeps the buffer alive."""
    with ffi.from_buffer(buffer) as pointer:
        return int(ffi.cast("long", pointer))
