"""Machines made for a test: closed when it ends, looked at when it fails."""

from __future__ import annotations

from vmm import Machine, MachineConfig, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CONSOLE_LINES, EVENTS = 40, 20
"""How much of each a failure report shows."""


class MachineFactory:
    """Makes machines and keeps hold of them until `close`.

    Args:
        defaults: keywords of `MachineConfig` for every machine, as a test's markers say them.

    Attributes:
        machines: those made, in order.
    """

    def __init__(self, defaults: dict[str, Any] | None = None) -> None:
        self.defaults = dict(defaults or {})
        self.machines: list[Machine] = []

    def __call__(self, kernel: Any = None, **options: Any) -> Machine:
        """A machine in state `created`. `options` go before the defaults; `kernel` is a path, or
        something with a `vmlinuz` (see `vmm.testing.kernels`)."""
        return self.make(lambda: Machine(MachineConfig(**self.keywords(kernel, **options))))

    def keywords(self, kernel: Any = None, **options: Any) -> dict[str, Any]:
        """What such a machine is configured with. Sizes may be text: `memory="512M"`."""
        values = {**self.defaults, **options}
        if kernel is not None:
            values["kernel"] = kernel
        values["kernel"] = getattr(values.get("kernel"), "vmlinuz", values.get("kernel"))
        if isinstance(values.get("memory"), str):
            from vmm.units import parse_size

            values["memory"] = parse_size(values["memory"], "memory")
        return values

    def make(self, maker: Callable[[], Machine]) -> Machine:
        """Keep hold of what `maker` makes."""
        machine = maker()
        self.machines.append(machine)
        return machine

    def close(self) -> None:
        """End and close every machine, the last one first; harmless twice."""
        while self.machines:
            self.machines.pop().close()


def sections(machine: Machine, name: str) -> list[tuple[str, str]]:
    """(title, text) of a machine after its test failed: console, last events, registers.

    A machine that runs is paused for its registers, and left paused.
    """
    found = []
    lines = machine.console.text().replace("\r", "").splitlines()[-CONSOLE_LINES:]
    if lines:
        found.append((f"{name}: console, last {len(lines)} lines", "\n".join(lines)))
    started = machine.started_at
    log = [f"{e.time - started:+10.3f} s  {e}" for e in machine.event_log[-EVENTS:]]
    state = f"state: {machine.state}"
    if machine.exit is not None:
        state += f" ({machine.exit.message}, status {machine.exit.status})"
    found.append((f"{name}: events", "\n".join([*log, state])))
    if machine.exit is not None and machine.exit.report:
        found.append((f"{name}: failure report", machine.exit.report))
    else:
        text = _registers(machine)
        if text:
            found.append((f"{name}: registers", text))
    return found


def _registers(machine: Machine) -> str:
    from vmm import report

    if machine.state == "closed":
        return ""
    texts = []
    try:
        if machine.state == "running":
            machine.pause()
        for vcpu in machine.vcpus:
            regs, sregs = report.registers(vcpu.get_regs(), vcpu.get_sregs())
            texts.append(f"vCPU {vcpu.number}: {report.mode(regs, sregs)[0]}")
            texts += report.register_lines(regs, sregs)
    except VmmError as err:  # it ended just now
        texts.append(str(err))
    return "\n".join(texts)
