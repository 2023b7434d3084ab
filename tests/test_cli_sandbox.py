"""vmm/cli/sandbox.py: what a taken-over `vmm run` can still do; probes from inside of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import intruder, tiny
from tests.support.intruder_targets import targets
from tests.support.ordinary_user import ordinary_user
from vmm.sandbox import landlock, privileges, seccomp

pytestmark = [
    pytest.mark.needs_kvm,  # in both lanes: two kernels, two versions of Landlock
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not landlock.abi() or not seccomp.available(),
        reason="this kernel has no Landlock, or no seccomp",
    ),
]

CALL, FILE = "EPERM", "EACCES"
"""What refuses: the list of system calls, or Landlock."""
EXPECTED = {
    "read a file": FILE,
    "read /etc/passwd": FILE,
    "read the kernel again": FILE,
    "list a directory": FILE,
    "write a file": FILE,
    "truncate a file": CALL,
    "make a file": FILE,
    "make a nameless file": FILE,
    "change Python's own files": FILE,
    "make a directory": CALL,
    "make what looks like a snapshot": CALL,
    "remove a file": CALL,
    "rename a file": CALL,
    "link a file": CALL,
    "make a symbolic link": CALL,
    "make a FIFO": CALL,
    "change a file's mode": CALL,
    "change a file's owner": CALL,
    "set an attribute": CALL,
    "change directory": CALL,
    "open /dev/kvm": FILE,
    "open /dev/net/tun": FILE,
    "open /dev/mem": FILE,
    "open a path of 5,000 bytes": "ENAMETOOLONG",
    "connect by TCP": CALL,
    "send by UDP": CALL,
    "connect by IPv6": CALL,
    "connect a Unix socket": CALL,
    "connect an abstract socket": CALL,
    "send to a Unix socket": CALL,
    "a pair of datagram sockets": CALL,
    "connect by vsock": CALL,
    "open a packet socket": CALL,
    "open a netlink socket": CALL,
    "bind a Unix socket": CALL,
    "execute a program": CALL,
    "spawn a program": CALL,
    "fork": CALL,
    "clone3": "ENOSYS",
    "signal a process": CALL,
    "signal every process": CALL,
    "signal the parent": CALL,
    "signal a process by a pidfd": CALL,
    "have signals sent to a process": CALL,
    "read another's memory": FILE,
    "look at another's descriptors": FILE,
    "read another's environment": FILE,
    "limit another": CALL,
    "make another machine": CALL,
    "type on the terminal": CALL,
    "memory to write and execute": CALL,
    "make memory executable": CALL,
    "become another user": CALL,
    "get capabilities": CALL,
    "set the host's name": CALL,
    "set the clock": CALL,
}
"""Probes of tests/support/intruder.py, and how each ends. docs/security.md has the table."""
DEADLY = [name for name in intruder.PROBES if name not in EXPECTED]
"""Those that end the process by SIGSYS."""
BY_THE_BROKER = {
    "make a directory": FILE,
    "make what looks like a snapshot": FILE,
    "remove a file": FILE,
    "rename a file": FILE,
}
"""Where there is a broker, it leaves these to the kernel, and Landlock refuses them."""
ABSENT = ("ENOENT", "ENODEV", "ENXIO", "EAFNOSUPPORT", "ENOTSUP")
"""Beside these, a device, protocol or kind of file (on overlayfs) that this host does not have."""


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What there is to be attacked."""
    with targets(tmp_path) as found:
        yield found


