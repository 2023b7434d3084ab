"""vmm.testing.guests: the guests that have names do what is said of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.testing import guests


def test_the_command_lists_what_there_is(tmp_path: Path) -> None:
    for words in ([], ["nosuch", str(tmp_path / "x")], ["login"]):
        done = subprocess.run(
            [sys.executable, "-m", "vmm.testing.guests", *words],
            capture_output=True, text=True, env=tiny.environment(), check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert all(name in done.stderr for name in guests.GUESTS)
    assert list(tmp_path.iterdir()) == []
    assert guests.main(["login", str(tmp_path / "no/where")]) == 2


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("name", guests.GUESTS)
def test_each_runs(name: str, tmp_path: Path) -> None:
    assert guests.main([name, str(tmp_path / "vmlinuz")]) == 0
    with Machine(MachineConfig(str(tmp_path / "vmlinuz"), memory="16M", timeout=60)) as m:
        written = []
        m.bind_port(0x510, 4, read=lambda offset, size: 41)
        m.bind_mmio(0xD8000000, 0x1000, write=lambda offset, size, value: written.append(value))
        m.start()
        if name == "login":
            m.wait_for("login:", timeout=30)
            m.shutdown()
        elif name in ("suite", "device"):
            assert m.wait(30).status == 0
            assert written == ([42] if name == "device" else [])
        elif name == "count":
            while m.memory.read_u32(guests.COUNTER) < 100:
                pass
