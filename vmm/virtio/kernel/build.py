"""Build step of `vmm.virtio.kernel`: cffi's description of kernel.h, and the library itself.

The first, `_abi.py`, needs no compiler. The library is loaded by it with dlopen(3) and knows
nothing of Python: one file does for every Python version and needs none of its headers. Where there
is no C compiler it is not there, and the same is done in Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = ("ring.c", "disk.c", "net.c")
FLAGS = ("-O2", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=default", "-s", "-Wl,--as-needed")
MODULE, LIBRARY = "_abi.py", "_kernel.so"


def build() -> bool:
    """Write both beside this file; whether there is a library."""
    from cffi import FFI

    ffi = FFI()
    with open(os.path.join(HERE, "kernel.h")) as header:
        ffi.cdef(header.read())
    ffi.set_source("vmm.virtio.kernel._abi", None)
    ffi.emit_python_code(os.path.join(HERE, MODULE))
    return _compile()


def _compile() -> bool:
    """Have the library made anew; an old one that does not fit any more must not stay."""
    target = os.path.join(HERE, LIBRARY)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    sources = [os.path.join(HERE, source) for source in SOURCES]
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        made = os.path.join(scratch, LIBRARY)
        try:
            if compiler is None:
                raise OSError("no C compiler")
            subprocess.run([compiler, *FLAGS, "-o", made, *sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"vmm: without its C kernel for virtqueues: {error}")
            if os.path.exists(target):
                os.unlink(target)
            return False
        os.replace(made, target)
    return True


if __name__ == "__main__":
    build()
