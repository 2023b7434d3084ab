"""Moments of a machine: kept in a directory, gone back to, copied. `Machine` has these."""

from __future__ import annotations

import os

from vmm import descriptors, priority
from vmm.errors import StateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading

    from vmm.machine.copies import Copies
    from vmm.machine.machine import Machine
    from vmm.snapshot.checkpoint import Checkpoint


CLONES_MAX = 4096
"""Copies made by one call: a machine takes some ten descriptors, a process has rarely more."""


def _path(call: str, name: str, path: object) -> str:
    """`path`, as text; UsageError where it cannot be one."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"{call}: {name}={path!r} is not a path (text or os.PathLike)")
    text = str(os.fspath(path))
    if not text or "\0" in text:
        raise UsageError(f"{call}: {name}={text!r} is no name of a directory")
    return text


class MomentCalls:
    """Snapshots (docs/snapshots.md), checkpoints and clones (docs/clones.md)."""

    _lock: threading.RLock
    _checkpoint: Checkpoint | None
    _clones: int

    @property
    def _machine(self) -> Machine:
        return self  # type: ignore[return-value]  # it is the one class that has these

    def snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        disks: str = "copy",
        track: bool = False,
    ) -> None:
        """Keep the machine as it is now in a new directory `path`; from created, running (it pauses
        meanwhile) or paused.

        The directory appears when it is complete. See docs/snapshots.md.

        Args:
            base: an earlier snapshot: only memory that differs from it is kept, and both are needed
                to restore.
            disks: `copy` puts the disks' contents into the snapshot (by reflink where the file
                system can), `keep` leaves the images where they are.
            track: memory becomes a private mapping of the snapshot, so that the next one, based on
                this, need not compare all of it.

        Raises:
            UsageError: `path` is there, or an argument cannot be.
            StateError: the machine is in another state, or has a device that cannot be saved.
            HostError: it cannot be written.
        """
        from vmm.snapshot.checkpoint import still
        from vmm.snapshot.store import save

        where = _path("snapshot", "path", path)
        if base is not None:
            base = _path("snapshot", "base", base)
        with descriptors.told, still(self._machine, "snapshot"):
            save(self._machine, where, base=base, disk=disks, track=track)
            self._machine._tell("snapshot", where)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = False,
        disks: str = "overlay",
        pages: str = "map",
        clock: str = "step",
        trusted: bool | None = None,
        isolate: bool = False,
        **changed: object,
    ) -> Machine:
        """A machine that goes on, when it is started, where the snapshot `path` was made.

        Args:
            verify: first read all of the snapshot and compare it with its checksums.
            disks: `overlay`: what the guest writes goes with the machine, and the snapshot may be
                restored again; `write`: it goes into the snapshot's disks.
            pages: `map`: memory is a private mapping of the snapshot's files; `uffd`: another
                process hands pages over when they are used, and compares them with their
                checksums; `uffd=SOCKET`: one that serves many machines (docs/snapshots.md).
            clock: `step`: the time since then has passed for the guest; `keep`: its clocks go on
                from where they were, and are as much behind as the snapshot is old.
            trusted: whether files, sockets, networks and programs of the host that the snapshot
                names are opened; otherwise they are to be given here. None: they are, if the
                snapshot was made by this user on this host, and names the same as then.
            isolate: in a child process of its own, which reads the snapshot; as of `Machine`.
            changed: keywords of `MachineConfig`, for what is outside the guest: `console`, `nets`,
                `vsock`, `ports`, `drives`, `devices`, `timeout`, ...

        Raises:
            SnapshotError: the snapshot is damaged, newer, or of another kind of host; or the
                machine would be another than it was.
        """
        from vmm.snapshot.restore import restore

        where = _path("restore", "path", path)
        if isolate:
            from vmm.isolated.machine import restore as restore_isolated

            options = {
                "verify": verify, "disks": disks, "pages": pages, "clock": clock,
                "trusted": trusted,
            }  # fmt: skip
            return restore_isolated(where, options, changed)
        with descriptors.told:
            return restore(
                where,
                verify=verify,
                disk=disks,
                pages=pages,
                clock=clock,
                trusted=trusted,
                **changed,
            )

    def checkpoint(self, *, disks: str = "rollback") -> None:
        """Remember this moment for `rollback`; it takes the place of an earlier one.

        From created, running (parked meanwhile) or paused. See docs/clones.md.

        Args:
            disks: `rollback`: disks go back too, which takes an overlay (`snapshot`) over each that
                is written to; `keep`: disks stay as they are then.

        Raises:
            StateError: it is stopped or closed, or has something that cannot go back.
        """
        from vmm.snapshot.checkpoint import Checkpoint, still

        former = self._checkpoint
        with descriptors.told, priority.first, still(self._machine, "checkpoint"):
            try:
                self._checkpoint = Checkpoint(self._machine, former, disks)
            except BaseException:
                if former is not None and former.closed:
                    self._checkpoint = None
                raise

    def rollback(self) -> None:
        """Be again what it was at the checkpoint, in place: memory, vCPUs, devices, disks, clocks.

        It goes on running, or stays paused. If it has stopped, it is paused afterwards, so that
        `resume` has it go on: a guest may end, or crash, again and again.

        Raises:
            StateError: there is no checkpoint, or the machine is closed.
        """
        from vmm.snapshot.checkpoint import still

        machine = self._machine
        if machine.in_vcpu_thread:
            with still(machine, "rollback"):
                pass  # it raises
        with descriptors.told, machine.moment:
            self._roll_back()

    def _roll_back(self) -> None:
        from vmm.snapshot.checkpoint import still

        machine = self._machine
        if machine.state == "closed":
            raise StateError("rollback: the machine is closed")
        if self._checkpoint is None:
            raise StateError("rollback: there is no checkpoint; call checkpoint() first")
        running = machine.state == "running"
        while True:
            if machine.state == "stopped":
                machine.revive()
            try:
                with priority.first, still(machine, "rollback"):
                    self._checkpoint.roll_back()
                    machine.platform.rolled_back()
                    machine._tell("rolled back")
                break
            except StateError:
                if machine.state != "stopped":  # it ended while it was about to be paused
                    raise
        if running and machine.state == "paused":
            machine.resume()

    def clone(self, count: int = 1) -> Copies:
        """Copies of the machine as it is now: a list of machines, to be closed by the caller.

        From created, running (parked meanwhile) or paused. Copies of a running machine run, others
        wait for `start`. The list has `start` and `close` for all of them at once, which is much
        quicker for many busy ones, and is a context manager. Memory is shared until somebody
        writes to it. See docs/clones.md for what each has for its own.

        Raises:
            StateError: it is stopped or closed, or has something there can be only one of.
        """
        from vmm.snapshot.clone import clone

        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= CLONES_MAX:
            raise UsageError(f"clone: count={count!r} is not a number from 1 to {CLONES_MAX}")
        with self._lock:
            first = self._clones + 1
            self._clones += count
        numbers = range(first, first + count)
        with descriptors.told:
            return clone(self._machine, numbers, checkpoint=self._checkpoint is not None)
