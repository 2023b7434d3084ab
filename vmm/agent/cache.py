"""The agent's program, and which modules of a tree were found, kept in $VMM_CACHE/agent (see
`vmm.own_directory`)."""

from __future__ import annotations

import os
from contextlib import suppress

from vmm import own_directory

NAME = "agent"
SIZE_MAX = 1 << 20
"""Bytes of an entry."""


def directory() -> str:
    """Its path. Raises OSError, PermissionError where it is another user's."""
    path = own_directory.find(NAME)
    os.close(own_directory.open_own(path))
    return path


def read(name: str) -> bytes | None:
    """What is kept as `name`, if anything is."""
    try:
        there = own_directory.open_own(directory())
    except OSError:
        return None
    try:
        return own_directory.read(there, name, SIZE_MAX)
    finally:
        os.close(there)


def write(name: str, data: bytes) -> None:
    """Keep `data`, where that is possible; it appears when it is whole."""
    try:
        there = own_directory.open_own(directory())
    except OSError:
        return
    unfinished = f"{name}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(unfinished, flags, 0o600, dir_fd=there), "wb") as file:
            file.write(data)
        os.rename(unfinished, name, src_dir_fd=there, dst_dir_fd=there)
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=there)
    finally:
        os.close(there)
