"""The agent in a Linux guest: from the first moment of user space, and after a switch_root."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_agent_copy import listing, source
from vmm import AgentError, Machine, MachineConfig
from vmm.testing.initrds import busybox
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

__all__ = ["source"]

COMMANDS = 200
AT_ONCE = 20
SIZE = int(os.environ.get("VMM_EXEC_MIB", "8"))
"""MiB each way; 100 take 11 s in the nested lane."""
MIB = 1 << 20
INIT = """
read line </dev/ttyS0
mkdir /new && mount -t tmpfs new /new
cp -a /bin /new/bin && mkdir /new/dev /new/proc /new/tmp && touch /new/this-is-new
cat > /new/init <<'END'
#!/bin/sh
mount -t proc proc /proc; mount -t devtmpfs dev /dev
read line </dev/ttyS0
poweroff -f
END
chmod +x /new/init
exec switch_root /new /init
"""


@pytest.fixture
def machine(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> Machine:
    initrd = make_initrd(INIT, kernel=cloud_kernel)
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=850, cpus=2,
        agent=True,
    )  # fmt: skip
    return Machine(config)


def test_commands_and_files(
    machine: Machine, cloud_kernel: Kernel, source: Path, tmp_path: Path
) -> None:
    with machine as m:
        m.start()
        with timed("the first command"):
            said = m.run(["/bin/busybox", "uname", "-r"], text=True, check=True).stdout
        assert said == f"{cloud_kernel.release}\n"
        many_commands(m)
        at_once(m)
        data_both_ways(m)
        ends(m)
        flood(m)
        files(m, source, tmp_path)
        with timed("a switch_root"):
            after_a_switch_root(m)


class timed:
    """Says how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        print(f"{self.what}: {time.monotonic() - self.begin:.1f} s")


def many_commands(m: Machine) -> None:
    with timed(f"{COMMANDS} commands"):
        for number in range(COMMANDS):
            if number % 4 == 3:
                signum = (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV)[number % 3]
                done = m.run(["sh", "-c", f"echo {number}; echo err >&2; kill -{int(signum)} $$"])
                assert done.returncode == -signum
            else:
                done = m.run(["sh", "-c", f"echo {number}; echo err >&2; exit {number}"])
                assert done.returncode == number
            assert (done.stdout, done.stderr) == (f"{number}\n".encode(), b"err\n")


def at_once(m: Machine) -> None:
    data = [random.Random(number).randbytes(50_000) for number in range(AT_ONCE)]

    def one(number: int) -> subprocess.CompletedProcess[bytes]:
        # All are there before one goes on.
        script = (
            f"touch /tmp/at-{number}; while [ $(ls /tmp/at-* | wc -l) != {AT_ONCE} ]; do "
            f"sleep 0.1; done; cat; exit {number}"
        )
        return m.run(["sh", "-c", script], input=data[number])

    with timed(f"{AT_ONCE} at once"), ThreadPoolExecutor(AT_ONCE) as pool:
        for number, done in enumerate(pool.map(one, range(AT_ONCE))):
            assert (done.returncode, done.stdout) == (number, data[number])


def data_both_ways(m: Machine) -> None:
    piece = random.Random(1).randbytes(MIB)
    data = piece * SIZE
    with timed(f"{SIZE} MiB in"):
        said = m.run(["md5sum"], input=data, check=True).stdout
    assert said.split()[0].decode() == hashlib.md5(data).hexdigest()
    with timed(f"{SIZE} MiB out"):
        loop = f"i=0; while [ $i -lt {SIZE} ]; do cat /tmp/piece; i=$((i+1)); done"
        said = m.run(["sh", "-c", f"cat > /tmp/piece; {loop}"], input=piece, check=True).stdout
    assert hashlib.md5(said).digest() == hashlib.md5(data).digest()


