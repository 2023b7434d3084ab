"""vmm: a KVM virtual machine monitor in Python.

The public names are here, loaded on first use: a program pays only for what it takes.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm import errors, events, faults
    from vmm.aio import AsyncMachine
    from vmm.config import MachineConfig
    from vmm.console.tail import ConsoleClosed
    from vmm.errors import (
        AgentError,
        BootError,
        GuestMemoryError,
        HostError,
        KvmError,
        SnapshotError,
        StateError,
        UsageError,
        VmmError,
    )
    from vmm.initramfs import Initramfs
    from vmm.machine import Machine, MachineExit

__all__ = [
    "AgentError",
    "AsyncMachine",
    "BootError",
    "ConsoleClosed",
    "GuestMemoryError",
    "HostError",
    "Initramfs",
    "KvmError",
    "Machine",
    "MachineConfig",
    "MachineExit",
    "SnapshotError",
    "StateError",
    "UsageError",
    "VmmError",
    "__version__",
    "errors",
    "events",
    "faults",
]

_HOME = {
    "AsyncMachine": "vmm.aio",
    "ConsoleClosed": "vmm.console.tail",
    "Initramfs": "vmm.initramfs",
    "Machine": "vmm.machine",
    "MachineConfig": "vmm.config",
    "MachineExit": "vmm.machine",
}

if not TYPE_CHECKING:  # a checker knows the names above, and that there are no others

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'vmm' has no attribute {name!r}")
        from importlib import import_module

        if name in ("errors", "events", "faults"):
            return import_module(f"vmm.{name}")
        value = getattr(import_module(_HOME.get(name, "vmm.errors")), name)
        globals()[name] = value
        return value
