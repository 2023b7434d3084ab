"""The kernel's tap devices: one open descriptor a queue (linux/if_tun.h).

A frame is one readv(2) or writev(2), with its virtio-net header before it, checked by the kernel.
An interface made by attaching to it is gone with its last descriptor, whatever becomes of us.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmm.forked import drop_in_child
from vmm.net.port import LinkLost, Port
from vmm.virtio import net_spec as n
from vmm.virtio.spec import bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6 = 1, 2, 4, 8, 32, 64
_IFREQ = struct.Struct("16sH22x")
_OFFLOADS = (
    (n.F_GUEST_CSUM, TUN_F_CSUM),
    (n.F_GUEST_TSO4, TUN_F_TSO4),
    (n.F_GUEST_TSO6, TUN_F_TSO6),
    (n.F_GUEST_ECN, TUN_F_TSO_ECN),
    (n.F_GUEST_USO4, TUN_F_USO4),
    (n.F_GUEST_USO6, TUN_F_USO6),
)
_USO_FLAGS = TUN_F_USO4 | TUN_F_USO6
_BASE = bits(
    n.F_CSUM, n.F_HOST_TSO4, n.F_HOST_TSO6, n.F_HOST_ECN,
    n.F_GUEST_CSUM, n.F_GUEST_TSO4, n.F_GUEST_TSO6, n.F_GUEST_ECN, n.F_CTRL_GUEST_OFFLOADS,
)  # fmt: skip
_USO = bits(n.F_HOST_USO, n.F_GUEST_USO4, n.F_GUEST_USO6)
GONE = (errno.EBADFD, errno.ENODEV)
"""What reads and writes say when somebody has deleted the interface."""


class TapPort(Port):
    """A queue of a tap interface, attached by `attach`."""

    plain = True

    def __init__(self) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.attached = True
        drop_in_child(self)

    def attach(self, name: str, *, multi: bool) -> str:
        """Become a queue of interface `name`, made if there is none; its name. Raises OSError.

        A `%d` in the name is for the kernel to fill in.
        """
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi else 0)
        request = fcntl.ioctl(self.fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", n.HEADER_SIZE))
        return request[:16].rstrip(b"\0").decode()

    def features(self) -> int:
        """The offloads this kernel's taps know."""
        try:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, TUN_F_CSUM | _USO_FLAGS)
        except OSError:  # before Linux 6.2
            return _BASE
        finally:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, 0)
        return _BASE | _USO

    def set_offloads(self, offloads: int) -> None:
        """What may come out of `read`, as GUEST_* bits; of the whole interface."""
        mask = sum(flag for bit, flag in _OFFLOADS if offloads >> bit & 1)
        # The kernel refuses combinations that make no sense to it; a driver may choose any.
        if not mask & TUN_F_CSUM:
            mask = 0
        if not mask & (TUN_F_TSO4 | TUN_F_TSO6):
            mask &= ~TUN_F_TSO_ECN
        if mask & _USO_FLAGS != _USO_FLAGS:
            mask &= ~_USO_FLAGS
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, mask)

    def set_attached(self, attached: bool) -> None:
        """Whether this queue of a multiqueue interface is used."""
        flags = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
        fcntl.ioctl(self.fd, TUNSETQUEUE, _IFREQ.pack(b"", flags))
        self.attached = attached

    def read(self, views: list[memoryview]) -> int:
        try:
            return os.readv(self.fd, views)
        except BlockingIOError:
            return 0
        except OSError as err:
            if err.errno in GONE:
                raise LinkLost("the interface was deleted") from err
            self.dropped += 1
            return 0

    def write(self, views: Sequence[memoryview]) -> bool:
        try:
            os.writev(self.fd, views)
        except OSError as err:
            if err.errno in GONE:
                raise LinkLost("the interface was deleted") from err
            self.dropped += 1  # the interface is down (EIO), or the header is nonsense (EINVAL)
        return True

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
