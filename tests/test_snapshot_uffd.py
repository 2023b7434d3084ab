"""vmm/snapshot/uffd.py, pager.py, vmm/memory/userfault.py: pages that another process hands over,
and what becomes of a machine when that process ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.bare import MIB, bare_machine, until
from tests.support.guests import DATA
from tests.test_kvm_vcpu_state import FLAG
from tests.test_snapshot_store import FILLS_AND_CHECKS, HALTED, contents, flip, pattern, put
from vmm import HostError, Machine, UsageError
from vmm.errors import SnapshotError
from vmm.machine import exits
from vmm.memory import GuestMemory, userfault
from vmm.snapshot import pager
from vmm.snapshot.store import Snapshot
from vmm.virtio import unix

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def allowed() -> None:
    try:
        os.close(userfault.open_userfault())
    except HostError as err:
        pytest.skip(str(err))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A full snapshot `full` and a differential `diff`, of 16 MiB."""
    with bare_machine(HALTED, memory=16 * MIB) as m:
        put(m, pattern(0, 60))
        m.memory.write(9 * MIB, b"far" * 1000)
        m.snapshot(str(tmp_path / "full"))
        put(m, pattern(1, 20))
        m.memory.fill(9 * MIB, 4096, 0)
        m.snapshot(str(tmp_path / "diff"), base=str(tmp_path / "full"))
    return tmp_path


def server_of(machine: Machine) -> int:
    origin: Any = machine.origin
    return int(origin.pid)


def guard_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("name", ["full", "diff"])
def test_memory_is_the_same(made: Path, name: str) -> None:
    with Machine.restore(str(made / name)) as one:
        wanted = contents(one)
        with Machine.restore(str(made / name), pages="uffd") as m:
            assert [region.kind for region in m.memory.regions] == ["uffd"]
            assert m.memory.regions[0].resident() < MIB
            same = contents(m) == wanted
            assert same
            m.memory.write(DATA, b"own")
            m.snapshot(str(made / "again"), base=str(made / "full"))
            wanted = contents(m)
    with Machine.restore(str(made / "again")) as m:
        same = contents(m) == wanted
        assert same


def test_a_snapshot_of_what_was_never_read(made: Path) -> None:
    with Machine.restore(str(made / "diff")) as one:
        wanted = contents(one)
    with Machine.restore(str(made / "diff"), pages="uffd") as m:
        m.snapshot(str(made / "again"))
    with Machine.restore(str(made / "again"), verify=True) as m:
        same = contents(m) == wanted
        assert same


def test_the_guest_finds_its_memory(tmp_path: Path) -> None:
    with bare_machine(FILLS_AND_CHECKS, "user") as m:
        m.start()
        m.memory.write_u8(FLAG, 1)
        until(lambda: m.memory.read_u32(DATA) == 2)
        m.snapshot(str(tmp_path / "snap"))
    for _ in range(2):
        with Machine.restore(str(tmp_path / "snap"), pages="uffd") as m:
            m.memory.write_u8(FLAG, 2)
            m.start()
            assert m.wait(60).status == 8


# --- the handler ends -----------------------------------------------------------------------------

READS_ALL = f"""
    movl $1, DATA
1:  cmpb $0, {FLAG}
    je 1b
    mov $0x200000, %rdi
2:  mov (%rdi), %rax
    add $4096, %rdi
    cmp $0x1000000, %rdi
    jb 2b
    done 3
"""


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Machine]:
    """A machine whose guest reads pages once FLAG is set, every one of them something."""
    with bare_machine(READS_ALL, "user", memory=16 * MIB) as m:
        for at in range(0x200000, 16 * MIB, 4096):
            m.memory.write(at, b"x")
        m.start()
        until(lambda: m.memory.read_u32(DATA) == 1)
        m.snapshot(str(tmp_path / "snap"))
    with Machine.restore(str(tmp_path / "snap"), pages="uffd") as m:
        yield m


def lost(machine: Machine, why: str) -> None:
    ended = machine.wait(60)
    assert ended.kind == exits.MEMORY_LOST and ended.status == 69
    assert "pages of its snapshot that it had not read yet are lost" in ended.message
    assert why in ended.message, ended.message


