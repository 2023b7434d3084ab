"""vmm/block/lock.py: one writer or several readers, among processes and with QEMU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from vmm.block import lock, raw
from vmm.block.raw import RawImage
from vmm.errors import EXIT_HOST, HostError

OPEN = """
import sys
from vmm.block.raw import RawImage
image = RawImage(sys.argv[1], readonly=sys.argv[2] == "reads")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return str(disk)


@pytest.mark.parametrize("how", ["this process", "another"])
@pytest.mark.parametrize(
    ("first", "second", "works"),
    [
        ("reads", "reads", True),
        ("reads", "writes", False),
        ("writes", "reads", False),
        ("writes", "writes", False),
    ],
)
def test_two_users(path: str, first: str, second: str, works: bool, how: str) -> None:
    def use() -> None:
        if works:
            RawImage(path, readonly=second == "reads").close()
            return
        with pytest.raises(HostError, match=f"--drive {path}: another process uses") as raised:
            RawImage(path, readonly=second == "reads")
        assert raised.value.exit_status == EXIT_HOST

    if how == "this process":
        image = RawImage(path, readonly=first == "reads")
        use()
        image.close()
    else:
        with subprocess.Popen(
            [sys.executable, "-c", OPEN, path, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            use()
            if not works:
                other.kill()  # however it ends, the lock goes with it
    RawImage(path).close()


def test_a_child_that_holds_the_file_holds_the_lock(path: str) -> None:
    """The locks are the open file's: closing another descriptor of the image loses nothing."""
    image = RawImage(path)
    os.close(os.open(path, os.O_RDWR))
    with pytest.raises(HostError):
        RawImage(path)
    image.close()
    RawImage(path).close()


def test_waiting_for_the_last_user(path: str) -> None:
    """Nothing is locked by it; it ends when the image is free, or the time is over."""
    image = RawImage(path)
    with open(path, "rb") as file:
        assert not lock.free(file.fileno(), write=False)
        timer = threading.Timer(0.1, image.close)
        timer.start()
        lock.wait_free(path, write=True, within=60)
        assert lock.free(file.fileno(), write=True)
        timer.join()
        image = RawImage(path, readonly=True)
        assert lock.free(file.fileno(), write=False)
        assert not lock.free(file.fileno(), write=True)
        lock.wait_free(path, write=True, within=0.05)
        image.close()
    lock.wait_free(f"{path}.missing", write=True, within=60)


def test_the_last_user_has_a_moment(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a killed monitor was starting holds the image until it is a program."""
    monkeypatch.setattr(raw, "FREE_WITHIN", 60.0)
    image = RawImage(path)
    timer = threading.Timer(0.1, image.close)
    timer.start()
    with closing(RawImage(path)):
        timer.join()
        monkeypatch.setattr(raw, "FREE_WITHIN", 0.05)
        with pytest.raises(HostError, match="another process uses this image"):
            RawImage(path)


QEMU = shutil.which("qemu-system-x86_64")


def qemu(path: str, mode: str) -> list[str]:
    assert QEMU is not None
    return [
        QEMU, "-machine", "microvm", "-accel", "tcg", "-S", "-nodefaults", "-display", "none",
        "-qmp", "stdio", "-drive", f"file={path},format=raw,if=none,id=d,readonly={mode}",
        "-device", "virtio-blk-device,drive=d",
    ]  # fmt: skip


@pytest.fixture
def running_qemu(path: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """QEMU with the image open; the parameter says whether readonly."""
    with subprocess.Popen(
        qemu(path, request.param), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stdin is not None
            assert "QMP" in json.loads(process.stdout.readline())
            process.stdin.write(b'{"execute": "qmp_capabilities"}\n')
            process.stdin.flush()  # answered once its devices are there
            assert "return" in json.loads(process.stdout.readline())
            yield request.param
        finally:
            process.kill()


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64")
@pytest.mark.parametrize("running_qemu", ["off", "on"], indirect=True)
def test_an_image_that_qemu_has(path: str, running_qemu: str) -> None:
    with pytest.raises(HostError, match="another process uses this image"):
        RawImage(path)
    if running_qemu == "on":
        RawImage(path, readonly=True).close()
    else:
        with pytest.raises(HostError, match="another process uses this image"):
            RawImage(path, readonly=True)


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64")
@pytest.mark.parametrize("readonly", [False, True])
def test_qemu_respects_ours(path: str, readonly: bool) -> None:
    image = RawImage(path, readonly=readonly)
    done = subprocess.run(
        qemu(path, "off"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    image.close()
    assert done.returncode == 1
    assert "Is another process using the image" in done.stderr
