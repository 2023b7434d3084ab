"""vmm/sandbox/helper.py, vmm/child.py: what a helper program can still do, asked from inside."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, netns
from tests.support.bare import bare_machine, until
from tests.support.ordinary_user import ordinary_user
from vmm import HostError, Machine
from vmm.block import layers, storage_daemon
from vmm.block.drive import Drive
from vmm.child import Child
from vmm.errors import VmmError
from vmm.memory import userfault
from vmm.net.config import Net
from vmm.sandbox import helper, landlock, privileges
from vmm.sandbox.helper import Confinement
from vmm.snapshot import pager
from vmm.snapshot.store import Snapshot
from vmm.virtio.fs import Share

pytestmark = [
    pytest.mark.needs_kvm,  # in both lanes: their kernels have Landlock's ABI 7 and 2
    pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock"),
]

PROBE = """
import errno, json, os, socket, sys
image, secret, parent, victim, unix, tcp = sys.argv[1:7]
parent, victim, tcp = int(parent), int(victim), int(tcp)
from vmm import libc
from vmm.sandbox.numbers import NUMBERS
found = {}

def probe(name, function):
    try:
        function()
    except OSError as err:
        found[name] = errno.errorcode.get(err.errno, str(err))
    else:
        found[name] = "ok"

def call(name, *arguments):
    probe(name, lambda: libc.syscall(NUMBERS[name], *arguments))

def file(path, flags):
    return lambda: os.close(os.open(path, flags))

def connect(family, kind, address):
    def connected():
        with socket.socket(family, kind) as sock:
            sock.connect(address)
    return connected

directory = os.path.dirname(image)
probe("its image", file(image, os.O_RDWR))
probe("its image, truncated", lambda: os.close(os.open(image, os.O_RDWR | os.O_TRUNC)))
probe("a file beside it", file(secret, os.O_RDONLY))
probe("a file beside it, written", file(secret, os.O_WRONLY))
probe("its directory", lambda: os.listdir(directory))
probe("a new file", file(directory + "/new", os.O_CREAT | os.O_WRONLY))
probe("an unnamed file", file(directory, os.O_TMPFILE | os.O_RDWR))
probe("/etc/passwd", file("/etc/passwd", os.O_RDONLY))
probe("the home directory", lambda: os.listdir("/root"))
probe("/dev/shm", file("/dev/shm/vmm-probe", os.O_CREAT | os.O_WRONLY))
probe("/dev/kvm", file("/dev/kvm", os.O_RDWR))
for name in ("environ", "mem", "maps", "cmdline", "fd"):
    probe(f"the monitor's {name}", file(f"/proc/{parent}/{name}", os.O_RDONLY))
