"""vmm/doctor/measure.py: speed and SYSCALL, on both back ends."""

from __future__ import annotations

import pytest

from vmm.doctor import measure
from vmm.kvm import Kvm


@pytest.mark.needs_kvm
@pytest.mark.parametrize("cpl", [0, 3])
def test_speed_is_found_at_both_levels(cpl: int) -> None:
    with Kvm() as kvm:
        assert 0.01 < measure.loop_mips(kvm, cpl) < 100_000


@pytest.mark.needs_linux_kvm
def test_syscall_enters_cpl0_on_a_processor() -> None:
    with Kvm() as kvm:
        assert measure.syscall_fault(kvm) == ""


@pytest.mark.native_only
def test_syscall_does_not_enter_cpl0_under_pvm() -> None:
    with Kvm() as kvm:
        assert measure.syscall_fault(kvm).startswith("at the handler's first instruction CS is")


@pytest.mark.needs_kvm
@pytest.mark.parametrize(
    "handler",
    [
        "0f0b",  # ud2
        "e6f4 e6f5 480f07",  # reports another CS than the processor's
    ],
)
def test_a_handler_that_goes_wrong_is_a_fault(handler: str) -> None:
    with Kvm() as kvm:
        assert measure.syscall_fault(kvm, bytes.fromhex(handler))
