"""A real Linux kernel starts in the native lane, every way there is, and ends with a clear reason.

That lane's KVM (kvm_pvm) interprets kernel code, at some 2 million instructions a second, and does
not know all of it. The small kernel prints its banner within seconds and comes to the set-up of its
FPU; the nested lane takes kernels to user space (tests/test_boot_linux.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import boot_files
from tests.support import tiny as guests
from vmm import Machine, MachineConfig
from vmm.boot.e820 import memory_map
from vmm.layout import MIB
from vmm.testing.tiny import TinyKernel

pytestmark = [pytest.mark.native_only, pytest.mark.timeout(300, func_only=True)]

EARLY = "earlyprintk=serial,ttyS0,115200"
LIMIT = 120.0
"""Seconds for a few million instructions, on a busy host too."""
STARTS = {
    "vmlinux, 64-bit entry": ("vmlinux", "elf64"),
    "vmlinux, PVH": ("vmlinux", "pvh"),
    "vmlinux, auto": ("vmlinux", "auto"),
    "bzImage, unpacked by the host": ("bzimage", "auto"),
    "bzImage, PVH": ("bzimage", "pvh"),
}
E820_TYPES = {1: "usable", 2: "reserved"}


def machine(kernel: TinyKernel, file: str, **options: object) -> Machine:
    path = {"vmlinux": kernel.vmlinux, "bzimage": kernel.bzimage}[file]
    return Machine(MachineConfig(str(path), append=EARLY, **options))  # type: ignore[arg-type]


def ranges(lines: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Neighbours of one type made one: PVH kernels add the BIOS area, which may be two ranges."""
    merged: list[tuple[int, int, str]] = []
    for start, end, kind in sorted(lines):
        if merged and merged[-1][2] == kind and merged[-1][1] + 1 >= start:
            start, end = merged[-1][0], max(end, merged[-1][1])
            merged.pop()
        merged.append((start, end, kind))
    return merged


@pytest.mark.parametrize("start", STARTS)
def test_banner_and_memory_map(tiny_kernel: TinyKernel, start: str) -> None:
    file, boot = STARTS[start]
    with machine(tiny_kernel, file, boot=boot, memory=64 * MIB) as guest:
        told = [
            (gpa, gpa + size - 1, E820_TYPES[kind]) for gpa, size, kind in memory_map(guest.memory)
        ]
        guest.start()
        release = tiny_kernel.version.rpartition("-")[0]
        guest.console.wait_for(f"Linux version {release} (vmm@vmm)", LIMIT)
        guest.console.wait_for(f"Command line: {guest.config.cmdline}\r\n", LIMIT)
        guest.console.wait_for("bootconsole [earlyser0] enabled", LIMIT)
        text = guest.console.text()
        assert guest.stop().kind == "stopped"
    found = re.findall(r"BIOS-e820: \[mem 0x(\w+)-0x(\w+)\] (\w+)", text)
    seen = [(int(first, 16), int(last, 16), kind) for first, last, kind in found]
    if boot == "pvh":
        # Linux reserves what is between 640 KiB and 1 MiB itself (xen_pvh's init_pvh_bootparams).
        told.append((0xA0000, 0xFFFFF, "reserved"))
    assert ranges(seen) == ranges(told)


@pytest.mark.parametrize("cpus", [1, 3])
def test_processors_by_acpi(tiny_kernel: TinyKernel, cpus: int) -> None:
    with machine(tiny_kernel, "vmlinux", memory=64 * MIB, cpus=cpus) as guest:
        guest.start()
        # At its first look: Linux searches 64 KiB, in seconds here, where there is no MP table.
        guest.console.wait_for("found SMP MP-table at [mem 0x000f0000-0x000f000f]", LIMIT)
        for signature in ("RSDP", "XSDT", "FACP", "DSDT", "APIC"):
            guest.console.wait_for(f"ACPI: {signature} 0x", LIMIT)
        guest.console.wait_for("Using ACPI (MADT) for SMP configuration information", LIMIT)
        guest.console.wait_for(f"smpboot: Allowing {cpus} CPUs, 0 hotplug CPUs", LIMIT)
        text = guest.console.text()
    for wrong in ("Invalid", "mismatch", "BIOS bug", "ACPI Error", "ACPI Warning", "ACPI BIOS"):
        assert wrong not in text


@pytest.mark.parametrize("cpus", [1, 3])
def test_processors_by_the_mp_table(tiny_kernel: TinyKernel, cpus: int) -> None:
    with machine(tiny_kernel, "vmlinux", memory=64 * MIB, cpus=cpus, acpi=False) as guest:
        guest.start()
        guest.console.wait_for("Intel MultiProcessor Specification v1.4", LIMIT)
        guest.console.wait_for("MPTABLE: Product ID: MICROVM", LIMIT)
        guest.console.wait_for("IOAPIC[0]: apic_id", LIMIT)
        guest.console.wait_for(f"Processors: {cpus}\r", LIMIT)
        guest.console.wait_for(f"smpboot: Allowing {cpus} CPUs, 0 hotplug CPUs", LIMIT)
        text = guest.console.text()
    for wrong in ("BIOS bug", "SMP mptable:", "Unknown bus", "unknown"):
        assert wrong not in text


def test_a_person_who_waits_learns_why(tmp_path: Path) -> None:
    """Debian's cloud kernel: 10 s to clear its BSS, 20 to sort tables, and only then a banner. Of a
    guest that is not Linux, nothing is said."""
    says = "vmm: this host's KVM is kvm_pvm, which interprets guest kernel code"
    code = guests.exits(0)
    linux = tmp_path / "linux"
    notes = boot_files.LINUX_NOTE + boot_files.pvh_note(guests.ENTRY)
    linux.write_bytes(
        boot_files.elf(((guests.ENTRY, code, 4096),), entry=guests.ENTRY, notes=notes)
    )
    done = guests.run("run", str(linux), "--boot", "pvh")
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    done = guests.run("run", "-v", guests.kernel(tmp_path, code))
    assert done.returncode == 0, done.stderr
    assert says not in done.stderr


def test_where_it_stops_the_host_is_named(tiny_kernel: TinyKernel) -> None:
    """As a person sees it, without anything on the kernel command line."""
    done = guests.run(
        *("run", str(tiny_kernel.bzimage), "--memory", "64M", "--timeout", str(2 * LIMIT)),
        timeout=2.5 * LIMIT,
    )
    assert done.returncode == 122, done.stderr
    assert "Linux version" in done.stdout
    says = r"^vCPU 0: emulation failure at 0x\w+ \(64-bit mode, CPL 0\)"
    assert re.search(says, done.stderr, re.MULTILINE)
    assert "why: this host's KVM is kvm_pvm, which interprets guest kernel code" in done.stderr
    assert "what to do: stock Linux cannot run here; use a host with VT-x or AMD-V" in done.stderr
