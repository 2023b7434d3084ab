"""Machines that are booted for one test."""

from pathlib import Path

import pytest
from conftest import install

from vmm import Initramfs, Machine
from vmm.initramfs import exit_program
from vmm.testing.kernels import Kernel
from vmm.testing.machines import MachineFactory


def test_the_kernel_boots(machine: Machine) -> None:
    """`machine` is made, but not started: here the test does that, and looks at the console."""
    machine.start()
    assert machine.console.wait_for("ready", timeout=300) == "ready"


@pytest.mark.vmm(memory="384M", cpus=2)
def test_a_larger_machine(booted_machine: Machine) -> None:
    """`booted_machine` answers; the marker says what it is made of."""
    assert booted_machine.run(["nproc"], check=True).stdout == b"2\n"
    install(booted_machine)
    counts = [booted_machine.run(["hits", "/tmp/n"]).stdout for _ in range(3)]
    assert counts == [b"1\n", b"2\n", b"3\n"]


def test_an_initrd_of_our_own(
    machine_factory: MachineFactory, vmm_kernel: Kernel, tmp_path: Path
) -> None:
    """`machine_factory` takes what MachineConfig takes. This init ends it with status 7."""
    initrd = tmp_path / "initrd.img"
    Initramfs().file("init", data=exit_program(), mode=0o755).write(str(initrd))
    machine = machine_factory(vmm_kernel, initrds=[initrd], append="quiet -- 7")
    machine.start()
    assert machine.wait(timeout=300).status == 7
