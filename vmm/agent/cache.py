"""Where what is made once is kept: $VMM_CACHE/agent, by default ~/.cache/vmm/agent."""

from __future__ import annotations

import os


def directory() -> str:
    chosen = os.environ.get("VMM_CACHE")
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        chosen = os.path.join(base, "vmm")
    return os.path.join(chosen, "agent")


def read(name: str) -> bytes | None:
    """What is kept as `name`, if anything is."""
    try:
        with open(os.path.join(directory(), name), "rb") as file:
            return file.read()
    except OSError:
        return None


def write(name: str, data: bytes) -> None:
    """Keep `data`, where that is possible; it appears when it is whole."""
    path = os.path.join(directory(), name)
    unfinished = f"{path}.{os.getpid()}"
    try:
        os.makedirs(directory(), exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(data)
        os.rename(unfinished, path)
    except OSError:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
