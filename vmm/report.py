"""The report of a vCPU that cannot go on: cause, registers, code, and what to do about it.

Plain values in, text out: nothing here talks to KVM. The kinds are those of linux/kvm.h's exits:

    emulation-failure  KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION
    internal-error     KVM_EXIT_INTERNAL_ERROR, any other suberror
    fail-entry         KVM_EXIT_FAIL_ENTRY
    triple-fault       KVM_EXIT_SHUTDOWN
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Instruction = tuple[int, bytes, str, str]
    """Address, bytes, text, mnemonic."""

EMULATION_FAILURE = "emulation-failure"
INTERNAL_ERROR = "internal-error"
FAIL_ENTRY = "fail-entry"
TRIPLE_FAULT = "triple-fault"

CODE_BYTES = 48
"""How many bytes at RIP are worth passing: a few instructions (one has at most 15)."""

INSTRUCTIONS = 6

_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr")
_FIELDS = ("selector", "base", "limit", "l", "db", "dpl")

_RFLAGS = (
    *((0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF")),
    *((11, "OF"), (14, "NT"), (16, "RF"), (17, "VM"), (18, "AC"), (21, "ID")),
)
_CR0_PE = 1
_EFER_SCE = 1
_EFER_LMA = 1 << 10
_RFLAGS_VM = 1 << 17

_SUBERRORS = {
    2: "an exception came up while KVM delivered another (KVM_INTERNAL_ERROR_SIMUL_EX)",
    3: "an interrupt or exception could not be delivered (KVM_INTERNAL_ERROR_DELIVERY_EV)",
    4: "the processor left the guest for a reason KVM does not know "
    "(KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON)",
}
_ENTRY_REASONS = {
    # Intel SDM volume 3C: basic exit reasons with bit 31 set; 7 and 8: table 31-1, error numbers.
    0x8000_0021: "invalid guest state",
    0x8000_0022: "an MSR could not be loaded",
    0x8000_0029: "a machine check",
    0x7: "invalid control fields",
    0x8: "invalid host state",
    # AMD APM volume 2, appendix C: VMEXIT_INVALID.
    0xFFFF_FFFF: "invalid guest state",
    0xFFFF_FFFF_FFFF_FFFF: "invalid guest state",
}
_EXITS = {
    "KVM_EXIT_MEMORY_FAULT": (
        "the host's memory under an address the guest used cannot be accessed",
        "see that the host is not out of memory or huge pages, and that no file under guest "
        "memory was cut short",
    ),
    "KVM_EXIT_DEBUG": (
        "a breakpoint or a single step that was asked for with KVM_SET_GUEST_DEBUG",
        "take the guest debug flags off the vCPU: `Machine` does not serve a debugger",
    ),
}
_EXIT_UNKNOWN = (
    "this monitor did not ask for it and does not know what it wants",
    "please report it as a bug of vmm's, with the host's kernel version and this text",
)
_RESET = {"rip": 0xFFF0, "cs.base": 0xFFFF_0000, "cs.selector": 0xF000}


def instruction_bytes(data: Sequence[int]) -> bytes:
    """The failing instruction's bytes in `internal.data` of an emulation failure, or none.

    `data` are the `ndata` 64-bit words KVM gave. They overlay struct emulation_failure: flags,
    then insn_size (8 bits) and insn_bytes (15), valid with
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES. More than one instruction may be there.
    """
    if len(data) < 3 or not data[0] & 1:
        return b""
    raw = data[1].to_bytes(8, "little") + data[2].to_bytes(8, "little")
    return raw[1 : 1 + min(raw[0], 15)]


def registers(regs: Any, sregs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """`struct kvm_regs` and `struct kvm_sregs` as `format_failure` takes them."""
    general = {name: int(getattr(regs, name)) for name in (*_GENERAL, "rip", "rflags")}
    system = {name: int(getattr(sregs, name)) for name in _CONTROL}
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        for field in _FIELDS:
            system[f"{name}.{field}"] = int(getattr(segment, field))
    return general, system


def mode(regs: Mapping[str, int], sregs: Mapping[str, int]) -> tuple[str, int, int]:
    """The processor's mode in words, the size of its code in bits, and its CPL."""
    if not sregs.get("cr0", 0) & _CR0_PE:
        return "real mode", 16, 0
    if regs.get("rflags", 0) & _RFLAGS_VM:
        return "virtual-8086 mode", 16, 3
    cpl = sregs.get("ss.dpl", sregs.get("cs.selector", 0)) & 3
    bits = 32 if sregs.get("cs.db", 0) else 16
    if sregs.get("efer", 0) & _EFER_LMA:
        if sregs.get("cs.l", 0):
            return "64-bit mode", 64, cpl
        return f"{bits}-bit compatibility mode", bits, cpl
    return f"{bits}-bit protected mode", bits, cpl


