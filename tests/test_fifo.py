"""vmm/fifo.py, and all that writes to a FIFO: nobody need read it, and nothing waits for that."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support import tiny
from vmm.console.backends import FileBackend
from vmm.errors import SnapshotError
from vmm.fifo import Output, Records, open_stored
from vmm.net.pcap import Capture, FifoCapture, open_capture
from vmm.snapshot import manifest
from vmm.snapshot.folder import Folder
from vmm.virtio.console_ports import FilePort


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


def reader(fifo: str) -> int:
    return os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)


def read_all(fd: int) -> bytes:
    got = b""
    try:
        while data := os.read(fd, 65536):
            got += data
    except BlockingIOError:
        pass
    return got


def test_what_is_written_before_a_reader_comes_is_kept(fifo: str) -> None:
    output = Output(fifo)
    assert output.write(b"one ") == 4
    assert not output.is_read()
    fd = reader(fifo)
    assert output.is_read()
    assert output.write(b"two ") == 4
    assert read_all(fd) == b"one two "
    os.close(fd)
    assert output.write(b"three") == 5  # they have gone, others may come
    fd = reader(fifo)
    assert read_all(fd) == b"three"
    output.close()
    output.close()
    assert os.read(fd, 1) == b""
    os.close(fd)


def test_a_full_pipe_without_a_reader_drops_the_rest(fifo: str) -> None:
    output = Output(fifo)
    for _ in range(100):
        assert output.write(bytes(4096)) == 4096
    assert output.lost == 100 * 4096 - (64 << 10)
    fd = reader(fifo)
    with pytest.raises(BlockingIOError):  # one who is there is waited for
        output.write(b"x")
    assert len(read_all(fd)) == 64 << 10
    os.close(fd)
    output.close()


def test_files_are_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("longer than what comes")
    output = Output(str(path))
    assert output.write(b"short") == 5
    output.close()
    assert path.read_bytes() == b"short"
    with pytest.raises(IsADirectoryError):
        Output(str(tmp_path))


def test_records_are_whole(fifo: str) -> None:
    records = Records(fifo)
    for number in range(200):
        records.send(struct.pack("<H", number) + bytes((number,)) * 4998)
    kept = 200 - records.dropped
    assert 8 < kept < 20  # the last of them is in the pipe in part
    fd = reader(fifo)
    got = read_all(fd)
    for number in range(200, 210):
        records.send(struct.pack("<H", number) + bytes((number,)) * 4998)
    assert records.flush()
    got += read_all(fd)
    numbers = []
    for at in range(0, len(got), 5000):
        (number,) = struct.unpack_from("<H", got, at)
        assert got[at + 2 : at + 5000] == bytes((number,)) * 4998
        numbers.append(number)
    assert numbers == [*range(kept), *range(200, 210)]
    os.close(fd)
    records.close()
    records.close()


def test_a_console_never_waits_for_a_reader_to_come(fifo: str) -> None:
    backend = FileBackend(fifo)
    backend.begin()
    writer = threading.Thread(target=backend.write, args=(b"x" * (1 << 20),), daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive()
    backend.close()
    assert backend.error == (
        f"console file:{fifo}: nobody read it; {1 << 20} bytes of output are lost"
    )


def test_a_console_waits_for_a_reader_that_is_there(fifo: str) -> None:
    backend = FileBackend(fifo)
    backend.begin()
    fd = reader(fifo)
    os.set_blocking(fd, True)
    data = os.urandom(1 << 20)
    writer = threading.Thread(target=backend.write, args=(data,), daemon=True)
    writer.start()
    got = b""
    while len(got) < len(data):
        got += os.read(fd, 5000)
    writer.join(30)
    assert got == data
    backend.close()
    assert not backend.error
    os.close(fd)


def test_a_port(fifo: str) -> None:
    port = FilePort(1, "p", fifo)
    assert port.write(memoryview(b"hi")) == 2
    for _ in range(100):
        assert port.write(memoryview(bytes(4096))) > 0
    fd = reader(fifo)
    assert port.write(memoryview(b"x")) == 0
    assert read_all(fd).startswith(b"hi\0")
    os.close(fd)
    port.close()
    port.close()


def test_a_capture(fifo: str, tmp_path: Path) -> None:
    assert type(open_capture(str(tmp_path / "file"))) is Capture
    capture = open_capture(fifo)
    assert isinstance(capture, FifoCapture)
    frame = memoryview(bytes(12) + b"\xff" * 1000)
    for _ in range(100):
        capture.record([frame[:500], frame[500:]], len(frame))
    fd = reader(fifo)
    got = read_all(fd)
    capture.flush()
    got += read_all(fd)
    os.close(fd)
    count, rest = divmod(len(got) - 24, 1016)
    assert rest == 0 and got[40:1040] == b"\xff" * 1000
    capture.close()
    capture.close()
    assert capture.error == (
        f"--net pcap={fifo}: its reader was slow or away; {100 - count} frames are not in it"
    )


# --- the command --------------------------------------------------------------------------------

OPTIONS = {
    "console": "--console file:{}",
    "port": "--console none --port name=p,file={}",
    "capture": "--console none --net socket={}.sock,pcap={}",
}


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(120)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", list(OPTIONS))
def test_a_machine_starts_without_a_reader_and_ends_by_a_signal(
    tmp_path: Path, fifo: str, what: str, signum: signal.Signals
) -> None:
    control = tmp_path / "control"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{fifo}.sock")
    listener.listen()
    process = subprocess.Popen(
        tiny.command(
            *("run", "--memory", "16M", "--control", str(control)),
            *OPTIONS[what].replace("{}", fifo).split(),
            tiny.kernel(tmp_path, tiny.prints(b"hello\n") + tiny.HALT),
        ),
        env=tiny.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not control.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    if what == "console":
        with open(fifo, "rb") as file:
            assert file.readline() == b"hello\n"
    process.send_signal(signum)
    out = process.communicate(timeout=60)[0]
    listener.close()
    assert process.returncode == 128 + signum, out
    assert b"Traceback" not in out


def test_what_is_stored_is_opened_without_waiting(tmp_path: Path) -> None:
    """A FIFO has no end, nor has /dev/zero; neither is waited for, nor read."""
    (tmp_path / "file").write_bytes(b"text")
    with open_stored(str(tmp_path / "file")) as file:
        assert file.read(100) == b"text"
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for path, said in (
        (str(tmp_path / "fifo"), "it is a FIFO, not a file"),
        ("/dev/zero", "it is a character device, not a file"),
        (str(tmp_path), "Is a directory"),
    ):
        with pytest.raises(OSError, match=said):
            open_stored(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_snapshots_manifest_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / manifest.NAME)
    with pytest.raises(SnapshotError, match="is a FIFO; a snapshot has files of its own"):
        manifest.read(Folder(str(tmp_path)))
