"""vmm/kvm/access.py: each reason a device cannot be opened has its own exact mend."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.doctor import examine, text  # text: nothing may be left to import in the child
from vmm.kvm import DEV_KVM, access

NOBODY = pwd.getpwnam("nobody")
FOR_ROOT = "sudo " if shutil.which("sudo") else "as root: "
"""How a user other than root is told a command."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


def problem_of(path: Path | str) -> tuple[str, str]:
    report = examine(str(path))
    assert not report.usable and not report.runs_linux
    told = text.render(report).partition("\nproblems\n")[2]
    assert told.count("mend:") == len(report.problems)
    return report.problems[0].what, report.problems[0].mend


def problem_for(uid: int, gid: int, path: Path) -> tuple[str, str]:
    """The same in a process of another user, which may not be able to read our files."""
    text.render(examine(str(path)))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            os.write(writer, json.dumps(problem_of(path)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    what, mend = json.loads(answer)
    return what, mend


@pytest.fixture
def device() -> Iterator[Path]:
    """A file in directories anybody may look into (pytest's own are closed)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        path = Path(directory, "kvm")
        path.write_bytes(b"")
        yield path


def test_a_device_that_does_not_exist(tmp_path: Path) -> None:
    what, mend = problem_of(tmp_path / "kvm")
    assert what.startswith(f"{tmp_path}/kvm does not exist")
    if os.path.exists(DEV_KVM):
        assert mend == "use /dev/kvm, which does"
    else:
        assert "modprobe" in mend or "--device" in mend or "mknod" in mend


def test_a_file_that_is_not_a_kvm_device() -> None:
    what, mend = problem_of("/dev/null")
    assert what == "/dev/null is not a KVM device"
    assert "/dev/kvm" in mend


def test_a_directory(tmp_path: Path) -> None:
    assert problem_of(tmp_path)[0] == f"cannot open {tmp_path}: Is a directory"


def test_a_device_without_a_driver(tmp_path: Path) -> None:
    """A socket's file gives ENXIO, as such a device does."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        what, mend = problem_of(path)
    assert what == f"{path} has no driver behind it"
    assert mend.startswith("modprobe kvm_" if os.geteuid() == 0 else f"{FOR_ROOT}modprobe kvm_")


@as_root
def test_a_device_of_a_group_the_user_is_not_in(device: Path) -> None:
    group = grp.getgrnam("tty")
    os.chown(device, 0, group.gr_gid)
    device.chmod(0o660)
    what, mend = problem_for(NOBODY.pw_uid, NOBODY.pw_gid, device)
    assert what == f"no permission on {device} for nobody (it is root:tty, mode 0660)"
    assert mend == f"{FOR_ROOT}usermod -aG tty nobody, then log in again"


@as_root
def test_a_group_the_user_is_in_but_not_this_process(device: Path) -> None:
    os.chown(device, 0, NOBODY.pw_gid)
    device.chmod(0o660)
    group = grp.getgrgid(NOBODY.pw_gid).gr_name
    _, mend = problem_for(NOBODY.pw_uid, grp.getgrnam("tty").gr_gid, device)
    assert mend == f"nobody is in group {group} already: log in again, or newgrp {group}"


def may_open(user: pwd.struct_passwd, path: Path) -> bool:
    """Whether `user`, logged in now, can open `path` for reading and writing."""
    child = os.fork()
    if child == 0:
        try:
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.close(os.open(path, os.O_RDWR))
        except OSError:
            os._exit(1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def stranger() -> Iterator[pwd.struct_passwd]:
    """A user made for the test."""
    name = f"vmm-test-{os.getpid()}"
    subprocess.run(["useradd", "--no-create-home", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True)


@as_root
def test_what_is_to_be_typed_helps(
    device: Path, stranger: pwd.struct_passwd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, carried out: for now, and for good with a group that is not there."""
    monkeypatch.setattr(access, "GROUP", f"vmm-kvm-{os.getpid()}")
    device.chmod(0o600)
    what, mend = problem_for(stranger.pw_uid, stranger.pw_gid, device)
    assert what.endswith("(it is root:root, mode 0600)")
    at_once, _, for_good = mend.partition(" (until reboot); or for good: ")
    assert not may_open(stranger, device)
    subprocess.run(["sh", "-ec", at_once.removeprefix(FOR_ROOT)], check=True)
    assert may_open(stranger, device)
    os.chown(device, 0, 0)
    subprocess.run(["setfacl", "-b", device] if "setfacl" in at_once else ["true"], check=True)
    assert not may_open(stranger, device)
    commands, _, rest = for_good.partition(", then log in again")
    try:
        subprocess.run(["sh", "-ec", commands.replace(FOR_ROOT, "")], check=True)
        assert may_open(stranger, device)
    finally:
        subprocess.run(["groupdel", access.GROUP], check=True)
    assert "/etc/udev/rules.d/" in rest


@as_root
def test_a_user_without_a_name_is_told_by_number(device: Path) -> None:
    device.chmod(0o600)
    assert " for 54321 (" in problem_for(54321, 54321, device)[0]


@as_root
def test_a_device_in_a_closed_directory(device: Path) -> None:
    device.parent.chmod(0o700)
    what, mend = problem_for(NOBODY.pw_uid, NOBODY.pw_gid, device)
    assert what == f"nobody may not look into the directory of {device}"
    assert mend == f"{FOR_ROOT}chmod a+rx {device.parent}"


@as_root
@pytest.mark.needs_kvm
def test_the_kvm_device_itself_without_permission() -> None:
    status = os.stat(DEV_KVM)
    if status.st_mode & 0o006 == 0o006:
        pytest.skip(f"anybody may use {DEV_KVM} here")
    what, mend = problem_for(54321, 54321, Path(DEV_KVM))
    assert what.startswith("no permission on /dev/kvm for 54321 ")
    assert mend.startswith(FOR_ROOT)