def test_a_machine_that_is_served_to_the_end(reader: Machine) -> None:
    reader.memory.write_u8(FLAG, 1)
    reader.start()
    assert reader.wait(60).status == 3


def test_the_handler_is_killed_while_the_guest_waits_for_a_page(reader: Machine) -> None:
    reader.memory.write_u8(FLAG, 1)
    pid = server_of(reader)
    os.kill(pid, signal.SIGSTOP)
    reader.start()
    time.sleep(0.1)  # so that it comes to wait; it is lost all the same if it has not yet
    os.kill(pid, signal.SIGKILL)
    lost(reader, "killed by signal 9")


def test_the_handler_is_killed_while_nobody_waits(reader: Machine) -> None:
    reader.start()
    os.kill(server_of(reader), signal.SIGKILL)
    lost(reader, "killed by signal 9")


def test_the_handler_is_killed_before_the_start(reader: Machine) -> None:
    os.kill(server_of(reader), signal.SIGKILL)
    lost_before = time.monotonic() + 60
    while reader.exit is None:
        assert time.monotonic() < lost_before
        time.sleep(0.01)
    assert reader.exit.kind == exits.MEMORY_LOST


def test_the_handler_is_killed_while_this_process_waits_for_a_page(reader: Machine) -> None:
    """A thread that waits for a page holds the interpreter's lock; it is let go all the same."""
    reader.start()
    pid = server_of(reader)
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {pid}"]):
        assert reader.memory.read(12 * MIB, 1) == b"\0"
    lost(reader, "killed by signal 9")


