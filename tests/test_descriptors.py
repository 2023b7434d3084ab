"""vmm/descriptors.py: many machines in a process, and guests that would have all its files."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane]


def run(soft: int, hard: int, code: str, *arguments: object) -> str:
    """What `code` prints, in a process with these limits."""
    begin = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_the_soft_limit_is_raised_and_helpers_have_the_former() -> None:
    code = """
from tests.support.bare import bare_machine
from tests.support.helpers import LOOSE
from vmm.child import Child
machines = [bare_machine("1: hlt; jmp 1b", console="none") for _ in range(30)]
child = Child(["/bin/sh", "-c", "sleep 0.1; ulimit -Sn >&2; ulimit -Hn >&2"], LOOSE)
child.wait(20)
print(resource.getrlimit(resource.RLIMIT_NOFILE), child.text().split())
child.close()
for machine in machines:
    machine.close()
"""
    assert run(100, 4000, code) == "(4000, 4000) ['100', '4000']\n"


def test_where_there_are_no_more_it_is_said() -> None:
    code = """
from tests.support.bare import bare_machine
from vmm.errors import HostError
machines = []
try:
    while len(machines) < 100:
        machines.append(bare_machine("1: hlt; jmp 1b", console="none", rng=True))
except HostError as err:
    print(err)
for machine in machines:
    machine.close()
"""
    assert run(100, 100, code) == (
        "Too many open files: this process has all 100 that it may have (`ulimit -n`); "
        "close machines, or raise the limit (`ulimit -Hn`, LimitNOFILE=)\n"
    )


@pytest.mark.parametrize("machines", [1, 4])
def test_a_guests_connections_leave_descriptors_for_others(machines: int, tmp_path: object) -> None:
    """The listener is this process itself, so each connection has two descriptors here."""
    code = """
import os, sys
from tests.support.bare import DriverOn, bare_machine, until
from tests.support.vsock_guest import RX_SIZE, GuestOf
from vmm.virtio import vsock_packet as vp

class Guest(GuestOf):
    def __init__(self, machine):
        self.errors, self.complaints, self.loop = [], [], None
        machine.on_error = self.complaints.append
        self.device = machine.platform.virtio.transports[0].device
        self._drive(DriverOn(machine, 0, size=64), (vp.HEADER_SIZE, RX_SIZE))
        for n in range(8):
            self.give(n)

kept, guests = [], []
other = bare_machine("1: hlt; jmp 1b", console="none")
for number in range(int(sys.argv[1])):
    machine = bare_machine("1: hlt; jmp 1b", memory=16 << 20, vsock=f"cid={3 + number}",
                           console="none")
    machine.start()
    device = machine.virtio_device("vsock")
    device.host.bind(7, lambda sock, port: kept.append(sock))
    guests.append(Guest(machine))
for guest in guests:
    for port in range(400):
        guest.send(vp.OP_REQUEST, 5000 + port, 7)
        guest.poll()
    assert len(guest.device.streams) <= 100

def enough():
    for guest in guests:
        guest.poll()
    said = [line for guest in guests for line in guest.complaints]
    return len(kept) >= 100 if len(guests) == 1 else said

until(enough)
assert len(os.listdir("/proc/self/fd")) <= 305, len(os.listdir("/proc/self/fd"))
other.start()
other.checkpoint()
bare_machine("1: hlt; jmp 1b", console="none").close()
said = [line for guest in guests for line in guest.complaints]
print(len(guests) == 1 or "three quarters of the 400 files" in said[0], other.state, flush=True)
os._exit(0)
"""
    assert run(400, 400, code, machines) == "True running\n"
