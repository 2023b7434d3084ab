"""vmm/errors.py: the exit status of each, and KVM's errors in words."""

from __future__ import annotations

import errno

import pytest

from vmm import errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError("x"), 2),
        (errors.BootError("x"), 2),
        (errors.HostError("x"), 69),
        (errors.KvmError("KVM_RUN", errno.EFAULT), 69),
        (errors.StateError("x"), 70),
        (errors.GuestMemoryError(0, 1), 70),
        (errors.VmmError("x"), 70),
    ],
)
def test_exit_statuses(error: errors.VmmError, status: int) -> None:
    assert error.exit_status == status
    assert isinstance(error, errors.VmmError)


def test_every_failure_has_a_status_of_its_own() -> None:
    values = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert len(values) == len(set(values)) == 10
    assert all(0 <= value < 128 or value == 130 for value in values)


def test_kvm_errors_name_the_call_and_the_error() -> None:
    error = errors.KvmError("KVM_CREATE_VM", errno.ENOMEM)
    assert str(error) == "KVM_CREATE_VM: Cannot allocate memory (ENOMEM)"
    error = errors.KvmError("KVM_CREATE_VM", errno.EBUSY, "end the other hypervisor")
    assert str(error) == "KVM_CREATE_VM: Device or resource busy (EBUSY); end the other hypervisor"
    assert (error.ioctl, error.errno, error.hint) == (
        "KVM_CREATE_VM",
        errno.EBUSY,
        "end the other hypervisor",
    )
    assert str(errors.KvmError("KVM_RUN", 9999)) == "KVM_RUN: Unknown error 9999 (9999)"


def test_guest_memory_errors_name_the_range() -> None:
    error = errors.GuestMemoryError(0xC0000000, 4096)
    assert str(error) == "GPA 0xc0000000+0x1000 outside guest memory"
    assert (error.gpa, error.size) == (0xC0000000, 4096)
    assert str(errors.GuestMemoryError(16, 2, "is read-only")) == "GPA 0x10+0x2 is read-only"
