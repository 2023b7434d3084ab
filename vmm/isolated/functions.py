"""Functions of the program that a machine's process calls: each has a connection of its own, and a
thread that serves it."""

from __future__ import annotations

import threading

from vmm.isolated import wire
from vmm.isolated.parts import connection
from vmm.isolated.wire import Channel, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from vmm.isolated.process import MachineProcess
    from vmm.machine.binding import Bound

SIZES = (1, 2, 4, 8)


class FunctionServer:
    """Serves calls on one connection until that is closed.

    Args:
        process: the machine's, which is not called late while a function runs.
        answer: given the message, the data and the descriptors of a call; what it returns is the
            answer. What it raises ends the connection, after `failed`.
        failed: told of what `answer` raises.

    Attributes:
        theirs: the other end, to be handed over and closed.
    """

    def __init__(
        self,
        process: MachineProcess,
        answer: Callable[[Any, bytes, list[int]], object],
        failed: Callable[[Exception], object],
        name: str,
    ) -> None:
        from vmm.forked import drop_in_child

        self._process = process
        self._answer = answer
        self._failed = failed
        ours, self.theirs = wire.pair()
        drop_in_child(ours)
        self._channel = Channel(ours)
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        channel, process = self._channel, self._process
        try:
            while True:
                message, data, fds = channel.receive()
                begun = process.function_begins()
                try:
                    answer = self._answer(message, data, fds)
                except WireError:
                    raise
                except Exception as err:
                    self._failed(err)
                    answer = None
                    channel.send({"failed": 1}, patience=wire.Patience(1.0))
                finally:
                    process.function_ends(begun)
                if answer is not None:
                    channel.send({"ok": answer}, patience=wire.Patience(1.0))
        except (WireError, wire.LateError):
            pass
        finally:
            channel.close()

    def close(self) -> bool:
        """Hang up; whether the function, if one is called, has returned."""
        import socket
        from contextlib import suppress

        with suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(0.4)
            return not self._thread.is_alive()
        return True


def of_range(bound: Bound, size: int) -> Callable[[Any, bytes, list[int]], object]:
    """Answers the guest's accesses to `size` ports or addresses."""

    def answer(message: Any, data: bytes, fds: list[int]) -> object:
        wire.close_all(fds)
        if not isinstance(message, list) or not all(type(each) is int for each in message[1:]):
            raise WireError("a call that is none")
        if message[0] == "read" and len(message) == 3:
            _, offset, width = message
            value = 0
        elif message[0] == "write" and len(message) == 4:
            _, offset, width, value = message
        else:
            raise WireError("a call that is none")
        if width not in SIZES or not 0 <= offset < size or not 0 <= value < 1 << 8 * width:
            raise WireError("an access that is none")
        if message[0] == "read":
            return bound.read(offset, width)
        bound.write(offset, width, value)
        return 0

    return answer


def of_connections(serve: Callable[[socket.socket], None]) -> Callable[..., object]:
    """Takes connections that the guest has made."""

    def answer(message: Any, data: bytes, fds: list[int]) -> object:
        if len(fds) != 1:
            wire.close_all(fds)
            raise WireError("a connection that is none")
        serve(connection(fds[0]))
        return None

    return answer


def of_frames(match: Callable[[bytes], object]) -> Callable[..., object]:
    """Says whether a frame of a network card is meant."""

    def answer(message: Any, data: bytes, fds: list[int]) -> object:
        wire.close_all(fds)
        return bool(match(data))

    return answer
