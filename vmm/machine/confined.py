"""The process of a machine gives up what the machine does not need (vmm.sandbox)."""

from __future__ import annotations

import os

from vmm.sandbox import landlock
from vmm.sandbox.confinement import confine as _confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import MachineConfig
    from vmm.machine.machine import Machine
    from vmm.sandbox.broker import Broker
    from vmm.sandbox.confinement import Lack


def late(config: MachineConfig) -> list[str]:
    """The options whose devices open, connect or remove something while the machine runs, or at
    its end; a broker does it for a confined process."""
    found = []
    if config.vsock is not None and config.vsock.path:
        found.append("--vsock path=")
    if any(port.socket for port in config.ports):
        found.append("--port socket=")
    if config.vhost_user_blks:
        found.append("--vhost-user-blk")
    return found


def confine(
    machine: Machine, *, broker: Broker | None = None, leases: bool = False, apart: bool = False
) -> list[Lack]:
    """Have this process, which has built `machine` and has one thread, keep what that one needs:
    what is open, its FIFOs, its helper programs. What could not be had is returned.

    Args:
        broker: does the rest; its policy is completed here.
        leases: memory may be mapped from a snapshot's files.
        apart: see vmm.sandbox.confinement.confine.
    """
    import sys

    machine.platform.console.backend.begin()  # its file is opened now
    child = sys.modules.get("vmm.child")
    helpers = child.running() if child is not None else []
    if broker is not None:
        _fill(broker, machine.config)
    threads = machine.origin.threads() if machine.origin is not None else []
    lease = sys.modules.get("vmm.snapshot.lease")
    if lease is not None and lease.in_watcher(lambda: None):
        threads.append(lease.in_watcher)
    return _confine(
        _files(machine.config),
        helpers=helpers,
        threads=threads,
        broker=broker,
        leases=leases or machine.restored,
        apart=apart,
    )


def _files(config: MachineConfig) -> list[tuple[str | int, int]]:
    """Landlock's rules: FIFOs, which are opened for a moment when their readers come and go."""
    where = config.console_where
    paths = [where[5:]] if where.startswith("file:") else []
    paths += [port.file for port in config.ports if port.file]
    paths += [net.pcap for net in config.nets if net.pcap]
    if not paths:
        return []
    from vmm import fifo

    both = landlock.READ_FILE | landlock.WRITE_FILE
    return [(path, both) for path in paths if fifo.is_fifo(path)]


def _fill(broker: Broker, config: MachineConfig) -> None:
    from vmm.virtio import unix

    policy = broker.policy
    for path, identity in unix.listening.items():
        policy.removes[os.path.abspath(path)] = identity
    policy.connects.update(os.path.abspath(each.socket) for each in config.vhost_user_blks)
    if config.vsock is not None and config.vsock.path:
        policy.prefixes.add(os.path.abspath(config.vsock.path))
