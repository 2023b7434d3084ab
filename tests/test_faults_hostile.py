"""Faults under drivers that break every rule (tests/test_virtio_hostile.py): no exception, no
access outside memory, nothing held for ever, and devices usable when the faults are gone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.virtio_hostile import MmioRegisters, Rig
from tests.test_virtio_hostile import DEVICES
from vmm.faults.disk import DiskFaults
from vmm.faults.net import NetFaults
from vmm.faults.rules import Control, Fault

CASES, BATCH = 1500, 100
Kind = tuple[Callable[[], list[Fault]], Callable[[], None]]
"""Sets faults; waits until what they have delayed is gone."""


def disk_faults(device: Any, control: Control) -> Kind:
    faults = DiskFaults(device, control, "disk")
    faults.volatile(cache=64 << 10)

    def make() -> list[Fault]:
        return [
            faults.latency(0.001, jitter=0.01, probability=0.3),
            faults.gone(silent=True),
            faults.fail(probability=0.2),
            faults.torn(some=True, probability=0.5),
            faults.corrupt(("read", "write"), probability=0.5),
            faults.short_read(probability=0.5),
            faults.drop(("write", "flush", "discard", "write zeroes"), probability=0.2),
        ]

    return make, lambda: None


def net_faults(device: Any, control: Control) -> Kind:
    faults = NetFaults(device, control, "net")

    def make() -> list[Fault]:
        return [
            faults.delay(0.0001, jitter=0.001, probability=0.5),
            faults.reorder(0.2),
            faults.loss(0.2),
            faults.duplicate(0.3),
            faults.corrupt(0.7),
        ]

    return make, lambda: nothing_waits(faults)


def nothing_waits(faults: NetFaults) -> None:
    """Wait until no frame is to be sent: many would push a good driver's out of what loops back."""
    limit = time.monotonic() + 60
    while any(port._tx for port in faults._layer._ports):
        assert time.monotonic() < limit
        time.sleep(0.001)


KINDS = {"blk": disk_faults, "net": net_faults}


@contextmanager
def some_of(make: Callable[[], list[Fault]], chance: random.Random) -> Iterator[None]:
    """A few of the faults, cleared in any order; the last after the others."""
    faults = make()
    chance.shuffle(faults)
    for fault in faults[: len(faults) // 2]:
        fault.clear()
    yield
    for fault in faults:
        fault.clear()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("name", KINDS)
def test_hostile_drivers(name: str, packed: bool, tmp_path: Path) -> None:
    row = DEVICES[name]
    failures: list[BaseException] = []
    device, control = row.make(tmp_path), Control(1, failed=failures.append)
    make, settle = KINDS[name](device, control)
    rig = Rig(device, MmioRegisters, packed=packed, event_idx=True, fill=row.fill,
              prelude=row.prelude)  # fmt: skip
    try:
        for batch in range(0, CASES, BATCH):
            with some_of(make, random.Random(batch)):
                for number in range(batch, batch + BATCH):
                    try:
                        rig.case(random.Random(number))
                    except Exception as err:
                        pytest.fail(f"{name}: case {number}: {type(err).__name__}: {err}")
            settle()
            row.good(rig.registers.driver(rig))
        assert control.faults == () and not failures
    finally:
        control.close()
        rig.close()