def test_all_of_the_handler_is_killed(reader: Machine) -> None:
    reader.memory.write_u8(FLAG, 1)
    pid = server_of(reader)
    guard = guard_of(pid)
    os.kill(pid, signal.SIGSTOP)
    reader.start()
    os.kill(guard, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    lost(reader, "it has ended")


def test_a_flipped_bit_ends_the_machine_that_would_have_used_it(reader: Machine) -> None:
    origin: Any = reader.origin
    path = Path(origin._snapshot.path)
    flip(path / "memory", 12 * MIB)
    reader.memory.write_u8(FLAG, 1)
    reader.start()
    lost(reader, "memory is corrupt: the 256 KiB at byte 0xc00000 do not have their checksum")


def test_a_file_that_is_cut_short_ends_that_machine_alone(reader: Machine) -> None:
    """A private mapping would have the kernel end the process (docs/snapshots.md)."""
    origin: Any = reader.origin
    with bare_machine("1: jmp 1b", "user") as other:
        other.start()
        os.truncate(Path(origin._snapshot.path) / "memory", 2 * MIB)
        reader.memory.write_u8(FLAG, 1)
        reader.start()
        lost(reader, "memory is corrupt: the 256 KiB at byte ")
        assert other.state == "running"


# --- a handler that listens -----------------------------------------------------------------------


@pytest.fixture
def handler(made: Path) -> Iterator[str]:
    path = str(made / "pages")
    command = [sys.executable, "-m", "vmm.snapshot.uffd", str(made / "diff"), path]
    with subprocess.Popen(command, env=tiny.environment()) as process:
        connected(Path(path)).close()
        yield path
        process.terminate()
        assert process.wait(60) == 0
    assert not os.path.exists(path)


def test_many_machines_of_one_handler(made: Path, handler: str) -> None:
    with Machine.restore(str(made / "diff")) as one:
        wanted = contents(one)
    machines = [Machine.restore(str(made / "diff"), pages=f"uffd={handler}") for _ in range(3)]
    try:
        os.kill(server_of(machines[0]), signal.SIGKILL)
        until(lambda: machines[0].exit is not None)
        for m in machines[1:]:
            same = contents(m) == wanted
            assert same and m.exit is None
    finally:
        for m in machines:
            m.close()
    with Machine.restore(str(made / "diff"), pages=f"uffd={handler}") as m:
        same = contents(m) == wanted
        assert same


def test_a_handler_of_another_snapshot(made: Path, handler: str) -> None:
    with pytest.raises(SnapshotError, match=r"handler serves .*diff, which is another snapshot"):
        Machine.restore(str(made / "full"), pages=f"uffd={handler}")
    with Machine.restore(str(made / "diff"), pages=f"uffd={handler}"):
        pass


@contextmanager
def handler_with(made: Path, settings: str) -> Iterator[Path]:
    """A handler of `full` with some of its module's numbers changed."""
    path = made / "pages"
    code = f"from vmm.snapshot import uffd; {settings}; uffd.command()"
    command = [sys.executable, "-c", code, str(made / "full"), str(path)]
    with subprocess.Popen(command, env=tiny.environment()) as process:
        connected(path).close()
        try:
            yield path
        finally:
            process.terminate()
            assert process.wait(60) == 0


def test_clients_that_say_nothing_keep_nobody(made: Path) -> None:
    with handler_with(made, "uffd.GREETING_WITHIN = 600.0") as path:
        silent = [connected(path) for _ in range(20)]
        with Machine.restore(str(made / "full"), pages=f"uffd={path}") as m:
            m.memory.read(DATA, 1)
            # All of them: none had to be sent away first.
            assert not select.select(silent, [], [], 0)[0]
        for client in silent:
            client.close()


def test_clients_that_say_nothing_are_sent_away(made: Path) -> None:
    with handler_with(made, "uffd.GREETING_WITHIN = 0.1") as path:
        silent = [connected(path) for _ in range(5)]
        for client in silent:
            assert json.loads(client.recv(4096)) == {"error": "nothing was asked for in time"}
            assert client.recv(1) == b""
            client.close()
        with Machine.restore(str(made / "full"), pages=f"uffd={path}") as m:
            m.memory.read(DATA, 1)
            time.sleep(0.3)
            assert m.exit is None, "a machine that is served has no such limit"


def test_clients_that_say_nothing_are_few(made: Path) -> None:
    numbers = "uffd.GREETING_WITHIN = 600.0; uffd.GREETING_MAX = 3"
    with handler_with(made, numbers) as path:
        silent = [connected(path) for _ in range(8)]
        for client in silent[:5]:
            assert "too many" in json.loads(client.recv(4096))["error"]
        with Machine.restore(str(made / "full"), pages=f"uffd={path}") as m:
            m.memory.read(DATA, 1)
        for client in silent:
            client.close()


def test_a_client_that_does_not_end_keeps_nobody(made: Path) -> None:
    """The process that serves one machine is killed, and that machine does not hang up; that of
    another is stopped when the machine ends."""
    full = str(made / "full")
    with Snapshot(full) as snapshot:
        request = json.dumps({"snapshot": snapshot.checksum, "regions": []}).encode()
    with handler_with(made, "uffd.STOP_WITHIN = 600.0") as path:
        with Machine.restore(full, pages=f"uffd={path}") as stopped:
            pid = server_of(stopped)
            os.kill(pid, signal.SIGSTOP)
        with connected(path) as client, open(os.devnull) as one:
            socket.send_fds(client, [request], [one.fileno()])
            os.kill(json.loads(client.recv(4096))["pid"], signal.SIGKILL)
            assert "killed by signal 9" in json.loads(client.recv(4096))["error"]
            with Machine.restore(full, pages=f"uffd={path}") as m:
                m.memory.read(DATA, 1)
            assert not select.select([client], [], [], 0)[0]
        os.kill(pid, signal.SIGCONT)
        until(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.parametrize(
    "last", [b"[" * 4000, b"[]", b"7", b"null", b"\xff", b"", b'{"error": ["a"]}', b'{"pid": 1}'],
    ids=lambda last: repr(last[:12]),
)  # fmt: skip
def test_what_a_handler_says_last_is_told_whatever_it_is(last: bytes) -> None:
    """The thread that reads it must live to end the machine: a vCPU may wait for a page."""
    ended = pager._lost(last + b"\n")
    assert ended.kind == exits.MEMORY_LOST and len(ended.message) < 2 * pager.LINE_MAX


# --- wrong usage, and what is left ----------------------------------------------------------------


def test_wrong_usage(made: Path) -> None:
    full = str(made / "full")
    for pages in ("burn", "map=x", "uffd:x"):
        with pytest.raises(UsageError, match=f"restore: pages={pages} is not one of map, uffd"):
            Machine.restore(full, pages=pages)
    with pytest.raises(UsageError, match="nobody: No such file or directory; start python -m vmm"):
        Machine.restore(full, pages=f"uffd={made}/nobody")
    command = [sys.executable, "-m", "vmm.snapshot.uffd"]
    for words, text in (
        ([], "usage: python -m vmm.snapshot.uffd DIR SOCKET"),
        ([full, "x", "y"], "usage: "),
        (["/no/such", "x"], "vmm.snapshot.uffd: /no/such is no directory of a snapshot"),
        ([full, "/no/such/socket"], "/no/such/socket: No such file or directory"),
    ):
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, check=False, env=tiny.environment()
        )
        assert done.returncode == 2 and text in done.stderr, done


def test_nothing_is_left(made: Path) -> None:
    with Machine.restore(str(made / "full"), pages="uffd"):
        pass
    before = sorted(os.listdir("/proc/self/fd"))
    with Machine.restore(str(made / "full"), pages="uffd") as m:
        pids = [server_of(m), guard_of(server_of(m))]
        m.start()
    assert sorted(os.listdir("/proc/self/fd")) == before
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_pages_that_are_there_stay() -> None:
    """And holes between them are filled; where there is no memory, nothing happens."""
    with GuestMemory(MIB) as memory:
        fd = userfault.open_userfault()
        try:
            region = memory.regions[0]
            userfault.register(fd, region.hva, region.size)
            userfault.fill(fd, region.hva + 4096, b"a" * 4096)
            userfault.fill(fd, region.hva, b"b" * 16384)
            userfault.fill(fd, region.hva + 16384, bytes(8192))
            assert [memory.read(at, 1) for at in range(0, 24576, 4096)] == [
                b"b", b"a", b"b", b"b", b"\0", b"\0",
            ]  # fmt: skip
            assert list(userfault.faults(fd)) == []
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    "says",
    [
        b"", b"nonsense", b"[1]", b"null", b"[" * 60_000, b'{"snapshot": 1}',
        b'{"snapshot": "SUM"}', b'{"snapshot": "SUM", "regions": 1}',
        b'{"snapshot": "SUM", "regions": [[1]]}', b'{"snapshot": "SUM", "regions": [[1, 2, -3]]}',
        b'{"snapshot": "SUM", "regions": [["x", 2, 3]]}',
        b'{"snapshot": "SUM", "regions": [[1e999, 2, 3]]}',
    ],
    ids=lambda says: says[:40].decode(),
)  # fmt: skip
def test_a_handler_goes_on_after_a_client_that_lies(made: Path, says: bytes) -> None:
    """The other machines' pages come from it."""
    path = made / "handler"
    command = [sys.executable, "-m", "vmm.snapshot.uffd", str(made / "full"), str(path)]
    with Snapshot(str(made / "full")) as snapshot:
        says = says.replace(b"SUM", snapshot.checksum.encode())
    handler = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        liar = connected(path)
        with liar, open(os.devnull) as one:
            if says:
                socket.send_fds(liar, [says], [one.fileno()] * 5)
            liar.shutdown(socket.SHUT_WR)
            assert b"error" in liar.recv(4096)
        with Machine.restore(str(made / "full"), pages=f"uffd={path}") as m:
            m.memory.read(DATA, 1)
        fds = Path(f"/proc/{handler.pid}/fd")
        assert not [each for each in fds.iterdir() if os.readlink(each) == os.devnull][3:]
    finally:
        handler.kill()
        _, said = handler.communicate()
    assert said == b""


def connected(path: Path) -> socket.socket:
    """A client of the handler, once that listens."""

    def connect() -> bool:
        try:
            unix.connect(sock, str(path))
        except OSError:
            return False
        return True

    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    until(connect)
    return sock
