"""A report as text for people: aligned, at most 80 columns where the values allow."""

from __future__ import annotations

import textwrap

from vmm.kvm.host import BACKENDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.doctor.examination import Report
    from vmm.doctor.parts import Part

LABEL = 13
WIDTH = 80
PART = 22
"""The column in which what a part is for begins."""


def render(report: Report, *, colour: bool = False, width: int = WIDTH) -> str:
    """The whole report in `width` columns; escape sequences only with `colour`."""
    bold = "\x1b[1m{}\x1b[0m" if colour else "{}"
    red = "\x1b[31m{}\x1b[0m" if colour else "{}"
    host = report.host
    lines = [_row("host", f"{host.kernel}, {host.processor}", width)]
    if host.nested or host.container:
        kinds = ["a virtual machine"] if host.nested else []
        kinds += [f"a container ({host.container})"] if host.container else []
        lines.append(_row("", f"itself in {' and '.join(kinds)}", width))
    lines.append(_row("back end", _backend(report), width))
    if report.api_version is not None:
        lines.append(_row(report.path, f"opens, API version {report.api_version}", width))
    else:
        lines.append(_row(report.path, "cannot be used", width))
    if report.cpl0_mips is not None and report.cpl3_mips is not None:
        how = "interpreted" if report.interpreted else "on the processor"
        lines.append(_row("kernel code", f"{how}, {_speed(report.cpl0_mips)} (CPL0)", width))
        lines.append(
            _row("user code", f"on the processor, {_speed(report.cpl3_mips)} (CPL3)", width)
        )
    if report.syscall_fault is not None:
        fault = report.syscall_fault
        lines.append(
            _row(
                "syscall",
                f"does not enter CPL0: {fault}" if fault else "enters CPL0 and returns",
                width,
            )
        )
    if report.limits:
        limits = report.limits
        text = f"{limits['vcpus_max']} vCPUs ({limits['vcpus_recommended']} recommended), "
        text += f"{limits['memory_slots']} memory slots, {limits['gsi_routes']} GSI routes"
        lines.append(_row("limits", text, width))
    if report.capabilities:
        lines += ["", "capabilities (* required)"]
        longest = max(len(cap.name) for cap in report.capabilities)
        for cap in report.capabilities:
            value = f"{cap.value:>7}" if cap.value else red.format("     no")
            star = "*" if cap.required else " "
            lines.append(f"{star} {cap.name:{longest}} {value}  {cap.purpose}")
    kind = ""
    for part in report.parts:
        if part.kind != kind:
            kind = part.kind
            lines += ["", PART_HEADS[kind]]
        lines += _part(part, width, red)
    if report.problems:
        lines += ["", "problems"]
        for problem in report.problems:
            lines += _wrap(f"- {problem.what}", "  ", width)
            lines += _wrap(f"  mend: {problem.mend}", " " * 8, width)
    lines += ["", bold.format("\n".join(_wrap(report.verdict, "", width)))]
    return "\n".join(lines) + "\n"


PART_HEADS = {
    "built in": "compiled parts",
    "library": "libraries",
    "program": "helper programs",
    "host": "this host, for this user",
}


def _part(part: Part, width: int, red: str) -> list[str]:
    head = f"  {part.name:{PART - 3}} "
    said = part.value or ("there" if part.there else "not there")
    lines = _wrap(f"{head}{said}; {part.purpose}", " " * PART, width)
    if not part.there:
        lines[0] = head + red.format(lines[0][len(head) :])
        lines += _wrap(" " * PART + f"mend: {part.mend}", " " * (PART + 2), width)
    return lines


def _backend(report: Report) -> str:
    name = report.host.backend
    if not name:
        return "none loaded" if report.api_version is None else "unknown to this program"
    return f"{name} ({BACKENDS[name]}{', nested' if report.host.nested else ''})"


def _row(label: str, value: str, width: int) -> str:
    gap = max(LABEL - len(label), 1)
    return "\n".join(_wrap(label + " " * gap + value, " " * LABEL, width))


def _wrap(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _speed(mips: float) -> str:
    return f"{mips:,.1f} M insn/s" if mips < 10 else f"{mips:,.0f} M insn/s"
