"""The examination: look at the host, open the device, ask it, run guests on it, conclude."""

from __future__ import annotations

from vmm.doctor import capabilities, measure
from vmm.doctor.guest import GuestFailed
from vmm.doctor.parts import parts
from vmm.errors import HostError
from vmm.kvm import DEV_KVM, Kvm, access
from vmm.kvm.access import Problem
from vmm.kvm.host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.doctor.capabilities import Capability
    from vmm.doctor.parts import Part

INTERPRETED_RATIO = 20
"""Kernel code this many times slower than user code is not run by the processor. PVM: 3,500;
VT-x and AMD-V: 1, and no more than 2 on a busy or an emulated host."""


class Report:
    """What was found. Values that could not be found are None.

    Attributes:
        usable: the device opens, makes VMs, and has every required capability.
        cpl0_mips, cpl3_mips: speed of guest kernel and user code, million instructions a second.
        syscall_fault: how SYSCALL goes wrong, "" if it does not, None if it was not tried.
        problems: what is wrong, the cause of all others first.
    """

    def __init__(self, path: str, host: Host) -> None:
        self.path = path
        self.host = host
        self.usable = False
        self.api_version: int | None = None
        self.capabilities: list[Capability] = []
        self.limits: dict[str, int] = {}
        self.cpl0_mips: float | None = None
        self.cpl3_mips: float | None = None
        self.syscall_fault: str | None = None
        self.problems: list[Problem] = []
        self._parts: list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """What there is beside KVM; looked for at the first use."""
        if self._parts is None:
            self._parts = parts()
        return self._parts

    @property
    def interpreted(self) -> bool | None:
        """Whether guest kernel code is interpreted, not run by the processor."""
        if self.cpl0_mips is None or self.cpl3_mips is None:
            return None
        return self.cpl0_mips * INTERPRETED_RATIO < self.cpl3_mips

    @property
    def syscall_enters_cpl0(self) -> bool | None:
        """Whether SYSCALL from CPL3 enters CPL0 and SYSRET comes back."""
        return None if self.syscall_fault is None else not self.syscall_fault

    @property
    def runs_linux(self) -> bool:
        """Whether a stock Linux kernel reaches user space here."""
        return self.usable and self.interpreted is False and self.syscall_enters_cpl0 is True

    @property
    def verdict(self) -> str:
        """One sentence: what will run here."""
        if not self.usable:
            return f"Nothing runs here: {self.problems[0].what}."
        where = f"{self.host.backend or 'KVM'}{', nested' if self.host.nested else ''}"
        if self.runs_linux:
            return f"Stock Linux kernels run here ({where}), their code on the processor itself."
        faults = []
        if self.interpreted:
            faults.append(f"guest kernel code is interpreted ({self.cpl0_mips:.1f} M insn/s)")
        if self.syscall_fault:
            faults.append("SYSCALL does not enter CPL0")
        if not faults:
            return f"Stock Linux is not likely to run here ({where}): the test guests failed."
        return (
            f"Only small guests run here ({where}): {' and '.join(faults)}, "
            "so that stock Linux does not reach user space."
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "runs_linux": self.runs_linux,
            "usable": self.usable,
            "device": self.path,
            "backend": self.host.backend,
            "nested": self.host.nested,
            "kernel": self.host.kernel,
            "processor": self.host.processor,
            "api_version": self.api_version,
            "capabilities": {
                cap.name: {"value": cap.value, "required": cap.required, "purpose": cap.purpose}
                for cap in self.capabilities
            },
            "guest_speed": {
                "cpl0_mips": _rounded(self.cpl0_mips),
                "cpl3_mips": _rounded(self.cpl3_mips),
            },
            "kernel_code_interpreted": self.interpreted,
            "syscall_enters_cpl0": self.syscall_enters_cpl0,
            "syscall_fault": self.syscall_fault,
            "limits": self.limits,
            "problems": [{"what": p.what, "mend": p.mend} for p in self.problems],
            "parts": {
                part.name: {key: getattr(part, key) for key in part.__slots__ if key != "name"}
                for part in self.parts
            },
        }


def examine(path: str = DEV_KVM) -> Report:
    """Examine this host with the KVM device `path`; a fifth of a second, no privileges but its use.

    Never raises for what is wrong with the host: that is in the report.
    """
    report = Report(path, Host())
    try:
        kvm = Kvm(path)
    except HostError as err:
        report.problems = access.diagnose(path, report.host, str(err))
        return report
    with kvm:
        report.api_version = kvm.api_version
        report.capabilities = capabilities.check(kvm)
        report.limits = capabilities.limits(kvm)
        missing = [cap.name for cap in report.capabilities if cap.required and not cap.value]
        if missing:
            report.problems.append(
                Problem(
                    f"this KVM lacks {', '.join(missing)}", "use Linux 4.12 or later, for x86-64"
                )
            )
        try:
            # Kept while the guests run: the host's kernel patches itself for the first VM and
            # again after the last, which is slow.
            with kvm.create_vm():
                report.usable = not missing
                _run_guests(kvm, report)
        except HostError as err:
            report.problems.insert(0, Problem(str(err), "end other hypervisors; free memory"))
    return report


def _run_guests(kvm: Kvm, report: Report) -> None:
    try:
        report.cpl0_mips = measure.loop_mips(kvm, 0)
        report.cpl3_mips = measure.loop_mips(kvm, 3)
        for _ in range(2):
            if report.interpreted:  # or the host was only busy just then
                report.cpl0_mips = max(report.cpl0_mips, measure.loop_mips(kvm, 0))
        report.syscall_fault = measure.syscall_fault(kvm)
    except (GuestFailed, HostError) as err:
        report.problems.append(
            Problem(f"a guest of five instructions failed: {err}", "see dmesg; update the kernel")
        )
    if report.host.backend == "kvm_pvm" or report.interpreted or report.syscall_fault:
        report.problems.append(
            Problem(
                "no hardware virtualization is behind this KVM",
                "for stock Linux use a host that offers VT-x or AMD-V (a cloud: an instance type "
                "with nested virtualization, or bare metal), or an emulated one: "
                "qemu-system-x86_64 -accel tcg -cpu max",
            )
            if report.host.backend == "kvm_pvm"
            else Problem(
                "this KVM does not run guest kernel code as a processor does",
                "update the host's kernel, or its hypervisor's",
            )
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
