"""vmm/doctor/capabilities.py: each is asked of KVM, and none is listed twice."""

from __future__ import annotations

import pytest

from vmm.doctor import capabilities
from vmm.kvm import Kvm, constants


def test_no_capability_is_both_required_and_optional() -> None:
    assert not capabilities.REQUIRED.keys() & capabilities.OPTIONAL.keys()


@pytest.mark.needs_kvm
def test_values_are_kvms_own() -> None:
    with Kvm() as kvm:
        found = {cap.name: cap for cap in capabilities.check(kvm)}
        assert found["KVM_CAP_IRQ_ROUTING"].value == kvm.check_extension(constants.CAP_IRQ_ROUTING)
        assert found["KVM_CAP_SYNC_REGS"].value == kvm.check_extension(constants.CAP_SYNC_REGS)
    assert len(found) == len(capabilities.REQUIRED) + len(capabilities.OPTIONAL)
    assert found["KVM_CAP_IRQCHIP"].required and not found["KVM_CAP_TSC_CONTROL"].required
    assert [cap.name for cap in found.values() if cap.required and not cap.value] == []


@pytest.mark.needs_kvm
def test_limits_make_sense() -> None:
    with Kvm() as kvm:
        limits = capabilities.limits(kvm)
    assert 1 <= limits["vcpus_recommended"] <= limits["vcpus_max"] <= limits["vcpu_id_max"]
    assert limits["memory_slots"] >= 32
    assert limits["gsi_routes"] >= 24