def ends(m: Machine) -> None:
    """Timeouts, signals that are ignored, what does not start."""
    script = "trap '' TERM; sleep 1000 & echo $! $$; while :; do sleep 1000; done"
    with pytest.raises(subprocess.TimeoutExpired):
        m.run(["sh", "-c", script], timeout=3)
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    with m.popen(["sh", "-c", script], text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    with m.popen(["sh", "-c", script], text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.interrupt()
        assert process.wait() == 5
        assert process.stdout.read() == "interrupted\n"
    with pytest.raises(FileNotFoundError):
        m.run(["/no/such/program"])
    with pytest.raises(PermissionError):
        m.run(["/proc/cpuinfo"])
    with pytest.raises(FileNotFoundError):
        m.run(["true"], cwd="/no/such")


def flood(m: Machine) -> None:
    """Nobody reads for a while; others are served, and then it is all there."""
    with m.popen(["sh", "-c", "i=0; while [ $i -lt 400000 ]; do echo $i; i=$((i+1)); done"]) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == b"0\n"
        assert m.run(["echo", "served"]).stdout == b"served\n"
        for number in range(1, 60_000):
            assert p.stdout.readline() == b"%d\n" % number
        p.stdout.close()
        p.kill()


def files(m: Machine, source: Path, tmp_path: Path) -> None:
    with timed("a tree there and back"):
        m.put(source, "/tmp/there/with parents")
        m.get("/tmp/there/with parents", tmp_path / "back", filter="all")
    assert listing(tmp_path / "back") == listing(source)
    into = io.BytesIO()
    m.get("/proc/version", into)
    assert into.getvalue().startswith(b"Linux version ")
    with pytest.raises(FileNotFoundError, match="in the guest"):
        m.get("/no/such", tmp_path / "x")


def after_a_switch_root(m: Machine) -> None:
    """The agent serves the new root, and its connections end with the guest."""
    m.send("go on\n")
    limit = time.monotonic() + 300
    while not switched(m):
        assert time.monotonic() < limit, m.console.text()
        time.sleep(0.2)
    assert m.run(["sh", "-c", "cat > /here; cat /here"], input=b"new").stdout == b"new"
    m.put(io.BytesIO(b"newer"), "/here")
    process = m.popen(["sh", "-c", "cat /here; exec sleep 1000"])
    assert process.stdout is not None and process.stdout.read(5) == b"newer"
    m.send("go on\n")
    # A kernel that resets its devices first cuts the connection before it is off.
    with pytest.raises(AgentError, match=r"the guest powered off|the connection .* is lost"):
        process.wait()
    process.close()
    # The machine may not have ended yet when its connection has.
    assert m.wait(300).kind == "poweroff"
    with pytest.raises(AgentError, match="the guest powered off"):
        m.run(["true"])


def switched(m: Machine) -> bool:
    """Whether commands find the new root, and its init has begun; on the way there is nothing."""
    try:
        return m.run(["ls", "/this-is-new", "/proc/1/exe"]).returncode == 0
    except FileNotFoundError:
        return False


def test_a_root_without_an_init(cloud_kernel: Kernel, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(Path(busybox()).read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    (root / "bin" / "sh").symlink_to("busybox")
    config = MachineConfig(str(cloud_kernel.vmlinuz), root=str(root), append="quiet", timeout=250)
    with Machine(config) as m:
        m.start()
        mounts = m.run("busybox cat /proc/mounts", shell=True, text=True, check=True).stdout
        for mount in ("root / overlay rw", "proc /proc proc", "devpts /dev/pts devpts"):
            assert mount in mounts
        # What is left by its parent is process 1's to wait for.
        script = (
            "(busybox sleep 0.1 & echo $! > /left); "
            "while busybox kill -0 $(busybox cat /left); do :; done"
        )
        m.run(["sh", "-c", script], check=True, timeout=100, stderr=subprocess.DEVNULL)
        assert m.run(["sh", "-c", "echo x > /dev/null && echo y > /written"]).returncode == 0
        assert m.shutdown(timeout=100).kind == "poweroff"
    assert not (root / "written").exists()
