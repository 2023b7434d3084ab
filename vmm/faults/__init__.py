"""Scripted faults: disks, networks, clocks and processors that fail when a test says so.

    machine.faults.disk(0).fail(sectors=range(100, 200), on="read", nth=3)
    with machine.faults.net(0).loss(0.1):
        ...
    machine.faults.power_cut()

See docs/faults.md. Nothing of this is loaded, or in the way of a request, until it is asked for.
"""

from __future__ import annotations

from vmm.faults.lan import partition
from vmm.faults.machine import Faults
from vmm.faults.rules import Fault, FaultEvent

__all__ = ["Fault", "FaultEvent", "Faults", "partition"]
