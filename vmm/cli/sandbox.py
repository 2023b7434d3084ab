"""`--sandbox`: what the command gives up once its machine is built, before the guest runs."""

from __future__ import annotations

from vmm.cli.say import say
from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.cli.arguments import Arguments
    from vmm.cli.control import Control
    from vmm.cli.status import StatusLine
    from vmm.config import MachineConfig
    from vmm.machine import Machine
    from vmm.sandbox.broker import Broker

OPTION = "--sandbox"
LEVELS = ("on", "off", "strict")


class Sandbox:
    """From before the machine is built to after it is closed; a context manager.

    Args:
        level: one of LEVELS.
        config: the machine's, or None where it is not known yet.
        control: the machine gets a control socket.

    Raises:
        UsageError: there is no such level; `strict` cannot be had.
    """

    def __init__(self, level: str, config: MachineConfig | None, control: bool) -> None:
        if level not in LEVELS:
            raise UsageError(f"{OPTION} {level!r} is not one of {', '.join(LEVELS)}")
        self.level = level
        self._config = config
        self._control = control
        self._broker: Broker | None = None

    @classmethod
    def of(cls, args: Arguments, config: MachineConfig | None) -> Self:
        """As the options say."""
        return cls(args.value(OPTION), config, args.given("--control"))

    def __enter__(self) -> Self:
        if self.level == "off":
            return self
        late = self._late(self._config) if self._config is not None else ["--restore"]
        if self.level == "strict":
            if self._config is not None:
                self._need_nothing_late(late)
            return self
        if late:
            self._begin_broker()
        return self

    def __exit__(self, *exc: object) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            broker.close()

    def _late(self, config: MachineConfig) -> list[str]:
        from vmm.machine.confined import late

        return late(config) + (["--control"] if self._control else [])

    def _need_nothing_late(self, late: list[str]) -> None:
        if late:
            raise UsageError(
                f"{OPTION} strict: {', '.join(late)} has a process outside of the sandbox open or "
                f"connect what comes later; leave it out, or say {OPTION} on"
            )

    def _begin_broker(self) -> None:
        from vmm.sandbox.broker import Broker

        if self._control:
            from vmm.cli.control import serve_in_broker

            self._broker = Broker(serve_in_broker)
        else:
            self._broker = Broker()

    def confine(self, machine: Machine, status: StatusLine, control: Control | None = None) -> None:
        """Give things up, on the main thread; the guest has not run. Raises UsageError where that
        is too little for `strict`."""
        if self.level == "off":
            return
        from vmm.machine import confined

        strict = self.level == "strict"
        if strict and self._config is None:
            self._need_nothing_late(self._late(machine.config))
        if control is not None and self._broker is not None:
            control.hand_over(self._broker)
        with status.still():
            missing = confined.confine(
                machine, broker=self._broker, leases=control is not None, apart=strict
            )
        if missing and strict:
            raise UsageError(f"{OPTION} strict: {missing[0]}")
        if machine.config.trace:
            for lack in missing:
                say(f"sandbox: without {lack}")
