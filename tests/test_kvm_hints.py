"""vmm/kvm/hints.py: an errno becomes advice; the rest stays silent."""

from __future__ import annotations

import errno
import os

import pytest

from vmm.errors import EXIT_HOST, HostError, KvmError
from vmm.kvm import hints, ioctls

NAMES = {call.name for call in vars(ioctls).values() if isinstance(call, ioctls.Ioctl)}


@pytest.mark.parametrize("key", hints._HINTS)
def test_each_hint_is_for_a_call_we_make(key: tuple[str, int]) -> None:
    name, number = key
    assert name in NAMES
    assert number in errno.errorcode


@pytest.mark.parametrize("text", [*hints._HINTS.values(), *hints._GENERAL.values()])
def test_a_hint_is_one_clause(text: str) -> None:
    assert text and "\n" not in text and not text.endswith(".") and len(text) < 90


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("KVM_CREATE_VCPU", errno.EEXIST, "a vCPU of this number exists"),
        ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST, "overlaps"),
        ("KVM_GET_XSAVE2", errno.ENOTTY, "vmm doctor"),
        ("KVM_CREATE_IRQCHIP", errno.ENOTTY, "no in-kernel irqchip"),  # before the general one
        ("KVM_CREATE_VCPU", errno.EMFILE, "ulimit -n"),
    ],
)
def test_the_hint_for(name: str, number: int, words: str) -> None:
    assert words in hints.hint_for(name, number)


def test_no_hint() -> None:
    assert hints.hint_for("KVM_RUN", errno.EINTR) == ""


def test_an_error_tells_call_cause_and_mend() -> None:
    error = KvmError("KVM_IRQFD", errno.EBUSY, hints.hint_for("KVM_IRQFD", errno.EBUSY))
    assert str(error) == (
        "KVM_IRQFD: Device or resource busy (EBUSY); the eventfd is bound to a GSI already"
    )
    assert (error.ioctl, error.errno, error.exit_status) == ("KVM_IRQFD", errno.EBUSY, EXIT_HOST)
    assert isinstance(error, HostError)


def test_an_error_without_advice_ends_with_its_cause() -> None:
    assert str(KvmError("KVM_RUN", errno.EIO)) == "KVM_RUN: Input/output error (EIO)"
    assert "(4242)" in str(KvmError("KVM_RUN", 4242))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_call_on_something_else_names_itself(name: str) -> None:
    """Every ioctl of the table, on a descriptor that is no KVM's."""
    call = next(c for c in vars(ioctls).values() if isinstance(c, ioctls.Ioctl) and c.name == name)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(KvmError, match=rf"^{name}: .*\(ENOTTY\); .*`vmm doctor`") as caught:
            ioctls.ioctl(null, call)
    finally:
        os.close(null)
    assert (caught.value.ioctl, caught.value.errno) == (name, errno.ENOTTY)
