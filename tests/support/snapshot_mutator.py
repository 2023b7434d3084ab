"""Snapshots that somebody changed, every checksum made right again, restored and run for a moment.

    python -m tests.support.snapshot_mutator SECONDS [SEED]

prints what came out that is not a SnapshotError or another line for a person, and what was slow.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import mutate
from tests.support.bare import MIB, bare_machine
from tests.support.snapshots import read_manifest, reseal, write_manifest
from tests.support.virtio_driver import RINGS
from vmm import Machine
from vmm.errors import VmmError
from vmm.machine import exits
from vmm.snapshot import manifest, plain
from vmm.virtio import spec

SLOW = 2.0
"""Seconds of this thread's that nothing takes. Looked at by the program, not by tests."""
HALTED = "1: hlt; jmp 1b"
DEVICES: dict[str, Any] = {
    "nets": ["lan=mutator"],
    "rng": True,
    "balloon": 0,
    "vsock": "cid=3",
    "console": "hvc,none",
    "cpus": 2,
}


def at_work(machine: Machine) -> None:
    """Have every virtio device be as with a driver at work: rings in all, requests in those whose
    devices do not mind what is in them."""
    virtio = machine.platform.virtio
    assert virtio is not None
    for number, transport in enumerate(virtio.transports):
        device = transport.device
        with device.control:
            device.accept_features(device.features & ~(1 << spec.F_RING_PACKED))
            device.set_status(spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK)
            for index, slot in enumerate(device.slots):
                base = RINGS + (number << 16) + (index << 12)
                slot.size = min(slot.size_max, 16)
                slot.desc, slot.driver, slot.device = base, base + 0x400, base + 0x800
                machine.memory.write(base, struct.pack("<QIHH", 0x200000, 64, index % 2 * 2, 0))
                wanted = int(device.name in ("rng", "balloon", "console"))
                machine.memory.write(slot.driver, struct.pack("<HHH", 0, wanted, 0))
                device.enable_queue(index)
            transport._connect()
            device.set_status(device.status | spec.DRIVER_OK)


def make(directory: Path) -> list[Path]:
    """Snapshots under `directory` to be mutated: of one machine over MMIO, one over PCI, one of an
    idle machine, and the difference to that."""
    image = directory / "disk.img"
    image.write_bytes(bytes(MIB))
    made = []
    for transport in ("mmio", "pci"):
        options = {**DEVICES, "drives": [str(image)], "transport": transport}
        with bare_machine(HALTED, **options) as m:
            at_work(m)
            m.start()
            m.pause()
            made.append(directory / transport)
            m.snapshot(made[-1])
    with bare_machine(HALTED) as m:
        m.snapshot(directory / "full")
        m.memory.write(0x300000, b"x" * 5000)
        made += [directory / "full", directory / "diff"]
        m.snapshot(made[-1], base=made[-2])
    return made


