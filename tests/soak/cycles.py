"""Lives of a machine, each another: made, run, and closed or killed. Nothing may be left of one.

A cycle gets a directory of its own for files that it names, and a random number generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import floods
from tests.soak import figures
from tests.support import images, netns, tiny
from tests.support.blk_backend import BlkBackend
from vmm import AsyncMachine, Machine, MachineConfig
from vmm.errors import VmmError

LIMIT = 60.0
"""Seconds that one thing in a cycle may take."""
MIB = 1 << 20
Cycle = Callable[[Path, random.Random], object]


def until(happened: Callable[[], object], what: str) -> None:
    """Wait until it holds, for at most LIMIT seconds."""
    limit = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > limit:
            raise AssertionError(what)
        time.sleep(0.002)


@contextlib.contextmanager
def running(path: Path, code: bytes = tiny.COUNTING, **options: object) -> Iterator[Machine]:
    """A machine that runs `code`."""
    values: dict[str, object] = {"memory": 16 * MIB, **options}
    with Machine(MachineConfig(tiny.kernel(path, code), **values)) as machine:  # type: ignore[arg-type]
        machine.start()
        yield machine


def disk(path: Path) -> Path:
    image = path / "disk.img"
    image.write_bytes(bytes(MIB))
    return image


def everything(path: Path, transport: str = "mmio") -> dict[str, object]:
    """Options of a machine with a device of each kind that needs no other program."""
    return {
        "console": "hvc,none",
        "ports": [f"name=log,file={path}/log", f"name=talk,socket={path}/talk"],
        "drives": [f"{disk(path)},snapshot"],
        "nets": ["lan=soak"],
        "rng": True,
        "balloon": 0,
        "vsock": f"cid=9,path={path}/vsock",
        "transport": transport,
    }


# --- ends -----------------------------------------------------------------------------------------


def exits(path: Path, rng: random.Random) -> None:
    status = rng.randrange(256)
    with running(path, tiny.prints(b"hello\n") + tiny.exits(status)) as machine:
        assert machine.wait(LIMIT).status == status


def powers_off(path: Path, rng: random.Random) -> None:
    with running(path, tiny.POWEROFF + tiny.HALT) as machine:
        assert machine.wait(LIMIT).kind == "poweroff"


def triple_fault(path: Path, rng: random.Random) -> None:
    with running(path, tiny.TRIPLE_FAULT, cpus=rng.randrange(1, 4)) as machine:
        machine.wait(LIMIT)


def is_stopped(path: Path, rng: random.Random) -> None:
    with running(path, tiny.SPIN, cpus=rng.randrange(1, 4), backing="memfd") as machine:
        machine.stop()


def time_limit(path: Path, rng: random.Random) -> None:
    with running(path, tiny.SPIN, timeout=0.02) as machine:
        assert machine.wait(LIMIT).kind == "timeout"


def is_not_started(path: Path, rng: random.Random) -> None:
    Machine(MachineConfig(tiny.kernel(path, tiny.SPIN), **everything(path))).close()  # type: ignore[arg-type]


def is_forgotten(path: Path, rng: random.Random) -> None:
    """Nobody closes it. (One that runs is kept by its threads.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        machine = Machine(MachineConfig(tiny.kernel(path, tiny.SPIN), rng=True))
        if rng.randrange(2):
            machine.start()
            machine.stop()
        del machine
        gc.collect()


def cannot_be(path: Path, rng: random.Random) -> None:
    """The making of it fails at its last part."""
    wrong: dict[str, object] = rng.choice(
        [
            {"kernel": str(path / "none")},
            {"drives": [str(path / "none")]},
            {"nets": [f"socket={path}/none"]},
            {"shares": [f"{path}/none,tag=t"]},
            {"vhost_user_blks": [str(path / "none")]},
        ]
    )
    options: dict[str, object] = {"kernel": tiny.kernel(path, tiny.SPIN), **everything(path)}
    try:
        Machine(MachineConfig(**{**options, **wrong})).close()  # type: ignore[arg-type]
    except VmmError:
        return
    raise AssertionError(f"it could be: {wrong}")


# --- what a running one goes through --------------------------------------------------------------


def all_devices(path: Path, rng: random.Random) -> None:
    with running(path, **everything(path, rng.choice(["mmio", "pci"]))) as machine:
        for _ in range(3):
            machine.pause()
            machine.resume()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{path}/talk")
        machine.balloon.target(4 * MIB)
        machine.resize_console(rng.randrange(20, 200), 25)


def floods_a_device(path: Path, rng: random.Random) -> None:
    with floods.machine(rng.choice(floods.NAMES), str(path)) as machine:
        machine.start()
        time.sleep(rng.random() * 0.05)
        for _ in range(rng.randrange(3)):
            machine.pause()
            machine.resume()


def goes_back(path: Path, rng: random.Random) -> None:
    """Checkpoints and rollbacks, while a device is flooded."""
    name = rng.choice([name for name in floods.NAMES if name != "disk"])
    with floods.machine(name, str(path)) as machine:
        machine.start()
        for _ in range(2):
            machine.checkpoint()
            for _ in range(4):
                time.sleep(0.002)
                machine.rollback()


def is_kept(path: Path, rng: random.Random) -> None:
    """A snapshot, one based on it, and machines from them."""
    options = everything(path)
    with running(path, **options) as machine:
        machine.snapshot(path / "first", track=True)
        machine.snapshot(path / "second", base=path / "first")
    for pages in ("map", "uffd"):
        with Machine.restore(path / rng.choice(["first", "second"]), pages=pages) as machine:
            before = machine.memory.read_u32(tiny.COUNTER)
            machine.start()
            until(
                lambda machine=machine, before=before: (  # type: ignore[misc]
                    machine.memory.read_u32(tiny.COUNTER) != before
                ),
                "it does not go on",
            )


def is_copied(path: Path, rng: random.Random) -> None:
    options = {key: value for key, value in everything(path).items() if key in ("rng", "balloon")}
    with running(path, **options) as machine, machine.clone(6) as copies:
        for copy in copies[:3]:
            copy.pause()
            copy.checkpoint()
            copy.rollback()


def fails(path: Path, rng: random.Random) -> None:
    """Faults of disks, clocks and vCPUs, set and cleared."""
    with floods.machine("throttled reads", str(path)) as machine:
        machine.start()
        faults = machine.faults
        faults.disk(0).fail(on="read", probability=0.1)
        faults.disk(0).latency(0.001, jitter=0.001)
        time.sleep(0.02)
        machine.pause()
        machine.resume()
        if rng.randrange(2):
            faults.clear()


def is_asked(path: Path, rng: random.Random) -> None:
    """With asyncio."""

    async def main() -> None:
        code = tiny.prints(b"ready\n") + tiny.SPIN
        async with AsyncMachine(MachineConfig(tiny.kernel(path, code))) as machine:
            await machine.start()
            await machine.wait_for("ready", timeout=LIMIT)
            await machine.pause()

    asyncio.run(main())


def has_functions(path: Path, rng: random.Random) -> None:
    """Functions of the program as devices, and as listeners."""
    read: list[int] = []
    code = b"\x66\xba\x10\x05\xed" + tiny.exits(0)  # mov dx, 0x510; in eax, dx
    with Machine(MachineConfig(tiny.kernel(path, code))) as machine:
        machine.bind_port(0x510, size=4, read=lambda offset, size: len(read))
        machine.subscribe(read.append)  # type: ignore[arg-type]
        machine.start()
        machine.wait(LIMIT)
    assert read


# --- helper programs ------------------------------------------------------------------------------


def kills(machine: Machine, name: str) -> None:
    """Kill the helper program `name`, and wait until that is told."""

    def found() -> list[int]:
        return [pid for pid, comm in figures.children().items() if comm.startswith(name)]

    until(found, f"no {name}")
    for pid in found():
        os.kill(pid, signal.SIGKILL)
    until(lambda: "DeviceError" in str(machine.event_log), f"the end of {name} is not told")


def image_helper(path: Path, rng: random.Random) -> None:
    image = images.make(path / "disk.qcow2", "qcow2", MIB)
    with running(path, drives=[f"{image},format=qcow2"]) as machine:
        if rng.randrange(2):
            kills(machine, "qemu-storage")


def directory(path: Path, rng: random.Random) -> None:
    (path / "shared").mkdir()
    with running(path, shares=[f"{path}/shared,tag=s"]) as machine:
        if rng.randrange(2):
            kills(machine, "virtiofsd")


def network(path: Path, rng: random.Random) -> None:
    """passt, or a tap."""
    with netns.network_namespace():
        for words in (
            "tuntap add out mode tap", "addr add 10.7.0.2/24 dev out", "link set out up",
            "route add default via 10.7.0.1 dev out",
        ):  # fmt: skip
            netns.ip(words)
        if rng.randrange(2):
            with running(path, nets=["tap=out"]):
                pass
        else:
            with running(path, nets=["user"]) as machine:
                if rng.randrange(2):
                    kills(machine, "passt")


def others_disk(path: Path, rng: random.Random) -> None:
    """A vhost-user back end that dies, and comes back."""
    back = BlkBackend(disk(path), path / "disk.sock")
    try:
        with running(path, vhost_user_blks=[str(back.socket)]) as machine:
            if rng.randrange(2):
                back.kill()
                until(lambda: "DeviceError" in str(machine.event_log), "its end is not told")
                if rng.randrange(2):
                    back.start()
    finally:
        back.kill()


def command(path: Path, rng: random.Random) -> None:
    """`vmm run`, ended by itself or by SIGKILL."""
    options = ["--console", "none", "--rng", "--vsock", f"cid=5,path={path}/v", "--timeout", "0.2"]
    words = [sys.executable, "-m", "vmm", "run", tiny.kernel(path, tiny.SPIN), *options]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if rng.randrange(2):
            time.sleep(rng.random() * 0.2)
            process.kill()
        process.wait(LIMIT)


CYCLES: tuple[Cycle, ...] = (
    *(exits, powers_off, triple_fault, is_stopped, time_limit, is_not_started, is_forgotten),
    *(cannot_be, all_devices, floods_a_device, goes_back, is_kept, is_copied, fails, is_asked),
    has_functions,
)
HELPERS: tuple[Cycle, ...] = (image_helper, others_disk, command)
ROOT: tuple[Cycle, ...] = (directory, network)


def available() -> list[Cycle]:
    """The cycles that this host can do."""
    found = [*CYCLES, *HELPERS]
    if not shutil.which("qemu-storage-daemon"):
        found = [*CYCLES, command]
    if os.geteuid() == 0 and shutil.which("passt"):
        found += ROOT
    return found
