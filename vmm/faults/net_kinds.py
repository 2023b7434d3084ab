"""What can happen to frames."""

from __future__ import annotations

from vmm.faults.net_layer import NetFault
from vmm.faults.wire import on_wire
from vmm.virtio.net_spec import HEADER_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.faults.net_layer import Passage
    from vmm.faults.rules import Chance


class Loss(NetFault):
    """It does not arrive."""

    def strike(self, passage: Passage, chance: Chance) -> None:
        passage.packets = []


class Delay(NetFault):
    """It arrives `delay` seconds later, and up to `jitter` more."""

    delay = jitter = 0.0

    def strike(self, passage: Passage, chance: Chance) -> None:
        passage.delay += self.delay + chance.random.uniform(0, self.jitter)


class Duplicate(NetFault):
    """It arrives twice."""

    def strike(self, passage: Passage, chance: Chance) -> None:
        passage.packets = passage.packets * 2


class Corrupt(NetFault):
    """One bit of it is flipped, after checksums were made."""

    def strike(self, passage: Passage, chance: Chance) -> None:
        packets = [each for packet in passage.packets for each in on_wire(packet)]
        number = chance.random.randrange(len(packets))
        packet = bytearray(packets[number])
        at = chance.random.randrange(HEADER_SIZE, max(len(packet), HEADER_SIZE + 1))
        if at < len(packet):
            packet[at] ^= 1 << chance.random.randrange(8)
        packets[number] = bytes(packet)
        passage.packets = packets


class Unplugged(NetFault):
    """The link is down, and the guest is told."""

    def begin(self) -> None:
        self.layer.device.set_link(False)

    def end(self) -> None:
        others = self.layer.control.faults
        if not any(isinstance(each, Unplugged) and each.layer is self.layer for each in others):
            self.layer.device.set_link(True)
