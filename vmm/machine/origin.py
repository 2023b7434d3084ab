"""What a machine that does not boot comes from: a snapshot, or another machine."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config import MachineConfig
    from vmm.kvm import Kvm, Vm
    from vmm.machine.machine import Machine
    from vmm.memory import GuestMemory


class Origin:
    """Given to `Machine`, it stands for the kernel.

    Attributes:
        begun: the VM's first half, where it was begun before; the machine takes it over.
    """

    begun: tuple[Kvm, Vm] | None = None

    def begin(self, config: MachineConfig) -> tuple[Kvm, Vm]:
        """The VM's first half, see `vmm.machine.begin`."""
        begun, self.begun = self.begun, None
        if begun is not None:
            return begun
        from vmm.machine.begin import begin

        return begin(config)

    def map_memory(self, config: MachineConfig) -> GuestMemory:
        """The guest's RAM, which the machine closes."""
        raise NotImplementedError

    def apply(self, machine: Machine) -> None:
        """Put the state in; memory, devices and vCPUs are there, and nothing has run."""
        raise NotImplementedError

    def threads(self) -> list[Callable[[Callable[[], object]], object]]:
        """Of each thread that it has while nothing has run, a function that has it call one."""
        return []
