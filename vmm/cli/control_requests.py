"""What requests of the control socket do to the machine, in the process that runs it."""

from __future__ import annotations

from vmm.errors import StateError, UsageError
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.machine import Machine


class Requests:
    """Requests to `machine`, one at a time.

    Attributes:
        busy: the machine is paused because of a request.
    """

    def __init__(self, machine: Machine) -> None:
        self.busy = False
        self._machine = machine

    def perform(self, name: str, request: dict[str, Any]) -> dict[str, object]:
        """Do the request `name`; its answer. Raises VmmError."""
        if name == "resize":
            return {"size": self._resize(request["disk"], request.get("size"))}
        if name == "snapshot":
            self._snapshot(**request)
        else:
            self._finish(**request)
        return {}

    def abandoned(self) -> None:
        """Nobody will ask for more."""
        if self.busy:
            self._go_on()

    def _resize(self, name: str, size: int | None) -> int:
        """Have a disk grow; its size in bytes."""
        from vmm.block.storage_daemon import ExternalDisk
        from vmm.virtio.blk import Block

        try:
            disk = self._machine.virtio_device(name)
        except StateError as err:
            raise UsageError(f"resize: {err}") from None
        if not isinstance(disk, (Block, ExternalDisk)):
            raise UsageError(f"resize: {name} is no disk")
        return disk.resize(size)

    def _snapshot(self, stop: bool, **request: Any) -> None:
        """Make a snapshot; with `stop` the machine stays paused, until `finish`."""
        machine = self._machine
        self.busy = True
        made = False
        try:
            if stop and machine.state == "running":
                machine.pause()
            machine.snapshot(**request)
            made = True
        finally:
            if not made and stop:
                self._go_on()
            self.busy = made and stop

    def _finish(self, path: str, end: bool) -> None:
        """After a snapshot: end the machine, or have it go on."""
        if end:
            text = f"its snapshot {path} was made"
            self._machine.end(MachineExit(exits.STOPPED, text, status=0))
        self._go_on()

    def _go_on(self) -> None:
        if self._machine.state == "paused":
            self._machine.resume()
        self.busy = False
