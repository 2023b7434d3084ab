"""Small guests in assembly, run straight on vmm.kvm and vmm.memory, without vmm.machine.

A guest has RAM from 0 (2 MiB unless asked otherwise), starts at CODE in the mode asked for, and has
a stack, a GDT and an IDT. Source is GNU assembler (AT&T syntax); what it may use is in PRELUDE.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

from vmm import layout
from vmm.boot import paging
from vmm.doctor import guest as doctor
from vmm.errors import KvmError
from vmm.kvm import Kvm, Vcpu, constants
from vmm.kvm.ffi import ffi
from vmm.memory import GuestMemory
from vmm.testing.kernels import cache_directory

CODE = 0x2000
HANDLERS = CODE + 0x400
"""GPA of the first interrupt handler; each has HANDLER_SIZE bytes."""
HANDLER_SIZE = 0x80
STACK = 0x8000
TSS, GDT, IDT = 0x600, layout.GDT, 0x1000
DATA = 0xF000
"""GPA of a page for the guest's own use, above the page tables and below 64 KiB."""
MMIO = 0xD0000000
"""A GPA where there is no memory."""
LIMIT = 30.0
"""Seconds a guest may run to its next exit; only an emulated host comes near it."""

CODE_32, CODE_64, DATA_SEL, TSS_SEL = 0x08, 0x10, 0x18, 0x30
CR4_OSFXSR = 1 << 9
USER_CODE, USER_DATA = 0x20 | 3, 0x28 | 3
_DESCRIPTORS = (
    0,
    paging.CODE_32,
    paging.CODE_64,
    paging.DATA,
    paging.CODE_64 | 3 << 45,  # DPL 3
    paging.DATA | 3 << 45,
    0x0000890006000067,  # TSS at 0x600 (its upper half, 0, follows)
    0,
)
MODES = {"real": 16, "protected": 32, "long": 64, "user": 64}
"""`user` is `long` with `to_user` as its first step."""

PRELUDE = f"""
.set DATA, {DATA}
.set MMIO, {MMIO}
.set LAPIC, {layout.LAPIC}
.set IOAPIC, {layout.IOAPIC}
.set EXIT, 0xf4
.macro done value=0
    mov $\\value, %al
    out %al, $EXIT
.endm
.macro poke address, value      # a 32-bit store anywhere below 4 GiB, outside real mode
    mov $\\address, %eax
    movl $\\value, (_AX_)
.endm
.macro eoi
    poke LAPIC+0xb0, 0
.endm
.macro enable_apic              # spurious vector register: on, vector 0xff
    poke LAPIC+0xf0, 0x1ff
.endm
.macro to_user flags=0x3002     # go on after this at CPL3, with these flags (IOPL 3)
    pushq ${USER_DATA}
    pushq ${STACK}
    pushq $\\flags
    pushq ${USER_CODE}
    pushq $1f
    iretq
1:
.endm
"""


@functools.cache
def assemble(source: str, mode: str, handlers: tuple[str, ...] = ()) -> bytes:
    """Machine code of `source` for CODE, with the n-th of `handlers` at its place after it."""
    text = PRELUDE.replace("_AX_", "%rax" if MODES[mode] == 64 else "%eax")
    text += f".code{MODES[mode]}\n{'to_user' if mode == 'user' else ''}\n{source}\n"
    for position, handler in enumerate(handlers):
        text += f".org {HANDLERS - CODE + position * HANDLER_SIZE:#x}\n{handler}\n"
    # Kept on disk: in the nested lane `as` and `ld` take longer than the guest.
    kept = cache_directory() / "guests" / hashlib.sha256(text.encode()).hexdigest()
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "guest")
        _tool(["as", "--64", "-o", f"{path}.o", "-"], text)
        _tool(["ld", "--oformat=binary", f"-Ttext={CODE:#x}", "-e0", "-o", f"{path}", f"{path}.o"])
        code = path.read_bytes()
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(code)
        unfinished.rename(kept)
    return code


def _tool(command: list[str], stdin: str | None = None) -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr}\n{stdin}")


class Io(NamedTuple):
    """A port access of `times` items of `size` bytes; `data` is what the guest wrote, or None."""

    port: int
    size: int
    data: bytes | None
    times: int = 1


class Mmio(NamedTuple):
    """An access to where there is no memory."""

    addr: int
    size: int
    data: bytes | None