def linear_rip(regs: Mapping[str, int], sregs: Mapping[str, int]) -> int:
    """The linear address of the next instruction: CS base and RIP, within the mode's width."""
    rip = regs.get("rip", 0)
    if mode(regs, sregs)[1] == 64:
        return rip
    return sregs.get("cs.base", 0) + rip & 0xFFFF_FFFF


def format_failure(
    cause: str,
    regs: Mapping[str, int],
    sregs: Mapping[str, int],
    code: bytes,
    backend: str,
    vcpu: int,
    *,
    insn: bytes = b"",
    suberror: int = 0,
    data: Sequence[int] = (),
    reason: int = 0,
    exit_name: str = "",
) -> str:
    """The whole report, lines ended by newlines; the first line alone says what happened.

    Args:
        cause: one of this module's kinds.
        regs: rax to r15, rip, rflags.
        sregs: cr0, cr2, cr3, cr4, efer, and `cs.selector`, `cs.base`, `cs.l`, `cs.db`, `ss.dpl`
            and so on; what is missing is left out (see `registers`).
        code: guest memory at the linear RIP, up to CODE_BYTES; empty if there is none.
        backend: KVM's vendor module: kvm_intel, kvm_amd, kvm_pvm.
        vcpu: its number.
        insn: the bytes KVM tells of (`instruction_bytes`); they stand in for missing code.
        suberror, data: of an internal error.
        reason: hardware_entry_failure_reason of a failed entry.
        exit_name: of an exit this monitor has no use for (`KVM_EXIT_DEBUG`); the cause is then
            INTERNAL_ERROR, but KVM does not call it one.
    """
    words, bits, cpl = mode(regs, sregs)
    at = linear_rip(regs, sregs)
    if cause == EMULATION_FAILURE and insn and not code.startswith(insn):
        code = insn  # what KVM fetched, whatever memory holds now
    listing = _decode(code, at, bits)
    first = listing[0] if listing else None
    if exit_name:
        title, detail = f"unexpected exit {exit_name}", _EXITS.get(exit_name, _EXIT_UNKNOWN)[0]
    else:
        title, detail = _what(cause, first, code, suberror, reason)
    lines = [f"vCPU {vcpu}: {title} at {at:#x} ({words}, CPL {cpl}): {detail}"]
    if data and cause == INTERNAL_ERROR:
        lines.append("  data " + " ".join(f"{word:#x}" for word in data))
    lost = cause == TRIPLE_FAULT and _was_reset(regs, sregs)
    if lost:
        lines.append("  (AMD-V does not keep the state before: these are the values after reset)")
    lines += register_lines(regs, sregs)
    if not lost:
        lines += _code_lines(code, at, listing)
    system_calls = bool(sregs.get("efer", 0) & _EFER_SCE)
    why = _why(cause, first, code, backend, cpl, system_calls)
    if why:
        lines.append(f"  why: {why}")
    no_instruction = first is not None and not first[3]
    if exit_name:
        lines.append("  what to do: " + _EXITS.get(exit_name, _EXIT_UNKNOWN)[1])
    else:
        advice = _advice(cause, code, at, backend, cpl, lost, no_instruction)
        lines.append("  what to do: " + advice)
    return "\n".join(lines) + "\n"


# --- the words --------------------------------------------------------------------------------


def _name(first: Instruction | None, code: bytes) -> str:
    """The instruction in a few words: its text, or its bytes."""
    if first is not None:
        return f"`{first[2]}`"
    return f"the instruction {code[:15].hex(' ')}" if code else "the instruction"


def _what(
    cause: str, first: Instruction | None, code: bytes, suberror: int, reason: int
) -> tuple[str, str]:
    """The failure's name, and what it means."""
    if cause == EMULATION_FAILURE:
        return "emulation failure", f"KVM cannot emulate {_name(first, code)}"
    if cause == TRIPLE_FAULT:
        return "triple fault", "the guest could not handle an exception, nor those that followed"
    if cause == FAIL_ENTRY:
        meaning = _ENTRY_REASONS.get(reason, "see the processor's manual")
        return "entry refused by the processor", f"reason {reason:#x}, {meaning}"
    return f"KVM internal error {suberror}", _SUBERRORS.get(suberror, "unknown to this version")


