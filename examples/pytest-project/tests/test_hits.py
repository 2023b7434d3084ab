"""Each test has a machine of its own, restored from one snapshot: no boot, nothing left over."""

import pytest

from vmm import Machine


def test_counts(restored_machine: Machine) -> None:
    assert restored_machine.run(["hits", "/tmp/n"], check=True).stdout == b"1\n"
    assert restored_machine.run(["hits", "/tmp/n"], check=True).stdout == b"2\n"


def test_starts_from_one_again(restored_machine: Machine) -> None:
    assert restored_machine.run(["hits", "/tmp/n"], check=True).stdout == b"1\n"


@pytest.mark.parametrize("path", ["/no/such/directory/n", "/proc/version/n"])
def test_fails_where_it_cannot_write(restored_machine: Machine, path: str) -> None:
    done = restored_machine.run(["hits", path])
    assert done.returncode != 0
    assert b"can't create" in done.stderr