def write_tables(memory: GuestMemory, mode: str, vectors: Iterable[int]) -> None:
    """GDT, TSS, page tables, and an IDT with the gates of `vectors`, in order of their handlers."""
    memory.write(GDT, struct.pack(f"<{len(_DESCRIPTORS)}Q", *_DESCRIPTORS))
    memory.write_u64(TSS + 4, STACK - 0x800)  # RSP0, under the stack itself
    paging.write_page_tables(memory)
    entries = struct.unpack("<3072Q", memory.read(layout.PML4, 0x6000))
    user = (entry | 4 if entry else 0 for entry in entries)  # pages user code may use too
    memory.write(layout.PML4, struct.pack("<3072Q", *user))
    for position, vector in enumerate(vectors):
        target = HANDLERS + position * HANDLER_SIZE
        if mode == "real":
            memory.write(vector * 4, struct.pack("<HH", target, 0))
        elif mode == "protected":
            gate = struct.pack("<HHHH", target & 0xFFFF, CODE_32, 0x8E00, target >> 16)
            memory.write(IDT + 8 * vector, gate)
        else:
            gate = struct.pack("<HHHHQ", target & 0xFFFF, CODE_64, 0xEE00, 0, 0)
            memory.write(IDT + 16 * vector, gate)


def set_up(vcpu: Vcpu, mode: str, values: Mapping[str, int]) -> None:
    """Registers as a guest has them that is about to run what is at CODE."""
    sregs = vcpu.get_sregs()
    if mode == "real":
        sregs.cs.base = sregs.cs.selector = 0
    else:
        code, long = (CODE_32, 0) if mode == "protected" else (CODE_64, 1)
        # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
        sregs.cs = (0, 0xFFFFFFFF, code, 11, 1, 0, 1 - long, 1, long, 1, 0, 0, 0)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, (0, 0xFFFFFFFF, DATA_SEL, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0))
        sregs.tr = (TSS, 0x67, TSS_SEL, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
        sregs.gdt.base, sregs.gdt.limit = GDT, 8 * len(_DESCRIPTORS) - 1
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF if long else 0x7FF
        sregs.cr4 = CR4_OSFXSR
        sregs.cr0 = doctor.CR0_PE | doctor.CR0_ET | doctor.CR0_NE
        if long:
            sregs.cr0 |= doctor.CR0_PG
            sregs.cr3 = layout.PML4
            sregs.cr4 |= doctor.CR4_PAE
            sregs.efer = doctor.EFER_LME | doctor.EFER_LMA
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = CODE, STACK, doctor.RFLAGS_FIXED
    for name, value in values.items():
        setattr(regs, name, value)
    vcpu.set_regs(regs)


class Guest:
    """A VM with one vCPU about to run `source` (or machine code).

    Args:
        handlers: assembly by interrupt vector; the others' gates are not present.
        irqchip: an in-kernel interrupt controller; without, the vCPU has no local APIC and
            HLT comes out.
        split_irqchip: only the local APICs are the kernel's.
        pit: an in-kernel timer.
        map_memory: False leaves the memory slots to the caller.
        regs: initial values by register name.

    >>> with Guest("mov $7, %al; out %al, $0xf4", "real") as guest:  # doctest: +SKIP
    ...     guest.io()
    Io(port=244, size=1, data=b'\\x07', times=1)
    """

    def __init__(
        self,
        source: str | bytes,
        mode: str = "long",
        *,
        handlers: Mapping[int, str] | None = None,
        memory: int = 2 * layout.MIB,
        irqchip: bool = True,
        split_irqchip: bool = False,
        pit: bool = False,
        map_memory: bool = True,
        **regs: int,
    ) -> None:
        self.mode = mode
        self.vectors = dict(handlers or {})
        with contextlib.ExitStack() as stack:
            self.kvm = stack.enter_context(Kvm())
            self.memory = stack.enter_context(GuestMemory(memory))
            self.vm = stack.enter_context(self.kvm.create_vm())
            # Intel hosts without "unrestricted guest" want both for real mode.
            self.vm.set_tss_addr(layout.TSS)
            self.vm.set_identity_map_addr(layout.IDENTITY_MAP)
            if irqchip:
                self.vm.create_irqchip()
            if split_irqchip:
                self.vm.enable_cap(constants.CAP_SPLIT_IRQCHIP, layout.IOAPIC_PINS)
            if pit:
                self.vm.create_pit2()
            if map_memory:
                self.vm.set_user_memory_region(0, 0, memory, self.memory.regions[0].hva)
            self.vcpu = stack.enter_context(self.vm.create_vcpu(0))
            self.vcpu.set_cpuid2(self.kvm.supported_cpuid())
            if isinstance(source, str):
                source = assemble(source, mode, tuple(self.vectors.values()))
            self.memory.write(CODE, source)
            write_tables(self.memory, mode, self.vectors)
            set_up(self.vcpu, mode, regs)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # --- running ----------------------------------------------------------------------------------

    def run(self, limit: float = LIMIT, vcpu: Vcpu | None = None) -> int:
        """KVM_RUN (of another vCPU) to the next exit; its reason.

        AssertionError if there is none in time.
        """
        vcpu = vcpu or self.vcpu
        with doctor._Limit(vcpu, limit) as deadline:
            while True:
                try:
                    reason = vcpu.run()
                except KvmError as err:
                    if err.errno not in (errno.EINTR, errno.EAGAIN):
                        raise
                    assert not deadline.passed, f"no exit in {limit:g} s; {self.where()}"
                    continue
                if reason != constants.EXIT_INTR:
                    return reason

    def complete(self) -> None:
        """Finish what the last exit left open, so that registers are as after the instruction.

        With kvm_amd, RIP is at an OUT until then (api.rst 5: KVM_RUN, KVM_EXIT_IO).
        """
        self.vcpu.kvm_run.immediate_exit = 1
        try:
            self.vcpu.run()
        except KvmError as err:
            assert err.errno == errno.EINTR, err
        else:
            raise AssertionError(f"KVM_RUN did not heed immediate_exit; {self.where()}")
        finally:
            self.vcpu.kvm_run.immediate_exit = 0

    def io(self, limit: float = LIMIT) -> Io:
        """Run to the next port access."""
        self._expect(constants.EXIT_IO, limit)
        return self.port_access()

    def port_access(self) -> Io:
        """The port access that the last exit was."""
        io = self.vcpu.kvm_run.io
        data = None
        if io.direction == constants.EXIT_IO_OUT:
            start = io.data_offset
            data = bytes(self.vcpu.run_map[start : start + io.size * io.count])
        return Io(io.port, io.size, data, io.count)

    def answer_io(self, data: bytes) -> None:
        """What the port read that was the last exit gives."""
        io = self.vcpu.kvm_run.io
        assert len(data) == io.size * io.count
        self.vcpu.run_map[io.data_offset : io.data_offset + len(data)] = data

    def mmio(self, limit: float = LIMIT) -> Mmio:
        """Run to the next memory-mapped access."""
        self._expect(constants.EXIT_MMIO, limit)
        return self.memory_access()

    def memory_access(self) -> Mmio:
        """The memory-mapped access that the last exit was."""
        mmio = self.vcpu.kvm_run.mmio
        data = bytes(mmio.data)[: mmio.len] if mmio.is_write else None
        return Mmio(mmio.phys_addr, mmio.len, data)

    def answer_mmio(self, data: bytes) -> None:
        """What the memory-mapped read that was the last exit gives."""
        mmio = self.vcpu.kvm_run.mmio
        assert len(data) == mmio.len and not mmio.is_write
        ffi.buffer(mmio.data)[: len(data)] = data

    def done(self, limit: float = LIMIT) -> int:
        """Run to `done`; its value."""
        access = self.io(limit)
        assert access.port == layout.PORT_EXIT and access.data is not None, access
        return access.data[0]

    def _expect(self, wanted: int, limit: float) -> None:
        reason = self.run(limit)
        name = constants.EXIT_NAMES.get(reason, str(reason))
        assert reason == wanted, f"{name}; {self.where()}"

    def where(self) -> str:
        """Where it is, for a failed test."""
        regs = self.vcpu.get_regs()
        at = self.vcpu.translate(regs.rip)
        inside = at is not None and self.memory.contains(at, 8)
        code = self.memory.read(at, 8).hex() if inside and at is not None else "?"
        run = self.vcpu.kvm_run
        last = f"last exit {run.exit_reason}"
        if run.exit_reason == constants.EXIT_INTERNAL_ERROR:
            last += f", suberror {run.internal.suberror}"
        return f"{last}; rip {regs.rip:#x}: {code}, rax {regs.rax:#x}, rflags {regs.rflags:#x}"

    def put(self, **values: int) -> None:
        """Set registers by name."""
        regs = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def get(self, name: str) -> int:
        """A register by name."""
        return int(getattr(self.vcpu.get_regs(), name))