class Mutator:
    """Tries mutations; a context manager that leaves no files behind.

    Args:
        seed: all that is tried follows from it.
        slow: seconds of CPU time that are too many for one.

    Attributes:
        tried: how many, by kind.
        accepted: how many of them made a machine.
        found: what should not have been: by kind, where and what, the first mutation that did it.
    """

    def __init__(self, seed: int = 1, *, slow: float = 1e9) -> None:
        self.slow = slow
        self.rng = random.Random(seed)
        self.tried: collections.Counter[str] = collections.Counter()
        self.accepted = 0
        self.found: dict[str, str] = {}
        self._directory = Path(tempfile.mkdtemp(prefix="vmm-mutator-"))
        self._snapshots = make(self._directory)
        self._originals = {
            snapshot: {name: (snapshot / name).read_bytes() for name in self._names(snapshot)}
            for snapshot in self._snapshots
        }

    @staticmethod
    def _names(snapshot: Path) -> list[str]:
        return [name for name in os.listdir(snapshot) if name.endswith((".json", ".index"))]

    def __enter__(self) -> Mutator:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self._directory)

    def run(self, *, seconds: float = 1e9, count: int = 1 << 62) -> None:
        """Try mutations for so long, or so many."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and sum(self.tried.values()) < count:
            self.step()

    def step(self) -> None:
        """Try one mutation."""
        snapshot = self.rng.choice(self._snapshots)
        kind = self.rng.choice(["manifest", "state", "state", "state", "index", "text"])
        target = snapshot
        if snapshot.name == "diff" and self.rng.random() < 0.5:
            target = snapshot.parent / "full"
        with self._restored_after(target):
            what = getattr(self, f"_{kind}")(target)
            if target is not snapshot:  # whose checksum is in the manifest of what is above it
                told = read_manifest(snapshot)
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    told["base"]["checksum"] = read_manifest(target)[manifest.CHECKSUM]
                    write_manifest(snapshot, told)
            try:
                self._attempt(kind, snapshot, f"{snapshot.name}: {what}")
            finally:
                if target is not snapshot:
                    self._put_back(snapshot)

    @contextlib.contextmanager
    def _restored_after(self, snapshot: Path) -> Iterator[None]:
        try:
            yield
        finally:
            self._put_back(snapshot)

    def _put_back(self, snapshot: Path) -> None:
        for name, data in self._originals[snapshot].items():
            (snapshot / name).write_bytes(data)

    # --- kinds of mutations -----------------------------------------------------------------------

    def _manifest(self, snapshot: Path) -> str:
        told = read_manifest(snapshot)
        del told[manifest.CHECKSUM]
        for _ in range(20):
            changed, what = mutate.mutated(told, self.rng)
            if isinstance(changed, dict):
                with contextlib.suppress(ValueError, RecursionError):  # no JSON, so no checksum
                    write_manifest(snapshot, changed)
                    return what
        return "nothing"

    def _state(self, snapshot: Path) -> str:
        state = plain.loads(self._originals[snapshot]["state.json"])
        whats = []
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            state, what = mutate.mutated(state, self.rng)
            whats.append(what)
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            (snapshot / "state.json").write_bytes(loose(state))
        reseal(snapshot, "state.json")
        return "; ".join(whats)

    def _index(self, snapshot: Path) -> str:
        name = self.rng.choice([n for n in self._originals[snapshot] if n.endswith(".index")])
        data = mutate.scrambled(self._originals[snapshot][name], self.rng)
        (snapshot / name).write_bytes(data)
        reseal(snapshot, name)
        return f"{name}: {data[:64].hex()}"

    def _text(self, snapshot: Path) -> str:
        if self.rng.random() < 0.5:
            data = mutate.text(read_manifest(snapshot), self.rng)
            (snapshot / manifest.NAME).write_bytes(data)
        else:
            data = mutate.text(json.loads(self._originals[snapshot]["state.json"]), self.rng)
            (snapshot / "state.json").write_bytes(data)
            reseal(snapshot, "state.json")
        return f"text {data[:60]!r}"

    # --- an attempt -------------------------------------------------------------------------------

    def _attempt(self, kind: str, snapshot: Path, what: str) -> None:
        self.tried[kind] += 1
        options: dict[str, Any] = {
            "trusted": self.rng.choice([True, None]),
            "verify": self.rng.random() < 0.2,
            "clock": self.rng.choice(["step", "keep"]),
            "nets": ["lan=mutator"] if snapshot.name in ("mmio", "pci") else [],
            "console": "none",
        }
        begun = time.thread_time()
        try:
            self._live(Machine.restore(snapshot, **options))
        except VmmError as err:
            if "\n" in str(err) or len(str(err)) > 2000:
                self._note(f"{kind}: {type(err).__name__} in {len(str(err))} characters", what)
        except BaseException as err:
            own = [
                frame for frame in traceback.extract_tb(err.__traceback__)
                if "/vmm/" in frame.filename and "/tests/" not in frame.filename
            ]  # fmt: skip
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
            self._note(f"{kind}: {type(err).__name__}: {str(err)[:90]} @ {where}", what)
            if isinstance(err, KeyboardInterrupt):
                raise
        taken = time.thread_time() - begun
        if taken > self.slow:
            self._note(f"{kind}: slow ({taken:.0f} s)", what)

    def _live(self, machine: Machine) -> None:
        """The machine goes on, and does what machines do."""
        self.accepted += 1
        with machine as m:
            m.start()
            time.sleep(0.002)
            with contextlib.suppress(VmmError):  # the guest may have ended
                m.pause()
                m.checkpoint(disks="keep")
                m.resume()
                m.rollback()
            if m.exit is not None and m.exit.kind == exits.MONITOR_ERROR:
                raise RuntimeError(f"monitor error: {m.exit.message} {m.exit.report[-600:]}")

    def _note(self, kind: str, what: str) -> None:
        self.found.setdefault(kind, what)


def loose(value: Any) -> bytes:
    """As `plain.dumps`, but of anything at all."""

    def pack(each: Any) -> Any:
        if isinstance(each, (bytes, bytearray)):
            return json.loads(plain.dumps(each))
        if isinstance(each, dict):
            if all(isinstance(key, str) for key in each):
                return {key: pack(item) for key, item in each.items()}
            return {plain.DICT: [[key, pack(item)] for key, item in each.items()]}
        return [pack(item) for item in each] if isinstance(each, (list, tuple)) else each

    return json.dumps(pack(value)).encode()


def main(argv: list[str]) -> int:
    with Mutator(int(argv[1]) if len(argv) > 1 else 1, slow=SLOW) as mutator:
        mutator.run(seconds=float(argv[0]))
    print(dict(mutator.tried), "accepted:", mutator.accepted)
    for kind, what in mutator.found.items():
        print(kind, "<-", what)
    return 1 if mutator.found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
