"""One connection of the socket device: a host socket on one side, a port of the guest on the other.

Data goes straight between the socket and the guest's buffers. Bytes the host's program does not
take yet are kept, never more than the credit the guest was given (`alloc`). A stream is used with
its device's lock held, on the device's loop.
"""

from __future__ import annotations

import select
from contextlib import suppress

from vmm.virtio.vsock_packet import (
    OP_CREDIT_REQUEST,
    OP_RST,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from vmm.virtio.vsock import Vsock

BUF_ALLOC = 256 << 10
"""Bytes the guest may send that the host's program has not taken: Linux's own figure."""
KEPT_MAX = 32 << 20
"""What all connections share: with more than 128 of them, each new one may send less."""
BURST_MIN, BURST_MAX = 4 << 10, 128 << 10
"""Bytes read from the host at once; a stream that fills its bursts gets longer ones."""

_MASK = 0xFFFFFFFF


class Stream:
    """A connection.

    Attributes:
        host_port, guest_port: its name.
        alloc: bytes the guest may send that the host's program has not taken.
        sock: the host's side, not blocking; None while there is none.
        dialled: it was a host's program that asked for it.
        open: both sides have agreed; before, a REQUEST waits for its answer.
        out: bytes the host's program has not taken.
        gone: it is out of the device's table; what is left to do is to flush `out`.
    """

    __slots__ = (
        "_asked",
        "_burst",
        "_device",
        "_fwd",
        "_guest_ended",
        "_host_ended",
        "_reading",
        "_sent",
        "_taken",
        "_told",
        "_writing",
        "alloc",
        "credit_queued",
        "dialled",
        "gone",
        "guest_port",
        "host_port",
        "open",
        "out",
        "peer_alloc",
        "sock",
    )

    def __init__(
        self, device: Vsock, host_port: int, guest_port: int, sock: socket.socket | None
    ) -> None:
        self._device = device
        self.host_port = host_port
        self.guest_port = guest_port
        self.alloc = min(BUF_ALLOC, KEPT_MAX // (device.connections() + 1))
        self.sock = sock
        self.dialled = self.open = self.gone = False
        self.out = bytearray()
        self.peer_alloc = self._fwd = self._sent = 0
        self._taken = self._told = 0
        self._burst = BURST_MIN
        self._guest_ended = 0
        self._host_ended = 0
        self._reading = self._writing = False
        self._asked = False
        self.credit_queued = False

    # --- credit -----------------------------------------------------------------------------------

    def told(self) -> tuple[int, int]:
        """buf_alloc and fwd_cnt for a packet that is sent now."""
        self._told = self._taken
        return self.alloc, self._taken

    def credit(self, alloc: int, fwd: int) -> None:
        """What a packet of the guest's says of its room."""
        self.peer_alloc, self._fwd = alloc, fwd
        if self._asked and self._room() > 0:
            self._asked = False
            self.pull()

    def _room(self) -> int:
        """Bytes the guest has room for; not above 0 where it has none, or contradicts itself."""
        return self.peer_alloc - ((self._sent - self._fwd) & _MASK)

    def _tell(self) -> None:
        if (self._taken - self._told) & _MASK >= self.alloc // 4 and not self.gone:
            self.tell()

    def tell(self) -> None:
        """Send a CREDIT_UPDATE; one at a time."""
        if not self.credit_queued:
            self.credit_queued = True
            self._device.reply_credit(self)

    # --- from the guest -----------------------------------------------------------------------

    def accepted(self) -> None:
        """The guest answered our REQUEST with RESPONSE, or we its."""
        self.open = True
        self.pull()

    def write(self, data: list[memoryview], size: int) -> None:
        """Bytes of the guest's, for the host's program."""
        if (
            not self.open
            or self._guest_ended & SHUTDOWN_SEND
            or size > self.alloc - len(self.out)  # more than it had credit for
        ):
            self.reset()
            return
        sock, done = self.sock, 0
        if sock is None or self._host_ended & SHUTDOWN_RCV:
            self._taken = (self._taken + size) & _MASK  # nobody there any more; it was told
            self._tell()
            return
        if not self.out and size:
            try:
                done = sock.send(data[0]) if len(data) == 1 else sock.sendmsg(data)
            except BlockingIOError:
                pass
            except OSError:
                self._host_refuses()
                return
            self._taken = (self._taken + done) & _MASK
        if done < size:
            for view in data:
                part = len(view)
                if done >= part:
                    done -= part
                    continue
                self.out += view[done:] if done else view
                done = 0
            self._watch_writing(True)
        self._tell()

    def writable(self) -> None:
        """The host's program has made room."""
        sock = self.sock
        if sock is None:
            return
        while self.out:
            try:
                with memoryview(self.out) as view:
                    done = sock.send(view[: 128 << 10])
            except BlockingIOError:
                break
            except OSError:
                self.out.clear()
                self._host_refuses()
                return
            del self.out[:done]
            self._taken = (self._taken + done) & _MASK
        if not self.out:
            self._watch_writing(False)
            if self.gone:
                self.drop()
                return
            if self._guest_ended & SHUTDOWN_SEND:
                self._end_writing()
        self._tell()

    def shut_down(self, flags: int) -> None:
        """The guest's SHUTDOWN: a half or both."""
        self._guest_ended |= flags & SHUTDOWN_BOTH
        if self._guest_ended == SHUTDOWN_BOTH:
            # All it has sent is here. It waits for the RST with its port, the host's program may
            # be slow: the rest goes out without the guest.
            self._device.reply(self, OP_RST)
            self.finish()
            return
        if self._guest_ended & SHUTDOWN_SEND and not self.out:
            self._end_writing()
        if self._guest_ended & SHUTDOWN_RCV:
            self._watch_reading(False)
            self._shutdown(0)  # SHUT_RD: the host's program gets EPIPE

    # --- from the host ------------------------------------------------------------------------

    def pull(self) -> None:
        """Carry a burst from the host to the guest, if there is one, and watch for more."""
        sock, device = self.sock, self._device
        ended = self._host_ended & SHUTDOWN_SEND or self._guest_ended & SHUTDOWN_RCV
        if sock is None or not self.open or ended:
            return
        room = self._room()
        if room <= 0:
            self._watch_reading(False)
            if not self._asked:
                self._asked = True
                device.reply(self, OP_CREDIT_REQUEST)
            return
        want = min(room, self._burst)
        views = device.room(want)
        if not views:
            self._watch_reading(False)
            device.wait_for_room(self)
            return
        try:
            got = sock.recv_into(views[0]) if len(views) == 1 else sock.recvmsg_into(views)[0]
        except BlockingIOError:
            self._watch_reading(True)
            return
        except OSError:
            self.reset()
            return
        if not got:
            self._host_ends()
            return
        self._sent = (self._sent + got) & _MASK
        device.deliver(self, got)
        if got < want:
            self._burst = max(BURST_MIN, self._burst >> 1)
        elif self._burst < BURST_MAX:
            self._burst <<= 1
        self._watch_reading(True)

    def _host_ends(self) -> None:
        """End of file: the host's program sends no more, or is gone altogether."""
        self._watch_reading(False)
        poll = select.poll()
        assert self.sock is not None
        poll.register(self.sock, 0)
        flags = SHUTDOWN_BOTH if poll.poll(0) else SHUTDOWN_SEND  # POLLHUP: no half is left
        self._host_end(flags)

    def _host_refuses(self) -> None:
        """The host's program takes no more."""
        self._watch_writing(False)
        if self.gone:
            self.drop()
        else:
            self._host_end(SHUTDOWN_RCV)

    def _host_end(self, flags: int) -> None:
        self._host_ended |= flags
        self._device.reply(self, OP_SHUTDOWN, self._host_ended)
        if self._host_ended == SHUTDOWN_BOTH:
            self.drop()  # the guest answers with RST, or ends its side

    # --- ends -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Give up on it: RST to the guest."""
        self._device.reply(self, OP_RST)
        self._device.forget(self)
        self.gone = True
        self.drop()

    def finish(self) -> None:
        """The guest is done with it: what it sent still goes out."""
        self._device.forget(self)
        self.gone = True
        self._watch_reading(False)
        if not self.out or self.sock is None:
            self.drop()
        else:
            self._device.linger(self)

    def drop(self) -> None:
        """Close the host's side now."""
        self._watch_reading(False)
        self._watch_writing(False)
        self.out.clear()
        sock, self.sock = self.sock, None
        if sock is not None:
            sock.close()
        self._device.dropped(self)

    def _end_writing(self) -> None:
        self._shutdown(1)  # SHUT_WR

    def _shutdown(self, how: int) -> None:
        if self.sock is not None:
            with suppress(OSError):  # the other end has gone: the same to it
                self.sock.shutdown(how)

    def _watch_reading(self, wanted: bool) -> None:
        if wanted is not self._reading and self.sock is not None:
            self._reading = wanted
            self._device.watch(self.sock.fileno(), self.pull if wanted else None)

    def _watch_writing(self, wanted: bool) -> None:
        if wanted is not self._writing and self.sock is not None:
            self._writing = wanted
            self._device.watch_writing(self.sock.fileno(), self.writable if wanted else None)
