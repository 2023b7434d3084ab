"""The copies `Machine.clone` gives: a list of machines that start and end together."""

from __future__ import annotations

from vmm.errors import call_each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.machine.machine import Machine


class Copies(list["Machine"]):
    """Machines in a list, and calls for all of them; a context manager that closes them.

    >>> with machine.clone(100) as copies:  # doctest: +SKIP
    ...     for copy in copies:
    ...         copy.wait_for("ready")

    A hundred busy machines share the host's few processors. Started one by one, each start waits
    for its turn among the vCPUs that run already, and so does each end: seconds, for a hundred.
    These calls first prepare all machines, then let all of them go.
    """

    def start(self) -> None:
        """Run all, from created. Each has its thread before the first guest runs."""
        for machine in self:
            machine.start_parked()
        for machine in self:
            machine.let_go()

    def close(self) -> None:
        """End all, then give back what each holds; harmless twice.

        All are closed even if closing one raises; the first such error is raised then.
        """
        call_each([machine.unplug for machine in self] + [machine.close for machine in self])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
