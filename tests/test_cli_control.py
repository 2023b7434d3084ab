"""vmm/cli/control.py: clients that are silent, slow, many, or gone before their turn."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.bare import bare_machine
from vmm import Machine
from vmm.cli import control
from vmm.cli.control import Control, ask
from vmm.errors import VmmError

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]


class Slow:
    """A machine whose snapshots take until `go` is set."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.begun, self.go = threading.Event(), threading.Event()
        self.made: list[str] = []
        self._snapshot = machine.snapshot
        machine.snapshot = self.snapshot  # type: ignore[assignment, method-assign]

    def snapshot(self, path: str, **options: object) -> None:
        self.begun.set()
        assert self.go.wait(60)
        self._snapshot(path, **options)  # type: ignore[arg-type]
        self.made.append(os.path.basename(path))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    with bare_machine("1: hlt; jmp 1b") as machine:
        machine.start()
        slow = Slow(machine)
        yield slow
        slow.go.set()


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.settimeout(60)
    return sock


def line(**request: object) -> bytes:
    return json.dumps({"snapshot": request}).encode() + b"\n"


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("says", [b"", b'{"snapshot"'], ids=["nothing", "half a request"])
def test_a_silent_client_holds_nobody_up(slow: Slow, tmp_path: Path, says: bytes) -> None:
    path = str(tmp_path / "c")
    slow.go.set()
    with Control(path, slow.machine), connected(path) as silent:
        silent.sendall(says)
        ask(path, {"snapshot": {"path": str(tmp_path / "a")}})
        assert slow.made == ["a"]
        assert slow.machine.state == "running"


def test_half_a_request_has_a_deadline(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.3)
    path = str(tmp_path / "c")
    with Control(path, slow.machine), connected(path) as sock, connected(path) as idle:
        with pytest.raises(BrokenPipeError):  # a byte now and then does not prolong it
            for _ in range(600):
                sock.sendall(b"{")
                time.sleep(0.1)
        idle.sendall(b"nonsense\n")  # nor is one closed that has said nothing yet
        assert b"error" in idle.recv(1000)


@pytest.mark.parametrize("stop", [True, False])
def test_a_client_that_goes_before_its_turn_is_dropped(
    slow: Slow, tmp_path: Path, stop: bool
) -> None:
    path = str(tmp_path / "c")
    with Control(path, slow.machine) as requests:
        first = connected(path)
        first.sendall(line(path=str(tmp_path / "first")))
        assert slow.begun.wait(60)
        second = connected(path)
        second.sendall(line(path=str(tmp_path / "second"), stop=stop))
        until(lambda: sum(client.busy for client in requests._server._clients.values()) == 2)
        second.close()
        third = connected(path)
        third.sendall(line(path=str(tmp_path / "third")))
        third.shutdown(socket.SHUT_WR)  # as nc -N: it waits for its answer
        slow.go.set()
        for sock in (first, third):
            assert sock.recv(100) == b"{}\n"
            sock.close()
        assert slow.made == ["first", "third"]
        assert slow.machine.state == "running"


