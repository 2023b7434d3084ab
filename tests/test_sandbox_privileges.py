"""vmm/sandbox/privileges.py: capabilities and no_new_privs of a thread."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.confined import in_process, in_thread, outcome
from vmm.sandbox import privileges

pytestmark = pytest.mark.needs_kvm  # in both lanes: two kernels

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs capabilities to drop")
CAP_CHOWN, CAP_NET_ADMIN = 0, 12


def status(thread: str = "thread-self") -> dict[str, str]:
    """/proc's lines of a thread."""
    lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_no_new_privs_is_the_threads() -> None:
    def confined() -> tuple[bool, str]:
        privileges.no_new_privs()
        return privileges.has_no_new_privs(), status()["NoNewPrivs"]

    assert in_thread(confined) == (True, "1")
    assert not privileges.has_no_new_privs()


def test_the_sets_are_read_as_proc_has_them() -> None:
    lines = status()
    expected = tuple(int(lines[name], 16) for name in ("CapEff", "CapPrm", "CapInh"))
    assert privileges.capabilities() == expected


@root_only
def test_all_of_them_are_dropped_from_every_set(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    def confined() -> tuple[list[str], str]:
        privileges.drop_capabilities()
        lines = status()
        names = ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")
        return [lines[name] for name in names], outcome(lambda: os.chown(file, 1, 1))

    assert in_thread(confined) == (["0" * 16] * 5, "EPERM")
    os.chown(file, 1, 1)


@root_only
def test_some_are_kept_and_a_program_gets_no_more() -> None:
    def confined() -> tuple[int, dict[str, str]]:
        privileges.no_new_privs()
        privileges.drop_capabilities([CAP_CHOWN])
        reader, writer = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_CLOSE, reader)]
        argv = ["cat", "/proc/self/status"]
        os.posix_spawn("/bin/cat", argv, {}, file_actions=actions)
        os.close(writer)
        with open(reader) as output:
            lines = dict(line.rstrip("\n").split(":\t", 1) for line in output if ":\t" in line)
        os.wait()
        return privileges.capabilities()[0], lines

    effective, program = in_thread(confined)
    assert effective == 1 << CAP_CHOWN
    assert {program[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {f"{1 << CAP_CHOWN:016x}"}
    assert program["NoNewPrivs"] == "1"


def test_a_process_without_any_may_drop_them() -> None:
    def confined() -> str:
        privileges.drop_capabilities()
        privileges.drop_capabilities()
        return status()["CapEff"]

    assert in_thread(confined) == "0" * 16


@root_only
def test_namespaces() -> None:
    def confined() -> tuple[str, bool]:
        before = os.readlink("/proc/self/ns/uts")
        privileges.unshare(privileges.CLONE_NEWUTS | privileges.CLONE_NEWIPC)
        socket.sethostname("confined")
        return socket.gethostname(), os.readlink("/proc/self/ns/uts") != before

    name = socket.gethostname()
    assert in_process(confined)[0] == ("confined", True)
    assert socket.gethostname() == name
