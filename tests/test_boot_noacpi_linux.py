"""Linux without ACPI finds its virtio devices by the command line and the MP table, and ends.

The small kernel has CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, which Debian's kernels lack. Without ACPI
tables it is what a kernel that was built without ACPI is (libkrun's, for example).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.testing.tiny import TinyKernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300, func_only=True)]

SCRIPT = """
for disk in /dev/vd?; do echo "disk: $disk $(dd if=$disk bs=512 count=1 2>/dev/null | head -c 6)"; done
for irq in /proc/irq/*/virtio*; do echo "irq: $irq"; done
dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null && echo read it all
"""  # noqa: E501
DISKS = 7
"""More than there are free interrupts below 16."""


def test_disks_without_acpi(
    tiny_kernel: TinyKernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    paths = []
    for number in range(DISKS):
        path = tmp_path / f"disk{number}"
        path.write_bytes(b"disk-%d" % number + bytes((1 << 20) - 6))
        paths.append(f"{path},format=raw")
    config = MachineConfig(
        str(tiny_kernel.vmlinux), initrds=[str(make_initrd(SCRIPT))], drives=paths,
        acpi=False, cpus=2, append="quiet",
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        ended = m.wait(120)
        text = m.console.text()
    for number in range(DISKS):
        assert f"disk: /dev/vd{'abcdefg'[number]} disk-{number}" in text, text
        assert f"irq: /proc/irq/{(5, 6, 7, 10, 11, 16, 17)[number]}/virtio{number}" in text, text
    assert "read it all" in text
    assert "reboot: Power off not available" in text or "System halted" in text
    assert (ended.kind, ended.status) == ("halted", 0), text
    assert "No config space access function" not in text


def test_the_command_line_names_devices_on_request(
    tiny_kernel: TinyKernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    """With ACPI turned off in the guest alone, as in a kernel built without it."""
    path = tmp_path / "disk"
    path.write_bytes(b"disk-0" + bytes((1 << 20) - 6))
    config = MachineConfig(
        str(tiny_kernel.vmlinux), initrds=[str(make_initrd(SCRIPT))], drives=[f"{path},format=raw"],
        cmdline_devices=True, append="quiet acpi=off",
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        ended = m.wait(120)
        text = m.console.text()
    assert "disk: /dev/vda disk-0" in text, text
    assert "irq: /proc/irq/16/virtio0" in text, text
    assert ended.kind == "halted", text
