"""The RTC's interrupts, as Linux's rtc_cmos driver uses them, with a snapshot on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import programs
from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]

SCRIPT = """
/rtc
grep rtc0 /proc/interrupts
echo paused here; read line
/rtc
"""


def test_linux_gets_ticks_and_alarms(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    program = programs.compiled("rtc_ticks", tmp_path)
    initrd = make_initrd(SCRIPT, files={"rtc": program})
    config = MachineConfig(str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet")
    with Machine(config) as m:
        m.start()
        m.wait_for("paused here", 150)
        first = m.console.text()
        assert "rtc: 4 of 4" in first, first
        assert "IO-APIC   8-edge      rtc0" in first, first
        m.pause()
        m.snapshot(tmp_path / "snapshot")
    with Machine.restore(tmp_path / "snapshot") as m:
        m.start()
        m.send("\n")
        m.wait_for("rtc: 4 of 4", 100)
        assert m.wait(60).status == 0
