"""vmm/sandbox/broker.py: what is done for a confined process, and what is not."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.confined import in_process, outcome
from vmm.sandbox import confinement, landlock, seccomp
from vmm.sandbox.broker import Broker, Policy

kernel = [
    pytest.mark.needs_kvm,  # in both lanes: two kernels
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not landlock.abi() or not seccomp.available(),
        reason="this kernel has no Landlock, or no seccomp",
    ),
]


def on_both_kernels(test: Callable[..., None]) -> Callable[..., None]:
    for mark in kernel:
        test = mark(test)
    return test


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def dial(path: object, *, wait: bool = False) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(wait)
        sock.connect(str(path))


def confined(
    fill: Callable[[Policy], None],
    probe: Callable[[], object],
    service: Callable[[Policy, list[int]], Callable[[], object]] | None = None,
) -> object:
    """What `probe` returns in a process that has nothing but a broker."""

    def run() -> object:
        broker = Broker(service)
        fill(broker.policy)
        assert confinement.confine([], broker=broker) is not None
        result = probe()
        broker.close()
        return result

    return in_process(run)[0]


@on_both_kernels
def test_it_connects_to_what_the_policy_has(tmp_path: Path) -> None:
    names = ("one", "one_7", "other", "pre_12", "pre_x", "pre")
    # Beyond the bytes of an address: by way of a descriptor of its directory.
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    socks = []
    for name in names:
        socks.append(listening(tmp_path / name))
    here = os.getcwd()
    os.chdir(deep)
    far = socket.socket(socket.AF_UNIX)
    far.bind("far")
    far.listen()
    os.chdir(here)

    def fill(policy: Policy) -> None:
        policy.connects = {str(tmp_path / "one"), str(deep / "far")}
        policy.prefixes = {str(tmp_path / "pre")}

    def probe() -> list[str]:
        from vmm.virtio import unix

        def far() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                unix.connect(sock, str(deep / "far"))

        return [
            *(outcome(lambda name=name: dial(tmp_path / name)) for name in names),  # type: ignore[misc]
            outcome(lambda: dial(tmp_path / "one", wait=True)),
            outcome(lambda: dial(tmp_path / "x" / ".." / "one")),
            outcome(lambda: dial(tmp_path / "pre_13")),
            outcome(lambda: dial(tmp_path / "pre_12" / ".." / "other")),
            outcome(far),
        ]

    refused = "EPERM"
    assert confined(fill, probe) == [
        "ok", refused, refused, "ok", refused, refused, "ok", "ok", "ENOENT", refused, "ok",
    ]  # fmt: skip
    for sock in (*socks, far):
        sock.close()


@on_both_kernels
def test_it_removes_the_machines_sockets_and_no_others(tmp_path: Path) -> None:
    socks = [listening(tmp_path / name) for name in ("ours", "left", "taken", "other")]

    def fill(policy: Policy) -> None:
        for name in ("ours", "left"):
            policy.removes[str(tmp_path / name)] = identity(tmp_path / name)
        policy.removes[str(tmp_path / "taken")] = identity(tmp_path / "other")

    def probe() -> list[str]:
        return [
            outcome(lambda name=name: os.unlink(tmp_path / name))  # type: ignore[misc]
            for name in ("ours", "ours", "taken", "other")
        ]

    assert confined(fill, probe) == ["ok", "ENOENT", "ok", "EACCES"]
    assert sorted(os.listdir(tmp_path)) == ["other", "taken"]
    for sock in socks:
        sock.close()


@on_both_kernels
def test_they_go_with_a_process_that_is_killed(tmp_path: Path) -> None:
    sock = listening(tmp_path / "ours")

    def fill(policy: Policy) -> None:
        policy.removes[str(tmp_path / "ours")] = identity(tmp_path / "ours")

    def probe() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert confined(fill, probe) is None
    limit = time.monotonic() + 30
    while (tmp_path / "ours").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    sock.close()


def make(target: Path) -> list[str]:
    """Make a directory as a snapshot is made; what becomes of each step, and of others."""
    partial = target.parent / f".{target.name}.abc.partial"

    def write(path: Path) -> None:
        path.write_text("made")

    return [
        outcome(lambda: os.makedirs(target.parent)),
        outcome(lambda: partial.mkdir(0o700)),
        outcome(lambda: write(partial / "file")),
        outcome(lambda: os.symlink("/etc/passwd", partial / "link")),
        outcome(lambda: (partial / "away").mkdir()),
        outcome(lambda: write(partial / "away" / "file")),
        outcome(lambda: write(target.parent / "beside")),
        outcome(lambda: write(partial / ".." / "beside")),
        outcome(lambda: (target.parent / ".other.abc.partial").mkdir()),
        outcome(lambda: os.rename(partial, target.parent / "elsewhere")),
        outcome(lambda: os.rename(partial, target)),
        outcome(lambda: (target / "file").read_text()),
        outcome(lambda: write(target / "file")),
        outcome(lambda: os.unlink(target / "file")),
    ]


MADE = ["ok"] * 3 + ["EPERM"] + ["ok"] * 2 + ["EACCES"] * 4 + ["ok"] * 2 + ["EACCES"] * 2


@on_both_kernels
def test_a_directory_is_made_while_it_is_asked_for(tmp_path: Path) -> None:
    """The service in the broker lets it, when told so by somebody outside: here a socket pair."""
    target = tmp_path / "new" / "above" / "target"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").write_text("base")
    (tmp_path / "base" / "in").mkdir()
    (tmp_path / "base" / "in" / "file").write_text("base")
    (tmp_path / "secret").write_text("kept")
    (tmp_path / "base" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "base" / "out").symlink_to(tmp_path)
    ours, theirs = socket.socketpair()

    def service(policy: Policy, fds: list[int]) -> Callable[[], object]:
        import threading

        sock = socket.socket(fileno=fds[0])

        def main() -> None:
            while sock.recv(1):
                with policy.making(str(target), [str(tmp_path / "base")]):
                    sock.send(b"y")
                    sock.recv(1)
                sock.send(b"n")

        threading.Thread(target=main, daemon=True).start()
        return lambda: None

    def read() -> str:
        return outcome((tmp_path / "base" / "file").read_text)

    def run() -> list[list[str]]:
        broker = Broker(service)
        broker.hand_over(theirs.fileno())
        confinement.confine([], broker=broker)
        found = [[*make(target)[:3], read()]]
        ours.send(b"?")
        ours.recv(1)
        found.append([*make(target), read(), outcome(lambda: (tmp_path / "base" / "n").touch())])
        found[-1] += [
            outcome((tmp_path / "base" / name).read_text)
            for name in ("in/file", "link", "out/secret", "in/../../secret")
        ]
        ours.send(b".")
        ours.recv(1)
        found.append([read(), outcome((target / "file").read_text)])
        broker.close()
        return found

    before, during, after = in_process(run)[0] or ([], [], [])
    assert before == ["EACCES"] * 4 or before == ["EACCES", "ENOENT", "ENOENT", "EACCES"]
    assert during == [*MADE, "ok", "EACCES", "ok", "ELOOP", "ELOOP", "EACCES"]
    assert after == ["EACCES", "EACCES"]
    assert (target / "file").read_text() == "made"
    assert not (target.parent / "beside").exists()


def test_paths_that_a_grant_has(tmp_path: Path) -> None:
    policy = Policy()
    target = str(tmp_path / "s")
    partial = str(tmp_path / ".s.x.partial")
    assert not policy.may_make(partial)
    with policy.making(target, [str(tmp_path / "base")]):
        assert not policy.may_make(str(tmp_path / ".s.x.partial" / "below" / ".s.y.partial"))
        assert not policy.may_open(partial + "/f", os.O_RDWR | os.O_CREAT)
        assert policy.may_make(partial)
        assert policy.may_open(partial + "/f", os.O_RDWR | os.O_CREAT)
        assert not policy.may_open(partial + "2/f", os.O_RDONLY)
        assert not policy.may_open(str(tmp_path), os.O_RDONLY)
        assert policy.may_open(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
        assert not policy.may_open(str(tmp_path / "base" / "f"), os.O_RDONLY | os.O_TRUNC)
        assert not policy.may_rename(partial + "/f", str(tmp_path / "f"))
        assert not policy.may_remove(target, directory=True)
    assert not policy.may_open(partial + "/f", os.O_RDONLY)


def test_a_policy_is_what_it_was_packed_from() -> None:
    policy, copy = Policy(), Policy()
    assert not policy
    policy.connects, policy.prefixes = {"/a", "/b\udcff"}, {"/c"}
    policy.removes = {"/d": (1, 1 << 40)}
    copy.read(policy.pack())
    assert vars(copy) == vars(policy) and copy


def test_a_machine_that_is_not_built_leaves_none() -> None:
    broker = Broker()
    pid = broker.pid
    assert stat.S_ISDIR(os.stat(f"/proc/{pid}").st_mode)
    broker.close()
    broker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_files_without_a_name_are_made_while_somebody_asked_for_them() -> None:
    policy = Policy()
    nameless = os.O_RDWR | os.O_TMPFILE
    assert not policy.may_open("/var/tmp", nameless)
    with policy.nameless(["/var/tmp"]):
        assert policy.may_open("/var/tmp", nameless)
        assert not policy.may_open("/tmp", nameless)
        assert not policy.may_open("/var/tmp", os.O_RDONLY | os.O_DIRECTORY)
        assert not policy.may_open("/var/tmp/file", os.O_RDWR | os.O_CREAT)
    assert not policy.may_open("/var/tmp", nameless)
