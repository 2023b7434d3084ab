"""vmm/virtio/unix.py: sockets in directories with long names, and where there is no directory."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import images, tiny
from tests.support.blk_backend import BlkBackend
from vmm import Machine, MachineConfig
from vmm.block.vhost_user import VhostUserBlk
from vmm.cli import control
from vmm.errors import HostError, UsageError
from vmm.net.config import Net
from vmm.virtio import unix
from vmm.virtio.fs import Share

LONG = "w" * 120


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A directory whose name is longer than a socket's address."""
    directory = tmp_path / LONG
    directory.mkdir()
    return directory


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    with unix.reachable(str(path)) as name:
        listener.bind(name)
    listener.listen()
    return listener


def test_a_long_path_is_listened_on_and_connected_to(long: Path) -> None:
    path = str(long / "sock")
    before = sorted(os.listdir("/proc/self/fd"))
    listener, identity = unix.listen(path, "--port x")
    with pytest.raises(UsageError, match="in use by another process"):
        unix.listen(path, "--port x")
    with socket.socket(socket.AF_UNIX) as client:
        unix.connect(client, path)
        listener.accept()[0].close()
    listener.close()
    again, identity = unix.listen(path, "--port x")  # a stale one is replaced
    again.close()
    unix.remove(path, identity)
    assert list(long.iterdir()) == []
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("d/" + "x" * 86, ""),  # short enough as it is
        ("d" * 100 + "/" + "x" * 85, ""),
        ("d" * 100 + "/" + "x" * 86, "86 bytes are too long for a socket's name; at most 107, or"),
        ("x" * 108, "108 bytes are too long"),
        ("d" * 107 + "/", "108 bytes are too long"),
    ],
)
def test_what_no_socket_can_be_called(path: str, says: str) -> None:
    if not says:
        unix.check_path("--port x", path)
        return
    with pytest.raises(UsageError, match=rf"^--port x: {says}"):
        unix.check_path("--port x", path)


def test_a_back_end_and_a_network_peer(long: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    back = BlkBackend(tmp_path / "disk.img", tmp_path / "disk.sock")
    try:
        (tmp_path / "disk.sock").rename(long / "disk.sock")
        VhostUserBlk(str(long / "disk.sock")).open(0).close()
    finally:
        back.kill()
    with listening(long / "net") as listener:
        card = Net.parse(f"socket={long}/net").open(0)
        assert card is not None
        listener.accept()[0].close()
        card.close()
    with pytest.raises(UsageError, match=r"No such file or directory"):
        Net.parse(f"socket={long}/none").open(0)
    with pytest.raises(HostError, match="No such file or directory; start the machine with"):
        control.ask(str(long / "none"), {})


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_machine_with_long_paths_everywhere(long: Path, tmp_path: Path) -> None:
    """Its own sockets, and those that its helpers take."""
    image = images.make(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    shares = [f"{tmp_path},tag=t"] if os.geteuid() == 0 else []
    config = MachineConfig(
        tiny.kernel(tmp_path, tiny.COUNTING), memory="16M", vsock=f"cid=3,path={long}/v",
        ports=[f"name=a,socket={long}/p"], drives=[f"{image},format=qcow2"], shares=shares,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(long))
        with Machine(config) as machine:
            machine.start()
            assert sorted(path.name for path in long.iterdir()) == ["p", "v"]
            for name in ("p", "v"):
                with socket.socket(socket.AF_UNIX) as client:
                    unix.connect(client, str(long / name))
    assert list(long.iterdir()) == []


def _none(place: Path) -> str:
    return str(place / "none")


def _file(place: Path) -> str:
    (place / "file").touch()
    return str(place / "file")


def _readonly(place: Path) -> str:
    return "/proc"


@pytest.mark.parametrize("make", [_none, _file, _readonly])
def test_no_directory_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], str]
) -> None:
    """Another is taken."""
    monkeypatch.setenv("TMPDIR", make(tmp_path))
    with socket.socket(socket.AF_UNIX) as sock:
        with unix.bound_for_now(sock) as path:
            sock.listen()
            assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        assert not os.path.exists(os.path.dirname(path))


def test_nowhere_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(unix, "TEMPORARY", ("/proc",))
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    with pytest.raises(HostError, match=r"/none: No such file or directory; have TMPDIR name a d"):
        Share(str(tmp_path / "shared"), tag="x").open()
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_few_descriptors(tmp_path: Path) -> None:
    """However many there are: it runs, or one line says what has run out; nothing is left."""
    image = images.make(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    kernel = str(tiny.kernel(tmp_path, tiny.exits(0)))
    words = ["run", "--memory", "16M", "--console", "none", "--drive", f"{image},format=qcow2"]
    if os.geteuid() == 0:
        (tmp_path / "shared").mkdir()
        words += ["--fs", f"{tmp_path}/shared,tag=s"]
    told = 0
    for most in range(12, 52, 3):
        done = subprocess.run(
            [sys.executable, "-m", "vmm", *words, kernel],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),  # type: ignore[misc]
        )  # fmt: skip
        assert "Traceback" not in done.stderr, (most, done.stderr)
        assert done.returncode in (0, 2, 69), (most, done.returncode, done.stderr)
        if done.returncode:
            told += 1
            assert done.stderr.count("\n") == 1, (most, done.stderr)
            assert done.stderr.startswith("vmm: "), (most, done.stderr)
        assert not list(tmp_path.glob("vmm-*")), most
    assert told


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_a_socket_is_for_its_user_only(tmp_path: Path, mask: int) -> None:
    """From the moment there is one; whatever the umask."""
    before = os.umask(mask)
    try:
        listener, identity = unix.listen(str(tmp_path / "x"), "--vsock path=x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600 & ~mask
    listener.close()
    unix.remove(str(tmp_path / "x"), identity)
