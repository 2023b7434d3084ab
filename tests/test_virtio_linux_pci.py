"""Virtio over PCI under Linux's own drivers: the bus, MSI-X, I/O, unbinding, removal, reset."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]

MIB = 1 << 20
ROUNDS = 3
CPUS = 2

SCRIPT = f"""
cd /sys/bus/pci/devices
for slot in *; do
    cd $slot
    echo "function: $slot $(cat vendor device class revision subsystem_vendor subsystem_device |
        tr '\\n' ' ')$(readlink driver | sed 's,.*/,,')"
    sed "s/^/bar of $slot: /" resource
    cd ..
done
grep -e '^c' -e 'MMCONFIG' /proc/iomem | sed 's/^/iomem: /'
disk=0000:00:01.0
read_disk() {{
    while [ ! -b /dev/vda ]; do :; done
    echo "$1: $(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum)"
}}
write_disk() {{
    while [ ! -b /dev/vda ]; do :; done
    yes "$1" | head -c 65536 | dd of=/dev/vda bs=64k seek=$2 oflag=direct conv=fsync 2>/dev/null
}}
interrupts() {{
    grep PCI-MSI /proc/interrupts | sed "s/^/$1: /"
}}
dmesg | grep -o 'MMCONFIG at .* reserved in E820' | sed 's/^/log: /'
read_disk 'first'
head -c 1000 /dev/hwrng | wc -c | sed 's/^/entropy: /'
interrupts 'interrupts'

i=0; while [ $i -lt {ROUNDS} ]; do
    for device in 0000:00:0[12].0; do
        echo $device > /sys/bus/pci/drivers/virtio-pci/unbind
        echo $device > /sys/bus/pci/drivers/virtio-pci/bind
    done
    write_disk "bound $i" $i
    i=$((i + 1))
done
echo 1 > $disk/remove
test -e $disk || echo "gone: disk"
echo 1 > /sys/bus/pci/rescan
write_disk 'rescanned' {ROUNDS}
cat $disk/reset_method | sed 's/^/reset: /'
echo $disk > /sys/bus/pci/drivers/virtio-pci/unbind
echo 1 > $disk/reset && echo "reset: done"
echo $disk > /sys/bus/pci/drivers/virtio-pci/bind
write_disk 'was reset' {ROUNDS + 1}
read_disk 'last'
head -c 1000 /dev/hwrng | wc -c | sed 's/^/entropy again: /'
interrupts 'later'
dmesg | grep -i -e 'virtio.*fail' -e 'virtio.*error' -e 'no irq handler' | sed 's/^/bad: /'
"""


def write(data: bytearray, text: str, block: int) -> None:
    """As `write_disk` does."""
    line = text.encode() + b"\n"
    data[block << 16 : (block + 1) << 16] = (line * (65536 // len(line) + 1))[:65536]


def lines(output: str, label: str) -> list[str]:
    return re.findall(rf"^{label}: (.*?)\r?$", output, re.MULTILINE)


def test_stock_drivers(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    image, data = tmp_path / "disk.img", bytearray(random.Random(7).randbytes(2 * MIB))
    image.write_bytes(data)
    initrd = make_initrd(
        SCRIPT, kernel=cloud_kernel, modules=["virtio_pci", "virtio_blk", "virtio_rng"]
    )
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=200, cpus=CPUS,
        transport="pci", drives=[f"{image},queues={CPUS}"], rng=True,
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        ended = machine.wait()
        output = machine.console.text()
    assert ended.kind == "poweroff", output
    assert lines(output, "function") == [
        "0000:00:00.0 0x1b36 0x0008 0x060000 0x00 0x0000 0x0000 ",
        "0000:00:01.0 0x1af4 0x1042 0x018000 0x01 0x1af4 0x1042 virtio-pci",
        "0000:00:02.0 0x1af4 0x1044 0xff0000 0x01 0x1af4 0x1044 virtio-pci",
    ]
    bars = lines(output, "bar of 0000:00:01.0")
    assert re.fullmatch(r"0x0{8}c\w{4}000 0x0{8}c\w{4}fff 0x0{11}40200", bars[1])
    assert re.fullmatch(r"0x0{8}c\w{4}000 0x0{8}c\w{4}fff 0x0{10}140204", bars[4])
    assert lines(output, "log") == ["MMCONFIG at [mem 0xe0000000-0xe00fffff] reserved in E820"]
    assert lines(output, "iomem")[0] == "c0000000-cfffffff : PCI Bus 0000:00"
    assert lines(output, "first")[0].split()[0] == hashlib.md5(data).hexdigest()

    taken = {line.split()[-1]: sum(map(int, re.findall(r" (\d+)(?= )", line)[:CPUS]))
             for line in lines(output, "interrupts")}  # fmt: skip
    queues = [f"virtio0-req.{number}" for number in range(CPUS)]
    assert taken.keys() == {"virtio0-config", *queues, "virtio1-config", "virtio1-input"}
    assert sum(taken[queue] for queue in queues) >= 32  # 2 MiB in pieces of 64 KiB
    assert taken["virtio1-input"] >= 1

    for number in range(ROUNDS):
        write(data, f"bound {number}", number)
    write(data, "rescanned", ROUNDS)
    write(data, "was reset", ROUNDS + 1)
    assert lines(output, "gone") == ["disk"]
    assert lines(output, "reset") == ["flr", "done"]
    assert lines(output, "last")[0].split()[0] == hashlib.md5(data).hexdigest()
    assert image.read_bytes() == data
    assert lines(output, "entropy") == lines(output, "entropy again") == ["1000"]
    assert lines(output, "bad") == []
    assert len(lines(output, "later")) == 3 + CPUS


def test_full_kernel_without_acpi(
    full_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    """It finds the bus by ports 0xcf8 and 0xcfc; its interrupts need no tables."""
    image, data = tmp_path / "disk.img", random.Random(3).randbytes(MIB)
    image.write_bytes(data)
    script = (
        'echo "bus: $(dmesg | grep -c "PCI: Using configuration type 1")"\n'
        'echo "all: $(md5sum < /dev/vda)"; reboot -f\n'
    )
    initrd = make_initrd(script, kernel=full_kernel, modules=["virtio_pci", "virtio_blk"])
    config = MachineConfig(
        str(full_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=200, acpi=False,
        memory=512 * MIB, transport="pci", drives=[str(image)],
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        ended = machine.wait()
        output = machine.console.text()
    assert ended.kind == "reboot", output
    assert lines(output, "bus") == ["1"]
    assert lines(output, "all")[0].split()[0] == hashlib.md5(data).hexdigest()
