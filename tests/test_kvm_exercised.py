"""Every ioctl wrapper of vmm/kvm is used in a test with the real KVM (tests/test_kvm_*.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmm.kvm import Kvm, Vcpu, Vm

HERE = Path(__file__).parent
SOURCES = [path for path in HERE.glob("test_kvm_*.py") if "needs_kvm" in path.read_text()]
TEXT = "\n".join(path.read_text() for path in [*SOURCES, HERE / "support" / "guests.py"])
METHODS = [
    f"{kind.__name__}.{name}"
    for kind in (Kvm, Vm, Vcpu)
    for name, member in vars(kind).items()
    if not name.startswith("_") and (callable(member) or isinstance(member, property))
]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_called_in_a_test(method: str) -> None:
    name = method.partition(".")[2]
    # Called, or named for getattr.
    assert re.search(rf'\.{name}\b|"{name}"', TEXT), f"no test of {method}"


def test_there_are_tests_and_methods() -> None:
    assert len(METHODS) > 60
    assert len(SOURCES) > 10
