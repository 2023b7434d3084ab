"""What a machine does in its guest, through the agent: `Machine` has these (docs/exec.md)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

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
            options: `input`, `timeout` (seconds, from when it starts; its process group is then
                killed), `check`, `env` (added to the usual variables), `cwd`, `shell`, `text`,
                `encoding`, `errors`, `stdout` and `stderr` (PIPE, DEVNULL; STDOUT), `tty`.

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
