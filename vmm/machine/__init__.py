"""A machine and its life cycle."""

from __future__ import annotations

from vmm.machine.exits import MachineExit
from vmm.machine.machine import Machine

__all__ = ["Machine", "MachineExit"]
