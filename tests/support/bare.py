"""Machines without a kernel: guests in assembly (tests.support.guests) on a whole `Machine`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from tests.support.guests import CODE, LIMIT, assemble, set_up, write_tables
from tests.support.virtio_driver import Driver
from vmm import Machine, MachineConfig
from vmm.machine.origin import Origin
from vmm.memory import GuestMemory
from vmm.snapshot.capture import apply, capture, quiesced
from vmm.virtio.device import VirtioDevice
from vmm.virtio.transport import Transport

MIB = 1 << 20


def bare_machine(
    source: str,
    mode: str = "long",
    *,
    handlers: Mapping[int, str] | None = None,
    regs: Mapping[str, int] | None = None,
    **options: object,
) -> Machine:
    """A machine whose first vCPU is about to run `source`."""
    handlers = handlers or {}
    values: dict[str, object] = {"memory": 4 * MIB, **options}
    machine = Machine(MachineConfig(**values))  # type: ignore[arg-type]
    try:
        machine.memory.write(CODE, assemble(source, mode, tuple(handlers.values())))
        write_tables(machine.memory, mode, handlers)
        set_up(machine.vcpus[0], mode, regs or {})
    except BaseException:
        machine.close()
        raise
    return machine


def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait until it holds, for at most LIMIT seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come to pass"
        time.sleep(0.001)


class Twin(Origin):
    """A copy of a paused machine, in this process's memory."""

    def __init__(self, machine: Machine) -> None:
        with quiesced(machine):
            self.state = capture(machine)
            self.ram = [(region.gpa, bytes(region.data)) for region in machine.memory.regions]

    def map_memory(self, config: MachineConfig) -> GuestMemory:
        memory = GuestMemory(config.memory, config.backing)
        for gpa, data in self.ram:
            memory.write(gpa, data)
        return memory

    def apply(self, machine: Machine) -> None:
        apply(machine, self.state)

    def machine(self, **options: object) -> Machine:
        """A machine from it."""
        values: dict[str, object] = {"memory": 4 * MIB, **options}
        return Machine(MachineConfig(**values), origin=self)  # type: ignore[arg-type]


class DriverOn(Driver):
    """The driver of a machine's virtio device number `number`, over MMIO."""

    def __init__(self, machine: Machine, number: int = 0, **options: bool) -> None:
        self.machine, self.number = machine, number
        virtio = machine.platform.virtio
        assert virtio is not None
        device = virtio.transports[number].device
        super().__init__(device, memory=machine.memory, **options)

    def attach(self, device: VirtioDevice) -> Transport:
        virtio = self.machine.platform.virtio
        assert virtio is not None
        return virtio.transports[self.number]

    def __exit__(self, *exc: object) -> None:
        self.machine.close()
