"""A private LAN that falls apart: machines in different parts do not hear each other."""

from __future__ import annotations

from vmm.errors import UsageError
from vmm.faults.rules import Control, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.machine.machine import Machine
    from vmm.net.lan import Lan, LanPort


def partition(*parts: Machine | Iterable[Machine], lan: str | None = None) -> Fault:
    """Part the LAN that machines share (`nets=["lan=NAME"]`): each hears only its own part.

        with partition([a, b], [c]):
            ...

    Machines on the LAN that are not named are one more part together. It is the LAN's: it holds
    until it is cleared, whatever becomes of the machines, and each of them logs it.

    Args:
        parts: a machine, or several, each.
        lan: the LAN's name, where they share several.

    Raises:
        UsageError: they share none, or a machine is in two parts.
    """
    where = "faults.partition"
    groups = [_machines(part) for part in parts]
    machines = [machine for group in groups for machine in group]
    if not machines:
        raise UsageError(f"{where}: no machines; say partition([a, b], [c])")
    if len(set(map(id, machines))) < len(machines):
        raise UsageError(f"{where}: a machine is in two parts")
    found = _lan([_ports(machine) for machine in machines], lan, where)
    sides = {
        port: number
        for number, group in enumerate(groups, 1)
        for machine in group
        for at, port in _ports(machine)
        if at is found
    }

    def emit(event: object) -> None:
        for machine in machines:
            if machine.state != "closed":
                machine.faults.tell(event)  # type: ignore[arg-type]

    return Partition(Control(emit=emit), found, sides).set()


class Partition(Fault):
    """`lan` in parts; `sides` says in which part a port is."""

    def __init__(self, control: Control, lan: Lan, sides: dict[LanPort, int]) -> None:
        parts = [sum(side == each for side in sides.values()) for each in sorted({*sides.values()})]
        super().__init__(control, f"lan {lan.name}".rstrip(), "partition", {"machines": parts})
        self._lan, self._sides = lan, sides

    def begin(self) -> None:
        self._lan.part(self._sides)

    def end(self) -> None:
        self._lan.unite(self._sides)


def _machines(part: Machine | Iterable[Machine]) -> list[Machine]:
    from vmm.machine.machine import Machine

    machines = [part] if isinstance(part, Machine) else list(part)
    for each in machines:
        if not isinstance(each, Machine):
            raise UsageError(f"faults.partition: {each!r} is not a machine")
    return machines


def _ports(machine: Machine) -> list[tuple[Lan, LanPort]]:
    """Where `machine` is on a LAN."""
    from vmm.net.lan import LanBackend
    from vmm.virtio.net import Nic

    virtio = machine.platform.virtio
    cards = [transport.device for transport in virtio.transports] if virtio is not None else []
    backends = [card.backend for card in cards if isinstance(card, Nic)]
    return [(each.lan, each.port) for each in backends if isinstance(each, LanBackend)]


def _lan(places: list[list[tuple[Lan, LanPort]]], name: str | None, where: str) -> Lan:
    """The one LAN all of `places` are on."""
    shared = [
        lan
        for lan in {id(lan): lan for lan, _ in places[0]}.values()
        if all(any(at is lan for at, _ in place) for place in places) and name in (None, lan.name)
    ]
    if not shared:
        which = f"lan={name}" if name is not None else "a LAN"
        raise UsageError(f'{where}: the machines do not share {which}; nets=["lan=NAME"] makes one')
    if len(shared) > 1:
        names = ", ".join(repr(lan.name) for lan in shared)
        raise UsageError(f"{where}: the machines share {names}; say lan=")
    return shared[0]