probe("another's environ", file(f"/proc/{victim}/environ", os.O_RDONLY))
probe("sysctl", file("/proc/sys/kernel/core_pattern", os.O_WRONLY))
probe("cgroups", lambda: os.listdir("/sys/fs/cgroup"))
probe("link", lambda: os.link(secret, directory + "/linked"))
probe("rename", lambda: os.rename(secret, directory + "/renamed"))
probe("unlink", lambda: os.unlink(image))
probe("symlink", lambda: os.symlink("/etc", directory + "/etc"))
probe("mkdir", lambda: os.mkdir(directory + "/made"))
probe("chmod", lambda: os.chmod(secret, 0o777))
probe("chown", lambda: os.chown(secret, 0, 0))
probe("utime", lambda: os.utime(secret))
probe("setxattr", lambda: os.setxattr(secret, "user.x", b"x"))
probe("truncate", lambda: os.truncate(secret, 0))
probe("mknod", lambda: os.mknod(directory + "/node"))
probe("TCP", connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", tcp)))
probe("UDP", connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 9)))
probe("IPv6", connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", tcp)))
probe("a Unix socket", connect(socket.AF_UNIX, socket.SOCK_STREAM, unix))
probe("an abstract socket", connect(socket.AF_UNIX, socket.SOCK_STREAM, "\\0" + unix))
probe("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close())
probe("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close())
probe("vsock", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM, 0).close())
for program in ("/bin/sh", "/bin/true", "/usr/bin/id", image):
    def run(program=program):
        pid = os.posix_spawn(program, [program, "-c", ":"], {})
        os.waitpid(pid, 0)
    probe("execute " + (program if program != image else "its image"), run)
probe("kill the monitor", lambda: os.kill(parent, 0))
probe("kill another", lambda: os.kill(victim, 0))
probe("limit the monitor", lambda: libc.syscall(NUMBERS["prlimit64"], parent, 7, 0, bytearray(16)))
probe("renice the monitor", lambda: os.setpriority(os.PRIO_PROCESS, parent, 0))
probe("affinity of the monitor", lambda: os.sched_setaffinity(parent, {0}))
probe("a user namespace", lambda: libc.syscall(NUMBERS["clone"], 0x10000000 | 17))
call("unshare", 0x10000000)
call("setns", 0, 0)
call("clone3", bytearray(88), 88)
call("mount", b"none\\0", b"/mnt\\0", b"tmpfs\\0", 0, 0)
call("umount2", b"/mnt\\0", 2)
call("chroot", b"/\\0")
call("pivot_root", b"/\\0", b"/\\0")
call("open_tree", -100, b"/\\0", 1)
call("ptrace", 16, parent)
call("process_vm_readv", parent, bytearray(16), 1, bytearray(16), 1, 0)
call("pidfd_getfd", 0, 0, 0)
call("init_module", 0, 0, b"\\0")
call("kexec_load", 0, 0, 0, 0)
call("bpf", 0, bytearray(64), 64)
call("perf_event_open", bytearray(64), 0, -1, -1, 0)
call("keyctl", 0, -3, 0)
call("userfaultfd", 1)
call("io_uring_setup", 1, bytearray(120))
call("open_by_handle_at", 0, bytearray(16), 0)
call("reboot", 0, 0, 0, 0)
call("shmget", 0, 4096, 0o1600)
call("setuid", 0)
for name, number in (("a call of tomorrow", 999), ("an x32 call", 0x40000000 | 39)):
    probe(name, lambda: libc.syscall(number))
descriptors = []
for fd in range(1024):
    try:
        os.fstat(fd)
    except OSError:
        continue
    descriptors.append(fd)
print(json.dumps({
    "found": found,
    "environment": sorted(os.environ),
    "descriptors": descriptors,
    "session": os.getsid(0) == os.getpid(),
}), flush=True)
"""
ALLOWED = {"its image", "its image, truncated"}
ENOSYS = {"clone3", "a call of tomorrow", "an x32 call"}


@pytest.fixture
def victim() -> Iterator[int]:
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


def ask(child: Child, read: int) -> dict[str, Any]:
    with open(read, "rb") as pipe:
        data = pipe.read()
    assert child.wait(60)
    assert data, child.text()
    return json.loads(data)  # type: ignore[no-any-return]


def probed(
    tmp_path: Path, victim: int, confine: Confinement, *, keeper: bool = True
) -> dict[str, Any]:
    """What PROBE tells from inside `confine`, with Python's own files to read besides."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    assert confine.files is not None
    confine.files = [*confine.files, *helper.python_files()]
    unix = str(tmp_path / "unix")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        listener.bind(unix)
        listener.listen()
        abstract.bind("\0" + unix)
        abstract.listen()
        read, write = os.pipe()
        words = [str(tmp_path / "d.qcow2"), str(secret), str(os.getpid()), str(victim), unix]
        child = Child(
            [sys.executable, "-c", PROBE, *words, str(tcp.getsockname()[1])],
            confine,
            stdout=write,
            keeper=keeper,
        )
        os.close(write)
        try:
            return ask(child, read)
        finally:
            child.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Confinement:
    """What qemu-storage-daemon is started with for an image."""
    images.make(tmp_path / "d.qcow2", "qcow2", 1 << 20)
    _, confine = storage_daemon.command(Drive(str(tmp_path / "d.qcow2"), format="qcow2"), 0)
    return confine


def test_from_inside_there_is_the_image_alone(
    tmp_path: Path, victim: int, daemon: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI_SECRET_TOKEN", "s3cret")
    monkeypatch.setenv("LC_TIME", "C")
    told = probed(tmp_path, victim, daemon)
    found = told["found"]
    print(json.dumps(found, indent=1))
    expected = dict.fromkeys(found, ("EACCES", "EPERM"))
    expected |= dict.fromkeys(ALLOWED, ("ok",)) | dict.fromkeys(ENOSYS, ("ENOSYS",))
    expected["setuid"] = ("ok",) if os.getuid() == 0 else ("EPERM",)
    assert {name: each for name, each in found.items() if each not in expected[name]} == {}
    assert len(found) > 70
    assert "CI_SECRET_TOKEN" not in told["environment"] and "HOME" not in told["environment"]
    assert {"PATH", "LC_TIME"} <= set(told["environment"])
    assert told["session"] and told["descriptors"] == [0, 1, 2]
    assert (tmp_path / "secret").read_text() == "s3cret"


def test_a_read_only_image_is_not_written(tmp_path: Path, victim: int) -> None:
    images.make(tmp_path / "d.qcow2", "qcow2", 1 << 20)
    drive = Drive(str(tmp_path / "d.qcow2"), format="qcow2", readonly=True)
    _, confine = storage_daemon.command(drive, 0)
    found = probed(tmp_path, victim, confine, keeper=False)["found"]
    assert found["its image"] == found["its image, truncated"] == "EACCES"


# --- the real ones --------------------------------------------------------------------------------


def field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for each in map(int, (task / "children").read_text().split()):
            found += [each, *descendants(each)]
    return found


def capabilities(pid: int) -> set[int]:
    """Those it has, or could get by running a program."""
    return {
        number
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")
        for number in range(64)
        if int(field(pid, name), 16) >> number & 1
    }


def opened(pid: int) -> list[str]:
    found = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return sorted(
        each for each in found if not each.startswith(("socket:", "pipe:", "anon_inode:"))
    )


def started(*, of: set[int]) -> dict[str, list[int]]:
    """The processes that are there and were not in `of`, by name."""
    found: dict[str, list[int]] = {}
    for pid in set(descendants(os.getpid())) - of:
        found.setdefault(field(pid, "Name"), []).append(pid)
    return found


KEEPER = {1}
"""CAP_DAC_OVERRIDE: root itself may not write in the topmost cgroup without it."""
FILES = {0, 1, 3, 6, 7}
"""CAP_CHOWN, DAC_OVERRIDE, FOWNER, SETGID, SETUID."""


def check(pid: int, secrets: str, kept: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    name = field(pid, "Name")
    assert field(pid, "NoNewPrivs") == "1", name
    assert field(pid, "Seccomp") == "2", name
    assert capabilities(pid) <= kept, name
    assert secrets not in Path(f"/proc/{pid}/environ").read_text(), name


def test_a_storage_daemon_has_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_SECRET_TOKEN", "s3cret")
    path = images.make(tmp_path / "d.qcow2", "qcow2", 1 << 20)
    for words in ("", ",snapshot"):
        before = set(descendants(os.getpid()))
        disk = Drive.parse(f"{path},format=qcow2{words}").open(0)
        try:
            found = started(of=before)
            assert set(found) == {"qemu-storage-da", "sh"}
            (daemon,), (keeper,) = found["qemu-storage-da"], found["sh"]
            check(daemon, "s3cret")
            check(keeper, "s3cret", KEEPER)
            assert [each for each in opened(daemon) if not each.startswith("/memfd:")] == [
                "/dev/null", str(path),
            ]  # fmt: skip
            assert {each for each in opened(keeper) if not each.startswith("/memfd:")} <= {
                "/dev/null"
            }
        finally:
            disk.close()
        assert set(descendants(os.getpid())) == before


@pytest.mark.parametrize("kind", ["backing file", "data file", "extent"])
def test_a_header_that_is_believed_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As if the look at the header before the daemon is started had missed a way to name a file."""
    secret, path = tmp_path / "secret", tmp_path / "evil"
    secret.write_bytes(b"s3cret".ljust(1 << 20, b"#"))
    format = "qcow2"
    if kind == "backing file":
        options = ["-b", str(secret), "-F", "raw"]
    elif kind == "data file":
        options = ["-o", f"data_file={tmp_path / 'data'}", "1M"]
    else:
        format, options = "vmdk", ["-o", "subformat=monolithicFlat", "1M"]
    create = ["qemu-img", "create", "-q", "-f", format, *options[:-1]]
    subprocess.run(
        [*create, *([options[-1], str(path)] if kind == "backing file" else [str(path), "1M"])],
        check=True,
    )

    def believed(drive: Drive, files: list[tuple[str, bool]]) -> list[dict[str, object]]:
        files.append((drive.path, True))
        file = {"driver": "file", "node-name": "file", "filename": drive.path}
        return [file, {"driver": drive.format, "node-name": layers.DISK, "file": "file"}]

    monkeypatch.setattr(layers, "nodes", believed)
    with pytest.raises(VmmError, match=r"Permission denied|Could not open"):
        Drive(str(path), format=format).open(0)
    # It is Landlock that refuses it: a daemon that may open everything does.
    monkeypatch.setattr(
        helper.Confinement, "_enter", lambda self, files, code: privileges.no_new_privs()
    )
    Drive(str(path), format=format).open(0).close()


def test_virtiofsd_keeps_what_acts_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI_SECRET_TOKEN", "s3cret")
    before = set(descendants(os.getpid()))
    device = Share(str(tmp_path), tag="x").open()
    try:
        found = started(of=before)
        assert set(found) == {"virtiofsd", "sh"}
        for pid in found["virtiofsd"]:
            check(pid, "s3cret", FILES)
            assert all(each.startswith(("/memfd:", "/dev/null")) or each in ("/", "/1/task")
                       for each in opened(pid))  # fmt: skip
        for pid in found["sh"]:
            check(pid, "s3cret", KEEPER)
    finally:
        device.close()
    assert set(descendants(os.getpid())) == before


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here")
def test_passt_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_SECRET_TOKEN", "s3cret")
    before = set(descendants(os.getpid()))
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip("addr add 10.7.0.2/24 dev out")
        netns.ip("link set out up")
        netns.ip("route add default via 10.7.0.1 dev out")
        card = Net.parse("user,forward=tcp:81:80").open(0)
        assert card is not None
        try:
            found = started(of=before)
            for pid in found.pop("sh", []):  # where it has a cgroup
                check(pid, "s3cret", KEEPER)
            ((pid,),) = found.values()
            assert field(pid, "Name").startswith("passt")
            # It tells that it is ready just before it has its own filter besides ours.
            until(lambda: field(pid, "Seccomp_filters") == "2")
            check(pid, "s3cret")
            assert field(pid, "Uid").split()[1] != "0"
            assert all(each.startswith(("/memfd:", "/dev/null")) for each in opened(pid))
            # The root that passt made: nothing is in it. (From outside, with our capabilities.)
            assert os.listdir(f"/proc/{pid}/root") == []
        finally:
            card.close()
    assert set(descendants(os.getpid())) == before


def test_a_uffd_handler_reads_the_snapshot_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.close(userfault.open_userfault())
    except HostError as err:
        pytest.skip(str(err))
    monkeypatch.setenv("CI_SECRET_TOKEN", "s3cret")
    with bare_machine("1: hlt; jmp 1b", memory=4 << 20) as machine:
        machine.snapshot(str(tmp_path / "full"))
        machine.snapshot(str(tmp_path / "diff"), base=str(tmp_path / "full"))
    before = set(descendants(os.getpid()))
    with Machine.restore(str(tmp_path / "diff"), pages="uffd") as machine:
        assert bytes(machine.memory.read(0, 16)) is not None
        for name, pids in started(of=before).items():
            for pid in pids:
                check(pid, "s3cret", KEEPER if name == "sh" else set())
    with Snapshot(str(tmp_path / "diff")) as snapshot:
        confine = pager._confinement(snapshot)
    reached = [path for path, _ in confine.files or () if str(path).startswith(str(tmp_path))]
    assert sorted(map(str, reached)) == [str(tmp_path / "diff"), str(tmp_path / "full")]


ORDINARY = """
import os, sys
sys.path.insert(0, ".")
os.environ["CI_SECRET_TOKEN"] = "s3cret"
from pathlib import Path
from tests.test_sandbox_helper import capabilities, check, descendants, field, started
from vmm.block.drive import Drive
from vmm.virtio.fs import Share
device = Share(sys.argv[1], tag="x").open()
disk = Drive(sys.argv[2], format="qcow2").open(0)
for pid in descendants(os.getpid()):
    name = field(pid, "Name")
    check(pid, "s3cret", {0, 1, 3, 6, 7} if name == "virtiofsd" else set())
    print(name, end=" ")
disk.close()
device.close()
print(descendants(os.getpid()))
"""


def test_an_ordinary_users_helpers(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("root makes an ordinary user")
    with ordinary_user() as user:
        share = user.home / "share"
        share.mkdir()
        image = images.make(user.home / "d.qcow2", "qcow2", 1 << 20)
        for path in (share, image):
            shutil.chown(path, user.name)
        done = user.run([user.python, "-c", ORDINARY, str(share), str(image)])
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == sorted(
            ["virtiofsd", "virtiofsd", "qemu-storage-da", "sh", "sh", "[]"]
        )


def test_root_serves_another_users_image(tmp_path: Path) -> None:
    """By CAP_DAC_OVERRIDE, which the daemon has then and only then; Landlock bounds it."""
    if os.geteuid():
        pytest.skip("needs root")
    private = tmp_path / "private"
    private.mkdir()
    path = images.make(private / "d.qcow2", "qcow2", 1 << 20)
    os.chown(path, 65534, 65534)
    os.chown(private, 65534, 65534)
    path.chmod(0o600)
    private.chmod(0o700)
    before = set(descendants(os.getpid()))
    disk = Drive(str(path), format="qcow2").open(0)
    try:
        (daemon,) = started(of=before)["qemu-storage-da"]
        assert capabilities(daemon) == {helper.CAP_DAC_OVERRIDE}
    finally:
        disk.close()


def test_one_that_cannot_be_confined_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as below sixteen Landlock domains, the most there may be."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    monkeypatch.setattr(landlock, "restrict", refuse)
    path = images.make(tmp_path / "d.qcow2", "qcow2", 1 << 20)
    before = set(descendants(os.getpid()))
    message = "qemu-storage-daemon cannot be started: this host does not let it be confined (Arg"
    with pytest.raises(HostError, match=re.escape(message)):
        Drive(str(path), format="qcow2").open(0)
    assert set(descendants(os.getpid())) == before
