"""Stock Debian kernels boot to init and power off by themselves, every way there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(600)]

SCRIPT = """
cd /sys/devices/system/clocksource/clocksource0
echo "facts: nproc=$(nproc) clock=$(cat current_clocksource)"
echo "facts: memory=$(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "facts: acpi=$(test -d /sys/firmware/acpi/tables && echo yes || echo no)"
echo "facts: $(cat /proc/cmdline)"
echo "model: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
"""


def vmm_run(kernel: str, *options: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`vmm run KERNEL OPTIONS`, its console captured."""
    command = [sys.executable, "-m", "vmm", "run", kernel, "--timeout", str(timeout), *options]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        errors="replace", timeout=timeout + 60,
    )  # fmt: skip


def facts(output: str) -> dict[str, str]:
    """name=value pairs of the lines that start with `facts:`."""
    lines = re.findall(r"^facts: (.*?)\r?$", output, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in line.split() if "=" in word)


@pytest.fixture
def initrd(make_initrd: Callable[..., Path]) -> str:
    return str(make_initrd(SCRIPT))


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("boot", ["bzimage", "elf64", "pvh"])
def test_cloud_kernel(cloud_kernel: Kernel, initrd: str, boot: str, cpus: int) -> None:
    kernel = cloud_kernel.vmlinuz if boot == "bzimage" else cloud_kernel.vmlinux()
    done = vmm_run(
        str(kernel), "--initrd", initrd, "--boot", boot, "--cpus", str(cpus), "--append", "quiet"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    seen = facts(done.stdout)
    assert seen["nproc"] == str(cpus)
    assert seen["clock"] in ("kvm-clock", "tsc")
    assert seen["acpi"] == "yes"
    assert "panic=-1" in done.stdout, done.stdout[-3000:]
    assert done.stderr == ""


def test_the_guest_sees_the_hosts_cpu_model(cloud_kernel: Kernel, initrd: str) -> None:
    done = vmm_run(str(cloud_kernel.vmlinuz), "--initrd", initrd, "--append", "quiet")
    model = re.search(r"^model: (.*?)\r?$", done.stdout, re.MULTILINE)
    host = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert model is not None
    assert host is not None
    assert model[1] == host[1]


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_without_acpi(full_kernel: Kernel, make_initrd: Callable[..., Path], cpus: int) -> None:
    """The full kernel: Debian's cloud kernel cannot read an MP table (no CONFIG_X86_MPPARSE)."""
    initrd = make_initrd(SCRIPT + "reboot -f\n")  # without ACPI, nothing turns a machine off
    done = vmm_run(
        str(full_kernel.vmlinuz),
        *("--initrd", str(initrd), "--no-acpi", "--cpus", str(cpus), "--append", "quiet"),
        *("--memory", "512M"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    seen = facts(done.stdout)
    assert seen["nproc"] == str(cpus)
    assert seen["clock"] in ("kvm-clock", "tsc")
    assert seen["acpi"] == "no"


def test_cloud_kernel_without_acpi(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    """It knows no MP table, so one processor and, told so, no IOAPIC."""
    initrd = make_initrd(SCRIPT + "reboot -f\n")
    done = vmm_run(
        str(cloud_kernel.vmlinuz),
        *("--initrd", str(initrd), "--no-acpi", "--append", "quiet noapic"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    seen = facts(done.stdout)
    assert seen["nproc"] == "1"
    assert seen["acpi"] == "no"


def test_128_mib(cloud_kernel: Kernel, initrd: str) -> None:
    done = vmm_run(
        str(cloud_kernel.vmlinuz), "--initrd", initrd, "--memory", "128M", "--append", "quiet"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert int(facts(done.stdout)["memory"]) < 128 << 10


def test_5_gib_is_used_above_4_gib(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    """A pattern the guest writes is found in the region from 4 GiB up, from the host."""
    from vmm import Machine, MachineConfig
    from vmm.layout import GIB, HOLE_END, MIB

    initrd = make_initrd(
        SCRIPT
        + "mount -t tmpfs tmpfs /mnt\n"
        + "yes VMM-PATTERN-5GIB | dd of=/mnt/pattern bs=1M count=32 iflag=fullblock 2>/dev/null\n"
        + "echo pattern written; read line\n"
    )
    config = MachineConfig(
        str(cloud_kernel.vmlinuz),
        initrds=[str(initrd)],
        memory=5 * GIB,
        append="quiet",
        timeout=150,
    )
    with Machine(config) as machine:
        machine.start()
        machine.console.wait_for("pattern written", timeout=150)
        memory = int(facts(machine.console.text())["memory"])
        assert memory > 4.5 * MIB  # KiB
        machine.pause()
        high = machine.memory.regions[1]
        assert high.gpa == HOLE_END
        assert high.resident() > 32 * MIB
        assert high.map.find(b"VMM-PATTERN-5GIB\n" * 100) >= 0
        machine.stop()


@pytest.mark.timeout(1500)  # a busy host needs 40 s for each
def test_ten_boots_in_a_row(cloud_kernel: Kernel, initrd: str) -> None:
    for number in range(10):
        done = vmm_run(
            str(cloud_kernel.vmlinuz), "--initrd", initrd, "--append", "quiet", "--cpus", "2"
        )
        assert done.returncode == 0, (number, done.stdout[-3000:] + done.stderr)
        assert facts(done.stdout)["nproc"] == "2"


def test_several_initrds_are_one(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    from vmm.initramfs import Initramfs

    first = make_initrd("cat /extra; cat /second\n")
    extra = first.parent / "extra.img"
    Initramfs().file("extra", data="from the second\n").write(str(extra))
    third = first.parent / "third.img"
    Initramfs().file("second", data="from the third\n").write(str(third))
    done = vmm_run(
        str(cloud_kernel.vmlinuz),
        *("--initrd", str(first), "--initrd", str(extra), "--initrd", str(third)),
        *("--append", "quiet"),
    )
    assert "from the second" in done.stdout
    assert "from the third" in done.stdout


def test_status_of_the_guest(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    initrd = make_initrd("vmm-exit 42; echo still here")
    done = vmm_run(str(cloud_kernel.vmlinuz), "--initrd", str(initrd), "--append", "quiet")
    assert done.returncode == 42, done.stdout[-2000:] + done.stderr
    assert "still here" not in done.stdout


def test_reboot_is_status_0(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    done = vmm_run(
        str(cloud_kernel.vmlinuz), "--initrd", str(make_initrd("reboot -f")), "--append", "quiet"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_panic_by_pvpanic(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    initrd = make_initrd(
        "echo c > /proc/sysrq-trigger; sleep 60", kernel=cloud_kernel, modules=["pvpanic-mmio"]
    )
    done = vmm_run(str(cloud_kernel.vmlinuz), "--initrd", str(initrd), "--append", "quiet")
    assert done.returncode == 120, done.stdout[-2000:] + done.stderr
    assert "panicked" in done.stderr


def test_panic_before_any_driver(cloud_kernel: Kernel) -> None:
    """No initrd, no root: the kernel panics before pvpanic's module could be loaded."""
    done = vmm_run(str(cloud_kernel.vmlinuz), "--append", "quiet")
    assert done.returncode == 120, done.stdout[-2000:] + done.stderr


def test_sigterm_is_the_power_button(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path]
) -> None:
    import signal

    initrd = make_initrd(
        # Open before it says so: evdev keeps no events for who comes later.
        "exec 3</dev/input/event0; echo waiting; head -c 24 <&3 >/dev/null; echo pressed",
        kernel=cloud_kernel,
        modules=["evdev", "button"],
    )
    command = [sys.executable, "-m", "vmm", "run", str(cloud_kernel.vmlinuz), "--initrd"]
    command += [str(initrd), "--append", "quiet", "--timeout", "150"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        output = b""
        while b"waiting" not in output:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, output[-2000:]
            output += piece
        for _ in range(2):  # timeout(1) signals the process, and its group
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        rest, errors = process.communicate(timeout=120)
        assert b"pressed" in rest
        assert process.returncode == 0, errors
        assert errors.startswith(b"vmm: SIGTERM: the guest's power button is pressed; ")


def test_a_deaf_guest_and_a_console_without_a_driver(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path]
) -> None:
    """Linux has the power button's driver, and no program that acts on it."""
    initrd = make_initrd("echo waiting >/dev/ttyS0; sleep 1000", kernel=cloud_kernel)
    command = [sys.executable, "-m", "vmm", "run", str(cloud_kernel.vmlinuz), "--initrd"]
    command += [str(initrd), "--append", "console=ttyS0 quiet", "--timeout", "150"]
    command += ["--grace", "2", "--console", "hvc"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        output = b""
        while b"waiting" not in output:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, output[-2000:]
            output += piece
        process.terminate()
        errors = process.communicate(timeout=120)[1].decode().splitlines()
        assert process.returncode == 143, errors
    assert errors[0].startswith("vmm: SIGTERM: the guest's power button is pressed; ")
    assert errors[1] == "vmm: no driver took the virtio console (hvc0)"
    assert errors[2].startswith("vmm: vCPU 0 "), errors
    assert errors[-1].startswith("vmm: ended by SIGTERM: the guest was still on after 2 s")


def test_on_a_terminal(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    """The terminal's type and size reach the guest; an old panic's text makes no panic."""
    initrd = make_initrd(
        "echo term=$TERM; cat /proc/cmdline; "
        "echo '[    1.000000] Kernel panic - not syncing: last week'; reboot -f",
        kernel=cloud_kernel,
    )
    with tiny.AtTerminal(
        *("run", str(cloud_kernel.vmlinuz), "--initrd", str(initrd), "--append", "quiet"),
        *("--timeout", "150"),
        term="vt220",
    ) as person:
        termios.tcsetwinsize(person.slave, (33, 101))
        assert person.wait(200) == 0, person.output
    output = person.output.decode()
    assert "term=vt220" in output
    for word in ("term.ttyS0=vt220", "rows.ttyS0=33", "columns.ttyS0=101"):
        assert f"systemd.tty.{word}" in output
    assert "Kernel panic - not syncing: last week" in output


def test_from_python_in_ten_lines(cloud_kernel: Kernel, initrd: str) -> None:
    example = Path(__file__).parents[1] / "examples" / "boot.py"
    done = subprocess.run(
        [sys.executable, str(example), str(cloud_kernel.vmlinuz), initrd],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "poweroff" in done.stdout
