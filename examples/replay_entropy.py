"""A virtio device of one's own: an entropy source that replays a file, for tests that must repeat.

    python examples/replay_entropy.py FILE KERNEL INITRD

The guest needs nothing new: Linux's virtio_rng drives it, and /dev/hwrng gives what is in FILE,
over and over.
"""

import sys

from vmm import Machine, MachineConfig
from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import Chain


class ReplayEntropy(VirtioDevice):
    """Gives `data`, byte after byte, and begins again at its end."""

    ID = spec.ID_ENTROPY
    QUEUES = (8,)  # one queue, of 8 entries

    def __init__(self, data: bytes) -> None:
        super().__init__("replay")
        self.data = data
        self.at = 0

    def request(self, index: int, chain: Chain) -> int:
        """Fill a buffer of the guest's; how many bytes that were."""
        size = min(chain.writable_size(), 4096)
        times = (self.at + size) // len(self.data) + 1
        written = chain.write((self.data * times)[self.at : self.at + size])
        self.at = (self.at + written) % len(self.data)
        return written


if __name__ == "__main__":
    file, kernel, *initrds = sys.argv[1:]
    with open(file, "rb") as source:
        content = source.read()
    config = MachineConfig(
        kernel, initrds=initrds, console="auto", devices=[lambda: ReplayEntropy(content)]
    )
    with Machine(config) as machine:
        machine.start()
        sys.exit(machine.wait().status)
