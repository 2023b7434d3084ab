"""vmm/initramfs/exitport.py: an executable this kernel runs, for root alone."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from vmm.initramfs import exit_program


def test_a_user_may_not(tmp_path: Path) -> None:
    """Linux runs it, and refuses the port: it can hurt nobody on the wrong side."""
    program = tmp_path / "vmm-exit"
    program.write_bytes(exit_program())
    program.chmod(0o755)
    user = {"user": 65534, "group": 65534, "extra_groups": ()} if os.geteuid() == 0 else {}
    with program.open("rb") as file:  # by its descriptor: tmp_path is the owner's only
        done = subprocess.run(
            ["/proc/self/fd/0", "3"], stdin=file, check=False, timeout=20, **user
        )  # fmt: skip
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("field", [(16, 2), (18, 62)])
def test_it_is_a_static_executable_for_x86_64(field: tuple[int, int]) -> None:
    program = exit_program()
    offset, value = field
    assert int.from_bytes(program[offset : offset + 2], "little") == value
    assert len(program) < 256
