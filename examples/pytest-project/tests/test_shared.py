"""One machine for all tests of this file, and a copy of it for the test that changes it."""

import pytest
from conftest import install

from vmm import Machine
from vmm.testing.machines import MachineFactory


@pytest.fixture(scope="module")
def counted(module_machine_factory: MachineFactory) -> Machine:
    machine = module_machine_factory.boot()
    install(machine)
    for _ in range(3):
        machine.run(["hits", "/tmp/n"], check=True)
    return machine


def test_it_has_counted(counted: Machine) -> None:
    assert counted.run(["cat", "/tmp/n"], check=True).stdout == b"3\n"


def test_a_copy_counts_on(counted: Machine) -> None:
    [copy] = counted.clone()  # closed with the machine it is of
    assert copy.run(["hits", "/tmp/n"], check=True).stdout == b"4\n"


def test_the_machine_has_not(counted: Machine) -> None:
    assert counted.run(["cat", "/tmp/n"], check=True).stdout == b"3\n"
