"""`vmm snapshot`, `vmm restore` and the control socket, as a person uses them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import bare_machine
from vmm.cli.control import Control, ask
from vmm.errors import HostError, UsageError, VmmError

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(240)]


class Running:
    """`vmm run` or `vmm restore` with pipes; a context manager that leaves none behind."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            tiny.command(*words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=tiny.environment(),
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip() == b"ready", line

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def expect(self, text: bytes) -> None:
        assert self.process.stdout is not None
        found = self.process.stdout.read(len(text))
        assert found == text

    def end(self) -> tuple[int, bytes, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err.decode()


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[tuple[Running, Path]]:
    """A guest that sends back what is typed, and its control socket."""
    kernel, control = tiny.kernel(tmp_path, tiny.ECHO), tmp_path / "control"
    with Running("run", kernel, "--memory", "64M", "--control", str(control)) as running:
        running.ready()
        yield running, control


def test_a_machine_is_kept_and_goes_on(echo: tuple[Running, Path], tmp_path: Path) -> None:
    running, control = echo
    snap = tmp_path / "snap"
    assert not os.stat(control).st_mode & 0o077
    running.type(b"a")
    running.expect(b"[a]")
    done = tiny.run("snapshot", str(snap), "--control", str(control))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    running.type(b"b")
    running.expect(b"[b]")
    done = tiny.run(
        "snapshot", str(tmp_path / "two"), "--base", str(snap), "--control", str(control), "--stop"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert running.end() == (0, b"", "")
    assert not control.exists()
    for path in (snap, tmp_path / "two"):
        assert tiny.run("snapshot", "--check", str(path)).returncode == 0
        for _ in range(2):
            with Running("restore", str(path), "--verify", "--clock", "keep") as again:
                again.type(b"xq")
                assert again.end() == (
                    7,
                    b"[x]",
                    "vmm: the guest wrote 7 to the exit port (status 7)\n",
                )


def test_a_restored_machine_is_kept_again(echo: tuple[Running, Path], tmp_path: Path) -> None:
    running, control = echo
    done = tiny.run("snapshot", str(tmp_path / "0"), "--control", str(control), "--stop")
    assert done.returncode == 0, done.stderr
    assert running.end()[0] == 0
    for number in range(3):
        path = str(tmp_path / str(number))
        with Running("restore", path, "--control", str(control)) as again:
            again.type(b"x")
            again.expect(b"[x]")
            base = ["--base", path] if number % 2 else []
            done = tiny.run(
                "snapshot", str(tmp_path / str(number + 1)), "--control", str(control), *base
            )
            assert done.returncode == 0, done.stderr
            again.type(b"q")
            assert again.end()[0] == 7


def test_restored_on_a_terminal(echo: tuple[Running, Path], tmp_path: Path) -> None:
    _, control = echo
    assert tiny.run("snapshot", str(tmp_path / "s"), "--control", str(control)).returncode == 0
    with tiny.AtTerminal("restore", str(tmp_path / "s")) as terminal:
        deadline = time.monotonic() + 60
        while not terminal.is_raw:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        terminal.type(b"y")
        terminal.expect(b"[y]")
        terminal.type(b"\x01x")
        assert terminal.wait() == 130
        assert terminal.is_restored


# --- wrong usage ----------------------------------------------------------------------------------


def complaint(*words: str) -> tuple[int, str]:
    done = tiny.run(*words)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.returncode, done.stderr


def test_wrong_usage(echo: tuple[Running, Path], tmp_path: Path) -> None:
    running, control = echo
    sock = str(control)
    snap = str(tmp_path / "snap")
    for words, status, text in (
        (("snapshot", snap), 2, f"vmm snapshot {snap}: which machine? --control PATH"),
        (("snapshot",), 2, "no DIR given"),
        (("snapshot", snap, "--control", f"{snap}.sock"), 69, "No such file or directory; start"),
        (("snapshot", snap, "--control", sock, "--disks", "burn"), 2, "disks=burn is not one of"),
        (("snapshot", str(tmp_path), "--control", sock), 2, "exists already"),
        (("snapshot", "/proc/no/place", "--control", sock), 2, "/proc/no: No such file or"),
        (("snapshot", snap, "--control", sock, "--base", snap), 2, "is no directory of a snapshot"),
        (("snapshot", snap, "--control", "x" * 200), 2, "200 bytes are too long for a socket's"),
        (("snapshot", "--check", snap), 2, "is no directory of a snapshot"),
        (("restore", snap), 2, "is no directory of a snapshot"),
        (("restore", str(tmp_path)), 2, "is no snapshot, or one that was not finished"),
        (("restore",), 2, "no DIR given"),
        (("restore", snap, "--memory", "1G"), 2, "'--memory' is no option"),
    ):
        found = complaint(*words)
        assert found[0] == status and text in found[1], (words, found)
    # And the machine goes on.
    running.type(b"c")
    running.expect(b"[c]")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["control", "guest-0"]


def test_a_control_socket_that_cannot_be(echo: tuple[Running, Path], tmp_path: Path) -> None:
    _, control = echo
    kernel = str(tmp_path / "guest-0")
    (tmp_path / "file").write_text("x")
    for path, text in (
        (str(control), "is in use by another process"),
        (str(tmp_path / "file"), "is there and is not a socket"),
        (str(tmp_path / "no" / "where"), "No such file or directory"),
        ("x" * 200, "200 bytes are too long"),
    ):
        done = tiny.run("run", kernel, "--control", path)
        assert done.returncode == 2 and text in done.stderr, done
        assert done.stderr.startswith("vmm: --control ")


def test_a_damaged_snapshot(echo: tuple[Running, Path], tmp_path: Path) -> None:
    _, control = echo
    snap = tmp_path / "snap"
    assert tiny.run("snapshot", str(snap), "--control", str(control)).returncode == 0
    with open(snap / "memory", "r+b") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1,)))
    for words in (("snapshot", "--check", str(snap)), ("restore", str(snap), "--verify")):
        status, text = complaint(*words)
        assert status == 2 and "memory is corrupt" in text


