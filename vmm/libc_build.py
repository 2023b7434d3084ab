"""Writes vmm/_libc.py: the C library's functions that vmm.libc calls, as a cffi out-of-line ABI
declaration, which loads without a parser, a compiler or ctypes.

Run by the build hook (hatch_build.py) or by hand: `python vmm/libc_build.py`.
"""

from __future__ import annotations

import os

CDEF = """
long syscall(long number, long, long, long, long, long, long);
"""


def build(target: str | None = None) -> str:
    """Write the module to `target` (default: beside this file) and return its path."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(CDEF)
    ffi.set_source("vmm._libc", None)
    path = target or os.path.join(os.path.dirname(os.path.abspath(__file__)), "_libc.py")
    ffi.emit_python_code(path)
    return path


if __name__ == "__main__":
    build()
