"""The rate limit of a disk that qemu-storage-daemon serves, changed through its monitor."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.block.qmp import Qmp


class RemoteLimit:
    """As `vmm.virtio.limit.Limit`, as far as a program changes one; from any thread.

    Args:
        monitor: the daemon's.
        group: the id of the throttle group.
        rates: (bytes, ops) a second, as the daemon was started.

    Attributes:
        rates: (bytes, ops) a second; 0 where there is no limit.
    """

    def __init__(self, monitor: Qmp, group: str, rates: tuple[float, float]) -> None:
        self.rates = rates
        self._path = f"/objects/{group}"
        self._monitor = monitor

    def change(
        self, *, bytes: float = 0, ops: float = 0, burst_bytes: float = 0, burst_ops: float = 0
    ) -> None:
        """Other limits for requests from now on (those that wait already are not looked at again);
        0: none. A burst is a second's worth at least, or 0.

        Raises:
            UsageError: the daemon refuses it.
            HostError: it has ended.
        """
        limits = {
            "bps-total": int(bytes), "bps-total-max": int(burst_bytes),
            "iops-total": int(ops), "iops-total-max": int(burst_ops),
        }  # fmt: skip
        self._monitor.ask("qom-set", path=self._path, property="limits", value=limits)
        self.rates = (bytes, ops)