def _why(
    cause: str,
    first: Instruction | None,
    code: bytes,
    backend: str,
    cpl: int,
    system_calls: bool,
) -> str:
    # A kernel that has not set up SYSCALL yet fails for a reason of its own.
    if cause == TRIPLE_FAULT and backend == "kvm_pvm" and system_calls:
        return (
            "perhaps this host's KVM: under kvm_pvm, SYSCALL from CPL 3 does not enter the "
            "guest's kernel properly"
        )
    if cause != EMULATION_FAILURE or not code:
        return ""
    if not any(code):
        return "the code is all zeros: the guest runs in memory that nobody has filled"
    if first is not None and not first[3]:
        return "these bytes are no instruction in this mode: no code, or code for another mode"
    if backend == "kvm_pvm" and cpl == 0:
        name = first[3] if first is not None and first[3] else _name(first, code)
        return (
            "this host's KVM is kvm_pvm, which interprets guest kernel code, "
            f"and {name} is not known to its interpreter"
        )
    return "KVM emulates accesses to addresses without memory behind them, but not in every form"


def _advice(
    cause: str, code: bytes, at: int, backend: str, cpl: int, lost: bool, no_instruction: bool
) -> str:
    if cause == EMULATION_FAILURE:
        if not code:
            return (
                f"there is no guest memory at {at:#x}: see what jumped there "
                "(the return address is at rsp)"
            )
        if not any(code) or no_instruction:
            return "check the kernel's load address and entry point, and the mode it expects"
        if backend == "kvm_pvm" and cpl == 0:
            return "stock Linux cannot run here; use a host with VT-x or AMD-V, see `vmm doctor`"
        return "use plain loads and stores (mov) on device memory, or give the guest memory there"
    if cause == TRIPLE_FAULT:
        if lost:
            return "boot Linux with earlyprintk=serial, and see the console's last lines"
        return (
            "see cr2 (the last page fault's address) and the console's last lines; "
            "a guest of your own needs an IDT before anything can fault"
        )
    if cause == FAIL_ENTRY:
        return (
            "compare cr0, cr4, efer and the segments with the mode you meant: what KVM_SET_SREGS "
            "or KVM_SET_MSRS set contradicts itself; dmesg on the host has the details"
        )
    return "see dmesg on the host; check that the guest's IDT, GDT and stack are in its memory"


def _was_reset(regs: Mapping[str, int], sregs: Mapping[str, int]) -> bool:
    both = {**regs, **sregs}
    return all(both.get(name) == value for name, value in _RESET.items())


# --- registers ----------------------------------------------------------------------------------


def register_lines(regs: Mapping[str, int], sregs: Mapping[str, int]) -> list[str]:
    """Lines of text for a person, from what `registers` gave."""
    flags = regs.get("rflags", 0)
    names = " ".join(name for bit, name in _RFLAGS if flags >> bit & 1)
    lines = [f"  rip  {regs.get('rip', 0):016x}  rflags {flags:08x} [{names}]"]
    cells = [f"{name:4} {regs[name]:016x}" for name in _GENERAL if name in regs]
    lines += _rows(cells, 4)
    lines += _rows([f"{name:4} {sregs[name]:016x}" for name in _CONTROL if name in sregs], 4)
    lines += _rows(
        [
            f"{name:4} {sregs[f'{name}.selector']:04x} base {sregs.get(f'{name}.base', 0):016x}"
            for name in _SEGMENTS
            if f"{name}.selector" in sregs
        ],
        3,
    )
    return lines


def _rows(cells: list[str], columns: int) -> list[str]:
    return ["  " + "  ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]


# --- code -----------------------------------------------------------------------------------------


def _decode(code: bytes, at: int, bits: int) -> list[Instruction]:
    """The first instructions of `code`; none without iced-x86."""
    try:
        import iced_x86
    except ImportError:
        return []
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.space_after_operand_separator = True
    decoder = iced_x86.Decoder(bits, code, ip=at)
    found: list[Instruction] = []
    while decoder.can_decode and len(found) < INSTRUCTIONS:
        start = decoder.position
        instruction = decoder.decode()
        if instruction.is_invalid and decoder.last_error == iced_x86.DecoderError.NO_MORE_BYTES:
            break
        raw = code[start : start + instruction.len]
        if instruction.is_invalid:
            found.append((at + start, raw, "(no valid instruction)", ""))
            break
        name = formatter.format_mnemonic(instruction, iced_x86.FormatMnemonicOptions.NO_PREFIXES)
        found.append((at + start, raw, formatter.format(instruction), name))
    return found


def _code_lines(code: bytes, at: int, listing: list[Instruction]) -> list[str]:
    if not code:
        return ["  code: none, RIP is outside guest memory"]
    if listing:
        lines = ["  code:"]
        for address, raw, text, _ in listing:
            mark = "=>" if address == at else "  "
            lines.append(f"  {mark} {address:016x}  {raw.hex(' '):30}  {text}".rstrip())
        return lines
    lines = ["  code (decoded with iced-x86: pip install 'vmm-kvm[full]'):"]
    for offset in range(0, min(len(code), CODE_BYTES), 16):
        mark = "=>" if offset == 0 else "  "
        lines.append(f"  {mark} {at + offset:016x}  {code[offset : offset + 16].hex(' ')}")
    return lines
