"""native.c: compiled when it changed, kept in the user's cache, and asked for figures."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vmm.errors import HostError
from vmm.testing.kernels import cache_directory

SOURCE = Path(__file__).with_name("native.c")
HEADER = SOURCE.with_suffix(".h")
FLAGS = ("-O2", "-Wall", "-pthread")


def program() -> str:
    """Path of the compiled program."""
    return compiled("native", [SOURCE, HEADER], FLAGS)


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str]) -> str:
    """Path of the program gcc makes of `sources`; a linker script and headers are looked at too
    (a change of them compiles again), but it is for `flags` to name them."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = cache_directory() / "bench" / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{name}-*"):
            old.unlink()
        inputs = [str(source) for source in sources if source.suffix in (".c", ".S")]
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = os.path.join(scratch, name)
            try:
                subprocess.run(["gcc", *flags, "-o", made, *inputs], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise HostError(f"cannot compile {name}: {error}; is gcc installed?") from None
            os.rename(made, target)
    return str(target)


def clones_program() -> str:
    """Path of the compiled clones.c."""
    return compiled("clones", [SOURCE.with_name("clones.c"), HEADER], FLAGS)


class Native:
    """A running `native serve`, or another such program: warm, as the Python process it is compared
    with.

    Attributes:
        pid: the process's.
    """

    def __init__(self, path: str = "") -> None:
        self._process = subprocess.Popen(
            [path or program(), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> int:
        """Nanoseconds for `command` (see native.c)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise HostError(f"the C program ended at {command!r}; its message is above")
        return int(answer)