def intrude(
    facts: dict[str, Any], probes: list[str], *words: str, snapshot: Path | None = None
) -> tuple[dict[str, Any], int, str]:
    """What became of each probe, the command's status, and what it said. With `snapshot`, of ECHO,
    that is restored."""
    ours, theirs = os.pipe()
    told = json.dumps({**facts, "probes": probes})
    argv = [sys.executable, "-m", "tests.support.intruder", str(theirs), told]
    if snapshot is None:
        argv += ["run", facts["kernel"], "--memory", "16M", *words]
    else:
        argv += ["restore", str(snapshot), *words]
    with open(ours) as pipe:
        done = subprocess.run(
            argv, pass_fds=[theirs], env=tiny.environment(), input="q",
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        os.close(theirs)
        return dict(json.loads(line) for line in pipe), done.returncode, done.stderr


def compare(found: dict[str, Any], expected: dict[str, str], elsewhere: int = 0) -> None:
    """`elsewhere`: how many threads there were before."""
    threads = found.pop("threads")
    assert found.pop("elsewhere") == [FILE] * elsewhere
    assert threads and all(each == ["2", "1", "0" * 16, "0" * 16] for each in threads)
    wrong = {
        name: (result, expected[name])
        for name, result in found.items()
        if result != expected[name]
        and not (result in ABSENT and ("/dev/" in name or "open a" in name or "nameless" in name))
    }
    assert not wrong
    assert found.keys() == expected.keys()


def test_every_probe_is_refused(facts: dict[str, Any]) -> None:
    """A machine that has nothing opened later: no broker."""
    found, status, said = intrude(facts, list(EXPECTED))
    assert status == 9
    # Python from 3.12 on warns of a fork beside threads: the probe's.
    said = "".join(line for line in said.splitlines(True) if "DeprecationWarning" not in line)
    assert said == "vmm: the guest wrote 9 to the exit port (status 9)\n"
    compare(found, EXPECTED)


def test_every_probe_is_refused_beside_a_broker(facts: dict[str, Any], tmp_path: Path) -> None:
    """And with every kind of device: their threads and their descriptors are of no more use."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    found, status, said = intrude(
        facts, list(EXPECTED), "--control", str(tmp_path / "control"),
        "--vsock", f"cid=3,path={tmp_path}/vsock", "--port", f"name=p,socket={tmp_path}/port",
        "--drive", f"{disk},format=raw",
        "--rng", "--balloon=0",
    )  # fmt: skip
    assert status == 9, said
    compare(found, {**EXPECTED, **BY_THE_BROKER})
    assert not [name for name in ("control", "vsock", "port") if (tmp_path / name).exists()]


def test_restored_machines(facts: dict[str, Any], tmp_path: Path) -> None:
    """Their threads that watch the snapshot's files, or who hands over pages, are there before."""
    control, snapshot = tmp_path / "control", tmp_path / "snapshot"
    kernel = tiny.kernel(tmp_path, tiny.ECHO)
    argv = tiny.command("run", kernel, "--memory", "16M", "--control", str(control))
    with subprocess.Popen(
        argv, env=tiny.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        done = tiny.run("snapshot", str(snapshot), "--control", str(control), "--stop")
        assert done.returncode == 0, done.stderr
        assert process.wait(60) == 0
    for words, threads in (([], 1), (["--pages", "uffd"], 1)):
        found, status, said = intrude(facts, list(EXPECTED), "-v", *words, snapshot=snapshot)
        assert status == 7 and "sandbox: without" not in said, said
        compare(found, {**EXPECTED, **BY_THE_BROKER}, threads)


def test_without_a_sandbox_they_succeed(facts: dict[str, Any]) -> None:
    """The probes themselves: what is refused above is possible otherwise."""
    probes = [
        "read a file", "list a directory", "connect by TCP", "connect a Unix socket",
        "connect an abstract socket", "spawn a program", "fork", "read another's environment",
        "memory to write and execute", "make another machine",
    ]  # fmt: skip
    found, status, _ = intrude(facts, probes, "--sandbox", "off")
    assert status == 9
    assert {name: found[name] for name in probes} == dict.fromkeys(probes, "ok")


@pytest.mark.parametrize("probe", DEADLY)
@pytest.mark.one_lane
def test_calls_that_nobody_makes_by_accident_end_it(facts: dict[str, Any], probe: str) -> None:
    found, status, _ = intrude(facts, [probe])
    assert (found, status) == ({}, -31)  # SIGSYS


def test_one_of_them_in_each_lane(facts: dict[str, Any]) -> None:
    assert intrude(facts, ["use io_uring"])[:2] == ({}, -31)


# --- the option ---------------------------------------------------------------------------------


def test_there_are_three_levels(facts: dict[str, Any]) -> None:
    done = tiny.run("run", facts["kernel"], "--sandbox", "maybe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vmm: --sandbox 'maybe' is not one of on, off, strict\n"


def test_strict_has_everything(facts: dict[str, Any]) -> None:
    found, status, _ = intrude(facts, list(EXPECTED), "--sandbox", "strict")
    assert status == 9
    compare(found, EXPECTED)


@pytest.mark.parametrize("level", ["on", "strict"])
def test_an_ordinary_user(level: str) -> None:
    with ordinary_user() as user:
        there = user.home / "there"
        there.mkdir()
        (there / "secret").write_text("kept")
        (there / "directory").mkdir()
        facts = {
            "kernel": tiny.kernel(there, tiny.exits(9)), "secret": str(there / "secret"),
            "directory": str(there / "directory"), "victim": os.getpid(), "tcp": 9,
            "unix": str(there / "socket"), "abstract": "\0vmm-nobody", "probes": list(EXPECTED),
        }  # fmt: skip
        for path in (there, *there.iterdir()):
            shutil.chown(path, user.name, user.name)
        done = user.run(
            [
                *(user.python, "-m", "tests.support.intruder", "1", json.dumps(facts), "run"),
                *(facts["kernel"], "--memory", "16M", "--sandbox", level),
            ]
        )
        assert done.returncode == 9, done.stderr
        compare(dict(json.loads(line) for line in done.stdout.splitlines()), EXPECTED)


def test_strict_refuses_what_takes_a_process_outside(facts: dict[str, Any], tmp_path: Path) -> None:
    control = tmp_path / "control"
    done = tiny.run("run", facts["kernel"], "--sandbox", "strict", "--control", str(control))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("vmm: --sandbox strict: --control ") and "\n" not in done.stderr[:-1]
    )
    assert not control.exists()


@pytest.mark.parametrize("missing", ["landlock", "seccomp", "namespaces"])
def test_what_a_host_does_not_give_is_told(
    missing: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    """A kernel that lacks it is a kernel whose calls fail: another filter has them do so."""
    calls = {"landlock": [444], "seccomp": [317], "namespaces": [272]}[missing]
    script = tmp_path / "without.py"
    script.write_text(
        "import errno, sys\n"
        "from vmm import libc\n"
        "real = libc.syscall\n"
        "def syscall(number, *arguments):\n"
        f"    if number in {calls}:\n"
        "        raise OSError(errno.ENOSYS if number != 272 else errno.EPERM, 'no')\n"
        "    return real(number, *arguments)\n"
        "libc.syscall = syscall\n"
        "from vmm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "run", facts["kernel"], "--memory", "16M", *words],
            env=tiny.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    word = {"landlock": "Landlock", "seccomp": "seccomp", "namespaces": "namespaces"}[missing]
    done = run("-v")
    assert done.returncode == 9
    assert f"vmm: sandbox: without {word}: " in done.stderr
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (9, 1)
    done = run("--sandbox", "strict")
    assert done.returncode == 2
    assert done.stderr.startswith(f"vmm: --sandbox strict: {word}: ")
    assert done.stderr.count("\n") == 1
    assert privileges.has_no_new_privs() is False  # nor has it reached this process


def test_under_somebody_elses_supervision(facts: dict[str, Any], tmp_path: Path) -> None:
    """As in some containers: the kernel has one supervisor a process, so there can be no broker,
    and what it would do goes on being done."""
    script = tmp_path / "supervised.py"
    script.write_text(
        "import sys\n"
        "from vmm.sandbox import privileges, seccomp\n"
        "from vmm.sandbox.numbers import NUMBERS\n"
        "privileges.no_new_privs()\n"
        "calls = dict.fromkeys(NUMBERS, ())\n"
        "calls.pop('acct')\n"
        "others = {'acct': seccomp.NOTIFY}\n"
        "program = seccomp.compile_filter(calls, seccomp.ALLOW, others)\n"
        "listener = seccomp.restrict(program, notify=True)\n"
        "from vmm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    socket_path = tmp_path / "vsock"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "run", facts["kernel"], "--memory", "16M", *words],
            env=tiny.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    done = run("-v")
    assert (done.returncode, "sandbox: without" in done.stderr) == (9, False)
    done = run("-v", "--vsock", f"cid=3,path={socket_path}")
    assert done.returncode == 9
    assert "vmm: sandbox: without Landlock and " in done.stderr
    assert not socket_path.exists()


def test_what_the_sandbox_may_have_refused_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import vmm.cli

    def refused(args: list[str]) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(vmm.cli, "_command", refused)
    assert vmm.cli.main(["run"]) == 70
    assert capfd.readouterr().err.endswith(
        "vmm: where the sandbox is in the way of something, --sandbox off goes on without it\n"
    )
