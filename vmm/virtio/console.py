"""The console device (virtio 1.2, section 5.3): a console, and named ports beside it.

Port 0 is the console (`hvc0`); what is at the ports' other end is vmm.virtio.console_ports.
Everything runs on the machine's loop (vmm.virtio.on_loop). Output a port cannot take yet stays in
the guest's buffers; of input that the guest has no buffers for, little is read.
"""

from __future__ import annotations

import struct
from collections import deque

from vmm.errors import ShapeError
from vmm.virtio import spec
from vmm.virtio.on_loop import LoopDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.shapes import Table
    from vmm.virtio.console_ports import ConsolePort, Port
    from vmm.virtio.queue import Chain, VirtQueue

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 0, 1, 2
CONFIG = struct.Struct("<HHII")
"""cols, rows, max_nr_ports, emerg_wr."""
EMERG_WR = 8
CONTROL = struct.Struct("<IHH")
"""struct virtio_console_control: id, event, value."""
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7

CONTROL_RX, CONTROL_TX = 2, 3
MESSAGES_MAX = 256
"""Control messages that wait for the guest's buffers; the oldest go first, more are dropped."""
TURN = 64
"""Chains of one port before others of the loop have their turn."""
TURN_BYTES = 256 << 10
"""Bytes of one port's output before that: a chain may name all of memory a thousand times."""
CONTROL_TURN = 4
"""Batches of control messages before that."""
DONE, FULL, LATER = range(3)
"""What `_put_out` says: all of a chain is out; the port takes no more; the turn is over."""


