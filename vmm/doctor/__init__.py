"""What this host's KVM can do, found by asking it and by running tiny guests."""

from __future__ import annotations

from vmm.doctor.examination import Report, examine
from vmm.kvm.access import Problem

__all__ = ["Problem", "Report", "examine"]
