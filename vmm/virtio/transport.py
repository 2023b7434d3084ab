"""What the MMIO and the PCI transport share: negotiation, queue selection, who serves the queues.

Notifies come by ioeventfd, made when the driver first says DRIVER_OK: a device no driver takes
costs nothing. Until a queue has somebody who serves its descriptor, a notify is served in the
thread it comes from.
"""

from __future__ import annotations

import os

from vmm.devices.device import Device, state_int
from vmm.errors import ShapeError
from vmm.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.shapes import Table
    from vmm.virtio.device import QueueSlot, VirtioDevice

LOW = 0xFFFFFFFF
HIGH = LOW << 32
ALL = HIGH | LOW


class Transport(Device):
    """Registers of `device`; the subclasses say where each is.

    Attributes:
        notify_fds: an eventfd a queue; whoever serves the queue reads it.
        on_driver_ok: called once, before the first DRIVER_OK takes effect: connects the
            descriptors to KVM.
        served: somebody reads `notify_fds`.
    """

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device.name)
        self.device = device
        self.notify_fds: list[int] = []
        self.on_driver_ok: Callable[[], None] | None = None
        self.served = False
        # Two flags, not one word: device threads set the first while the driver clears it.
        self._used = False
        self._config = False
        self._restored = False
        self._features_sel = self._driver_sel = self._queue_sel = 0
        self._driver_features = 0
        device.interrupt = self._interrupt
        device.kick = self.notify
        device.config_interrupt = self._config_interrupt
        try:
            for _ in device.slots:
                self.notify_fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            Transport.close(self)
            raise

    def close(self) -> None:
        self.device.close()
        fds, self.notify_fds = self.notify_fds, []
        for fd in fds:
            os.close(fd)

    # --- for subclasses --------------------------------------------------------------------------

    def _interrupt(self, index: int) -> None:
        """Queue `index` has used buffers."""
        raise NotImplementedError

    def _config_interrupt(self) -> None:
        """The configuration space or the status has changed."""
        raise NotImplementedError

    def _forget(self) -> None:
        """The registers of the subclass as after a reset."""

    # --- registers both have; `device.control` is held for writes ---------------------------------

    def _offered(self) -> int:
        """The 32 features the driver has selected."""
        return self.device.offered() >> 32 * min(self._features_sel, 2) & LOW

    def _accepted(self) -> int:
        """What the driver has written of the 32 features it has selected."""
        return self._driver_features >> 32 * min(self._driver_sel, 2) & LOW

    def _accept(self, value: int) -> None:
        if self._driver_sel < 2:
            shift = 32 * self._driver_sel
            self._driver_features &= ~(LOW << shift)
            self._driver_features |= value << shift
            self.device.accept_features(self._driver_features)

    def _slot(self) -> QueueSlot | None:
        slots = self.device.slots
        return slots[self._queue_sel] if self._queue_sel < len(slots) else None

    def _reset_queue(self) -> None:
        """The selected queue, which is there."""
        self.device.reset_queue(self._queue_sel)

    def _set_status(self, status: int) -> None:
        device = self.device
        if not status:
            self._restored = False
            device.set_status(0)
            self._used = self._config = False
            self._driver_features = self._driver_sel = self._features_sel = self._queue_sel = 0
            self._forget()
            return
        before = device.status
        if status & spec.DRIVER_OK:
            self._connect()
        device.set_status(status)
        if device.status & ~before & spec.DRIVER_OK:
            self.notify_all()  # buffers made available before DRIVER_OK

    def _connect(self) -> None:
        if self.on_driver_ok is not None:
            connect, self.on_driver_ok = self.on_driver_ok, None
            connect()

    def notify_all(self) -> None:
        """Have every queue looked at."""
        for index in range(len(self.device.slots)):
            self.notify(index)

    def notify(self, index: int) -> None:
        """The driver's notify of queue `index`, where no ioeventfd took it."""
        if index < len(self.notify_fds):
            if self.served:
                os.eventfd_write(self.notify_fds[index], 1)
            else:
                self.device.notify(index)

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "device": self.device.save(),
            "interrupt": self._used | self._config << 1,
            "features_sel": self._features_sel,
            "driver_sel": self._driver_sel,
            "queue_sel": self._queue_sel,
            "driver_features": self._driver_features,
        }

    def shape(self) -> Table:
        from vmm.shapes import U32, U64, Table, Whole

        return Table(
            {
                "device": self.device.shape(),
                "interrupt": Whole(0, 3),
                "features_sel": Whole(0, U32),
                "driver_sel": Whole(0, U32),
                "queue_sel": Whole(0, U32),
                "driver_features": Whole(0, U64),
            }
        )

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave. Nothing is served until `resume`, which is for when memory
        and interrupt controllers have their state back too."""
        device = state["device"]
        if not isinstance(device, dict):
            raise ShapeError(f"state of {self.name}: no device in it")
        if state_int(device, "status", spec.DRIVER_OK):
            self._connect()
        self.device.restore(device)
        pending = state_int(state, "interrupt", 3)
        self._used = bool(pending & 1)
        self._config = bool(pending & 2) or self._config  # it may be another's link, or size
        self._restored = True
        self._features_sel = state_int(state, "features_sel", LOW)
        self._driver_sel = state_int(state, "driver_sel", LOW)
        self._queue_sel = state_int(state, "queue_sel", LOW)
        self._driver_features = state_int(state, "driver_features", ALL)

    def resume(self) -> None:
        """The machine goes on: after a pause, or where it was restored.

        A notify or an interrupt that was under way in the saved machine is lost, so then all
        queues are looked at, and the driver is interrupted.
        """
        self.device.resume()
        if self._restored:
            self._restored = False
            self._interrupt_again()
            self.notify_all()

    def _interrupt_again(self) -> None:
        """Raise what the driver may not have seen."""
        raise NotImplementedError

    def reset(self) -> None:
        self._set_status(0)
