"""Other users of the host: what they may read, what they may put in the way."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import images
from tests.support.bare import bare_machine
from vmm import HostError, Machine, UsageError
from vmm.block.drive import Drive
from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.block.vhost_user import VhostUserBlk
from vmm.cli import control
from vmm.cli.control import Control
from vmm.memory import userfault
from vmm.net import stream
from vmm.net.pcap import Capture
from vmm.virtio import unix
from vmm.virtio.console_ports import SocketPort
from vmm.virtio.vsock_host import VsockHost

ROOT = Path(__file__).resolve().parents[1]
HALTED = "1: hlt; jmp 1b"
SOMEBODY = 54321
"""A user id that nobody has."""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# --- what is made is for its user alone -----------------------------------------------------------


@pytest.mark.usefixtures("no_umask")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    host = VsockHost(str(tmp_path / "vsock"))
    port = SocketPort(1, "chat", str(tmp_path / "port"))
    capture = Capture(str(tmp_path / "pcap"))
    try:
        for name in ("vsock", "port", "pcap"):
            assert mode(tmp_path / name) == 0o600, name
    finally:
        host.close()
        port.close()
        capture.close()
    with socket.socket(socket.AF_UNIX) as sock, unix.bound_for_now(sock) as name:
        assert mode(Path(name).parent) == 0o700
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    overlay = Overlay(RawImage(str(tmp_path / "disk"), readonly=True), directory=str(tmp_path))
    assert stat.S_IMODE(os.fstat(overlay._fd).st_mode) == 0o600
    overlay.close()


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.usefixtures("no_umask")
def test_modes_of_what_a_machine_makes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with bare_machine(HALTED, console="none", drives=[str(disk)]) as m:
        with Control(str(tmp_path / "control"), m):
            assert mode(tmp_path / "control") == 0o600
        m.start()
        m.pause()
        m.snapshot(str(tmp_path / "snapshot"))
        m.faults.disk(0).volatile()
        m.faults.disk(0).power_cut_image(str(tmp_path / "cut"))
    assert mode(tmp_path / "cut") == 0o600
    assert mode(tmp_path / "snapshot") == 0o700
    for name in ("memory", "disk0"):
        assert mode(tmp_path / "snapshot" / name) == 0o600, name


# --- another user's sockets -----------------------------------------------------------------------


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory as /tmp is."""
    path = Path(tempfile.mkdtemp(prefix="vmm-public-", dir="/var/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def theirs(public: Path) -> Iterator[Path]:
    """A socket there that somebody else listens on, and that everybody may connect to."""
    if os.geteuid():
        pytest.skip("needs root, to be another user")
    path = public / "socket"
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.umask(0)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
            os.write(told, b"1")
            signal.pause()
        finally:
            os._exit(0)
    assert os.read(ready, 1) == b"1"
    yield path
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(told)


def as_vsock(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:  # what VsockHost does for the guest
        unix.connect(sock, path)


CALLERS: dict[str, Callable[[str], object]] = {
    "--vhost-user-blk": lambda path: VhostUserBlk(path).open(0),
    "--net socket=": lambda path: stream.connect(path, what="--net"),
    "--vsock": as_vsock,
    "vmm snapshot": lambda path: control.ask(path, {"snapshot": {}}),
}


@pytest.mark.parametrize("who", CALLERS)
def test_another_users_socket_in_a_public_directory(theirs: Path, who: str) -> None:
    with pytest.raises((UsageError, HostError, PermissionError)) as raised:
        CALLERS[who](str(theirs))
    assert f"user {SOMEBODY} listens there, in a directory that everybody" in str(raised.value)


def test_sockets_that_may_be_used(theirs: Path, tmp_path: Path, public: Path) -> None:
    with pytest.raises(PermissionError):
        as_vsock(str(theirs))
    theirs.parent.chmod(0o755)  # nobody else can put one there
    as_vsock(str(theirs))
    theirs.parent.chmod(0o1777)
    os.chown(public, SOMEBODY, -1)  # it is the directory's owner's
    as_vsock(str(theirs))
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(public / "ours"))
        ours.listen()
        as_vsock(str(public / "ours"))


def test_a_socket_cannot_be_had_where_another_user_has_one(theirs: Path) -> None:
    with pytest.raises(UsageError, match=r"^--port x: user 54321 listens there"):
        unix.listen(str(theirs), "--port x")


def test_a_directory_that_somebody_keeps_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may read a directory may lock it: it holds nobody up for ever."""
    monkeypatch.setattr(unix, "LOCKED_WITHIN", 0.3)
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_SH)
    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"^--port x: another process keeps the directory locked"):
        unix.listen(str(tmp_path / "s"), "--port x")
    assert time.monotonic() - begun < 30
    assert list(tmp_path.iterdir()) == []
    os.close(directory)
    listener, identity = unix.listen(str(tmp_path / "s"), "--port x")
    listener.close()
    unix.remove(str(tmp_path / "s"), identity)


# --- the current directory ------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory with modules of somebody else's, which leave `ran` there when they are taken."""
    directory = tmp_path / "trap"
    (directory / "vmm" / "snapshot").mkdir(parents=True)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('taken')\n"
    names = ("json", "os", "socket", "array", "select", "signal", "cffi", "sitecustomize")
    for name in (*(f"{name}.py" for name in names), "vmm/__init__.py"):
        (directory / name).write_text(code)
    return directory


def test_the_command_takes_no_module_from_there(trap: Path) -> None:
    command = Path(sys.executable).with_name("vmm")
    done = subprocess.run(
        [command, "run", "--help"], cwd=trap, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (trap.parent / "ran").exists()


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_no_helper_does(trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of a machine with all helpers, started in somebody else's directory."""
    image = images.make(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    (tmp_path / "share").mkdir()
    with bare_machine(HALTED, console="none") as m:
        m.start()
        m.pause()
        m.snapshot(str(tmp_path / "snapshot"))
    monkeypatch.chdir(trap)
    with bare_machine(
        HALTED, console="none", drives=[f"{image},format=qcow2"],
        shares=[f"{tmp_path / 'share'},tag=t"],
    ) as m:  # fmt: skip
        m.start()
    try:
        os.close(userfault.open_userfault())
    except HostError:
        pass
    else:
        with Machine.restore(str(tmp_path / "snapshot"), pages="uffd") as m:
            m.start()
    assert not (tmp_path / "ran").exists()


# --- sizes that a header claims -------------------------------------------------------------------


def test_an_overlay_of_a_disk_of_any_size() -> None:
    """Its bitmap is as large as the disk says that it is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "huge"
        path.touch()
        os.truncate(path, (1 << 60))
        with pytest.raises(HostError, match="is too large for an overlay, which takes 128 TiB"):
            Drive.parse(f"{path},snapshot").open(0)