def test_no_machine_is_ended_for_a_client_that_has_gone(slow: Slow, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with Control(path, slow.machine) as requests:
        sock = connected(path)
        sock.sendall(line(path=str(tmp_path / "a"), stop=True))
        assert slow.begun.wait(60)
        sock.close()
        slow.go.set()
        until(lambda: not requests._server._clients)
        assert slow.made == ["a"]
        assert slow.machine.state == "running"
        assert not requests.busy


def test_many_clients(slow: Slow, tmp_path: Path) -> None:
    """The one that has been idle longest gives way; a busy one never does."""
    path = str(tmp_path / "c")
    threads = threading.active_count()
    with Control(path, slow.machine) as requests:
        busy = connected(path)
        busy.sendall(line(path=str(tmp_path / "a")))
        assert slow.begun.wait(60)
        idle = []
        for number in range(3 * control.CLIENTS_MAX):
            idle.append(connected(path))
            until(lambda wanted=number: bool(requests._server._clients) or wanted < 0)  # type: ignore[misc]
        assert idle[0].recv(1) == b""
        idle[-1].sendall(b"nonsense\n")
        assert b"error" in idle[-1].recv(1000)
        assert threading.active_count() <= threads + 1 + 2 * control.CLIENTS_MAX
        slow.go.set()
        assert busy.recv(100) == b"{}\n"
        for sock in (*idle, busy):
            sock.close()
    assert not os.path.exists(path)


def test_a_client_that_takes_no_answer(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.3)
    path = str(tmp_path / "c")
    with Control(path, slow.machine) as requests, connected(path) as sock:
        sock.settimeout(0.2)
        with pytest.raises(OSError):
            while True:
                sock.sendall(b"x\n" * 1000)
        until(lambda: not requests._server._clients)


def test_the_end_with_a_request_in_the_queue(slow: Slow, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    requests = Control(path, slow.machine)
    first, second = connected(path), connected(path)
    first.sendall(line(path=str(tmp_path / "first")))
    assert slow.begun.wait(60)
    second.sendall(line(path=str(tmp_path / "second")))
    until(lambda: sum(client.busy for client in requests._server._clients.values()) == 2)
    closing = threading.Thread(target=requests.close)
    closing.start()
    assert second.recv(100) == b""
    slow.go.set()
    closing.join(60)
    assert not closing.is_alive()
    assert first.recv(100) == b"{}\n"  # the one under way is answered
    assert slow.made == ["first"]
    first.close()
    second.close()


@pytest.mark.parametrize(
    "says",
    [
        b"[" * 200_000, b'{"snapshot":' * 50_000, b"9" * 100_000, b"\xff\xfe", b"null", b"[]",
        b'{"snapshot": null}', b'{"snapshot": []}', b'{"snapshot": {}}',
        b'{"snapshot": {"path": 1}}', b'{"snapshot": {"path": "a\\u0000b"}}',
        b'{"snapshot": {"path": "\\ud800"}}', b'{"snapshot": {"path": "x", "track": 1}}',
        b'{"snapshot": {"path": "x", "base": "\\u0000"}}', b'{"snapshot": {"path": ""}}',
        b'{"snapshot": {"path": "' + b"y" * 100_000 + b'"}}',
        b'{"snapshot": {"path": "x", "disks": "' + b"y" * 100_000 + b'"}}',
        b'{"snapshot": {"path": "x", "machine": {}}}', b'{"resize": null}', b'{"resize": {}}',
        b'{"resize": {"disk": [], "size": 1}}', b'{"resize": {"disk": "blk0", "size": 1e999}}',
        b'{"resize": {"disk": "blk0", "size": true}}',
        b'{"resize": {"disk": "' + b"z" * 100_000 + b'"}}',
    ],
    ids=lambda says: says[:40].decode(errors="replace"),
)  # fmt: skip
def test_every_request_is_answered_in_a_line(
    says: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none ends its thread with a traceback, or costs the machine anything."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "c")
    with bare_machine("1: hlt; jmp 1b") as machine:
        machine.start()
        with Control(path, machine), connected(path) as sock:
            sock.sendall(says + b"\n")
            with sock.makefile("rb") as stream:
                answer = stream.readline()
            told = json.loads(answer)
            assert set(told) == {"error", "status"} and told["status"] in (2, 69), told
            assert "\n" not in told["error"]
            ask(path, {"snapshot": {"path": str(tmp_path / "a")}})  # others are served
            assert machine.state == "running"
    assert failed == []


@pytest.mark.parametrize(
    "says",
    [
        b"", b"nonsense\n", b"[1]\n", b"7\n", b"[" * 100_000 + b"\n", b"x" * (3 << 20),
        b'{"error": {"a": 1}}\n', b'{"error": "a\\nb", "status": "x"}\n',
        b'{"error": "no", "status": 99999}\n', b'{"error": "no", "status": 0}\n',
    ],
    ids=lambda says: says[:40].decode(errors="replace"),
)  # fmt: skip
def test_a_machine_that_lies_to_who_asks(says: bytes, tmp_path: Path) -> None:
    """A monitor that its guest has taken over still has its socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "c"))
    listener.listen()

    def serve() -> None:
        with listener.accept()[0] as sock, suppress(OSError):
            sock.recv(4096)
            sock.sendall(says)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(VmmError) as raised:
        ask(str(tmp_path / "c"), {"snapshot": {}})
    assert "\n" not in str(raised.value) and 0 < raised.value.exit_status < 128
    thread.join()
    listener.close()
