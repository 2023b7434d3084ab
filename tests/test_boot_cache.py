"""vmm/boot/cache.py: what is kept is right, bounded, and only ever a shorter way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.boot import cache

BLOCKS = [bytes([number]) * 70_000 for number in range(1, 5)]
WHOLE = b"".join(BLOCKS)


class Payload:
    """Something packed; counts how often it was unpacked."""

    def __init__(self, data: bytes = b"packed", blocks: list[bytes] = BLOCKS) -> None:
        self.data = data
        self.times = 0
        self._blocks = blocks

    def unpack(self) -> Iterator[bytes]:
        self.times += 1
        yield from self._blocks

    def read(self, stop: int | None = None) -> bytes:
        """The content, by a reader that stops after `stop` blocks."""
        found = []
        blocks = cache.blocks(self.data, "xz", self.unpack)
        for number, block in enumerate(blocks, 1):
            found.append(bytes(block))
            if number == stop:
                break
        blocks.close()
        return b"".join(found)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VMM_KERNEL_CACHE", raising=False)
    return tmp_path / "cache" / "unpacked"


def test_it_is_unpacked_once(directory: Path) -> None:
    payload = Payload()
    assert [payload.read() for _ in range(3)] == [WHOLE] * 3
    assert payload.times == 1
    (entry,) = directory.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert Payload(b"other").read() == WHOLE
    assert len(list(directory.iterdir())) == 2


def test_a_reader_that_stops_early(directory: Path) -> None:
    """What it has read is kept; one that wants more has the rest unpacked, and all is kept."""
    payload = Payload()
    assert payload.read(stop=2) == WHOLE[:140_000]
    assert payload.read(stop=2) == WHOLE[:140_000]
    assert payload.times == 1
    assert payload.read() == WHOLE
    assert payload.times == 2
    assert payload.read() == WHOLE
    assert payload.times == 2


def change(entry: Path, at: int, value: bytes) -> None:
    data = bytearray(entry.read_bytes())
    data[at : at + len(value) if at >= 0 else None] = value
    entry.write_bytes(data)


DAMAGE = {
    "first block": lambda entry: change(entry, 10, b"x"),
    "third block": lambda entry: change(entry, 150_000, b"x"),
    "table": lambda entry: change(entry, 280_004, b"x"),
    "number of blocks": lambda entry: change(entry, 280_000 + 40 + 16, b"\xff\xff\xff\xff"),
    "magic": lambda entry: change(entry, 280_000 + 40, b"y"),
    "cut short": lambda entry: os.truncate(entry, 200_000),
    "one byte short": lambda entry: os.truncate(entry, entry.stat().st_size - 1),
    "longer": lambda entry: os.truncate(entry, entry.stat().st_size + 4096),
    "zeroes": lambda entry: entry.write_bytes(bytes(entry.stat().st_size)),
    "empty": lambda entry: entry.write_bytes(b""),
    "writable by others": lambda entry: entry.chmod(0o666),
    "a directory": lambda entry: (entry.unlink(), entry.mkdir()),
    "a FIFO": lambda entry: (entry.unlink(), os.mkfifo(entry)),
    # To an entry that is right, but may be anybody's tomorrow.
    "a symlink": lambda entry: (entry.rename(entry.parent / "z"), entry.symlink_to("z")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_not_believed(directory: Path, damage: str) -> None:
    payload = Payload()
    payload.read()
    (entry,) = directory.iterdir()
    DAMAGE[damage](entry)
    assert payload.read() == WHOLE
    assert payload.times == 2
    assert payload.read() == WHOLE
    if damage != "a directory":
        assert payload.times == 2, "and is replaced"
    assert not list(directory.glob("*.new"))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_other_users_entries_and_directories_are_not_believed(directory: Path) -> None:
    payload = Payload()
    payload.read()
    (entry,) = directory.iterdir()
    os.chown(entry, 65534, 65534)
    payload.read()
    assert payload.times == 2
    os.chown(directory, 65534, 65534)
    payload.read()
    payload.read()
    assert payload.times == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_nothing_of_roots_is_left_in_another_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(tmp_path, 65534, 65534)
    monkeypatch.delenv("VMM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Payload().read() == WHOLE
    assert not list(tmp_path.iterdir())


def test_a_directory_others_can_write_to_is_not_used(directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    assert Payload().read() == WHOLE
    assert not list(directory.iterdir())


@pytest.mark.parametrize("place", ["/nonexistent/x", "/proc/x", "/dev/null/x", "relative", "\0"])
def test_without_a_place_it_is_unpacked_each_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if "\0" in place:
        monkeypatch.setattr(os, "environ", {"VMM_CACHE": place})
    else:
        monkeypatch.setenv("VMM_CACHE", place)
    payload = Payload()
    if place == "/nonexistent/x" and os.geteuid() == 0:
        pytest.skip("root can make it")
    assert [payload.read(), payload.read()] == [WHOLE] * 2
    assert payload.times == 2


@pytest.mark.parametrize("word", ["0", "off", "no", "nonsense"])
def test_it_can_be_turned_off(directory: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("VMM_KERNEL_CACHE", word)
    assert Payload().read() == WHOLE
    assert not directory.exists()


def test_a_full_disk_keeps_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    written = []

    def full(fd: int, data: bytes) -> int:
        written.append(len(data))
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:1000])

    monkeypatch.setattr(os, "write", full)
    assert Payload().read() == WHOLE
    assert not list(directory.iterdir())


def test_a_broken_payload_keeps_nothing(directory: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield BLOCKS[0]
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(cache.blocks(b"packed", "xz", broken))
    assert not list(directory.iterdir())


def test_it_is_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused go first; what killed processes left goes too."""
    monkeypatch.setenv("VMM_KERNEL_CACHE", "900K")  # three of 280 KB
    payloads = [Payload(b"%d" % number) for number in range(4)]
    for age, payload in enumerate(payloads[:3]):
        payload.read()
        (entry,) = [path for path in directory.iterdir() if path.stat().st_mtime > 1e9]
        os.utime(entry, (age + 10, age + 10))
    payloads[0].read()  # used now
    left = directory / "dead.xz.1.1.new"
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    payloads[3].read()
    assert len(list(directory.iterdir())) == 3
    for payload, times in zip(payloads, (1, 2, 1, 1), strict=True):
        if payload is not payloads[1]:
            payload.read()
            assert payload.times == 1, times
    monkeypatch.setattr(cache, "ENTRIES_MAX", 2)
    payloads[1].read()
    assert len(list(directory.iterdir())) == 2


def test_more_than_the_limit_is_not_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_KERNEL_CACHE", "200K")
    assert Payload().read() == WHOLE
    assert not list(directory.iterdir())


def test_many_at_once(directory: Path) -> None:
    """Threads as processes would: each has the whole content, one entry is left."""
    results: list[bytes] = []

    def work() -> None:
        for _ in range(20):
            results.append(Payload().read())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {WHOLE}
    assert len(results) == 80
    assert len(list(directory.iterdir())) == 1


def test_a_killed_process_leaves_no_entry(directory: Path) -> None:
    code = (
        "from vmm.boot import cache\n"
        "import os\n"
        "blocks = cache.blocks(b'packed', 'xz', lambda: iter([b'a' * 70000] * 9))\n"
        "next(blocks); next(blocks); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    (left,) = directory.iterdir()
    assert left.name.endswith(".new")
    assert Payload().read() == WHOLE
    os.utime(left, (time.time() - 2 * cache.UNFINISHED_AGE,) * 2)
    assert Payload(b"other").read() == WHOLE
    assert not left.exists()
