"""The short examples of the Python API, with tiny guests."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from examples import vsock_service
from tests.support import tiny
from tests.support.vsock_guest import GuestOf
from vmm import AsyncMachine, MachineConfig
from vmm.virtio import vsock_packet as vp

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=tiny.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_booting(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"facts: few\n") + tiny.POWEROFF)
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(506))
    lines = run("boot.py", kernel, str(tmp_path / "initrd")).splitlines()
    assert lines[0].startswith("the guest says: facts:")
    assert lines[1].startswith("ended: MachineExit('poweroff'")


def test_events(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"one\ntwo\n") + tiny.exits(3))
    rows = [json.loads(line) for line in run("events.py", kernel, status=3).splitlines()]
    assert [row["event"] for row in rows] == ["started", "console", "console", "stopped"]
    assert [row["line"] for row in rows[1:3]] == ["one", "two"]
    assert rows[0]["time"] == 0 and rows[-1]["status"] == 3


def test_events_of_a_file(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"host login:\n") + tiny.LOGIN)
    (tmp_path / "m.toml").write_text(f"kernel = '{Path(kernel).name}'\nmemory = '16M'\n")
    rows = [json.loads(line) for line in run("events.py", str(tmp_path / "m.toml")).splitlines()]
    assert rows[-1]["kind"] == "poweroff"


def test_many_at_once(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"ready\n") + tiny.HALT)
    lines = run("async_many.py", "5", "ready", kernel).splitlines()
    numbers = [re.fullmatch(r"machine (\d): 'ready' after [\d.]+ s", line) for line in lines]
    assert sorted(match[1] for match in numbers if match) == ["0", "1", "2", "3", "4"]


def test_inspection(tmp_path: Path) -> None:
    code = tiny.prints(b"ready\n")
    kernel = tiny.kernel(tmp_path, code + tiny.SPIN)
    lines = run("inspect_memory.py", "ready", kernel).splitlines()
    at = tiny.ENTRY + len(code)
    assert lines[0].startswith(f"vCPU 0: rip {at:#x} ")
    assert lines[1].startswith(f"    code at GPA {at:#x}: eb fe ")
    assert lines[2].startswith("vCPU 1: rip ")


def test_functions_as_hardware(tmp_path: Path) -> None:
    """Writes what it reads at the port, a text, and ends with the timer's highest byte: 0."""
    code = b"\xe4\xe9\xe6\xe9"  # in al, 0xe9; out 0xe9, al
    code += b"".join(b"\xb0" + bytes((char,)) + b"\xe6\xe9" for char in b"hello\n")
    code += b"\xa1" + struct.pack("<I", 0xD8000004) + b"\xe6\xf4" + tiny.HALT
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "host_functions.py"), tiny.kernel(tmp_path, code)],
        env=tiny.environment(), capture_output=True, timeout=150, check=True,
    )  # fmt: skip
    assert done.stdout == b"\xe9hello\nthe guest wrote 0 to the exit port (status 0)\n"


def test_a_service_on_vsock(tmp_path: Path) -> None:
    async def main() -> None:
        config = MachineConfig(tiny.kernel(tmp_path, tiny.HALT), vsock="cid=42", memory=16 << 20)
        async with AsyncMachine(config) as m:
            m.bind_vsock(vsock_service.PORT, vsock_service.serve)
            await m.start()
            guest = await m.call(GuestOf, m.machine)
            guest.send(vp.OP_REQUEST, 5000, vsock_service.PORT)
            await m.call(guest.expect, vp.OP_RESPONSE)
            for question, answer in (
                (b"set colour light blue\n", b"ok\n"),
                (b"get colour\n", b"light blue\n"),
                (b"get shape\n", b"\n"),
                (b"\xff\n", b"say: set KEY VALUE, or get KEY\n"),
            ):
                guest.send(vp.OP_RW, 5000, vsock_service.PORT, question)
                assert (await m.call(guest.expect, vp.OP_RW)).data == answer

    asyncio.run(main())
    assert run("vsock_service.py", tiny.kernel(tmp_path, tiny.exits(5)), status=5) == ""


def test_the_file_is_a_good_one() -> None:
    done = tiny.run("config", str(EXAMPLES / "machine.toml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kernel"] == str(EXAMPLES / "vmlinuz")
