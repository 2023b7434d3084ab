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

DRIVER_OK = 4
"""The status bit a virtio driver sets when it is ready (virtio 1.2, section 2.1)."""
BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")


def backend() -> str:
    """The loaded vendor module of KVM, or an empty string where none is known."""
    for name in BACKENDS:
        if os.path.isdir(f"/sys/module/{name}"):
            return name
    return ""


SHOWN_VCPUS = 4
"""Of how many vCPUs `what_is_known` tells."""


def what_is_known(machine: Machine) -> list[str]:
    """Lines about a guest that was ended from outside: what it printed, where its vCPUs were.

    For a machine that has stopped and is not closed. Plain text of this monitor's own, but for the
    guest's last line.
    """
    return [*console_known(machine), *vcpus_known(machine)]


def console_known(machine: Machine) -> list[str]:
    """What may explain an empty console, where it is; else nothing."""
    config = machine.config
    lines = []
    if not machine.console.position:
        lines.append("nothing was ever written to the console (ttyS0)")
        boot = machine.boot
        if boot is not None and boot.is_linux and "console=" not in config.cmdline:
            lines[0] += "; the command line has no console=ttyS0"
    hvc = machine.platform.hvc
    if config.hvc and hvc is not None and not hvc.status & DRIVER_OK:
        lines.append("no driver took the virtio console (hvc0)")
    return lines


def vcpus_known(machine: Machine) -> list[str]:
    """Where each vCPU was; nothing where that cannot be read."""
    lines = []
    for vcpu in machine.vcpus[:SHOWN_VCPUS]:
        try:
            state = vcpu.get_mp_state()
            regs, sregs = report.registers(vcpu.get_regs(), vcpu.get_sregs())
        except KvmError:
            continue
        if state in (constants.MP_STATE_UNINITIALIZED, constants.MP_STATE_INIT_RECEIVED):
            lines.append(f"vCPU {vcpu.number} was never started")
            continue
        mode, _, cpl = report.mode(regs, sregs)
        doing = "had halted" if state == constants.MP_STATE_HALTED else "was running"
        where = "kernel" if cpl == 0 else "user space"
        at = report.linear_rip(regs, sregs)
        lines.append(f"vCPU {vcpu.number} {doing} at {at:#x} in the guest's {where} ({mode})")
    left = len(machine.vcpus) - SHOWN_VCPUS
    return lines + ([f"and {left} more vCPUs"] if left > 0 else [])


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
    boot = machine.boot
    if boot is not None and not boot.is_linux and boot.kind == "long64":
        text += (
            "  the kernel, not known to be Linux, was started at its ELF entry in 64-bit mode: "
            "32-bit code there (for a multiboot loader) cannot run; a PVH note would have it start "
            "in 32-bit mode\n"
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