class VirtioConsole(LoopDevice):
    """A console device.

    Args:
        ports: by number. A port 0 that is None is not announced (it always has queues).
    """

    ID = spec.ID_CONSOLE

    def __init__(self, ports: Sequence[Port | None], name: str = "console") -> None:
        self.multiport = len(ports) > 1
        self.FEATURES = spec.bits(F_SIZE, F_EMERG_WRITE) | self.multiport << F_MULTIPORT
        self.QUEUES = (64, 64)
        if self.multiport:
            self.QUEUES += (32, 32) + (64, 64) * (len(ports) - 1)
        super().__init__(name)
        self.ports = list(ports)
        self.config[:] = CONFIG.pack(0, 0, len(ports), 0)
        self._messages: deque[bytes] = deque()
        self._was_reset = False
        for port in ports:
            if port is not None:
                port.attach(self)

    # --- the host's side --------------------------------------------------------------------------

    def console_port(self) -> ConsolePort | None:
        """Port 0, where it is the machine's console."""
        from vmm.virtio.console_ports import ConsolePort

        port = self.ports[0]
        return port if isinstance(port, ConsolePort) else None

    def resize(self, cols: int, rows: int) -> None:
        """Tell the guest of its terminal's size; from any thread."""
        with self._mutex:
            struct.pack_into("<HH", self.config, 0, cols & 0xFFFF, rows & 0xFFFF)
            self.config_changed()
        self.call(self._tell_size)

    def _tell_size(self) -> None:
        port = self.ports[0]
        if self.has(F_MULTIPORT) and port is not None and port.ready:
            self.locked(self.message, 0, RESIZE, 0, self._size())

    def _size(self) -> bytes:
        # Columns first, as in the configuration (5.3.6.2). Linux had it the other way round
        # until commit 5326ab737a47, which is in the stable kernels too (Debian's 6.1).
        return bytes(self.config[:4])

    def message(self, port: int, event: int, value: int, more: bytes = b"") -> None:
        """Queue a control message. With the lock."""
        if self.has(F_MULTIPORT) and len(self._messages) < MESSAGES_MAX:
            self._messages.append(CONTROL.pack(port, event, value) + more)

    # --- queues -----------------------------------------------------------------------------------

    def serve(self, index: int) -> None:
        if index == CONTROL_TX:
            queue = self.slots[index].queue
            if queue is not None:
                self._control(queue)
        elif index != CONTROL_RX:
            port = self.ports[index // 2 - 1 if index > CONTROL_TX else 0]
            if port is not None:
                (self.transmit if index & 1 else self.receive)(port)

    def queues(self, port: Port) -> tuple[int, int]:
        """The numbers of its receive and transmit queues (5.3.2)."""
        first = 2 * port.number + 2 if port.number else 0
        return first, first + 1

    def transmit(self, port: Port) -> None:
        """Carry output from the guest to `port`, until either has no more. The loop does a turn,
        then others, and goes on."""
        index = self.queues(port)[1]
        while self._transmit(port, index) and not self.quiet:
            if self._loop is not None:
                self.again(index)
                return

    def _transmit(self, port: Port, index: int) -> bool:
        """A turn of it; whether there may be more to do."""
        queue = self.slots[index].queue
        if queue is None:
            return False
        port.waits = False
        left = TURN_BYTES
        try:
            for _ in range(TURN):
                if port.chain is None:
                    chains = queue.pop_batch(1)
                    if not chains:
                        if queue.rearm():
                            continue
                        return False
                    port.chain = chains[0]
                before = port.done
                how = self._put_out(port, port.chain, before + left)
                left -= port.done - before
                if how == LATER:
                    break
                if how == FULL:
                    port.waits = True
                    port.wait_to_write()
                    return False
                queue.push(port.chain, 0)
                port.chain, port.done = None, 0
        finally:
            if queue.publish():
                self.interrupt(index)
        return True

    def _put_out(self, port: Port, chain: Chain, end: int) -> int:
        """Output of `chain` up to byte `end`, from where it is: DONE, FULL or LATER."""
        skip = port.done
        for view in chain.readable:
            size = len(view)
            while skip < size:
                most = end - port.done
                if most <= 0:
                    return LATER
                taken = port.write(view[skip : skip + most])
                if not taken:
                    return FULL
                skip += taken
                port.done += taken
            skip -= size
        return DONE

    def receive(self, port: Port) -> None:
        """Carry input from `port` to the guest, until either has no more."""
        index = self.queues(port)[0]
        queue = self.slots[index].queue
        if queue is None:
            return
        for _ in range(TURN):
            if not port.has_input():
                break
            chains = queue.pop_batch(1)
            if not chains:
                if queue.rearm():
                    continue
                break
            queue.push(chains[0], port.read_into(chains[0]))
        else:
            self._go_on(index)
        if queue.publish():
            self.interrupt(index)
        port.drained()

    def _go_on(self, index: int) -> None:
        """Serve queue `index` after others of the loop; at once where there is no loop."""
        if self._loop is None:
            self.notify(index)
        else:
            self.again(index)

    # --- control ----------------------------------------------------------------------------------

    def _control(self, queue: VirtQueue) -> None:
        """The driver's control messages."""
        for _ in range(CONTROL_TURN):
            chains = queue.pop_batch()
            if not chains:
                if queue.rearm():
                    continue
                return
            for chain in chains:
                data = chain.read() if chain.readable_size() <= 4096 else b""
                queue.push(chain, 0)
                if len(data) >= CONTROL.size and self.has(F_MULTIPORT):
                    self._controlled(*CONTROL.unpack_from(data))
            if queue.publish():
                self.interrupt(CONTROL_TX)
        self._go_on(CONTROL_TX)

    def _controlled(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            for port in self.ports if value else ():
                if port is not None:
                    self.message(port.number, DEVICE_ADD, 1)
            return
        port = self.ports[number] if number < len(self.ports) else None
        if port is None:
            return
        if event == PORT_READY and value:
            port.ready = True
            if not number:
                self.message(0, CONSOLE_PORT, 1)
                if any(self.config[:4]):
                    self.message(0, RESIZE, 0, self._size())
            else:
                self.message(number, PORT_NAME, 1, port.name.encode() + b"\0")
            if port.connected:
                self.message(number, PORT_OPEN, 1)
        elif event == PORT_OPEN:
            port.guest_opened(bool(value))

    def flush(self) -> None:
        queue = self.slots[CONTROL_RX].queue if self._messages else None
        if queue is None:
            return
        while self._messages:
            chains = queue.pop_batch(1)
            if not chains:
                if queue.rearm():
                    continue
                break
            queue.push(chains[0], chains[0].write(self._messages.popleft()))
        if queue.publish():
            self.interrupt(CONTROL_RX)

    def config_written(self, offset: int, data: bytes) -> None:
        port = self.ports[0]
        if offset == EMERG_WR and port is not None:
            port.write(memoryview(data)[:1])  # a character of a kernel in trouble (5.3.6.1)

    # --- life -------------------------------------------------------------------------------------

    def started(self) -> None:
        if any(self.config[:4]) and not self.has(F_MULTIPORT):
            self.config_interrupt()  # Linux looks at the size only when it changes

        self.once("ports", self._renew_ports)

    def stopped(self) -> None:
        self._messages.clear()
        for port in self.ports:
            if port is not None:
                port.forget()
        self._was_reset = True
        self.once("ports", self._renew_ports)

    def _renew_ports(self) -> None:
        """The former driver is gone; there may be another one by now. On the loop."""
        with self._mutex:
            if self._was_reset:
                self._was_reset = False
                for port in self.ports:
                    if port is not None:
                        port.stop()
            self.locked(self._start_ports)

    def _start_ports(self) -> None:
        for port in self.ports:
            if port is not None:
                if not self.has(F_MULTIPORT):
                    port.ready = port.open = True  # there is no control queue to say so
                port.start()

    def queue_stopped(self, index: int) -> None:
        for port in self.ports:
            if port is not None and self.queues(port)[1] == index:
                port.chain, port.done = None, 0

    def close(self) -> None:
        self._loop = None  # it has ended before
        for port in self.ports:
            if port is not None:
                port.close()

    # --- state ------------------------------------------------------------------------------------

    def give_back(self) -> None:
        for port in self.ports:
            if port is not None:
                queue = self.slots[self.queues(port)[1]].queue
                if port.chain is not None and queue is not None:
                    queue.unpop(port.chain)
                    port.chain = None

    def save(self) -> dict[str, object]:
        self.hold()
        try:
            return {
                **super().save(),
                "ports": {str(port.number): port.save() for port in self.ports if port is not None},
                "messages": list(self._messages),
            }
        finally:
            self.release()

    CONFIG_STATE = ((0, 4),)

    def shape(self) -> Table:
        from vmm.shapes import Data, Items, Table
        from vmm.virtio.console_config import NAME_MAX

        ports = Table({}, {str(port.number): port.shape() for port in self.ports if port})
        messages = Items(Data(CONTROL.size, CONTROL.size + NAME_MAX + 1), 0, MESSAGES_MAX)
        return super().shape().with_more(ports=ports, messages=messages)

    def restore(self, state: dict[str, object]) -> None:
        super().restore(state)
        ports, messages = state["ports"], state["messages"]
        if not isinstance(ports, dict) or not isinstance(messages, list):
            raise ShapeError(f"state of {self.name}: no ports, or no messages")
        self._messages.extend(bytes(each) for each in messages)
        for port in self.ports:
            saved = None if port is None else ports.get(str(port.number))
            if port is not None and isinstance(saved, dict):
                port.restore(saved)
                if port.ready and bool(saved["connected"]) is not port.connected:
                    self.message(port.number, PORT_OPEN, int(port.connected))
