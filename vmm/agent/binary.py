"""The agent's program for the guest: shipped with the package, or compiled on first use.

It needs no C library, so any C compiler for x86-64 with Linux's headers will do.
"""

from __future__ import annotations

import os

from vmm import own_directory
from vmm.errors import HostError

COMPILERS = ("cc", "gcc", "clang", "musl-gcc")
FLAGS = (
    *("-std=gnu11", "-Os", "-ffreestanding", "-fno-builtin", "-nostdlib", "-static", "-no-pie"),
    *("-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-s"),
    *("-Wall", "-Wextra", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro"),
)
SHIPPED = "vmm-agent"
"""The beginning of the name: beside the sources, where hatch_build.py had a compiler, or in the
cache."""
HERE = os.path.dirname(__file__)


def sources() -> list[str]:
    """The paths of the C files, in order."""
    return [os.path.join(HERE, name) for name in sorted(os.listdir(HERE)) if name.endswith(".c")]


def program() -> str:
    """The path of the agent's program. Raises HostError where there is none and no compiler."""
    path = found()
    if path is None:
        try:
            path = os.path.join(_cache(), f"{SHIPPED}-{fingerprint()}")
        except OSError as err:
            raise HostError(
                f"the guest's agent cannot be kept: {err.strerror or err}; have VMM_CACHE name a "
                "directory of this user's own, which others cannot write to"
            ) from err
        build(path)
    return path


def found() -> str | None:
    """The path of the agent's program, or None where it is still to be compiled."""
    name = f"{SHIPPED}-{fingerprint()}"
    shipped = os.path.join(HERE, name)
    if os.path.exists(shipped):
        return shipped
    try:
        path = os.path.join(_cache(), name)
        return path if own_directory.is_own(os.lstat(path)) else None
    except OSError:
        return None


def compiler() -> str | None:
    """The path of the C compiler: CC of the environment, or one of COMPILERS."""
    import shutil

    chosen = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [chosen] if chosen else COMPILERS)), None)


def ship() -> None:
    """Compile it beside its sources, for a package. Raises HostError."""
    name = f"{SHIPPED}-{fingerprint()}"
    for former in os.listdir(HERE):
        if former.startswith(f"{SHIPPED}-") and former != name:
            os.unlink(os.path.join(HERE, former))
    path = os.path.join(HERE, name)
    if not os.path.exists(path):
        build(path)


def fingerprint() -> str:
    """What tells one version of the sources from another."""
    from hashlib import sha256

    found = sha256(" ".join(FLAGS).encode())
    for name in sorted(os.listdir(HERE)):
        if name.endswith((".c", ".h")):
            with open(os.path.join(HERE, name), "rb") as file:
                found.update(file.read())
    return found.hexdigest()[:16]


def build(path: str) -> None:
    """Compile it to `path`, which appears when it is whole. Raises HostError."""
    import subprocess

    program = compiler()
    if program is None:
        raise HostError(
            "no C compiler for the guest's agent; apt-get install gcc libc6-dev, or set CC"
        )
    unfinished = f"{path}.{os.urandom(8).hex()}"
    command = [program, *FLAGS, "-o", unfinished, *sources()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise HostError(f"{program} cannot compile the guest's agent: {said.strip()}")
        os.chmod(unfinished, 0o755)  # under umask 002 the group could write it: nobody's own
        os.rename(unfinished, path)
    except OSError as err:
        raise HostError(f"{path}: {err.strerror}") from err
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def _cache() -> str:
    from vmm.agent import cache

    return cache.directory()
