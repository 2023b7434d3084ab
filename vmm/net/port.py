"""What the network device needs of whatever it is connected to.

A back end has a port for each pair of queues. A frame goes through a port with its 12-byte
virtio-net header before it, from and into views of guest memory.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


GONE = "it has ended"
"""What LinkLost says where the peer has hung up and no more is known."""


class LinkLost(Exception):
    """The other side is gone; the text says what happened."""


class Port:
    """One queue pair's way to the host. Reads come from one thread, writes from another.

    Attributes:
        fd: readable when there is something to read; -1 where nothing ever comes.
        blocked: a write is waiting for `fd` to be writable; call `resume` then.
        dropped: frames that could not be sent.
        plain: `read` and `write` are no more than readv(2) and writev(2) of `fd`.
    """

    fd = -1
    blocked = False
    dropped = 0
    plain = False

    def read(self, views: list[memoryview]) -> int:
        """Take one frame: header and frame go into `views`, as far as they go.

        The bytes taken, the header's 12 among them; 0: nothing is there. Raises LinkLost.
        """
        return 0

    def write(self, views: Sequence[memoryview]) -> bool:
        """Send one frame, header first; what cannot be sent is dropped. The views must stay until
        `flush`. False: taken, but no more, until `resume`. Raises LinkLost."""
        return True

    def flush(self) -> bool:
        """Everything written is on its way; False: no more, until `resume`. Raises LinkLost."""
        return True

    def resume(self) -> None:
        """`fd` is writable again. Raises LinkLost."""


class Backend:
    """What a network device is connected to.

    Attributes:
        features: the offloads it carries, as bits of the network device.
        mtu: bytes of the largest packet, where the guest is to be told; else 0.
        ports: one or more.
        peer: for messages.
        on_link: told, from any thread, when the link goes (False) or comes back.
        peer_fd: a socket whose other end hangs up when the peer has gone; -1: there is none.
    """

    features = 0
    mtu = 0
    peer = ""
    peer_fd = -1

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.on_link: Callable[[bool], object] = bool

    def trouble(self) -> str:
        """Why no frame passes although the driver has started, in one line; empty: nothing is
        known to be wrong."""
        return ""

    def set_offloads(self, offloads: int) -> None:
        """The driver takes what these GUEST_* bits say."""

    def set_pairs(self, pairs: int) -> None:
        """The driver uses the first `pairs` ports."""

    def why_gone(self) -> str:
        """What is known of why the peer has gone."""
        return GONE

    def close(self) -> None:
        """Give everything back; harmless twice."""


def scatter(views: Sequence[memoryview], data: memoryview) -> None:
    """Copy `data` into `views`, as far as they go."""
    at, size = 0, len(data)
    for view in views:
        part = min(len(view), size - at)
        view[:part] = data[at : at + part]
        at += part
        if at == size:
            return


def collect(views: Sequence[memoryview], size: int) -> bytearray:
    """The first `size` bytes of `views`, which may name much more memory than there is."""
    data = bytearray()
    for view in views:
        data += view[: size - len(data)]
        if len(data) == size:
            break
    return data
