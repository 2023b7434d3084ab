"""The balloon under Linux's own driver, over both transports: what goes back is seen on both sides,
and none is lost when the driver goes and comes under load.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.layout import MIB
from vmm.testing.kernels import Kernel
from vmm.virtio.balloon import F_PAGE_REPORTING

pytestmark = [
    pytest.mark.needs_linux_kvm,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("transport", ["mmio", "pci"]),
]

ROUNDS = 50
SCRIPT = f"""
stty -echo  # what is typed would come anywhere between the lines printed
echo guest ready
while read word; do
    case "$word" in
    free) echo "free: $(sed -n 's/^MemFree: *//p' /proc/meminfo)" ;;
    total) echo "total: $(sed -n 's/^MemTotal: *//p' /proc/meminfo)" ;;
    fill) dd if=/dev/zero of=/tmp/fill bs=1M count=180 2>/dev/null; echo "filled: ok" ;;
    drop) rm /tmp/fill; echo "dropped: ok" ;;
    rebind)
        cd /sys/bus/virtio/drivers/virtio_balloon; device=$(echo virtio*)
        echo $device > unbind; echo $device > bind; echo "rebound: ok" ;;
    load)
        ( while :; do dd if=/dev/zero of=/tmp/load bs=1M count=40; rm /tmp/load; done ) \\
            2>/dev/null &
        i=0; while [ $i -lt {ROUNDS} ]; do
            echo $device > unbind; echo $device > bind; i=$((i+1))
        done
        kill $!; wait; rm -f /tmp/load; echo "loaded: ok" ;;
    quit) break ;;
    esac
done
"""


def ask(machine: Machine, word: str, answer: str, within: float = 60) -> int:
    """What the guest's shell says; the number in it."""
    machine.platform.uart.receive(word.encode() + b"\n")
    line = machine.console.wait_for(re.compile(f"{answer}: \\w+.*\n"), timeout=within)
    digits = "".join(filter(str.isdigit, line))
    return int(digits or 0) << 10


def resident(machine: Machine) -> int:
    return sum(region.resident() for region in machine.memory.regions)


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def move(machine: Machine, ended: threading.Event) -> None:
    """Change the balloon's size all the time."""
    while not ended.wait(0.05):
        for size in (48, 16, 32, 0):
            machine.balloon.target(size * MIB)


def test_a_guests_memory_goes_back(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], transport: str
) -> None:
    modules = [f"virtio_{transport}", "virtio_balloon"]
    initrd = make_initrd(SCRIPT, kernel=cloud_kernel, modules=modules)
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=380,
        transport=transport, memory=384 * MIB, balloon=0,
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        machine.console.wait_for("guest ready", timeout=120)
        balloon = machine.balloon

        # Free page reporting: what the guest frees goes back by itself.
        ask(machine, "fill", "filled")
        high = resident(machine)
        ask(machine, "drop", "dropped")
        until(lambda: resident(machine) < high - 100 * MIB, lambda: (high, resident(machine)))
        print(f"reporting: resident {high // MIB} MiB -> {resident(machine) // MIB} MiB")

        stats = balloon.stats(30)
        assert stats["total_memory"] == ask(machine, "total", "total")
        assert 0 < stats["free_memory"] <= stats["available_memory"] + 64 * MIB

        # Without it, what was used once stays, until the balloon takes it.
        balloon.features &= ~(1 << F_PAGE_REPORTING)
        ask(machine, "rebind", "rebound")
        assert not balloon.has(F_PAGE_REPORTING)
        ask(machine, "fill", "filled")
        ask(machine, "drop", "dropped")
        time.sleep(3)
        high, free = resident(machine), ask(machine, "free", "free")
        size = (free >> 20) - 64 << 20  # so that it must take what was used, not only fresh pages
        balloon.target(size)
        until(lambda: balloon.actual == size, lambda: balloon.actual)
        low, left = resident(machine), ask(machine, "free", "free")
        print(f"inflated: resident {high // MIB} -> {low // MIB}, free {free // MIB} -> "
              f"{left // MIB} MiB")  # fmt: skip
        assert high - low > 90 * MIB
        assert size - 10 * MIB < free - left < size + 10 * MIB

        balloon.target(0)
        until(lambda: balloon.actual == 0, lambda: balloon.actual)
        again = ask(machine, "free", "free")
        assert again - left > size - 10 * MIB
        ask(machine, "fill", "filled")
        print(f"deflated: free {again // MIB} MiB, filled: resident {resident(machine) // MIB} MiB")
        assert resident(machine) > low + 90 * MIB

        # The driver goes and comes while the balloon changes and the guest uses its memory.
        ask(machine, "drop", "dropped")
        free, ended = ask(machine, "free", "free"), threading.Event()
        thread = threading.Thread(target=move, args=(machine, ended))
        thread.start()
        try:
            ask(machine, "load", "loaded", within=200)
        finally:
            ended.set()
            thread.join()
        balloon.target(0)
        until(lambda: balloon.actual == 0, lambda: balloon.actual)
        until(
            lambda: ask(machine, "free", "free") > free - 16 * MIB,
            lambda: (free, ask(machine, "free", "free")),
        )

        # More than the guest has: it stops where it must, and takes back what it needs.
        balloon.target(300 * MIB)
        machine.platform.uart.receive(b"quit\n")
        assert machine.wait(60).kind == "poweroff"
