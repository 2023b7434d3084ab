"""A machine's virtio devices: where they are, who serves them, how they reach KVM."""

from __future__ import annotations

import time

from vmm import layout
from vmm.errors import UsageError
from vmm.virtio import mmio
from vmm.virtio.mmio import MmioTransport
from vmm.virtio.serve import QueueThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.devices.bus import AddressSpace
    from vmm.machine.machine import Machine
    from vmm.machine.peers import Peers
    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.loop import DeviceLoop
    from vmm.virtio.transport import Transport

MAX_DEVICES = len(layout.GSI_VIRTIO)


class VirtioDevices:
    """Virtio devices on some transport.

    Attributes:
        transports: one a device, in the order they were added.
    """

    def __init__(self, machine: Machine, space: AddressSpace) -> None:
        self._machine = machine
        self._space = space
        self.transports: list[Transport] = []
        self._threads: list[QueueThread] = []
        self._loop: DeviceLoop | None = None
        self._peers: Peers | None = None

    def add(self, device: VirtioDevice) -> None:
        """Put `device` on the bus; it is closed with the machine."""
        device.memory = self._machine.memory
        device.on_bug = self._machine.monitor_failed
        device.on_error = self._machine.device_error
        device.on_stop = self._machine.pause_for
        try:
            transport = self._place(device)
        except BaseException:
            device.close()
            raise
        self.transports.append(transport)

    def _place(self, device: VirtioDevice) -> Transport:
        """Give `device` a transport, a place and an interrupt; the bus closes it from then on."""
        raise NotImplementedError

    def windows(self) -> list[tuple[int, int, int]]:
        """(base, size, gsi) of each device that the DSDT or the command line must tell of."""
        return []

    def place_of(self, number: int) -> str:
        """Where the guest finds device `number`, for a person."""
        raise NotImplementedError

    def _serve(self, transport: Transport) -> None:
        """The first driver of a device: from now on somebody waits for its notifies."""
        device = transport.device
        if device.ON_LOOP:
            self._start_on_loop(device)
        for index, fd in enumerate(transport.notify_fds):
            if device.EXTERNAL or index in device.external:
                continue
            if device.ON_LOOP:
                self.loop.serve(device, index, fd)
            elif not device.take_kick(index, fd):
                thread = QueueThread(device, index, fd, self._machine.monitor_failed)
                self._threads.append(thread)
        if device.EXTERNAL or device.external:
            device.connect(transport.notify_fds)
        transport.served = True

    @property
    def loop(self) -> DeviceLoop:
        """The machine's event loop, started when first asked for."""
        if self._loop is None:
            from vmm.virtio.loop import DeviceLoop

            self._loop = DeviceLoop(self._machine.monitor_failed)
        return self._loop

    def _start_on_loop(self, device: VirtioDevice) -> None:
        """Have `device` attach to the loop, and wait until it has."""
        import threading

        loop, done = self.loop, threading.Event()

        def attach() -> None:
            try:
                device.loop_running(loop.loop)
            except BaseException as err:
                self._machine.monitor_failed(err)
            finally:
                done.set()

        loop.call(attach)
        done.wait()

    def watch_peers(self) -> None:
        """From now on devices are told when a program they depend on has gone: the machine starts,
        and somebody hears what they say."""
        peers = [peer for transport in self.transports for peer in transport.device.peers]
        if peers:
            from vmm.machine.peers import Peers

            self._peers = Peers(peers, self._machine.monitor_failed)

    def resumed(self) -> None:
        """The machine goes on after a pause."""
        for transport in self.transports:
            transport.resume()

    def hold(self) -> None:
        """Keep every device from guest memory until `release`, in the same thread; the vCPUs are
        parked. See `VirtioDevice.hold`."""
        held: list[VirtioDevice] = []
        try:
            for transport in self.transports:
                transport.device.hold()
                held.append(transport.device)
        except BaseException:
            for device in reversed(held):
                device.release()
            raise

    def hurry(self, *, ending: bool) -> None:
        """Somebody waits for the vCPUs. See `VirtioDevice.hurry`."""
        for transport in self.transports:
            transport.device.hurry(ending=ending)

    def release(self) -> None:
        """The end of `hold`."""
        for transport in reversed(self.transports):
            transport.device.release()

    def end(self) -> None:
        """Have the threads that serve queues end, without waiting for that."""
        for transport in self.transports:
            device = transport.device
            device.over = device.quiet = True  # its thread goes no further than the next request
        for thread in self._threads:
            thread.end()
        if self._loop is not None:
            self._loop.end()

    def join(self, until: float | None = None) -> bool:
        """Whether these threads have ended by `until`, of time.monotonic."""
        ended = True
        for thread in (*self._threads, *([self._loop] if self._loop is not None else ())):
            left = None if until is None else max(until - time.monotonic(), 0)
            ended &= thread.join(left)
        for transport in self.transports:
            ended &= transport.device.ended(until)
        return ended

    def close(self) -> None:
        """End the threads that serve queues, once no vCPU runs; the bus closes the devices."""
        if self._peers is not None:
            self._peers.close()
        self.end()
        self.join()
        self._threads = []
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()


class MmioDevices(VirtioDevices):
    """Over MMIO, announced by ACPI (LNRO0005) or on the kernel's command line."""

    def _place(self, device: VirtioDevice) -> MmioTransport:
        number = len(self.transports)
        if number >= MAX_DEVICES:
            raise UsageError(
                f"more than {MAX_DEVICES} virtio devices over MMIO; --transport pci has room for 31"
            )
        transport = MmioTransport(device)
        base, length, gsi = self._window(number)

        def connect() -> None:
            vm = self._machine.vm
            for index, fd in enumerate(transport.notify_fds):
                vm.ioeventfd(fd, base + mmio.QUEUE_NOTIFY, 4, datamatch=index)
            vm.irqfd(transport.irq_fd, gsi)
            self._serve(transport)

        transport.on_driver_ok = connect
        self._space.add(base, length, transport)
        return transport

    def windows(self) -> list[tuple[int, int, int]]:
        return [self._window(number) for number in range(len(self.transports))]

    def place_of(self, number: int) -> str:
        base, _, gsi = self._window(number)
        return f"at {base:#x}, GSI {gsi}"

    def _window(self, number: int) -> tuple[int, int, int]:
        base = layout.VIRTIO_MMIO_BASE + number * layout.VIRTIO_MMIO_STRIDE
        gsis = layout.GSI_VIRTIO if self._machine.config.acpi else layout.GSI_VIRTIO_LOW
        return base, mmio.LENGTH, gsis[number]
