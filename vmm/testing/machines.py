"""Machines made for a test: closed when it ends, whatever happens."""

from __future__ import annotations

import time

from vmm import Machine, MachineConfig, UsageError
from vmm.testing import bounded
from vmm.testing.recorder import Recorder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from vmm.testing.kernels import Kernel

READY = "ready"
"""What the plugin's own initrd prints when all is up."""
BOOT_TIMEOUT = 120.0


class MachineFactory:
    """Makes machines and keeps hold of them until `close`.

    Args:
        defaults: keywords of `MachineConfig` for every machine, and `isolate` of `Machine`, as a
            test's markers say them.
        kernel: gives the kernel that `boot` takes where none is given.
        directory: gives a directory for initrds.
        boot_timeout: seconds `boot` gives a machine.

    Attributes:
        machines: those made, in order.
    """

    def __init__(
        self,
        defaults: dict[str, Any] | None = None,
        *,
        kernel: Callable[[], Kernel] | None = None,
        directory: Callable[[], Path] | None = None,
        boot_timeout: float = BOOT_TIMEOUT,
    ) -> None:
        self.defaults = dict(defaults or {})
        self.machines: list[Machine] = []
        self._kernel = kernel
        self._directory = directory
        self._boot_timeout = boot_timeout
        self._recorders: dict[int, Recorder] = {}

    def __call__(self, kernel: Any = None, **options: Any) -> Machine:
        """A machine in state `created`. `options` go before the defaults; `kernel` is a path, or
        something with a `vmlinuz` (see `vmm.testing.kernels`)."""
        values = self.keywords(kernel, **options)
        isolate = values.pop("isolate", False)
        return self.make(lambda: Machine(MachineConfig(**values), isolate=isolate))

    def restore(self, directory: str) -> Machine:
        """A machine of a snapshot, in state `created`."""
        isolate = self.defaults.get("isolate", False)
        return self.make(lambda: Machine.restore(directory, isolate=isolate))

    def boot(
        self,
        kernel: Any = None,
        *,
        ready: str | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Machine:
        """A machine in user space.

        Args:
            kernel: as for a call; None: the one the plugin's other fixtures boot.
            ready: what its initrd prints on the console when all is up. Without `initrds`, it
                boots busybox, which prints READY.
            timeout: seconds from its start.
            options: keywords of `MachineConfig`.

        Raises:
            AgentError, TimeoutError: it did not come up in time.
        """
        if kernel is None and "kernel" not in {**self.defaults, **options}:
            if self._kernel is None:
                raise UsageError("boot: give it a kernel")
            kernel = self._kernel()
        values = {**self.defaults, **options}
        if not values.get("initrds"):
            if self._directory is None or self._kernel is None:
                raise UsageError("boot: give it initrds=[...]")
            from vmm.testing import initrds

            path = self._directory() / "initrd.img"
            initrds.waiting(kernel if hasattr(kernel, "modules") else self._kernel(), values).write(
                str(path)
            )
            values["initrds"], ready = [str(path)], ready or READY
        machine = self(kernel, **{"append": "quiet", "agent": True, **values})
        wait_up([machine], ready, self._boot_timeout if timeout is None else timeout)
        return machine

    def keywords(self, kernel: Any = None, **options: Any) -> dict[str, Any]:
        """What such a machine is configured with. Sizes may be text: `memory="512M"`."""
        values = {**self.defaults, **options}
        if kernel is not None:
            values["kernel"] = kernel
        values["kernel"] = getattr(values.get("kernel"), "vmlinuz", values.get("kernel"))
        check_keywords(values, "machine_factory")
        return values

    def make(self, maker: Callable[[], Machine]) -> Machine:
        """Keep hold of what `maker` makes, and of its clones."""
        recorder = Recorder(time.monotonic())
        machine = maker()
        self._keep(machine, recorder)
        return machine

    def _keep(self, machine: Machine, recorder: Recorder) -> None:
        self.machines.append(machine)
        self._recorders[id(machine)] = recorder
        recorder.follow(machine)
        recorder.on_clones = self._keep_clones

    def _keep_clones(self, clones: list[Machine], asked: float) -> None:
        for clone in clones:
            self._keep(clone, Recorder(asked))

    def recorder(self, machine: Machine) -> Recorder | None:
        """The record of one of its machines."""
        return self._recorders.get(id(machine))

    def adopt(self, other: MachineFactory) -> None:
        """Take over the machines of another factory."""
        self.machines += other.machines
        self._recorders.update(other._recorders)
        other.machines, other._recorders = [], {}

    def close(self) -> None:
        """End and close every machine, the last one first; harmless twice.

        Raises:
            LateError: one does not close in time: it is left behind.
            Exception: what one raised; the others are closed all the same. Of more than one, a
                BaseExceptionGroup.
        """
        errors: list[BaseException] = []
        patience = bounded.STUCK_AFTER
        while self.machines:
            machine = self.machines.pop()
            number = len(self.machines)
            try:
                bounded.close(machine, patience)
            except BaseException as err:
                err.add_note(f"closing vmm machine {number} ({machine.config.kernel})")
                errors.append(err)
                if isinstance(err, bounded.LateError):
                    patience = 0.5  # for the rest, of which there may be many
        self._recorders.clear()
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup(f"{len(errors)} machines did not close properly", errors)


def wait_up(machines: list[Machine], ready: str | None, limit: float) -> None:
    """Start `machines` and wait until each is in user space, its agent answers, and `ready` is on
    its console. Raises AgentError, TimeoutError or ConsoleClosed."""
    for machine in machines:
        machine.start()
    until = time.monotonic() + limit

    def left() -> float:
        return round(max(until - time.monotonic(), 0.0), 1)

    for machine in machines:
        if machine.config.agent:
            machine.wait_for_agent(left())
        if ready is not None:
            machine.console.wait_for(ready, timeout=left())


def check_keywords(values: dict[str, Any], where: str) -> None:
    """UsageError, in the name of `where`, for what is no keyword of `MachineConfig`, nor
    `isolate`."""
    import inspect

    known = [name for name in inspect.signature(MachineConfig).parameters if name != "self"]
    known.append("isolate")
    for name in values:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{where}: {name}={values[name]!r}: MachineConfig has no such keyword; "
                + (f"is {near[0]}= meant?" if near else f"it has {', '.join(known)}")
            )