# --- the socket -----------------------------------------------------------------------------------


def test_requests(tmp_path: Path) -> None:
    path, here = str(tmp_path / "control"), str(tmp_path / "here")
    with bare_machine("1: hlt; jmp 1b") as machine, Control(path, machine):
        machine.start()
        ask(path, {"snapshot": {"path": here, "disks": "keep"}})
        assert machine.state == "running"
        with pytest.raises(VmmError, match="here exists already") as caught:
            ask(path, {"snapshot": {"path": here}})
        assert caught.value.exit_status == UsageError.exit_status
        for request, text in (
            ({"shout": 1}, "a request is {'snapshot'"),
            ({"snapshot": {}}, "path is missing"),
            ({"snapshot": {"path": 7}}, "path=7 cannot be"),
            ({"snapshot": {"path": "/a", "burn": True}}, "burn=True cannot be"),
        ):
            with pytest.raises(VmmError, match=text):
                ask(path, request)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            request = {"snapshot": {"path": f"{here}2", "base": here}}
            sock.sendall(b"nonsense\n" + json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as stream:
                assert json.loads(stream.readline())["error"] == "a request is one line of JSON"
                assert json.loads(stream.readline()) == {}
        with socket.socket(socket.AF_UNIX) as sock:  # a client that goes away
            sock.connect(path)
            sock.sendall(b'{"snapshot": {}}\n')
        ask(path, {"snapshot": {"path": f"{here}3", "stop": True}})
        ended = machine.wait(60)
        assert ended.ok and ended.message == f"its snapshot {here}3 was made"
        with pytest.raises(VmmError, match="the machine is stopped"):
            ask(path, {"snapshot": {"path": f"{here}4"}})
        idle = socket.socket(socket.AF_UNIX)  # does not hold up the end
        idle.connect(path)
    idle.close()
    assert not os.path.exists(path)
    with pytest.raises(HostError, match="start the machine with --control"):
        ask(path, {"snapshot": {"path": "/a"}})
    with pytest.raises(UsageError, match="too long for a socket's name"):
        ask("x" * 300, {})


def test_the_end_by_a_signal_removes_the_socket(echo: tuple[Running, Path]) -> None:
    running, control = echo
    assert control.exists()
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end()[0] == 130
    assert not control.exists()


def test_a_disk_of_a_running_machine_grows(tmp_path: Path) -> None:
    kernel, control, disk = tiny.kernel(tmp_path, tiny.ECHO), tmp_path / "c", tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    words = ["run", kernel, "--memory", "64M", "--control", str(control), "--drive", str(disk)]

    def resize(*more: str) -> tuple[int, str, str]:
        done = tiny.run("resize", *more, "--control", str(control))
        return done.returncode, done.stdout, done.stderr

    with Running(*words) as running:
        running.ready()
        assert resize("blk0", "--size", "2M") == (0, "blk0: 2097152 bytes\n", "")
        assert disk.stat().st_size == 2 << 20
        os.truncate(disk, 3 << 20)
        assert resize("blk0") == (0, "blk0: 3145728 bytes\n", "")
        for more, line in (
            (("blk0", "--size", "1M"), "blk0: 1048576 bytes are less than the 3145728 that the"),
            (("blk7",), "resize: this machine has no virtio device 'blk7'; it has blk0"),
            (("blk0", "--size", "much"), "--size"),
        ):
            status, out, err = resize(*more)
            assert (status, out) == (2, "") and line in err and err.count("\n") == 1
        for request in ({}, {"disk": 1}, {"disk": "blk0", "size": "1"}, {"disk": "blk0", "x": 1}):
            with pytest.raises(VmmError, match="resize: "):
                ask(str(control), {"resize": request})
        running.type(b"a")
        running.expect(b"[a]")
