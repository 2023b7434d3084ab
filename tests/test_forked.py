"""vmm/forked.py: a child that is forked keeps nothing of its parent's machines."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.bare import DriverOn, until
from vmm import Machine, MachineConfig, StateError
from vmm.block.raw import RawImage

pytestmark = [
    pytest.mark.needs_kvm,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@contextmanager
def forked(child: Callable[[], None], fork: Callable[[], int] = os.fork) -> Iterator[int]:
    """A child that calls `child`, then sleeps; it is killed on leaving. It says when it is there:
    what is given is the end of a pipe that reads what it wrote."""
    read, write = os.pipe()
    pid = fork()
    if not pid:
        try:
            child()
            os.write(write, b".")
        except BaseException as err:
            os.write(write, f"{type(err).__name__}: {err}".encode())
        while True:
            time.sleep(60)
    os.close(write)
    try:
        yield read
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


def nothing() -> None:
    """A child that just lives on."""


def machine(**options: object) -> Machine:
    return Machine(MachineConfig(memory=16 << 20, **options))  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.img").write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"drives": ["d.img"]},
        {"drives": ["d.img,readonly"]},
        {"drives": ["d.img,snapshot"]},
        {"vsock": "cid=9,path=v.sock", "ports": ["name=p,socket=p.sock"]},
        pytest.param({"nets": [f"tap=vmmf{os.getpid() % 10000}"]}, marks=pytest.mark.native_only),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_it_held_is_free_after_close(options: dict[str, object], place: Path) -> None:
    m = machine(**options)
    with forked(nothing) as said:
        assert os.read(said, 100) == b"."
        m.close()
        with machine(**options):
            pass


def descriptors(pid: str) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return [link for link in links if "kvm-vm" in link or link.endswith("d.img") or "tun" in link]


def test_the_child_has_closed_machines_and_no_descriptors(place: Path) -> None:
    m = machine(drives=["d.img"])
    held = descriptors("self")
    assert len(held) == 2

    def child() -> None:
        assert m.state == "closed"
        for call in (m.start, m.pause, m.stop, m.resume):
            with pytest.raises(StateError, match="closed"):
                call()
        m.close()
        with m:
            pass
        assert descriptors("self") == []

    with forked(child) as said:
        assert os.read(said, 1000) == b"."
        # The parent's goes on.
        assert m.state == "created"
        assert descriptors("self") == held
        with pytest.raises(Exception, match="another process uses this image"):
            machine(drives=["d.img"])
    m.close()


def test_a_child_that_leaves_the_block_takes_nothing_away(place: Path) -> None:
    """As a program whose child raises, or exits as a program does."""
    with machine(vsock="cid=9,path=v.sock", ports=["name=p,socket=p.sock"]) as m:
        pid = os.fork()
        if not pid:
            try:
                with m:
                    raise SystemExit(0)
            except SystemExit:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert sorted(os.listdir(place)) == ["d.img", "p.sock", "v.sock"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("p.sock")
    assert os.listdir(place) == ["d.img"]


def test_clients_see_the_end(place: Path) -> None:
    """Of a socket port that a guest's driver serves."""
    m = machine(ports=["name=p,socket=s.sock"])
    with DriverOn(m) as driver, socket.socket(socket.AF_UNIX) as client:
        driver.start()
        client.settimeout(20)
        client.connect("s.sock")
        console = m.platform.hvc
        assert console is not None
        port = console.ports[1]
        assert port is not None
        until(lambda: port.connected)
        with forked(nothing) as said:
            assert os.read(said, 1) == b"."
            m.close()
            with suppress(ConnectionResetError):
                assert client.recv(10) == b""


def test_a_fork_that_python_does_not_see_keeps_no_lock(place: Path) -> None:
    """A C library's; the open file is the child's, too."""
    image = RawImage("d.img")
    libc = ctypes.PyDLL(None)
    with forked(nothing, libc.fork) as said:
        assert os.read(said, 1) == b"."
        with pytest.raises(Exception, match="another process"):
            RawImage("d.img")
        image.close()
        RawImage("d.img").close()


def test_a_child_may_have_machines_of_its_own(place: Path) -> None:
    m = machine(drives=["d.img,readonly"])

    def child() -> None:
        with machine(drives=["d.img,readonly"]) as own:
            assert own.state == "created"

    with forked(child) as said:
        assert os.read(said, 1000) == b"."
    assert m.state == "created"
    m.close()
