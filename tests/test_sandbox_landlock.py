"""vmm/sandbox/landlock.py: a thread keeps the files, ports and peers that it names."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.confined import in_process, in_thread, outcome
from vmm.sandbox import landlock, privileges

pytestmark = [
    pytest.mark.needs_kvm,  # in both lanes: their kernels have ABI 7 and 2
    pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock"),
]


def confined(
    files: list[tuple[str | int, int]], *probes: Callable[[], object], **more: object
) -> list[str]:
    """What becomes of each probe in a thread that has `files` alone."""

    def run() -> list[str]:
        privileges.no_new_privs()
        assert landlock.restrict(files, **more) == landlock.abi()  # type: ignore[arg-type]
        return [outcome(probe) for probe in probes]

    return in_thread(run)


def tree(tmp_path: Path) -> Path:
    """A directory `in` that rules name, `out` beside it, a file `f` in each."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("kept")
    return tmp_path


def test_only_what_is_named_can_be_read_and_nothing_written(tmp_path: Path) -> None:
    top = tree(tmp_path)
    assert (
        confined(
            [(str(top / "in"), landlock.READ)],
            (top / "in" / "f").read_text,
            lambda: os.listdir(top / "in"),
            (top / "out" / "f").read_text,
            lambda: os.listdir(top / "out"),
            lambda: (top / "in" / "f").write_text("changed"),
            lambda: (top / "in" / "new").write_text("new"),
            lambda: (top / "in" / "f").unlink(),
            lambda: (top / "in" / "d").mkdir(),
            lambda: os.rename(top / "out" / "f", top / "in" / "g"),
            lambda: os.symlink("/", top / "in" / "link"),
            lambda: (top / "in" / ".." / "out" / "f").read_text(),
        )
        == ["ok", "ok"] + ["EACCES"] * 7 + ["EACCES"] * 2
    )
    assert (top / "in" / "f").read_text() == (top / "out" / "f").read_text() == "kept"


def test_a_file_by_its_descriptor_and_a_directory_to_make_files_in(tmp_path: Path) -> None:
    top = tree(tmp_path)
    fd = os.open(top / "out" / "f", os.O_PATH)
    rights = landlock.READ | landlock.WRITE | landlock.MAKE
    assert confined(
        [(fd, landlock.READ), (str(top / "in"), rights), (str(top / "not there"), rights)],
        (top / "out" / "f").read_text,
        lambda: os.listdir(top / "out"),
        lambda: (top / "in" / "new").write_text("new"),
        lambda: (top / "in" / "new").unlink(),
        lambda: os.mkfifo(top / "in" / "fifo"),
    ) == ["ok", "EACCES", "ok", "ok", "EACCES"]
    os.close(fd)


def test_what_is_open_stays_open_and_other_threads_are_as_they_were(tmp_path: Path) -> None:
    top = tree(tmp_path)
    with open(top / "out" / "f", "r+b", buffering=0) as kept:
        assert confined([], lambda: kept.write(b"more"), (top / "in" / "f").read_text) == [
            "ok",
            "EACCES",
        ]
    assert (top / "in" / "f").read_text() == "kept"


def test_what_has_no_path_is_no_mistake() -> None:
    reader, writer = os.pipe()
    memory = os.memfd_create("box-test")
    rules: list[tuple[str | int, int]] = [(fd, landlock.READ) for fd in (reader, writer, memory)]
    assert confined(rules, lambda: os.write(memory, b"still ours")) == ["ok"]
    for fd in (reader, writer, memory):
        os.close(fd)


def test_programs_are_started_only_where_it_is_said() -> None:
    def spawn() -> None:
        pid = os.posix_spawn("/bin/true", ["true"], {})
        assert os.waitpid(pid, 0)[1] == 0

    libraries: list[tuple[str | int, int]] = [
        (path, landlock.READ) for path in ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache")
    ]
    run = landlock.READ | landlock.EXECUTE
    assert confined([*libraries, ("/bin/true", landlock.READ)], spawn) == ["EACCES"]
    # The program's interpreter, ld.so, is one that is executed.
    loaders: list[tuple[str | int, int]] = [("/lib64", run), ("/lib", run), ("/usr/lib", run)]
    assert confined([*libraries, *loaders, ("/bin/true", run)], spawn) == ["ok"]


@pytest.mark.skipif(landlock.abi() < 4, reason="TCP rules take ABI 4 (Linux 6.7)")
def test_tcp_ports() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        port = server.getsockname()[1]

        def connect(number: int) -> Callable[[], object]:
            def probe() -> None:
                with socket.socket() as client:
                    client.connect(("127.0.0.1", number))

            return probe

        def bind() -> None:
            socket.create_server(("127.0.0.1", 0)).close()

        probes = (connect(port), connect(other.getsockname()[1]), bind)
        ports = [(port, landlock.CONNECT_TCP)]
        assert confined([], *probes, ports=ports) == ["ok", "EACCES", "EACCES"]
        assert confined([], *probes, ports=None) == ["ok", "ok", "ok"]


@pytest.mark.skipif(landlock.abi() < 6, reason="scopes take ABI 6 (Linux 6.12)")
def test_scopes() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0vmm-box-test-{os.getpid()}")
        server.listen()
        name = server.getsockname()

        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)

        def probe() -> list[str]:
            privileges.no_new_privs()
            landlock.restrict([])
            return [outcome(connect), outcome(lambda: os.kill(os.getppid(), signal.SIGCONT))]

        assert in_process(probe)[0] == ["EPERM", "EPERM"]
        assert confined([], connect, scopes=0) == ["ok"]


@pytest.mark.parametrize("version", range(8))
def test_each_abi_is_asked_for_what_it_knows(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules of an older ABI, which this kernel takes as well."""
    if version > landlock.abi():
        pytest.skip("this kernel has an older one")
    top = tree(tmp_path)
    monkeypatch.setattr(landlock, "_abi", version)
    results = confined(
        [(str(top / "in"), landlock.READ | landlock.WRITE | landlock.EXECUTE)],
        (top / "in" / "f").read_text,
        (top / "out" / "f").read_text,
    )
    assert results == ["ok", "EACCES" if version else "ok"]


def test_rights_are_those_of_the_kernels_header() -> None:
    """All rights of the newest ABI we know, by number."""
    header = Path("/usr/include/linux/landlock.h")
    if not header.exists():
        pytest.skip("no linux-libc-dev")
    import re

    found = re.findall(
        r"#define LANDLOCK_(?:ACCESS_FS|ACCESS_NET|SCOPE)_(\w+)\s+\(1ULL << (\d+)\)",
        header.read_text(),
    )
    assert len(found) >= 13
    for name, bit in found:
        name = {"ABSTRACT_UNIX_SOCKET": "SCOPE_ABSTRACT_UNIX", "SIGNAL": "SCOPE_SIGNAL"}.get(
            name, name
        )
        assert getattr(landlock, name) == 1 << int(bit), name
