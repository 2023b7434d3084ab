"""What a machine does in its guest, through the agent: `Machine` has these (docs/exec.md)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    import subprocess
    from collections.abc import Callable
    from typing import Any, BinaryIO

    from vmm.agent.link import Link
    from vmm.agent.process import Args, GuestProcess


class GuestCalls:
    """Commands and files in the guest of a running machine made with `agent=True`.

    Each call waits for the guest to have come to user space first. StateError without an agent,
    AgentError where it does not answer, or the machine ends.
    """

    def _agent(self) -> Link:
        """The way to the agent; StateError."""
        raise NotImplementedError

    def wait_for_agent(self, timeout: float | None = None) -> None:
        """Wait until commands can be run; AgentError after `timeout` seconds (5 minutes)."""
        self._agent().wait(timeout)

    def run(self, args: Args, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command in the guest, as subprocess.run(..., capture_output=True) on the host.

        >>> m.run(["uname", "-r"], text=True, check=True).stdout  # doctest: +SKIP
        '6.1.0-56-cloud-amd64\\n'

        Args:
            args: the command and its arguments; text is a program's name, or with `shell=True` a
                line for sh.
            options: `input`, `timeout` (seconds, its start included, once the guest is up; its
                process group is then killed), `max_output` (bytes of output that are kept, 256 MiB;
                AgentError beyond), `check`, `env` (added to the usual variables), `cwd`, `user`,
                `shell`,
                `text`, `encoding`, `errors`, `stdout` and `stderr` (PIPE, DEVNULL; STDOUT), `tty`.

        Raises:
            FileNotFoundError, PermissionError, OSError: it cannot be executed.
            subprocess.TimeoutExpired, subprocess.CalledProcessError: as subprocess.run's.
        """
        from vmm.agent.process import run

        agent = self._agent()
        agent.wait()
        return run(agent, args, **options)

    def popen(self, args: Args, **options: Any) -> GuestProcess:
        """Start a command in the guest, as subprocess.Popen on the host with pipes.

        See vmm.agent.process.GuestProcess for the options and what can be done with it.
        """
        from vmm.agent.process import GuestProcess

        agent = self._agent()
        agent.wait()
        return GuestProcess(agent, args, **options)

    def put(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        target: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        mode: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Copy a file, or a directory with all that is in it, from the host into the guest.

        Modes, times, symbolic links and FIFOs come along; owners do not, all is root's. What is
        there already is written over, a directory is added to.

        Args:
            source: a path on the host, or an open binary file, whose data is copied.
            target: what it is called in the guest, an absolute path; with a `/` at its end, the
                directory it goes into. Directories above it are made.
            timeout: seconds. Whatever it is, a guest that takes nothing for 60 s is given up.
            mode: of the file, in place of its own; of an open one 0644 otherwise.
            progress: called with the bytes of file data sent so far, after each 64 KiB or more,
                and at the end with those of all. What it raises ends the copy.

        Raises:
            OSError: here or in the guest something cannot be read or written; `filename` says what.
            TimeoutError: it takes longer.
            AgentError: the guest does not answer.
        """
        from vmm.agent.copy import put

        agent = self._agent()
        agent.wait()
        put(agent, source, target, timeout=timeout, mode=mode, progress=progress)

    def get(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str] | BinaryIO,
        *,
        timeout: float | None = None,
        max_bytes: int = 64 << 30,
        filter: str = "data",
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Copy a file, or a directory with all that is in it, from the guest to the host.

        As `put` the other way round; what arrives is the caller's, never set-user-ID, and without
        the bits of its mode that let others write (`filter="all"` keeps those). Whatever
        the guest sends, nothing is written but at `target` and below it. A file appears when it is
        whole.

        Args:
            source: an absolute path in the guest.
            target: where it goes, as in `put`; or an open binary file, for a file's data.
            timeout: seconds. Whatever it is, a guest that sends nothing for 60 s is given up.
            max_bytes: of file data, at most; AgentError beyond.
            filter: `data`: in a tree, links that lead out of it and FIFOs are refused, as by
                tarfile's filter of that name; `all`: they are made, for who trusts the guest.
            progress: as in `put`, with the bytes of file data written here so far.

        Raises:
            OSError: something cannot be read in the guest, or made here; or a link or FIFO is
                refused (PermissionError). `filename` says what.
            TimeoutError, AgentError: as of `put`.
        """
        from vmm.agent.copy import get

        agent = self._agent()
        agent.wait()
        get(
            agent, source, target, timeout=timeout, max_bytes=max_bytes, filter=filter,
            progress=progress,
        )  # fmt: skip
