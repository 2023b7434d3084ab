"""An exit that ends the machine, as a MachineExit with its report."""

from __future__ import annotations

import os

from vmm import report
from vmm.errors import GuestMemoryError, KvmError
from vmm.kvm import constants
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Vcpu
    from vmm.machine.machine import Machine
    from vmm.memory import GuestMemory

BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")


def backend() -> str:
    """The loaded vendor module of KVM, or an empty string where none is known."""
    for name in BACKENDS:
        if os.path.isdir(f"/sys/module/{name}"):
            return name
    return ""


def describe(machine: Machine, vcpu: Vcpu, exit_reason: int) -> MachineExit:
    """What `exit_reason` (constants.EXIT_*) means for the machine. On the vCPU's thread."""
    run = vcpu.kvm_run
    suberror = reason = 0
    name = ""
    data: list[int] = []
    insn = b""
    if exit_reason == constants.EXIT_SHUTDOWN:
        kind, message = exits.TRIPLE_FAULT, "triple fault: the guest could not handle a fault"
    elif exit_reason == constants.EXIT_FAIL_ENTRY:
        kind = exits.FAIL_ENTRY
        reason = int(run.fail_entry.hardware_entry_failure_reason)
        message = f"the processor refused to enter the guest (reason {reason:#x})"
    elif exit_reason == constants.EXIT_INTERNAL_ERROR:
        suberror = int(run.internal.suberror)
        data = [int(run.internal.data[i]) for i in range(min(run.internal.ndata, 16))]
        kind = exits.INTERNAL_ERROR
        message = f"KVM internal error, suberror {suberror}"
        if suberror == constants.INTERNAL_ERROR_EMULATION:
            kind = exits.EMULATION_FAILURE
            insn = report.instruction_bytes(data)
            message = "KVM could not emulate an instruction of the guest"
    else:
        name = constants.EXIT_NAMES.get(exit_reason, f"number {exit_reason}")
        kind, message = exits.INTERNAL_ERROR, f"unexpected exit {name}"
    try:
        regs, sregs = report.registers(vcpu.get_regs(), vcpu.get_sregs())
    except KvmError as err:
        return MachineExit(kind, f"{message}; its registers cannot be read ({err})")
    text = report.format_failure(
        kind,
        regs,
        sregs,
        code_at(vcpu, machine.memory, report.linear_rip(regs, sregs)),
        backend(),
        vcpu.number,
        insn=insn,
        suberror=suberror,
        data=data,
        reason=reason,
        exit_name=name,
    )
    return MachineExit(kind, message, report=text)


def code_at(vcpu: Vcpu, memory: GuestMemory, linear: int) -> bytes:
    """Guest memory at a linear address, up to report.CODE_BYTES, as far as it is mapped."""
    code = b""
    while len(code) < report.CODE_BYTES:
        at = linear + len(code)
        try:
            gpa = vcpu.translate(at)
            if gpa is None:
                break
            code += memory.read(gpa, min(report.CODE_BYTES - len(code), 4096 - (at & 4095)))
        except (KvmError, GuestMemoryError, OverflowError):
            break
    return code
